"""Who may import whom, held against the source; and what importing costs.

The two tables are the layout of `models/` and `server/`: imports point one way, `models` knows
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

REPOSITORY = Path(__file__).parents[1]

MODELS = {
    "errors": "",
    "params": "errors",
    "images": "errors",
    "masks": "images",
    "canvas": "images masks params",
    "enhance": "",
    "weights": "errors",
    "families": "errors",
    "parts": "",
    "folders": "errors parts weights",
    "single_file": "errors families folders parts weights",
    "ldm_names": "",
    "lora": "errors ldm_names weights",
    "prompts": "errors",
    "vae": "errors",
    "conditioning": "errors params prompts registry",
    "schedulers": "errors params",
    "registry": "errors folders lora parts single_file",
    "safety": "images",
    "pipeline": "canvas conditioning errors params schedulers registry safety vae",
    "batching": "pipeline",
    "engine": "batching errors params pipeline",
    "builtin": "builtin",
}
"""Room to the rooms of `models` it may import; each file and each folder is a room."""

SERVER = {
    "settings": "models.enhance",
    "errors": "",
    "telemetry": "",
    "limits": "",
    "keys": "database",
    "key_commands": "database keys settings",
    "auth": "errors keys limits settings",
    "database": "settings",
    "migrations": "database",
    "storage": "errors",
    "egress": "errors settings",
    "downloads": "egress errors",
    "sandbox": "errors models.errors models.images models.params",
    "deliveries": "database",
    "jobs": "database deliveries errors models.params",
    "waiters": "jobs telemetry",
    "bodies": "errors",
    "dialects": "downloads errors jobs settings models.enhance models.errors models.params",
    "services": "auth egress errors jobs metrics settings storage waiters",
    "routes": "auth bodies dialects downloads errors jobs sandbox services settings"
    " models.enhance models.errors models.images models.params",
    "webhooks": "deliveries dialects egress jobs settings telemetry",
    "worker": "database errors jobs sandbox settings storage telemetry"
    " models.engine models.errors models.images models.params models.pipeline models.registry",
    "supervisor": "jobs telemetry",
    "app": "auth database deliveries dialects egress errors jobs keys metrics middleware routes"
    " services settings storage telemetry waiters webhooks",
    "metrics": "database jobs",
    "middleware": "errors metrics telemetry",
    "admin": "connections metrics routes services",
    "connections": "auth settings",
    "http": "admin connections settings",
    "cluster": "app worker settings",
    "demo": "database jobs settings",
    "cli": "app auth cluster database demo http jobs key_commands keys settings supervisor"
    " telemetry worker models.errors models.registry",
}
"""Room to the rooms of `server`, and where it says so of `models`, it may import."""

WEB_AND_DATABASE = {
    "alembic",
    "fastapi",
    "httpcore",
    "httpx",
    "obstore",
    "pydantic",
    "pydantic_settings",
    "pysqlite3",
    "ray",
    "sqlalchemy",
    "starlette",
    "uvicorn",
}
HEAVY = {"accelerate", "diffusers", "ray", "safetensors", "torch", "transformers"}
TORCH_FREE = ("params", "images", "masks", "canvas", "errors", "enhance", "registry")


@dataclass(frozen=True)
class Import:
    """One imported module, such as `server.jobs`, and whether it is loaded with the file."""

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
            # `from server import worker` imports a module, `from server.jobs import Job` does not.
            is_package = module in ("models", "server")
            names = [f"{module}.{alias.name}" if is_package else module for alias in node.names]
        else:
            continue
        found += [Import(name, node not in inner) for name in names]
    return found


def files_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def room_of(path: Path) -> str:
    """`server/jobs.py` is in room jobs, `server/dialects/v3.py` in dialects."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return parts[1]


def modules_imported_by(path: Path) -> set[str]:
    return {each.module for each in imports_of(path)}


def rooms_imported_by(path: Path) -> set[str]:
    """Our own rooms: `models.images`, `server.jobs`."""
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
    """The tables themselves have no cycle."""
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


def test_only_egress_and_the_demo_open_connections() -> None:
    assert importers_of("httpx", "httpcore", "requests", "urllib.request", "aiohttp") <= {
        "egress.py",
        "demo.py",
    }


def test_only_the_worker_imports_the_engine() -> None:
    assert importers_of("models.engine", "models.pipeline") == {"worker.py"}


def test_only_the_worker_imports_torch() -> None:
    assert importers_of(*HEAVY - {"ray"}) <= {"worker.py"}


def test_only_the_cluster_imports_ray() -> None:
    assert importers_of("ray") <= {"cluster.py"}


def test_commands_import_what_they_need_themselves() -> None:
    at_top = {each.module for each in imports_of(REPOSITORY / "server/cli.py") if each.is_at_top}

    assert {module for module in at_top if module.startswith(("models", "server"))} == {
        "server.settings"
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
    loaded = loaded_by("import server.app")

    assert "fastapi" in loaded
    assert not loaded & HEAVY


def test_command_line_starts_without_web_or_torch() -> None:
    assert not loaded_by("import server.cli") & {"fastapi", "sqlalchemy", *HEAVY}


def test_torch_free_modules_load_no_torch() -> None:
    loaded = loaded_by("import " + ", ".join(f"models.{name}" for name in TORCH_FREE))

    assert not loaded & {*HEAVY, *WEB_AND_DATABASE}
