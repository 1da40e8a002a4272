"""Room 10, the housekeeper: what is done when its time comes, with a clock that is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import FakeClock, Sink, get_flow, running, until

from astera_lite import AsteraLite, Housekeeper, Job, Status, StoreError

FLOWS = {
    "f": get_flow("/f", steps=[], response={"body": "x"}),
    "w": get_flow("/w", steps=[{"name": "w", "wait": 60}], response={"body": "waited"}, timeout=10**6),
}


@contextmanager
def serving(folder: Path, clock: FakeClock, **settings: Any) -> Iterator[AsteraLite]:
    """An app whose own housekeeper rests, so that nothing is done but by tick()."""
    app = AsteraLite(clock=clock, database=str(folder / "jobs.db"), shutdown_timeout=5, **settings)
    for name, tree in FLOWS.items():
        app.deploy(name, tree)
    with app:
        app.housekeeper.stop(5)
        app.housekeeper = Housekeeper(app.store, app.engine, app.courier, clock)
        yield app


def done(app: AsteraLite, flow: str = "f", **more: Any) -> Job:
    job = app.wait(app.submit(flow, **more).id, 10)
    assert job.status is not Status.RUNNING
    return job


def tick(app: AsteraLite, now: int) -> int:
    """A tick, and what it wrote is on disk."""
    next_at = app.housekeeper.tick(now)
    written = threading.Event()
    app.store.find_key("", "", "", b"", 0, lambda result, error: written.set())
    assert written.wait(10)
    return next_at


def stored(app: AsteraLite, job: Job) -> bool:
    return app.store.get(job.key) is not None


def test_only_what_has_expired_is_purged(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="1h") as app:
        old = done(app)
        waiting = app.submit("w")
        until(lambda: app.engine.queue.counts()["waiting"] == 1)
        clock.tick(1800)
        young = done(app)
        tick(app, clock.tick(1799.999))
        assert app.status(old.id) is not None
        clock.tick(0.001)
        assert app.status(old.id) is None  # from this instant, purged or not
        tick(app, clock.tick(1))
        assert not stored(app, old)
        assert stored(app, young) and stored(app, waiting)


def test_a_running_job_is_never_purged_and_expires_counts_from_its_end(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="1s") as app:
        job = app.submit("w")
        until(lambda: app.engine.queue.counts()["waiting"] == 1)
        for _ in range(5):
            tick(app, clock.tick(10))
        assert app.status(job.id) is not None
        tick(app, clock.tick(10))
        found = app.wait(job.id, 10)
        assert (found.status, found.finished) == (Status.COMPLETED, job.created + 60_000)
        assert found.expires == job.created + 61_000
        tick(app, clock.tick(0.999))
        assert app.result(job.id).json() == "waited"
        tick(app, clock.tick(1))
        assert not stored(app, job)


def test_many_expired_jobs_go_in_small_batches(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="1h") as app:
        jobs = [app.submit("f") for _ in range(450)]
        for job in jobs:
            app.wait(job.id, 10)
        clock.tick(3600)
        batches: list[int] = []
        purge = app.store.purge

        def counted(now: int, limit: int, end: Any) -> None:
            def ended(count: Any, error: Any) -> None:
                end(count, error)
                batches.append(count)

            purge(now, limit, ended)

        app.store.purge = counted  # type: ignore[method-assign]
        for _ in range(4):
            tick(app, clock.now())  # no tick of the clock between: while there are more, it goes on
        assert batches == [128, 128, 128, 66]
        for _ in range(2):
            tick(app, clock.now())
        assert batches == [128, 128, 128, 66, 0], "once nothing was left, the next look is a second later"
        assert app.store.page(0, 10, None, None, None, None) == []


def test_a_purge_that_fails_is_tried_again(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="1h") as app:
        job = done(app)
        purge = app.store.purge
        app.store.purge = lambda now, limit, end: end(None, StoreError("full"))  # type: ignore[method-assign]
        tick(app, clock.tick(3600))
        app.store.purge = purge  # type: ignore[method-assign]
        tick(app, clock.tick(1))
        assert not stored(app, job)


def test_texts_of_flows_are_looked_at_every_hour(tmp_path: Path) -> None:
    clock, looked = FakeClock(), []
    with serving(tmp_path, clock) as app:
        app.store.forget_flows = lambda: looked.append(clock.now())  # type: ignore[method-assign]
        began = clock.now()
        for seconds in (0, 0, 1800, 1800, 1):
            tick(app, clock.tick(seconds))
    assert looked == [began, began + 3_600_000]


def test_a_clock_that_went_back_stops_nothing(tmp_path: Path) -> None:
    """The clock of a shared database does, where a standby whose clock is behind takes over."""
    clock, did = FakeClock(), list[str]()
    with serving(tmp_path, clock) as app:
        app.housekeeper.chores.append(lambda: did.append("chores"))
        app.store.forget_flows = lambda: did.append("forget")  # type: ignore[method-assign]
        app.store.purge = lambda now, limit, end: did.append("purge")  # type: ignore[method-assign]
        for seconds in (0, 0.5, -3600, 0.5, 0.5):
            tick(app, clock.tick(seconds))
            did.append("-")
    every = ["chores", "forget", "purge", "-"]
    assert did == [*every, "-", *every, "-", "chores", "purge", "-"]


def test_what_fails_keeps_nothing_else_from_being_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, did = FakeClock(), list[str]()

    def fail(error: Exception) -> Any:
        raise error

    with serving(tmp_path, clock) as app:
        app.housekeeper.chores += [
            lambda: fail(StoreError("damaged")),
            lambda: fail(StoreError("damaged")),
            lambda: fail(KeyError("a fault of ours")),
            lambda: did.append("chore"),
        ]
        app.store.forget_flows = lambda: fail(StoreError("full"))  # type: ignore[method-assign]
        app.store.purge = lambda now, limit, end: did.append("purge")  # type: ignore[method-assign]
        app.engine.queue.release = lambda now: fail(StoreError("full"))  # type: ignore[method-assign]
        app.courier.send_due = lambda now, wake: did.append("deliver")  # type: ignore[method-assign,assignment,func-returns-value]
        for _ in range(2):
            assert tick(app, clock.tick(1)) == clock.now() + 1000
    assert did == ["chore", "purge", "deliver"] * 2
    said = [record.message for record in caplog.records if record.message.startswith("housekeeping")]
    assert sorted(said) == ["housekeeping", "housekeeping", "housekeeping: damaged", "housekeeping: full"]


def test_a_database_that_does_not_answer_is_asked_once_in_a_tick(tmp_path: Path) -> None:
    """Else a tick would take many timeouts, and a service manager that hears of each tick would end the server."""
    clock, did = FakeClock(), list[str]()

    def fail() -> None:
        did.append("asked")
        clock.tick(5)
        raise StoreError("timeout")

    with serving(tmp_path, clock) as app:
        app.housekeeper.chores += [fail, fail]
        app.store.purge = lambda now, limit, end: did.append("purge")  # type: ignore[method-assign]
        for _ in range(2):
            tick(app, clock.tick(1))
        assert did == ["asked", "asked"]
        del app.housekeeper.chores[-2:]
        tick(app, clock.tick(1))
        assert did == ["asked", "asked", "purge"]


def test_due_waits_are_released_and_the_next_one_is_announced(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="10h") as app:
        jobs = []
        for n in range(20):
            jobs.append(app.submit("w"))
            until(lambda n=n: app.engine.queue.counts()["waiting"] == n + 1)  # type: ignore[misc]
            clock.tick(0.1)
        first = jobs[0].created + 60_000
        assert tick(app, first - 300) == first
        assert tick(app, first - 5000) == first - 4000  # chores want it once a second
        clock.ms = first + 950
        tick(app, clock.now())
        assert [app.wait(job.id, 10).status for job in jobs[:10]] == [Status.COMPLETED] * 10
        assert {app.wait(job.id, 0).status for job in jobs[10:]} == {Status.RUNNING}
        tick(app, clock.tick(60))
        assert {app.wait(job.id, 10).status for job in jobs} == {Status.COMPLETED}


def test_a_callback_is_delivered_and_retried_when_due(tmp_path: Path, sink: Sink) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock) as app:
        sink.answers = [500]
        job = done(app, callback_url=sink.url)
        tick(app, clock.now())
        first = sink.next()
        until(lambda: app.courier.under_way() == [])
        next_at = app.status(job.id).callback.next_at  # type: ignore[union-attr]
        assert next_at is not None
        assert 4500 <= next_at - clock.now() <= 5500
        assert tick(app, next_at - 10) == next_at
        assert sink.got.empty()
        clock.ms = next_at
        tick(app, next_at)
        second = sink.next()
        until(lambda: app.courier.under_way() == [])
        assert second[0]["webhook-id"] == first[0]["webhook-id"]
        assert app.status(job.id).callback.state == "delivered"  # type: ignore[union-attr]


@pytest.mark.parametrize("failing", ["claim_deliveries", "next_delivery"])
def test_the_thread_survives_a_database_that_cannot_be_read(tmp_path: Path, failing: str, sink: Sink) -> None:
    with running(tmp_path, FLOWS) as (app, _, client):
        method = getattr(app.store, failing)
        failed: list[int] = []

        def fail(*arguments: Any, **more: Any) -> Any:
            failed.append(1)
            raise StoreError("damaged")

        setattr(app.store, failing, fail)
        app.housekeeper.wake()
        until(lambda: failed)
        setattr(app.store, failing, method)
        app.housekeeper.wake()
        client.finished(client.get("/api/publishingAsync/f", params={"callbackUrl": sink.url}))
        sink.next()
