"""The command line, `inpaint-server`: serve, worker, health, demo, migrate, models, webhooks, keys.

Imports stand inside each command, so that `--help` is quick and the API process has no torch.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from server.core.settings import IpNetwork, Settings, load_settings, network_of
from server.core.settings_errors import InvalidSettings
from server.core.terminal import printable

SHARED_FLAGS = ("config", "data_dir", "model")
"""Flags that `serve` passes on to its workers."""


class Refusal(Exception):
    """Why a command cannot do its work, in the operator's words; a line for each reason."""


@contextmanager
def refusing() -> Iterator[None]:
    """While settings are read and things are opened: what fails then is the operator's to mend."""
    try:
        yield
    except (ValueError, OSError) as error:
        lines = error.lines if isinstance(error, InvalidSettings) else [str(error)]
        raise Refusal(*lines) from error


@contextmanager
def database_refusing() -> Iterator[None]:
    """For commands that end: a database that goes away, or stays locked, is a refusal as well."""
    try:
        yield
    except Exception as error:
        from sqlalchemy.exc import SQLAlchemyError  # not at the top: `--help` needs none

        if not isinstance(error, SQLAlchemyError):
            raise
        reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
        raise Refusal(f"the database cannot be used now: {reason}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = parse(arguments)
    # What a command writes is for this user alone, but for the demo's picture.
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
    """The command's function; what nobody foresaw in a long one goes to the log."""
    if options.run not in (serve, work):
        with refusing(), database_refusing():
            return int(options.run(options))
    try:
        return int(options.run(options))
    except Refusal:
        raise
    except Exception:  # noqa: BLE001 - the outermost border
        from server.core.logs import get_logger

        get_logger(__name__).exception("serve failed" if options.run is serve else "worker failed")
        return 1


EXAMPLES = """\
examples:
  inpaint-server serve                                     built-in model, http://127.0.0.1:8000
  inpaint-server serve --model sd15-inpainting --host 0.0.0.0
  inpaint-server keys create "the team" --expires-in 90d   a key for callers from elsewhere

Settings and their environment variables: configs/example.toml and README.md."""


class Parser(argparse.ArgumentParser):
    """Of one command; its options name it, so that its own usage is shown for what is wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.set_defaults(parser=self)

    def refuse(self, word: str) -> NoReturn:
        """End with the usage and the nearest flag."""
        from models.spelling import did_you_mean

        flags = [flag for action in self._actions for flag in action.option_strings]
        self.error(f"unknown argument {word}{did_you_mean(word.partition('=')[0], flags)}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line as options; `run` is the command's function."""
    options, unknown = make_parser().parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown[0])
    return options


def make_parser() -> Parser:
    """Of all commands."""
    parser = Parser(
        prog="inpaint-server",
        description="A self-hosted server that repaints parts of pictures.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "--version", action="version", version=f"inpaint-server {version('inpaint-server')}"
    )
    commands: argparse._SubParsersAction[Parser] = parser.add_subparsers(
        required=True, metavar="COMMAND", title="commands"
    )

    shared = Parser(add_help=False)
    shared.add_argument("--config", type=Path, metavar="FILE", help="settings file (TOML)")
    shared.add_argument("--data-dir", type=Path, metavar="DIR", help="database and files")
    shared.add_argument("--model", metavar="ID", help="id of configs/models.toml, folder or hub id")

    each = commands.add_parser("serve", parents=[shared], help="answer requests, start workers")
    each.add_argument("--host", help="address to listen on")
    each.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    each.add_argument(
        "--devices", help="comma-separated, such as cuda:0,cuda:1; all: every GPU, or the CPU"
    )
    each.add_argument(
        "--workers", type=int, metavar="N", help="worker processes in all; 0 for none"
    )
    each.add_argument(
        "--worker-command", metavar="COMMAND", help="what starts a worker; default: this program"
    )
    each.set_defaults(run=serve)

    each = commands.add_parser("worker", parents=[shared], help="make pictures for a server")
    each.add_argument("--worker-id", metavar="NAME", help="that no other has (made up)")
    each.add_argument(
        "--device", default="auto", help="cuda:0, MIG-…, cpu; auto: the first GPU, or the CPU"
    )
    each.add_argument(
        "--parent", type=int, metavar="PID", help="end when this process is no longer the parent"
    )
    each.set_defaults(run=work)

    each = commands.add_parser("health", parents=[shared], help="ask whether a server answers")
    each.add_argument("--url", help="its address; default: this machine's, from the settings")
    each.set_defaults(run=health)

    each = commands.add_parser("demo", help="make one picture through the API and save it")
    each.add_argument("--prompt", help="what to paint under the mask")
    each.add_argument("--init-image", type=Path, help="picture to change")
    each.add_argument("--mask-image", type=Path, help="white where it is repainted")
    each.add_argument("--out", type=Path, help="where to save init, mask and result side by side")
    each.set_defaults(run=demo)

    each = commands.add_parser("migrate", parents=[shared], help="bring the database up to date")
    each.set_defaults(run=migrate)

    each = commands.add_parser("models", parents=[shared], help="list and look after models")
    each.set_defaults(run=models, verb="list")
    actions = each.add_subparsers(metavar="ACTION")
    actions.add_parser("list", parents=[shared], help="those of models.toml").set_defaults(
        verb="list"
    )
    for verb, text in (
        ("download", "get a model as the hub has it now"),
        ("verify", "compare a model's files with those it was first used with"),
        ("trust", "take a model's present files for the right ones"),
    ):
        each = actions.add_parser(verb, parents=[shared], help=text)
        each.add_argument("model_id", metavar="ID", help="id of models.toml, folder or hub id")
        each.set_defaults(verb=verb)

    each = commands.add_parser("webhooks", help="look after webhook calls")
    actions = each.add_subparsers(required=True, metavar="ACTION")
    each = actions.add_parser("list", parents=[shared], help="list calls, dead ones by default")
    each.add_argument(
        "--state", choices=("pending", "delivered", "dead", "all"), default="dead", help="(dead)"
    )
    each.add_argument("--limit", type=int, default=100, metavar="N", help="newest N (100)")
    each.set_defaults(run=list_webhooks)
    each = actions.add_parser("redeliver", parents=[shared], help="make calls again, same ids")
    each.add_argument("job_ids", type=int, nargs="+", metavar="JOB", help="ids of their jobs")
    each.set_defaults(run=redeliver_webhooks)
    each = actions.add_parser("ping", parents=[shared], help="send a signed test event")
    each.add_argument("url", metavar="URL")
    each.set_defaults(run=ping_webhook)

    each = commands.add_parser("keys", help="make, list and end API keys")
    add_keys_commands(each.add_subparsers(required=True, metavar="COMMAND"), shared)
    return parser


def add_keys_commands(commands: "argparse._SubParsersAction[Parser]", shared: Parser) -> None:
    """The commands below `keys`."""
    each = commands.add_parser("create", parents=[shared], help="make a key and show it once")
    each.add_argument("name", help="who or what holds it")
    each.add_argument("--expires-in", type=seconds_of, metavar="TIME", help="such as 90d or 12h")
    each.add_argument("--requests-per-minute", type=int, metavar="N", help="API calls it may make")
    each.add_argument("--max-waiting", type=int, metavar="N", help="its jobs that may wait")
    each.add_argument("--priority", type=int, default=0, metavar="N", help="higher goes first")
    each.add_argument(
        "--hold", type=seconds_of, metavar="TIME", help="until its V3 calls get 'processing'"
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

    each = commands.add_parser("list", parents=[shared], help="all keys, without the keys")
    each.set_defaults(run=keys, verb="list")

    each = commands.add_parser("revoke", parents=[shared], help="end a holder's keys at once")
    each.add_argument("key_id", metavar="ID", help="as `keys list` shows it")
    each.set_defaults(run=keys, verb="revoke")

    each = commands.add_parser("rotate", parents=[shared], help="make a holder's next key")
    each.add_argument("key_id", metavar="ID", help="as `keys list` shows it")
    each.add_argument(
        "--overlap",
        type=seconds_of,
        default=86_400.0,
        metavar="TIME",
        help="how long the present key goes on (24h)",
    )
    each.set_defaults(run=keys, verb="rotate")


def seconds_of(text: str) -> float:
    """90d, 12h, 30m or 45s. Raises: ArgumentTypeError."""
    units = {"d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0}
    number, unit = text[:-1], text[-1:]
    if text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} has no unit; write {text}d, {text}h or {text}m")
    if unit not in units or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 90d, 12h, 30m or 45s")
    return int(number) * units[unit]


def network(text: str) -> IpNetwork:
    """Raises: ArgumentTypeError."""
    try:
        found: IpNetwork = network_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return found


def settings_of(options: argparse.Namespace, *names: str) -> Settings:
    """Settings from the flags of these names, environment and file."""
    given = {name: getattr(options, name) for name in (*SHARED_FLAGS, *names)}
    return load_settings(**given)


def serve(options: argparse.Namespace) -> int:
    """Listen, migrate, start workers, answer until SIGTERM or SIGINT."""
    from server.api.app import create_app
    from server.api.auth.keyring import read_keys_file
    from server.api.auth.keys import KeyStore
    from server.core.logs import configure_logging, learn_secrets
    from server.jobs.store import JobStore
    from server.serving.preflight import check_workers
    from server.serving.server import ADMIN_LISTENING, Server, listen, raise_open_file_limit, url_of
    from server.serving.supervisor import WORKER_COMMAND, Supervisor, worker_children
    from server.storage.database import open_migrated
    from server.worker.announcements import STARTING, announce, ready_announced

    with refusing():
        settings = settings_of(options, "host", "port", "devices", "workers")
        settings.make_data_dir()
        configure_logging(secrets=settings.secrets, said_to_person=STARTING)
        warn_of(settings)
        command = shlex.split(options.worker_command or "")
        if settings.auth.keys_file is not None:
            learn_secrets(read_keys_file(settings.auth.keys_file))  # it must be there at the start
        settings = check_workers(settings, command)
        raise_open_file_limit()
        engine = open_migrated(settings.sqlalchemy_url)
        has_keys = KeyStore(engine).has_keys()
        settings.refuse_open_server(has_keys)
        listeners = listen(settings)
        admin = listeners.get(ADMIN_LISTENING)
        admin_port = None if admin is None else admin.getsockname()[1]
        # The ports taken for 0: the server must know where it listens, to stay out of there.
        settings = settings.model_copy(
            update={
                "port": listeners["listening"].getsockname()[1],
                "admin": settings.admin.model_copy(update={"port": admin_port}),
            }
        )
        app = create_app(settings)
        store = JobStore(engine)
        workers = worker_children(
            settings.worker_devices,
            shared_flags(options),
            store,
            (settings.worker_stall_s, settings.worker_load_stall_s),
            command or WORKER_COMMAND,
        )
    supervisor = Supervisor(workers)
    server = Server(app, settings, admin_port, supervisor)
    urls = {event: url_of(each) for event, each in listeners.items()}
    url = urls.pop("listening")
    worker_ids = [each.label["worker_id"] for each in workers]
    with supervisor, ready_announced(store, worker_ids, url):
        announce(settings, url, settings.access(has_keys), urls)
        server.run_until_stopped(*listeners.values())
    if supervisor.failure is not None:
        raise Refusal(supervisor.failure)
    return 0


def warn_of(settings: Settings) -> None:
    """Log what an operator should change, though the server starts all the same."""
    from server.core.logs import get_logger

    logger = get_logger(__name__)
    for sentence in settings.removed:
        logger.warning("setting has no effect any more", detail=sentence)
    if settings.open_data_dir:
        logger.warning("others may enter the data folder", detail=settings.open_data_dir)


def shared_flags(options: argparse.Namespace) -> list[str]:
    """Those of `SHARED_FLAGS` that were given, as they are written."""
    return [
        word
        for name in SHARED_FLAGS
        if getattr(options, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]


def work(options: argparse.Namespace) -> int:
    """Run one worker until SIGTERM, or until the server that started it is gone."""
    import signal
    import threading

    from server.serving.devices import expand_devices, open_device
    from server.serving.supervisor import UNUSABLE, new_worker_id

    # Before torch is imported, which takes seconds, and looks for devices once.
    with refusing():
        settings = settings_of(options)
        settings.make_data_dir()
        (device, *_) = expand_devices([options.device])
        device = open_device(device)

    from models.errors import DeviceUnavailable, EngineError, ModelUnavailable
    from server.core.logs import configure_logging, get_logger
    from server.storage.database import DatabaseFileGone
    from server.worker.announcements import STARTING
    from server.worker.loop import loop as worker

    # A server tells a person of its workers.
    said = STARTING if options.parent is not None else ()
    configure_logging(secrets=settings.secrets, said_to_person=said)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        worker_id = options.worker_id or new_worker_id()
        worker.run(settings, worker_id, device, stopping, options.parent)
    except (DeviceUnavailable, ModelUnavailable) as error:
        if options.parent is None:  # else the server says it
            get_logger(__name__).error("worker cannot go on", detail=str(error))
        return UNUSABLE
    except (EngineError, DatabaseFileGone) as error:
        get_logger(__name__).error("worker cannot go on", detail=str(error))
        return 1
    return 0


def health(options: argparse.Namespace) -> int:
    """0 where the server answers `/healthz`."""
    from server.cli.health import check, local_url

    return check(options.url or local_url(settings_of(options)))


def demo(options: argparse.Namespace) -> int:
    """Start a server of its own, send it the vendor's example request, save the result."""
    from server.cli.demo import run_demo

    given = vars(options)
    return run_demo(**{name: given[name] for name in ("prompt", "init_image", "mask_image", "out")})


def migrate(options: argparse.Namespace) -> int:
    """Create or update the tables; `serve` does it too."""
    from server.storage.database import open_migrated

    open_migrated(settings_of(options).sqlalchemy_url)
    return 0


def keys(options: argparse.Namespace) -> int:
    """Make, list or end API keys in the database."""
    from server.cli.keys import run

    return run(options, settings_of(options))


def models(options: argparse.Namespace) -> int:
    """List, download, verify or trust models."""
    from server.cli.models import run

    return run(options, settings_of(options))


def list_webhooks(options: argparse.Namespace) -> int:
    """Print a line per call: job, state, tries, last outcome, address."""
    from server.core.terminal import print_table
    from server.storage.database import open_migrated
    from server.webhooks.deliveries import DeliveryState, DeliveryStore

    store = DeliveryStore(open_migrated(settings_of(options).sqlalchemy_url))
    state = None if options.state == "all" else DeliveryState(options.state)
    rows = []
    for each in store.list_of(None, state=state, limit=options.limit):
        last = each.attempts[-1][1] if each.attempts else None
        outcome = "not tried" if last is None else f"{last.status or ''} {last.outcome}".strip()
        rows.append((str(each.job_id), each.state, str(each.attempts_total), outcome, each.url))
    kind = "" if state is None else f" {state}"
    print_table(
        ("job", "state", "tries", "last outcome", "address"), rows, empty=f"no{kind} webhook calls"
    )

    return 0


def redeliver_webhooks(options: argparse.Namespace) -> int:
    """Mark calls as due; a running server makes them within a second. 1 where one cannot be."""
    from server.api.dialects.native.problems import CONFLICTS
    from server.core.errors import Conflict
    from server.storage.database import open_migrated
    from server.webhooks.deliveries import DeliveryStore

    store = DeliveryStore(open_migrated(settings_of(options).sqlalchemy_url))
    status = 0
    for job_id in options.job_ids:
        try:
            store.redeliver(job_id)
        except Conflict as error:
            _, sentence = CONFLICTS[error.kind]
            print(f"error: job {job_id}: {sentence}", file=sys.stderr)  # noqa: T201
            status = 1
    return status


def ping_webhook(options: argparse.Namespace) -> int:
    """Send a test event under the server's own settings; 0 where the receiver took it."""
    import asyncio

    from server.egress.client import EgressClient, listeners_of
    from server.webhooks.sender import WebhookCaller

    parts = urlsplit(options.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{options.url!r} is no http(s) URL")
    settings = settings_of(options)

    async def ping() -> int:
        client = EgressClient(settings.egress, listeners_of(settings))
        message_id, attempt = await WebhookCaller(settings.webhook, client).ping(options.url)
        print(message_id, attempt.status or "-", attempt.outcome, sep="\t")  # noqa: T201
        return 0 if attempt.is_success else 1

    return asyncio.run(ping())


if __name__ == "__main__":
    sys.exit(main())
