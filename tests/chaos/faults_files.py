"""Faults of what lies in files: damaged models, pictures and inputs that are gone."""

import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.chaos.hosts import Host
from tests.chaos.matrix import Found, fault, need_data_folder
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import Script
from tests.chaos.site import Site, expect, outside_world, running_site
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

BUILTIN = REPOSITORY / "models" / "builtin" / "weights"
LOADED_S = 120.0


def cut_off(weights: Path) -> None:
    """The last bytes are missing, as after a download that broke off."""
    weights.write_bytes(weights.read_bytes()[:-1_000])


def flip(weights: Path) -> None:
    """One byte of the numbers is another."""
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut off": cut_off,
    "missing": Path.unlink,
    "one byte flipped": flip,
}


@fault("F24", "model file damaged", within_s=None)
def model_damaged(room: Path) -> Found:
    """The real worker: the server ends with the reason, and restarts it in no hot loop."""
    told, gaps = [], []
    with outside_world() as (_thread, host):
        for name, damage in DAMAGES.items():
            model = room / name / "model"
            shutil.copytree(BUILTIN, model)
            damage(max((model / "unet").glob("*.safetensors")))
            reason, gap = start_with(model, host)
            told.append(f"{name}: {reason}")
            gaps += [f"{name}: {gap}"] if gap else []
    injected = f"the UNet's file {', '.join(DAMAGES)}"
    return Found(injected, f"ends and says why; {'; '.join(told)}", None, tuple(gaps))


def start_with(model: Path, host: Host) -> tuple[str, str]:
    """Start on a damaged model; what the server ends with, and a gap or "". Raises: Broken."""
    real = f"{sys.executable} -m server.cli.main worker"
    site = Site(model.parent, host, None, "--model", str(model), "--worker-command", real)
    try:
        site.start(is_ready=False)
        until(
            lambda: site.exit_status is not None or bool(site.log_events("worker ready")),
            LOADED_S,
            "the model is loaded, or is not",
        )
        if site.log_events("worker ready"):
            return "not noticed", "the server starts with it"
        expect(site.exit_status == 2, f"exit status {site.exit_status}")
        reason = site.log_path.read_text().splitlines()[-1]
        expect("unet" in reason, f"the reason does not name the file: {reason!r}")
        expect(len(site.log_events("worker started")) == 1, "the worker was started again")
        return reason.replace(str(model), "…"), ""
    finally:
        site.close()


@fault("F26", "file store and rows disagree")
def files_gone(room: Path) -> Found:
    """A dead link is a 404, not an error; the row says so and strays are cleared in time."""
    need_data_folder()  # rclone does not notice at once what goes behind its back
    with running_site(room) as site:
        oracle = Oracle(site)
        gone = site.accept(Script(tag="gone"), webhook=f"{site.host.url}/ok/gone")
        site.ended(gone)
        url = site.fetch(gone)["output"][0]
        generations, inputs = (site.files / each for each in ("generations", "inputs"))
        for path in generations.iterdir():
            path.unlink()
        expect(site.client.get(url).status_code == 404, "a missing picture is no 404")
        first = site.accept(Script(tag="first", step_s=0.5))
        site.claimed(first)
        beheaded = site.accept(Script(tag="input gone"), webhook=f"{site.host.url}/ok/beheaded")
        oracle.row(beheaded)
        (inputs / f"{oracle.row(beheaded)['file_prefix']}.npy").unlink()
        site.ended(beheaded, status="failed")
        until(lambda: bool(site.host.calls_for(beheaded)), 10, "its webhook tells of it")
        site.ended(first, site.accept(Script(tag="after")))
        strays = [folder / f"{uuid.uuid4()}-0.png" for folder in (generations, inputs)]
        two_days_ago = time.time() - 2 * 86_400
        for stray in strays:
            stray.write_bytes(b"stray")
            os.utime(stray, (two_days_ago, two_days_ago))
        site.stop()
        site.start()  # strays are looked for at the start
        until(lambda: not any(each.exists() for each in strays), 15, "old strays are cleared")
        names_none = "the finished job names no pictures that are gone"
        until(lambda: not site.fetch(gone).get("output"), 15, names_none)
        injected = "pictures of a finished job and the input of a waiting one deleted, old strays"
        checked = (
            "404 for the picture, its job names it no more, the job without input fails and says "
            "so, others are made, strays are cleared"
        )
        return Found(injected, checked)
