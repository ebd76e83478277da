"""Faults of those who call us and of those we call, and of the limits between."""

import asyncio
import functools
import json
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import text

from server.storage.database import open_engine
from server.webhooks.sender import CALLS_PER_HOST
from tests.chaos.clients import side_by_side
from tests.chaos.faults_processes import drain
from tests.chaos.hosts import Host, running_host
from tests.chaos.matrix import Found, fault, need_data_folder
from tests.chaos.oracle import Oracle
from tests.chaos.scripts import FaultKind, Script, Stage
from tests.chaos.site import INLINE_IMAGE, INLINE_MASK, Site, expect, outside_world, running_site
from tests.support.proxies import LoopThread
from tests.support.shared_stores import shared_stores
from tests.support.waiting import until

FETCH_S = 5.0
RETRIED_MODES = ("500", "301", "404", "silent", "drip", "reset", "429")
DELIVERED_MODES = ("ok", "huge", "half")
"""Their status is the answer, whatever becomes of the rest."""
IMAGE_MODES = (
    *("silent", "drip", "endless", "lying", "reset", "page", "404", "loop", "inward", "half"),
)
MAX_IN_FLIGHT = 8
WAITERS = 1_000
KEPT_DESCRIPTORS = 20 if shared_stores() is None else 120
"""Beyond those of a new server: connections to shared stores are kept for the next call."""
MADE = 50
"""So many of their jobs are waited for; all would take minutes."""
SUBMITS = 10_000
HALF_REQUESTS = 5_000
CLIENTS_PER_ADDRESS = 250
"""Fewer than the server lets one address have."""
CONNECTIONS = 400
"""Of the load, from one address."""
CUT_S = 30.0
"""Three times what the server gives a client for a head."""


@fault("F8", "webhook receivers of every kind", within_s=10)
def receivers(room: Path) -> Found:
    """Received, tried again, or given up, as the answer says; nobody waits for a slow one."""
    with ExitStack() as stack:
        thread, host = stack.enter_context(outside_world())
        slow_host = stack.enter_context(running_host(thread))
        # Of its own: failures of the others may open the circuit breaker of theirs.
        retried_host = stack.enter_context(running_host(thread))
        deaf = stack.enter_context(deaf_port())
        site = Site(room, host)
        stack.callback(site.close)
        site.start()
        oracle = Oracle(site, may_die=True)
        # More than may be called at a time for one receiver, before everybody else.
        for number in range(8):
            site.accept(webhook=f"{slow_host.url}/silent/{number}")
        urls = {
            mode: f"{host.url}/{mode}/hook" for mode in (*RETRIED_MODES, *DELIVERED_MODES, "410")
        }
        urls |= {"deaf": f"http://127.0.0.1:{deaf}/", "once500": f"{retried_host.url}/once500/hook"}
        jobs = {mode: site.accept(webhook=url) for mode, url in urls.items()}
        site.ended(*jobs.values())
        ended = time.time()
        until(lambda: bool(host.calls_for(jobs["ok"])), 5, "a quick receiver is called")
        waited_s = host.calls_for(jobs["ok"])[0].at - ended
        expect(waited_s < 2, f"a quick receiver waited {waited_s:.1f} s behind a slow one")
        recovery_s = until(
            lambda: delivery(site, jobs["once500"])["state"] == "delivered", 15, "delivered later"
        )
        until(lambda: all(tries(site, each) for each in jobs.values()), 20, "all were tried")
        for mode in (*RETRIED_MODES, "deaf"):
            row = delivery(site, jobs[mode])
            expect(row["state"] == "pending", f"{mode}: {row['state']}")
        expect(delivery(site, jobs["429"])["due_at"] > time.time() + 3_000, "Retry-After ignored")
        expect(delivery(site, jobs["410"])["state"] == "dead", "410 does not stop the calls")
        for mode in DELIVERED_MODES:
            expect(delivery(site, jobs[mode])["state"] == "delivered", f"{mode} not delivered")
        expect(not any("redirected" in call.path for call in host.calls), "followed a redirect")
        ids = {call.webhook_id for call in retried_host.calls_for(jobs["once500"])}
        expect(len(ids) == 1, f"one webhook, the ids {ids}")
        at_once = most_at_once(site, slow_host)
        is_kept = at_once <= CALLS_PER_HOST
        gaps = () if is_kept else (f"{at_once} calls at once of a host, not {CALLS_PER_HOST}",)
        injected = f"receivers that are {', '.join(jobs)}; 8 jobs for one that never answers first"
        checked = (
            f"delivered, tried again or given up as promised, {at_once} calls at once of the slow "
            f"host, another waited {max(waited_s, 0):.1f} s; {oracle.last_check()}"
        )
        return Found(injected, checked, recovery_s, gaps)


@contextmanager
def deaf_port() -> Iterator[int]:
    """A port whose backlog is full: connecting to it hangs."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def rows(site: Site, query: str) -> list[dict[str, Any]]:
    """Of the site's database."""
    engine = open_engine(site.database_url)
    try:
        with engine.connect() as connection:
            return [dict(row._mapping) for row in connection.execute(text(query))]
    finally:
        engine.dispose()


def delivery(site: Site, job_id: int) -> dict[str, Any]:
    """The webhook call of a job."""
    (row,) = rows(site, f"SELECT * FROM deliveries WHERE job_id = {int(job_id)}")
    return row


def tries(site: Site, job_id: int) -> int:
    """How often the webhook of a job was tried, to the end of each try."""
    query = (
        "SELECT count(*) AS n FROM delivery_attempts JOIN deliveries ON deliveries.id = delivery_id"
        f" WHERE job_id = {int(job_id)}"
    )
    return int(rows(site, query)[0]["n"])


def most_at_once(site: Site, host: Host) -> int:
    """Of the calls of a host, how many were under way at one time, as the sender kept the time."""
    query = (
        "SELECT started_at, duration_s FROM delivery_attempts"
        " JOIN deliveries ON deliveries.id = delivery_id"
        f" WHERE host LIKE '%://127.0.0.1:{host.port}'"
    )
    spans = [
        (row["started_at"], row["started_at"] + row["duration_s"]) for row in rows(site, query)
    ]
    return max(len([1 for begin, end in spans if begin <= start < end]) for start, _ in spans)


@fault("F9", "image hosts of every kind", within_s=20)
def image_hosts(room: Path) -> Found:
    """Each ends in a sentence within the time of a download; no job is made of it."""
    with running_site(room, {"INPAINT_FETCH__TOTAL_TIMEOUT_S": str(FETCH_S)}) as site:
        oracle = Oracle(site)

        def ask(mode: str) -> tuple[str, float, dict[str, Any]]:
            started = time.monotonic()
            answer = site.submit(init_image=f"{site.host.url}/{mode}")
            return mode, time.monotonic() - started, answer.json()

        answers = side_by_side([functools.partial(ask, mode) for mode in IMAGE_MODES])
        sentences = set()
        for mode, took_s, body in answers:
            expect(body["status"] == "error", f"{mode}: {body}")
            expect(took_s < FETCH_S + 5, f"{mode} took {took_s:.1f} s")
            sentences |= set(body["message"]["init_image"])
        expect(not site.accepted, "a job was made of a picture that cannot be had")
        good = site.accept(init_image=f"{site.host.url}/image")
        site.ended(good)
        slowest_s = max(took_s for _, took_s, _ in answers)
        checked = (
            f"{len(sentences)} sentences, none later than {slowest_s:.1f} s, no job made; "
            f"{oracle.last_check()}"
        )
        return Found(f"init images that are {', '.join(IMAGE_MODES)}", checked, slowest_s)


@fault("F10", "out of memory")
def out_of_memory(room: Path) -> Found:
    """Once: made all the same. Always: this job fails, and says why; its neighbours are made."""
    with running_site(room, {"INPAINT_ADMIN__PORT": "0"}) as site:
        oracle = Oracle(site)
        stages = (Stage.PREPARED, Stage.HALF, Stage.DECODED)
        kind = FaultKind.OUT_OF_MEMORY
        once = [site.accept(Script(tag=f"once-{at}", fault=kind, at=at)) for at in stages]
        always = [
            site.accept(Script(tag=f"always-{at}", fault=kind, at=at, times=0)) for at in stages
        ]
        calm = [site.accept(Script(tag=f"calm{n}")) for n in range(3)]
        site.ended(*once, *calm)
        site.ended(*always, status="failed")
        expect("memory" in site.fetch(always[0])["message"], "the reason is not told")
        expect({oracle.row(each)["attempt"] for each in once} == {1}, "a process was lost")
        admin = site.log_events("admin listening")[-1]["url"]
        figures = site.client.get(f"{admin}/metrics").text
        counted = 'inpaint_failed_jobs{reason="out_of_memory"} 3.0'
        expect(counted in figures, "no metric counts them")
        injected = f"OutOfMemory once and always when {', '.join(stages)}"
        checked = f"once: made by the same process; always: failed, told why; {oracle.last_check()}"
        return Found(injected, checked)


@fault("F12", "NaN or black picture")
def unusable_picture(room: Path) -> Found:
    """Failed with a reason, never a success; nor does an unforeseen error go further."""
    with running_site(room) as site:
        oracle = Oracle(site)
        black = site.accept(Script(tag="black", fault=FaultKind.UNUSABLE, at=Stage.DECODED))
        # Always: members of a batch that fails are tried alone.
        odd = site.accept(Script(tag="odd", fault=FaultKind.ERROR, at=Stage.HALF, times=0))
        calm = site.accept(Script(tag="calm"))
        site.ended(black, odd, status="failed")
        site.ended(calm)
        expect("could not make" in site.fetch(black)["message"], "the reason is not told")
        expect("asked for" not in site.fetch(odd)["message"], "an exception's text went out")
        injected = "UnusablePicture from the decoder, an unforeseen error in a step"
        checked = (
            "failed and told why, a neighbour is made (that NaN and one colour are found, and the "
            f"second try in float32: tests/models/diffusion/test_vae.py); {oracle.last_check()}"
        )
        return Found(injected, checked)


@fault("F14", "the same request twice")
def sent_twice(room: Path) -> Found:
    """With an idempotency key one job, without it, and in V3, one for each request."""
    times = 100
    settings = {"INPAINT_QUEUE__MAX_WAITING_PER_KEY": "1000"}
    with running_site(room, settings) as site:
        oracle = Oracle(site)
        plain = side_by_side([lambda: site.accept(Script(tag="twice")) for _ in range(times)])
        expect(len(set(plain)) == times, "requests without a key share a job")
        body = {"prompt": "twice", "init_image": INLINE_IMAGE, "mask_image": INLINE_MASK}

        def send(headers: dict[str, str]) -> httpx2.Response:
            answer = site.client.post(f"{site.url}/api/jobs", json=body, headers=headers)
            site.note(answer, None)
            return answer

        answers = side_by_side([functools.partial(send, {"Idempotency-Key": "same"})] * times)
        statuses = Counter(answer.status_code for answer in answers)
        ids = {answer.json()["id"] for answer in answers}
        expect(len(ids) == 1, f"one key, {len(ids)} jobs, answers {dict(statuses)}")
        keyless = {send({}).json()["id"] for _ in range(2)}
        expect(len(keyless) == 2, "native requests without a key share a job")
        injected = f"{times} requests in parallel with one Idempotency-Key, {times} of V3 with none"
        told = f"one job for the key (answers {dict(statuses)}), {times} for V3"
        return Found(injected, f"{told}; {drain(site, oracle)}")


def many_clients(stack: ExitStack, port: int, count: int) -> list[socket.socket]:
    """Connections from so many loopback addresses that none has too many of them."""
    clients = []
    for number in range(count):
        source = f"127.0.1.{1 + number // CLIENTS_PER_ADDRESS}"
        client = socket.create_connection(("127.0.0.1", port), source_address=(source, 0))
        clients.append(stack.enter_context(client))
    return clients


def allow_sockets(count: int) -> int:
    """Raise this process's limit for so many; how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 500
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
    return min(count, hard - 500)


@fault("F16", "clients go away while they wait", within_s=10)
def clients_leave(room: Path) -> Found:
    """Their jobs go on, and nothing of the connections stays."""
    return waiters_leave(room, allow_sockets(WAITERS), MADE)


def waiters_leave(room: Path, waiters: int, made: int) -> Found:
    """So many clients hang up; so many of their jobs are waited for. Raises: Broken."""
    settings = {
        "INPAINT_HOLD_S": "120",
        "INPAINT_MAX_IN_FLIGHT": str(MAX_IN_FLIGHT),
        "INPAINT_QUEUE__MAX_WAITING": str(2 * waiters),
        "INPAINT_QUEUE__MAX_WAITING_PER_KEY": str(2 * waiters),
    }
    with running_site(room, settings) as site:
        oracle = Oracle(site)
        descriptors = Path(f"/proc/{site.pid}/fd")
        port = int(site.url.rpartition(":")[2])
        before = len([*descriptors.iterdir()])
        slow = Script(tag="slow", step_s=0.5)
        with ExitStack() as stack:
            for number, client in enumerate(many_clients(stack, port, waiters)):
                client.sendall(request_bytes(slow if number < 8 else Script(), number))
            until(lambda: len(oracle.ids()) == waiters, 90, "all are accepted")
            held = len([*descriptors.iterdir()])
        expect(held >= before + waiters / 2, f"the connections were not held: {before} → {held}")
        left_s = until(
            lambda: len([*descriptors.iterdir()]) < before + KEPT_DESCRIPTORS,
            30,
            "the connections are gone",
        )
        site.accepted.update(dict.fromkeys(oracle.ids()))
        until(lambda: oracle.states()["finished"] >= made, 60, f"{made} of their jobs are made")
        running = oracle.states()["running"]
        expect(running <= 2 * MAX_IN_FLIGHT, f"one worker holds {running} jobs")
        expect(site.readiness() == 200, "not ready after they have left")
        after = len([*descriptors.iterdir()])
        expect(after < before + KEPT_DESCRIPTORS, f"descriptors stay: {before} → {after}")
        checked = (
            f"{held - before} held at once, descriptors {before} → {after}, jobs go on; "
            f"{oracle.last_check()}"
        )
        return Found(f"{waiters} waiting clients hang up", checked, left_s)


def request_bytes(script: Script, seed: int) -> bytes:
    """A request for a picture, as it goes over the line."""
    fields = {
        "prompt": str(script),
        "init_image": INLINE_IMAGE,
        "mask_image": INLINE_MASK,
        "num_inference_steps": 4,
        "enhance_prompt": "no",
        "seed": seed,
    }
    content = json.dumps(fields).encode()
    head = b"POST /api/v3/inpaint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
    return head % len(content) + content


@fault("F18", "queue full")
def queue_full(room: Path) -> Found:
    """Refused before anything is fetched, with a time to come back."""
    with outside_world() as (thread, host):
        return refused_in_parallel(room, thread, host, SUBMITS)


def refused_in_parallel(room: Path, thread: LoopThread, host: Host, submits: int) -> Found:
    """So many requests at once for five places. Raises: Broken."""
    limit = 5
    site = Site(room, host, {"INPAINT_QUEUE__MAX_WAITING": str(limit)})
    try:
        site.start(workers=0, is_ready=False)
        oracle = Oracle(site)
        port = int(site.url.rpartition(":")[2])
        started = time.monotonic()
        statuses = thread.call(send_all(port, request_bytes(Script(), 1), submits), 240)
        took_s = time.monotonic() - started
        expect(statuses == {200: limit, 429: submits - limit}, f"answers were {dict(statuses)}")
        site.accepted.update(dict.fromkeys(oracle.ids()))
        expect(len(site.accepted) == limit, f"{len(site.accepted)} rows of {limit} taken")
        refusal = site.submit(Script(tag="one more"))
        expect(int(refusal.headers.get("retry-after", 0)) > 0, "no Retry-After")
        words = f"Maximum {limit} queued requests allowed"
        expect(words in refusal.json()["message"], f"worded as {refusal.json()}")
        late = site.submit(init_image=f"{host.url}/image")
        expect(late.status_code == 429 and host.gets == 0, "fetched for a refused request")
        injected = f"{submits} submits over {CONNECTIONS} connections, {limit} places"
        checked = (
            f"{limit} taken, the rest told 429 with Retry-After in {took_s:.0f} s, nothing fetched;"
            f" {oracle.check()}"
        )
        return Found(injected, checked)
    finally:
        site.close()


async def send_all(port: int, request: bytes, count: int) -> Counter[int]:
    """The same request so often, over several connections at a time; the statuses."""
    left = iter(range(count))
    statuses: Counter[int] = Counter()

    async def send() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in left:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            await reader.readexactly(int(head.partition("content-length: ")[2].split("\r")[0]))
            statuses[int(head.split(" ")[1])] += 1
        writer.close()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(count, CONNECTIONS)):
            tasks.create_task(send())
    return statuses


@fault("F20", "clients that never end their request", within_s=CUT_S)
def slow_clients(room: Path) -> Found:
    """Probes are answered beside thousands of half requests, which are cut in time."""
    count = allow_sockets(HALF_REQUESTS)
    with running_site(room) as site:
        oracle = Oracle(site)
        port = int(site.url.rpartition(":")[2])
        half = b"POST /api/v3/inpaint HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
        with ExitStack() as stack:
            clients = many_clients(stack, port, count)
            for client in clients:
                with suppress(ConnectionError):  # cut already, on a busy machine
                    client.sendall(half)
            started = time.monotonic()
            expect(site.client.get(f"{site.url}/healthz").status_code == 200, "no longer healthy")
            probe_s = time.monotonic() - started
            expect(probe_s < 2, f"a probe took {probe_s:.1f} s")
            open_count = len([*Path(f"/proc/{site.pid}/fd").iterdir()])
            job = site.accept(Script(tag="beside"))
            site.ended(job)
            cut_s = until(lambda: all(map(is_closed, clients)), CUT_S, "all are cut")
        gaps = () if count == HALF_REQUESTS else (f"only {count} of {HALF_REQUESTS} sockets here",)
        checked = (
            f"{open_count} descriptors open then, a probe in {probe_s:.2f} s, a job made, all cut; "
            f"{oracle.last_check()}"
        )
        return Found(f"{count} half requests", checked, cut_s, gaps)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up, or has answered before it does."""
    connection.setblocking(False)
    try:
        connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


@fault("F25", "too few file descriptors, too little memory", within_s=10)
def limits(room: Path) -> Found:
    """Refuses what does not fit, and recovers."""
    with running_site(room) as site:
        oracle = Oracle(site, orphans=20)
        port = int(site.url.rpartition(":")[2])
        used = max(int(each.name) for each in Path(f"/proc/{site.pid}/fd").iterdir())
        resource.prlimit(site.pid, resource.RLIMIT_NOFILE, (used + 20, used + 20))
        with ExitStack() as stack:
            for _ in range(60):
                stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            time.sleep(1)
        descriptors_s = until(lambda: accepts(site), 15, "takes jobs again after 60 connections")
        pages = int(Path(f"/proc/{site.pid}/statm").read_text().split()[0])
        room_bytes = pages * os.sysconf("SC_PAGE_SIZE") + 20_000_000
        resource.prlimit(site.pid, resource.RLIMIT_AS, (room_bytes, resource.RLIM_INFINITY))
        answer = site.submit(Script(tag="large"), padding="x" * 25_000_000)
        resource.prlimit(site.pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        memory_s = until(lambda: accepts(site), 15, "takes jobs again after a lack of memory")
        expect(answer.status_code >= 500, f"25 MB in 20 MB of memory: {answer.status_code}")
        shortages = sum("out of system resource" in each["event"] for each in site.log_events())
        expect(shortages <= 100, f"{shortages} log lines told of too few descriptors")
        injected = (
            "room for 20 more descriptors and 60 connections, 25 MB sent into 20 MB of memory"
        )
        checked = f"the latter told {answer.status_code}, takes jobs again; {drain(site, oracle)}"
        return Found(injected, checked, max(descriptors_s, memory_s))


def accepts(site: Site) -> bool:
    """Whether a job is taken now."""
    try:
        return site.submit(Script(tag="accepts")).status_code == 200
    except OSError:
        return False


@fault("F28", "secrets in logs")
def secrets_in_logs(room: Path) -> Found:
    """Canaries sent in every place a secret may stand are in no log, and keys in no table."""
    need_data_folder()  # the canaries are sought in its database, too
    key, other = "canary-key-of-91f2", "canary-wrong-7b3e"
    signature, prompt = "canary-signature-c0de", "canary-prompt-5eed"
    environment = {"INPAINT_AUTH__KEYS": key, "INPAINT_FETCH__TOTAL_TIMEOUT_S": "2"}
    with running_site(room, environment) as site:
        site.key = key
        oracle = Oracle(site)
        script = Script(tag=prompt, fault=FaultKind.ERROR, at=Stage.HALF, times=0)
        signed = f"{site.host.url}/image?X-Signature={signature}"
        hook = f"{site.host.url}/500/{signature}"
        job = site.accept(script, key=key, init_image=signed, webhook=hook)
        for change in (
            {"key": other},
            {"key": key, "init_image": f"{site.host.url}/silent?X-Signature={signature}"},
            {"key": key, "init_image": f"http://127.0.0.1:1/{signature}"},
            {"key": key, "webhook": f"gopher://{signature}"},
        ):
            site.submit(script, **change)
        answer = site.client.post(f"{site.url}/api/v3/fetch/{job}", json={"key": key})
        expect(answer.status_code == 200, "the job cannot be fetched with its key")
        until(lambda: bool(site.host.calls), 20, "the webhook is tried")
        site.stop()
        log = site.log_path.read_text()
        image = INLINE_MASK[20:60]
        canaries = {"key": key, "wrong key": other, "signed URL": signature, "prompt": prompt}
        for name, canary in {**canaries, "image": image}.items():
            expect(canary not in log, f"the {name} stands in the log")
        tables = b"".join(path.read_bytes() for path in site.data_dir.glob("inpaint.db*"))
        for name, canary in {"key": key, "wrong key": other, "image": image}.items():
            expect(canary.encode() not in tables, f"the {name} stands in the database")
        expect(prompt.encode() in tables, "the canaries did not come by")
        injected = f"canaries as {', '.join(canaries)} and image, in good and bad requests"
        checked = (
            f"none in {len(log.splitlines())} log lines, no key in the database; {oracle.check()}"
        )
        return Found(injected, checked)
