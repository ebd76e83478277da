"""The commands that run for long: `serve` and `worker`."""

import argparse
import shlex

from server.cli.options import Refusal, refusing, settings_of, shared_flags
from server.core.settings import Settings


def run_server(options: argparse.Namespace) -> int:
    """Listen, migrate, start workers, answer until SIGTERM or SIGINT."""
    from server.api.app import create_app
    from server.api.auth.keyring import read_keys_file
    from server.api.auth.keys import KeyStore
    from server.core.logs import configure_logging, redact_secrets
    from server.jobs.store import JobStore
    from server.serving.preflight import check_workers
    from server.serving.server import ADMIN_LISTENING, Server, listen, raise_open_file_limit, url_of
    from server.serving.supervisor import WORKER_COMMAND, Supervisor, worker_children
    from server.storage.database import open_migrated
    from server.worker.announcements import STARTING, announce, ready_announced

    with refusing():
        settings = settings_of(options, "host", "port", "devices", "workers")
        settings.make_data_dir()
        configure_logging(secrets=settings.secrets, shown_on_terminal=STARTING)
        warn_of(settings)
        command = shlex.split(options.worker_command or "")
        if settings.auth.keys_file is not None:
            redact_secrets(read_keys_file(settings.auth.keys_file))  # it must be there at the start
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


def run_worker(options: argparse.Namespace) -> int:
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
    from server.worker import loop
    from server.worker.announcements import STARTING

    # A server tells a person of its workers.
    said = STARTING if options.parent is not None else ()
    configure_logging(secrets=settings.secrets, shown_on_terminal=said)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    try:
        worker_id = options.worker_id or new_worker_id()
        loop.run(settings, worker_id, device, stopping, options.parent)
    except (DeviceUnavailable, ModelUnavailable) as error:
        if options.parent is None:  # else the server says it
            get_logger(__name__).error("worker cannot go on", detail=str(error))
        return UNUSABLE
    except (EngineError, DatabaseFileGone) as error:
        get_logger(__name__).error("worker cannot go on", detail=str(error))
        return 1
    return 0
