"""What `compose.yaml` and the image set is what the server needs, tried with a real one.

The schema of `tests/corpora` is Compose's own (Apache-2.0), without its descriptions.
"""

import json
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import jsonschema_rs
import pytest
import yaml

from server.cli.config import names_of
from server.core.settings import ENV_PREFIX, Settings
from tests.support.postgres import find_binaries, running_postgres
from tests.support.processes import COMMAND, ServerProcess
from tests.support.programs import lacking
from tests.support.repository import REPOSITORY
from tests.support.s3 import locate_rclone
from tests.support.v3_calls import submit
from tests.support.waiting import until

pytestmark = pytest.mark.process

KEY = "a-key-of-the-team"
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ("inpaint", "inpaint-cpu", "takeover")
"""The services that are this server; the first two in the profiles of the same order."""
SCHEMA = json.loads((REPOSITORY / "tests" / "corpora" / "compose-spec.json").read_text())
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")
IMAGE_CHECK = (REPOSITORY / ".ci" / "image").read_text()
PAGE = (REPOSITORY / "docs" / "docker.md").read_text()
SECRETS = "/run/secrets"


def environment(service: str, secrets: dict[str, Path]) -> dict[str, str]:
    """Of a service, as compose gives it where nothing is set; secrets lie elsewhere here."""
    files = {f"{SECRETS}/{name}": str(secrets[name]) for name in secrets}
    plain = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
        for name, value in SERVICES[service]["environment"].items()
    }
    return {name: files.get(value, value) for name, value in plain.items()}


def documented(prefix: str) -> dict[str, str]:
    """The lines for `.env` that docs/docker.md gives."""
    return dict(re.findall(rf"^({prefix}\w+)=(.*)$", PAGE, re.MULTILINE))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0


def accept_a_job(data_dir: Path, variables: dict[str, str]) -> None:
    """A server with these variables, which stores a job and its input."""
    server = ServerProcess(data_dir, {**variables, "INPAINT_HOLD_S": "0"}, "--workers", "0")
    try:
        submit(server.client)
    finally:
        server.stop()
        server.client.close()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of `make-secrets`, by name."""
    if os.geteuid() != 0:
        lacking("the root user")
    folder = tmp_path_factory.mktemp("compose") / "secrets"
    subprocess.run([REPOSITORY / "configs/docker/make-secrets", folder], check=True, timeout=60)
    return {file.name: file for file in folder.iterdir()}


# --- its shape ---


def problems(document: dict[str, Any]) -> list[str]:
    validator = jsonschema_rs.validator_for(SCHEMA)
    return [
        f"{'/'.join(map(str, error.instance_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]


def test_compose_has_the_shape_that_compose_reads() -> None:
    assert problems(COMPOSE) == []
    misspelt = {**COMPOSE, "services": {"inpaint": {**SERVICES["inpaint"], "volums": []}}}
    assert problems(misspelt)


def test_profiles_are_those_of_the_page() -> None:
    found = {each for service in SERVICES.values() for each in service["profiles"]}
    assert found == {*re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)}
    assert found == {"cpu", "gpu", "postgres", "s3", "observability", "takeover"}


def test_every_variable_is_a_setting() -> None:
    named = {name for each in SERVERS for name in environment(each, {})} | {*documented("INPAINT_")}
    assert named <= {ENV_PREFIX + "__".join(names).upper() for names in names_of(Settings)}


def test_what_a_service_names_is_there() -> None:
    targets = {*re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)}
    for service in SERVICES.values():
        assert {*service.get("secrets", [])} <= COMPOSE["secrets"].keys()
        volumes = {
            source for source, *_ in (each.split(":") for each in service.get("volumes", []))
        }
        assert {each for each in volumes if not each.startswith("./")} <= COMPOSE["volumes"].keys()
        assert service.get("build", {"target": "cpu"})["target"] in targets


def test_every_service_rotates_its_log_and_gains_no_privileges() -> None:
    for service in SERVICES.values():
        assert {"max-size", "max-file"} <= service["logging"]["options"].keys()
        assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("name", SERVERS)
def test_image_is_tried_as_the_service_is_started(name: str) -> None:
    service = SERVICES[name]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
    (tmp,) = service["tmpfs"]
    kept = f"--pids-limit {service['pids_limit']} --tmpfs {tmp} "
    words = f"--read-only --cap-drop ALL --security-opt no-new-privileges {kept}"
    assert words in re.sub(r"\s*\\\n\s*", " ", IMAGE_CHECK)


def test_only_the_server_and_the_names_are_published_beyond_this_machine() -> None:
    ports = [each for service in SERVICES.values() for each in service.get("ports", [])]
    open_ports = {each for each in ports if not each.startswith(("127.0.0.1:", "${TAKEOVER"))}
    assert open_ports == {"8000:8000", "443:8443"}


# --- secrets ---


def test_each_secret_is_made_for_the_user_that_reads_it(secrets: dict[str, Path]) -> None:
    files = {name: Path(each["file"]).name for name, each in COMPOSE["secrets"].items()}
    assert files == {name: name for name in secrets}
    owners = {name: file.stat().st_uid for name, file in secrets.items()}
    assert {owners[name] for name in SERVICES["inpaint"]["secrets"]} == {10001}
    assert {file.stat().st_mode & 0o777 for file in secrets.values()} == {0o600}
    assert "/secrets/" in (REPOSITORY / ".gitignore").read_text().splitlines()
    for service in SERVERS:
        assert not [name for name in environment(service, {}) if name.endswith("KEYS")]


def test_secrets_that_are_there_stay(secrets: dict[str, Path]) -> None:
    before = {name: file.read_text() for name, file in secrets.items()}
    assert len({*before.values()}) == len(before)
    folder = secrets["inpaint-keys"].parent
    subprocess.run([REPOSITORY / "configs/docker/make-secrets", folder], check=True, timeout=60)
    assert {name: file.read_text() for name, file in secrets.items()} == before


# --- the profiles, with real servers ---


def targets_of_prometheus() -> list[str]:
    jobs = yaml.safe_load((REPOSITORY / "configs/observability/prometheus.yml").read_text())
    configs = [each for job in jobs["scrape_configs"] for each in job["static_configs"]]
    return [target for config in configs for target in config["targets"]]


def test_figures_are_scraped_by_the_services_name(tmp_path: Path) -> None:
    keys_file = tmp_path / "inpaint-keys"
    keys_file.write_text(f"{KEY}\n")
    keys_file.chmod(0o600)
    variables = environment("inpaint", {"inpaint-keys": keys_file})
    assert environment("inpaint-cpu", {})["INPAINT_ADMIN__PORT"] == variables["INPAINT_ADMIN__PORT"]
    assert SERVICES["inpaint-cpu"]["networks"]["default"]["aliases"] == ["inpaint"]
    port = variables["INPAINT_ADMIN__PORT"]
    names = ("inpaint", "takeover")
    assert targets_of_prometheus() == [f"{name}:{port}" for name in names]
    takeover = environment("takeover", {})
    shared = [name for name in variables if name.startswith("INPAINT_ADMIN__")]
    assert [takeover[name] for name in shared] == [variables[name] for name in shared]
    server = ServerProcess(
        tmp_path / "data", {**variables, "INPAINT_ADMIN__PORT": "0"}, "--workers", "0"
    )
    try:
        (admin,) = server.events("admin listening")
        url = admin["url"].replace("0.0.0.0", "127.0.0.1")
        for name, status in ((names[0], 200), (names[1], 200), ("elsewhere", 421)):
            host = {"Host": f"{name}:{port}"}
            assert httpx2.get(f"{url}/metrics", headers=host).status_code == status
        assert server.client.get("/api/jobs").status_code == 401
        allowed = server.client.get("/api/jobs", headers={"X-API-Key": KEY})
        assert allowed.status_code == 200
    finally:
        server.stop()
        server.client.close()


def test_s3_profile_stores_files(tmp_path: Path, secrets: dict[str, Path]) -> None:
    """The service's own command, with this machine's rclone, port and paths."""
    rclone = locate_rclone()
    if rclone is None:
        lacking("rclone")
    port, file, bucket = free_port(), secrets["inpaint-bucket"], tmp_path / "bucket"
    (text,) = SERVICES["s3"]["command"]
    command = text.replace("$$", "$").replace("/data", str(bucket)).replace(":9000", f":{port}")
    words = [*SERVICES["s3"]["entrypoint"], command.replace(f"{SECRETS}/inpaint-bucket", str(file))]
    path = f"{rclone.parent}:{os.environ['PATH']}"
    with subprocess.Popen(words, env={**os.environ, "PATH": path}) as store:
        try:
            until(lambda: answers(port), 30, "the S3 server accepts connections")
            changes = {"ENDPOINT": f"http://127.0.0.1:{port}", "CREDENTIALS_FILE": str(file)}
            variables = documented("INPAINT_STORAGE__") | {
                f"INPAINT_STORAGE__{name}": value for name, value in changes.items()
            }
            accept_a_job(tmp_path / "data", variables)
        finally:
            store.terminate()
    assert [each for each in (bucket / "inpaint" / "files").rglob("*") if each.is_file()]


def test_postgres_profile_is_reached_by_its_password_file(
    tmp_path: Path, secrets: dict[str, Path]
) -> None:
    """With the profile's password and URL, on a socket in place of the name `postgres`."""
    binaries = find_binaries()
    if binaries is None:
        lacking("PostgreSQL")
    password = secrets["postgres-password"].read_text().strip()
    line = secrets["inpaint-database"].read_text()
    (url,) = documented("INPAINT_DATABASE_").values()
    with running_postgres(binaries, password=password) as postgres:
        name = postgres.create_database()
        folder = postgres.url(name).query["host"]
        file = tmp_path / "inpaint-database"
        file.touch(mode=0o600)
        file.write_text(line.replace("postgres:5432:inpaint:", f"{folder}:5432:{name}:"))
        url = url.replace("@postgres/inpaint?", f"@/{name}?host={folder}&")
        url = url.replace(f"{SECRETS}/inpaint-database", str(file))
        accept_a_job(tmp_path / "data", {"INPAINT_DATABASE_URL": url})
        file.write_text(file.read_text().replace(password, "another"))
        refused = subprocess.run(
            [*COMMAND, "migrate"],
            env={**os.environ, "INPAINT_DATABASE_URL": url},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert refused.returncode != 0
    assert "password authentication failed" in refused.stderr


def test_takeover_asks_for_the_workers_model() -> None:
    models = {each: environment(each, {})["INPAINT_MODEL"] for each in SERVERS}
    assert models["takeover"] == models["inpaint"]
    assert f"`INPAINT_MODEL={models['inpaint-cpu']}`" in PAGE


# --- the image ---


def test_image_asks_its_own_health_and_keeps_its_data_to_itself() -> None:
    (health,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert json.loads(health) == ["inpaint-server", "health"]
    (made,) = re.findall(r"install --directory (.*) /data", DOCKERFILE)
    assert "--mode 0700" in made


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_change_of_our_code_repeats_no_download(target: str) -> None:
    """Our code enters a target in one step, after torch's."""
    stage = re.split(r"^FROM ", DOCKERFILE.partition(f" AS {target}\n")[2], flags=re.MULTILINE)[0]
    steps = [line for line in stage.splitlines() if line.startswith(("RUN", "COPY"))]
    assert not [each for each in steps if re.search(r"COPY .*(models|server|pyproject)", each)]
    (ours,) = [at for at, each in enumerate(steps) if "--mount=type=bind,from=wheel" in each]
    (torch,) = [at for at, each in enumerate(steps) if each.startswith("RUN") and "/torch" in each]
    assert torch < ours == len(steps) - 1
