"""The far end of a line that falls silent: a program in a network of its own.

`unshare --net python -m tests.chaos.relay PORT SOCKET` passes connections on to a Unix socket. When
its network's end of the line is taken down, packets are lost and nobody is told: a proxy that holds
bytes back would go on acknowledging them.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from tests.chaos.matrix import NotCovered
from tests.support.proxies import TcpProxy
from tests.support.repository import REPOSITORY

PORT = 5432
NEAR, FAR = "10.213.77.1", "10.213.77.2"
"""Of the two ends. No packet leaves the machine."""


@dataclass(frozen=True, slots=True)
class Line:
    """To a network of its own. pid: a process there. name: of the line's end there."""

    pid: int
    name: str

    def cut(self) -> None:
        """From now on every packet is lost."""
        run(*self.inside, "ip", "link", "set", self.name, "down")

    def heal(self) -> None:
        """Packets pass again."""
        run(*self.inside, "ip", "link", "set", self.name, "up")

    @property
    def inside(self) -> list[str]:
        """Before a command: it runs in that network."""
        return ["nsenter", "--target", str(self.pid), "--net"]


def run(*command: str) -> None:
    """Raises: NotCovered where it may not be done, or there is no such program."""
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotCovered("a network of its own is not permitted here") from error


@contextmanager
def running_machine() -> Iterator[Line]:
    """A network of its own, as another machine has one, at the end of a line to it.

    Raises: NotCovered.
    """
    run("unshare", "--net", "true")
    near = f"chaos{os.getpid()}a"
    with ExitStack() as stack:
        machine = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
        )
        stack.callback(machine.communicate)
        stack.callback(machine.kill)
        assert machine.stdout is not None
        machine.stdout.readline()  # it has its network
        line = Line(machine.pid, f"chaos{os.getpid()}b")
        pair = ("type", "veth", "peer", "name", line.name, "netns", str(machine.pid))
        run("ip", "link", "add", near, *pair)
        run("ip", "address", "add", f"{NEAR}/30", "dev", near)
        run("ip", "link", "set", near, "up")
        run(*line.inside, "ip", "address", "add", f"{FAR}/30", "dev", line.name)
        line.heal()
        yield line


@contextmanager
def running_relay(socket_path: str) -> Iterator[Line]:
    """A line to a Unix socket, by `FAR`:`PORT`. Raises: NotCovered."""
    with running_machine() as line, ExitStack() as stack:
        program = [sys.executable, "-m", "tests.chaos.relay", str(PORT), socket_path]
        relay = subprocess.Popen([*line.inside, *program], stdout=subprocess.PIPE, cwd=REPOSITORY)
        stack.callback(relay.communicate)
        stack.callback(relay.kill)
        assert relay.stdout is not None
        relay.stdout.readline()  # it listens
        yield line


async def relay(port: int, socket_path: str) -> None:
    """Until killed; the network's end of the line goes with the process."""
    proxy = TcpProxy(lambda: asyncio.open_unix_connection(socket_path))
    server = await proxy.start("0.0.0.0", port)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(int(sys.argv[1]), sys.argv[2]))
