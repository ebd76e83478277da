"""The vendor's packages: modelslab-py and modelslab-cli on its later paths, one that is older."""

from pathlib import Path

import numpy as np

from tests.support.certificates import write_certificate
from tests.support.clouds import Clouds
from tests.support.processes import ServerProcess, image_host
from tests.support.programs import KEY, CallClient, MakeCall, clients_folder, pixels, run
from tests.support.reverse_proxy import VENDOR, vendor_host

MODELSLAB, OLD = "vendor_modelslab.py", "vendor_stablediffusionapi.py"
APIS = ["community", "image_editing", "realtime"]


def test_each_api_of_the_package_makes_the_same_picture(
    client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    calls = [call(way=way, enterprise=paid) for way in APIS for paid in (False, True)]

    answers = client(MODELSLAB, *calls, call(seed=8))

    for answer in answers:
        clouds.assert_edited(answer.picture)
    first, *others, other_seed = [answer.picture for answer in answers]
    assert all(np.array_equal(each, first) for each in others)
    assert not np.array_equal(other_seed, first)


def test_fetch_under_each_prefix_gives_the_pictures(
    client: CallClient, call: MakeCall, clouds: Clouds
) -> None:
    calls = [call(way=way, enterprise=paid, fetch=True) for way in APIS for paid in (False, True)]

    for answer in client(MODELSLAB, *calls):
        clouds.assert_edited(answer.picture)


def test_errors_keep_our_text(client: CallClient, call: MakeCall, clouds: Clouds) -> None:
    wrong_key, no_prompt, broken, unknown = client(
        MODELSLAB,
        call(key="wrong"),
        call(prompt=""),
        call(image=clouds.broken),
        call(unknown="987654"),
    )

    assert "api key" in wrong_key.text.lower()
    assert "prompt field is required" in no_prompt.text
    assert "init_image" in broken.text
    assert "id" in unknown.text
    assert unknown.error


def test_old_package_finds_us_under_the_vendors_name(
    server: ServerProcess, client: CallClient, call: MakeCall, tmp_path: Path
) -> None:
    certificate = write_certificate(tmp_path / "vendor.pem", VENDOR)
    with vendor_host(server.url, certificate) as port:
        (answer,) = client(OLD, call(port=port), SSL_CERT_FILE=str(certificate))

    assert answer.picture.shape == (512, 512, 3)
    assert answer.picture.std() > 10


class TestCommandLine:
    """A static program of the vendor's, which takes URLs of pictures and neither steps nor seed."""

    def generate(
        self,
        server: ServerProcess,
        clouds: Clouds,
        folder: Path,
        fails: bool = False,
        key: str = KEY,
    ) -> str:
        """What `modelslab generate inpaint` prints."""
        with image_host(clouds.folder) as host:
            options = {
                "base-url": server.url,
                "api-key": key,
                "prompt": "a red circle",
                "init-image": f"{host}/{clouds.picture.name}",
                "mask-image": f"{host}/{clouds.mask.name}",
                "output-dir": str(folder / "generated"),
                "output": "json",
                "timeout": "60s",
            }
            flags = [word for name, value in options.items() for word in (f"--{name}", value)]
            program = clients_folder() / "bin" / "modelslab"
            words = ["generate", "inpaint", "--no-update-check", *flags]
            return run([program, *words], folder, fails=fails)

    def test_picture_is_saved(self, server: ServerProcess, clouds: Clouds, tmp_path: Path) -> None:
        self.generate(server, clouds, tmp_path)

        (saved,) = (tmp_path / "generated").iterdir()
        clouds.assert_edited(pixels(saved.read_bytes()))

    def test_wrong_key_is_shown(
        self, server: ServerProcess, clouds: Clouds, tmp_path: Path
    ) -> None:
        printed = self.generate(server, clouds, tmp_path, fails=True, key="wrong")

        assert "api key" in printed.lower()
