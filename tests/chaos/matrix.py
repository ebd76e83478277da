"""The list of faults, how one is tried, and how the whole is told."""

import json
import os
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import table
from tests.chaos.site import Broken
from tests.support.shared_stores import shared_stores

PASSES, IN_PART, FAILS, NOT_COVERED = "passes", "passes in part", "FAILS", "not yet covered"


class NotCovered(Exception):
    """The fault cannot be tried here; the message says what is missing."""


def need_data_folder() -> None:
    """Raises: NotCovered where the data folder holds neither database nor files."""
    if shared_stores() is not None:
        raise NotCovered("it is about the files of a data folder")


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a fault that was borne.

    injected: what was broken, and how often. checked: what held then, besides the oracle's
    questions. recovery_s: until all was well again, None where nothing was ever away.
    gaps: promises that nothing keeps, and legs that cannot be tried here.
    """

    injected: str
    checked: str
    recovery_s: float | None = None
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """number: of the matrix, such as F1. within_s: the longest recovery; None for no promise.

    strike: breaks things in a folder of its own, and looks. Raises: Broken, NotCovered.
    is_patient: it mostly waits, and is tried beside the others.
    """

    number: str
    title: str
    within_s: float | None
    strike: Callable[[Path], Found]
    is_patient: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """A line of the report.

    found: None where the fault was not borne or not tried; trouble says why, or that it took too
    long. log: the end of the servers' logs of one that was not borne. took_s: the whole trial.
    """

    number: str
    title: str
    verdict: str
    found: Found | None
    trouble: str
    log: str
    within_s: float | None
    took_s: float

    @property
    def recovery(self) -> str:
        """In words, with the promise where there is one."""
        if self.found is None:
            return ""
        if self.found.recovery_s is None:
            return "nothing was away"
        promise = "" if self.within_s is None else f" of {self.within_s:g} s"
        return f"recovered in {self.found.recovery_s:.1f} s{promise}"

    @property
    def line(self) -> str:
        """For the terminal, while the others still run."""
        parts = [f"{self.number:4} {self.verdict:15} {self.title}", self.trouble]
        if self.found is not None:
            parts += [f"injected: {self.found.injected}", f"checked: {self.found.checked}"]
            parts += [self.recovery, *(f"GAP: {gap}" for gap in self.found.gaps)]
        return " | ".join(filter(None, [*parts, f"{self.took_s:.0f} s"])) + self.log


FAULTS: dict[str, Fault] = {}
"""By number, in the order of the files that define them."""


def fault(
    number: str, title: str, within_s: float | None = None, *, is_patient: bool = False
) -> Callable[[Callable[[Path], Found]], Callable[[Path], Found]]:
    """Decorator: put a function into the matrix."""

    def register(strike: Callable[[Path], Found]) -> Callable[[Path], Found]:
        if number in FAULTS:
            raise ValueError(f"{number} is {FAULTS[number].title!r} already")
        FAULTS[number] = Fault(number, title, within_s, strike, is_patient)
        return strike

    return register


def try_fault(each: Fault, patience: float = 1.0) -> Outcome:
    """Strike, and judge. patience: recovery may take so many times as long as promised."""
    started = time.monotonic()
    found, trouble, log = None, "", ""
    with tempfile.TemporaryDirectory(prefix=f"chaos-{each.number}-") as room:
        try:
            found = each.strike(Path(room))
            verdict = IN_PART if found.gaps else PASSES
            limit_s = None if each.within_s is None else each.within_s * patience
            if found.recovery_s is not None and limit_s is not None and found.recovery_s > limit_s:
                verdict, trouble = FAILS, f"recovery must take no more than {limit_s:g} s"
        except NotCovered as reason:
            verdict, trouble = NOT_COVERED, str(reason)
        except Broken as broken:
            verdict, trouble = FAILS, str(broken)
        except Exception as error:  # noqa: BLE001 - a broken trial must not hide the others
            verdict, trouble = FAILS, "".join(traceback.format_exception(error)[-3:]).strip()
        if verdict == FAILS and found is None:
            log = last_lines(Path(room))
    took_s = round(time.monotonic() - started, 1)
    return Outcome(each.number, each.title, verdict, found, trouble, log, each.within_s, took_s)


def last_lines(room: Path, count: int = 20) -> str:
    """The ends of the servers' logs, for whoever looks into a failure."""
    told = ""
    for log in sorted(room.rglob("log.jsonl")):
        lines = log.read_text(errors="replace").splitlines()[-count:]
        told += "".join(f"\n    {line[:300]}" for line in lines)
    return told


def write(outcomes: Sequence[Outcome], total_s: float, out: Path, name: str) -> None:
    """`name`.json for programs and `name`.md for people."""
    out.mkdir(parents=True, exist_ok=True)
    values = {"total_s": round(total_s, 1), "faults": [asdict(each) for each in outcomes]}
    (out / f"{name}.json").write_text(json.dumps(values, indent=1))
    rows = [
        [
            f"{each.number} {each.title}",
            each.verdict,
            each.found.injected if each.found else "",
            "; ".join(filter(None, [each.trouble, each.found.checked if each.found else ""])),
            each.recovery,
            "; ".join(each.found.gaps) if each.found else "",
            each.took_s,
        ]
        for each in outcomes
    ]
    head = ["fault", "verdict", "injected", "checked", "recovery", "gaps", "trial s"]
    told = [[" ".join(str(cell).replace("|", "/").split()) for cell in row] for row in rows]
    (out / f"{name}.md").write_text(
        f"# Faults\n\n{table(head, told)}\n\n{total_line(outcomes, total_s)}\n"
    )


def total_line(outcomes: Sequence[Outcome], total_s: float) -> str:
    """How many of which verdict, how long it all took, and how busy the machine was."""
    verdicts = Counter(each.verdict for each in outcomes)
    told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    busy, cores = os.getloadavg()[2], os.cpu_count()
    return f"{told}; {total_s:.0f} s in all, load {busy:.1f} on {cores} cores"
