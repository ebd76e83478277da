"""Faults of what lies in files: damaged models, pictures and inputs that are gone."""

import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from tests.chaos.hosts import Host
from tests.chaos.matrix import Found, fault
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import Script
from tests.chaos.site import REPOSITORY, Site, expect, outside_world, running_site, until

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
    """The real worker: not ready, with the reason, and no hot loop of restarts."""
    told, gaps = [], []
    with outside_world() as (_thread, host):
        for name, damage in DAMAGES.items():
            model = room / name / "model"
            shutil.copytree(BUILTIN, model)
            damage(max((model / "unet").glob("*.safetensors")))
            reason, gap = start_with(model, host, sees_restart=name == "cut off")
            told.append(f"{name}: {reason}")
            gaps += [f"{name}: {gap}"] if gap else []
    injected = f"the UNet's file {', '.join(DAMAGES)}"
    return Found(
        injected, f"503, the log says why, jobs wait; {'; '.join(told)}", None, tuple(gaps)
    )


def start_with(model: Path, host: Host, *, sees_restart: bool) -> tuple[str, str]:
    """Start on a damaged model; what readiness says, and a gap or "". Raises: Broken."""
    real = f"{sys.executable} -m server.cli worker"
    site = Site(model.parent, host, None, "--model", str(model), "--worker-command", real)
    try:
        site.start(is_ready=False)
        until(
            lambda: bool(site.log_events("worker ended") or site.log_events("worker ready")),
            LOADED_S,
            "the model is loaded, or is not",
        )
        if site.log_events("worker ready"):
            return "not noticed", "the server starts with it"
        answer = site.client.get(f"{site.url}/readyz")
        expect(answer.status_code == 503, "ready without a model")
        expect(str(model) not in answer.text, "readiness tells strangers of paths")
        detail = " ".join(each["detail"] for each in site.log_events("worker cannot go on"))
        expect("unet" in detail, f"the log does not name the file: {detail!r}")
        job = site.accept(Script(tag="waits"))
        if sees_restart:
            until(lambda: len(site.log_events("worker ended")) >= 2, LOADED_S, "it is tried again")
            delays = [each["delay_s"] for each in site.log_events("worker ended")]
            expect(delays == sorted(set(delays)), f"restarted after {delays}: no backing off")
        expect(site.status(job) == "processing", "an accepted job does not wait")
        Oracle(site).check()
        reason = site.log_events("worker cannot go on")[0]["detail"]
        return str(reason).replace(str(model), "…"), ""
    finally:
        site.close()


@fault("F26", "file store and rows disagree")
def files_gone(room: Path) -> Found:
    """A dead link is a 404, not an error; the row says so and strays are cleared in time."""
    with running_site(room) as site:
        oracle = Oracle(site)
        gone = site.accept(Script(tag="gone"), webhook=f"{site.host.url}/ok/gone")
        site.ended(gone)
        url = site.fetch(gone)["output"][0]
        generations, inputs = (site.data_dir / "files" / each for each in ("generations", "inputs"))
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
        told = site.fetch(gone)
        expect(not told.get("output"), f"the finished job names pictures that are gone: {told}")
        injected = "pictures of a finished job and the input of a waiting one deleted, old strays"
        checked = (
            "404 for the picture, its job names it no more, the job without input fails and says "
            "so, others are made, strays are cleared"
        )
        return Found(injected, checked)
