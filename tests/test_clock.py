"""The system's clock jumps: results that are fresh stay, what is due is done, and people are told the right time."""

from __future__ import annotations

import logging
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, FakeClock, Running, Sink, get_flow, running, until

from astera_lite import AsteraLite, Clock, Job, SqliteStore, Status, main

YEAR_S = 365 * 86400
START_MS = 1_790_000_000_000  # 2026-09-21
JUMPS = pytest.mark.parametrize("jump_s", [6 * YEAR_S, -6 * YEAR_S, 3 * 3600, -3 * 3600])
FLOWS = {
    "hello": get_flow("/hello", response={"body": "hi"}),
    "nap": get_flow("/nap", steps=[{"name": "w", "wait": 60}], response={"body": "slept"}),
    "alarm": get_flow("/alarm", steps=[{"name": "w", "wait": {"until": "2032-01-01T00:00:00Z"}}], timeout=10**9),
    "bounded": get_flow("/bounded", steps=[{"name": "w", "wait": "1h", "timeout": "2h"}], timeout="3h"),
}


@contextmanager
def serving(folder: Path, clock: FakeClock, **settings: Any) -> Iterator[Running]:
    """A server whose housekeeper does nothing by itself."""
    with running(folder, FLOWS, clock=clock, callback_retries="5s,5m", **settings) as parts:
        parts.app.housekeeper.stop(5)
        yield parts


def tick(app: AsteraLite, clock: FakeClock, seconds: float = 0) -> None:
    """Let time pass, do what is due, and wait until it is on record."""
    app.housekeeper.tick(clock.tick(seconds))
    until(lambda: not app.courier.under_way())
    until(lambda: app.engine.queue.counts()["running"] == 0 == app.engine.queue.counts()["queued"])
    written = threading.Event()
    app.store.find_key("", "", "", b"", 0, lambda result, error: written.set())
    assert written.wait(10)


def done(app: AsteraLite, flow: str = "hello", **more: Any) -> Job:
    return app.wait(app.submit(flow, **more).id, 10)


def told(run: Running, job: Job) -> dict[str, Any]:
    return run.client.get(f"/api/jobs/{job.id}").json()  # type: ignore[no-any-return]


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


@JUMPS
def test_a_fresh_result_stays_and_an_old_one_goes_by_the_time_that_passed(tmp_path: Path, jump_s: int) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="1h") as run:
        job = done(run.app)
        clock.jumped += jump_s * 1000
        assert run.app.status(job.id) is not None  # before anybody has noticed
        tick(run.app, clock, 1)
        young = done(run.app)
        for _ in range(3):
            tick(run.app, clock, 1000)
        assert run.client.get(f"/api/jobs/{job.id}/result").json() == "hi"
        tick(run.app, clock, 599)
        assert run.app.status(job.id) is None
        assert run.app.status(young.id) is not None
        tick(run.app, clock, 2)
        assert run.app.status(young.id) is None


@JUMPS
def test_people_are_told_what_the_systems_clock_says(tmp_path: Path, jump_s: int) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock) as run:
        before = done(run.app)
        clock.jumped += jump_s * 1000
        tick(run.app, clock, 1)
        after = done(run.app)
        first, second = told(run, before), told(run, after)
        assert moment(second["createdAt"]) == clock.wall() / 1000
        assert moment(second["expiresAt"]) == clock.wall() / 1000 + 86400
        assert moment(second["createdAt"]) - moment(first["createdAt"]) == 1  # the second that passed
        listed = run.client.get("/api/jobs").json()["jobs"]
        assert [entry["createdAt"] for entry in listed] == [second["createdAt"], first["createdAt"]]


@JUMPS
def test_a_callback_is_tried_again_when_its_pause_has_passed(tmp_path: Path, jump_s: int) -> None:
    clock = FakeClock()
    with Sink() as sink, serving(tmp_path, clock) as run:
        sink.answers = [500, 500]
        job = done(run.app, callback_url=sink.url)
        tick(run.app, clock)
        sent = sink.next()[0]
        clock.jumped += jump_s * 1000
        tick(run.app, clock, 1)
        assert sink.got.empty()
        tick(run.app, clock, 6)
        again = sink.next()[0]
        assert again["webhook-id"] == sent["webhook-id"]
        assert int(again["webhook-timestamp"]) == clock.wall() // 1000  # or a receiver would take it for a replay
        tick(run.app, clock, 400)
        assert sink.next()[0]["webhook-id"] == sent["webhook-id"]
        callback = told(run, job)["callback"]
        assert (callback["state"], callback["attempts"]) == ("delivered", 3)
        assert moment(callback["history"][-1]["at"]) == clock.wall() / 1000


@JUMPS
def test_a_job_waits_as_long_as_it_was_told_to(tmp_path: Path, jump_s: int) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock) as run:
        nap, bounded = run.app.submit("nap"), run.app.submit("bounded")
        until(lambda: run.app.engine.queue.counts()["waiting"] == 2)
        clock.jumped += jump_s * 1000
        tick(run.app, clock, 30)
        until(lambda: run.app.engine.queue.counts()["waiting"] == 2)
        assert run.app.wait(nap.id, 0).status is Status.RUNNING
        tick(run.app, clock, 30)
        assert run.app.wait(nap.id, 10).status is Status.COMPLETED
        until(lambda: run.app.engine.queue.counts()["waiting"] == 1)
        tick(run.app, clock, 3541)
        found = run.app.wait(bounded.id, 10)
        assert (found.status, found.attempt) == (Status.COMPLETED, 1)


def test_a_job_that_waits_for_a_date_goes_by_the_calendar(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock) as run:
        job = run.app.submit("alarm")
        until(lambda: run.app.engine.queue.counts()["waiting"] == 1)
        clock.jumped += 2 * YEAR_S * 1000
        tick(run.app, clock, 1)
        until(lambda: run.app.engine.queue.counts()["waiting"] == 1)
        assert run.app.wait(job.id, 0).status is Status.RUNNING
        clock.jumped += 4 * YEAR_S * 1000
        tick(run.app, clock, 1)
        assert run.app.wait(job.id, 10).status is Status.COMPLETED


def test_a_jump_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    with caplog.at_level(logging.WARNING), serving(tmp_path, clock) as run:
        clock.jumped += 7_200_000
        for _ in range(3):
            tick(run.app, clock, 1)
        clock.jumped -= 3_600_000
        for _ in range(3):
            tick(run.app, clock, 1)
        assert [text for text in caplog.messages if "clock jumped" in text] == [
            "the system's clock jumped ahead by 2:00:00: results and waits use the server's own time",
            "the system's clock jumped back by 1:00:00: results and waits use the server's own time",
        ]
        assert clock.offset == 3_600_000


def test_a_small_step_is_a_correction_that_the_server_makes_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    with caplog.at_level(logging.WARNING), serving(tmp_path, clock) as run:
        clock.jumped = 1900
        tick(run.app, clock, 1)
        assert (clock.now(), clock.jumped, clock.offset) == (START_MS + 2900, 0, 0)
        assert told(run, done(run.app))["createdAt"] == "2026-09-21T14:13:22.900Z"
        assert caplog.messages == []


def test_a_boot_in_the_past_and_then_one_that_is_right_forget_nothing(tmp_path: Path) -> None:
    with Sink() as sink:
        sink.answers = [500]
        clock = FakeClock()
        with serving(tmp_path, clock, retention="1h") as run:
            job = done(run.app, callback_url=sink.url)
            tick(run.app, clock)
            sink.next()
        with serving(tmp_path, FakeClock(START_MS - 2 * 86_400_000), retention="1h") as run:
            assert run.app.status(job.id) is not None
        right = FakeClock(START_MS + 60_000)
        with serving(tmp_path, right, retention="1h") as run:
            assert right.offset == 0
            assert told(run, job)["createdAt"] == "2026-09-21T14:13:20.000Z"
            tick(run.app, right)
            sink.next()
            tick(run.app, right, 3500)
            assert run.app.status(job.id) is not None
            tick(run.app, right, 100)
            assert run.app.status(job.id) is None


def test_a_server_that_stops_in_the_instant_of_a_jump_has_it_on_record(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, retention="1h") as run:
        job = done(run.app)
        clock.jumped += YEAR_S * 1000
    again = FakeClock(clock.wall() + 1000)
    with serving(tmp_path, again, retention="1h") as run:
        assert run.client.get(f"/api/jobs/{job.id}/result").json() == "hi"


@JUMPS
def test_after_a_restart_what_is_stored_has_moved_with_the_clock(tmp_path: Path, jump_s: int) -> None:
    """The time when the server was down cannot be told from a jump: a clock that has gone on is believed."""
    clock = FakeClock()
    with Sink() as sink, serving(tmp_path, clock, retention="1h") as run:
        sink.answers = [500, 500]
        job, nap = done(run.app, callback_url=sink.url), run.app.submit("nap")
        until(lambda: run.app.engine.queue.counts()["waiting"] == 1)
        tick(run.app, clock)
        sink.next()
        clock.jumped += jump_s * 1000
        tick(run.app, clock, 1)
        shown = told(run, job)
        run.server.stop()
        run.app.stop()

        again = FakeClock(clock.wall() + 1000)
        with serving(tmp_path, again, retention="1h") as run:
            assert (again.offset == 0) == (jump_s > 0)
            seen = told(run, job)
            near = (
                0 if jump_s > 0 else 3
            )  # seconds: of a clock that went back, the last moment on record is what counts
            for name in ("createdAt", "startedAt", "finishedAt", "expiresAt"):
                assert abs(moment(seen[name]) - moment(shown[name])) <= near
            for when in (lambda it: it["nextAttemptAt"], lambda it: it["history"][0]["at"]):
                assert abs(moment(when(seen["callback"])) - moment(when(shown["callback"]))) <= near
            tick(run.app, again, 57)
            assert run.app.wait(nap.id, 0).status is Status.RUNNING
            sink.next()
            tick(run.app, again, 2 + near)
            assert run.app.wait(nap.id, 10).status is Status.COMPLETED
            tick(run.app, again, 3530)
            assert run.app.status(job.id) is not None
            tick(run.app, again, 20)
            assert run.app.status(job.id) is None


def test_a_machine_that_boots_in_the_past_forgets_nothing_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    with Sink() as sink:
        with serving(tmp_path, clock, retention="1h") as run:
            sink.answers = [500]
            job, nap = done(run.app, callback_url=sink.url), run.app.submit("nap")
            until(lambda: run.app.engine.queue.counts()["waiting"] == 1)
            tick(run.app, clock)
            sink.next()

        past = FakeClock(1_600_000_000_000)
        with caplog.at_level(logging.WARNING), serving(tmp_path, past, retention="1h") as run:
            assert "is 2199 days, 1:46:40 behind the last recorded moment" in caplog.text
            tick(run.app, past, 10)
            assert sink.next()[0]["webhook-timestamp"] == "1600000010"
            tick(run.app, past, 50)
            assert run.app.wait(nap.id, 10).status is Status.COMPLETED
            new = done(run.app)
            assert told(run, new)["createdAt"] == "2020-09-13T12:27:40.000Z"  # it is what the system says
            assert new.key.seq > job.key.seq
            past.jumped = 86_400_000  # the network is there: a day has passed since the server stopped
            tick(run.app, past, 1)
            assert moment(told(run, new)["createdAt"]) == START_MS / 1000 + 86400 + 60
            for _ in range(3):
                tick(run.app, past, 1000)
            assert run.app.status(job.id) is not None
            tick(run.app, past, 545)
            assert run.app.status(job.id) is None

        back = FakeClock(past.wall() + 1000)
        with serving(tmp_path, back, retention="1h") as run:
            assert moment(told(run, new)["createdAt"]) == START_MS / 1000 + 86400 + 60


def test_a_clock_that_was_ahead_by_years_and_was_set_right_keeps_nothing_for_years(tmp_path: Path) -> None:
    ahead = FakeClock(START_MS + 9 * YEAR_S * 1000)
    with serving(tmp_path, ahead, retention="1h") as run:
        job = done(run.app)
    for _ in range(3):  # also at the starts that follow
        right = FakeClock(START_MS)
        with serving(tmp_path, right, retention="1h") as run:
            tick(run.app, right, 1000)
            assert told(run, job)["createdAt"].startswith("2026-09-21")
    right = FakeClock(START_MS + 3_001_000)
    with serving(tmp_path, right, retention="1h") as run:
        for _ in range(3):
            assert run.app.status(job.id) is not None
            tick(run.app, right, 1200)
        assert run.app.status(job.id) is None


def test_the_command_line_tells_the_same_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock) as run:
        job = done(run.app)
        clock.jumped += YEAR_S * 1000
        tick(run.app, clock, 1)
        shown = told(run, job)
        monkeypatch.setattr(time, "time_ns", lambda: clock.wall() * 1_000_000)
        assert main(["jobs", "--database", str(tmp_path / "jobs.db")]) == 0
        assert shown["createdAt"] in capsys.readouterr().out
        assert main(["job", job.id, "--json", "--database", str(tmp_path / "jobs.db")]) == 0
        assert f'"createdAt": "{shown["createdAt"]}"' in capsys.readouterr().out


def test_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    clock.begin(0)
    assert abs(clock.now() - clock.wall()) < 1000
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + YEAR_S * 10**9)
    assert abs(clock.look() - YEAR_S * 1000) < 1000
    assert abs(clock.wall() - clock.now() - YEAR_S * 1000) < 1000
    assert clock.look() == 0
    monkeypatch.setattr(time, "time_ns", lambda: real() + YEAR_S * 10**9 - 10**9)
    before = clock.now()
    assert clock.look() == 0
    assert abs(before - clock.now() - 1000) < 500
    clock.begin(clock.wall() + 3_600_000)
    assert abs(clock.offset + 3_600_000) < 1000
    assert abs(clock.now() - clock.wall() - 3_600_000) < 1000


def test_a_database_of_the_first_version_is_upgraded(tmp_path: Path) -> None:
    """Its tables are those of today without the two that came with version 2, and the index of version 3."""
    path = str(tmp_path / "jobs.db")
    text = (ROOT / "schema.sql").read_text("utf-8")
    today = {}
    with closing(SqliteStore(path)), closing(sqlite3.connect(path)) as db:
        today = dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql NOT NULL"))
    old = str(tmp_path / "old.db")
    with closing(sqlite3.connect(old)) as db:
        db.executescript(text.partition("-- Who may call")[0] + "PRAGMA application_id = 0x41535431;")
        db.execute("DROP INDEX jobs_token")
        db.execute("PRAGMA user_version = 1")
    for command in (["jobs"], ["token"], ["check", "--flows", str(ROOT / "flows")]):
        assert main([*command, "--database", old]) == 0  # a look does not upgrade it
    with closing(sqlite3.connect(old)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    with closing(SqliteStore(old)), closing(sqlite3.connect(old)) as db:
        upgraded = dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql NOT NULL"))

    def bare(sql: str) -> str:
        return " ".join(re.sub("--.*", "", sql).split())

    assert {name: bare(sql) for name, sql in upgraded.items()} == {name: bare(sql) for name, sql in today.items()}


_OPENS = """
import sys
from astera_lite import SqliteStore

def peak():  # KB; of this program alone, unlike ru_maxrss
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

before = peak()
SqliteStore(sys.argv[1]).close()
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak")
def test_a_start_after_a_jump_does_not_hold_the_database_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    SqliteStore(str(path)).close()
    with closing(sqlite3.connect(path)) as db:
        db.executemany(
            "INSERT INTO jobs (seq, salt, flow, version, status, created, token, base, request, result)"
            " VALUES (?, 1, 'f', 1, 'Completed', 1, '', '', '{}', zeroblob(1500))",
            ((seq,) for seq in range(1, 40_001)),
        )
        db.execute("INSERT INTO clock VALUES (1, 60000)")
        db.commit()
    assert path.stat().st_size > 60 << 20
    opened = subprocess.run(
        [sys.executable, "-c", _OPENS, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert int(opened.stdout) < 30 << 10
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT min(created), max(created) FROM jobs").fetchone() == (60_001, 60_001)
