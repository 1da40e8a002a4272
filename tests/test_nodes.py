"""What only several servers on one PostgreSQL can show: real processes that are killed, stopped and misled."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from nodes import CURE, Cluster, Node, Peer, Proxy, database_url, nodes, postgres_bin, say
from support import Api, get_flow, until

pytest.importorskip("psycopg", reason="the driver is missing: pip install 'astera-lite[postgres]'")
pytestmark = pytest.mark.skipif(postgres_bin() is None, reason=CURE)

LEASE_S = 3
LEASE = ("--lease", f"{LEASE_S}s", "--workers", "8", "--callback-retries", "100ms,200ms,1s,1s,1s")
NUMBERS = itertools.count()  # of databases
HANG_S = 30  # an answer that takes longer does not come at all

WORK = '''
import os, time

def note(job, what):
    """A side effect that can be counted: one line for each time it happens, with the process and the time."""
    file = os.open("marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{job} {what} {os.getpid()} {time.monotonic()}\\n".encode())
    os.close(file)

def mark(context, job, what, pause=0.0):
    note(job, what)
    time.sleep(pause)
    return f"{what} of {job}"

def held(context, job, gate):
    """Runs until a file is there."""
    note(job, "held")
    while not os.path.exists(gate) and not context.cancelled:
        time.sleep(0.005)
    note(job, "cancelled" if context.cancelled else "through")
    return "through"
'''


def marking(name: str, pause: Any = 0.0) -> dict[str, Any]:
    return {
        "name": name,
        "python": {"call": "work:mark", "args": {"job": "${request.id}", "what": name, "pause": pause}},
    }


HOLD = {"name": "hold", "python": {"call": "work:held", "args": {"job": "${request.id}", "gate": "${params.gate}"}}}
GATE = {"parameters": {"gate": {"in": "query", "default": "go"}}}
PARAMETERS = {"n": {"in": "query", "type": "integer"}, "pause": {"in": "query", "type": "number", "default": 0.002}}
SAID = {"body": {"n": "${params.n}", "job": "${request.id}", "said": "${second}"}}
SINGLE, CHAIN, NAP = (
    get_flow(f"/{name}", request={"parameters": PARAMETERS}, steps=steps, response=SAID)
    for name, steps in {
        "single": [marking("second", "${params.pause}")],
        "chain": [marking("first"), {"name": "token", "set": "${uuid()}"}, marking("second", "${params.pause}")],
        "nap": [marking("first"), {"name": "sleep", "wait": "500ms"}, marking("second", "${params.pause}")],
    }.items()
)
FLOWS = {
    "single": SINGLE,
    "chain": CHAIN,
    "nap": NAP,
    "held": get_flow("/held", request=GATE, steps=[HOLD, marking("after")], response={"body": "${hold}"}),
    "large": get_flow("/large", response={"body": "${'xyz' * 1000000}"}),
    "later": get_flow("/later", steps=[marking("first"), {"name": "w", "wait": "1h"}]),
}


@pytest.fixture
def database(cluster: Cluster) -> str:
    """The URL of an empty database."""
    return cluster.create(f"test{next(NUMBERS)}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "flows", FLOWS)
    return tmp_path


def write(folder: Path, flows: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "work.py").write_text(WORK)
    for name, tree in flows.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))


class Mark(NamedTuple):
    what: str
    pid: int
    at: float  # time.monotonic(), which is one for all processes


def marks(folder: Path) -> dict[str, list[Mark]]:
    """The side effects of each job, in their order."""
    found: dict[str, list[Mark]] = defaultdict(list)
    file = folder / "marks"
    for line in file.read_text().splitlines() if file.exists() else ():
        job, what, pid, at = line.split(" ")
        found[job].append(Mark(what, int(pid), float(at)))
    return found


def done(folder: Path, job_id: str) -> list[str]:
    return [mark.what for mark in marks(folder)[job_id]]


def hold(node: Node, gate: str = "go", **query: Any) -> str:
    """A job that runs on this node until a file is there."""
    job_id = node.api.submit("/held", gate=gate, **query)
    until(lambda: any(mark.pid == node.pid for mark in marks(node.folder)[job_id]))
    return job_id


def documents(api: Api) -> dict[str, Any]:
    """The status document of every job."""
    found: dict[str, Any] = {}
    query = {"limit": "1000"}
    while query.get("cursor", "") is not None:
        page = api.session.get(f"{api.url}/api/jobs", params=query, timeout=HANG_S).json()
        for document in page["jobs"]:
            assert document["id"] not in found, "an id is used twice"
            found[document["id"]] = document
        query["cursor"] = page["next"]
    return found


def ended(api: Api, seconds: float = 60) -> None:
    """Wait until no job is Running."""
    until(
        lambda: not api.session.get(f"{api.url}/api/jobs?status=Running&limit=1", timeout=HANG_S).json()["jobs"],
        seconds,
    )


def well(node: Node, seconds: float = 30) -> None:
    until(lambda: requests.get(f"{node.url}/health", timeout=HANG_S).status_code == 200, seconds)


def stop_cleanly(members: Sequence[Node]) -> None:
    """Stop servers that have had no unforeseen fault."""
    for node in members:
        assert "Traceback" not in node.said(), node.said()
        assert node.stop() == 0


def unwell(node: Node, seconds: float = 60) -> str:
    """Wait until /health says that something is wrong; what it says."""
    reasons: list[str] = []

    def is_unwell() -> bool:
        answer = requests.get(f"{node.url}/health", timeout=HANG_S)
        if answer.status_code == 503:
            reasons.append(answer.json()["reason"])
        return answer.status_code == 503

    until(is_unwell, seconds)
    return reasons[0]


# ---- A load that goes on whatever happens to the servers -------------------------------------------------------------


class Sent(NamedTuple):
    n: int
    flow: str
    key: str | None
    callback: str | None
    pause: float


class Answered(NamedTuple):
    at: float
    seconds: float
    status: int  # 0: the connection broke


class Load:
    """Clients that submit to whichever node answers; what has a key is sent again until it is accepted."""

    def __init__(self, members: list[Node], hook: str | None, threads: int = 6, seed: int = 20260417) -> None:
        self.members, self.hook = members, hook
        self.accepted: dict[str, Sent] = {}
        self.answers: list[Answered] = []
        self.odd: list[str] = []  # answers that are neither 202 nor 503
        self.replayed = 0
        self._numbers = itertools.count()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._submit) for _ in range(threads)]

    def _next(self) -> Sent:
        with self._lock:
            n = next(self._numbers)
            flow = "nap" if n % 10 == 0 else "chain" if n % 2 else "single"
            pause = 0.3 if self._random.random() < 0.05 else 0.002
            return Sent(n, flow, f"key-{n}" if n % 4 else None, self.hook if n % 3 else None, pause)

    def _submit(self) -> None:
        session = requests.Session()
        session.trust_env = False
        while not self._stop.is_set():
            sent = self._next()
            while not self._try(session, sent) and sent.key and not self._stop.is_set():
                self._stop.wait(0.02)  # as a client that is no storm itself

    def _try(self, session: requests.Session, sent: Sent) -> bool:
        node = self._random.choice(self.members)
        query = {"n": sent.n, "pause": sent.pause} | ({"callbackUrl": sent.callback} if sent.callback else {})
        headers = {"Idempotency-Key": sent.key} if sent.key else {}
        began, status = time.monotonic(), 0
        try:
            answer = session.get(
                f"{node.url}/api/publishingAsync/{sent.flow}", params=query, headers=headers, timeout=HANG_S
            )
            status = answer.status_code
            if status not in (202, 503):
                self.odd.append(f"{node.name}: {status} {answer.text}")
        except requests.ReadTimeout:
            self.odd.append(f"{node.name} hangs")
        except requests.RequestException:
            pass
        with self._lock:
            self.answers.append(Answered(began, time.monotonic() - began, status))
            if status == 202:
                known = self.accepted.setdefault(answer.json()["id"], sent)
                if known != sent:
                    self.odd.append(f"{answer.json()['id']} was given to {known} and to {sent}")
                self.replayed += "Idempotency-Replayed" in answer.headers
        return status == 202

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG_S + 5)

    def reach(self, count: int, seconds: float = 60) -> None:
        """Wait until so many more jobs are accepted."""
        target = len(self.accepted) + count
        until(lambda: len(self.accepted) >= target or self.odd, seconds)
        assert not self.odd, self.odd[:5]

    def refused(self, since: float) -> float:
        """Seconds from the first to the last answer 503 behind a moment; 0 if there was none."""
        moments = [answer.at + answer.seconds for answer in self.answers if answer.status == 503 and answer.at >= since]
        return max(moments) - min(moments) if moments else 0

    def figures(self) -> dict[str, Any]:
        return {
            "accepted": len(self.accepted),
            "replayed": self.replayed,
            "answers": dict(Counter(answer.status for answer in self.answers)),
            "slowest answer s": round(max(answer.seconds for answer in self.answers), 2),
        }

    def deliveries(self, peer: Peer) -> dict[int, int]:
        """How many jobs there are by the times that their callback came."""
        came = peer.callbacks()
        return dict(Counter(len(came[job_id]) for job_id, sent in self.accepted.items() if sent.callback))

    def check(self, api: Api, folder: Path, peer: Peer, *, paused: bool = False) -> dict[str, Any]:
        """Every promise about what was accepted holds; the documents of all jobs.

        A process that was `paused` does, when it wakes, what it was about to do then: one step of a run, which another
        node may have repeated meanwhile.
        """
        assert not self.odd, self.odd[:5]
        ended(api)
        found, effects = documents(api), marks(folder)
        assert self.accepted.keys() <= found.keys(), "a job was lost"
        with ThreadPoolExecutor(4) as pool:
            completed = [job_id for job_id in self.accepted if found[job_id]["status"] == "Completed"]
            results = dict(zip(completed, pool.map(lambda job_id: Api(api.url).result(job_id), completed), strict=True))
        for job_id, sent in self.accepted.items():
            document, seen = found[job_id], [mark.what for mark in effects[job_id]]
            if document["status"] != "Completed":  # the promise has one exception
                assert (document["error"]["code"], document["attempt"]) == ("interrupted", 3), document
                continue
            assert results[job_id] == {"n": sent.n, "job": job_id, "said": f"second of {job_id}"}
            assert list(dict.fromkeys(seen)) == (["second"] if sent.flow == "single" else ["first", "second"])
            for pid in {mark.pid for mark in effects[job_id]} if paused else (None,):
                order = [mark.what for mark in effects[job_id] if pid in (None, mark.pid)]
                assert order == sorted(order), f"a step with saved output was repeated: {effects[job_id]}"
            assert Counter(seen).most_common(1)[0][1] <= document["attempt"]
        keys = Counter(sent.key for sent in self.accepted.values() if sent.key)
        assert set(keys.values()) == {1}, "one key, two jobs"
        owed = {job_id for job_id, sent in self.accepted.items() if sent.callback}
        until(lambda: owed <= peer.callbacks().keys(), 60)
        assert {job_id: {f"msg_{job_id}"} for job_id in owed} == {
            job_id: set(ids) for job_id, ids in peer.callbacks().items() if job_id in owed
        }
        bodies: dict[str, set[bytes]] = defaultdict(set)
        for call in peer.calls:
            bodies[call.headers["webhook-id"]].add(call.body)
        assert {len(same) for same in bodies.values()} == {1}, "one callback said two things"
        return found


# ---- Nodes that die ------------------------------------------------------------------------------------------------


def test_a_node_that_is_killed_leaves_its_jobs_to_the_others(folder: Path, database: str) -> None:
    with nodes(folder, database, ["a", "b"], *LEASE) as (a, b):
        running, sleeping = hold(a), a.api.submit("/nap", n=1)
        until(lambda: a.api.counts()["waiting"] == 1)
        killed, others = time.monotonic(), a.pid
        a.kill()
        until(lambda: any(mark.pid == b.pid for mark in marks(folder)[running]), 40)
        taken = next(mark.at for mark in marks(folder)[running] if mark.pid == b.pid) - killed
        (folder / "go").touch()
        assert b.api.finished(running)["attempt"] == 2
        assert b.api.finished(sleeping)["attempt"] == 1
        assert done(folder, sleeping) == ["first", "second"]
        assert marks(folder)[running][0].pid == others
    say("taken over", lease_s=LEASE_S, after_s=round(taken, 2))
    assert taken < LEASE_S + 2


def test_a_storm_of_kills_breaks_no_promise(folder: Path, database: str) -> None:
    chance = random.Random(20260417)
    killed: dict[int, float] = {}  # pid: when
    seen: dict[str, tuple[Any, int]] = {}  # finished jobs: the document and how many side effects, at that time
    with Peer() as peer, nodes(folder, database, ["a", "b", "c"], *LEASE, "--log-level", "warning") as members:
        with Load(members, f"{peer.url}/hook") as load:
            while len(load.accepted) < 2000 or len(killed) < 10:
                assert not load.odd, load.odd[:5]
                assert len(killed) < 300, "jobs are not accepted"
                time.sleep(1)  # between two kills, as the plan says
                node = chance.choice(members)
                pid, at = node.pid, time.monotonic()
                node.kill()
                killed[pid] = at
                node.begin()
                for other in members:
                    if other is not node:
                        remember(other, folder, seen)
                        break
        for node in members:
            node.ready()
        found = load.check(members[0].api, folder, peer)
        stop_cleanly(members)
    effects = marks(folder)
    for job_id, (document, count) in seen.items():
        assert (found[job_id]["finishedAt"], found[job_id]["attempt"]) == (document["finishedAt"], document["attempt"])
        assert len(effects[job_id]) == count, "a finished job ran again"
    takeovers = [
        later.at - killed[earlier.pid]
        for job_id in load.accepted
        for earlier, later in itertools.pairwise(effects[job_id])
        if earlier.pid != later.pid and earlier.pid in killed
    ]
    say(
        "storm of kills",
        kills=len(killed),
        **load.figures(),
        attempts=dict(Counter(found[job_id]["attempt"] for job_id in load.accepted)),
        ends=dict(Counter(found[job_id]["status"] for job_id in load.accepted)),
        callbacks=load.deliveries(peer),
        takeovers=len(takeovers),
        median_s=round(statistics.median(takeovers), 2),
        worst_s=round(max(takeovers), 2),
        seen_finished=len(seen),
    )


def test_nodes_of_one_name_are_two_nodes(folder: Path, database: str) -> None:
    with nodes(folder, database, ["same", "same"], *LEASE) as (a, b):
        jobs = [hold(a), hold(b)]
        a.kill()
        until(lambda: any(mark.pid == b.pid for mark in marks(folder)[jobs[0]]), 40)
        (folder / "go").touch()
        assert [b.api.finished(job_id)["attempt"] for job_id in jobs] == [2, 1]


def test_a_node_that_stops_hands_its_jobs_over_at_once(folder: Path, database: str) -> None:
    arguments = ("--lease", "1h", "--workers", "2", "--shutdown-timeout", "500ms")
    with nodes(folder, database, ["a", "b"], *arguments) as (a, b):
        running, sleeping = hold(a), a.api.submit("/nap", n=1)
        until(lambda: a.api.counts()["waiting"] == 1)
        queued = [a.api.submit("/chain", n=n) for n in range(20)]
        stopped = time.monotonic()
        assert a.stop() == 0
        until(lambda: any(mark.pid == b.pid for mark in marks(folder)[running]))
        taken = next(mark.at for mark in marks(folder)[running] if mark.pid == b.pid) - stopped
        (folder / "go").touch()
        assert b.api.finished(running)["attempt"] == 1  # a stop is no crash
        for job_id in (sleeping, *queued):
            assert b.api.finished(job_id)["attempt"] == 1
            assert done(folder, job_id) == ["first", "second"]
    say("handed over by a node that stops", after_s=round(taken, 2), of_which_shutdown_timeout_s=0.5)


def test_a_callback_on_its_way_when_its_node_dies_is_sent_by_another(folder: Path, database: str) -> None:
    with Peer(delay_s=3600) as peer, nodes(folder, database, ["a"], *LEASE) as (a,):
        job_id = a.api.submit("/single", n=1, callbackUrl=f"{peer.url}/hook")
        until(lambda: peer.calls)
        killed = time.monotonic()
        a.kill()
        peer.delay_s = 0
        with nodes(folder, database, ["b"], *LEASE) as (b,):
            until(lambda: b.api.job(job_id)["callback"]["state"] == "delivered", 40)
            again = peer.calls[1].at - killed
        assert peer.callbacks() == {job_id: [f"msg_{job_id}"] * 2}
        assert peer.calls[0].body == peer.calls[1].body
        assert len(marks(folder)[job_id]) == 1
    say("callback sent by another node", after_s=round(again, 2))


def test_a_storm_of_all_that_can_happen_breaks_no_promise(folder: Path, seed: int = 20261129) -> None:
    chance = random.Random(seed)
    with ExitStack() as stack:
        cluster = Cluster.made()
        stack.callback(cluster.remove)
        peer = stack.enter_context(Peer())
        proxies = [stack.enter_context(Proxy(cluster.address)) for _ in range(3)]
        members = [
            stack.enter_context(Node(folder, name, database_url([("127.0.0.1", proxy.port)]), *LEASE))
            for name, proxy in zip("abc", proxies, strict=True)
        ]
        for node in members:
            node.begin()
        for node in members:
            node.ready()
        with Load(members, f"{peer.url}/hook") as load:
            events = ["killed", "paused", "refuse", "silence", "database"] * 3
            chance.shuffle(events)
            for what in events:
                which = chance.randrange(3)
                node, proxy = members[which], proxies[which]
                seconds = chance.uniform(0.2, LEASE_S + 2)
                if what == "killed":
                    node.kill()
                    node.begin()
                    node.ready()
                elif what == "paused":
                    node.pause()
                    time.sleep(seconds)  # the length of what happens is what is tried
                    node.resume()
                elif what == "database":
                    cluster.stop("immediate")
                    cluster.start()
                else:
                    proxy.cut(what)
                    time.sleep(seconds)
                    proxy.mend()
                for other in members:
                    well(other)
        found = load.check(members[0].api, folder, peer, paused=True)
        stop_cleanly(members)
        assert cluster.query("SELECT count(*) FROM steps") == [(0,)]
    say(
        "storm of all that can happen",
        **load.figures(),
        attempts=dict(Counter(found[job_id]["attempt"] for job_id in load.accepted)),
        callbacks=load.deliveries(peer),
    )


def remember(node: Node, folder: Path, seen: dict[str, tuple[Any, int]]) -> None:
    """Keep some finished jobs as they are now."""
    try:
        found = requests.get(f"{node.url}/api/jobs?status=Completed&limit=30", timeout=5).json().get("jobs", [])
    except requests.RequestException:
        return
    effects = marks(folder)  # behind the look: no more may come to these
    for document in found:
        seen.setdefault(document["id"], (document, len(effects[document["id"]])))


def test_a_node_that_wakes_past_its_lease_changes_nothing_and_says_so(folder: Path, database: str) -> None:
    with Peer() as peer, nodes(folder, database, ["a", "b"], *LEASE) as (a, b):
        running = hold(a, callbackUrl=f"{peer.url}/hook")
        open_still = hold(a, gate="never")
        a.pause()
        until(lambda: {b.pid} <= {mark.pid for job in (running, open_still) for mark in marks(folder)[job]}, 40)
        (folder / "go").touch()
        ended_there = b.api.finished(running)
        until(lambda: b.api.job(running)["callback"]["state"] == "delivered")
        assert ended_there["attempt"] == 2
        a.resume()
        until(lambda: "lease" in a.said("warning"), 20)
        well(a)
        new = a.api.submit("/single", n=1)
        assert a.api.finished(new)["attempt"] == 1
        for node in (a, b):
            assert node.api.job(running) | {"callback": None} == ended_there | {
                "callback": None,
                **{name: node.api.job(running)[name] for name in ("statusUrl", "resultUrl")},
            }
            assert node.api.result(running) == "through"
        assert done(folder, running).count("after") == 1
        assert b.api.job(open_still)["status"] == "Running"
        assert b.api.job(open_still)["attempt"] == 2
        (folder / "never").touch()
        assert b.api.finished(open_still)["attempt"] == 2
        assert done(folder, open_still).count("after") == 1
        assert peer.callbacks() == {running: [f"msg_{running}"]}
        warning = a.said("warning")
    say("woken past its lease", said=warning)


# ---- Clocks and versions ---------------------------------------------------------------------------------------------


def test_clocks_that_are_hours_apart_change_nothing(folder: Path, database: str) -> None:
    with ExitStack() as stack:
        peer = stack.enter_context(Peer())
        peer.status = 500
        arguments = (*LEASE, "--retention", "30m")
        members = [
            stack.enter_context(Node(folder, name, database, *arguments, clock_s=hours * 3600))
            for name, hours in (("late", -1), ("right", 0), ("early", 1))
        ]
        for node in members:
            node.begin()
        for node in members:
            node.ready()
        now = time.time()
        held = [hold(node, callbackUrl=f"{peer.url}/hook") for node in members]
        naps = [node.api.submit("/nap", n=n) for n, node in enumerate(members)]
        for n, job_id in enumerate(naps):
            for node in members:
                document = node.api.finished(job_id)
                assert document["attempt"] == 1
                assert node.api.result(job_id)["n"] == n
                assert abs(moment(document["createdAt"]) - now) < 60
                assert moment(document["finishedAt"]) - moment(document["createdAt"]) >= 0.5
                assert abs(moment(document["expiresAt"]) - now - 1800) < 60
        assert max(naps) > max(held)  # ids sort by one clock
        until(lambda: time.time() > now + LEASE_S + 2)  # by then a lease by a wrong clock would be over
        (folder / "go").touch()
        for job_id in held:
            for node in members:
                assert node.api.finished(job_id)["attempt"] == 1
        until(lambda: all(len(ids) > 1 for ids in peer.callbacks().values()) and len(peer.callbacks()) == 3)
        peer.status = 204
        until(lambda: all(members[0].api.job(job_id)["callback"]["state"] == "delivered" for job_id in held))
        assert all(abs(int(call.headers["webhook-timestamp"]) - now) < 120 for call in peer.calls)
        for job_id in (*held, *naps):
            assert {mark.pid for mark in marks(folder)[job_id]} <= {node.pid for node in members}
            assert len({mark.pid for mark in marks(folder)[job_id]}) == 1, "a job moved"


def moment(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def test_during_a_rolling_upgrade_a_node_runs_only_what_it_knows(folder: Path, cluster: Cluster, database: str) -> None:
    version = {n: get_flow("/common", steps=[marking("first")], response={"body": n}) for n in (1, 2)}
    write(folder / "old", {"common": version[1], "held": FLOWS["held"]})
    write(folder / "new", {"common": version[2], "held": FLOWS["held"], "fresh": SINGLE})
    with ExitStack() as stack:
        old = stack.enter_context(Node(folder, "old", database, *LEASE, "--flows", "old")).start()
        new = stack.enter_context(
            Node(folder, "new", database, *LEASE, "--flows", "new", "--workers", "1", "--shutdown-timeout", "1s")
        ).start()
        occupied = hold(new, gate="never")
        fresh = [new.api.submit("/single", n=n) for n in range(3)]
        # There is no room on the new node: whoever knows the flow runs it, and as it was when it was submitted.
        common = new.api.submit("/common")
        assert new.api.finished(common)["attempt"] == 1
        assert new.api.result(common) == 2
        assert marks(folder)[common][0].pid == old.pid
        assert old.api.result(old.api.finished(old.api.submit("/common"))["id"]) == 1
        new.kill()
        until(lambda: any(mark.pid == old.pid for mark in marks(folder)[occupied]), 40)  # its lease is over
        for _ in range(20):
            old.api.finished(old.api.submit("/common"))
        for job_id in fresh:
            assert (old.api.job(job_id)["status"], old.api.job(job_id)["startedAt"]) == ("Running", None)
        new.start()
        for n, job_id in enumerate(fresh):
            assert new.api.finished(job_id)["attempt"] == 1
            assert old.api.result(job_id)["n"] == n
            assert {mark.pid for mark in marks(folder)[job_id]} == {new.pid}


# ---- Any node serves any job -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Node]]:
    """A pair of nodes for what leaves them unharmed."""
    folder = tmp_path_factory.mktemp("two")
    write(folder / "flows", FLOWS)
    with nodes(folder, cluster.create("two"), ["a", "b"], *LEASE) as (a, b):
        yield a, b


def test_a_long_poll_on_one_node_ends_with_the_job_on_another(two: tuple[Node, Node]) -> None:
    a, b = two
    job_id = hold(a, gate="poll")
    begun = threading.Event()

    def poll(path: str) -> tuple[float, requests.Response]:
        begun.set()
        answer = requests.get(f"{b.url}/api/jobs/{job_id}/{path}", headers={"Prefer": "wait=20"}, timeout=HANG_S)
        return time.monotonic(), answer

    with ThreadPoolExecutor(2) as pool:
        status, result = pool.submit(poll, "status"), pool.submit(poll, "result")
        assert begun.wait(5)
        until(lambda: b.api.job(job_id)["progress"] is not None)  # as of the last renewal
        time.sleep(0.2)  # the polls are under way
        gone = time.monotonic()
        (a.folder / "poll").touch()
        told, answer = status.result()
        assert answer.json()["status"] == "Completed"
        assert result.result()[1].json() == "through"
    say("long poll elsewhere", after_s=round(told - gone, 3))
    assert told - gone < 5


def test_a_job_is_cancelled_through_another_node(two: tuple[Node, Node]) -> None:
    a, b = two
    job_id = hold(a, gate="cancel")
    began = time.monotonic()
    answer = b.api.session.post(f"{b.url}/api/jobs/{job_id}/cancel", timeout=HANG_S)
    assert answer.status_code in (200, 202), answer.text
    for node in two:
        document = node.api.job(job_id, wait=15)
        assert (document["status"], document["error"]["code"]) == ("Error", "cancelled")
    say("cancelled elsewhere", code=answer.status_code, after_s=round(time.monotonic() - began, 3))
    assert "after" not in done(a.folder, job_id)
    again = b.api.session.post(f"{b.url}/api/jobs/{job_id}/cancel", timeout=HANG_S)
    assert again.status_code == 409


def test_a_job_that_waits_is_cancelled_through_another_node(two: tuple[Node, Node]) -> None:
    a, b = two
    job_id = a.api.submit("/later")
    until(lambda: done(a.folder, job_id) == ["first"])
    answer = b.api.session.post(f"{b.url}/api/jobs/{job_id}/cancel", timeout=HANG_S)
    assert answer.status_code == 200, answer.text
    assert answer.json()["error"]["code"] == "cancelled"
    assert a.api.job(job_id, wait=5)["status"] == "Error"


def test_results_lists_and_details_are_the_same_on_every_node(two: tuple[Node, Node]) -> None:
    a, _ = two
    job_id, large = a.api.submit("/chain", n=7), a.api.submit("/large")
    for node in two:
        assert node.api.finished(job_id)["attempt"] == 1
        assert node.api.result(job_id) == {"n": 7, "job": job_id, "said": f"second of {job_id}"}
        node.api.finished(large)
        assert node.api.result(large) == "xyz" * 1_000_000
        part = node.api.session.get(
            f"{node.url}/api/jobs/{large}/result", headers={"Range": "bytes=2999990-"}, timeout=HANG_S
        )
        assert (part.status_code, part.text) == (206, ("xyz" * 1_000_000 + '"\n')[2999989:])
    lists = [documents(node.api) for node in two]
    assert lists[0].keys() == lists[1].keys() >= {job_id, large}
    details = [node.api.session.get(f"{node.url}/api/jobs/{job_id}", timeout=HANG_S).json() for node in two]
    assert details[0]["steps"] == details[1]["steps"] != []


def test_a_job_is_run_again_and_deleted_through_another_node(two: tuple[Node, Node]) -> None:
    a, b = two
    job_id = hold(a, gate="again")
    for verb, path in (("POST", "/rerun"), ("DELETE", "")):
        refused = b.api.session.request(verb, f"{b.url}/api/jobs/{job_id}{path}", timeout=HANG_S)
        assert refused.status_code == 409, refused.text
    (a.folder / "again").touch()
    b.api.finished(job_id)
    answer = b.api.session.post(f"{b.url}/api/jobs/{job_id}/rerun", timeout=HANG_S)
    assert answer.status_code == 202, answer.text
    assert a.api.finished(answer.json()["id"])["id"] != job_id
    assert b.api.session.delete(f"{b.url}/api/jobs/{job_id}", timeout=HANG_S).status_code == 204
    assert a.api.session.get(f"{a.url}/api/jobs/{job_id}/status", timeout=HANG_S).status_code == 404


def test_a_callback_is_sent_again_through_another_node(two: tuple[Node, Node]) -> None:
    a, b = two
    with Peer() as peer:
        job_id = a.api.submit("/single", n=1, callbackUrl=f"{peer.url}/hook")
        until(lambda: a.api.job(job_id)["callback"]["state"] == "delivered")
        answer = b.api.session.post(f"{b.url}/api/jobs/{job_id}/callback", timeout=HANG_S)
        assert answer.status_code == 202, answer.text
        until(lambda: peer.callbacks()[job_id] == [f"msg_{job_id}"] * 2)
        assert peer.calls[0].body == peer.calls[1].body
        until(lambda: a.api.job(job_id)["callback"]["state"] == "delivered")


def test_a_deployment_reaches_every_node(folder: Path, database: str) -> None:
    flow = get_flow("/put", response={"body": "put"})
    token = {"Authorization": "Bearer secret-of-the-admin"}
    secret = {"ASTERA_LITE_TOKEN": "secret-of-the-admin"}
    with nodes(folder, database, ["a", "b"], *LEASE, env=secret) as (a, b):

        def call(method: str, node: Node, path: str, **more: Any) -> int:
            answer = requests.request(method, node.url + path, timeout=HANG_S, **{"headers": token, **more})
            return answer.status_code

        began = time.monotonic()
        assert call("PUT", a, "/api/deployments/put", json=flow) == 201
        until(lambda: call("GET", b, "/api/publishing/put") == 200)
        deployed = time.monotonic() - began
        began = time.monotonic()
        assert call("DELETE", b, "/api/deployments/put") == 204
        until(lambda: call("GET", a, "/api/publishing/put") == 404)
        gone = time.monotonic() - began
    say("deployed elsewhere", after_s=round(deployed, 3), out_of_service_after_s=round(gone, 3))


def test_one_key_sent_to_two_nodes_at_once_makes_one_job(two: tuple[Node, Node]) -> None:
    together = threading.Barrier(4)

    def submit(node: Node, key: str, n: int) -> requests.Response:
        together.wait(10)
        return requests.get(
            f"{node.url}/api/publishingAsync/chain?n={n}", headers={"Idempotency-Key": key}, timeout=HANG_S
        )

    with ThreadPoolExecutor(4) as pool:
        for n in range(30):
            answers = list(pool.map(submit, two * 2, [f"at-once-{n}"] * 4, [n] * 4))
            assert {answer.status_code for answer in answers} == {202}, [answer.text for answer in answers]
            assert len({answer.json()["id"] for answer in answers}) == 1
            assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
        answers = list(pool.map(submit, two * 2, ["differs"] * 4, range(4)))
        assert sorted(answer.status_code for answer in answers) == [202, 422, 422, 422]
    stored = [document for document in documents(two[0].api).values() if document["flow"] == "chain"]
    for document in stored:
        two[0].api.finished(document["id"])
        assert Counter(done(two[0].folder, document["id"])) == {"first": 1, "second": 1}


# ---- Limits over all nodes -------------------------------------------------------------------------------------------


def limited(limit: int, **more: Any) -> dict[str, Any]:
    steps = [marking("begin", 0.05), marking("end")]
    return get_flow("/limited", steps=steps, concurrency={"limit": limit, **more})


def most_at_once(folder: Path, jobs: list[str]) -> int:
    """How many of these jobs were between their first and their last side effect at one time."""
    events = []
    for job_id in jobs:
        first, *_, last = marks(folder)[job_id]
        events += [(first.at, 1), (last.at, -1)]
    return max(itertools.accumulate(change for _, change in sorted(events)))


def test_a_limit_of_concurrent_runs_holds_over_all_nodes(folder: Path, database: str) -> None:
    write(folder / "flows", {"limited": limited(2)})
    with nodes(folder, database, ["a", "b", "c"], *LEASE) as members:
        began = time.monotonic()
        jobs = [node.api.submit("/limited") for _ in range(6) for node in members]
        for job_id in jobs:
            assert members[0].api.finished(job_id)["attempt"] == 1
        took = time.monotonic() - began
        assert most_at_once(folder, jobs) == 2
        assert all(done(folder, job_id) == ["begin", "end"] for job_id in jobs)
        ran_on = Counter(marks(folder)[job_id][0].pid for job_id in jobs)
    say("limit of 2 over 3 nodes", jobs=len(jobs), took_s=round(took, 2), by_node=sorted(ran_on.values()))


def call(node: Node, path: str) -> requests.Response:
    """A synchronous call."""
    return requests.get(f"{node.url}/api/publishing{path}", timeout=HANG_S)


@pytest.mark.parametrize("limit", [1, 2])
def test_calls_and_jobs_on_all_nodes_share_a_limit(folder: Path, database: str, limit: int) -> None:
    write(folder / "flows", {"limited": limited(limit) | {"response": {"body": "${request.id}"}}})
    with nodes(folder, database, ["a", "b"], *LEASE) as members, ThreadPoolExecutor(16) as pool:
        began = time.monotonic()
        answers = [pool.submit(call, node, "/limited") for _ in range(10) for node in members]
        jobs = [node.api.submit("/limited") for _ in range(10) for node in members]
        for answer in answers:
            assert answer.result().status_code == 200, answer.result().text
        calls_took = time.monotonic() - began
        for job_id in jobs:
            assert members[0].api.finished(job_id)["attempt"] == 1
        took = time.monotonic() - began
        calls = [answer.result().json() for answer in answers]
        assert most_at_once(folder, [*calls, *jobs]) == limit
        assert all(done(folder, each) == ["begin", "end"] for each in [*calls, *jobs])
        ran_on = Counter(marks(folder)[each][0].pid for each in [*calls, *jobs])
        assert all(node.stop() == 0 for node in members)
    say(
        f"limit of {limit} over 2 nodes",
        **{"calls": len(calls), "jobs": len(jobs), "calls_took_s": round(calls_took, 2), "took_s": round(took, 2)},
        by_node=sorted(ran_on.values()),
    )


def test_calls_wait_in_their_order_and_go_before_jobs(folder: Path, database: str) -> None:
    flow = get_flow("/one", request=GATE, steps=[HOLD], response={"body": "${request.id}"}, concurrency=1)
    write(folder / "flows", {"one": flow})
    with nodes(folder, database, ["a", "b"], *LEASE) as (a, b), ThreadPoolExecutor(4) as pool:
        first = hold_call(pool, a, folder)
        job_id, waiting = a.api.submit("/one"), []
        for n, node in enumerate((b, a, b), 2):
            waiting.append(pool.submit(call, node, "/one"))
            until(lambda n=n: calls_counted(database) == n)  # type: ignore[misc]
        (folder / "go").touch()
        order = [answer.result().json() for answer in (first, *waiting)]
        a.api.finished(job_id)
        assert list(marks(folder)) == [*order, job_id]
        assert calls_counted(database) == 0


def calls_counted(database: str) -> int:
    """How many calls of flows with a limit the database knows."""
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM calls").fetchone()
    assert row is not None
    return int(row[0])


def hold_call(pool: ThreadPoolExecutor, node: Node, folder: Path, path: str = "/one") -> Future[requests.Response]:
    """A call that runs on this node until a file is there."""
    before = len(marks(folder))
    answer = pool.submit(call, node, path)
    until(lambda: len(marks(folder)) > before)
    return answer


def test_a_killed_node_gives_back_the_places_of_its_calls(folder: Path, database: str) -> None:
    flow = get_flow("/one", request=GATE, steps=[HOLD], concurrency=1)
    write(folder / "flows", {"one": flow})
    with nodes(folder, database, ["a", "b"], *LEASE) as (a, b), ThreadPoolExecutor(4) as pool:
        hold_call(pool, a, folder)
        pool.submit(call, a, "/one")  # it waits, and is before the other's
        until(lambda: calls_counted(database) == 2)
        waiting = pool.submit(call, b, "/one")
        until(lambda: calls_counted(database) == 3)
        killed = time.monotonic()
        a.kill()
        until(lambda: len(marks(folder)) == 2, LEASE_S + 20)
        took = next(mark.at for each in marks(folder).values() for mark in each if mark.pid == b.pid) - killed
        (folder / "go").touch()
        assert waiting.result().status_code == 200
    say("place of a killed node's call", lease_s=LEASE_S, after_s=round(took, 2))
    assert took < LEASE_S + 2


def test_a_node_that_stops_answers_its_calls_and_gives_back_their_places(folder: Path, database: str) -> None:
    flow = get_flow("/one", request=GATE, steps=[HOLD], concurrency=1)
    write(folder / "flows", {"one": flow})
    arguments = ("--lease", "1h", "--shutdown-timeout", "20s")
    with nodes(folder, database, ["a", "b"], *arguments) as (a, b), ThreadPoolExecutor(4) as pool:
        running = hold_call(pool, a, folder)
        waiting = [pool.submit(call, b, "/one")]
        until(lambda: calls_counted(database) == 2)
        waiting.append(pool.submit(call, a, "/one"))
        until(lambda: calls_counted(database) == 3)
        stopped = pool.submit(a.stop)
        (folder / "go").touch()
        assert [answer.result().status_code for answer in (running, *waiting)] == [200] * 3
        assert stopped.result() == 0
        assert call(b, "/one").status_code == 200


def test_a_node_that_stops_with_calls_that_do_not_end_gives_back_their_places(folder: Path, database: str) -> None:
    flow = get_flow("/one", request=GATE, steps=[HOLD], concurrency=1)
    write(folder / "flows", {"one": flow})
    arguments = ("--lease", "1h", "--shutdown-timeout", "500ms")
    with nodes(folder, database, ["a", "b"], *arguments) as (a, b), ThreadPoolExecutor(4) as pool:
        hold_call(pool, a, folder)
        waiting = pool.submit(call, b, "/one")
        until(lambda: calls_counted(database) == 2)
        assert a.stop() == 0
        until(lambda: len(marks(folder)) == 2)
        (folder / "go").touch()
        assert waiting.result().status_code == 200


def test_a_limit_that_refuses_counts_calls_over_all_nodes(folder: Path, database: str) -> None:
    rule = {"limit": 2, "whenFull": "refuse"}
    flows = {
        "one": get_flow("/one", request=GATE, steps=[HOLD], concurrency=rule),
        "quick": get_flow("/quick", steps=[marking("begin")], concurrency=rule | {"limit": 1}),
    }
    write(folder / "flows", flows)
    with nodes(folder, database, ["a", "b"], *LEASE) as (a, b), ThreadPoolExecutor(4) as pool:
        running = hold_call(pool, a, folder)
        job_id = b.api.submit("/one")
        refused = [call(a, "/one"), call(b, "/one")]
        refused += [requests.get(f"{node.url}/api/publishingAsync/one", timeout=HANG_S) for node in (a, b)]
        assert [answer.status_code for answer in refused] == [429] * 4
        assert {answer.json()["detail"] for answer in refused} == {
            "The flow has reached its limit of concurrent runs (2). Try again later."
        }
        assert all("Retry-After" in answer.headers for answer in refused)
        (folder / "go").touch()
        assert running.result().status_code == 200
        b.api.finished(job_id)
        for node in (a, b) * 20:  # who sees the end of a call may call any server
            assert call(node, "/quick").status_code == 200


def test_a_limit_that_refuses_counts_over_all_nodes(folder: Path, database: str) -> None:
    refusing = get_flow("/one", request=GATE, steps=[HOLD], concurrency={"limit": 2, "whenFull": "refuse"})
    write(folder / "flows", {"one": refusing})
    with nodes(folder, database, ["a", "b", "c"], *LEASE) as members, ThreadPoolExecutor(9) as pool:
        answers = list(
            pool.map(lambda node: requests.get(f"{node.url}/api/publishingAsync/one", timeout=HANG_S), members * 3)
        )
        assert sorted(answer.status_code for answer in answers) == [202] * 2 + [429] * 7
        assert all("Retry-After" in answer.headers for answer in answers if answer.status_code == 429)
        (folder / "go").touch()
        for answer in answers:
            if answer.status_code == 202:
                members[0].api.finished(answer.json()["id"])
        assert members[1].api.finished(members[1].api.submit("/one"))["attempt"] == 1


def test_a_killed_node_gives_back_the_places_of_a_limited_flow(folder: Path, database: str) -> None:
    one = get_flow("/one", request=GATE, steps=[HOLD], concurrency=1)
    write(folder / "flows", {"one": one})
    with nodes(folder, database, ["a", "b"], *LEASE) as members:
        first = members[0].api.submit("/one")
        until(lambda: marks(folder)[first])
        owner = next(node for node in members if node.pid == marks(folder)[first][0].pid)
        other = next(node for node in members if node is not owner)
        second = other.api.submit("/one")
        owner.kill()
        until(lambda: any(mark.pid == other.pid for mark in marks(folder)[first]), 40)  # the older one is the next
        assert not marks(folder)[second]
        (folder / "go").touch()
        assert other.api.finished(first)["attempt"] == 2
        assert other.api.finished(second)["attempt"] == 1
