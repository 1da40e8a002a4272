"""A storm of kill -9 on real servers and one database; at its end, every line of the promise is checked."""

from __future__ import annotations

import itertools
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from support import PROGRAM, Api, get_flow, process, until

ROUNDS = 25  # kills; each kind in turn
JOBS = 2000  # acknowledged at the least
SEED = 20260417
READY_S = 5.0  # within which a killed server is to be ready again
KINDS = ["after 202", "inside a step", "while finishing", "callback on its way", "at the start"]
PER_ROUND = -(-JOBS // (ROUNDS - ROUNDS // len(KINDS)))  # those killed at the start take no jobs

WORK = '''
import os, time

def mark(context, job, what, pause=0.0):
    """A side effect that can be counted: one line for each time it happens."""
    file = os.open("marks", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, f"{job} {what}\\n".encode())
    os.close(file)
    time.sleep(pause)
    return f"{what} of {job}"
'''


def marking(name: str, pause: Any = 0.0) -> dict[str, Any]:
    return {
        "name": name,
        "python": {"call": "work:mark", "args": {"job": "${request.id}", "what": name, "pause": pause}},
    }


PARAMETERS = {
    "n": {"in": "query", "type": "integer", "required": True},
    "pause": {"in": "query", "type": "number", "default": 0.002},
}
FLOWS = {
    "single": get_flow(
        "/single",
        request={"parameters": PARAMETERS},
        steps=[marking("second", "${params.pause}")],
        response={"body": {"n": "${params.n}", "job": "${request.id}", "said": "${second}"}},
    ),
    "chain": get_flow(
        "/chain",
        request={"parameters": PARAMETERS},
        steps=[marking("first"), {"name": "token", "set": "${uuid()}"}, marking("second", "${params.pause}")],
        response={"body": {"n": "${params.n}", "job": "${request.id}", "said": "${second}"}},
    ),
}


class SlowSink:
    """A receiver of callbacks that keeps all that came, and answers when it is let."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, bytes]] = []  # job, webhook-id, body
        self.answers, self.came = threading.Event(), threading.Event()
        self.answers.set()
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if len(body) != int(self.headers["Content-Length"]):
                    return  # its sender was killed in the middle
                sink.got.append((json.loads(body)["id"], self.headers["webhook-id"], body))
                sink.came.set()
                sink.answers.wait(10)
                try:
                    self.send_response(204)
                    self.end_headers()
                except OSError:
                    pass  # its sender was killed meanwhile

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a killed sender resets its connection

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook"


@pytest.fixture
def slow_sink() -> Iterator[SlowSink]:
    sink = SlowSink()
    thread = threading.Thread(target=sink.server.serve_forever, args=(0.01,))
    thread.start()
    yield sink
    sink.answers.set()
    sink.server.shutdown()
    sink.server.server_close()
    thread.join(10)


class Sent(NamedTuple):
    n: int
    flow: str
    key: str | None
    callback: str | None
    pause: float

    @classmethod
    def of(cls, n: int, sink: SlowSink, pause: float = 0.002) -> Sent:
        return cls(
            n,
            "chain" if n % 2 else "single",
            f"key-{n}" if n % 4 < 2 else None,
            sink.url if n % 3 else None,
            pause,
        )


class Storm:
    """What the clients know: acknowledged jobs, what was seen finished, and what is open."""

    def __init__(self, folder: Path, sink: SlowSink) -> None:
        self.folder, self.sink = folder, sink
        self.random = random.Random(SEED)
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.accepted: dict[str, Sent] = {}
        self.unanswered: list[Sent] = []  # with a key: they are sent again
        self.seen: dict[str, tuple[Any, Any, Counter[str]]] = {}  # finished: document, result, marks at that time
        self.replayed = 0
        self.ready_s: list[float] = []
        self.kills: Counter[str] = Counter()
        self.url = ""

    def send(self, api: Api, sent: Sent) -> str | None:
        """Submit; the id, or None if the server died before it answered."""
        query = {"n": sent.n, "pause": sent.pause} | ({"callbackUrl": sent.callback} if sent.callback else {})
        headers = {"Idempotency-Key": sent.key} if sent.key else {}
        try:
            answer = api.session.get(
                f"{api.url}/api/publishingAsync/{sent.flow}", params=query, headers=headers, timeout=10
            )
        except requests.RequestException:
            if sent.key:
                with self.lock:
                    self.unanswered.append(sent)
            return None
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        with self.lock:
            known = self.accepted.setdefault(job_id, sent)
            assert known == sent, "an id was given twice"
            self.replayed += "Idempotency-Replayed" in answer.headers
        return job_id

    def marks(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        file = self.folder / "marks"
        for line in file.read_text().splitlines() if file.exists() else ():
            job, _, what = line.partition(" ")
            found[job].append(what)
        return found

    @contextmanager
    def server(self) -> Iterator[subprocess.Popen[str]]:
        began = time.monotonic()
        arguments = ("--workers", "8", "--callback-retries", "100ms,200ms,1s,1s,1s", "--log-level", "error")
        with process(self.folder, *arguments) as (server, self.url, lines):
            self.ready_s.append(time.monotonic() - began)
            yield server
        assert not any("Traceback" in line for line in lines), lines

    def idle(self) -> None:
        api = Api(self.url)
        until(lambda: sum(api.counts().values()) == 0, 20)

    def again(self) -> None:
        """Send again what has a key: what was not answered, and some of what was."""
        api = Api(self.url)
        unanswered, self.unanswered = self.unanswered, []
        for sent in unanswered:
            assert self.send(api, sent)
        with_key = [(job_id, sent) for job_id, sent in self.accepted.items() if sent.key]
        for job_id, sent in self.random.sample(with_key, min(5, len(with_key))):
            assert self.send(api, sent) == job_id, "another job for the same key"

    def look(self) -> None:
        """Remember some finished jobs as they are now."""
        api = Api(self.url)
        documents = api.session.get(f"{self.url}/api/jobs?status=Completed&limit=30", timeout=10).json()["jobs"]
        marks = self.marks()  # behind the look: no more may come to these
        for document in documents:
            if document["id"] not in self.seen:
                self.seen[document["id"]] = (document, api.result(document["id"]), Counter(marks[document["id"]]))

    def documents(self) -> dict[str, Any]:
        """The status document of every job that the server has."""
        found: dict[str, Any] = {}
        api, query = Api(self.url), {"limit": "1000"}
        while query.get("cursor", "") is not None:
            page = api.session.get(f"{self.url}/api/jobs", params=query, timeout=30).json()
            for document in page["jobs"]:
                assert document["id"] not in found, "an id is used twice"
                found[document["id"]] = document
            query["cursor"] = page["next"]
        return found

    def load(self, enough: Callable[[int], bool]) -> list[threading.Thread]:
        """Submit from four threads until the server dies; returns once enough is acknowledged."""
        target, reached = len(self.accepted), threading.Event()

        def submit() -> None:
            api = Api(self.url)
            while self.send(api, Sent.of(next(self.numbers), self.sink)) is not None:
                if enough(len(self.accepted) - target):
                    reached.set()

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        assert reached.wait(30)
        return threads

    def round(self, kind: str) -> None:
        self.kills[kind] += 1
        if kind == "at the start":
            self.kill_at_the_start()
            return
        with self.server() as server:
            self.idle()
            self.again()
            if kind == "callback on its way":
                self.idle()
                self.sink.came.clear()
                self.sink.answers.clear()
            threads = self.load(lambda count: count >= PER_ROUND)
            if kind == "inside a step":
                slow = [Sent.of(next(self.numbers), self.sink, 0.4) for _ in range(8)]
                ids = [self.send(Api(self.url), sent) for sent in slow]
                until(lambda: any("second" in self.marks()[job_id or ""] for job_id in ids))
                time.sleep(self.random.uniform(0, 0.1))
            elif kind == "while finishing":
                self.look()
                time.sleep(self.random.uniform(0, 0.02))
            elif kind == "callback on its way":
                assert self.sink.came.wait(10)
            server.send_signal(signal.SIGKILL)
            server.wait(10)
            self.sink.answers.set()
            for thread in threads:
                thread.join(20)

    def kill_at_the_start(self) -> None:
        command = [*PROGRAM, "--port", "0", "--workers", "8"]
        with subprocess.Popen(command, cwd=self.folder, stderr=subprocess.DEVNULL) as server:
            time.sleep(self.random.uniform(0, 0.6))
            server.kill()


def test_a_storm_of_kills_breaks_no_promise(
    tmp_path: Path, slow_sink: SlowSink, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "work.py").write_text(WORK)
    for name, tree in FLOWS.items():
        (tmp_path / "flows" / f"{name}.json").write_text(json.dumps(tree))
    storm = Storm(tmp_path, slow_sink)
    for kind in itertools.islice(itertools.cycle(KINDS), ROUNDS):
        storm.round(kind)
    with storm.server() as server:
        storm.again()
        storm.idle()
        documents = storm.documents()
        owed = {job_id for job_id, sent in storm.accepted.items() if sent.callback}
        until(lambda: owed <= {job for job, _, _ in slow_sink.got}, 20)
        with ThreadPoolExecutor(4) as pool:
            results = dict(zip(storm.accepted, pool.map(Api(storm.url).result, storm.accepted), strict=True))
        until(lambda: not pending(tmp_path), 20)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    marks = storm.marks()

    assert sum(storm.kills.values()) == ROUNDS >= 24
    assert len(storm.accepted) >= JOBS
    for job_id, sent in storm.accepted.items():
        # none lost, stuck or wrong
        assert documents[job_id]["status"] == "Completed", documents.get(job_id)
        assert results[job_id] == {"n": sent.n, "job": job_id, "said": f"second of {job_id}"}
        # every side effect happened, and none again once its step's output was saved
        assert list(dict.fromkeys(marks[job_id])) == (["first", "second"] if sent.flow == "chain" else ["second"])
        assert marks[job_id] == sorted(marks[job_id]), "a step with saved output was repeated"
        assert Counter(marks[job_id]).most_common(1)[0][1] <= documents[job_id]["attempt"]
    # what was seen finished is as it was, and did not run again
    for job_id, (document, result, marked) in storm.seen.items():
        assert (documents[job_id]["finishedAt"], documents[job_id]["attempt"]) == (
            document["finishedAt"],
            document["attempt"],
        )
        assert results.get(job_id, result) == result
        assert Counter(marks[job_id]) == marked
    # one key, one job, however often it was sent
    keys = Counter(sent.key for sent in storm.accepted.values() if sent.key)
    assert set(keys.values()) == {1}
    assert storm.replayed >= ROUNDS
    # callbacks: each at least once, always the same message
    messages = defaultdict(set)
    for job_id, webhook_id, body in slow_sink.got:
        messages[job_id].add((webhook_id, body))
    assert owed <= messages.keys()
    assert {len(same) for same in messages.values()} == {1}
    assert all(webhook_id == f"msg_{job_id}" for job_id, same in messages.items() for webhook_id, _ in same)
    assert max(storm.ready_s) < READY_S
    with closing(sqlite3.connect(tmp_path / "astera_lite.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM steps").fetchone() == (0,)

    deliveries = Counter(job_id for job_id, _, _ in slow_sink.got)
    effects = Counter((job_id, what) for job_id, all_ in marks.items() if job_id in storm.accepted for what in all_)
    figures = {
        "jobs": len(storm.accepted),
        "kills": dict(storm.kills),
        "ready after s, worst": round(max(storm.ready_s), 2),
        "side effects by times": dict(Counter(effects.values())),
        "callbacks by times": dict(Counter(deliveries[job_id] for job_id in owed)),
        "jobs by attempts": dict(Counter(documents[job_id]["attempt"] for job_id in storm.accepted)),
        "replayed": storm.replayed,
        "seen finished": len(storm.seen),
    }
    for name, value in figures.items():
        record_property(name, value)
        print(f"{name}: {value}", file=sys.stderr)


def pending(folder: Path) -> int:
    with closing(sqlite3.connect(folder / "astera_lite.db")) as database:
        count: int = database.execute("SELECT count(*) FROM callbacks WHERE state = 'pending'").fetchone()[0]
        return count
