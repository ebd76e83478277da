"""A real server's threads lie on one core, and nothing that it starts does."""

import os
import sys
from pathlib import Path

import psutil
import pytest

from server.settings import Settings
from tests.processes import ServerProcess

CORES = os.sched_getaffinity(0) if sys.platform == "linux" else set[int]()

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="one core cannot be told from all")


@pytest.mark.parametrize("is_on_one", [True, False])
def test_server_is_on_one_core_and_its_children_on_all(is_on_one: bool, tmp_path: Path) -> None:
    database = Settings(data_dir=tmp_path).sqlalchemy_url
    worker = f"{sys.executable} -m tests.odd_worker {database} never-ready"
    settings = {"INPAINT_HTTP__ONE_CORE": str(is_on_one)}
    server = ServerProcess(tmp_path, settings, "--worker-command", worker)
    try:
        worker_pid = server.wait_for("worker started")["pid"]
        # A decoder is started by a thread of the server's own.
        pixel = "data:image/png;base64,AAAA"
        refused = server.inpaint(prompt="x", init_image=pixel, mask_image=pixel)
        assert "image" in str(refused["message"])
        # One, or two where the one that starts beforehand was not there yet.
        children = {child.pid for child in psutil.Process(server.pid).children()}
        decoders = children - {worker_pid}
        assert decoders

        threads = [thread.id for thread in psutil.Process(server.pid).threads()]
        cores_of = {pid: os.sched_getaffinity(pid) for pid in (*threads, *children)}
        assert all(cores_of[child] == CORES for child in (worker_pid, *decoders))
        assert len(cores_of[server.pid]) == (1 if is_on_one else len(CORES))
        # Of the others only those that keep a worker were there before.
        astray = [thread for thread in threads if cores_of[thread] != cores_of[server.pid]]
        assert len(astray) <= 2
    finally:
        server.stop()
        server.client.close()
