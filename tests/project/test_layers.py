"""Who may import whom, held against the source; and what importing costs.

The tables are the layout of `models/` and `server/`: wings, and the wings below that each may use.
Arrows point down only, `models` knows nothing of networks or databases, and the web side starts
without torch.
"""

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.imports import loaded_by, modules_loaded_by
from tests.support.repository import REPOSITORY

WINGS = {
    "server": {
        "cli": "serving worker api webhooks egress jobs storage core",
        "serving": "api egress jobs storage core",
        "api": "webhooks egress jobs sandbox storage core",
        "webhooks": "egress jobs storage core",
        "worker": "jobs sandbox storage core",
        "egress": "jobs core",
        "jobs": "storage core",
        "storage": "core",
        "sandbox": "core",
        "core": "",
    },
    "models": {
        "engine": "batching executors model_pool variants diffusion acceleration params errors",
        "batching": "variants diffusion",
        "model_pool": "variants diffusion checkpoints errors",
        "executors": "",
        "builtin": "diffusion",
        "diffusion": "acceleration checkpoints imaging params errors",
        "acceleration": "",
        "checkpoints": "params errors spelling",
        "imaging": "params errors",
        "variants": "params",
        "params": "errors",
        "spelling": "",
        "errors": "",
    },
}
"""Wing to the wings it may import, from the top down."""

MAX_LEVELS = 8
MAX_FILES = 13
"""Of one folder: more do not fit a head."""

WEB_AND_DATABASE = {
    *("alembic", "fastapi", "httpcore2", "httpx", "httpx2", "obstore", "psycopg", "pydantic"),
    *("pydantic_settings", "pysqlite3", "ray", "sqlalchemy", "starlette", "uvicorn"),
}
HEAVY = {"accelerate", "diffusers", "ray", "safetensors", "torch", "transformers"}
TORCH_FREE = (
    "params variants errors imaging.decoding imaging.images imaging.masks imaging.canvas "
    "imaging.captions imaging.extension imaging.filling imaging.hiding imaging.mask_check "
    "diffusion.prompt_syntax checkpoints.catalog checkpoints.hub "
    "checkpoints.local checkpoints.registry checkpoints.files.fingerprint".split()
)


@dataclass(frozen=True)
class Import:
    """One imported module, such as `server.jobs.job`, and whether it is loaded with the file."""

    module: str
    is_at_top: bool


def is_module(name: str) -> bool:
    path = REPOSITORY / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


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
            # `from server.api import probes` imports a room, `from server.api.accept import accept`
            # a name.
            below = [f"{module}.{alias.name}" for alias in node.names]
            names = [each if is_module(each) else module for each in below]
        else:
            continue
        found += [Import(name, node not in inner) for name in names]
    return found


def files_of(package: str) -> list[Path]:
    return sorted((REPOSITORY / package).rglob("*.py"))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


def modules_imported_by(path: Path) -> set[str]:
    return {each.module for each in imports_of(path)}


def top_level_names(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def source_files() -> Iterator[object]:
    for package in WINGS:
        for path in files_of(package):
            if path.name != "__init__.py":
                yield pytest.param(package, path, id=str(path.relative_to(REPOSITORY)))


@pytest.mark.parametrize(("package", "path"), [*source_files()])
def test_file_imports_only_what_its_wing_may(package: str, path: Path) -> None:
    wing = module_of(path).split(".")[1]
    assert wing in WINGS[package], "a new wing: say in the table what it may import"
    wings = {
        module.split(".")[1]
        for module in modules_imported_by(path)
        if module.startswith(f"{package}.")
    }
    assert wings <= {wing, *WINGS[package][wing].split()}


@pytest.mark.parametrize("package", WINGS)
def test_arrows_point_down_through_few_levels(package: str) -> None:
    @functools.cache
    def level(wing: str) -> int:
        return 1 + max(map(level, WINGS[package][wing].split()), default=0)

    order = [*WINGS[package]]
    for wing, below in WINGS[package].items():
        assert all(order.index(each) > order.index(wing) for each in below.split()), "an arrow up"
    assert max(map(level, order)) <= MAX_LEVELS


@pytest.mark.parametrize("package", WINGS)
def test_rooms_do_not_import_each_other_in_a_circle(package: str) -> None:
    rooms = {module_of(path): path for path in files_of(package)}
    waiting = {name: modules_imported_by(path) & rooms.keys() for name, path in rooms.items()}
    while waiting:
        free = {room for room, needs in waiting.items() if not needs & waiting.keys()}
        assert free, f"a cycle among {sorted(waiting)}"
        waiting = {room: needs for room, needs in waiting.items() if room not in free}


@pytest.mark.parametrize("package", WINGS)
def test_folders_fit_a_head(package: str) -> None:
    folders = {path.parent for path in files_of(package)}
    counts = {str(folder): len([*folder.glob("*.py")]) for folder in folders}
    migrations = {name for name in counts if name.endswith("versions")}
    assert {name: n for name, n in counts.items() if n > MAX_FILES and name not in migrations} == {}


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


READS_URLS = {"egress/policy.py", "egress/downloads.py"}
OPENS_CONNECTIONS = {"egress/client.py", "egress/resolver.py"}
# The demo is a client of a server of its own, the health check of this machine's.
CLIENTS = {"cli/demo.py", "cli/health.py"}
LISTENS = {"serving/protocol.py", "serving/server.py", "serving/tls.py"}
# The type of a listening socket, and the machine's name.
NAMES_SOCKETS = {"cli/serve.py", "serving/supervisor.py"}
# What is this machine's own, asked of its kernel.
ASKS_THE_KERNEL = {"egress/interfaces.py"}
NETWORK_MODULES = (
    *("aiohttp", "ftplib", "h11", "http.client", "httpcore", "httpcore2", "httptools", "httpx"),
    *("httpx2", "requests", "smtplib", "socket", "ssl", "telnetlib", "urllib.request"),
    *("urllib3", "xmlrpc.client"),
)


def test_only_the_egress_client_opens_connections() -> None:
    """SSRF is stopped in one place: fetches, webhooks and shadow mode all go through it."""
    outwards = READS_URLS | OPENS_CONNECTIONS | CLIENTS
    assert importers_of(*NETWORK_MODULES) <= outwards | LISTENS | NAMES_SOCKETS | ASKS_THE_KERNEL
    assert importers_of("httpx2") <= READS_URLS | {"cli/demo.py", "egress/client.py"}
    assert importers_of("httpcore2") == {"egress/client.py"}
    users = {"api/app.py", "cli/webhooks.py", "egress/downloads.py", "webhooks/sender.py"}
    users |= {"api/shadow.py"}
    # It tells which addresses are refused, and connects to none.
    users |= {"serving/diagnosis/egress.py"}
    assert importers_of("server.egress.client") == users


CONNECTING = {
    *("create_connection", "create_datagram_endpoint", "create_unix_connection"),
    *("open_connection", "open_unix_connection", "sock_connect", "connect_tcp", "connect_unix"),
}


def test_only_the_egress_client_calls_what_connects() -> None:
    callers = {
        path.relative_to(REPOSITORY / "server").as_posix()
        for path in files_of("server")
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id) in CONNECTING
    }
    assert callers == {"egress/client.py"}


@pytest.mark.parametrize("name", sorted(READS_URLS))
def test_httpx2_is_named_for_its_urls_alone(name: str) -> None:
    named = {
        node.attr
        for node in ast.walk(ast.parse((REPOSITORY / "server" / name).read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "httpx2"
    }
    assert named <= {"URL", "InvalidURL"}


def in_wing(wing: str) -> set[str]:
    return {f"{wing}/{path.name}" for path in (REPOSITORY / "server" / wing).glob("*.py")}


def test_only_the_worker_imports_the_engine_and_torch() -> None:
    users = {"worker/figures.py", "worker/loop.py", "worker/trial.py"}
    assert importers_of("models.engine") == users
    assert importers_of("models.diffusion.pipeline") <= in_wing("worker")
    assert importers_of(*HEAVY - {"ray"}) <= in_wing("worker")


def test_the_sandboxed_program_is_imported_by_its_process_alone() -> None:
    """The API process starts it by a text, `process.PROGRAM`."""
    assert importers_of("server.sandbox.child") == set()
    assert importers_of("server.sandbox.seccomp") == {"sandbox/child.py"}


DIALECTS = sorted(
    path.name
    for path in (REPOSITORY / "server" / "api" / "dialects").iterdir()
    if (path / "__init__.py").is_file()
)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_room_knows_a_dialect_but_the_registry(dialect: str) -> None:
    importers = importers_of(f"server.api.dialects.{dialect}")
    own = {name for name in importers if name.startswith(f"api/dialects/{dialect}/")}
    assert importers - own == {"api/dialects/registry.py"}


def test_only_the_cluster_imports_ray() -> None:
    assert importers_of("ray") <= {"serving/cluster.py"}


def test_commands_import_what_they_need_themselves() -> None:
    for name in ("main", "options", "serve", "webhooks"):
        path = REPOSITORY / "server" / "cli" / f"{name}.py"
        at_top = {each.module for each in imports_of(path) if each.is_at_top}
        ours = {module for module in at_top if module.startswith(("models", "server"))}
        allowed = ("server.cli.", "server.core.settings", "server.core.terminal")
        assert [module for module in ours if not module.startswith(allowed)] == []


@pytest.mark.parametrize("name", TORCH_FREE)
def test_torch_free_modules_do_not_name_torch(name: str) -> None:
    path = REPOSITORY / "models" / f"{name.replace('.', '/')}.py"
    under_type_checking = {"torch"} if name == "checkpoints.registry" else set()
    at_top = {each.module for each in imports_of(path) if each.is_at_top}

    assert not top_level_names(at_top) & HEAVY - under_type_checking


def test_tests_share_helpers_by_support_alone() -> None:
    """No test module imports from another."""
    guilty = {
        str(path.relative_to(REPOSITORY))
        for path in files_of("tests")
        for module in modules_imported_by(path)
        if module.startswith("tests.") and module.split(".")[-1].startswith("test_")
    }
    assert guilty == set()


@pytest.mark.process
def test_importing_the_packages_costs_nothing() -> None:
    assert loaded_by("import models, server") == {"models", "server"}


@pytest.mark.process
def test_web_side_starts_without_torch() -> None:
    loaded = loaded_by("import server.api.app")

    assert "fastapi" in loaded
    assert not loaded & HEAVY


@pytest.mark.process
def test_web_side_starts_without_the_program_that_decodes() -> None:
    """It preloads Pillow's plugins and knows the seccomp filter, which are a child's alone."""
    loaded = modules_loaded_by("import server.api.app")

    assert "server.sandbox.wire" in loaded
    assert not loaded & {"server.sandbox.child", "server.sandbox.seccomp"}


@pytest.mark.process
def test_command_line_starts_without_web_or_torch() -> None:
    assert not loaded_by("import server.cli.main") & {"fastapi", "sqlalchemy", *HEAVY}


@pytest.mark.process
def test_torch_free_modules_load_no_torch() -> None:
    loaded = loaded_by("import " + ", ".join(f"models.{name}" for name in TORCH_FREE))

    assert not loaded & {*HEAVY, *WEB_AND_DATABASE}


@pytest.mark.parametrize(
    "page", sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]), ids=str
)
def test_documents_name_tests_that_exist(page: Path) -> None:
    named = {*re.findall(r"[a-z0-9_/]*test_[a-z0-9_]+\.py", page.read_text())}
    paths = [f"/{path.relative_to(REPOSITORY).as_posix()}" for path in files_of("tests")]
    missing = {name for name in named if not any(path.endswith(f"/{name}") for path in paths)}
    assert missing == set()
