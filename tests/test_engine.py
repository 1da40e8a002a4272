"""Room 8, the engine: when, how often and in which order jobs run, and how they end."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from support import Api, FakeClock, Sink, database_in, get_flow, process, running, until

import astera_lite
from astera_lite import (
    ANYBODY,
    MAX_ATTEMPTS,
    Answer,
    AsteraLite,
    Clock,
    Conflict,
    Context,
    Finish,
    Housekeeper,
    Job,
    JobKey,
    NotFound,
    Outcome,
    Queue,
    Result,
    SqliteReader,
    SqliteStore,
    Status,
    StoredRequest,
    Watchers,
    health_document,
)
from astera_lite_admin import page_of_jobs

pytestmark = pytest.mark.both_stores


@contextmanager
def serving(folder: Path, flows: dict[str, Any], clock: Clock | None = None, **settings: Any) -> Iterator[AsteraLite]:
    app = AsteraLite(clock=clock, **{"database": database_in(folder), "shutdown_timeout": 5, **settings})
    for name, tree in flows.items():
        app.deploy(name, tree)
    with app:
        yield app


def python(function: Callable[..., Any], name: str = "p", **more: Any) -> dict[str, Any]:
    return {"name": name, "python": {"call": function}, **more}


def suspended(app: AsteraLite, count: int = 1) -> None:
    until(lambda: app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": count})


def finished(app: AsteraLite, job: Job) -> Job:
    found = app.wait(job.id, 10)
    assert found.status is not Status.RUNNING, "the job does not finish"
    return found


def code_of(app: AsteraLite, job: Job) -> str | None:
    found = finished(app, job)
    return found.error and found.error["code"]


def held(app: AsteraLite) -> int:
    """The jobs and calls that wait because their flow is at its limit; calls wait outside the engine on PostgreSQL."""
    numbers = [number for held in list(app.engine.queue._held.values()) for number in held]
    return len([each for each in numbers if each in app.engine.queue.entries]) + (
        len(app.store.calls) if app.node else 0
    )


class Gate:
    """A python step that says that it began, and goes on when told, whether it was cancelled or not."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Semaphore(0), threading.Event()
        self.runs = 0

    def __call__(self, context: Context) -> str:
        self.runs += 1
        self.begun.release()
        self.open.wait(20)
        return "through"

    def entered(self) -> None:
        assert self.begun.acquire(timeout=10)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


# ---- What has just ended is answered from memory ---------------------------------------------------------------------


def held_in_memory(app: AsteraLite, job: Job) -> bool:
    return job.key in app.engine._recent


@pytest.mark.sqlite  # which others do not change
@pytest.mark.parametrize("how", ["after", "at once", "failed", "cancelled"])
def test_what_has_just_ended_is_the_same_from_memory_and_from_disk(tmp_path: Path, gate: Gate, how: str) -> None:
    step = {"after": python(lambda context: 1), "cancelled": python(gate)}.get(how, {"name": "p", "set": 1})
    step = {"name": "p", "fail": {"status": 422, "message": "why"}} if how == "failed" else step
    with serving(tmp_path, {"f": get_flow("/f", steps=[step])}) as app:
        job = app.submit("f")
        if how == "cancelled":
            gate.entered()
            app.cancel(job)
            gate.open.set()
        ended = finished(app, job)
        assert (ended.error and ended.error["code"]) == {"failed": "failed", "cancelled": "cancelled"}.get(how)
        assert held_in_memory(app, job)
        with closing(SqliteReader(app.settings.database)) as disk:
            assert (ended, app.engine.result(job.key)) == (disk.get(job.key), disk.result(job.key))
        other = job.key._replace(salt=job.key.salt ^ 1)
        assert (app.find(other, ANYBODY), app.engine.result(other)) == (None, None)


@pytest.mark.parametrize("over_http", [True, False])
@pytest.mark.parametrize("light", [True, False])
def test_a_job_that_is_deleted_as_soon_as_its_end_is_on_disk_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, light: bool, over_http: bool
) -> None:
    step = {"name": "p", "set": 1} if light else python(lambda context: 1)
    with running(tmp_path, {"f": get_flow("/f", steps=[step])}) as run, ThreadPoolExecutor(1) as pool:
        announce, deleted = run.app.engine.announce, []

        def late(end: Finish, moved: Any = True) -> None:
            path = f"/api/jobs/{end.job.id}"
            deleted.append(pool.submit(requests.delete, run.server.url + path, timeout=10))
            if threading.current_thread() is threading.main_thread():  # then nothing orders the two
                deleted[0].result()
            announce(end, moved)

        monkeypatch.setattr(run.app.engine, "announce", late)
        its_id = run.client.get("/api/publishingAsync/f").json()["id"] if over_http else run.app.submit("f").id
        until(lambda: deleted)
        assert deleted[0].result().status_code == 204
        assert run.app.status(its_id) is None
        assert run.client.get(f"/api/jobs/{its_id}/result").status_code == 404


def test_a_job_that_expires_is_gone_from_memory_too(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, {"f": get_flow("/f")}, clock, retention=60) as app:
        job = app.submit("f")
        assert finished(app, job).status is Status.COMPLETED
        clock.tick(60)
        assert app.status(job) is None
        with pytest.raises(NotFound):
            app.result(job)


def test_a_job_whose_callback_changes_is_not_held_in_memory(tmp_path: Path, sink: Sink) -> None:
    with serving(tmp_path, {"f": get_flow("/f")}) as app:
        job = app.submit("f", callback_url=sink.url)
        sink.next()
        until(lambda: (found := app.status(job)) and found.callback and found.callback.state == "delivered")
        assert not held_in_memory(app, job)


@pytest.mark.sqlite
def test_what_is_held_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(astera_lite, "_RECENT", 3)
    body = "${'x' * params.n}"
    parameters = {"n": {"in": "query", "type": "integer"}}
    flows = {
        "body": get_flow("/body", request={"parameters": parameters}, response={"body": body}),
        "header": get_flow(
            "/header", request={"parameters": parameters}, response={"headers": {"X-Text": body}, "body": 1}
        ),
    }
    with serving(tmp_path, flows) as app:
        jobs = [app.submit("body", {"n": 3000}) for _ in range(8)]
        assert [held_in_memory(app, job) for job in jobs] == [False] * 5 + [True] * 3
        assert {len(app.result(job).content) for job in jobs} == {3003}
        large = [app.submit("body", {"n": 5000}), app.submit("header", {"n": 5000})]
        large.append(app.submit("body", {"n": 1}, base=f"http://h/{'x' * 5000}"))
        assert {finished(app, job).status for job in large} == {Status.COMPLETED}
        assert not any(held_in_memory(app, job) for job in large)


# ---- Running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_no_step_takes_a_thread_with_it(tmp_path: Path, error: type[BaseException]) -> None:
    def step(context: Any) -> None:
        raise error

    with serving(tmp_path, {"f": get_flow("/f", steps=[python(step)]), "ok": get_flow("/ok")}, workers=2) as app:
        jobs = [app.submit("f") for _ in range(8)]
        assert {code_of(app, job) for job in jobs} == {"failed"}
        with ThreadPoolExecutor(1) as pool:  # on the main thread a KeyboardInterrupt is the person's
            assert pool.submit(app.run, "f").result(10).status_code == 500
        assert app.run("ok").status_code == 200
        assert app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 0}


def test_every_job_runs_once(tmp_path: Path) -> None:
    ran: list[str] = []
    flow = get_flow("/f", steps=[python(lambda context: ran.append(context.request["id"]))])
    with serving(tmp_path, {"f": flow}, workers=4) as app:
        jobs: list[Job] = []
        threads = [threading.Thread(target=lambda: jobs.extend(app.submit("f") for _ in range(25))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {finished(app, job).status for job in jobs} == {Status.COMPLETED}
    assert sorted(ran) == sorted(job.id for job in jobs)
    assert len(set(ran)) == 200


@pytest.mark.sqlite  # what is shared waits in the database, not in the engine
def test_jobs_begin_in_the_order_in_which_they_came(tmp_path: Path, gate: Gate) -> None:
    ran: list[str] = []
    flows = {
        "gate": get_flow("/g", steps=[python(gate)]),
        "f": get_flow("/f", steps=[python(lambda context: ran.append(context.request["id"]))]),
    }
    with serving(tmp_path, flows, workers=1) as app:
        app.submit("gate")
        gate.entered()
        jobs = [app.submit("f") for _ in range(50)]
        assert app.engine.queue.queued == 50
        gate.open.set()
        finished(app, jobs[-1])
    assert ran == [job.id for job in jobs]


def test_a_job_counts_its_attempt_and_tells_its_times(tmp_path: Path, gate: Gate) -> None:
    clock = FakeClock()
    with serving(tmp_path, {"gate": get_flow("/g", steps=[python(gate)])}, clock) as app:
        job = app.submit("gate")
        assert (job.attempt, job.started, job.created) == (0, None, clock.now())
        gate.entered()
        running = app.status(job.id)
        assert running is not None and (running.attempt, running.started) == (1, clock.now())
        clock.tick(5)
        gate.open.set()
        done = finished(app, job)
        assert (done.started, done.finished) == (job.created, job.created + 5000)
        assert done.expires == job.created + 5000 + 24 * 3600 * 1000


def test_slow_jobs_do_not_starve_synchronous_runs(tmp_path: Path, gate: Gate) -> None:
    flows = {"gate": get_flow("/g", steps=[python(gate)]), "f": get_flow("/f", steps=[], response={"body": "now"})}
    with serving(tmp_path, flows, workers=2) as app:
        for _ in range(6):
            app.submit("gate")
        for _ in range(2):
            gate.entered()
        answers: list[Result] = []
        for _ in range(3):
            caller = threading.Thread(target=lambda: answers.append(app.run("f")), daemon=True)
            caller.start()
            caller.join(5)
        assert [answer.json() for answer in answers] == ["now"] * 3
        assert gate.runs == 2
        gate.open.set()


def leave(context: Context) -> None:
    raise SystemExit(3)


class Unsayable(Exception):
    def __str__(self) -> str:
        raise Unsayable


@dataclass(frozen=True)
class Frozen(Exception):
    why: str


def raising(error: Exception) -> dict[str, Any]:
    def step(context: Context) -> None:
        raise error

    return python(step)


RAISED = {
    "a surrogate": (ValueError("bad \ud800"), "ValueError: bad ?"),
    "an exception without a text": (Unsayable(), "Unsayable"),
    "an exception that takes no attribute": (Frozen("broken"), "Frozen: broken"),
}
ODD = {
    "leaves": [python(leave)],
    **{f"raises {name}": [raising(error)] for name, (error, _) in RAISED.items()},
    "fails with a surrogate": [python(lambda context: "\ud800"), {"name": "x", "fail": {"message": "${p}"}}],
    "answers a surrogate": [python(lambda context: "\ud800")],
    "answers what is no JSON": [python(lambda context: object())],
    "answers infinity": [python(lambda context: 1e308 * 10)],
}


@pytest.mark.parametrize("case", ODD)
def test_whatever_a_step_does_its_job_ends(tmp_path: Path, case: str) -> None:
    with serving(tmp_path, {"odd": get_flow("/odd", steps=ODD[case])}, shutdown_timeout=0.1) as app:
        job = app.wait(app.submit("odd").id, 1)
        assert job.error is not None and job.error["code"] == "failed"
        until(lambda: app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 0})


def test_a_step_that_leaves_has_failed_and_its_flow_goes_on(tmp_path: Path) -> None:
    ran: list[int] = []

    def leave_twice(context: Context) -> str:
        ran.append(1)
        return leave(context) or "" if len(ran) < 3 else "stayed"

    steps = [
        python(leave, onError="${error.message}"),
        python(leave_twice, "q", retry={"attempts": 3, "delay": 0, "on": ["error"]}),
    ]
    with serving(tmp_path, {"f": get_flow("/f", steps=steps, response={"body": "${[p, q]}"})}) as app:
        assert app.run("f").json() == ["SystemExit: 3", "stayed"]


@pytest.mark.parametrize("until_s", ["${10**17}", "${1e300}"])
def test_a_wait_beyond_all_times_ends_no_later_than_the_flow(tmp_path: Path, until_s: str) -> None:
    clock = FakeClock()
    flow = get_flow("/w", steps=[{"name": "w", "wait": {"until": until_s}}], timeout=60)
    with serving(tmp_path, {"w": flow}, clock) as app:
        job = app.submit("w")
        until(lambda: app.engine.queue.counts()["running"] == 0)
        end = time.monotonic() + 1
        while app.wait(job.id, 0.02).status is Status.RUNNING and time.monotonic() < end:
            app.housekeeper.tick(clock.tick(70))
        assert app.wait(job.id, 0).status is Status.ERROR


def test_calls_inside_calls_need_no_other_thread(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)

    def outer(context: Context, depth: int) -> Any:
        if depth == 0:
            barrier.wait(10)  # all of them hold their thread
        return app.run("outer", {"depth": depth + 1}).json() if depth < 5 else "through"

    step = python(outer)
    step["python"]["args"] = {"depth": "${params.depth}"}
    parameters = {"depth": {"in": "query", "type": "integer", "default": 0}}
    flow = get_flow("/outer", steps=[step], request={"parameters": parameters})
    with serving(tmp_path, {"outer": flow}, workers=6) as app, ThreadPoolExecutor(4) as pool:
        jobs = [app.submit("outer") for _ in range(4)]
        calls = [pool.submit(app.run, "outer") for _ in range(4)]
        assert [call.result(20).json() for call in calls] == ["through"] * 4
        assert {finished(app, job).status for job in jobs} == {Status.COMPLETED}


def test_a_call_that_finds_no_thread_ends_at_its_deadline(tmp_path: Path, gate: Gate) -> None:
    clock, ended = FakeClock(), queue.SimpleQueue[Outcome]()
    with serving(tmp_path, {"f": get_flow("/f", steps=[python(gate)])}, clock, workers=1) as app:
        flow = app.deployments.by_name["f"]
        given = flow.bind(StoredRequest("GET", "/f", "", {}, b""), "id")
        for _ in range(3):  # as the server calls; there are two threads
            app.runner(flow).run_sync(app.new_run(flow, given), ended.put)
        gate.entered()
        gate.entered()
        clock.tick(app.settings.sync_timeout)
        app.housekeeper.tick(clock.now())
        assert ended.get(timeout=10).answer.code == 504
        gate.open.set()
    assert gate.runs == 2


def test_a_call_that_was_let_in_and_ends_at_its_deadline_gives_its_place_on(tmp_path: Path, gate: Gate) -> None:
    clock, ended, busy = FakeClock(), queue.SimpleQueue[Outcome](), Gate()
    flows = {"one": get_flow("/one", steps=[python(gate)], concurrency=1), "f": get_flow("/f", steps=[python(busy)])}
    with serving(tmp_path, flows, clock, workers=1) as app, ThreadPoolExecutor(1) as pool:
        one, f = (app.deployments.by_name[name] for name in ("one", "f"))
        first = pool.submit(app.run, "one")  # on a thread that is not the engine's
        gate.entered()
        given = one.bind(StoredRequest("GET", "/one", "", {}, b""), "id")
        app.runner(one).run_sync(app.new_run(one, given), ended.put)
        until(lambda: held(app) == 1)
        job = app.submit("one")
        until(lambda: held(app) + app.store.queued == 2)
        for _ in range(2):  # which takes both threads
            given = f.bind(StoredRequest("GET", "/f", "", {}, b""), "id")
            app.runner(f).run_sync(app.new_run(f, given), lambda outcome: None)
            busy.entered()
        gate.open.set()
        first.result(10)  # the call is let in, and there is no thread for it
        clock.tick(app.settings.sync_timeout)
        app.housekeeper.tick(clock.now())
        assert ended.get(timeout=10).answer.code == 504
        busy.open.set()
        assert finished(app, job).status is Status.COMPLETED


@pytest.mark.parametrize("limit", [{}, {"concurrency": 1}])
def test_no_call_begins_after_the_stop(tmp_path: Path, gate: Gate, limit: dict[str, Any]) -> None:
    ended: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    app = AsteraLite(database=database_in(tmp_path), shutdown_timeout=0.05, workers=1)
    app.deploy("f", get_flow("/f", steps=[python(gate)], **limit))
    with app, ThreadPoolExecutor(1) as pool:
        flow = app.deployments.by_name["f"]
        given = flow.bind(StoredRequest("GET", "/f", "", {}, b""), "id")
        for _ in range(5):
            app.runner(flow).run_sync(app.new_run(flow, given), ended.put)
        first = 1 if limit else 2
        for _ in range(first):
            gate.entered()
        inside = pool.submit(app.run, "f")
        if not limit:
            gate.entered()  # who calls brings the thread
        else:
            until(lambda: (held(app), len(app.engine.queue.entries)) == (5, 1 if app.node else 6))
        app.stop()
        assert [ended.get(timeout=10).answer.code for _ in range(5 - first)] == [503] * (5 - first)
        began = gate.runs
        gate.open.set()
        assert inside.result(10).status_code == (503 if limit else 409)
        assert {ended.get(timeout=10).answer.code for _ in range(first)} == {409}  # nobody waits for them any more
    assert gate.runs == began == first + (not limit)


def test_a_call_of_a_program_comes_before_the_jobs_that_wait_for_the_same_limit(tmp_path: Path, gate: Gate) -> None:
    order: list[int] = []

    def step(context: Context) -> None:
        order.append(context.params["n"])
        gate(context)

    request = {"parameters": {"n": {"in": "query", "type": "integer"}}}
    flow = get_flow("/f", steps=[python(step)], concurrency=1, request=request)
    with serving(tmp_path, {"f": flow}, workers=1) as app, ThreadPoolExecutor(1) as pool:
        jobs = [app.submit("f", {"n": 1})]
        gate.entered()
        jobs += [app.submit("f", {"n": n}) for n in (2, 3)]
        call = pool.submit(app.run, "f", {"n": 4})
        until(lambda: app.store.calls if app.node else held(app))
        gate.open.set()
        assert call.result(10).status_code == 200
        assert {finished(app, job).status for job in jobs} == {Status.COMPLETED}
    assert order[:2] == [1, 4]


def test_a_limit_that_a_deployment_raises_counts_at_once(tmp_path: Path, gate: Gate) -> None:
    flow = get_flow("/f", steps=[python(gate)])
    with serving(tmp_path, {"f": {**flow, "concurrency": 1}}) as app:
        jobs = [app.submit("f") for _ in range(3)]
        gate.entered()
        until(lambda: app.node or held(app) == 2)
        app.deploy("f", {**flow, "concurrency": 3})
        gate.entered()
        gate.entered()
        gate.open.set()
        assert {finished(app, job).status for job in jobs} == {Status.COMPLETED}


@pytest.mark.parametrize("held_by", ["the threads", "a limit"])
def test_waiting_jobs_take_memory_by_their_bytes_and_not_by_their_parsed_values(tmp_path: Path, held_by: str) -> None:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "w.py").write_text(
        "import os, time\ndef held(context):\n    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
    )
    flow = {
        "request": {"method": "POST", "resource": "/f", "processing": ["asynchronous"]},
        "steps": [{"name": "h", "python": "w:held"}],
        "response": {"body": "${len(request.body)}"},
    } | ({"concurrency": 1} if held_by == "a limit" else {})
    (tmp_path / "flows" / "f.json").write_text(json.dumps(flow))
    body = b"[" + b"{}," * 60_000 + b"{}]"  # 180 kB, which take some 5 MB as values

    def memory(pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

    with process(tmp_path, "--workers", "1" if held_by == "the threads" else "4") as (server, url, _):
        api = Api(url)
        headers = {"Content-Type": "application/json"}

        def submit() -> str:
            answer = api.session.post(f"{url}/api/publishingAsync/f", data=body, headers=headers, timeout=20)
            return str(answer.json()["id"])

        ids = [submit() for _ in range(4)]
        until(lambda: api.counts()["running"] == 1)
        before = memory(server.pid)
        ids += [submit() for _ in range(36)]
        until(lambda: api.counts() == {"queued": 39, "running": 1, "waiting": 0})
        assert memory(server.pid) - before < 70  # MB; kept as values, they would be 150
        (tmp_path / "go").touch()
        assert {api.result(api.finished(job_id)["id"]) for job_id in ids} == {60_001}


def test_a_synchronous_caller_gets_an_answer_whatever_the_step_does(tmp_path: Path) -> None:
    with serving(tmp_path, {"odd": get_flow("/odd", steps=[python(leave)])}, shutdown_timeout=0.1) as app:
        answers: list[Result] = []
        caller = threading.Thread(target=lambda: answers.append(app.run("odd")), daemon=True)
        caller.start()
        caller.join(1)
        assert [answer.status_code for answer in answers] == [500]


@pytest.mark.parametrize("case", RAISED)
def test_the_author_is_told_of_whatever_is_raised(tmp_path: Path, case: str) -> None:
    error, said = RAISED[case]
    with serving(tmp_path, {"odd": get_flow("/odd", steps=[raising(error)])}, shutdown_timeout=0.1) as app:
        assert app.run("odd").status_code == 500
        job = finished(app, app.submit("odd"))
        [step] = app.store.trace(job.key)
        assert (step["path"], step["state"], step["error"]["message"]) == ("p", "failed", said)


# ---- Lost wake-ups ---------------------------------------------------------------------------------------------------


def losing(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, of which every second call does nothing."""
    calls = itertools.count()

    def call(*arguments: Any, **more: Any) -> Any:
        return method(*arguments, **more) if next(calls) % 2 else None

    return call


@pytest.mark.sqlite  # a shared one is healed in a minute, not a second
def test_whatever_wake_up_is_lost_all_jobs_end_and_all_callbacks_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sink: Sink
) -> None:
    for owner, name in ((Queue, "put"), (Housekeeper, "wake"), (Watchers, "tell")):
        monkeypatch.setattr(owner, name, losing(getattr(owner, name)))
    steps = [python(lambda context: 1), {"name": "w", "wait": "300ms"}, python(lambda context: 2, "q")]
    flows = {
        "plain": get_flow("/plain", steps=steps[:1], concurrency=2),
        "light": get_flow("/light"),
        "waits": get_flow("/waits", steps=steps),
    }
    with serving(tmp_path, flows, workers=3) as app:
        jobs = [app.submit(name, callback_url=sink.url) for name in [*flows] * 5]
        futures = [app.future(job.id) for job in jobs]
        assert {future.result(20).status for future in futures} == {Status.COMPLETED}
        assert {sink.next()[1]["id"] for _ in jobs} == {job.id for job in jobs}
        assert app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 0}
        until(lambda: not app.courier.under_way())
    assert sink.got.empty()


# ---- Cancel ----------------------------------------------------------------------------------------------------------


def test_a_queued_job_is_cancelled_at_once_and_never_runs(tmp_path: Path, gate: Gate) -> None:
    with serving(tmp_path, {"gate": get_flow("/g", steps=[python(gate)])}, workers=1) as app:
        first, second, third = (app.submit("gate") for _ in range(3))
        gate.entered()
        assert app.cancel(second.id) is True
        done = finished(app, second)
        assert (done.attempt, done.started) == (0, None)
        assert code_of(app, second) == "cancelled"
        assert app.result(second.id).status_code == 409
        gate.open.set()
        assert [finished(app, job).status for job in (first, third)] == [Status.COMPLETED] * 2
        assert gate.runs == 2
        with pytest.raises(Conflict):
            app.cancel(second.id)
        with pytest.raises(NotFound):
            app.cancel("0192f0c1-0000-7000-8000-000000000000")


def test_a_running_job_stops_at_its_next_step(tmp_path: Path, gate: Gate) -> None:
    after: list[int] = []
    flow = get_flow("/g", steps=[python(gate), python(lambda context: after.append(1), "q")])
    with serving(tmp_path, {"gate": flow}) as app:
        job = app.submit("gate")
        gate.entered()
        assert app.cancel(job.id) is False
        assert app.cancel(job.id) is False
        gate.open.set()
        assert code_of(app, job) == "cancelled"
    assert after == []


def test_a_step_that_sleeps_is_cancelled_in_its_sleep(tmp_path: Path) -> None:
    begun = threading.Event()

    def sleep(context: Context) -> None:
        begun.set()
        context.sleep(60)

    with serving(tmp_path, {"f": get_flow("/f", steps=[python(sleep)])}) as app:
        job = app.submit("f")
        assert begun.wait(10)
        assert app.cancel(job.id) is False
        assert code_of(app, job) == "cancelled"


def test_a_waiting_job_is_cancelled_at_once(tmp_path: Path) -> None:
    clock = FakeClock()
    flow = get_flow("/w", steps=[{"name": "w", "wait": 60}, python(lambda context: 1)])
    with serving(tmp_path, {"w": flow}, clock) as app:
        job = app.submit("w")
        suspended(app)
        assert app.cancel(job.id) is True
        assert code_of(app, job) == "cancelled"
        assert app.engine.queue.counts()["waiting"] == 0
        app.housekeeper.tick(clock.tick(100))  # its time comes: nothing happens
        until(lambda: app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 0})
        assert code_of(app, job) == "cancelled"


def test_a_step_that_was_suspended_began_before_its_wait(tmp_path: Path) -> None:
    clock = FakeClock()
    inner = [{"name": "s", "set": 1}, {"name": "v", "wait": 60}, {"name": "w", "wait": 5}]
    flows = {"w": get_flow("/w", steps=[{"name": "c", "choose": [{"steps": inner}]}])}
    with serving(tmp_path, flows, clock) as app:
        job = app.submit("w")
        suspended(app)
    with serving(tmp_path, flows, clock) as app:  # it is known after a restart, too
        suspended(app)
        app.housekeeper.tick(clock.tick(60))
        until(lambda: app.store.get(job.key).due == clock.ms + 5000)  # type: ignore[union-attr]
        suspended(app)
        app.housekeeper.tick(clock.tick(5))
        assert finished(app, job).status is Status.COMPLETED
        took = []
        for step in app.store.trace(job.key):
            began, ended = (datetime.fromisoformat(step[name]) for name in ("startedAt", "finishedAt"))
            took.append((step["name"], (ended - began).total_seconds()))
        assert took == [("s", 0), ("v", 60), ("w", 5), ("c", 65)]  # each once, however often the run was resumed


@pytest.mark.parametrize(("attempts", "status"), [(3, Status.COMPLETED), (2, Status.ERROR)])
def test_a_further_attempt_runs_all_steps_inside_also_after_a_wait(
    tmp_path: Path, attempts: int, status: Status
) -> None:
    clock, ran = FakeClock(), list[str]()

    def shaky(context: Context) -> None:
        ran.append("c")
        if len(ran) < 9:
            raise ValueError("not yet")

    inner = [python(lambda context: ran.append("a"), "a"), {"name": "v", "wait": 60}]
    inner += [python(lambda context: ran.append("b"), "b"), {"name": "w", "wait": 60}, python(shaky, "c")]
    outer = {"name": "o", "choose": [{"steps": inner}], "retry": {"attempts": attempts, "delay": 0, "on": ["error"]}}
    with serving(tmp_path, {"f": get_flow("/f", steps=[outer])}, clock) as app:
        job = app.submit("f")
        for _ in range(2 * attempts):
            until(lambda: (found := app.store.get(job.key)) and found.due == clock.ms + 60_000)
            suspended(app)
            app.housekeeper.tick(clock.tick(60))
        assert finished(app, job).status is status
    assert ran == ["a", "b", "c"] * attempts


def test_a_cancel_that_meets_the_suspension_ends_the_job(tmp_path: Path) -> None:
    clock = FakeClock()
    flow = get_flow("/w", steps=[{"name": "w", "wait": 3000}], timeout=7200)
    with serving(tmp_path, {"w": flow}, clock) as app:
        begun, go_on = threading.Event(), threading.Event()

        def hold(result: Any, error: Exception | None) -> None:
            begun.set()
            go_on.wait(10)

        job = app.submit("w")
        suspended(app)
        app.cancel(job.id)
        finished(app, job)
        asked: list[bool] = []
        suspend = app.store.suspend

        def hooked(job: Job, *more: Any) -> None:  # the thread has let go, its wait is not on record yet
            app.store.find_key("", "", "", b"", 0, hold)
            assert begun.wait(10)
            suspend(job, *more)
            asked.append(app.cancel(job.id))
            go_on.set()

        app.store.suspend = hooked  # type: ignore[method-assign]
        job = app.submit("w")
        assert code_of(app, job) == "cancelled"
        assert asked == [False]
        assert app.engine.queue.counts()["waiting"] <= 1


def test_cancel_at_any_moment_ends_every_job(tmp_path: Path) -> None:
    flow = get_flow("/w", steps=[python(lambda context: 1), {"name": "w", "wait": 60}])
    with serving(tmp_path, {"w": flow}, workers=4) as app:
        jobs = [app.submit("w") for _ in range(40)]
        for job in jobs:
            app.cancel(job.id)
        assert {code_of(app, job) for job in jobs} == {"cancelled"}


def test_a_cancel_in_the_instant_of_the_end_is_a_conflict(tmp_path: Path) -> None:
    with serving(tmp_path, {"w": get_flow("/w", steps=[{"name": "w", "wait": 60}])}) as app:
        job = app.submit("w")
        suspended(app)
        cancel = app.engine.cancel

        def too_late(job: Job) -> bool:  # it ends between the look and the cancel
            app.engine.end(job, Outcome(Answer(200, (), b"by itself")))
            return cancel(job)

        app.engine.cancel = too_late  # type: ignore[method-assign]
        with pytest.raises(Conflict, match="The job is finished: Completed"):
            app.cancel(job.id)


def test_a_cancel_in_the_instant_before_a_job_is_queued_ends_it(tmp_path: Path) -> None:
    ran: list[int] = []
    with serving(tmp_path, {"f": get_flow("/f", steps=[python(lambda context: ran.append(1))])}) as app:
        put, asked = app.engine.queue.put, []

        def put_late(seq: int, flow: str, prepared: Any = None) -> None:  # on disk, but not queued
            asked.append(app.engine.cancel(prepared.job))
            put(seq, flow, prepared)

        app.engine.queue.put = put_late  # type: ignore[method-assign]
        job = app.submit("f")
        assert code_of(app, job) == "cancelled"
        until(lambda: app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 0})
    assert (asked, ran) == ([True], [])


def test_jobs_run_although_no_thread_can_be_started_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows = {"f": get_flow("/f", steps=[python(lambda context: 1)], response={"body": "${p}"})}
    with serving(tmp_path, flows) as app:
        start, refused = threading.Thread.start, threading.Semaphore(0)

        def start_none(thread: threading.Thread) -> None:
            if thread.name.startswith("astera-worker"):
                refused.release()
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_none)
        jobs = [app.submit("f") for _ in range(5)]
        assert refused.acquire(timeout=10)
        assert {app.status(job.id).status for job in jobs} == {Status.RUNNING}  # type: ignore[union-attr]
        assert "no thread can be had" in health_document(app)["reason"]
        monkeypatch.undo()
        assert {finished(app, job).status for job in jobs} == {Status.COMPLETED}
        assert app.run("f").json() == 1
        assert health_document(app)["status"] == "ok"


def test_a_server_without_threads_calls_one_again_only_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, {"f": get_flow("/f", steps=[python(lambda context: 1)])}, FakeClock()) as app:
        app.housekeeper.stop(10)
        start, called = threading.Thread.start, []

        def start_none(thread: threading.Thread) -> None:
            if thread.name.startswith("astera-worker"):
                called.append(thread)
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_none)
        jobs = [app.submit("f") for _ in range(20)]
        assert len(called) == 1  # the pool keeps what each call brings
        for job in jobs:
            app.cancel(job)
        app.engine.queue.release(0)
        assert len(called) == 2
        monkeypatch.undo()
        app.engine.queue.release(0)  # also if nothing is left to run, or the server would stay unwell
        until(lambda: health_document(app)["status"] == "ok")


@pytest.mark.sqlite  # a shared store looks for jobs that its server has lost only once in a while
def test_a_submission_is_answered_although_something_fails_behind_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows = {"f": get_flow("/f", steps=[python(lambda context: 1)])}
    with serving(tmp_path, flows) as app, ThreadPoolExecutor(1) as pool:

        def no_memory(*arguments: Any) -> None:
            monkeypatch.undo()
            raise MemoryError

        monkeypatch.setattr(app.engine.queue, "put", no_memory)
        job = pool.submit(app.submit, "f").result(10)
        assert finished(app, job).status is Status.COMPLETED


def test_a_job_whose_end_takes_more_memory_than_there_is_ends_as_failed(tmp_path: Path) -> None:
    with serving(tmp_path, {"f": get_flow("/f", steps=[{"name": "queued", "wait": 0}], response={"body": "x"})}) as app:
        finish = app.store.finish

        def no_memory(end: Any, done: Any) -> None:
            if end.outcome.error is None:
                raise MemoryError
            finish(end, done)

        app.store.finish = no_memory  # type: ignore[method-assign]
        assert [code_of(app, app.submit("f")) for _ in range(3)] == ["failed"] * 3
        until(lambda: app.engine.queue.counts()["running"] == 0)
        app.store.finish = finish  # type: ignore[method-assign]
        assert finished(app, app.submit("f")).status is Status.COMPLETED


def test_a_list_of_finished_jobs_holds_none_that_the_status_calls_running(tmp_path: Path) -> None:
    with serving(tmp_path, {"f": get_flow("/f", steps=[python(lambda context: 1)])}) as app:
        finish, seen = app.store.finish, []

        def look_first(end: Any, done: Any) -> None:
            def look(result: Any, error: Any) -> None:  # the end is on disk, but nobody was told
                listed = page_of_jobs(app, ANYBODY, None, Status.COMPLETED, 10, None)[0]
                seen.extend(job for job in listed if (now := app.status(job)) and now.status is Status.RUNNING)
                done(result, error)

            finish(end, look)

        app.store.finish = look_first  # type: ignore[method-assign]
        finished(app, app.submit("f"))
        assert seen == []
        assert len(page_of_jobs(app, ANYBODY, None, Status.COMPLETED, 10, None)[0]) == 1


# ---- Timeouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flow", "settings"), [({"timeout": 5}, {}), ({}, {"job_timeout": 5})], ids=["flow", "setting"]
)
def test_a_run_over_its_time_is_a_timeout(
    tmp_path: Path, gate: Gate, flow: dict[str, Any], settings: dict[str, Any]
) -> None:
    clock = FakeClock()
    tree = get_flow("/g", steps=[python(gate)], **flow)
    with serving(tmp_path, {"gate": tree}, clock, **settings) as app:
        job = app.submit("gate")
        gate.entered()
        clock.tick(5)
        gate.open.set()
        assert code_of(app, job) == "timeout"
        assert app.result(job.id).status_code == 504


def test_a_step_that_does_not_end_is_ended_for_it_and_its_late_result_changes_nothing(
    tmp_path: Path, gate: Gate
) -> None:
    clock = FakeClock()
    after: list[int] = []
    flow = get_flow("/g", steps=[python(gate), python(lambda context: after.append(1), "q")], timeout=5)
    with serving(tmp_path, {"gate": flow}, clock) as app:
        job = app.submit("gate")
        gate.entered()
        app.housekeeper.tick(clock.tick(5.5))
        found = app.status(job.id)
        assert found is not None and found.status is Status.RUNNING  # a thread that looks ends it by itself
        app.housekeeper.tick(clock.tick(1))
        assert code_of(app, job) == "timeout"
        before, document = app.status(job.id), app.result(job.id).json()
        assert (document["status"], document["code"]) == (504, "timeout")
        gate.open.set()
        until(lambda: app.engine.queue.counts()["running"] == 0)
        done = threading.Event()
        app.store.find_key("", "", "", b"", 0, lambda result, error: done.set())
        assert done.wait(10)
        assert (app.status(job.id), app.result(job.id).json()) == (before, document)
    assert after == []


def test_a_wait_counts_as_time_of_the_run(tmp_path: Path) -> None:
    clock = FakeClock()
    flow = get_flow("/w", steps=[{"name": "w", "wait": 60}], timeout=10)
    with serving(tmp_path, {"w": flow}, clock) as app:
        job = app.submit("w")
        suspended(app)
        app.housekeeper.tick(clock.tick(9.9))
        assert app.engine.queue.counts()["waiting"] == 1
        app.housekeeper.tick(clock.tick(0.2))
        assert code_of(app, job) == "timeout"


# ---- Waiting ---------------------------------------------------------------------------------------------------------


def test_waiting_jobs_hold_no_thread(tmp_path: Path) -> None:
    clock = FakeClock()
    flows = {
        "w": get_flow("/w", steps=[{"name": "w", "wait": 60}], response={"body": "waited"}),
        "f": get_flow("/f", steps=[python(lambda context: 1)]),
    }
    with serving(tmp_path, flows, clock, workers=1) as app:
        waiting = [app.submit("w") for _ in range(30)]
        assert finished(app, app.submit("f")).status is Status.COMPLETED
        suspended(app, 30)
        assert {app.status(job.id).status for job in waiting} == {Status.RUNNING}  # type: ignore[union-attr]
        app.housekeeper.tick(clock.tick(59))
        assert app.engine.queue.counts()["waiting"] == 30
        app.housekeeper.tick(clock.tick(1))
        assert {finished(app, job).status for job in waiting} == {Status.COMPLETED}
        assert {finished(app, job).attempt for job in waiting} == {1}


def test_a_resumed_run_sees_what_it_saw_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "time_ns", lambda: clock.ms * 1_000_000)  # what now() reads
    ran: list[str] = []
    steps = [
        {"name": "id", "set": "${uuid()}"},
        {"name": "at", "set": "${now()}"},
        python(lambda context: ran.append("p") or {"id": context.steps["id"], "at": context.steps["at"]}),
        {"name": "w", "wait": 60},
        {"name": "w2", "wait": 60},
    ]
    flow = get_flow("/w", steps=steps, response={"body": "${[p, {'id': id, 'at': at}]}"})
    with serving(tmp_path, {"w": flow}, clock) as app:
        job = app.submit("w")
        for _ in range(2):
            suspended(app)
            app.housekeeper.tick(clock.tick(60))
        assert finished(app, job).status is Status.COMPLETED
        before, after = app.result(job.id).json()
    assert before == after
    assert ran == ["p"]


def test_a_step_that_was_skipped_stays_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr(time, "time_ns", lambda: clock.ms * 1_000_000)  # what now() reads
    ran: list[str] = []
    steps = [
        {"name": "start", "set": "${now()}"},
        python(lambda context: ran.append("late"), when="${now() > start}"),
        {"name": "w", "wait": 60},
    ]
    with serving(tmp_path, {"w": get_flow("/w", steps=steps, response={"body": "${p}"})}, clock) as app:
        job = app.submit("w")
        suspended(app)
        app.housekeeper.tick(clock.tick(60))
        assert finished(app, job).status is Status.COMPLETED
    assert ran == []


def test_a_short_wait_keeps_its_thread(tmp_path: Path) -> None:
    with serving(tmp_path, {"w": get_flow("/w", steps=[{"name": "w", "wait": "20ms"}])}) as app:
        assert finished(app, app.submit("w")).status is Status.COMPLETED


@pytest.mark.sqlite  # its clock is the test's
def test_a_waiting_job_resumes_after_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    ran: list[int] = []
    steps = [python(lambda context: ran.append(1) or len(ran)), {"name": "w", "wait": 60}]
    flows = {"w": get_flow("/w", steps=steps, response={"body": "${p}"})}
    with serving(tmp_path, flows, clock) as app:
        job = app.submit("w")
        suspended(app)
    clock.tick(30)
    with serving(tmp_path, flows, clock) as app:
        assert app.engine.queue.counts()["waiting"] == 1
        app.housekeeper.tick(clock.tick(30))
        done = finished(app, job)
        assert (done.status, done.attempt) == (Status.COMPLETED, 1)
        assert app.result(job.id).json() == 1
    assert ran == [1]


# ---- Restart ---------------------------------------------------------------------------------------------------------


def interrupt(path: Path, job: Job, attempt: int) -> None:
    """Put on record what a killed server leaves of a run: it began, and there is no end."""
    with closing(sqlite3.connect(path / "jobs.db")) as database:
        database.execute(
            "UPDATE jobs SET attempt = ?, started = created WHERE seq = ? AND status = 'Running'",
            (attempt, job.key.seq),
        )
        database.commit()


def left_behind(folder: Path, flow: dict[str, Any], gate: Gate) -> Job:
    """A job whose first step is finished, and which was in its second one when the server stopped."""
    with serving(folder, {"f": flow}, shutdown_timeout=0) as app:
        job = app.submit("f")
        gate.entered()
        return job


@pytest.mark.sqlite  # the crash is made in its file; test_nodes.py has real ones
@pytest.mark.parametrize(
    ("restart", "firsts", "code"), [("resume", 1, None), ("rerun", 2, None), ("fail", 1, "interrupted")]
)
def test_an_interrupted_job_restarts_as_its_flow_says(
    tmp_path: Path, gate: Gate, restart: str, firsts: int, code: str | None
) -> None:
    ran: list[int] = []
    steps = [python(lambda context: ran.append(1)), python(gate, "q")]
    flow = get_flow("/f", steps=steps, restart=restart, response={"body": "${q}"})
    job = left_behind(tmp_path, flow, gate)
    interrupt(tmp_path, job, 1)
    gate.open.set()
    with serving(tmp_path, {"f": flow}) as app:
        assert code_of(app, job) == code
        assert app.result(job.id).status_code == (500 if code else 200)
    assert len(ran) == firsts


@pytest.mark.sqlite  # the crash is made in its file
def test_a_job_that_begins_anew_uses_nothing_of_before_also_after_a_wait(tmp_path: Path, gate: Gate) -> None:
    clock, ran = FakeClock(), list[str]()
    steps = [python(lambda context: ran.append("a"), "a"), {"name": "w", "wait": 60}]
    steps += [python(lambda context: ran.append("b"), "b"), python(gate, "q")]
    flows = {"f": get_flow("/f", steps=steps, restart="rerun")}
    with serving(tmp_path, flows, clock, shutdown_timeout=0) as app:
        job = app.submit("f")
        suspended(app)
        app.housekeeper.tick(clock.tick(60))
        gate.entered()
    interrupt(tmp_path, job, 1)
    gate.open.set()
    with serving(tmp_path, flows, clock) as app:
        suspended(app)
        app.housekeeper.tick(clock.tick(60))
        assert finished(app, job).status is Status.COMPLETED
    assert ran == ["a", "b", "a", "b"]


@pytest.mark.sqlite  # the crash is made in its file
@pytest.mark.parametrize(("before", "code"), [(MAX_ATTEMPTS - 1, None), (MAX_ATTEMPTS, "interrupted")])
def test_a_job_interrupted_too_often_is_given_up(tmp_path: Path, gate: Gate, before: int, code: str | None) -> None:
    flow = get_flow("/f", steps=[python(gate)])
    job = left_behind(tmp_path, flow, gate)
    interrupt(tmp_path, job, before)
    gate.open.set()
    with serving(tmp_path, {"f": flow}) as app:
        assert code_of(app, job) == code
        assert finished(app, job).attempt == (before + 1 if code is None else before)  # a job given up does not run
    assert gate.runs == (2 if code is None else 1)


def test_stop_waits_for_what_runs(tmp_path: Path) -> None:
    begun = threading.Event()

    def work(context: Context) -> str:
        begun.set()
        time.sleep(0.1)
        return "done"

    with serving(tmp_path, {"f": get_flow("/f", steps=[python(work)])}) as app:
        job = app.submit("f")
        assert begun.wait(10)
        assert app.stop() == 0
    with serving(tmp_path, {}) as app:
        assert app.result(job.id).json() == "done"


def test_stop_leaves_the_rest_to_the_next_start_and_what_had_begun_was_interrupted(tmp_path: Path, gate: Gate) -> None:
    flow = get_flow("/f", steps=[python(gate)], restart="fail")
    with serving(tmp_path, {"f": flow}, workers=1, shutdown_timeout=0.05) as app:
        jobs = [app.submit("f") for _ in range(3)]
        gate.entered()
        assert app.stop() == 1
        assert app.stop() == 0
    gate.open.set()
    with serving(tmp_path, {"f": flow}, workers=1) as app:
        assert [code_of(app, job) for job in jobs] == ["interrupted", None, None]
        assert [finished(app, job).attempt for job in jobs] == [1, 1, 1]
    assert gate.runs == 3


@pytest.mark.sqlite  # its clock is the test's
def test_a_job_keeps_the_flow_it_was_accepted_with(tmp_path: Path, gate: Gate) -> None:
    with serving(tmp_path, {"f": get_flow("/f", steps=[{"name": "w", "wait": 60}], response={"body": "old"})}) as app:
        job = app.submit("f")
        suspended(app)
        app.deploy("f", get_flow("/f", steps=[], response={"body": "new"}))
        new = app.submit("f")
        finished(app, new)
        assert app.result(new.id).json() == "new"
    clock = FakeClock(job.created + 61_000)
    with serving(tmp_path, {"f": get_flow("/f", steps=[], response={"body": "newer"})}, clock) as app:
        finished(app, job)
        assert app.result(job.id).json() == "old"


@pytest.mark.sqlite  # servers that share a database take only jobs of flows in service
def test_jobs_of_a_flow_that_is_not_in_service_keep_within_its_limit(tmp_path: Path) -> None:
    running, most, lock = [0], [0], threading.Lock()

    def slow(context: Context) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.1)
        with lock:
            running[0] -= 1

    def application(clock: Clock | None = None) -> AsteraLite:
        app = AsteraLite(clock=clock, database=str(tmp_path / "jobs.db"), workers=8)
        app.step("slow")(slow)
        return app

    steps = [{"name": "w", "wait": 60}, {"name": "s", "slow": {}}]
    with application() as app:
        app.deploy("f", get_flow("/f", steps=steps, concurrency=1))
        jobs = [app.submit("f") for _ in range(4)]
        suspended(app, 4)
    with application(FakeClock(jobs[-1].created + 61_000)) as app:
        until(lambda: app.engine.queue.release(1 << 62) is None and not app.engine.queue.entries)
        assert [finished(app, job).status for job in jobs] == [Status.COMPLETED] * 4
    assert most == [1]


@pytest.mark.sqlite  # there is no store
def test_who_waits_for_a_job_is_told_even_if_another_goes_at_that_moment() -> None:
    key, watchers, told = JobKey(1, 1), Watchers(), threading.Event()
    end = threading.Thread(target=watchers.tell, args=(key,))

    class Going:
        """A watcher during whose removal the job ends."""

        __hash__ = None  # type: ignore[assignment]

        def __call__(self) -> None: ...

        def __eq__(self, other: object) -> bool:
            if end.ident is None:
                end.start()
                end.join(0.1)
            return self is other

    going = Going()
    watchers.add(key, told.set)
    watchers.add(key, going)
    watchers.remove(key, going)
    end.join()
    assert told.is_set()


@pytest.mark.sqlite  # its clock is the test's
@pytest.mark.parametrize("resource", ["/f/{a}/{id}", "/{id}"])
def test_a_job_whose_flow_has_another_resource_by_now_ends(tmp_path: Path, resource: str) -> None:
    def flow(resource: str, *steps: Any) -> dict[str, Any]:
        parameters = {name: {"in": "path"} for name in ("a", "id") if name in resource}
        return get_flow(resource, steps=list(steps), request={"parameters": parameters})

    waits = flow("/f/{id}", {"name": "w", "wait": 60}, python(lambda context: 1))  # a function is not stored
    with serving(tmp_path, {"f": waits}) as app:
        job = app.submit("f", {"id": "1"})
        suspended(app)
    clock = FakeClock(job.created + 61_000)
    with serving(tmp_path, {"f": flow(resource)}, clock) as app:
        assert code_of(app, job) == "interrupted"


def test_an_app_that_was_stopped_refuses_instead_of_waiting_for_ever(tmp_path: Path) -> None:
    with serving(tmp_path, {"f": get_flow("/f", steps=[], response={"body": 1})}) as app:
        pass
    ended: list[str] = []

    def call(method: Callable[[str], object]) -> None:
        try:
            method("f")
        except Exception as error:
            ended.append(type(error).__name__)

    callers = [threading.Thread(target=call, args=(method,), daemon=True) for method in (app.submit, app.run)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(0.5)
    assert len(ended) == 2


# ---- Retry-After -----------------------------------------------------------------------------------------------------


@pytest.mark.sqlite  # what is shared waits in the database
def test_retry_after_grows_with_the_queue_and_the_time_of_a_run(tmp_path: Path, gate: Gate) -> None:
    clock = FakeClock()
    flows = {"gate": get_flow("/g", steps=[python(gate)]), "f": get_flow("/f", steps=[python(lambda context: 1)])}
    with serving(tmp_path, flows, clock, workers=1) as app:
        assert app.engine.retry_after("f") == 1
        first = app.submit("gate")
        gate.entered()
        clock.tick(10)
        gate.open.set()
        finished(app, first)
        assert app.engine.retry_after("gate") == 10
        gate.open.clear()
        app.submit("gate")
        gate.entered()
        for _ in range(5):
            app.submit("f")
        assert app.engine.retry_after("gate") == 60
        assert 1 <= app.engine.retry_after("f") <= 10
        gate.open.set()


@pytest.mark.sqlite  # its clock is the test's
def test_a_run_of_a_stored_job_is_on_record_before_it_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = get_flow("/f", steps=[{"name": "w", "wait": 60}, {"name": "s", "set": 1}])
    with serving(tmp_path, {"f": flow}) as app:
        job = app.submit("f")
        suspended(app)
    begun: list[int] = []
    start = SqliteStore.start

    def spy(store: SqliteStore, key: JobKey, attempt: int, *rest: Any) -> None:
        begun.append(attempt)
        start(store, key, attempt, *rest)

    monkeypatch.setattr(SqliteStore, "start", spy)
    with serving(tmp_path, {"f": flow}, FakeClock(job.created + 61_000)) as app:
        assert finished(app, job).attempt == 1
    assert begun == [1]


def test_a_job_that_memory_runs_out_for_takes_no_place_of_its_flow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(*given: Any) -> None:
        raise MemoryError

    limit = {"limit": 1, "whenFull": "refuse"}
    with serving(tmp_path, {"f": get_flow("/f", steps=[{"name": "w", "wait": 0}], concurrency=limit)}) as app:
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(app.store, "add", add)
            app.submit("f")
        finished(app, app.submit("f"))
