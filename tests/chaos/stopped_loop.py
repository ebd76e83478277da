"""An event loop that stands still: SIGUSR1 makes the main thread busy for ever.

`python -m tests.chaos.stopped_loop serve …` runs our command line so.
"""

import signal
import sys
from types import FrameType


def never_return(_number: int, _frame: FrameType | None) -> None:
    """As code does that takes hours over a few bytes."""
    while True:
        pass


def main() -> int:
    """Our command line."""
    from server.cli.main import main as run

    signal.signal(signal.SIGUSR1, never_return)
    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
