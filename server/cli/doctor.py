"""`inpaint-server doctor`: looks at the machine, the settings and the stores, and changes nothing.

The checks themselves are in `server/serving/diagnosis`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version

from server.cli.config import without_passwords
from server.cli.options import Refusal, refusing, settings_of
from server.core.settings import Settings
from server.core.terminal import printable
from server.serving.diagnosis.checkpoints import check_models
from server.serving.diagnosis.database import Clocks, check_database
from server.serving.diagnosis.egress import IMAGES, WEBHOOKS, check_egress
from server.serving.diagnosis.folders import check_folders
from server.serving.diagnosis.gpus import check_gpus
from server.serving.diagnosis.network import check_ports, check_proxies, check_tls
from server.serving.diagnosis.results import CheckResult, Severity, error, ok, warning
from server.serving.diagnosis.trial import check_inpaint

SETTINGS = "settings"


def run(options: argparse.Namespace) -> int:
    """Print the results. Returns 1 where one is an error, else 0."""
    found = []
    for result in map(without_secrets, diagnose(options)):
        found.append(result)
        if not options.json:
            print_result(result)
    worst = max(found, key=lambda each: [*Severity].index(each.severity)).severity
    if options.json:
        print(  # noqa: T201 - the command's output
            json.dumps(
                {
                    "ok": worst is not Severity.ERROR,
                    "version": version("inpaint-server"),
                    "results": [asdict(each) for each in found],
                },
                indent=2,
            )
        )
    return 1 if worst is Severity.ERROR else 0


def without_secrets(result: CheckResult) -> CheckResult:
    """Messages of libraries quote URLs, and people paste what doctor prints into public issues."""
    sentence, cure = map(without_passwords, (result.sentence, result.cure))
    return replace(result, sentence=sentence, cure=cure)


def print_result(result: CheckResult) -> None:
    """One line, and one with the cure, as soon as the result is there."""
    print(f"{result.severity:7}  {result.check:11}  {printable(result.sentence)}")  # noqa: T201
    if result.cure:
        print(f"{'':7}  {'':11}  -> {printable(result.cure)}")  # noqa: T201
    sys.stdout.flush()


def diagnose(options: argparse.Namespace) -> Iterator[CheckResult]:
    """All results, the quick checks first."""
    clocks = Clocks()
    try:
        with refusing():
            settings = settings_of(options, "host", "port", "devices", "workers")
    except Refusal as refusal:
        for line in refusal.args:
            yield error(
                SETTINGS, str(line), "see docs/settings.md, and `inpaint-server config check`"
            )
        return
    yield from check_settings(settings)
    yield from check_folders(settings)
    yield from check_ports(settings)
    yield from check_tls(settings)
    yield from check_proxies(settings)
    yield from check_egress(settings, IMAGES, options.image_url)
    yield from check_egress(settings, WEBHOOKS, options.webhook_url)
    yield from check_gpus(settings)
    if settings.worker_devices:
        yield from check_models(settings)
    yield from check_database(settings, clocks)
    if not options.no_inpaint:
        yield from check_inpaint(settings)


def check_settings(settings: Settings) -> Iterator[CheckResult]:
    """The settings could be read; some may have no effect any more."""
    yield ok(SETTINGS, f"inpaint-server {version('inpaint-server')}, all settings can be used")
    for sentence in settings.removed:
        yield warning(SETTINGS, f"a setting has no effect any more: {sentence}", "remove it")
