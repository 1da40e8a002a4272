"""The application inside another program: what it says when it is misused, and what is left when it ends."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import subprocess
import sys
import threading
import urllib.request
import weakref
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, until

import astera_lite
from astera_lite import (
    AsteraLite,
    ConfigError,
    Context,
    FlowError,
    NotFound,
    Server,
    Status,
    StoreError,
)


def application(folder: Path, **settings: Any) -> AsteraLite:
    app = AsteraLite(**{"database": str(folder / "jobs.db"), "workers": 4, "shutdown_timeout": 0.2, **settings})
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
    with pytest.raises(ConfigError, match=r"database: .* is no path of a file"):
        AsteraLite(database=path)


def test_an_async_function_is_refused_where_it_is_published(tmp_path: Path) -> None:
    app = application(tmp_path)

    async def later(context: Context) -> None:
        pass

    with pytest.raises(FlowError, match=r"is an async function.*write def"):
        app.flow("GET /later")(later)
    app.step("later")(later)
    with pytest.raises(FlowError, match="/steps/0/later: is an async function"):
        app.deploy("f", {"request": {"method": "GET", "resource": "/f"}, "steps": [{"name": "s", "later": {}}]})


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
        assert app._watchers == {}  # the one that was given up watches no more


def test_who_waits_for_a_job_when_the_application_stops_is_told(tmp_path: Path) -> None:
    app = application(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        with app:
            job = app.submit("gate", {"name": "never"})
            until(lambda: "never" in app.gates)  # type: ignore[attr-defined]
            future, waiting, given_up = app.future(job.id), pool.submit(app.wait, job.id), app.future(job.id)
            given_up.cancel()
        for each in (future, waiting):
            with pytest.raises(StoreError, match="is not running"):
                each.result(10)
        with pytest.raises(CancelledError):
            given_up.result(0)
        open_gate(app, "never")
    with application(tmp_path) as app:  # and the next start runs it again
        open_gate(app, "never")
        assert app.wait(job.id, timeout=10).status is Status.COMPLETED


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

    before = our_threads()
    for _ in range(10):
        once()
    descriptors, memory = len(os.listdir("/proc/self/fd")), memory_mb()
    for _ in range(50):
        once()
    assert our_threads() == before
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
