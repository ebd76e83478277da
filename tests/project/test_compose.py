"""What `compose.yaml` and the image set is what the server needs, tried with a real one."""

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from server.core.settings import REPOSITORY
from tests.support.processes import ServerProcess

pytestmark = pytest.mark.process

KEY = "a-key-of-the-team"
COMPOSE: dict[str, Any] = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICE: dict[str, Any] = COMPOSE["services"]["inpaint"]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text().replace("\\\n", " ")


def environment(keys_file: Path) -> dict[str, str]:
    """Of the service, as compose gives it where nothing is set; secrets lie elsewhere here."""
    secrets = {f"/run/secrets/{name}": str(keys_file) for name in SERVICE["secrets"]}
    plain = {
        name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))
        for name, value in SERVICE["environment"].items()
    }
    return {name: secrets.get(value, value) for name, value in plain.items()}


def test_figures_are_scraped_by_the_services_name(tmp_path: Path) -> None:
    keys_file = tmp_path / "inpaint-keys"
    keys_file.write_text(f"{KEY}\n")
    keys_file.chmod(0o600)
    variables = environment(keys_file)
    port = variables["INPAINT_ADMIN__PORT"]
    server = ServerProcess(
        tmp_path / "data", {**variables, "INPAINT_ADMIN__PORT": "0"}, "--workers", "0"
    )
    try:
        (admin,) = server.events("admin listening")
        url = admin["url"].replace("0.0.0.0", "127.0.0.1")
        for host, status in ((f"inpaint:{port}", 200), (f"elsewhere:{port}", 421)):
            assert httpx2.get(f"{url}/metrics", headers={"Host": host}).status_code == status
        assert server.client.get("/api/jobs").status_code == 401
        allowed = server.client.get("/api/jobs", headers={"X-API-Key": KEY})
        assert allowed.status_code == 200
    finally:
        server.stop()
        server.client.close()


def test_keys_are_a_secret_and_logs_rotate() -> None:
    assert COMPOSE["secrets"] == {"inpaint-keys": {"file": "./inpaint-keys"}}
    assert not [name for name in SERVICE["environment"] if name.endswith("KEYS")]
    assert {"max-size", "max-file"} <= SERVICE["logging"]["options"].keys()
    assert "/inpaint-keys" in (REPOSITORY / ".gitignore").read_text().splitlines()


def test_image_asks_its_own_health_and_keeps_its_data_to_itself() -> None:
    (health,) = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert json.loads(health) == ["inpaint-server", "health"]
    (made,) = re.findall(r"install --directory (.*) /data", DOCKERFILE)
    assert "--mode 0700" in made
