"""Rounds of kill -9 of the API, of a worker, or of all, at random moments under load."""

import random
import signal
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.chaos.clients import asking
from tests.chaos.faults_processes import drain
from tests.chaos.matrix import Found
from tests.chaos.nursery import Nursery
from tests.chaos.oracle import Oracle
from tests.chaos.site import Site, outside_world, signal_process
from tests.support.waiting import until

API, WORKER, ALL = "API", "worker", "all"
VICTIMS = [API] * 9 + [WORKER] * 9 + [ALL]
CLIENTS = 2
WORKERS = 2
LONGEST_WAIT_S = 0.8
"""Before a kill; in this time a few jobs are accepted, made and reported."""
DRAINED_S = 180.0


def kill_in_rounds(room: Path, rounds: int, seed: int = 1) -> Found:
    """Kill, start again, and ask the oracle, so many times. Raises: Broken."""
    chance = random.Random(seed)
    kills: Counter[str] = Counter()
    started = time.monotonic()
    with ExitStack() as stack:
        _thread, host = stack.enter_context(outside_world())
        nursery = stack.enter_context(Nursery())
        site = Site(room, host, launch=nursery.launch)
        stack.callback(site.close)
        site.start(WORKERS)
        oracle = Oracle(site)
        with ExitStack() as clients:
            for number in range(CLIENTS):
                hook = f"{host.url}/ok/{number}"
                clients.enter_context(asking(site, 0.15, webhook=hook, track_id=number))
            for done in range(1, rounds + 1):
                time.sleep(chance.uniform(0, LONGEST_WAIT_S))
                victim = chance.choice(VICTIMS)
                kills[victim] += 1
                if victim != WORKER:
                    # What a client was sending just then may have left its input behind.
                    oracle.orphans += CLIENTS
                strike(site, victim, chance)
                before = len(site.accepted)
                until(lambda: len(site.accepted) > before, 30, "jobs are accepted")  # noqa: B023
                told = oracle.check()
                if done % 10 == 0:
                    print(f"round {done}: {told}", flush=True)
        told = drain(site, oracle, DRAINED_S)
    by_victim = ", ".join(f"{count} × {victim}" for victim, count in sorted(kills.items()))
    pace = (time.monotonic() - started) / rounds
    injected = f"{rounds} rounds of SIGKILL under load ({by_victim}), {pace:.1f} s a round"
    return Found(injected, f"{len(site.accepted)} accepted jobs, none lost: {told}")


def strike(site: Site, victim: str, chance: random.Random) -> None:
    """Kill, and start again what does not start by itself."""
    if victim == WORKER:
        pids = site.worker_pids()
        if pids:
            signal_process(chance.choice(pids), signal.SIGKILL)
        return
    if victim == ALL:
        site.kill_everything()
    else:
        site.kill()
    site.start(WORKERS)
