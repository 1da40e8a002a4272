"""The application inside another program: what it says when it is misused, and what is left when it ends."""

from __future__ import annotations

import asyncio
import datetime
import gc
import inspect
import json
import math
import os
import pickle
import queue
import sqlite3
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
from support import ROOT, database_in, get_flow, until

import astera_lite
from astera_lite import (
    AsteraError,
    AsteraLite,
    Busy,
    ConfigError,
    Conflict,
    Context,
    Fault,
    FlowError,
    InputError,
    Job,
    NotFound,
    Server,
    Settings,
    Status,
    StoreError,
)

pytestmark = pytest.mark.both_stores


def application(folder: Path, **settings: Any) -> AsteraLite:
    app = AsteraLite(**{"database": database_in(folder), "workers": 4, "shutdown_timeout": 0.2, **settings})
    gates = dict[str, threading.Event]()

    @app.flow("GET /double/{n}")
    def double(context: Context, n: int) -> int:
        return 2 * n

    @app.flow("GET /gate/{name}")
    def gate(context: Context, name: str) -> str:
        gates.setdefault(name, threading.Event()).wait(20)
        return name

    app.gates = gates  # type: ignore[attr-defined]
    return app


def open_gate(app: AsteraLite, name: str) -> None:
    until(lambda: name in app.gates)  # type: ignore[attr-defined]
    app.gates[name].set()  # type: ignore[attr-defined]


# --- what it says ---


def _of_a_day(context: Context, n: str) -> str:
    return n


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "call",
    [
        lambda app, job: app.run("double", {"n": 1}),
        lambda app, job: app.submit("double", {"n": 1}),
        lambda app, job: app.status(job),
        lambda app, job: app.wait(job),
        lambda app, job: app.result(job),
        lambda app, job: app.cancel(job),
        lambda app, job: app.future(job).result(0),
        lambda app, job: app.future("nonsense").result(0),
        lambda app, job: app.wait("nonsense"),
        lambda app, job: Server(app, port=0),
    ],
)
def test_an_application_that_does_not_run_says_so(
    tmp_path: Path, when: str, call: Callable[[AsteraLite, str], Any]
) -> None:
    app = application(tmp_path)
    with app:
        job = app.submit("double", {"n": 1}).id
    if when == "before":
        app = application(tmp_path)
    with pytest.raises(StoreError, match="with app:"):
        call(app, job)


@pytest.mark.parametrize("path", ["", ":memory:", "file:jobs.db?mode=memory"])
def test_a_database_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"database: .* is not the path of a file"):
        AsteraLite(database=path)


@pytest.mark.parametrize(
    ("misuse", "kind", "message"),
    [
        (lambda app: AsteraLite("jobs.db"), ConfigError, r'^settings: are given by name: AsteraLite\(database="…"\)$'),
        (lambda app: AsteraLite({"database": "jobs.db"}), ConfigError, "^settings: are given by name"),
        (lambda app: AsteraLite(Settings(workers="x")), ConfigError, '^workers: "x" is not a whole number$'),
        (lambda app: app.run("double", 7), InputError, r'^argument params: are given by name, as in \{"n": 1\}$'),
        (lambda app: app.submit("double", ["n"]), InputError, "^argument params: are given by name"),
        (lambda app: app.submit("double", {"n": 1}, base=7), InputError, "^argument base: must be text, without"),
        (lambda app: app.submit("double", {"n": 1}, base="\0"), InputError, "^argument base: must be text"),
        (lambda app: app.submit("double", {"n": 1}, callback_url=b"x"), InputError, "^argument callback_url: must be"),
        (lambda app: app.submit("double", {"n": 1}, idempotency_key=7), InputError, "^argument idempotency_key: must"),
        (lambda app: app.run(["double"]), NotFound, r'^there is no flow \["double"\]'),
        (lambda app: app.submit(app.deployments.by_name["double"]), NotFound, "^there is no flow "),
        (lambda app: Server(app, port="x"), ConfigError, '^port: "x" is not a whole number$'),
        (lambda app: Server(app, port=65536), ConfigError, "^port: must be at most 65535$"),
        (
            lambda app: app.flow("GET /f", parameters={"n": "date"})(_of_a_day),
            FlowError,
            "_of_a_day: n: .*not a mapping",
        ),
        (lambda app: app.deploy({}, "name"), FlowError, "^{}: cannot be deployed: .*expected string .* got 'dict'$"),
        (lambda app: app.step(print), ConfigError, "^step: <built-in function print>: is not a new word"),
        (lambda app: app.flow("GET /f")(partial(lambda context: 1)), FlowError, r'the name "" must consist of'),
    ],
)
def test_a_misuse_is_told_in_one_sentence(
    tmp_path: Path, misuse: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    with application(tmp_path) as app, pytest.raises(kind, match=message) as told:
        misuse(app)
    assert "\n" not in str(told.value)


def test_settings_of_a_program_are_read_as_keywords_are(tmp_path: Path) -> None:
    settings = Settings(database=tmp_path / "jobs.db", retention="1h", workers="8", flows="")  # type: ignore[arg-type]
    assert AsteraLite(settings).settings[:] == AsteraLite(**settings._asdict()).settings[:]


def test_an_async_function_is_refused_where_it_is_published(tmp_path: Path) -> None:
    app = application(tmp_path)

    async def later(context: Context) -> None:
        pass

    with pytest.raises(FlowError, match=r"is an async function.*write def"):
        app.flow("GET /later")(later)
    app.step("later")(later)
    with pytest.raises(FlowError, match="/steps/0/later: is an async function"):
        app.deploy("f", {"request": {"method": "GET", "resource": "/f"}, "steps": [{"name": "s", "later": {}}]})


@pytest.mark.parametrize(
    ("annotation", "calls"),
    [
        (int | None, {"": None, "a=3": 3}),
        ("int | None", {"": None, "a=3": 3}),
        (Optional[float], {"": None, "a=3.5": 3.5}),  # noqa: UP045
        (list[int], {"a=3,4": [3, 4]}),
        ("list[bool] | None", {"": None, "a=true": [True]}),
        (list, {"a=3": ["3"]}),
        (Annotated[int, "a note"], {"a=3": 3}),
        (inspect.Parameter.empty, {"a=3": "3"}),
    ],
)
def test_what_annotations_mean(tmp_path: Path, annotation: Any, calls: dict[str, Any]) -> None:
    def own(context: OnlyForTypes, a) -> OnlyForTypes:  # type: ignore[no-untyped-def, name-defined] # noqa: F821
        return [a]

    own.__annotations__["a"] = annotation
    if annotation is inspect.Parameter.empty:
        del own.__annotations__["a"]
    with application(tmp_path) as app, Server(app, port=0) as server:
        app.flow("GET /own")(own)
        for query, value in calls.items():
            with urllib.request.urlopen(f"{server.url}/api/publishing/own?{query}", timeout=10) as answer:
                assert json.load(answer) == [value]
        if None in calls.values():
            assert app.run("own", {"a": None}).json() == [None]
        else:
            with pytest.raises(InputError, match="a: is missing"):
                app.run("own")


def test_an_argument_body_gets_the_json_body(tmp_path: Path) -> None:
    with application(tmp_path) as app:

        @app.flow("POST /count")
        def count(context: Context, body: dict[str, int], add: int = 0) -> int:
            return sum(body.values()) + add

        @app.flow("PUT /maybe")
        def maybe(context: Context, body: list[str] | None) -> Any:
            return body

        @app.flow("GET /search")
        def search(context: Context, body: str) -> str:
            return body

        assert app.run("count", {"add": 3}, {"a": 1, "b": 2}).json() == 6
        for wrong in ([1], None):
            with pytest.raises(InputError, match="body"):
                app.run("count", body=wrong)
        assert [app.run("maybe", body=body).json() for body in (["x"], None)] == [["x"], None]
        assert app.run("search", {"body": "text"}).json() == "text"


class Thing:
    def method(self, context: Context) -> None: ...
    def bound(self, context: Context, n: int = 1) -> int:
        return n


def _refused() -> dict[str, tuple[str, Any]]:
    def day(context: Context, day: datetime.date) -> None: ...
    def either(context: Context, a: int | str) -> None: ...
    def nested(context: Context, a: list[list[int]]) -> None: ...
    def unknown(context: Context, a: Unheard) -> None: ...  # type: ignore[name-defined] # noqa: F821
    def rest(context: Context, *args: int, **more: int) -> None: ...
    def position(context: Context, a: int, /) -> None: ...
    def nothing() -> None: ...
    def no_context(a: int) -> None: ...
    def data(context: Context, body: bytes) -> None: ...
    def default(context: Context, body: dict[str, int] = {}) -> None: ...  # noqa: B006

    return {
        r'day: day: cannot be datetime.date: write str, .* parameters={"day": {"type": "date"}}': ("GET /x", day),
        r"either: a: cannot be int \| str: write str, int, .* \| None": ("GET /x", either),
        r"nested: a: cannot be list\[list\[int\]\]": ("GET /x", nested),
        r"unknown: a: .* cannot be read .* Unheard: name 'Unheard' is not defined": ("GET /x", unknown),
        r"(?s)rest: args: cannot be given by name.*rest: more: cannot": ("GET /x", rest),
        r"position: a: cannot be given by name": ("GET /x", position),
        r"nothing: has no argument for its Context": ("GET /x", nothing),
        r"no_context: a: is the first argument, which gets the Context": ("GET /x", no_context),
        r"method: self: makes it a method": ("GET /x", Thing.method),
        r"data: body: cannot be bytes: write dict": ("POST /x", data),
        r"default: body: can have only the default None": ("POST /x", default),
    }


@pytest.mark.parametrize(("message", "published"), _refused().items())
def test_a_function_that_no_request_can_call_is_refused(
    tmp_path: Path, message: str, published: tuple[str, Any]
) -> None:
    app = application(tmp_path)
    with pytest.raises(FlowError, match=message):
        app.flow(published[0])(published[1])


def test_other_ways_to_publish(tmp_path: Path) -> None:
    with application(tmp_path) as app:
        with pytest.raises(FlowError, match=r'own: has @app.flow without arguments: .*@app.flow\("GET /name"\)'):

            @app.flow  # type: ignore[arg-type]
            def own(context: Context) -> None: ...

        @app.flow("GET /day", processing="asynchronous", parameters={"day": {"type": "date"}})
        def day(context: Context, day: Literal["2026-11-24", "2026-11-25"]) -> str:
            return day

        app.flow("GET /bound")(Thing().bound)
        assert app.run("bound", {"n": 2}).json() == 2
        with pytest.raises(InputError, match="must be a date"):
            app.run("day", {"day": "today"})
        assert app.deployments.by_name["day"].modes == {"asynchronous"}


@pytest.mark.parametrize(
    ("params", "body", "message"),
    [
        ({}, {"x": [1, math.nan]}, r"^body /x/1: .*not JSON"),
        ({}, {"a/b": object()}, r"^body /a~1b: a value of type object cannot"),
        ({}, {(1,): 2}, "^body: "),
        ({}, "\ud800", "^body: .*surrogates"),
        ({"n": object()}, None, r"^query n: a value of type object cannot"),
        ({"n": [1, math.inf]}, None, r"^query n: .*not JSON"),
        ({1: 2}, None, "^query 1: is no parameter"),
    ],
)
def test_a_value_that_cannot_be_sent_is_an_input_error(
    tmp_path: Path, params: dict[Any, Any], body: Any, message: str
) -> None:
    with application(tmp_path) as app:

        @app.flow("POST /own")
        def own(context: Context, body: Any = None, n: int = 1) -> None: ...

        for call in (app.run, app.submit):
            with pytest.raises(InputError, match=message):
                call("own", params, body)


def test_a_job_stands_for_its_id(tmp_path: Path) -> None:
    with application(tmp_path) as app:
        job = app.submit("double", {"n": 4})
        assert app.wait(job, 10).status is app.status(job).status is Status.COMPLETED  # type: ignore[union-attr]
        assert app.future(job).result(10).id == job.id
        assert app.result(job).json() == 8
        with pytest.raises(Conflict):
            app.cancel(job)
        gone = job._replace(key=job.key._replace(seq=1))
        with pytest.raises(NotFound, match=f'there is no job "{gone.id}"'):
            app.wait(gone)


def test_every_public_name_is_there_and_described() -> None:
    for name in astera_lite.__all__:
        public = getattr(astera_lite, name)
        assert inspect.getdoc(public), name
        for member, value in vars(public).items() if inspect.isclass(public) else ():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod)):
                assert inspect.getdoc(value), f"{name}.{member}"


def test_importing_starts_nothing() -> None:
    say = (
        "import gc, logging, signal, sys, threading\n"
        "def state(): return signal.getsignal(2), signal.getsignal(15), sys.getswitchinterval(), gc.get_threshold()\n"
        "before = state()\n"
        "from astera_lite import *\n"
        "assert state() == before and not logging.root.handlers and not logging.getLogger('astera_lite').handlers\n"
        "print(threading.active_count(), 'asyncio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", say], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "1 False\n"), done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_leaves_the_application_to_its_parent(tmp_path: Path) -> None:
    program = """
import os, sys, urllib.request
from astera_lite import AsteraLite, Context, Server, StoreError
app = AsteraLite(database=sys.argv[1], shutdown_timeout=300)
@app.flow("GET /one")
def one(context: Context) -> int:
    return 1
with app, Server(app, port=0) as server:
    if os.fork() == 0:
        app.store.close = lambda *_: print("the child has closed the database", flush=True)
        try:
            app.submit("one")
        except StoreError as error:
            print(error, flush=True)
        sys.exit(3)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
    print(app.wait(app.submit("one")).status, urllib.request.urlopen(f"{server.url}/api/publishing/one").status)
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, database_in(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = "The application is not running: enter it with `with app:`, or call app.start().\n3\nCompleted 200\n"
    assert done.stdout == said, done.stderr


def test_a_server_is_started_once(tmp_path: Path) -> None:
    with application(tmp_path) as app, Server(app, port=0).start() as server:
        assert server.start() is server
        assert urllib.request.urlopen(f"{server.url}/api/publishing/double/2", timeout=10).read() == b"4\n"
    with pytest.raises(RuntimeError, match="has stopped"):
        server.start()


@pytest.mark.parametrize("timeout", [None, math.inf, 1e300])
def test_a_wait_may_take_as_long_as_the_job(tmp_path: Path, timeout: float | None) -> None:
    with application(tmp_path) as app, ThreadPoolExecutor(1) as pool:
        job = app.submit("gate", {"name": "a"})
        waited = pool.submit(app.wait, job, timeout)
        until(lambda: waited.done() or job.key in app.watchers.by_job)
        open_gate(app, "a")
        assert waited.result().status is Status.COMPLETED
        assert app.wait(job, -1).status is Status.COMPLETED


@pytest.mark.parametrize("done", [math.nan, math.inf, None, "many", {1}])
def test_progress_that_is_no_number_fails_the_step_and_not_the_status(tmp_path: Path, done: Any) -> None:
    with application(tmp_path) as app:

        @app.flow("GET /report")
        def report(context: Context) -> None:
            context.progress(done, 10)

        assert app.wait(app.submit("report")).status is Status.ERROR


# --- futures ---


def test_a_future_gets_the_job_when_it_is_finished(tmp_path: Path) -> None:
    with application(tmp_path) as app:
        job = app.submit("gate", {"name": "a"})
        future = app.future(job.id)
        seen: list[Any] = []
        future.add_done_callback(seen.append)
        assert not future.done()
        open_gate(app, "a")
        assert future.result(10).status is Status.COMPLETED
        until(lambda: seen == [future])
        assert app.future(job.id).result(0) == app.status(job.id)  # also one that is asked for afterwards


def test_a_callback_of_a_future_may_do_whatever_a_program_may(tmp_path: Path) -> None:
    with application(tmp_path) as app, ThreadPoolExecutor(1) as pool:
        seen: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def again(done: Future[Job]) -> None:
            n = app.result(done.result()).json()
            seen.put(n)
            if n < 100:
                job = app.submit("double", {"n": n})
                assert app.wait(job.id, 10).status is Status.COMPLETED
                assert app.run("double", {"n": n}).json() == 2 * n
                app.future(job).add_done_callback(again)

        def fails(done: Future[Job]) -> None:
            raise RuntimeError("it is logged")

        held = app.submit("gate", {"name": "a"})
        for callback in (fails, lambda _: again(app.future(app.submit("double", {"n": 1})))):
            app.future(held).add_done_callback(callback)
        open_gate(app, "a")
        assert [seen.get(timeout=10) for _ in range(7)] == [2, 4, 8, 16, 32, 64, 128]
        assert pool.submit(app.submit, "double", {"n": 1}).result(10)  # and others may submit all the while


def test_a_future_that_finds_no_thread_is_completed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused = threading.Thread.start, list[str]()

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name == "astera-future" and not refused:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_or_refuse)
    with application(tmp_path) as app:
        future = app.future(app.submit("gate", {"name": "a"}))
        open_gate(app, "a")
        assert future.result(10).status is Status.COMPLETED
        assert refused


def test_a_program_may_change_its_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with closing(sqlite3.connect("data/stock.db")) as db:
        db.execute("CREATE TABLE parts (name)")
    flow = get_flow("/parts", steps=[{"name": "rows", "sql": {"database": "stock.db", "query": "SELECT * FROM parts"}}])
    Path("flows/parts.json").write_text(json.dumps(flow | {"response": {"body": "${rows}"}}))
    with AsteraLite(database="jobs.db", flows="flows") as app:
        monkeypatch.chdir("/")
        app.deployer.refresh(anyway=True)
        assert app.run("parts").json() == []


@pytest.mark.parametrize("unknown", ["nonsense", "01a20d86-331a-7000-abe7-ee1e3f366187"])
def test_a_future_of_no_job_is_not_found(tmp_path: Path, unknown: str) -> None:
    with application(tmp_path) as app, pytest.raises(NotFound):
        app.future(unknown).result(0)


def test_many_futures_in_an_event_loop_hold_no_threads(tmp_path: Path) -> None:
    async def one(app: AsteraLite, n: int) -> int:
        job = await asyncio.to_thread(app.submit, "double", {"n": n})
        await asyncio.wrap_future(app.future(job.id))
        return int(app.result(job.id).text)

    async def all_of_them(app: AsteraLite) -> list[int]:
        waiting = [asyncio.wrap_future(app.future(app.submit("gate", {"name": "g"}).id)) for _ in range(3)]
        doubled = await asyncio.gather(*(one(app, n) for n in range(100)))
        given_up = asyncio.wrap_future(app.future(app.submit("gate", {"name": "g"}).id))
        given_up.cancel()
        open_gate(app, "g")
        assert {job.status for job in await asyncio.gather(*waiting)} == {Status.COMPLETED}
        return doubled

    with application(tmp_path) as app:
        assert asyncio.run(all_of_them(app)) == [2 * n for n in range(100)]
        assert app.watchers.by_job == {}  # the one that was given up watches no more


def test_who_waits_for_a_job_when_the_application_stops_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    app = application(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with app:
            job = app.submit("gate", {"name": "never"})
            until(lambda: "never" in app.gates)  # type: ignore[attr-defined]
            future, waiting, given_up = app.future(job.id), pool.submit(app.wait, job.id), app.future(job.id)
            given_up.cancel()
        assert f"job {job.id}: flow gate does not end in time" in caplog.messages
        for each in (future, waiting):
            with pytest.raises(StoreError, match="is not running"):
                each.result(10)
        with pytest.raises(CancelledError):
            given_up.result(0)
        open_gate(app, "never")
    with application(tmp_path) as app:  # and the next start runs it again
        open_gate(app, "never")
        assert app.wait(job.id, timeout=10).status is Status.COMPLETED


def test_a_stop_that_a_person_interrupts_closes_the_database(tmp_path: Path) -> None:
    app = application(tmp_path, shutdown_timeout=60)
    with pytest.raises(KeyboardInterrupt), app:
        job = app.submit("gate", {"name": "never"})
        until(lambda: "never" in app.gates)  # type: ignore[attr-defined]
        changed: Any = app.engine.queue.changed
        wait = changed.wait

        def interrupted(timeout: float | None = None) -> None:
            changed.wait = wait
            raise KeyboardInterrupt

        changed.wait = interrupted
    assert not app.is_open
    open_gate(app, "never")
    with application(tmp_path) as app:
        open_gate(app, "never")
        assert app.wait(job.id, timeout=10).status is Status.COMPLETED


def test_the_stop_waits_for_the_callbacks_of_futures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    join, may_end, ended = threading.Thread.join, threading.Event(), threading.Event()

    def open_and_join(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "astera-future":
            may_end.set()
        join(thread, timeout)

    def callback(done: Future[Job]) -> None:
        may_end.wait(10)
        ended.set()

    monkeypatch.setattr(threading.Thread, "join", open_and_join)
    app = application(tmp_path)
    with app:
        app.future(app.submit("gate", {"name": "never"})).add_done_callback(callback)
        until(lambda: "never" in app.gates)  # type: ignore[attr-defined]
    assert ended.is_set()
    open_gate(app, "never")


# --- what is left ---


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("astera")]


def memory_mb() -> float:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_threads_descriptors_and_memory_are_given_back(tmp_path: Path) -> None:
    def once() -> None:
        app = application(tmp_path)
        with app, Server(app, port=0) as server:
            with urllib.request.urlopen(f"{server.url}/api/publishing/double/4", timeout=10) as answer:
                assert answer.read() == b"8\n"
            job = app.submit("double", {"n": 3})
            assert app.wait(job.id, timeout=10).status is Status.COMPLETED
            assert len(our_threads()) >= 3

    until(lambda: not our_threads())  # a run may outlive the application of an earlier test
    for _ in range(10):
        once()
    descriptors, memory = len(os.listdir("/proc/self/fd")), memory_mb()
    for _ in range(50):
        once()
    assert our_threads() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert memory_mb() - memory < 5  # an application with its server takes more than 10


def test_documents_and_counters_of_a_server_go_with_it(tmp_path: Path) -> None:
    def once(app: AsteraLite) -> weakref.ref[Any]:
        def own(context: Context) -> int:
            return 1

        app.flow("GET /own")(own)
        with app, Server(app, port=0), Server(app, port=0) as server:
            for path in ("/openapi.json", "/postman.json", "/metrics"):
                urllib.request.urlopen(server.url + path, timeout=10).close()
        return weakref.ref(own)

    app = application(tmp_path)
    own = once(app)
    assert app.metrics.connections == []
    del app
    gc.collect()
    assert own() is None


def test_two_applications_with_servers_know_nothing_of_each_other(tmp_path: Path) -> None:
    with application(tmp_path) as one, application(tmp_path, database=str(tmp_path / "two.db")) as two:

        @two.flow("GET /own")
        def own(context: Context) -> str:
            return "two"

        with Server(one, port=0) as first, Server(two, port=0) as second:
            assert first.url != second.url
            job = one.submit("double", {"n": 1})
            assert one.wait(job.id, timeout=10).status is Status.COMPLETED
            assert two.status(job.id) is None
            with pytest.raises(NotFound):
                one.run("own")
            assert two.run("own").json() == "two"
        one.stop()
        assert two.run("double", {"n": 2}).json() == 4


@pytest.mark.parametrize("key", ["a\0b", "\ud800"])
def test_a_key_that_not_every_database_can_hold_is_a_fault_of_the_input(tmp_path: Path, key: str) -> None:
    with AsteraLite(database=database_in(tmp_path)) as app:
        app.deploy("f", get_flow("/f"))
        with pytest.raises(InputError, match="idempotency_key"):
            app.submit("f", idempotency_key=key)
        assert app.submit("f", idempotency_key="é").id == app.submit("f", idempotency_key="é").id


@pytest.mark.parametrize(
    "error",
    [
        ConfigError([Fault("port", "", "is odd")]),
        InputError([{"in": "query", "name": "n", "message": "is odd"}], status=422),
        Busy("Later.", 5, 429),
        Conflict("No.", 412),
        NotFound("Nothing."),
    ],
)
def test_an_error_reaches_the_parent_of_a_worker_process(error: AsteraError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
