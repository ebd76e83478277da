"""Stands in for pip-audit: `fake_pip_audit.py MODE …` answers its command line, asking no service.

It is a program, as the real one is, and answers in the real one's JSON for the requirements given.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

CANARY_HOLES = [{"id": "PYSEC-2020-35", "fix_versions": ["3.0.3"], "aliases": ["CVE-2020-7471"]}]
A_HOLE = [{"id": "PYSEC-2026-1", "fix_versions": [], "aliases": []}]


def answer(mode: str, name: str, version: str) -> dict[str, Any]:
    """One entry of `dependencies`; `pillow` is at fault where the mode wants somebody at fault."""
    is_canary = name == "django"
    if mode == "unknown" or (mode == "partial" and name == "pillow"):
        return {"name": name, "skip_reason": f"Dependency not found: {name} ({version})"}
    if mode in ("vulnerable", "vulnerable-partial") and name == "pillow":
        return {"name": name, "version": version, "vulns": A_HOLE}
    if mode == "vulnerable-partial" and not is_canary:
        return {"name": name, "skip_reason": f"Dependency not found: {name} ({version})"}
    holes = CANARY_HOLES if is_canary and mode != "blind" else []
    return {"name": name, "version": version, "vulns": holes}


def main(mode: str, arguments: list[str]) -> int:
    """Exits as pip-audit does: 1 with holes or without a connection, else 0."""
    if mode == "hanging":
        signal.pause()
    if mode == "refused":
        print("ERROR:pip_audit._cli:Could not connect to the vulnerability feed", file=sys.stderr)
        return 1
    (path,) = (each for each in arguments if each.startswith("--requirement="))
    lines = Path(path.removeprefix("--requirement=")).read_text().splitlines()
    releases = [line.split()[0].split("==") for line in lines]
    entries = [answer(mode, name, version) for name, version in releases]
    if mode == "forgetful":
        entries = [entry for entry in entries if entry["name"] != "pillow"]
    print(json.dumps({"dependencies": entries, "fixes": []}))
    has_holes = any(entry.get("vulns") for entry in entries)
    print("Found" if has_holes else "No known vulnerabilities found", file=sys.stderr)
    return int(has_holes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
