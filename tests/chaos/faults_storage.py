"""Faults of the disk and of the file store: full, read-only, failing, away."""

import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from server.api.services import FILE_TIMEOUT_S
from tests.chaos.bucket import Bucket, running_bucket
from tests.chaos.faults_processes import drain, picture_of
from tests.chaos.matrix import Found, NotCovered, fault, need_data_folder
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import Script
from tests.chaos.site import (
    PRIVATE_MOUNTS,
    Site,
    expect,
    launch_program,
    outside_world,
    running_site,
)
from tests.support.waiting import until

TMPFS_BYTES = 4_000_000
TOLD_S = 2.0
"""From a refused write to 503 of readiness."""
KEPT = "a store is unavailable, the job's end is retried"
"""What a worker logs then."""

POLLS, PICTURES = 40, 16
POLL_WITHIN_S = 1.0
HUNG_SUBMIT_S = 25.0

KEPT_S = 8.0
"""The file store is away for so long after that."""


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A tmpfs of 4 MB. Raises: NotCovered where mounting is not permitted."""
    folder.mkdir()
    options = f"size={TMPFS_BYTES}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        raise NotCovered("mounting a tmpfs is not permitted here")
    try:
        yield folder
    finally:
        # Lazily: a process that is slow to end may still have it open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left; it."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (65_536, 512):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return path


def refused(site: Site) -> str:
    """A submit that must be refused with a retryable error, at once. Raises: Broken."""
    started = time.monotonic()
    answer = site.submit(Script(tag="refused"))
    told = f"{answer.status_code} {answer.text[:100]}"
    expect(answer.status_code == 503 and "retry-after" in answer.headers, f"submit got {told}")
    expect(time.monotonic() - started < 15, "the refusal took too long")
    return f"refused with 503, Retry-After {answer.headers['retry-after']}"


def may_have_private_mounts() -> bool:
    """Whether a process may be given a view of the disk of its own."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        return False
    return subprocess.run([*PRIVATE_MOUNTS, "true"], capture_output=True).returncode == 0


@fault("F6", "SQLite: disk full, read-only, EIO", within_s=10)
def disk_full(room: Path) -> Found:
    """Refuse, go on reading, heal by itself."""
    need_data_folder()
    injected = ["full disk"]
    with ExitStack() as stack:
        disk = stack.enter_context(small_disk(room / "disk"))
        is_private = may_have_private_mounts()
        launch = launch_program("server.cli.main", under=PRIVATE_MOUNTS if is_private else ())
        site = stack.enter_context(running_site(room, data_dir=disk / "data", launch=launch))
        oracle = Oracle(site)
        before = site.accept(Script(tag="before"))
        site.ended(before)
        slowest_s, gaps = full_disk(site, disk, before), list[str]()
        legs: dict[str, tuple[Callable[[Site], float], str]] = {
            "no byte may be written (RLIMIT_FSIZE)": (without_room, ""),
            "files read-only (bind mount)": (
                read_only_files,
                "" if is_private else "mounts of a process's own are not permitted here",
            ),
            "EROFS from the database's writes": (failing_writes, missing_tracer()),
            "EIO from fsync": (failing_fsync, missing_tracer()),
        }
        for name, (leg, missing) in legs.items():
            if missing:
                gaps.append(f"{name}: {missing}")
                continue
            slowest_s = max(slowest_s, leg(site))
            injected.append(name)
            expect(site.status(before) == "success", f"reads do not work: {name}")
            drain(site, oracle)
        checked = f"503 with Retry-After each time, reads go on, heals; {drain(site, oracle)}"
        return Found(", ".join(injected), checked, slowest_s, tuple(gaps))


def full_disk(site: Site, disk: Path, finished: int) -> float:
    """Seconds to heal."""
    filler = fill(disk)
    refused(site)
    expect(site.status(finished) == "success", "reads do not work on a full disk")
    picture_of(site, finished)
    told_closed(site)
    filler.unlink()
    return healing_s(site)


def told_closed(site: Site) -> None:
    """Readiness tells of a store that has refused a write. Raises: Broken."""
    until(lambda: not site.is_open(), TOLD_S, "readiness tells of it")


def healing_s(site: Site) -> float:
    """Seconds until the server is ready and takes a job again."""
    started = time.monotonic()
    until(lambda: site.submit(Script(tag="healed")).status_code == 200, 30, "takes jobs again")
    until(lambda: site.readiness() == 200, 30, "ready again")
    return time.monotonic() - started


def without_room(site: Site) -> float:
    """Take the API's right to write away and give it back; seconds to heal."""
    limit_file_size(site, 0)
    refused(site)
    told_closed(site)
    limit_file_size(site, resource.RLIM_INFINITY)
    return healing_s(site)


def limit_file_size(site: Site, limit: int) -> None:
    """RLIMIT_FSIZE of the API process: writes beyond so many bytes of any file fail."""
    resource.prlimit(site.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def read_only_files(site: Site) -> float:
    """The API sees its file store read-only for a while; seconds to heal.

    Files that are open already can still be written: the database's cannot be had this way.
    """
    folder = str(site.files)

    def in_its_view(*command: str) -> None:
        enter = ["nsenter", "--target", str(site.pid), "--mount"]
        subprocess.run([*enter, *command], check=True, capture_output=True)

    in_its_view("mount", "--bind", folder, folder)
    in_its_view("mount", "-o", "remount,bind,ro", folder)
    refused(site)
    in_its_view("umount", folder)
    return healing_s(site)


def missing_tracer() -> str:
    """Why system calls cannot be made to fail here; empty where they can."""
    if shutil.which("strace") is None:
        return "no strace here"
    tried = subprocess.run(["strace", "-q", "-o", "/dev/null", "true"], capture_output=True)
    return "" if tried.returncode == 0 else "tracing is not permitted here"


def failing_writes(site: Site) -> float:
    """As on a disk that the kernel has made read-only because of its errors."""
    with failing_calls(site, "pwrite64:error=EROFS"):
        refused(site)
    return healing_s(site)


def failing_fsync(site: Site) -> float:
    """What is written does not get to the disk."""
    with failing_calls(site, "fsync,fdatasync:error=EIO"):
        refused(site)
    return healing_s(site)


@contextmanager
def failing_calls(site: Site, rule: str) -> Iterator[None]:
    """All calls of the API process that the rule of strace names fail. Raises: Broken."""
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-e", f"inject={rule}", "-o", "/dev/null", "-p", str(site.pid)],
        stderr=subprocess.DEVNULL,
    )
    try:
        status = Path(f"/proc/{site.pid}/status")
        until(lambda: "TracerPid:\t0" not in status.read_text(), 10, "strace is attached")
        yield
    finally:
        tracer.terminate()
        tracer.wait()


@fault("F7", "output store full, or away", within_s=60)
def store_full(room: Path) -> Found:
    """A picture is made and cannot be stored: kept, tried again, never a dead link."""
    with ExitStack() as stack:
        thread, host = stack.enter_context(outside_world())
        disk = stack.enter_context(small_disk(room / "disk"))
        files = disk / "files"
        full = Site(room / "full", host, {"INPAINT_STORAGE__URL": files.as_uri()})
        stack.callback(full.close)
        full.start()
        full_s, full_told = stored_later(full, Oracle(full, files=files), filled(disk))
        bucket = stack.enter_context(running_bucket(thread))
        away = Site(room / "away", host, bucket.environment)
        stack.callback(away.close)
        away.start()
        away_s, away_told = stored_later(away, Oracle(away, bucket=bucket), gone(bucket))
        expect(bucket.tries > 0, "the bucket was not asked")
        injected = (
            f"a full disk, and a bucket that resets every request, for {KEPT_S:g} s and more after "
            "the picture was refused"
        )
        checked = (
            "submits told 503 with Retry-After, the job stays processing, then is a success of its "
            f"first try; {full_told}; {away_told}"
        )
        return Found(injected, checked, max(full_s, away_s))


@fault("F30", "object store hangs", within_s=30)
def store_hangs(room: Path) -> Found:
    """It takes requests and never answers; what needs no file goes on meanwhile."""
    with ExitStack() as stack:
        thread, host = stack.enter_context(outside_world())
        bucket = stack.enter_context(running_bucket(thread))
        site = Site(room, host, bucket.environment)
        stack.callback(site.close)
        site.start()
        oracle = Oracle(site, bucket=bucket)
        finished = site.accept(Script(tag="finished"))
        site.ended(finished)
        picture = site.outputs(finished, "v3")[0]
        oracle.check()
        bucket.is_hung = True
        try:
            slowest_s = polled_while_hung(site, finished, picture)
            started = time.monotonic()
            answer = site.submit(Script(tag="hung"))
            told = f"{answer.status_code} after {time.monotonic() - started:.1f} s"
            expect(answer.status_code == 503 and "retry-after" in answer.headers, f"submit: {told}")
            expect(time.monotonic() - started < HUNG_SUBMIT_S, f"submit: {told}")
            expect(bucket.tries > 0, "the bucket was not asked")
            told_closed(site)
        finally:
            bucket.is_hung = False
        healed_s = healing_s(site)
        expect(site.client.get(picture).status_code == 200, "the picture is not served again")
        kinds = {key.partition("/")[0]: kind for key, kind in bucket.kinds.items()}
        expect(kinds.get("generations") == "image/png", f"content types are {kinds}")
        checked = (
            f"{POLLS} polls of a finished job answered from its row, the slowest after "
            f"{slowest_s:.2f} s, probes and lists beside them; pictures told 503, a submit {told}; "
            f"{drain(site, oracle)}"
        )
        return Found("a bucket that answers nothing", checked, healed_s)


def polled_while_hung(site: Site, finished: int, picture: str) -> float:
    """Polls of a job while pictures are asked for in vain; the slowest, in seconds."""

    def timed(url: str, status: int) -> float:
        started = time.monotonic()
        answer = site.client.get(url)
        expect(answer.status_code == status, f"{url} got {answer.status_code}")
        return time.monotonic() - started

    with ThreadPoolExecutor(POLLS + PICTURES) as clients:
        pictures = [clients.submit(timed, picture, 503) for _ in range(PICTURES)]
        paths = ["/healthz", "/api/jobs", *[f"/api/jobs/{finished}"] * POLLS]
        polls = [clients.submit(timed, site.url + path, 200) for path in paths]
        slowest_s = max(poll.result() for poll in polls)
        expect(slowest_s < POLL_WITHIN_S, f"the slowest poll took {slowest_s:.1f} s")
        late_s = max(each.result() for each in pictures)
        expect(late_s < 2 * FILE_TIMEOUT_S, f"a picture was refused after {late_s:.1f} s only")
    return slowest_s


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """A disk without room."""
    filler = fill(disk)
    yield
    filler.unlink()


@contextmanager
def gone(bucket: Bucket) -> Iterator[None]:
    """A bucket that does not answer."""
    bucket.is_away = True
    yield
    bucket.is_away = False


def stored_later(
    site: Site, oracle: Oracle, broken: AbstractContextManager[None]
) -> tuple[float, str]:
    """Make a picture while the store is broken; seconds from its repair to the job's end.

    The oracle's word too. Raises: Broken.
    """
    job = site.accept(Script(tag="kept", step_s=0.3, unrepeatable=True), num_inference_steps=15)
    until(lambda: oracle.row(job)["step"] > 0, 60, "its input is read")
    with broken:
        refused(site)
        told_closed(site)
        until(lambda: bool(site.log_events(KEPT)), 60, "a worker says that it keeps a picture")
        give_up_at = time.monotonic() + KEPT_S
        while time.monotonic() < give_up_at:
            status = site.fetch(job)
            expect(status["status"] == "processing", f"a job without a store: {status}")
            time.sleep(1)
    took_s = site.ended(job)
    expect(oracle.row(job)["attempt"] == 1, "the picture was made anew")
    after = site.accept(Script(tag="after"))
    site.ended(after)
    return took_s, oracle.last_check()
