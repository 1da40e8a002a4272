"""What a killed, a stopped and a second server leave: real processes, one database."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from support import PROGRAM, ROOT, Api, Sink, get_flow, process, until

from astera_lite import SqliteStore

WORK = '''
import os, time

def boom(context):
    mark(context, 5)
    raise ValueError("it went wrong")

def mark(context, n, pause=0.0):
    """A side effect that can be counted: one line for each time it happens."""
    with open("marks", "ab", 0) as file:
        file.write(b"%d\\n" % n)
    time.sleep(pause)
    return n * 2

def deaf(context):
    """Runs until the process ends."""
    while True:
        mark(context, 3, 0.02)

def held(context):
    """Runs until a file is there."""
    mark(context, 7)
    while not os.path.exists("go") and not context.cancelled:
        time.sleep(0.005)
    return "through"
'''
N = {"request": {"parameters": {"n": {"in": "query", "type": "integer", "required": True}}}}
MARK = {"name": "twice", "python": {"call": "work:mark", "args": {"n": "${params.n}", "pause": 0.004}}}
FLOWS = {
    "work": get_flow("/work", steps=[MARK], response={"body": {"n": "${params.n}", "twice": "${twice}"}}, **N),
    "late": get_flow(
        "/late",
        steps=[MARK, {"name": "id", "set": "${uuid()}"}, {"name": "w", "wait": "1500ms"}],
        response={"body": {"n": "${params.n}", "twice": "${twice}"}},
        **N,
    ),
    "held": get_flow("/held", steps=[{"name": "h", "python": "work:held"}], response={"body": "${h}"}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "work.py").write_text(WORK)
    for name, tree in FLOWS.items():
        write(tmp_path, name, tree)
    return tmp_path


def write(folder: Path, name: str, tree: dict[str, Any]) -> None:
    (folder / "flows" / f"{name}.json").write_text(json.dumps(tree))


def marks(folder: Path) -> Counter[int]:
    file = folder / "marks"
    return Counter(map(int, file.read_text().split())) if file.exists() else Counter()


def test_a_kill_loses_no_job_and_repeats_no_finished_one(folder: Path) -> None:
    accepted: dict[str, int] = {}
    half = threading.Event()
    numbers = iter(range(300))
    lock = threading.Lock()

    def submit(url: str) -> None:
        api = Api(url)
        while True:
            with lock:
                n = next(numbers, None)
            if n is None:
                return
            try:
                job_id = api.submit("/work", n=n)
            except requests.RequestException:
                return  # the server is dead: nothing was promised
            with lock:
                accepted[job_id] = n
                if len(accepted) == 200:
                    half.set()

    with process(folder, "--workers", "2") as (server, url, _):
        api = Api(url)
        waiting = {api.submit("/late", n=1000 + n): 1000 + n for n in range(5)}
        until(lambda: api.counts()["waiting"] == 5)
        first = api.submit("/work", n=999)
        threads = [threading.Thread(target=submit, args=(url,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        assert half.wait(20)
        before = {first: api.finished(first)}
        before |= {j: d for j in list(accepted)[:60] if (d := api.job(j))["status"] == "Completed"}
        server.kill()
        for thread in threads:
            thread.join(20)
    accepted[first] = 999
    assert len(before) > 1
    already = marks(folder)
    assert len(already) < len(accepted), "the kill came too late: nothing was left to do"
    with process(folder, "--workers", "8") as (_, url, lines):
        api = Api(url)
        for job_id, n in (accepted | waiting).items():
            document = api.finished(job_id)
            assert api.result(job_id) == {"n": n, "twice": 2 * n}
            if job_id in before:
                assert (document["finishedAt"], document["attempt"]) == (before[job_id]["finishedAt"], 1)
        assert any("resumed" in line for line in lines)
    counts = marks(folder)
    assert {counts[accepted[job_id]] for job_id in before} == {1}
    assert {counts[n] for n in waiting.values()} == {1}  # done before the wait, so not again behind it
    assert {counts[n] for n in accepted.values() if n not in already} == {1}
    twice = [n for n in accepted.values() if counts[n] > 1]
    assert max(counts.values()) <= 2
    assert len(twice) <= 50  # only runs that were under way, or whose end was not on disk yet


def test_a_run_that_was_killed_is_attempted_again_and_at_last_given_up(folder: Path) -> None:
    job_id = ""
    for attempt in range(1, 4):
        with process(folder) as (server, url, _):
            api = Api(url)
            job_id = job_id or api.submit("/held")
            until(lambda attempt=attempt: marks(folder)[7] == attempt)  # type: ignore[misc]
            assert api.job(job_id)["attempt"] == attempt
            server.kill()
    with process(folder) as (_, url, _lines):
        api = Api(url)
        document = api.job(job_id, wait=10)
        assert (document["status"], document["error"]["code"]) == ("Error", "interrupted")
        assert document["attempt"] == 3
        assert api.session.get(document["resultUrl"], timeout=10).status_code == 500
    assert marks(folder)[7] == 3


def test_a_callback_owed_at_the_kill_is_delivered_after_the_restart(folder: Path, sink: Sink) -> None:
    sink.answers = [503]
    with process(folder, "--callback-retries", "1s,1s") as (server, url, _):
        api = Api(url)
        job_id = api.submit("/work", n=1, callbackUrl=f"{sink.url}/hook")
        headers, body = sink.next()
        server.kill()
    with process(folder, "--callback-retries", "1s,1s") as (_, url, _lines):
        again, same = sink.next()
        assert (again["webhook-id"], same) == (headers["webhook-id"], body)
        assert (same["id"], same["status"]) == (job_id, "Completed")
        api = Api(url)
        until(lambda: api.job(job_id)["callback"]["state"] == "delivered")
    assert sink.got.empty()
    assert marks(folder) == {1: 1}


def test_a_callback_on_its_way_at_the_kill_is_sent_again(folder: Path, sink: Sink) -> None:
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        port = receiver.getsockname()[1]
        with process(folder) as (server, url, _):
            job_id = Api(url).submit("/work", n=1, callbackUrl=f"http://127.0.0.1:{port}/hook")
            connection, _ = receiver.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                server.kill()  # it has been sent, and nobody answered yet
                server.wait(10)
        with process(folder) as (_, url, _lines):
            connection, _ = receiver.accept()
            with connection:
                again = connection.recv(65536)
                while job_id.encode() not in again.partition(b"\r\n\r\n")[2]:
                    again += connection.recv(65536)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            message_id = f"msg_{job_id}".encode()
            assert message_id in head
            assert message_id in again
            api = Api(url)
            until(lambda: api.job(job_id)["callback"]["state"] == "delivered")
    assert marks(folder) == {1: 1}


def test_a_callback_under_way_at_the_stop_is_put_on_record_and_not_sent_again(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as receiver:
        callback = f"http://127.0.0.1:{receiver.getsockname()[1]}/hook"
        with process(folder) as (server, url, _):
            job_id = Api(url).submit("/work", n=1, callbackUrl=callback)
            connection, _ = receiver.accept()
            with connection:
                head = connection.recv(65536)
                while job_id.encode() not in head.partition(b"\r\n\r\n")[2]:
                    head += connection.recv(65536)
                server.send_signal(signal.SIGTERM)
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(0.5)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")
            assert server.wait(10) == 0
        with process(folder) as (_, url, _lines):
            callback_ = Api(url).job(job_id)["callback"]
            assert (callback_["state"], callback_["attempts"]) == ("delivered", 1)


@pytest.mark.parametrize("bound", ["--callback-timeout", "--shutdown-timeout"])
def test_a_receiver_that_hangs_does_not_hold_up_the_end_of_the_process(folder: Path, bound: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as receiver, process(folder, bound, "500ms") as (server, url, _):
        Api(url).submit("/work", n=1, callbackUrl=f"http://127.0.0.1:{receiver.getsockname()[1]}/")
        connection, _ = receiver.accept()
        with connection:
            server.send_signal(signal.SIGTERM)
            assert server.wait(8) == 0  # else these are 15 and 30 s


def test_sigterm_lets_running_jobs_end_and_leaves_the_queue_to_the_next_start(folder: Path) -> None:
    with process(folder, "--workers", "1") as (server, url, _):
        api = Api(url)
        running = api.submit("/held")
        until(lambda: marks(folder)[7] == 1)
        queued = [api.submit("/work", n=n) for n in (100, 101)]
        server.send_signal(signal.SIGTERM)
        (folder / "go").touch()
        assert server.wait(10) == 0
    assert not (folder / "astera_lite.db-wal").exists()
    with process(folder) as (server, url, _):
        api = Api(url)
        assert api.finished(running)["attempt"] == 1
        assert api.result(running) == "through"
        assert [api.finished(job_id)["attempt"] for job_id in queued] == [1, 1]
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    assert marks(folder) == {7: 1, 100: 1, 101: 1}


@pytest.mark.parametrize("restart", ["resume", "rerun", "fail"])
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_run_that_the_server_broke_off_was_interrupted_however_it_stopped(
    folder: Path, how: str, restart: str
) -> None:
    steps = [{"name": "once", "python": counted(1)}, {"name": "h", "python": "work:held"}]
    write(folder, "f", get_flow("/f", steps=steps, restart=restart))
    with process(folder, "--shutdown-timeout", "50ms") as (server, url, lines):
        job_id = Api(url).submit("/f")
        until(lambda: marks(folder)[7] == 1)
        if how == "stopped":
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
            until(lambda: any("still running" in line for line in lines))
        else:
            server.kill()
    (folder / "go").touch()
    with process(folder) as (_, url, _lines):
        document = Api(url).job(job_id, wait=15)
        assert (document["status"], document["error"] and document["error"]["code"]) == (
            ("Error", "interrupted") if restart == "fail" else ("Completed", None)
        )
        assert document["attempt"] == (1 if how == "stopped" or restart == "fail" else 2)  # a stop is no crash
    assert marks(folder) == {1: 2 if restart == "rerun" else 1, 7: 1 if restart == "fail" else 2}


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_job_that_was_cancelled_does_not_run_again(folder: Path, how: str) -> None:
    write(folder, "f", get_flow("/f", steps=[{"name": "h", "python": "work:deaf"}]))
    write(folder, "g", get_flow("/g", response={"body": 1}))
    with process(folder, "--shutdown-timeout", "50ms") as (server, url, _):
        api = Api(url)
        job_id = api.submit("/f")
        until(lambda: marks(folder)[3] > 0)
        assert api.session.post(f"{url}/api/jobs/{job_id}/cancel", timeout=10).status_code == 202
        api.session.get(f"{url}/api/publishingAsync/g", headers={"Idempotency-Key": "k"}, timeout=10)  # stored later
        server.send_signal(signal.SIGTERM if how == "stopped" else signal.SIGKILL)
        server.wait(10)
    before = marks(folder)
    with process(folder) as (_, url, _lines):
        assert Api(url).job(job_id, wait=15)["error"]["code"] == "cancelled"
    assert marks(folder) == before


def test_a_second_server_on_the_database_exits_4_and_the_first_is_unharmed(folder: Path) -> None:
    with process(folder) as (_, url, _lines):
        api = Api(url)
        held = api.submit("/held")
        until(lambda: marks(folder)[7] == 1)
        command = [*PROGRAM, "--port", "0"]
        second = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False)
        assert second.returncode == 4
        assert "another server uses" in second.stderr
        assert "Traceback" not in second.stderr
        (folder / "go").touch()
        assert api.finished(held)["attempt"] == 1
        assert api.finished(api.submit("/work", n=5))["status"] == "Completed"
    assert marks(folder) == {7: 1, 5: 1}


@pytest.mark.parametrize("edited", ["changed", "gone", "faulty"])
def test_a_job_keeps_its_flow_when_the_file_is_edited_while_the_server_is_down(folder: Path, edited: str) -> None:
    write(folder, "t", get_flow("/t", steps=[{"name": "w", "wait": "600ms"}], response={"body": "old"}))
    with process(folder) as (server, url, _):
        api = Api(url)
        job_id = api.submit("/t")
        until(lambda: api.counts()["waiting"] == 1)
        server.kill()
    if edited == "changed":
        write(folder, "t", get_flow("/elsewhere", steps=[], response={"body": "new"}))
    elif edited == "gone":
        (folder / "flows" / "t.json").unlink()
    else:
        (folder / "flows" / "t.json").write_text("{")
    with process(folder) as (_, url, _lines):
        api = Api(url)
        api.finished(job_id)
        assert api.result(job_id) == "old"
        if edited == "changed":
            new = api.submit("/elsewhere")
            api.finished(new)
            assert api.result(new) == "new"


def test_a_resumed_job_knows_what_failed_before_the_kill(folder: Path) -> None:
    steps = [
        {"name": "c", "call": "refusing", "onError": "continue"},
        {"name": "h", "python": "work:held"},
        {"name": "no", "when": "${error}", "fail": {"status": "${error.status}", "message": "${error.message}"}},
    ]
    write(folder, "refusing", get_flow("/r", steps=[{"name": "f", "fail": {"status": 422, "message": "no more"}}]))
    write(folder, "t", get_flow("/t", steps=steps))
    with process(folder) as (server, url, _):
        job_id = Api(url).submit("/t")
        until(lambda: marks(folder)[7] == 1)
        server.kill()
    (folder / "go").touch()
    with process(folder) as (_, url, _lines):
        document = Api(url).job(job_id, wait=15)
        assert (document["attempt"], document["status"]) == (2, "Error")
        assert (document["error"]["status"], document["error"]["detail"]) == (422, "no more")


def counted(n: int) -> dict[str, Any]:
    return {"call": "work:mark", "args": {"n": n}}


FAILS = {"name": "no", "python": "work:boom"}
SUM = "SELECT 40 + 2 AS n, x'00ff' AS bytes"
#: A step of each kind, what it brings, and the same kind so that it fails.
KINDS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "http": ({"http": {"method": "POST", "url": "SINK/"}}, 204, {"http": "http://127.0.0.1:1/"}),
    "python": ({"python": counted(1)}, 2, {"python": "work:boom"}),
    "isolated": (
        {"python": counted(2) | {"isolate": True}},
        4,
        {"python": {"call": "work:boom", "isolate": True}},
    ),
    "sql": (
        {"sql": {"database": "a.db", "query": SUM, "one": True}},
        42,
        {"sql": {"database": "a.db", "query": "SELECT * FROM missing"}},
    ),
    "run": ({"run": ["sh", "-c", "echo 3 >> ../marks; echo out"]}, "out\n", {"run": ["false"]}),
    "set": ({"set": {"a": "${uuid()[:0]}", "b": [None, 1.5, 10**17]}}, [None, 1.5, 10**17], {"set": "${1 / 0}"}),
    "each": (
        {"each": {"of": [4, 5], "steps": [{"name": "e", "python": counted(4)}]}},
        [8, 8],
        {"each": {"of": [4, 5], "steps": [{"name": "m", "python": counted(6)}, FAILS]}},
    ),
    "choose": ({"choose": [{"steps": [{"name": "c", "python": counted(8)}]}]}, 16, {"choose": [{"steps": [FAILS]}]}),
    "call": ({"call": "called"}, {"called": 18}, {"call": "failing"}),
    "wait": ({"wait": "300ms"}, None, {"wait": {"until": "${str(1)}"}}),
}
PART = {"http": ".status", "sql": ".n", "run": ".stdout", "set": ".b", "call": ".body"}
INSTEAD: dict[str, Any] = {"continue": None, "object": {"instead": True}, "text": "instead"}


@pytest.fixture(scope="module")
def behind_each_kind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Api, dict[str, str], Counter[int]]]:
    """A server that was killed behind a step of each kind, and started again: a job for each."""
    folder = tmp_path_factory.mktemp("kinds")
    for name in ("flows", "data"):
        (folder / name).mkdir()
    (folder / "flows" / "work.py").write_text(WORK)
    with closing(sqlite3.connect(folder / "data" / "a.db")) as db:
        db.execute("CREATE TABLE t (n)")
    write(
        folder,
        "called",
        get_flow("/called", steps=[{"name": "o", "python": counted(9)}], response={"body": {"called": "${o}"}}),
    )
    write(folder, "failing", get_flow("/failing", steps=[FAILS]))
    held = {"name": "held", "python": "work:held"}
    with Sink() as sink:
        for kind, (good, _, bad) in KINDS.items():
            good = json.loads(json.dumps(good).replace("SINK", sink.url))
            steps = [{"name": "s", **good}, held]
            write(folder, kind, get_flow(f"/{kind}", steps=steps, response={"body": f"${{s{PART.get(kind, '')}}}"}))
            for name, value in INSTEAD.items():
                steps = [{"name": "s", **bad, "onError": value if name != "continue" else name}, held]
                write(folder, f"{kind}-{name}", get_flow(f"/{kind}-{name}", steps=steps, response={"body": "${s}"}))
        names = [f"{kind}{more}" for kind in KINDS for more in ("", *(f"-{name}" for name in INSTEAD))]
        with process(folder, "--workers", "64") as (server, url, _):
            api = Api(url)
            ids = {name: api.submit(f"/{name}") for name in names}
            until(lambda: marks(folder)[7] == len(ids))
            server.kill()
        (folder / "go").touch()
        with process(folder, "--workers", "64") as (_, url, _lines):
            yield Api(url), ids, marks(folder)
        assert sink.got.qsize() == 1
    counts = marks(folder)
    assert counts == {1: 1, 2: 1, 3: 1, 4: 2, 5: 5 * len(INSTEAD), 6: len(INSTEAD), 7: 2 * len(ids), 8: 1, 9: 1}


@pytest.mark.parametrize("name", ["", *INSTEAD])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_behind_each_kind_of_step_resumes_behind_it(
    behind_each_kind: tuple[Api, dict[str, str], Counter[int]], kind: str, name: str
) -> None:
    api, ids, _ = behind_each_kind
    document = api.finished(ids[f"{kind}-{name}" if name else kind])
    assert document["attempt"] == 2
    assert api.result(document["id"]) == (INSTEAD[name] if name else KINDS[kind][1])


MAKE = "import astera_lite, sys; astera_lite.SqliteStore(sys.argv[1]).close()"


@pytest.mark.parametrize(("call", "step"), [("pwrite64", 6), ("fdatasync", 1), ("unlink", 1)])
def test_a_kill_while_the_database_is_made_leaves_what_the_next_start_takes(
    tmp_path: Path, call: str, step: int
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is missing, which kills at a chosen system call: apt-get install strace")
    killed = 0
    for when in itertools.count(1, step):
        path = str(tmp_path / f"{when}.db")
        inject = [
            "strace",
            "-f",
            "-o",
            "/dev/null",
            "-e",
            f"trace={call}",
            "-e",
            f"inject={call}:signal=KILL:when={when}",
        ]
        made = subprocess.run([*inject, sys.executable, "-c", MAKE, path], cwd=ROOT, capture_output=True, check=False)
        with closing(SqliteStore(path)) as store:
            assert store.last_seq() == 0
        if made.returncode == 0:
            break
        assert made.returncode == -signal.SIGKILL, made.stderr
        killed += 1
    assert killed >= 1


# ---- On disk before the 202 leaves -----------------------------------------------------------------------------------


@contextmanager
def traced(pid: int, file: Path) -> Iterator[None]:
    """The system calls of a process and its threads, in a file."""
    if shutil.which("strace") is None:
        pytest.skip("strace is missing, which shows what is synced when: apt-get install strace")
    calls = "trace=recvfrom,sendto,fsync,fdatasync"
    command = ["strace", "-f", "-y", "-s", "200", "-e", calls, "-o", str(file), "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        line = strace.stderr.readline()
        if "attached" not in line:
            strace.kill()
            pytest.skip(f"strace may not look at other processes here, run as root: {line.strip()}")
        try:
            yield
        finally:
            strace.send_signal(signal.SIGINT)  # it lets go of the server
            strace.communicate(timeout=10)


def synced_before_the_202(trace: str) -> int:
    """How many syncs of the log began after a request was read, and ended before its 202 was sent."""
    begun: set[str] = set()  # threads within a sync of the log
    reading, synced = False, 0
    for line in trace.splitlines():
        thread = line.split()[0]
        if "publishingAsync" in line:
            reading = True
        elif reading and "202 Accepted" in line:
            return synced
        elif reading and re.search(r"\b(fsync|fdatasync)\(.*-wal", line):
            begun.add(thread)
        if thread in begun and re.search(r"\) += 0$", line):
            begun.discard(thread)
            synced += 1
    raise AssertionError(f"no request and 202 in\n{trace}")


@pytest.mark.parametrize(("durability", "least", "most"), [("full", 1, 3), ("normal", 0, 0)])
def test_with_full_durability_the_job_is_synced_before_its_202_leaves(
    folder: Path, durability: str, least: int, most: int
) -> None:
    with process(folder, "--durability", durability) as (server, url, _):
        api = Api(url)
        api.submit("/work", n=1)
        with traced(server.pid, folder / "trace"):
            for n in range(5):
                api.finished(api.submit("/work", n=n))
    text = (folder / "trace").read_text()
    requests_ = re.split(r"(?m)^(?=.*publishingAsync)", text)[1:]
    assert len(requests_) == 5
    counts = [synced_before_the_202(part) for part in requests_]
    assert least <= min(counts) <= max(counts) <= most, text
