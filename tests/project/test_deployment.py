"""The systemd units and Kubernetes manifests in `configs/`: their shape, and what they tell us.

The schema of `tests/corpora` is Kubernetes' own (Apache-2.0), of the four kinds used here and
without its descriptions. KEDA's kind has none there.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml
from sqlalchemy import Engine, text

from server.cli.config import names_of
from server.cli.main import make_parser
from server.core.settings import ENV_PREFIX, Settings
from server.serving.supervisor import GRACE_S
from server.storage.database import open_engine
from tests.support.documents import blocks_of
from tests.support.jobs import new_job
from tests.support.programs import program
from tests.support.repository import REPOSITORY

DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
UNITS = sorted((REPOSITORY / "configs" / "systemd").glob("*.service"))
MANIFESTS = sorted((REPOSITORY / "configs" / "kubernetes").glob("*.yaml"))
SCHEMA = json.loads((REPOSITORY / "tests" / "corpora" / "kubernetes-1.37.json").read_text())
KINDS = {name.rpartition(".")[2]: name for name in SCHEMA["$defs"]}
COMMAND = "/opt/inpaint-server/.venv/bin/inpaint-server"

RAY_SERVICE = REPOSITORY / "configs" / "ray" / "rayservice.yaml"
GROUP = {
    "type": "object",
    "properties": {
        "groupName": {"type": "string"},
        "rayStartParams": {"type": "object", "additionalProperties": {"type": "string"}},
        "template": {"$ref": "#/$defs/io.k8s.api.core.v1.PodTemplateSpec"},
        **{name: {"type": "integer"} for name in ("replicas", "minReplicas", "maxReplicas")},
    },
    "required": ["rayStartParams", "template"],
    "additionalProperties": False,
}
RAY_CLUSTER = {
    "type": "object",
    "properties": {
        "rayVersion": {"type": "string"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {
            "type": "object",
            "properties": {
                "upscalingMode": {"enum": ["Default", "Aggressive", "Conservative"]},
                "idleTimeoutSeconds": {"type": "integer"},
            },
            "additionalProperties": False,
        },
        "authOptions": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["disabled", "token"]},
                "secretName": {"type": "string"},
            },
            "additionalProperties": False,
        },
        "gcsFaultToleranceOptions": {
            "type": "object",
            "properties": {
                "redisAddress": {"type": "string"},
                "redisPassword": {
                    "type": "object",
                    "properties": {
                        "valueFrom": {"$ref": "#/$defs/io.k8s.api.core.v1.EnvVarSource"}
                    },
                    "additionalProperties": False,
                },
            },
            "required": ["redisAddress"],
            "additionalProperties": False,
        },
        "headGroupSpec": GROUP,
        "workerGroupSpecs": {"type": "array", "items": GROUP},
    },
    "required": ["headGroupSpec"],
    "additionalProperties": False,
}
RAY_SERVICE_SCHEMA = {
    "$defs": SCHEMA["$defs"],
    "type": "object",
    "properties": {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "properties": {"serveConfigV2": {"type": "string"}, "rayClusterConfig": RAY_CLUSTER},
            "required": ["rayClusterConfig"],
            "additionalProperties": False,
        },
    },
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
}
"""The fields of KubeRay's kind that are used here. Its pods are Kubernetes' own."""


def documents() -> list[dict[str, Any]]:
    return [each for path in MANIFESTS for each in yaml.safe_load_all(path.read_text()) if each]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [each for each in documents() if each["kind"] == kind]


@pytest.mark.parametrize("path", [*UNITS, *MANIFESTS], ids=lambda path: path.name)
def test_every_variable_is_a_setting(path: Path) -> None:
    found = {*re.findall(r"INPAINT_[A-Z0-9_]*[A-Z0-9]", path.read_text())}
    assert found <= {ENV_PREFIX + "__".join(names).upper() for names in names_of(Settings)}


@pytest.mark.parametrize("document", documents(), ids=lambda each: each["metadata"]["name"])
def test_manifests_have_the_shape_of_their_kind(document: dict[str, Any]) -> None:
    if document["kind"] == "ScaledObject":
        assert document["apiVersion"] == "keda.sh/v1alpha1"
        return
    assert errors_of(document, {**SCHEMA, "$ref": f"#/$defs/{KINDS[document['kind']]}"}) == []


def errors_of(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    return [
        f"{'/'.join(map(str, error.instance_path))}: {error.message}"
        for error in jsonschema_rs.validator_for(schema).iter_errors(document)
    ]


def test_ray_service_has_the_shape_of_its_kind() -> None:
    document = yaml.safe_load(RAY_SERVICE.read_text())
    assert errors_of(document, RAY_SERVICE_SCHEMA) == []
    cluster = document["spec"]["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    for container in (head, worker):
        # An image that the Dockerfile makes; probes of our own, as KubeRay's call wget.
        name, _, target = container["image"].partition(":")
        assert (name, f" AS {target}\n" in DOCKERFILE) == ("inpaint-server", True)
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > GRACE_S
    (application,) = yaml.safe_load(document["spec"]["serveConfigV2"])["applications"]
    limits = group["minReplicas"], group["maxReplicas"]
    assert limits == (application["args"]["min_workers"], application["args"]["max_workers"])


def test_ray_service_schema_refuses_what_is_misspelt() -> None:
    document = yaml.safe_load(RAY_SERVICE.read_text())
    document["spec"]["rayClusterConfig"]["enableInTreeAutoscaler"] = True
    (error,) = errors_of(document, RAY_SERVICE_SCHEMA)
    assert "enableInTreeAutoscaler" in error


def test_schema_refuses_what_is_misspelt() -> None:
    (document, *_) = of_kind("Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}
    schema = {**SCHEMA, "$ref": f"#/$defs/{KINDS['Deployment']}"}
    assert not jsonschema_rs.validator_for(schema).is_valid(document)


def test_selectors_find_the_pods_they_are_meant_for() -> None:
    labels = {
        each["metadata"]["name"]: each["spec"]["template"]["metadata"]["labels"]
        for each in of_kind("Deployment")
    }
    assert {*labels} == {"inpaint-api", "inpaint-worker"}
    for budget in of_kind("PodDisruptionBudget"):
        assert budget["spec"]["selector"]["matchLabels"] == labels[budget["metadata"]["name"]]
    (service,) = of_kind("Service")
    assert service["spec"]["selector"] == labels["inpaint-api"]
    (scaled,) = of_kind("ScaledObject")
    assert scaled["spec"]["scaleTargetRef"]["name"] in labels


@pytest.mark.parametrize("name", ["inpaint-api", "inpaint-worker"])
def test_pods_are_given_what_they_name(name: str) -> None:
    (deployment,) = [each for each in of_kind("Deployment") if each["metadata"]["name"] == name]
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert {*mounts} == {each["name"] for each in pod["volumes"]}
    (settings,) = of_kind("ConfigMap")
    values = {**settings["data"], **{e["name"]: e.get("value", "") for e in container["env"]}}
    files = [value for variable, value in values.items() if variable.endswith("_FILE")]
    assert all(any(file.startswith(f"{at}/") for at in mounts.values()) for file in files)
    assert all(isinstance(value, str) for value in values.values())
    assert pod["terminationGracePeriodSeconds"] > GRACE_S
    words = [word.replace("$(POD_NAME)", "pod") for word in container["command"]]
    assert words[0] == "inpaint-server"
    make_parser().parse_args(words[1:])


def test_probes_ask_what_restarts_and_routes_need() -> None:
    (api,) = [each for each in of_kind("Deployment") if each["metadata"]["name"] == "inpaint-api"]
    (container,) = api["spec"]["template"]["spec"]["containers"]
    paths = {each: container[each]["httpGet"]["path"] for each in container if "Probe" in each}
    assert paths == {
        "startupProbe": "/healthz",
        "livenessProbe": "/healthz",
        "readinessProbe": "/readyz",
    }


def test_worker_that_hangs_is_started_again() -> None:
    (worker,) = [e for e in of_kind("Deployment") if e["metadata"]["name"] == "inpaint-worker"]
    (container,) = worker["spec"]["template"]["spec"]["containers"]
    shell, flag, command = container["livenessProbe"]["exec"]["command"]
    exec_, program, *words = shlex.split(command)
    assert (shell, flag, exec_, program) == ("sh", "-c", "exec", "inpaint-server")
    assert make_parser().parse_args(words).worker_id == "$POD_NAME"
    assert "$(POD_NAME)" in container["command"]
    assert "POD_NAME" in {each["name"] for each in container["env"]}


@pytest.mark.postgres
def test_scaler_counts_running_jobs_too(engine: Engine) -> None:
    from server.jobs.store import JobStore

    (scaled,) = of_kind("ScaledObject")
    (trigger,) = scaled["spec"]["triggers"]
    store = JobStore(engine)
    for number in range(3):
        store.submit(new_job(file_prefix=f"{number:036}"))
    assert len(store.claim("worker", 1)) == 1
    with engine.connect() as connection:
        assert connection.execute(text(trigger["metadata"]["query"])).scalar_one() == 3


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_start_a_command_of_ours_and_wait_for_its_end(unit: Path) -> None:
    (command,) = re.findall(r"^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    program, *words = command.replace("%i", "0").replace("%H", "box").split()
    assert program == COMMAND
    make_parser().parse_args(words)
    (stop_s,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit.read_text(), re.MULTILINE)
    assert int(stop_s) > GRACE_S


@pytest.mark.process
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_reads_the_units(unit: Path, tmp_path: Path) -> None:
    analyze = program("systemd-analyze")
    copy = tmp_path / unit.name.replace("@", "@0")
    copy.write_text(unit.read_text().replace(COMMAND, "/bin/true"))
    done = subprocess.run(
        [analyze, "verify", str(copy)], capture_output=True, text=True, timeout=60
    )
    told = [line for line in done.stderr.splitlines() if unit.stem.rstrip("@") in line]
    assert (done.returncode, told) == (0, [])


@pytest.mark.process
def test_key_of_the_recipe_is_in_the_shared_database(tmp_path: Path) -> None:
    """`docs/scaling.md` makes it where the variables are those of a file for systemd."""
    environment, shared = tmp_path / "environment", f"sqlite:///{tmp_path}/shared.db"
    environment.write_text(f"INPAINT_DATABASE_URL={shared}\n")
    (block,) = [block for block in blocks_of("docs/scaling.md") if "keys create" in block.text]
    command = block.text.replace("/etc/inpaint-server/environment", str(environment))
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    subprocess.run(
        ["sh", "-euc", command], cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)}, check=True
    )
    engine = open_engine(shared)
    with engine.begin() as connection:
        assert connection.execute(text("SELECT name FROM api_keys")).scalars().all() == ["the team"]
    engine.dispose()
