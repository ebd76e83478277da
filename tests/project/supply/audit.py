"""`make audit`: asks pip-audit for known holes in every locked release, and believes no silence.

Without `--strict` pip-audit says "No known vulnerabilities found" and exits 0 even when its service
knew none of the releases; with it, it ends at the first unknown one, which hides the holes of the
others. What `--strict` is for is therefore done here, on its JSON: each locked release has to stand
there with an answer. A release with well-known holes is asked for too: a service that finds none in
it was not really asked.

Exits 0 when all were audited and none has a hole, 1 when one has, 3 when not all were audited.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.project.supply.locks import CLUSTER, DEVELOPMENT, RUNTIME, TOOLS, Pin, pins

CLEAN, HOLES, NOT_AUDITED = 0, 1, 3

CANARY = Pin("django", "3.0", ("0" * 64,))
"""Has had published holes since 2020, the first of them CVE-2020-7471. Never installed."""

_ANSWER_TIMEOUT_S = 10


@dataclass(frozen=True)
class Findings:
    """What pip-audit answered.

    holes: advisories by release, for those that have any
    unaudited: releases without an answer
    complaint: why there is no answer, where pip-audit said it
    """

    holes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unaudited: Sequence[str] = ()
    complaint: str = ""


def audit(command: Sequence[str], wanted: Sequence[Pin], limit_s: float) -> Findings:
    """Run pip-audit over the pins and the canary, for at most `limit_s` seconds."""
    by_release = {pin.release: pin for pin in wanted}
    answer, complaint = _run(command, [*by_release.values(), CANARY], limit_s)
    found = _read(answer)
    if not found.get(CANARY.release):
        if found:
            complaint = f"the service knows no hole of {CANARY.release}, which has many"
        return Findings(unaudited=sorted(by_release), complaint=complaint)
    return Findings(
        holes={release: found[release] for release in sorted(by_release) if found.get(release)},
        unaudited=sorted(by_release.keys() - found.keys()),
        complaint=complaint,
    )


def _run(command: Sequence[str], wanted: Sequence[Pin], limit_s: float) -> tuple[str, str]:
    """What pip-audit printed, and why it could not answer for a release, or at all."""
    with tempfile.TemporaryDirectory() as folder:
        # Without markers, so that releases for other systems are audited too.
        lines = Path(folder) / "locked.txt"
        lines.write_text(
            "".join(f"{pin.release} --hash=sha256:{pin.digests[0]}\n" for pin in wanted)
        )
        options = "--require-hashes --disable-pip --format json --desc off --progress-spinner off"
        try:
            done = subprocess.run(
                [
                    *command,
                    *options.split(),
                    f"--timeout={_ANSWER_TIMEOUT_S}",
                    f"--requirement={lines}",
                ],
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except FileNotFoundError:
            return "", f"there is no {command[0]}"
        except subprocess.TimeoutExpired:
            return "", f"no answer within {limit_s:g} s"
    said = [each["skip_reason"] for each in _entries(done.stdout) if "skip_reason" in each]
    return done.stdout, (said or done.stderr.strip().splitlines()[-1:] or [""])[0]


def _read(answer: str) -> dict[str, list[str]]:
    """Advisories by release, empty for one that has none; a release without answer is not there."""
    return {
        f"{each['name']}=={each['version']}": [hole["id"] for hole in each["vulns"]]
        for each in _entries(answer)
        if "vulns" in each
    }


def _entries(answer: str) -> list[dict[str, Any]]:
    """What pip-audit says of each release; nothing if it printed no such JSON."""
    try:
        entries: list[dict[str, Any]] = json.loads(answer)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return []
    return entries


def report(findings: Findings, count: int, *, tolerate_unreachable: bool) -> int:
    """Print the findings and return the exit status.

    count: releases that should have been audited
    tolerate_unreachable: exit 0 when not one of them was, which is printed all the same
    """
    for release, advisories in findings.holes.items():
        print(f"VULNERABLE: {release}: {', '.join(advisories)}")
    if len(findings.unaudited) == count:
        print("NOTHING WAS AUDITED: pip-audit got no answers from its advisory service.")
        print(f"Whether the {count} locked releases have known holes is not known.")
    elif findings.unaudited:
        print(f"NOT AUDITED: {', '.join(findings.unaudited)}")
    else:
        print(f"{count} locked releases audited, {len(findings.holes)} with known holes.")
    if findings.unaudited and findings.complaint:
        print(f"pip-audit: {findings.complaint}")
    if findings.holes:
        return HOLES
    if findings.unaudited and not (tolerate_unreachable and len(findings.unaudited) == count):
        return NOT_AUDITED
    return CLEAN


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit all locks but `torch-cpu`, whose release is that of `torch`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--command", default=".venv/tools/bin/pip-audit", help="with arguments")
    parser.add_argument("--limit-s", type=float, default=300.0, help="seconds in all")
    parser.add_argument(
        "--tolerate-unreachable",
        action="store_true",
        help="exit 0 where the service gives no answers at all, for CI behind a wall",
    )
    options = parser.parse_args(arguments)
    wanted = pins(*RUNTIME, *CLUSTER, *DEVELOPMENT, *TOOLS)
    findings = audit(shlex.split(options.command), wanted, options.limit_s)
    count = len({pin.release for pin in wanted})
    return report(findings, count, tolerate_unreachable=options.tolerate_unreachable)


if __name__ == "__main__":
    sys.exit(main())
