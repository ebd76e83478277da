"""The commands `serve` and `worker`, which run until they are stopped."""

import argparse
import shlex
from collections.abc import Sequence

from server.cli.options import Refusal, refusing, settings_of, shared_flags
from server.core.settings import Settings
from server.core.settings.folder import make_data_dir, why_open

FLAGS = ("host", "port", "devices", "workers", "tls", "allowed_hosts")
"""Settings that `serve` takes from its options. `takeover serve` sets the last two."""


def run_server(options: argparse.Namespace) -> int:
    """Listen, migrate, start workers, answer until SIGTERM or SIGINT."""
    from server.api.app import SUPERVISOR_CONNECTIONS, create_app
    from server.api.auth.keys import KeyStore
    from server.cli.announcements import announce, ready_announced
    from server.jobs.store import JobStore
    from server.serving.server import (
        LISTENING,
        Server,
        listen,
        raise_open_file_limit,
        url_of,
        with_bound_ports,
    )
    from server.serving.supervisor import Supervisor, configured_workers
    from server.storage.database import open_migrated

    with refusing():
        settings, command = prepare_server(options)
        raise_open_file_limit()
        engine = open_migrated(settings.sqlalchemy_url, SUPERVISOR_CONNECTIONS)
        has_keys = KeyStore(engine).has_keys()
        settings.refuse_open_server(has_keys)
        listeners = listen(settings)
        settings = with_bound_ports(settings, listeners)
        app = create_app(settings)
        store = JobStore(engine)
        workers = configured_workers(settings, shared_flags(options), store, command)
        if workers and not command:
            # At the end, because a start that is refused need not be warned of.
            warn_of_devices(settings_of(options, "devices").devices, settings.devices)
    supervisor = Supervisor(workers)
    with refusing():
        server = Server(app, settings, settings.admin.port, supervisor)
    url = url_of(listeners[LISTENING], settings.scheme)
    urls = {event: url_of(each) for event, each in listeners.items() if event != LISTENING}
    worker_ids = [worker.label["worker_id"] for worker in workers]
    with supervisor, ready_announced(store, worker_ids, url):
        announce(settings, url, settings.access(has_keys), urls)
        server.run_until_stopped(*listeners.values())
    if supervisor.failure is not None:
        raise Refusal(supervisor.failure)
    return 0


def prepare_server(options: argparse.Namespace) -> tuple[Settings, Sequence[str]]:
    """The checked settings, and the operator's own worker command. Starts the log.

    Raises: ValueError, OSError.
    """
    from server.cli.announcements import STARTING
    from server.core import tracing
    from server.core.logs import configure_logging
    from server.serving.preflight import check_workers, checks_before_start

    settings = settings_of(options, *FLAGS)
    make_data_dir(settings.data_dir)
    configure_logging(secrets=settings.secrets, shown_on_terminal=STARTING)
    tracing.start(
        settings.tracing_url, "inpaint-api", follows_callers=settings.tracing_follows_callers
    )
    warn_operator(settings)
    for check in checks_before_start(settings):
        check()
    command = shlex.split(options.worker_command or "")
    return check_workers(settings, command), command


def warn_of_devices(asked: Sequence[str], devices: Sequence[str]) -> None:
    """Log an old driver, and the CPU in place of a GPU. devices: as found for those asked for."""
    from server.core.logs import get_logger
    from server.serving.preflight import device_warnings

    for sentence in device_warnings(asked, devices):
        get_logger(__name__).warning("check the GPU", detail=sentence)


def warn_operator(settings: Settings) -> None:
    """Log settings that an operator should change, though the server starts."""
    from server.core.logs import get_logger

    logger = get_logger(__name__)
    for sentence in settings.removed:
        logger.warning("setting has no effect any more", detail=sentence)
    if reason := why_open(settings.data_dir):
        logger.warning("others may enter the data folder", detail=reason)


def run_worker(options: argparse.Namespace) -> int:
    """Run one worker until SIGTERM, or until the server that started it has ended."""
    import signal
    import threading

    # The device is chosen before torch is imported, because CUDA reads the environment once, and
    # because a refusal need not wait seconds for the import.
    with refusing():
        settings, device = prepare_worker(options)

    from models.errors import DeviceUnavailable, EngineError, ModelUnavailable
    from server.core.logs import get_logger
    from server.serving.supervisor import UNUSABLE, new_worker_id
    from server.storage.database import DatabaseFileGone
    from server.worker import loop

    logger = get_logger(__name__)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    worker_id = options.worker_id or new_worker_id()
    try:
        loop.run(settings, worker_id, device, stopping, options.parent)
    except (DeviceUnavailable, ModelUnavailable) as error:
        if options.parent is None:  # else the supervisor logs the reason
            logger.error("worker cannot go on", detail=str(error))
        return UNUSABLE
    except (EngineError, DatabaseFileGone) as error:
        logger.error("worker cannot go on", detail=str(error))
        return 1
    return 0


def prepare_worker(options: argparse.Namespace) -> tuple[Settings, str]:
    """The settings, and torch's name of the device. Starts the log. Raises: ValueError, OSError."""
    from server.cli.announcements import STARTING
    from server.core import tracing
    from server.core.logs import configure_logging
    from server.serving.devices import expand_devices, open_device
    from server.storage.files import Storage

    settings = settings_of(options)
    make_data_dir(settings.data_dir)
    devices = expand_devices([options.device])
    # On a terminal the server that started this worker announces these events.
    announced = STARTING if options.parent is not None else ()
    configure_logging(secrets=settings.secrets, shown_on_terminal=announced)
    tracing.start(settings.tracing_url, "inpaint-worker")
    Storage(settings.storage_url, settings.store_options)  # refuses unusable options
    if options.parent is None:  # else the server has warned
        warn_of_devices([options.device], devices)
    return settings, open_device(devices[0])
