"""A test inpaint with the built-in model, in a process of its own, on each device."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from server.core.settings import Settings
from server.core.settings.folder import why_unwritable
from server.serving.devices import AUTO, VISIBLE, expand_devices
from server.serving.diagnosis.folders import existing
from server.serving.diagnosis.kernels import CACHE_VARIABLE, kernel_cache, kernel_result
from server.serving.diagnosis.results import CheckResult, error, ok, warning

INPAINT = "inpaint"
TRIAL = (sys.executable, "-P", "-m", "server.worker.trial")
TIMEOUT_S = 300.0

SLOW_S = 60.0
"""On two cores of 2020 the picture takes 3 seconds."""


def check_inpaint(settings: Settings) -> Iterator[CheckResult]:
    """Make a picture on each device of the settings.

    The built-in model is used, because a running server may already fill the GPU with its own.
    """
    try:
        devices = expand_devices(settings.worker_devices)
    except ValueError:
        return  # The check of the GPUs says it.
    for device in dict.fromkeys(devices):
        trial = run_trial(device, settings)
        yield result_of(device, trial)
        if trial.kernels_problem is not None:
            command = [*TRIAL, device]
            yield kernel_result(trial.device, trial.kernels_problem, settings, command)


@dataclass(frozen=True, slots=True)
class Trial:
    """The answer of `server.worker.trial`.

    error: why there is no picture; "" if there is one. device: torch's name of it. load_s,
    picture_s: seconds. kernels_problem: why our kernels do not run on a GPU, "" if they do; None
    without a GPU.
    """

    error: str = ""
    device: str = ""
    load_s: float = 0.0
    picture_s: float = 0.0
    kernels_problem: str | None = None


def result_of(device: str, trial: Trial) -> CheckResult:
    if trial.error:
        return error(
            INPAINT,
            f"no picture could be made on {device}: {trial.error}",
            "see the results about the GPU and its driver; `--devices cpu` goes without a GPU",
        )
    sentence = (
        f"the built-in model made a picture of 512×512 in 20 steps on {trial.device} in "
        f"{trial.picture_s} s, after {trial.load_s} s of loading"
    )
    if device == AUTO and trial.device == "cpu":
        return warning(
            INPAINT,
            f"{sentence}: torch finds no GPU",
            "set devices to cuda:0 to see why, or to cpu if that is meant",
        )
    if trial.picture_s > SLOW_S:
        return warning(INPAINT, sentence, "see what else runs on this machine, and use a GPU")
    return ok(INPAINT, sentence)


def run_trial(device: str, settings: Settings) -> Trial:
    environment = dict(os.environ)
    if device.startswith(("GPU-", "MIG-")):
        environment[VISIBLE], device = device, "cuda:0"
    try:
        with scratch_cache(settings) as folder:
            environment[CACHE_VARIABLE] = folder
            done = subprocess.run(
                [*TRIAL, device],
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                env=environment,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return Trial(f"it took longer than {TIMEOUT_S:.0f} s")
    except OSError as problem:
        return Trial(str(problem))
    try:
        trial = Trial(**json.loads(done.stdout))
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Trial(f"exit status {done.returncode}: {last}")
    if trial.kernels_problem and (complaint := compiler_error(done.stderr)):
        return replace(trial, kernels_problem=f"{trial.kernels_problem}; {complaint}")
    return trial


def scratch_cache(settings: Settings) -> "tempfile.TemporaryDirectory[str]":
    """A cache of kernels for one trial, beside a worker's own where this user may write there.

    /tmp may be mounted noexec where the data folder is not. The worker's own cache is not used,
    because files of another user, such as root, would lock the worker out. Raises: OSError.
    """
    place = existing(kernel_cache(settings))
    within = None if why_unwritable(place) else place
    return tempfile.TemporaryDirectory(prefix=".inpaint-doctor-", dir=within)


def compiler_error(text: str) -> str:
    """The first error of a C compiler, which says more than its exit status; "" without one."""
    found = (line.strip() for line in text.splitlines() if " error: " in line)
    return next(found, "")[:300]
