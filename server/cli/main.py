"""The command line, `inpaint-server`; one function for each command.

Heavy imports stand inside the commands, so that `--help` is quick and the API process loads no
torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

from server.cli.models.arguments import add_models_commands
from server.cli.options import (
    Parser,
    Refusal,
    database_refusing,
    network,
    refusing,
    seconds_of,
    settings_of,
)
from server.cli.serve import run_server, run_worker
from server.cli.webhooks import list_webhooks, ping_webhook, redeliver_webhooks
from server.core.terminal import printable


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status."""
    options = parse(arguments)
    # Other users may not read what a command writes, except the picture of `demo`.
    umask = os.umask(0o077)
    if options.run is demo:
        os.umask(umask)
    try:
        return run(options)
    except Refusal as error:
        for line in error.args:
            print(f"error: {printable(line)}", file=sys.stderr)  # noqa: T201 - for whoever typed the command
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        os.umask(umask)


def run(options: argparse.Namespace) -> int:
    """Call the command's function. Unexpected errors of `serve` and `worker` go to the log."""
    if options.run not in (run_server, run_takeover_server, run_worker):
        with refusing(), database_refusing():
            return int(options.run(options))
    try:
        return int(options.run(options))
    except Refusal:
        raise
    except Exception:  # noqa: BLE001 - the outermost border
        from server.core.logs import get_logger

        get_logger(__name__).exception(
            "worker failed" if options.run is run_worker else "serve failed"
        )
        return 1


EXAMPLES = """\
examples:
  inpaint-server serve                                     built-in model, http://127.0.0.1:8000
  inpaint-server serve --model sd15-inpainting --host 0.0.0.0
  inpaint-server keys create "the team" --expires-in 90d   a key for callers from elsewhere

Settings and their environment variables: docs/settings.md, configs/example.toml."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; `run` is the command's function."""
    options, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown[0])
    return options


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def make_parser() -> Parser:
    """The parser of all commands; each sets `run` to its function."""
    parser = Parser(
        prog="inpaint-server",
        description="A self-hosted server that repaints parts of pictures.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--version", action="version", version=f"inpaint-server {version('inpaint-server')}"
    )
    commands: Commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    shared = Parser(add_help=False)
    shared.add_argument("--config", type=Path, metavar="FILE", help="settings file (TOML)")
    shared.add_argument("--data-dir", type=Path, metavar="DIR", help="database and files")
    shared.add_argument(
        "--model", metavar="ID", help="id of models.toml, hub id, folder or .safetensors file"
    )
    for add in (add_serve, add_worker, add_health, add_doctor, add_demo, add_migrate):
        add(commands, shared)
    add_config(commands, shared)
    each = commands.add_parser(
        "models", parents=[shared], help="list, download, verify, add and remove models"
    )
    each.set_defaults(run=models, verb="list", json=False)
    add_models_commands(each.add_subparsers(metavar="ACTION"), shared, models)
    add_webhooks(commands, shared)
    add_cluster(commands, shared)
    add_takeover(commands, shared)
    each = commands.add_parser("keys", help="create, list, revoke and rotate API keys")
    add_keys_commands(each.add_subparsers(required=True, metavar="ACTION"), shared)
    return parser


def add_serve(commands: Commands, shared: Parser) -> None:
    each = commands.add_parser("serve", parents=[shared], help="answer requests, start workers")
    add_flags_of_serve(each)
    each.add_argument(
        "--worker-command", metavar="COMMAND", help="what starts a worker; default: this program"
    )
    each.set_defaults(run=run_server, tls=None, allowed_hosts=None)


def add_flags_of_serve(each: Parser) -> None:
    """Flags for settings that all of a server has, but its workers do not."""
    each.add_argument("--host", help="address to listen on")
    each.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    each.add_argument(
        "--devices", help="comma-separated, such as cuda:0,cuda:1; all: every GPU, or the CPU"
    )
    each.add_argument(
        "--workers", type=int, metavar="N", help="worker processes in all; 0 for none"
    )


def add_worker(commands: Commands, shared: Parser) -> None:
    each = commands.add_parser("worker", parents=[shared], help="run jobs from the database")
    each.add_argument("--worker-id", metavar="NAME", help="a unique name; default: made up")
    each.add_argument(
        "--device", default="auto", help="cuda:0, MIG-…, cpu; auto: the first GPU, or the CPU"
    )
    each.add_argument(
        "--parent", type=int, metavar="PID", help="end when this process is no longer the parent"
    )
    each.set_defaults(run=run_worker)


def add_health(commands: Commands, shared: Parser) -> None:
    each = commands.add_parser(
        "health", parents=[shared], help="check whether a server answers, or a worker reports"
    )
    each.add_argument("--url", help="its address; default: this machine's, from the settings")
    each.add_argument("--worker-id", metavar="ID", help="a worker of this machine, in its place")
    each.set_defaults(run=health)


def add_doctor(commands: Commands, shared: Parser) -> None:
    each = commands.add_parser(
        "doctor",
        parents=[shared],
        help="find out what is wrong and how to mend it; exit status 1 if something is",
        description="Looks at what `serve` with the same flags would use. Changes nothing.",
    )
    add_flags_of_serve(each)
    each.add_argument("--json", action="store_true", help="print JSON")
    each.add_argument("--no-inpaint", action="store_true", help="leave out the test picture")
    for flag, refused in (("--image-url", "images of"), ("--webhook-url", "webhooks to")):
        each.add_argument(
            flag,
            action="append",
            default=[],
            metavar="URL",
            help=f"tell whether {refused} this host would be refused; may be repeated",
        )
    each.set_defaults(run=doctor)


def add_demo(commands: Commands, _shared: Parser) -> None:
    each = commands.add_parser("demo", help="make one picture through the API and save it")
    each.add_argument("--prompt", help="what to paint under the mask")
    each.add_argument("--init-image", type=Path, help="picture to change")
    each.add_argument("--mask-image", type=Path, help="white where it is repainted")
    each.add_argument("--out", type=Path, help="where to save init, mask and result side by side")
    each.set_defaults(run=demo)


def add_migrate(commands: Commands, shared: Parser) -> None:
    each = commands.add_parser("migrate", parents=[shared], help="bring the database up to date")
    each.set_defaults(run=migrate)


def add_config(commands: Commands, shared: Parser) -> None:
    actions = commands.add_parser("config", help="show and check the settings").add_subparsers(
        required=True, metavar="ACTION"
    )
    for verb, text in (
        ("show", "list the effective settings and where each comes from"),
        ("check", "list every setting that a start would refuse; exit status 1 if there is one"),
    ):
        each = actions.add_parser(verb, parents=[shared], help=text)
        each.add_argument("--json", action="store_true", help="print JSON")
        each.set_defaults(run=config, verb=verb)


def add_webhooks(commands: Commands, shared: Parser) -> None:
    actions = commands.add_parser(
        "webhooks", help="list, repeat and test webhook calls"
    ).add_subparsers(required=True, metavar="ACTION")
    each = actions.add_parser(
        "list", parents=[shared], help="list webhook calls, dead ones by default"
    )
    each.add_argument(
        "--state", choices=("pending", "delivered", "dead", "all"), default="dead", help="(dead)"
    )
    each.add_argument("--limit", type=int, default=100, metavar="N", help="newest N (100)")
    each.set_defaults(run=list_webhooks)
    each = actions.add_parser("redeliver", parents=[shared], help="repeat calls with the same ids")
    each.add_argument("job_ids", type=int, nargs="+", metavar="JOB", help="ids of their jobs")
    each.set_defaults(run=redeliver_webhooks)
    each = actions.add_parser("ping", parents=[shared], help="send a signed test event")
    each.add_argument("url", metavar="URL")
    each.set_defaults(run=ping_webhook)


def add_cluster(commands: Commands, shared: Parser) -> None:
    actions = commands.add_parser("cluster", help="run workers on a Ray cluster").add_subparsers(
        required=True, metavar="ACTION"
    )
    for verb, text in (
        ("up", "deploy the workers, or change their number"),
        ("status", "show the nodes and their workers"),
        ("down", "stop the workers"),
    ):
        each = actions.add_parser(verb, parents=[shared], help=text)
        each.set_defaults(run=cluster, verb=verb)
        if verb == "status":
            each.add_argument("--json", action="store_true", help="for programs")


def add_takeover(commands: Commands, shared: Parser) -> None:
    actions = commands.add_parser(
        "takeover", help="answer in the vendor's place, under its host names"
    ).add_subparsers(required=True, metavar="ACTION")
    folder = Parser(add_help=False)
    folder.add_argument(
        "--folder", type=Path, metavar="DIR", help="certificates; default: in the data folder"
    )
    each = actions.add_parser(
        "init", parents=[shared, folder], help="make certificates, say what to do on clients"
    )
    each.add_argument(
        "--host-name", action="append", metavar="NAME", help="in place of the vendor's; repeatable"
    )
    each.add_argument("--address", help="of this machine, as clients reach it")
    each.set_defaults(run=takeover, verb="init")
    each = actions.add_parser(
        "serve", parents=[shared, folder], help="as `serve`, with these certificates, on port 443"
    )
    add_flags_of_serve(each)
    each.set_defaults(run=run_takeover_server, worker_command=None, allowed_hosts=None)
    each = actions.add_parser("undo", parents=[shared, folder], help="delete what `init` made")
    each.set_defaults(run=takeover, verb="undo")


def add_keys_commands(commands: Commands, shared: Parser) -> None:
    """The commands below `keys`."""
    add_keys_create(commands, shared)

    each = commands.add_parser(
        "list", parents=[shared], help="list all keys; the secrets are not shown"
    )
    each.set_defaults(run=keys, verb="list")

    each = commands.add_parser("revoke", parents=[shared], help="revoke a holder's keys at once")
    each.add_argument("key_id", metavar="ID", help="as `keys list` shows it")
    each.set_defaults(run=keys, verb="revoke")

    each = commands.add_parser("rotate", parents=[shared], help="create a holder's next key")
    each.add_argument("key_id", metavar="ID", help="as `keys list` shows it")
    each.add_argument(
        "--overlap",
        type=seconds_of,
        default=86_400.0,
        metavar="TIME",
        help="how long the present key stays valid (24h)",
    )
    each.set_defaults(run=keys, verb="rotate")


def add_keys_create(commands: Commands, shared: Parser) -> None:
    each = commands.add_parser("create", parents=[shared], help="create a key and show it once")
    each.add_argument("name", help="who or what holds it")
    each.add_argument("--expires-in", type=seconds_of, metavar="TIME", help="such as 90d or 12h")
    each.add_argument("--requests-per-minute", type=int, metavar="N", help="API calls it may make")
    each.add_argument("--max-waiting", type=int, metavar="N", help="its jobs that may wait")
    each.add_argument("--priority", type=int, default=0, metavar="N", help="higher goes first")
    each.add_argument(
        "--hold",
        type=seconds_of,
        metavar="TIME",
        help="how long calls of the vendor's APIs wait before they are answered 'processing'",
    )
    for what, reach in (
        ("fetch", "its images may come from"),
        ("webhook", "its webhooks may go to"),
    ):
        each.add_argument(
            f"--{what}-network",
            type=network,
            action="append",
            default=[],
            metavar="CIDR",
            help=f"private network {reach}; may be repeated",
        )
        each.add_argument(
            f"--{what}-host",
            action="append",
            default=[],
            metavar="NAME",
            help=f"exact host name {reach}, whatever its address; may be repeated",
        )
    each.add_argument(
        "--force-safety-checker", action="store_true", help="its pictures are always checked"
    )
    each.set_defaults(run=keys, verb="create")


def health(options: argparse.Namespace) -> int:
    """Exit status 0 where a server answers `/healthz`, or a worker does not hang."""
    from server.cli.health import check, check_local, check_worker

    if options.worker_id:
        return check_worker(settings_of(options), options.worker_id)
    return check(options.url) if options.url else check_local(settings_of(options))


def doctor(options: argparse.Namespace) -> int:
    """Print what is wrong with the machine, the settings and the stores."""
    from server.cli.doctor import run

    return run(options)


def demo(options: argparse.Namespace) -> int:
    """Start a temporary server, send it the vendor's example request, save the picture."""
    from server.cli.demo import run_demo

    given = vars(options)
    return run_demo(**{name: given[name] for name in ("prompt", "init_image", "mask_image", "out")})


def migrate(options: argparse.Namespace) -> int:
    """Create or migrate the tables, as `serve` does."""
    from server.storage.database import open_migrated

    open_migrated(settings_of(options).sqlalchemy_url)
    return 0


def keys(options: argparse.Namespace) -> int:
    """Create, list, revoke or rotate API keys."""
    from server.cli.keys import run

    return run(options, settings_of(options))


def takeover(options: argparse.Namespace) -> int:
    """Make certificates for the vendor's hosts, or delete them."""
    from server.cli.takeover import run

    return run(options)


def run_takeover_server(options: argparse.Namespace) -> int:
    """`serve` with these certificates."""
    from server.cli.takeover import prepare_server

    with refusing():
        prepare_server(options)
    return run_server(options)


def cluster(options: argparse.Namespace) -> int:
    """Deploy, show or stop the workers on a Ray cluster."""
    from server.cli.cluster import run

    return run(options)


def config(options: argparse.Namespace) -> int:
    """Show or check the settings."""
    from server.cli.config import check, show

    return {"show": show, "check": check}[options.verb](options)


def models(options: argparse.Namespace) -> int:
    """List, download, verify, add or remove models."""
    from server.cli.models.commands import run

    return run(options, settings_of(options))


if __name__ == "__main__":
    sys.exit(main())
