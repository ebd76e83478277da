"""Checks of what Triton needs to build our kernels on a GPU. Loads neither Triton nor torch."""

import importlib.util
import os
import shlex
import shutil
import sysconfig
from pathlib import Path

from server.core.settings import Settings
from server.serving.diagnosis.folders import existing
from server.serving.diagnosis.results import CheckResult, ok, warning

KERNELS = "kernels"
CACHE_VARIABLE = "TRITON_CACHE_DIR"

TOOLS_CURE = (
    "install a C compiler and Python's headers: on Debian "
    "`apt-get install gcc libc6-dev python3-dev`"
)


def kernel_cache(settings: Settings) -> Path:
    """Where a worker keeps compiled kernels."""
    return Path(os.environ.get(CACHE_VARIABLE) or settings.kernel_cache)


def check_build_tools(settings: Settings) -> CheckResult:
    """Whether a worker can build our kernels, as far as can be seen without a GPU."""
    problem, cure = problem_of_tools(settings)
    if problem:
        sentence = f"{problem}, so our kernels cannot be built and torch's slower ones are used"
        return warning(KERNELS, sentence, cure)
    return ok(KERNELS, "our kernels can be built: there is a C compiler, and Python's headers")


def problem_of_tools(settings: Settings) -> tuple[str, str]:
    """What lacks, and its cure; both "" if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed", "install the torch with CUDA: `make install TORCH=torch`"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"there is no C compiler ({' or '.join(compilers)})", TOOLS_CURE
    if not (header_folder() / "Python.h").is_file():
        return f"there is no Python.h in {header_folder()}", TOOLS_CURE
    folder = existing(kernel_cache(settings))
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        return (
            f"{folder} is mounted noexec, and compiled kernels are loaded from there",
            f"mount it without noexec, or name another folder in {CACHE_VARIABLE}",
        )
    return "", ""


def header_folder() -> Path:
    """Where Triton looks for Python's headers."""
    scheme = sysconfig.get_default_scheme()
    # Debian's own Python has its headers under the other scheme.
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    return Path(sysconfig.get_path("include", scheme))


def kernel_result(device: str, problem: str, settings: Settings, command: list[str]) -> CheckResult:
    """Whether our kernels run on a GPU. problem: why not, "" if they do. command: tried it."""
    if not problem:
        return ok(KERNELS, f"our kernels run on {device}")
    _, cure = problem_of_tools(settings)
    return warning(
        KERNELS,
        f"our kernels cannot be built for {device}, and torch's slower ones are used: {problem}",
        cure or f"`{shlex.join(command)}` prints the whole error",
    )
