"""The list of faults, how one is tried, and how the whole is told."""

import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.report import table
from tests.chaos.site import Broken

PASSES, IN_PART, FAILS, NOT_COVERED = "passes", "passes in part", "FAILS", "not yet covered"


class NotCovered(Exception):
    """The fault cannot be tried here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a fault that was borne.

    detail: what was looked at, for the report. recovery_s: until all was well again, None where
    nothing was ever away. gaps: promises that nothing keeps yet.
    """

    detail: str
    recovery_s: float | None = None
    gaps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """number: of the matrix, such as F1. within_s: the longest recovery; None for no promise.

    strike: breaks things in a folder of its own, and looks. Raises: Broken, NotCovered.
    """

    number: str
    title: str
    within_s: float | None
    strike: Callable[[Path], Found]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A line of the report. took_s: the whole trial."""

    number: str
    title: str
    verdict: str
    detail: str
    recovery_s: float | None
    within_s: float | None
    took_s: float

    @property
    def line(self) -> str:
        """For the terminal, while the others still run."""
        recovery = "" if self.recovery_s is None else f" (recovered in {self.recovery_s:.1f} s)"
        return f"{self.number:4} {self.verdict:15} {self.title}{recovery}: {self.detail}"


FAULTS: dict[str, Fault] = {}
"""By number, in the order of the files that define them."""


def fault(
    number: str, title: str, within_s: float | None = None
) -> Callable[[Callable[[Path], Found]], Callable[[Path], Found]]:
    """Decorator: put a function into the matrix."""

    def register(strike: Callable[[Path], Found]) -> Callable[[Path], Found]:
        FAULTS[number] = Fault(number, title, within_s, strike)
        return strike

    return register


def try_fault(each: Fault, patience: float = 1.0) -> Outcome:
    """Strike, and judge. patience: recovery may take so many times as long as promised."""
    started = time.monotonic()
    detail, recovery_s = "", None
    with tempfile.TemporaryDirectory(prefix=f"chaos-{each.number}-") as room:
        try:
            found = each.strike(Path(room))
            recovery_s = found.recovery_s
            gaps = [f"not yet covered: {gap}" for gap in found.gaps]
            detail = "; ".join([found.detail, *gaps])
            verdict = IN_PART if gaps else PASSES
            limit_s = None if each.within_s is None else each.within_s * patience
            if recovery_s is not None and limit_s is not None and recovery_s > limit_s:
                verdict, detail = FAILS, f"recovery must take no more than {limit_s:g} s; {detail}"
        except NotCovered as reason:
            verdict, detail = NOT_COVERED, str(reason)
        except Broken as broken:
            verdict, detail = FAILS, str(broken)
        except Exception as error:  # noqa: BLE001 - a broken trial must not hide the others
            verdict, detail = FAILS, "".join(traceback.format_exception_only(error)).strip()
        if verdict == FAILS:
            detail += "\n" + last_lines(Path(room) / "log.jsonl")
    took_s = time.monotonic() - started
    return Outcome(
        each.number, each.title, verdict, detail, recovery_s, each.within_s, round(took_s, 1)
    )


def last_lines(log: Path, count: int = 20) -> str:
    """The end of a server's log, for whoever looks into a failure."""
    lines = log.read_text(errors="replace").splitlines()[-count:] if log.exists() else []
    return "\n".join(f"    {line[:300]}" for line in lines)


def write(outcomes: Sequence[Outcome], out: Path, name: str) -> None:
    """`name`.json for programs and `name`.md for people."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps([asdict(each) for each in outcomes], indent=1))
    rows = [
        [
            f"{each.number} {each.title}",
            each.verdict,
            each.recovery_s,
            each.within_s,
            each.took_s,
            each.detail.partition("\n")[0].replace("|", "/"),
        ]
        for each in outcomes
    ]
    head = ["fault", "verdict", "recovery s", "promised s", "trial s", "looked at"]
    (out / f"{name}.md").write_text(f"# Faults\n\n{table(head, rows)}")
