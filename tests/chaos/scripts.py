"""What the fake engine backend is asked to do, as words in the prompt of a job.

    "tag=7 step_s=0.05 fault=exit at=half times=1"

Torch-free; harness and backend share it.
"""

import os
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path

FOLDER_VARIABLE = "CHAOS_FOLDER"
"""Environment variable: where backends leave marks that outlive them."""

LEDGER = "finishes.jsonl"
"""In that folder: a line for every `finish` that came back."""

HUNG_LOAD = "hung-load"
"""In that folder: the worker that finds this file takes it away, and never has its model loaded."""


class Stage(StrEnum):
    """Where in a job's life a fault strikes."""

    NONE = ""
    CLAIMED = "claimed"
    """The row is ours, its input is not read yet."""
    PREPARED = "prepared"
    """While the engine prepares the samples."""
    HALF = "half"
    """In the middle of the denoising steps."""
    DECODED = "decoded"
    """All steps done, the picture is being decoded."""
    BEFORE_STORE = "before_store"
    """The picture is made, and no file of it written."""
    STORED = "stored"
    """The files are written, the row still says running."""
    COMMITTED = "committed"
    """The row says finished, the worker has not heard so yet."""


class FaultKind(StrEnum):
    """What happens there."""

    NONE = ""
    EXIT = "exit"
    """SIGKILL to itself."""
    STOP = "stop"
    """SIGSTOP to itself."""
    HANG = "hang"
    """A call into C that never returns and never lets go of the interpreter."""
    WAIT = "wait"
    """A call that never returns, beside which the process's other threads go on."""
    OUT_OF_MEMORY = "oom"
    UNUSABLE = "unusable"
    """What the pipeline raises for NaN and for pictures of one colour."""
    DEVICE_LOST = "device_lost"
    ERROR = "error"
    """An exception nobody foresaw."""


@dataclass(frozen=True, slots=True)
class Script:
    """tag: makes the prompt unlike all others. step_s: seconds of each denoising step.

    times: how often the fault strikes, over all processes; 0 for always.
    unrepeatable: every attempt gives other pictures, as batches of other sizes do on a GPU.
    """

    tag: str = ""
    step_s: float = 0.0
    fault: FaultKind = FaultKind.NONE
    at: Stage = Stage.NONE
    times: int = 1
    unrepeatable: bool = False

    def __str__(self) -> str:
        return " ".join(f"{each.name}={getattr(self, each.name)}" for each in fields(self))

    @classmethod
    def parse(cls, prompt: str) -> "Script":
        """Read the words back; others are passed over."""
        words = dict(word.split("=", 1) for word in prompt.split() if "=" in word)
        return cls(
            tag=words.get("tag", ""),
            step_s=float(words.get("step_s", 0)),
            fault=FaultKind(words.get("fault", "")),
            at=Stage(words.get("at", "")),
            times=int(words.get("times", 1)),
            unrepeatable=words.get("unrepeatable") == "True",
        )

    def strikes(self, stage: Stage) -> bool:
        """Whether the fault happens now; counts it."""
        if self.fault is FaultKind.NONE or self.at is not stage:
            return False
        mark = Path(os.environ[FOLDER_VARIABLE]) / f"struck-{self.tag}"
        # An appended byte is there even if the process is killed the moment after.
        with mark.open("ab", buffering=0) as file:
            file.write(b".")
            return self.times == 0 or file.tell() <= self.times
