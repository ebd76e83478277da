"""`python -m tests.chaos --out DIR`: try every fault, or those of `--only`, or rounds of kills.

Exits 1 when a fault is not borne, or the whole matrix takes longer than promised.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos import faults_network, faults_processes, faults_storage  # noqa: F401 - they fill the matrix
from tests.chaos.matrix import FAILS, FAULTS, Fault, total_line, total_s, try_fault, write
from tests.chaos.rounds import kill_in_rounds

BOUND_S = 15 * 60.0
"""Promised for the whole matrix on two cores."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/chaos"))
    parser.add_argument("--only", default="", help="comma-separated, such as F1,F2")
    parser.add_argument(
        "--rounds", type=int, default=0, help="so many kills under load, in place of the matrix"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the rounds' random moments")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="factor on promised times, for busy machines"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the faults one after the other, and report."""
    options = parse(arguments)
    if options.rounds:
        title = f"{options.rounds} rounds of kill -9"
        FAULTS["R"] = Fault(
            "R", title, None, lambda room: kill_in_rounds(room, options.rounds, options.seed)
        )
        options.only = "R"
    chosen = [each for each in options.only.split(",") if each]
    numbers = chosen or sorted(FAULTS, key=lambda number: int(number[1:]))
    outcomes = []
    for number in numbers:
        outcomes.append(try_fault(FAULTS[number], options.patience))
        print(outcomes[-1].line, flush=True)
    write(outcomes, options.out, "rounds" if options.rounds else "chaos")
    print(total_line(outcomes), flush=True)
    bound_s = BOUND_S * options.patience
    is_too_long = not chosen and total_s(outcomes) > bound_s
    if is_too_long:
        print(f"the matrix must take no more than {bound_s:g} s", flush=True)
    return int(is_too_long or any(each.verdict == FAILS for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())
