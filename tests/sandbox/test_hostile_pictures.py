"""The whole corpus through a real child; some of it, and mutations, as far as they go."""

import base64
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from models.imaging.decoding import ImageLimits
from server.core.errors import ImageProblem
from server.sandbox.wire import Kind, TargetSize
from tests.corpora import hostile_pictures as hostile
from tests.corpora.fuzz_pictures import fuzz
from tests.support.blocking_decoder import BlockingDecoder
from tests.support.http_stub import png_bytes
from tests.support.processes import ServerProcess

pytestmark = pytest.mark.process

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
MEMORY_BYTES = 600_000_000
PARENT_GROWTH_BYTES = 30_000_000


@pytest.fixture(scope="module")
def corpus_decoder() -> Iterator[BlockingDecoder]:
    # Processor time is what is bounded below: other machines have other things to do.
    decoder = BlockingDecoder(ImageLimits(), wall_s=120)
    yield decoder
    decoder.close()


def cpu_s(pid: int) -> float:
    """Processor seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int | str, name: str) -> int:
    """`VmRSS`, or `VmHWM` for the most there ever was."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} of process {pid}")


@on_linux
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(hostile.CORPUS, Kind)])
def test_hostile_picture_is_taken_or_refused(
    corpus_decoder: BlockingDecoder, name: str, kind: Kind
) -> None:
    picture = hostile.CORPUS[name]
    content = picture.make()
    corpus_decoder.start()
    starts = corpus_decoder.starts
    assert corpus_decoder.pid is not None
    before = memory_bytes("self", "VmRSS")
    worked_s = cpu_s(corpus_decoder.pid)

    outcome = corpus_decoder.decode(kind, content)

    growth = memory_bytes("self", "VmRSS") - before
    problem = outcome if isinstance(outcome, ImageProblem) else None
    assert problem is picture.problem
    assert growth < PARENT_GROWTH_BYTES
    # The same child: nothing here makes it crash, hang or run out of memory.
    assert corpus_decoder.starts == starts
    assert corpus_decoder.pid is not None
    assert memory_bytes(corpus_decoder.pid, "VmHWM") <= MEMORY_BYTES
    assert cpu_s(corpus_decoder.pid) - worked_s <= 10
    assert not isinstance(
        corpus_decoder.decode(kind, png_bytes(), TargetSize(64, 64)), ImageProblem
    )


def test_corpus_is_large() -> None:
    assert len(hostile.CORPUS) >= 80
    assert {each.problem for each in hostile.CORPUS.values()} == {
        None,
        ImageProblem.NOT_AN_IMAGE,
        ImageProblem.UNSUPPORTED,
        ImageProblem.DAMAGED,
        ImageProblem.TOO_LARGE,
    }


def test_mutated_pictures_are_taken_or_refused() -> None:
    outcomes = fuzz(300, seed=1)
    assert outcomes.counts.total() == 300
    assert outcomes.counts.keys() <= {"ok", "not_an_image", "unsupported", "damaged", "too_large"}
    assert outcomes.counts["ok"] > 20
    assert outcomes.counts["damaged"] > 100
    assert outcomes.starts == 1


# Over HTTP


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """An API process without workers: a picture that is taken is told to be processing."""
    environment = {"INPAINT_WORKERS": "0", "INPAINT_HOLD_S": "0"}
    server = ServerProcess(tmp_path_factory.mktemp("server"), environment)
    try:
        yield server
    finally:
        server.stop()
        server.client.close()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def post(server: ServerProcess, init_image: bytes, mask_image: bytes) -> dict[str, object]:
    return server.inpaint(
        prompt="a cat", init_image=data_uri(init_image), mask_image=data_uri(mask_image)
    )


SENTENCES = {
    ImageProblem.NOT_AN_IMAGE: "is not a PNG, JPEG or WEBP image.",
    ImageProblem.UNSUPPORTED: "is of an unsupported kind: send a PNG, JPEG or WEBP image.",
    ImageProblem.DAMAGED: "is damaged or incomplete.",
    ImageProblem.TOO_LARGE: "is too large.",
}


@pytest.mark.parametrize(
    "name",
    [
        "png of 900 MP in one bit",
        "webp of 131 MP",
        "10 MB and a byte",
        "largest webp",
        "JPEG turned by EXIF 6",
        "png with an iCCP bomb",
        "png with EXIF that loops",
        "tiff bomb",
        "svg with an entity",
        "page named png",
        "png with a wrong IDAT checksum",
        "WEBP cut at 5/10",
    ],
)
@pytest.mark.parametrize("field", ["init_image", "mask_image"])
def test_server_answers_hostile_pictures(server: ServerProcess, name: str, field: str) -> None:
    picture = hostile.CORPUS[name]
    images = {"init_image": png_bytes(), "mask_image": png_bytes(), field: picture.make()}
    answer = post(server, **images)
    if picture.problem is None:
        assert answer["status"] == "processing", answer
    else:
        assert answer["status"] == "error", answer
        assert SENTENCES[picture.problem] in str(answer)
    assert post(server, png_bytes(), png_bytes())["status"] == "processing"


def decoders_of(server: ServerProcess) -> list[int]:
    """Process ids of the server's children, of which it has no others without workers."""
    children = Path(f"/proc/{server.pid}/task").glob("*/children")
    return [int(pid) for each in children for pid in each.read_text().split()]


@on_linux
@pytest.mark.parametrize("name", ["largest webp", "largest jpeg", "webp of 131 MP", "slow scans"])
def test_server_stays_small_and_quick_while_a_picture_is_decoded(
    server: ServerProcess, name: str
) -> None:
    """The API process itself: what it takes, and that it answers others meanwhile."""
    make = hostile.CORPUS[name].make if name in hostile.CORPUS else slow_scans
    content = make()
    post(server, png_bytes(), png_bytes())
    before = memory_bytes(server.pid, "VmRSS")
    reset_peak(server.pid)
    answered_meanwhile = 0
    with ThreadPoolExecutor(1) as thread:
        posting = thread.submit(post, server, content, png_bytes())
        while not posting.done():
            with httpx2.Client(base_url=server.url, timeout=60, trust_env=False) as client:
                assert client.get("/healthz").json() == {"status": "ok"}
            answered_meanwhile += not posting.done()
    assert posting.result()["status"] in ("processing", "error")
    assert answered_meanwhile or name != "slow scans", "the others may be refused at once"
    growth = memory_bytes(server.pid, "VmHWM") - before
    # The file as JSON, as text and as bytes, and the pixels; never what a bomb unfolds to.
    assert growth < PARENT_GROWTH_BYTES + 5 * len(content)


def slow_scans() -> bytes:
    """A picture that takes some seconds."""
    return hostile.scans((2_000, 2_000), 300)


def reset_peak(pid: int) -> None:
    """`VmHWM` begins anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@on_linux
def test_server_outlives_its_decoders(server: ServerProcess) -> None:
    for _ in range(3):
        assert post(server, png_bytes(), png_bytes())["status"] == "processing"
        pids = decoders_of(server)
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert server.client.get("/healthz").json() == {"status": "ok"}
