"""`python -m tests.chaos --out DIR`: try every fault, or those of `--only`, or rounds of kills.

Exits 1 when a fault is not borne, or the whole matrix takes longer than promised.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.chaos import (  # noqa: F401 - they fill the matrix
    faults_database,
    faults_files,
    faults_fleet,
    faults_network,
    faults_processes,
    faults_storage,
)
from tests.chaos.matrix import FAILS, FAULTS, Fault, Outcome, total_line, try_fault, write
from tests.chaos.rounds import kill_in_rounds

BOUND_S = 20 * 60.0
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
    started = time.monotonic()
    outcomes = try_all([FAULTS[number] for number in numbers], options.patience)
    total_s = time.monotonic() - started
    write(outcomes, total_s, options.out, "rounds" if options.rounds else "chaos")
    print(total_line(outcomes, total_s), flush=True)
    bound_s = BOUND_S * options.patience
    is_too_long = not chosen and total_s > bound_s
    if is_too_long:
        print(f"the matrix must take no more than {bound_s:g} s", flush=True)
    return int(is_too_long or any(each.verdict == FAILS for each in outcomes))


def try_all(faults: Sequence[Fault], patience: float) -> list[Outcome]:
    """One after the other, the patient ones beside the others; in the order given."""

    def try_some(some: Sequence[Fault]) -> list[Outcome]:
        outcomes = []
        for each in some:
            outcomes.append(try_fault(each, patience))
            print(outcomes[-1].line, flush=True)
        return outcomes

    with ThreadPoolExecutor(1) as beside:
        patient = beside.submit(try_some, [each for each in faults if each.is_patient])
        found = [*try_some([each for each in faults if not each.is_patient]), *patient.result()]
    order = [each.number for each in faults]
    return sorted(found, key=lambda outcome: order.index(outcome.number))


if __name__ == "__main__":
    sys.exit(main())
