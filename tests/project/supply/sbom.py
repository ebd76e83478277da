"""`make sbom`: the runtime part of an environment as a CycloneDX bill of materials.

cyclonedx-py reads all that is installed, tests' libraries included. What stands in no runtime lock
is left out here, and the rest is validated against the schema of its version.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from tests.project.supply.licences import licence_of
from tests.project.supply.locks import REPOSITORY, RUNTIME, pins

_VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(repr(error) if error else 0)
"""


def runtime_part(bill: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The bill with the components of these canonical names and the dependencies among them.

    A component whose metadata cyclonedx-py cannot read a licence from gets that of `licence_of`.
    """
    components = [
        {"licenses": [{"license": {"name": licence_of(name)}}], **each}
        for each in bill["components"]
        if (name := canonicalize_name(each["name"])) in names
    ]
    kept = {each["bom-ref"] for each in components} | {bill["metadata"]["component"]["bom-ref"]}
    dependencies = [
        {**each, "dependsOn": [ref for ref in each.get("dependsOn", ()) if ref in kept]}
        for each in bill["dependencies"]
        if each["ref"] in kept
    ]
    return {**bill, "components": components, "dependencies": dependencies}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the bill of one environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tools", type=Path, default=Path(".venv/tools/bin"))
    parser.add_argument("--environment", type=Path, default=Path(".venv"))
    parser.add_argument("--out", type=Path, default=Path("out/sbom.json"))
    options = parser.parse_args(arguments)
    project = REPOSITORY / "pyproject.toml"
    read = [options.tools / "cyclonedx-py", "environment", "--output-reproducible"]
    scanned = subprocess.run(
        [*read, "--spec-version", "1.6", "--pyproject", project, options.environment],
        stdout=subprocess.PIPE,
        check=True,
    )
    names = {pin.name for pin in pins(*RUNTIME)}
    bill = json.dumps(runtime_part(json.loads(scanned.stdout), names), indent=2)
    subprocess.run([options.tools / "python", "-c", _VALIDATE], input=bill, text=True, check=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(bill + "\n")
    print(f"{options.out}: {len(json.loads(bill)['components'])} components, valid CycloneDX 1.6")
    return 0


if __name__ == "__main__":
    sys.exit(main())
