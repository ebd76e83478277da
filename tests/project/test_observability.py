"""`configs/observability`: rules that fire when they should, and figures that are really there.

Prometheus itself scrapes a server that has made pictures, and answers every expression of the rules
and of the dashboard.
"""

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.jobs.job import Failure
from server.serving.server import bind, port_of
from server.webhooks.circuit_breaker import MAX_OPEN_S
from tests.support.http_stub import png_bytes
from tests.support.native_calls import BODY
from tests.support.processes import ServerProcess, image_host, serving
from tests.support.programs import program, run
from tests.support.repository import REPOSITORY
from tests.support.waiting import until

pytestmark = pytest.mark.process

FOLDER = REPOSITORY / "configs" / "observability"
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "rules.yml").read_text())
CASES: dict[str, Any] = yaml.safe_load((FOLDER / "rules_test.yml").read_text())
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana/dashboards/inpaint.json").read_text())
OPERATIONS = (REPOSITORY / "docs" / "operations.md").read_text()

ALL_RULES = [rule for group in RULES["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule["expr"] for rule in ALL_RULES if "alert" in rule}
RECORDS = {rule["record"]: rule["expr"] for rule in ALL_RULES if "record" in rule}
PANELS = {
    (panel["title"], target["refId"]): target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}

SELECTOR = re.compile(r"inpaint[a-z_:0-9]+(?:\{[^}]*\})?")
"""A metric in an expression, with its matchers."""

MATCHER = re.compile(r'(\w+)(?:=~|!~|!=|=)"([^"]+)"')
"""A matcher's label, and its values."""

OPEN_LABELS = ("instance", "worker", "route", "size", "rows", "le")
"""Labels of which the cases of the rules make up values."""

FAULTS_OF_REQUESTS = {
    Failure.PROMPT_TOO_LONG,
    Failure.CLIP_SKIP_TOO_LARGE,
    Failure.NO_SUCH_NOISE_SPACING,
    Failure.DEADLINE_EXCEEDED,
}
"""An operator need not hear of these. All others are faults of the server or its settings."""

WITHOUT_SAMPLES = {
    "inpaint_gpu_memory_bytes": "this machine has no GPU",
    'outcome="failed"': "nothing fails by a fault of this server",
}
"""What a healthy server without a GPU has no samples of, by a part of the selector."""

WAIT_S = 120.0


def single_values_in(expression: str) -> list[str]:
    """A selector for each label and value that an expression compares with."""
    return [
        f'{selector.partition("{")[0]}{{{label}="{value}"}}'
        for selector in SELECTOR.findall(expression)
        for label, values in MATCHER.findall(selector)
        for value in values.split("|")
        if label not in OPEN_LABELS
    ]


def is_without_samples(expression: str) -> bool:
    return any(part in expression for part in WITHOUT_SAMPLES)


# --- files alone ---------------------------------------------------------------------------------


def test_promtool_accepts_configuration_and_rules(tmp_path: Path) -> None:
    promtool = program("promtool")
    run([promtool, "check", "config", FOLDER / "prometheus.yml"], tmp_path)
    run([promtool, "check", "rules", FOLDER / "rules.yml"], tmp_path)
    run([promtool, "test", "rules", FOLDER / "rules_test.yml"], tmp_path)


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_case_for_and_one_against_it(alert: str) -> None:
    cases = [
        bool(case["exp_alerts"])
        for test in CASES["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert {*cases} == {True, False}
    assert f"`{alert}`" in OPERATIONS


@pytest.mark.parametrize("failure", Failure)
def test_each_fault_of_the_server_is_watched_and_explained(failure: Failure) -> None:
    (left_out,) = re.findall(r'reason!~"(.*?)"', ALERTS["InpaintJobsFail"])
    is_watched = re.fullmatch(left_out, failure) is None
    assert is_watched == (failure not in FAULTS_OF_REQUESTS)
    assert is_watched == (f"| jobs fail with `{failure}` |" in OPERATIONS)


def test_circuit_breaker_lets_enough_calls_through_for_the_alert() -> None:
    (fewest,) = re.findall(r"\[1h\]\)\) > (\d+)", ALERTS["InpaintWebhooksFail"])
    assert 3_600 / MAX_OPEN_S > int(fewest) + 1


def test_dashboard_is_provisioned_and_asks_the_one_data_source() -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards/inpaint.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "/etc/grafana/provisioning/dashboards"
    assert {"uid", "title", "schemaVersion", "panels", "time"} <= DASHBOARD.keys()
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len({*ids}) == len(ids) > 20
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        sources = [panel["datasource"], *(each["datasource"] for each in panel["targets"])]
        assert {each["uid"] for each in sources} == {source["uid"]}


# --- with a server and Prometheus ----------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A server that has made pictures, and a Prometheus that scrapes it."""

    admin_url: str
    prometheus: httpx2.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an expression now."""
        answer = self.prometheus.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    prometheus = program("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    environment = {
        "INPAINT_ADMIN__PORT": "0",
        "INPAINT_WEBHOOK__ALLOW_CIDRS": "127.0.0.0/8",
    }
    with serving(folder / "data", environment) as server, image_host(pictures_in(folder)) as images:
        make_traffic(server, images)
        (line,) = server.events("admin listening")
        with running_prometheus(prometheus, folder, line["url"]) as client:
            watched = Watched(line["url"], client)
            until(lambda: bool(watched.query("inpaint:pictures:rate5m")), WAIT_S, "two scrapes")
            yield watched


def pictures_in(folder: Path) -> Path:
    site = folder / "site"
    site.mkdir()
    (site / "picture.png").write_bytes(png_bytes())
    return site


def make_traffic(server: ServerProcess, images: str) -> None:
    """Pictures by two dialects, with a webhook that nobody answers; images that are refused."""
    small = {"num_inference_steps": 3, "width": 64, "height": 64}
    by_url = {**BODY, **small, "init_image": f"{images}/picture.png"}
    job = server.client.post("/api/jobs", json={**by_url, "webhook": "http://127.0.0.1:1/"}).json()

    def has_finished() -> bool:
        state: str = server.client.get(f"/api/jobs/{job['id']}").json()["state"]
        return state == "finished"

    until(has_finished, WAIT_S, "the job has ended")
    assert server.inpaint(**{**BODY, **small, "track_id": "x"})["status"] == "success"
    for image in ("http://10.0.0.1/a.png", f"{images}/none.png", "AAAA"):
        assert server.inpaint(**{**BODY, **small, "init_image": image})["status"] == "error"


@contextmanager
def running_prometheus(prometheus: str, folder: Path, admin_url: str) -> Iterator[httpx2.Client]:
    """Prometheus with our configuration, but for the target and the pace."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(FOLDER / name) for name in config["rule_files"]]
    config["scrape_configs"] = [scrape] = config["scrape_configs"][:1]
    scrape["static_configs"] = [{"targets": [admin_url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    listener = bind("127.0.0.1", 0)
    port = port_of(listener)
    listener.close()
    command = [
        prometheus,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        with httpx2.Client(base_url=url, trust_env=False, timeout=60) as client:
            until(lambda: is_ready(client, process), WAIT_S, "Prometheus is ready")
            yield client
    finally:
        process.terminate()
        process.wait(60)


def is_ready(client: httpx2.Client, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "Prometheus has ended"
    try:
        return client.get("/-/ready").status_code == 200
    except httpx2.TransportError:
        return False


def test_scrape_is_clean_and_described(watched: Watched) -> None:
    scrape = httpx2.get(f"{watched.admin_url}/metrics", trust_env=False).text
    checked = subprocess.run(
        [program("promtool"), "check", "metrics"], input=scrape, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    families = {family.name: family for family in text_string_to_metric_families(scrape)}
    assert [name for name in families if f"`{name}" not in OPERATIONS] == []
    labels = {
        f"{name}={value}"
        for family in families.values()
        for sample in family.samples
        for name, value in sample.labels.items()
    }
    assert not [each for each in labels if "picture.png" in each or "10.0.0.1" in each]


def test_pictures_of_the_worker_are_counted(watched: Watched) -> None:
    figures = {
        "inpaint_pictures_total": 4,
        "inpaint_pixels_changed_outside_total": 0,
        "inpaint_job_wait_seconds_count": 2,
        'inpaint_worker_jobs_total{dialect="v3",outcome="finished"}': 1,
        'inpaint_worker_jobs_total{dialect="native",outcome="finished"}': 1,
        'inpaint_stage_seconds_count{stage="denoise"}': 2,
        'inpaint_requests_total{dialect="v3",outcome="answered"}': 1,
        'inpaint_requests_total{dialect="v3",outcome="refused"}': 3,
        'inpaint_image_problems_total{problem="private_address"}': 1,
        'inpaint_image_problems_total{problem="not_reachable"}': 1,
        'inpaint_image_problems_total{problem="not_an_image"}': 1,
    }

    def found() -> dict[str, float]:
        return {
            name: sum(float(sample["value"][1]) for sample in watched.query(name))
            for name in figures
        }

    # The worker reports every five seconds.
    until(lambda: found()["inpaint_pictures_total"] >= 2, WAIT_S, "the last report")
    assert found() == figures
    assert watched.query('inpaint_webhook_calls_total{outcome="not_reachable"} >= 1')
    (steps,) = watched.query('sum(inpaint_step_seconds_count{size="256"})')
    (rows,) = watched.query("sum(inpaint_batch_rows_count)")
    assert float(steps["value"][1]) == float(rows["value"][1]) > 0


def test_all_metrics_of_rules_and_dashboard_have_samples(watched: Watched) -> None:
    expressions = [*ALERTS.values(), *RECORDS.values(), *PANELS.values()]
    selectors = {each for expression in expressions for each in SELECTOR.findall(expression)}
    assert len(selectors) > 30
    empty = {each for each in selectors if not watched.query(each)}
    assert {each for each in empty if not is_without_samples(each)} == set()


def test_each_value_of_a_matcher_has_samples(watched: Watched) -> None:
    """One that the server never writes would be a condition that is never met."""
    expressions = [*ALERTS.values(), *RECORDS.values(), *PANELS.values()]
    series = [each["series"] for test in CASES["tests"] for each in test["input_series"]]
    single = {each for text in [*expressions, *series] for each in single_values_in(text)}
    assert len(single) > 30
    empty = {each for each in single if not watched.query(each)}
    assert {each for each in empty if not is_without_samples(each)} == set()


def test_all_records_and_panels_have_values(watched: Watched) -> None:
    expressions = [*RECORDS, *RECORDS.values(), *PANELS.values()]
    empty = {each for each in expressions if not watched.query(each)}
    assert {each for each in empty if not is_without_samples(each)} == set()
