"""Who may import whom, held against the source; and what importing costs.

The two terminal are the layout of `models/` and `server/`: imports point one way, `models` knows
nothing of networks or databases, and the web side starts without torch.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

MODELS = {
    "errors": "",
    "spelling": "",
    "params": "errors",
    "colour": "",
    "mask_reading": "",
    "repair": "",
    "decoding": "colour errors mask_reading repair",
    "images": "",
    "masks": "images mask_reading",
    "canvas": "images masks params",
    "captions": "params",
    "enhance": "",
    "weights": "errors",
    "families": "weights",
    "parts": "",
    "weight_files": "weights",
    "unused": "errors",
    "folders": "errors parts unused weight_files weights",
    "single_file": "errors families folders parts unused weights",
    "ldm_names": "",
    "lora": "errors ldm_names weights",
    "prompts": "errors params prompt_syntax",
    "prompt_syntax": "",
    "vae": "errors",
    "encoding": "canvas params vae",
    "conditioning": "errors params prompts registry",
    "previews": "images",
    "schedulers": "errors params",
    "uploads": "",
    "unet": "uploads",
    "graphs": "unet",
    "attention": "unet",
    "compiling": "unet",
    "acceleration": "attention compiling graphs unet",
    "kernels": "",
    "noise": "",
    "fusion": "kernels",
    "registry": "errors folders lora params parts single_file spelling weights",
    "safety": "images",
    "pipeline": "acceleration canvas conditioning encoding errors fusion noise params previews"
    " schedulers registry safety unet uploads vae",
    "residency": "errors pipeline registry",
    "batching": "pipeline",
    "engine": "batching errors params pipeline residency",
    "fingerprint": "",
    "manifests": "errors fingerprint",
    "builtin": "builtin",
}
"""Room to the rooms of `models` it may import; each file and each folder is a room."""

SERVER = {
    "settings": "settings_errors models.diffusion.enhance models.spelling",
    "settings_errors": "models.spelling",
    "errors": "",
    "telemetry": "terminal",
    "terminal": "",
    "limits": "",
    "keys": "database",
    "key_commands": "database keys settings terminal",
    "model_commands": "settings terminal models.errors models.checkpoints.fingerprint models.checkpoints.manifests"
    " models.checkpoints.registry models.checkpoints.weights",
    "health_command": "settings",
    "auth": "addresses errors keys limits settings telemetry",
    "database": "settings telemetry",
    "migrations": "database",
    "changes": "database notifications",
    "notifications": "database",
    "storage": "errors",
    "addresses": "settings",
    "slots": "",
    "exchange": "",
    "lookups": "slots",
    "codings": "",
    "interfaces": "settings",
    "door": "addresses exchange interfaces lookups settings",
    "egress": "addresses codings door errors exchange lookups settings slots telemetry",
    "downloads": "addresses egress errors interfaces jobs lookups proxies",
    "confinement": "",
    "decoder": "confinement models.imaging.decoding models.errors models.imaging.mask_reading models.params",
    "cores": "telemetry",
    "decoders": "cores decoder errors notices telemetry models.imaging.colour models.imaging.decoding"
    " models.errors models.imaging.mask_reading",
    "sandbox": "decoder decoders errors slots models.imaging.decoding",
    "wal": "database",
    "clocks": "database",
    "deliveries": "clocks database errors group_commit",
    "failures": "models.params",
    "receipts": "models.imaging.mask_reading",
    "idempotency": "database errors",
    "group_commit": "errors",
    "turns": "database",
    "silence": "",
    "jobs": "notices receipts models.params",
    "estimates": "database jobs turns",
    "workers": "database silence",
    "job_rows": "database jobs turns models.params",
    "submissions": "database errors group_commit idempotency job_rows jobs turns",
    "job_store": "changes clocks database deliveries estimates failures idempotency"
    " job_rows jobs receipts silence submissions turns workers",
    "previews": "errors jobs storage telemetry models.imaging.images",
    "janitor": "clocks database deliveries errors jobs settings storage telemetry",
    "background": "telemetry",
    "threads": "",
    "waiters": "changes database job_store jobs telemetry",
    "followers": "changes errors job_store jobs telemetry",
    "bodies": "codings errors",
    "dialects": "addresses bodies deliveries downloads errors failures idempotency jobs notices"
    " receipts settings models.diffusion.enhance models.errors models.imaging.mask_reading models.params",
    "notices": "models.diffusion.prompt_syntax",
    "circuits": "",
    "webhooks": "addresses circuits deliveries dialects door errors exchange job_store jobs"
    " limits settings slots telemetry threads",
    "health": "database errors slots telemetry",
    "services": "auth background deliveries egress errors estimates followers health job_store"
    " metrics sandbox settings slots storage waiters webhooks",
    "intake": "auth decoder decoders downloads errors idempotency job_store jobs notices proxies"
    " receipts services settings slots storage models.imaging.mask_reading models.params",
    "holding": "",
    "routes": "auth bodies dialects errors health holding intake workers jobs services settings"
    " telemetry models.diffusion.enhance",
    "native_events": "dialects followers jobs",
    "native_routes": "auth bodies deliveries dialects errors followers idempotency intake"
    " jobs native_events services",
    "checkpoints": "receipts settings telemetry models.acceleration.stack models.errors"
    " models.checkpoints.fingerprint models.checkpoints.manifests models.diffusion.pipeline models.checkpoints.registry models.model_pool",
    "endings": "errors failures jobs telemetry",
    "results": "endings errors failures inspection job_store jobs receipts storage"
    " telemetry models.imaging.images models.diffusion.pipeline",
    "inspection": "jobs receipts models.imaging.canvas models.imaging.masks models.diffusion.pipeline",
    "worker": "checkpoints database decoders endings errors failures inspection job_store jobs"
    " previews receipts results settings storage telemetry workers models.imaging.captions"
    " models.engine models.errors models.diffusion.pipeline models.model_pool",
    "devices": "telemetry",
    "preflight": "devices settings models.errors models.checkpoints.registry",
    "supervisor": "job_store workers metrics settings telemetry",
    "app": "auth background database deliveries dialects door egress errors estimates followers"
    " health holding intake janitor job_store jobs keys metrics middleware native_routes"
    " proxies routes sandbox services settings silence storage telemetry waiters"
    " wal webhooks models.imaging.decoding",
    "metrics": "database estimates failures job_store workers jobs settings",
    "proxies": "",
    "middleware": "bodies errors metrics proxies settings telemetry",
    "admin": "connections errors health intake metrics middleware proxies routes services",
    "connections": "auth bodies proxies settings",
    "watchdog": "telemetry",
    "http": "admin connections cores settings supervisor watchdog",
    "cluster": "app worker settings",
    "demo": "database job_store settings supervisor",
    "cli": "announcements app auth cluster database deliveries demo devices dialects door errors"
    " health_command http job_store key_commands keys model_commands preflight settings"
    " settings_errors supervisor telemetry terminal webhooks worker models.errors models.spelling",
    "announcements": "job_store settings telemetry models.errors",
}
"""Room to the rooms of `server`, and where it says so of `models`, it may import."""

WEB_AND_DATABASE = {
    "alembic",
    "fastapi",
    "httpcore",
    "httpx",
    "obstore",
    "psycopg",
    "pydantic",
    "pydantic_settings",
    "pysqlite3",
    "ray",
    "sqlalchemy",
    "starlette",
    "uvicorn",
}
HEAVY = {"accelerate", "diffusers", "ray", "safetensors", "torch", "transformers"}
TORCH_FREE = (
    "params decoding images masks canvas captions errors enhance prompt_syntax registry "
    "fingerprint".split()
)


@dataclass(frozen=True)
class Import:
    """One imported module, such as `server.jobs.job`, and whether it is loaded with the file."""

    module: str
    is_at_top: bool


@functools.cache
def imports_of(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(), str(path))
    inner = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from server import worker` imports a module, `from server.jobs.job import Job` does not.
            is_package = module in ("models", "server")
            names = [f"{module}.{alias.name}" if is_package else module for alias in node.names]
        else:
            continue
        found += [Import(name, node not in inner) for name in names]
    return found


def files_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def room_of(path: Path) -> str:
    """`server/jobs/job.py` is in room jobs, `server/api/dialects/v3/reading.py` in dialects."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[1]


def modules_imported_by(path: Path) -> set[str]:
    return {each.module for each in imports_of(path)}


def rooms_imported_by(path: Path) -> set[str]:
    """Our own rooms: `models.imaging.images`, `server.jobs.job`."""
    parts = [module.split(".") for module in modules_imported_by(path)]
    return {".".join(each[:2]) for each in parts if each[0] in ("models", "server")}


def top_level_names(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def allowed_rooms(package: str, table: dict[str, str], room: str) -> set[str]:
    return {
        each if each.startswith("models.") else f"{package}.{each}" for each in table[room].split()
    }


def source_files() -> Iterator[object]:
    for package, table in (("models", MODELS), ("server", SERVER)):
        for path in files_of(package):
            yield pytest.param(package, table, path, id=str(path.relative_to(REPOSITORY)))


@pytest.mark.parametrize(("package", "table", "path"), [*source_files()])
def test_file_imports_only_what_its_room_may(
    package: str, table: dict[str, str], path: Path
) -> None:
    room = room_of(path)
    if room == "__init__":
        assert not modules_imported_by(path)
        return
    assert room in table, "a new room: say in the table what it may import"
    own = {f"{package}.{room}"} if (REPOSITORY / package / room).is_dir() else set()

    assert rooms_imported_by(path) <= allowed_rooms(package, table, room) | own


def test_imports_point_one_way() -> None:
    """The terminal themselves have no cycle."""
    waiting = {f"models.{room}": allowed_rooms("models", MODELS, room) for room in MODELS}
    waiting |= {f"server.{room}": allowed_rooms("server", SERVER, room) for room in SERVER}
    waiting["models.builtin"].clear()
    while waiting:
        free = {room for room, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"a cycle among {sorted(waiting)}"
        waiting = {room: needs for room, needs in waiting.items() if room not in free}


@pytest.mark.parametrize("path", files_of("models"), ids=str)
def test_models_know_no_network_and_no_database(path: Path) -> None:
    assert not top_level_names(modules_imported_by(path)) & {"server", *WEB_AND_DATABASE}


def importers_of(*names: str) -> set[str]:
    """Server files that import one of these modules, or something below it."""
    return {
        path.relative_to(REPOSITORY / "server").as_posix()
        for path in files_of("server")
        for module in modules_imported_by(path)
        if any(module == name or module.startswith(f"{name}.") for name in names)
    }


# `addresses` and `egress` name httpx for its URL alone.
READS_URLS = {"addresses.py", "egress.py"}
OPENS_CONNECTIONS = {"door.py", "exchange.py", "lookups.py"}
# The demo is a client of a server of its own, the health check of this machine's.
CLIENTS = {"demo.py", "health_command.py"}
LISTENS = {"connections.py", "http.py"}
# The type of a listening socket, and the machine's name.
NAMES_SOCKETS = {"cli.py", "supervisor.py"}
# What is this machine's own, asked of its kernel.
ASKS_THE_KERNEL = {"interfaces.py"}
NETWORK_MODULES = (
    *("aiohttp", "ftplib", "h11", "http.client", "httpcore", "httptools", "httpx", "requests"),
    *("smtplib", "socket", "ssl", "telnetlib", "urllib.request", "urllib3", "xmlrpc.client"),
)


def test_only_the_door_opens_connections() -> None:
    """What a stranger names is reached by one way: fetches and webhooks both go through it."""
    outwards = READS_URLS | OPENS_CONNECTIONS | CLIENTS
    assert importers_of(*NETWORK_MODULES) <= outwards | LISTENS | NAMES_SOCKETS | ASKS_THE_KERNEL
    assert importers_of("httpx") <= outwards
    assert importers_of("server.exchange") <= {"door.py", "egress.py", "webhooks.py"}
    assert importers_of("server.door") == {"app.py", "cli.py", "egress.py", "webhooks.py"}


CONNECTING = {
    *("create_connection", "create_datagram_endpoint", "create_unix_connection"),
    *("open_connection", "open_unix_connection", "sock_connect", "connect_tcp", "connect_unix"),
}


def test_only_the_door_calls_what_connects() -> None:
    callers = {
        path.name
        for path in files_of("server")
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) in CONNECTING
    }
    assert callers == {"door.py"}


@pytest.mark.parametrize("name", ["egress", "webhooks"])
def test_both_ways_out_use_the_door_and_not_the_wire(name: str) -> None:
    """They know the words of an exchange, not how one is begun."""
    tree = ast.parse((REPOSITORY / "server" / f"{name}.py").read_text())
    from_exchange = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "server.exchange"
        for alias in node.names
    }
    assert from_exchange <= {"BodyTooLarge"}


WORKER = {"worker.py", "checkpoints.py", "inspection.py", "results.py"}
"""What runs in the worker's process alone."""


def test_only_the_worker_imports_the_engine() -> None:
    assert importers_of("models.engine") == {"worker.py"}
    assert importers_of("models.diffusion.pipeline") <= WORKER
    assert importers_of("server.worker.checkpoints", "server.worker.results") == {"worker.py"}
    assert importers_of("server.worker.inspection") == {"results.py", "worker.py"}


def test_only_the_worker_imports_torch() -> None:
    assert importers_of(*HEAVY - {"ray"}) <= WORKER


def test_only_the_cluster_imports_ray() -> None:
    assert importers_of("ray") <= {"cluster.py"}


def test_commands_import_what_they_need_themselves() -> None:
    at_top = {
        each.module for each in imports_of(REPOSITORY / "server/cli/main.py") if each.is_at_top
    }

    assert {module for module in at_top if module.startswith(("models", "server"))} == {
        "server.core.settings",
        "server.core.settings_errors",
        "server.core.terminal",
    }


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_free_modules_do_not_name_torch(name: str) -> None:
    path = REPOSITORY / "models" / f"{name}.py"
    under_type_checking = {"torch"} if name == "registry" else set()
    at_top = {each.module for each in imports_of(path) if each.is_at_top}

    assert not top_level_names(at_top) & HEAVY - under_type_checking


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules a statement adds to a fresh interpreter."""
    program = f"""
import sys
before = set(sys.modules)
{statement}
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(answer.stdout.split())


def test_importing_the_packages_costs_nothing() -> None:
    assert loaded_by("import models, server") == {"models", "server"}


def test_web_side_starts_without_torch() -> None:
    loaded = loaded_by("import server.api.app")

    assert "fastapi" in loaded
    assert not loaded & HEAVY


def test_command_line_starts_without_web_or_torch() -> None:
    assert not loaded_by("import server.cli.main") & {"fastapi", "sqlalchemy", *HEAVY}


def test_torch_free_modules_load_no_torch() -> None:
    loaded = loaded_by("import " + ", ".join(f"models.{name}" for name in TORCH_FREE))

    assert not loaded & {*HEAVY, *WEB_AND_DATABASE}
