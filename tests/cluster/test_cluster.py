"""`inpaint-server cluster` and the demonstration, in `.venv/cluster`, which has Ray."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml

from server.core.settings.sections import ClusterSettings
from tests.support.databases import migrated_sqlite
from tests.support.programs import lacking
from tests.support.repository import REPOSITORY

CLUSTER = REPOSITORY / ".venv" / "cluster"
CONFIGS = REPOSITORY / "configs" / "ray"
MODULE = "server.cli.main"
DEMONSTRATION_S = 900
COMMAND_S = 120
POSTGRESQL, BUCKET = "postgresql://somebody@127.0.0.1:1/jobs", "s3://pictures"
PROTECTED = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
JOBS = 12

TRANSLATED = """
import json
from ray.serve.schema import ServeDeploySchema
from server.core.settings.sections import ClusterSettings
from server.serving.cluster import build
import sys, yaml

(application,) = ServeDeploySchema.model_validate(yaml.safe_load(sys.stdin)).applications
deployment = build(ClusterSettings(**application.args))._bound_deployment
scaling = deployment._deployment_config.autoscaling_config
print(json.dumps({
    "path": application.import_path,
    "limits": [scaling.min_replicas, scaling.max_replicas, scaling.downscale_delay_s],
    "policy": scaling.policy.policy_kwargs,
    "resources": deployment.ray_actor_options,
    "device": deployment.init_args[-1],
}))
"""


THREADS = """
from server.serving.cluster import drop_thread_limit

for node in ({}, {"OMP_NUM_THREADS": "1"}):
    environment = {"OMP_NUM_THREADS": "1", "HOME": "/"}
    drop_thread_limit(environment, node)
    print(*sorted(environment))
"""

HEALTH = """
import asyncio, sys
from server.serving.cluster import Worker
from tests.support.waiting import until

def health():
    try:
        worker.check_health()
    except RuntimeError as error:
        return str(error)

worker = Worker(sys.argv[1], "cuda:99")
print(health())
until(health, 60, "the replica is broken")
print(health())
asyncio.run(worker.__del__())
print(health())
"""


def run(
    *words: str,
    environment: Mapping[str, str] = MappingProxyType({}),
    told: str = "",
    timeout_s: float = COMMAND_S,
) -> "subprocess.CompletedProcess[str]":
    """Run Python in `.venv/cluster`. told: its standard input."""
    if not (CLUSTER / "installed").exists():
        lacking("make cluster")
    return subprocess.run(
        [CLUSTER / "bin" / "python", *words],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        input=told,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.mark.slow
def test_no_fault_loses_a_job() -> None:
    finished = run("-m", "tests.cluster", "--jobs", str(JOBS), "--json", timeout_s=DEMONSTRATION_S)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert (found["jobs"], found["finished"], found["webhooks"]) == (JOBS, JOBS, JOBS)
    assert (found["scaling"]["again"], found["scaling"]["ready"]) == (0, [200, 200])
    assert found["status"] == {
        "deployment": "HEALTHY",
        "nodes": 3,
        "states": ["ready", "ready"],
        "in the table": 2,
    }
    assert found["thread limits"] == [None, None]
    assert found["answered differently"] == 0
    assert found["connections beyond loopback"] == []
    assert found["listeners beyond loopback"] == ["Ray"]
    assert len(found["faults"]) == 5


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({}, "set INPAINT_DATABASE_URL"),
        ({"INPAINT_DATABASE_URL": POSTGRESQL}, "set INPAINT_STORAGE__URL=s3://"),
        (
            {"INPAINT_DATABASE_URL": POSTGRESQL, "INPAINT_STORAGE__URL": BUCKET},
            "set RAY_AUTH_MODE=token",
        ),
        (
            {"INPAINT_DATABASE_URL": POSTGRESQL, "INPAINT_STORAGE__URL": BUCKET, **PROTECTED},
            "database jobs at 127.0.0.1:1 cannot be used",
        ),
    ],
)
def test_unsafe_clusters_are_refused(
    environment: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    words = ("-P", "-m", MODULE, "cluster", "up", "--data-dir", str(tmp_path))
    refused = run(*words, environment=environment)
    assert refused.returncode == 2
    assert sentence in refused.stderr


def test_command_without_a_cluster_says_so(tmp_path: Path) -> None:
    environment = {
        "INPAINT_DATABASE_URL": POSTGRESQL,
        "INPAINT_STORAGE__URL": BUCKET,
        **PROTECTED,
        "RAY_TMPDIR": str(tmp_path),
    }
    refused = run("-P", "-m", MODULE, "cluster", "down", environment=environment)
    assert refused.returncode == 2, refused.stderr
    assert "no Ray node of a cluster runs on this machine" in refused.stderr


def test_file_for_serve_deploy_is_the_application() -> None:
    environment = {
        "INPAINT_DATABASE_URL": POSTGRESQL,
        "INPAINT_STORAGE__URL": BUCKET,
        **PROTECTED,
    }
    file = (CONFIGS / "serve.yaml").read_text()
    translated = run("-c", TRANSLATED, told=file, environment=environment)
    assert translated.returncode == 0, translated.stderr
    settings = ClusterSettings()
    assert json.loads(translated.stdout.splitlines()[-1]) == {
        "path": "server.serving.cluster:build",
        "limits": [settings.min_workers, settings.max_workers, settings.idle_s],
        "policy": {
            "jobs_per_worker": settings.jobs_per_worker,
            "max_wait_s": settings.max_wait_s,
            "config": None,
        },
        "resources": {"num_cpus": 0, "num_gpus": settings.gpus_per_worker},
        "device": "cuda:0",
    }


def test_threads_are_limited_by_the_operator_alone() -> None:
    told = run("-c", THREADS)
    assert told.stdout.splitlines() == ["HOME", "HOME OMP_NUM_THREADS"], told.stderr


def test_replica_whose_worker_never_starts_is_broken(tmp_path: Path) -> None:
    config = tmp_path / "settings.toml"
    config.write_text(f'database_url = "{migrated_sqlite(tmp_path)}"\ndata_dir = "{tmp_path}"\n')
    told = run("-c", HEALTH, str(config), environment=PROTECTED)
    at_first, later, at_last = told.stdout.splitlines()
    assert (at_first, at_last) == ("None", "the worker's supervisor has ended"), told.stderr
    assert later.startswith("the worker failed to start 3 times")


def test_files_for_ray_agree() -> None:
    deployed = yaml.safe_load((CONFIGS / "serve.yaml").read_text())
    manifest = yaml.safe_load((CONFIGS / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    assert yaml.safe_load(manifest["spec"]["serveConfigV2"]) == deployed
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["authOptions"]["mode"] == "token"
    assert deployed["proxy_location"] == "Disabled"
    assert deployed["applications"][0]["args"] == ClusterSettings().model_dump()
