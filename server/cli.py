"""The command line: `inpaint-server serve | worker | demo | migrate | models`.

Imports stand inside each command, so that `--help` is quick and the API process has no torch.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from server.settings import Settings, load_settings

if TYPE_CHECKING:
    import socket

SHARED_FLAGS = ("config", "data_dir", "model")
"""Flags that `serve` passes on to its workers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = parse(arguments)
    try:
        status: int = options.run(options)
    except ValidationError as error:
        for each in error.errors():
            print(f"error: {'.'.join(map(str, each['loc']))} {each['msg']}", file=sys.stderr)  # noqa: T201
        return 2
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - before logging is set up
        return 2
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line as options; `run` is the command's function."""
    parser = argparse.ArgumentParser(prog="inpaint-server", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", type=Path, metavar="FILE", help="settings file (TOML)")
    shared.add_argument("--data-dir", type=Path, metavar="DIR", help="database and files")
    shared.add_argument("--model", metavar="ID", help="id of configs/models.toml, folder or hub id")

    each = commands.add_parser("serve", parents=[shared], help="answer requests, start workers")
    each.add_argument("--host", help="address to listen on")
    each.add_argument("--port", type=int, help="port to listen on; 0 takes a free one")
    each.add_argument("--devices", help="comma-separated, such as cuda:0,cuda:1 or cpu")
    each.add_argument(
        "--workers", type=int, metavar="N", help="worker processes in all; 0 for none"
    )
    each.add_argument(
        "--worker-command", metavar="COMMAND", help="what starts a worker; default: this program"
    )
    each.set_defaults(run=serve)

    each = commands.add_parser("worker", parents=[shared], help="make pictures for a server")
    each.add_argument("--worker-id", default="worker", help="unique name of this worker")
    each.add_argument("--device", default="auto", help="cuda:0, cpu; auto takes what there is")
    each.set_defaults(run=work)

    each = commands.add_parser("demo", help="make one picture through the API and save it")
    each.add_argument("--prompt", help="what to paint under the mask")
    each.add_argument("--init-image", type=Path, help="picture to change")
    each.add_argument("--mask-image", type=Path, help="white where it is repainted")
    each.add_argument("--out", type=Path, help="where to save init, mask and result side by side")
    each.set_defaults(run=demo)

    each = commands.add_parser("migrate", parents=[shared], help="bring the database up to date")
    each.set_defaults(run=migrate)

    each = commands.add_parser("models", parents=[shared], help="list the models of models.toml")
    each.set_defaults(run=models)
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace, *names: str) -> Settings:
    """Settings from the flags of these names, environment and file."""
    given = {name: getattr(options, name) for name in (*SHARED_FLAGS, *names)}
    return load_settings(**given)


def serve(options: argparse.Namespace) -> int:
    """Listen, migrate, start the workers, answer until SIGTERM or SIGINT."""
    from server.app import create_app
    from server.database import migrate as migrate_tables
    from server.database import open_engine
    from server.http import Server, bind
    from server.jobs import JobStore
    from server.supervisor import WORKER_COMMAND, Supervisor
    from server.telemetry import configure_logging, get_logger

    settings = settings_of(options, "host", "port", "devices", "workers")
    settings.refuse_open_server()
    configure_logging()
    listener: socket.socket = bind(settings.host, settings.port)
    engine = open_engine(settings.sqlalchemy_url)
    migrate_tables(engine)
    flags = [
        word
        for name in SHARED_FLAGS
        if getattr(options, name) is not None
        for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ]
    command = shlex.split(options.worker_command or "") or WORKER_COMMAND
    server = Server(create_app(settings), settings)
    with Supervisor(settings.worker_devices, flags, JobStore(engine), command=command):
        host, port = listener.getsockname()[:2]
        get_logger(__name__).info("listening", url=f"http://{host}:{port}")
        server.run_until_stopped(listener)
    return 0


def work(options: argparse.Namespace) -> int:
    """Run one worker until SIGTERM, or until the server that started it is gone."""
    import signal
    import threading

    # Before torch is imported, which takes seconds.
    settings = settings_of(options)

    from models.errors import EngineError
    from server import worker
    from server.telemetry import configure_logging, get_logger

    configure_logging()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        worker.run(settings, options.worker_id, options.device, stopping)
    except EngineError as error:
        get_logger(__name__).error("worker cannot go on", detail=str(error))
        return 1
    return 0


def demo(options: argparse.Namespace) -> int:
    """Start a server of its own, send it the vendor's example request, save the result."""
    from server.demo import run_demo

    given = vars(options)
    return run_demo(**{name: given[name] for name in ("prompt", "init_image", "mask_image", "out")})


def migrate(options: argparse.Namespace) -> int:
    """Create or update the tables; `serve` does it too."""
    from server.database import migrate as migrate_tables
    from server.database import open_engine

    migrate_tables(open_engine(settings_of(options).sqlalchemy_url))
    return 0


def models(options: argparse.Namespace) -> int:
    """Print each model's id and where it comes from."""
    from models.registry import read_catalog

    for spec in read_catalog(settings_of(options).models_file).values():
        print(f"{spec.id}\t{spec.source}")  # noqa: T201 - the command's output
    return 0


if __name__ == "__main__":
    sys.exit(main())
