"""The wall clock of a process, moved by whoever writes a file; the monotonic clock is left alone.

`python -m tests.chaos.shifted_clock serve …` runs our command line under it.
"""

import os
import sys
import time
from pathlib import Path

FILE_VARIABLE = "CHAOS_CLOCK"
"""Environment variable: a file that holds seconds to add to the wall clock."""


def install() -> None:
    """Before anything of ours is imported, as `time.time` is a default argument in places."""
    path = os.environ.get(FILE_VARIABLE)
    if path is None:
        return
    file, true_time = Path(path), time.time
    time.time = lambda: true_time() + float(file.read_text())


def shift(file: Path, seconds: float) -> None:
    """Move the clocks that read this file to so many seconds from the true time."""
    # A new file in one step: a reader must not find an empty one.
    fresh = file.with_suffix(".new")
    fresh.write_text(str(seconds))
    fresh.rename(file)


def main() -> int:
    """Our command line, later or earlier."""
    install()
    from server.cli.main import main as run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
