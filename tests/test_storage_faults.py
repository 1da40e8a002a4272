"""What a server does when its disk, its database file or the lock on it fails: real processes, real faults."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from support import PROGRAM, ROOT, Api, FakeClock, get_flow, process, until

import astera_lite_database
from astera_lite import AsteraLite, Busy, SqliteReader, SqliteStore, Status, StoreError, ignore_result

PROMPT = 0.7  # seconds in which /health answers, whatever the disk does
HELD = '''
import os, time

def held(context, size):
    """Runs until a file is there, and returns so many characters."""
    with open("begun", "a") as file:
        file.write("begun\\n")
    while not os.path.exists("go") and not context.cancelled:
        time.sleep(0.005)
    return "x" * size
'''
FLOWS = {
    "echo": {
        "request": {"method": "POST", "resource": "/echo", "processing": ["synchronous", "asynchronous"]},
        "steps": [{"name": "queued", "wait": 0}],  # without a step it would be run before it is stored
        "response": {"body": "${request.body}"},
    },
    "held": get_flow(
        "/held",
        request={"parameters": {"size": {"in": "query", "type": "integer", "default": 2}}},
        steps=[{"name": "h", "python": {"call": "work:held", "args": {"size": "${params.size}"}}}],
        response={"body": "${h}"},
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "work.py").write_text(HELD)
    for name, tree in FLOWS.items():
        (tmp_path / "flows" / f"{name}.json").write_text(json.dumps(tree))
    return tmp_path


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 12 MiB of its own."""
    disk = folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: run as root ({mounted.stderr.decode().strip()})")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


class Faulty(Api):
    """Requests to a server whose storage fails: what comes is right, or a clear refusal."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.accepted: dict[str, str] = {}  # the body by the id of every acknowledged job

    def send(self, body: str, **more: Any) -> requests.Response:
        answer = self.session.post(
            f"{self.url}/api/publishingAsync/echo", data=body, headers={"Content-Type": "text/plain"}, timeout=10
        )
        if answer.status_code == 202:
            self.accepted[answer.json()["id"]] = body
        else:
            self.refused(answer)
        return answer

    @staticmethod
    def refused(answer: requests.Response) -> str:
        """The words of a 503 that is as it should be."""
        assert answer.status_code == 503, answer.text
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert int(answer.headers["Retry-After"]) >= 1
        assert not any(word in answer.text for word in ("Traceback", ".db", "SELECT", "sqlite3"))
        detail: str = answer.json()["detail"]
        return detail

    def health(self) -> tuple[int, str | None]:
        """The code of /health and its reason; it answers promptly."""
        began = time.monotonic()
        answer = requests.get(f"{self.url}/health", timeout=5)
        assert time.monotonic() - began < PROMPT
        return answer.status_code, answer.json()["reason"]

    def well(self, seconds: float = 15) -> None:
        """It recovers by itself."""
        until(lambda: self.health() == (200, None), seconds)

    def unwell(self, seconds: float = 15) -> str:
        seen: list[Any] = [(None, None)]

        def is_unwell() -> bool:
            seen[0] = self.health()  # one answer for both: a small write may succeed between two
            return bool(seen[0][0] == 503)

        until(is_unwell, seconds)
        return str(seen[0][1])

    def all_there(self) -> None:
        """Every acknowledged job is there, and ends as it should."""
        for job_id, body in self.accepted.items():
            self.finished(job_id)
            answer = self.session.get(f"{self.url}/api/jobs/{job_id}/result", timeout=10)
            assert (answer.status_code, answer.json()) == (200, body)


def fill(disk: Path, room: int = 0) -> Path:
    """Leave so many bytes of room on a disk."""
    ballast = disk / "ballast"
    if room:
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - room))
        return ballast
    with open(ballast, "ab", 0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def refused_at_last(api: Faulty, size: int = 100_000) -> str:
    """Submit until there is no more room; the words."""
    for _ in range(300):
        answer = api.send("y" * size)
        if answer.status_code != 202:
            return api.refused(answer)
    raise AssertionError("everything was accepted")


def serve(folder: Path, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """A server that is not to start."""
    command = [*PROGRAM, "--port", "0", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False, **more)


# ---- No room ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_refuses_new_jobs_keeps_ends_and_mends_without_a_restart(folder: Path, small_disk: Path) -> None:
    with process(folder, "--database", "disk/jobs.db") as (_, url, lines):
        api = Faulty(url)
        for n in range(20):
            api.send(f"before {n}")
        held = [api.submit("/held", size=size) for size in (10, 600_000)]
        ballast = fill(small_disk)
        assert "the disk is full" in refused_at_last(api)
        assert "the disk is full" in refused_at_last(api, 5)
        reasons = set()
        end = time.monotonic() + 2.5  # the housekeeper looks every second: it must not take that for room
        while time.monotonic() < end:
            reasons.add(api.health())
            time.sleep(0.05)
        assert reasons == {(503, "the disk is full: make room")}
        (folder / "go").touch()
        assert api.job(held[1], wait=1)["status"] == "Running"
        assert "the disk is full" in api.refused(api.send("z" * 300_000))
        first = next(iter(api.accepted))
        assert api.result(first) == "before 0"  # what is there can be read
        ballast.unlink()
        api.well()
        for job_id, size in zip(held, (10, 600_000), strict=True):
            api.finished(job_id)
            assert api.result(job_id) == "x" * size
        assert api.send("after").status_code == 202
        api.all_there()
    told = [line for line in lines if "the disk is full" in line]
    assert 1 <= len(told) <= 3, told  # once for each time it became so
    assert any("can be written again" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize("size", [1_000, 100_000, 1_000_000])
def test_a_disk_that_only_the_database_filled_has_room_again_once_results_expire(small_disk: Path, size: int) -> None:
    clock = FakeClock()
    with AsteraLite(clock=clock, database=str(small_disk / "jobs.db"), shutdown_timeout=5) as app:
        app.deploy("echo", FLOWS["echo"])

        def accepted() -> bool:
            try:
                app.submit("echo", body="y" * size)
            except StoreError as error:
                assert "the disk is full" in str(error)
                return False
            return True

        refused = 0
        while refused < 30:  # the log is folded meanwhile, which makes some room
            refused = 0 if accepted() else refused + 1
        clock.tick(24 * 60 * 60)
        for _ in range(1_000_000 // size):
            until(lambda: clock.tick(1) and accepted(), 20)
        clock.tick(24 * 60 * 60)
        until(lambda: clock.tick(1) and app.store.fault is None, 20)


def test_a_step_whose_output_has_no_room_yet_is_not_run_again(small_disk: Path) -> None:
    runs = []

    def large(context: Any) -> str:
        runs.append(context)
        fill(small_disk, room=4 << 20)
        return "x" * 1_000_000

    steps = [{"name": "large", "python": {"call": large}}, {"name": "pause", "wait": 0.2}]
    with AsteraLite(database=str(small_disk / "jobs.db"), shutdown_timeout=5) as app:
        app.deploy("f", get_flow("/f", steps=steps))
        job = app.submit("f")
        until(lambda: app.store.fault)
        app.store.purge(0, 1, ignore_result)  # a write that needs no room, in one batch with those that wait for room
        assert app.wait(job, 1.5).status is Status.RUNNING
        (small_disk / "ballast").unlink()
        assert app.wait(job, 10).status is Status.COMPLETED
    assert len(runs) == 1


def test_large_requests_that_were_refused_leave_nothing_on_the_disk(folder: Path, small_disk: Path) -> None:
    with process(folder, "--database", "disk/jobs.db") as (_, url, _lines):
        api = Faulty(url)
        api.send("small")
        fill(small_disk, room=4 << 20)
        for _ in range(8):
            assert "the disk is full" in api.refused(api.send("y" * 9_000_000))
        api.well()  # first: another process that reads the file without a pause keeps its log from beginning anew
        until(lambda: pieces(small_disk / "jobs.db") == 0)
        assert api.send("after").status_code == 202
        api.all_there()


def pieces(path: Path) -> int:
    with closing(sqlite3.connect(path)) as other:
        count: int = other.execute("SELECT count(*) FROM pieces").fetchone()[0]
        return count


def test_a_limit_on_file_sizes_refuses_new_jobs_and_mends(folder: Path) -> None:
    with process(folder) as (server, url, lines):
        api = Faulty(url)
        api.send("before")
        held = api.submit("/held", size=400_000)
        until(lambda: api.job(held)["startedAt"])
        _, hard = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (200_000, hard))
        words = refused_at_last(api)
        assert "the disk is full, or a file may not grow: make room, or raise the limit" in words
        (folder / "go").touch()
        assert api.unwell() in words
        assert api.job(held)["status"] == "Running"
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        api.well()
        api.finished(held)
        api.all_there()
    assert not any("Traceback" in line for line in lines)


def test_a_disk_that_is_full_at_the_start(folder: Path, small_disk: Path) -> None:
    for room in (0, 16 << 10):  # the second is too small for the file with which SQLite shares memory
        ballast = fill(small_disk, room)
        done = serve(folder, "--database", "disk/jobs.db", "--log", "off")
        assert done.returncode == 4
        assert done.stderr.count("\n") == 1
        assert "disk/jobs.db" in done.stderr and "the disk is full" in done.stderr
        ballast.unlink()
    with process(folder, "--database", "disk/jobs.db") as (_, url, _lines):
        api = Faulty(url)
        api.send("now")
        api.all_there()


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_disk_that_is_full_when_a_server_starts_again(folder: Path, small_disk: Path, end: signal.Signals) -> None:
    with process(folder, "--database", "disk/jobs.db") as (server, url, _):
        api = Faulty(url)
        for n in range(5):  # few: had the log been folded, there would be room in it
            api.send(f"{n}" * 1000)
        api.all_there()
        held = api.submit("/held", size=100)
        until(lambda: api.job(held)["startedAt"])
        ballast = fill(small_disk)
        server.send_signal(end)
        (folder / "go").touch()
        server.wait(30)
    done = serve(folder, "--database", "disk/jobs.db", "--log", "off")  # SQLite needs 32 KiB to open it
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "disk/jobs.db: the disk is full: make room" in done.stderr
    ballast.unlink()
    with process(folder, "--database", "disk/jobs.db") as (_, url, lines):
        again = Faulty(url)
        again.accepted = api.accepted
        again.finished(held)
        again.all_there()
    assert not any("Traceback" in line for line in lines)


def test_max_database_refuses_before_the_disk_is_full_and_leaves_room_for_ends(folder: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=24m", small_disk], check=True)  # beside the 4 MiB: the log, and ends
    with process(folder, "--database", "disk/jobs.db", "--max-database", "4MiB") as (_, url, lines):
        api = Faulty(url)
        held = [api.submit("/held", size=200_000) for _ in range(4)]
        began = time.monotonic()
        assert "maximum size" in refused_at_last(api, 1_000_000)
        assert time.monotonic() - began < 5
        assert api.health() == (200, None)
        (folder / "go").touch()
        for job_id in held:
            api.finished(job_id)
        api.all_there()
    assert not any("full" in line for line in lines)


def test_requests_on_their_way_to_a_slow_disk_count_for_max_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, transact = threading.Event(), SqliteStore._transact

    def slow(store: SqliteStore, batch: list[Any], busy_ms: int) -> list[Any]:
        go.wait(10)
        return transact(store, batch, busy_ms)

    flow = get_flow("/f", steps=[{"name": "w", "wait": 60}])
    flow["request"] |= {"method": "POST", "contentTypes": ["binary"]}
    with AsteraLite(database=str(tmp_path / "jobs.db"), max_database="1MiB") as app, ThreadPoolExecutor(30) as pool:
        app.deploy("f", flow)
        monkeypatch.setattr(SqliteStore, "_transact", slow)
        sent = [pool.submit(app.submit, "f", body=bytes(100_000)) for _ in range(30)]
        with contextlib.suppress(AssertionError):
            until(lambda: sum(each.done() for each in sent) >= 15, 3)  # refused at once
        go.set()
        failures = [each.exception(10) for each in sent]
    assert {type(failure) for failure in failures} == {type(None), Busy}
    assert 5 <= failures.count(None) <= 15


def test_a_database_at_its_limit_takes_jobs_as_soon_as_its_results_expire(tmp_path: Path) -> None:
    clock = FakeClock()
    with AsteraLite(database=str(tmp_path / "jobs.db"), max_database="1MiB", retention="1h", clock=clock) as app:
        app.deploy("echo", FLOWS["echo"])

        def is_taken() -> bool:
            try:
                app.wait(app.submit("echo", body="x" * 100_000), 10)
            except Busy:
                return False
            return True

        while is_taken():
            pass
        clock.tick(3601)
        until(is_taken)


def test_a_log_that_many_writes_made_long_does_not_leave_the_server_refusing(folder: Path) -> None:
    with process(folder, "--max-database", "4MiB") as (_, url, _lines):
        api = Faulty(url)
        for _ in range(15):  # of which nothing stays
            until(lambda: not churn(api, 400_000), 30)
        until(lambda: api.send("after").status_code == 202, 30)
        api.all_there()


def test_a_reader_that_held_up_the_log_does_not_leave_the_server_refusing(folder: Path) -> None:
    with process(folder, "--max-database", "24MiB") as (_, url, _lines):
        api = Faulty(url)
        api.send("first")
        with closing(sqlite3.connect(folder / "astera_lite.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM jobs").fetchone()
            for n in range(200):
                answer = api.send(str(n) * 5)
                job_id = answer.json()["id"] if answer.status_code == 202 else None
                if job_id is None:
                    break
                api.session.get(f"{url}/api/jobs/{job_id}/status", headers={"Prefer": "wait=5"}, timeout=9)
                api.session.delete(f"{url}/api/jobs/{job_id}", timeout=9)
                del api.accepted[job_id]
                if answer := churn(api):
                    break
            else:
                raise AssertionError("the log does not grow")
            assert os.stat(folder / "astera_lite.db-wal").st_size > 16 << 20
        until(lambda: api.send("after").status_code == 202)
        assert os.stat(folder / "astera_lite.db-wal").st_size <= 16 << 20
        api.all_there()


def churn(api: Faulty, size: int = 2_000_000) -> bool:
    """Write and forget so many bytes; whether that was refused."""
    answer = api.session.post(
        f"{api.url}/api/publishingAsync/echo",
        data="c" * size,
        headers={"Content-Type": "text/plain", "Prefer": "wait=9"},
        timeout=10,
    )
    if answer.status_code == 503:
        return True
    assert answer.status_code == 200
    job = answer.headers["Content-Location"].removesuffix("/result")
    assert api.session.delete(job, timeout=9).status_code == 204
    return False


# ---- Locked ----------------------------------------------------------------------------------------------------------


def test_a_database_that_another_process_locks(folder: Path) -> None:
    lock_s = float(os.environ.get("ASTERA_TEST_LOCK_S", "3"))
    with process(folder) as (_, url, lines):
        api = Faulty(url)
        api.send("before")
        [before] = api.accepted
        api.finished(before)
        held = api.submit("/held")
        until(lambda: api.job(held)["startedAt"])
        with closing(sqlite3.connect(folder / "astera_lite.db", isolation_level=None, timeout=5)) as other:
            other.execute("BEGIN EXCLUSIVE")
            (folder / "go").touch()
            end = time.monotonic() + lock_s
            while time.monotonic() < end:
                began = time.monotonic()
                assert "locked by another process" in api.refused(api.send("while locked"))
                assert time.monotonic() - began < 3
                assert api.unwell() == "the database is locked by another process: end that process"
                began = time.monotonic()
                assert api.result(before) == "before"
                assert api.session.post(f"{url}/api/publishing/echo", data="sync").status_code == 200
                assert time.monotonic() - began < PROMPT
            assert api.job(held)["status"] == "Running"
            other.execute("COMMIT")
        api.well()
        api.finished(held)
        assert api.send("after").status_code == 202
        api.all_there()
    assert not any("Traceback" in line for line in lines)


def test_a_database_locked_at_the_start(folder: Path) -> None:
    with process(folder):
        pass
    with closing(sqlite3.connect(folder / "astera_lite.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        done = serve(folder, "--log", "off")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "astera_lite.db: the database is locked by another process" in done.stderr


# ---- Damaged ---------------------------------------------------------------------------------------------------------


_FILLED: dict[int, tuple[dict[str, str], bytes]] = {}  # by the number of jobs: their bodies, and the file


def filled(folder: Path, count: int = 300) -> dict[str, str]:
    """A database of finished jobs, of a server that has stopped: the bodies by id, oldest first."""
    if count not in _FILLED:
        with process(folder) as (server, url, _):
            api = Faulty(url)
            for n in range(count):
                api.send(f"{n:05} " + "b" * 3000)
            api.all_there()
            server.send_signal(signal.SIGTERM)
            assert server.wait(10) == 0
        _FILLED[count] = api.accepted, (folder / "astera_lite.db").read_bytes()
    bodies, data = _FILLED[count]
    (folder / "astera_lite.db").write_bytes(data)
    return dict(bodies)


def spoil(path: Path, at: int, data: bytes = b"\xa5" * 4096) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def page_of(path: Path, text: str) -> int:
    """Where the page begins that has a text."""
    return path.read_bytes().index(text.encode()) // 4096 * 4096


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ((0, b"\0" * 100), "the file is not a database"),
        ((0, b"SQLite format 3\0" + b"\xff" * 84), "the file is not a database"),
        ((100, b"\xff" * 200), "the database is damaged: restore a backup"),
    ],
    ids=["no header", "broken header", "broken schema"],
)
def test_a_corrupt_header_is_4_and_changes_nothing(folder: Path, spoiled: tuple[int, bytes], words: str) -> None:
    filled(folder, 3)
    database = folder / "astera_lite.db"
    spoil(database, *spoiled)
    before = database.read_bytes()
    done = serve(folder, "--log", "off")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert f"astera_lite.db: {words}" in done.stderr
    assert database.read_bytes() == before


def test_a_corrupt_page_costs_the_jobs_on_it_and_no_others(folder: Path) -> None:
    accepted = filled(folder)
    database = folder / "astera_lite.db"
    spoil(database, page_of(database, "00150 bbb"))
    with process(folder) as (_, url, lines):
        api = Faulty(url)
        lost, read = damaged(api, accepted)
        assert 1 <= len(lost) <= 4
        assert read == len(accepted) - len(lost)
    assert not any("Traceback" in line for line in lines)


def damaged(api: Faulty, accepted: dict[str, str]) -> tuple[list[str], int]:
    """Read every result: those that cannot be read any more, and how many can."""
    lost, read = [], 0
    for job_id, body in accepted.items():
        answer = api.session.get(f"{api.url}/api/jobs/{job_id}/result", timeout=10)
        if answer.status_code == 200:
            assert answer.json() == body
            read += 1
        else:
            assert "the database is damaged: restore a backup" in api.refused(answer)
            lost.append(job_id)
    return lost, read


def test_damage_that_was_seen_keeps_new_jobs_out_and_tells_health(folder: Path) -> None:
    accepted = filled(folder, 100)
    database = folder / "astera_lite.db"
    with process(folder) as (_, url, lines):
        api = Faulty(url)
        assert api.health() == (200, None)
        spoil(database, page_of(database, "00050 bbb"))  # while it runs
        lost, read = damaged(api, accepted)
        assert 1 <= len(lost) <= 4 and read == 100 - len(lost)
        assert api.health() == (503, "the database is damaged: restore a backup")
        assert "the database is damaged: restore a backup" in api.refused(api.send("new"))
        assert damaged(api, accepted) == (lost, read)
        assert api.session.post(f"{url}/api/publishing/echo", data="sync", timeout=5).status_code == 200
    assert len([line for line in lines if "damaged" in line]) == 1
    assert not any("Traceback" in line for line in lines)


def test_with_a_damaged_page_of_queued_jobs_nothing_is_begun(folder: Path) -> None:
    with process(folder, "--workers", "1") as (server, url, _):
        api = Faulty(url)
        held = api.submit("/held")
        until(lambda: api.job(held)["startedAt"])
        for n in range(60):
            api.send(f"{n:05} " + "b" * 3000)
        server.kill()
    database = folder / "astera_lite.db"
    with closing(sqlite3.connect(database)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = database.read_bytes()
    spoil(database, page_of(database, "00030 bbb"))
    (folder / "go").touch()
    done = serve(folder)
    assert done.returncode == 4
    assert [line for line in done.stderr.splitlines() if "warning" in line or "Traceback" in line] == []
    assert done.stderr.splitlines()[-1].endswith("astera_lite.db: the database is damaged: restore a backup")
    assert (folder / "begun").read_text() == "begun\n"
    database.write_bytes(before)  # the backup
    with process(folder) as (server, url, _lines):
        again = Faulty(url)
        again.accepted = api.accepted
        again.finished(held)
        again.all_there()


def test_every_page_but_the_first_gone_while_it_runs(folder: Path) -> None:
    filled(folder, 100)
    database = folder / "astera_lite.db"
    with process(folder) as (_, url, lines):
        api = Faulty(url)
        spoil(database, 4096, b"\xa5" * (database.stat().st_size - 4096))
        assert "damaged" in api.refused(api.send("new")) or "damaged" in api.unwell()
        assert "damaged" in api.unwell()
        listed = api.session.get(f"{url}/api/jobs", timeout=5)
        assert "damaged" in api.refused(listed)
        assert api.session.post(f"{url}/api/publishing/echo", data="sync", timeout=5).status_code == 200
    assert not any("Traceback" in line for line in lines)


def test_a_database_damaged_beyond_use_is_4_with_its_path(folder: Path) -> None:
    filled(folder, 100)
    database = folder / "astera_lite.db"
    spoil(database, 4096, b"\xa5" * (database.stat().st_size - 4096))
    done = serve(folder, "--log", "off")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert "astera_lite.db: the database is damaged: restore a backup" in done.stderr


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.62, 0.999])
def test_a_log_cut_off_after_a_kill_loses_the_end_and_nothing_before_it(folder: Path, share: float) -> None:
    with process(folder) as (server, url, _):
        api = Faulty(url)
        for n in range(40):
            api.send(f"{n:03} " + "w" * 2000)
        api.all_there()
        server.kill()
        server.wait(10)
    wal = folder / "astera_lite.db-wal"
    os.truncate(wal, round(wal.stat().st_size * share))
    with process(folder) as (_, url, lines):
        after = Faulty(url)
        found = [job_id for job_id in api.accepted if after.job(job_id)["status"] != "Unknown"]
        assert found == list(api.accepted)[: len(found)]  # a beginning: what was cut off is gone, and only that
        assert (len(found) > 0) == (share > 0.1)
        after.accepted = {job_id: api.accepted[job_id] for job_id in found}
        assert after.send("new").status_code == 202
        assert not after.accepted.keys() & (api.accepted.keys() - set(found)), "an id is used again"
        after.all_there()
        with closing(sqlite3.connect(folder / "astera_lite.db")) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not any("Traceback" in line for line in lines)


# ---- Moved, deleted, replaced, unwritable ----------------------------------------------------------------------------


def gone(folder: Path) -> Callable[[], object]:
    (folder / "astera_lite.db").rename(folder / "elsewhere.db")
    return lambda: (folder / "elsewhere.db").rename(folder / "astera_lite.db")


def replaced(folder: Path) -> Callable[[], object]:
    put_back = gone(folder)
    shutil.copy(folder / "elsewhere.db", folder / "astera_lite.db")
    return put_back


def without_log(folder: Path) -> Callable[[], object]:
    (folder / "astera_lite.db-wal").rename(folder / "elsewhere-wal")
    return lambda: (folder / "elsewhere-wal").rename(folder / "astera_lite.db-wal")


def without_lock(folder: Path) -> Callable[[], object]:
    (folder / "astera_lite.db.lock").rename(folder / "elsewhere.lock")
    return lambda: (folder / "elsewhere.lock").rename(folder / "astera_lite.db.lock")


@pytest.mark.parametrize("move", [gone, replaced, without_log, without_lock])
def test_a_database_that_is_moved_under_a_running_server(
    folder: Path, move: Callable[[Path], Callable[[], object]]
) -> None:
    with process(folder) as (server, url, lines):
        api = Faulty(url)
        api.send("before")
        api.all_there()
        held = api.submit("/held")
        until(lambda: api.job(held)["startedAt"])
        put_back = move(folder)
        assert "moved, deleted or replaced" in api.refused(api.send("while away"))
        assert "put it back, or restart the server" in api.unwell()
        (folder / "go").touch()
        [before] = api.accepted
        assert api.result(before) == "before"  # from the file that was opened
        put_back()
        api.well()
        api.finished(held)
        assert api.send("after").status_code == 202
        api.all_there()
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    assert not any("Traceback" in line for line in lines)


def test_a_server_whose_database_is_deleted_stops_when_told(folder: Path) -> None:
    with process(folder) as (server, url, lines):
        api = Faulty(url)
        api.send("before")
        api.all_there()
        for file in folder.glob("astera_lite.db*"):
            file.unlink()
        assert "moved, deleted or replaced" in api.refused(api.send("new"))
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    assert not any("Traceback" in line for line in lines)
    with process(folder) as (_, url, _lines):
        api = Faulty(url)
        api.send("new")
        api.all_there()


def as_modes_say() -> None:
    """In a child before it becomes a server: root too is to heed the modes of files."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.parametrize(
    ("name", "mode", "words"),
    [
        ("astera_lite.db", 0o444, "astera_lite.db: the database is read-only: let this user write it and its folder"),
        ("astera_lite.db", 0o000, "astera_lite.db: the database cannot be opened: let this user read and write it"),
        (
            "astera_lite.db-wal",
            0o444,
            "astera_lite.db: the database is read-only: let this user write it and its folder",
        ),
        (
            "astera_lite.db-shm",
            0o444,
            "astera_lite.db: the database is read-only: let this user write it and its folder",
        ),
        (".", 0o555, "astera_lite.db.lock: the database cannot be opened: let this user read and write it"),
    ],
)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="root heeds modes only where it can be made to")
def test_a_database_that_may_not_be_written_is_4_and_unchanged(folder: Path, name: str, mode: int, words: str) -> None:
    with process(folder) as (server, url, _):
        api = Faulty(url)
        api.send("before")
        api.all_there()
        server.kill()
    if name == ".":
        (folder / "astera_lite.db.lock").unlink()
    before = {file.name: file.read_bytes() for file in folder.glob("astera_lite.db*")}
    mode_before = (folder / name).stat().st_mode
    (folder / name).chmod(mode)
    done = serve(folder, "--log", "off", preexec_fn=as_modes_say)
    (folder / name).chmod(mode_before)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1), done.stderr
    assert words in done.stderr
    for file in ("astera_lite.db", "astera_lite.db-wal"):
        assert (folder / file).read_bytes() == before[file]
    with process(folder) as (_, url, _lines):
        again = Faulty(url)
        again.accepted = api.accepted
        again.all_there()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_database_that_is_no_regular_file_is_4(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "jobs.db")
    done = serve(folder, "--database", "jobs.db", "--log", "off")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "jobs.db is not a regular file: set `database` to the path of one" in done.stderr


def test_an_upgrade_needs_no_folder_but_that_of_the_database(folder: Path, tmp_path: Path) -> None:
    """As in a container whose own files are read-only."""
    with closing(sqlite3.connect(folder / "jobs.db")) as db:
        db.executescript((ROOT / "tests" / "version-1.0.sql").read_text("utf-8"))
        columns = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
        values = ", ".join({"seq": "seq + n", "token": "printf('%0300d', n)"}.get(name, name) for name in columns)
        numbers = "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 20000)"
        one = "(SELECT * FROM jobs ORDER BY seq DESC LIMIT 1)"
        db.execute(f"{numbers} INSERT INTO jobs SELECT {values} FROM numbers, {one}")
        db.commit()
    script = """
mount --bind "$1" /mnt
for each in /tmp /var/tmp /usr/tmp; do
    [ ! -d $each ] || { mount --bind $each $each && mount -o remount,ro,bind $each; }
done || exit 9
cd /proc && shift && exec "$@"
"""
    code = "import astera_lite; astera_lite.SqliteStore('/mnt/jobs.db').close()"
    command = ["unshare", "-m", "sh", "-c", script, "sh", str(folder), sys.executable, "-c", code]
    if shutil.which("unshare") is None or os.geteuid():
        pytest.skip("no folder can be made read-only here: run as root on Linux")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="root heeds modes only where it can be made to")
def test_a_database_that_may_be_written_again_is_served(folder: Path) -> None:
    SqliteStore(str(folder / "astera_lite.db")).close()
    (folder / "astera_lite.db").chmod(0o444)
    assert serve(folder, "--log", "off", preexec_fn=as_modes_say).returncode == 4
    (folder / "astera_lite.db").chmod(0o644)  # as the message says
    with process(folder, preexec_fn=as_modes_say) as (_, url, _lines):
        api = Faulty(url)
        api.send("now")
        api.all_there()


# ---- A second server -------------------------------------------------------------------------------------------------


def test_a_second_server_touches_nothing(folder: Path) -> None:
    with process(folder) as (_, url, _lines):
        api = Faulty(url)
        api.send("before")
        api.all_there()
        api.submit("/held")
        with closing(sqlite3.connect(folder / "astera_lite.db")) as db:  # its beginning is on disk: nothing more comes
            until(lambda: db.execute("SELECT attempt FROM jobs ORDER BY seq DESC").fetchone() == (1,))

        def state() -> dict[str, tuple[bytes, int]]:
            files = folder.glob("astera_lite.db*")
            return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}

        before = state()
        began = time.monotonic()
        done = serve(folder, "--log", "off")
        assert time.monotonic() - began < 5
        assert (done.returncode, done.stderr.count("\n")) == (4, 1)
        assert "another server uses" in done.stderr and "stop it, or set `database`" in done.stderr
        assert state() == before
        (folder / "go").touch()
        api.all_there()


# ---- Backup ----------------------------------------------------------------------------------------------------------


def backup(folder: Path, copy: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, "backup", copy]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_backup_that_finds_no_room_leaves_nothing(folder: Path, small_disk: Path) -> None:
    filled(folder, 100)
    fill(small_disk, room=100_000)
    done = backup(folder, "disk/copy.db")
    assert (done.returncode, done.stderr) == (4, "disk/copy.db: the disk is full: make room\n")
    assert [file.name for file in small_disk.iterdir()] == ["ballast"]
    (small_disk / "ballast").unlink()
    assert backup(folder, "disk/copy.db").returncode == 0


def test_a_backup_that_is_killed_leaves_no_file_of_that_name_and_the_next_one_works(folder: Path) -> None:
    filled(folder)
    program = (
        "import astera_lite, astera_lite_database, os, signal, sys\n"
        "def kill(*a): os.kill(os.getpid(), signal.SIGKILL)\n"
        "astera_lite_database._give_name = kill\n"
        "astera_lite.main(['backup', 'copy.db'])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], cwd=folder, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (folder / "copy.db").exists()
    (folder / "copy.db.part").write_bytes(b"half a page")
    assert backup(folder, "copy.db").returncode == 0
    assert sorted(file.name for file in folder.glob("copy*")) == ["copy.db"]
    before = (folder / "copy.db").read_bytes()
    again = backup(folder, "copy.db")
    assert (again.returncode, again.stderr) == (1, "copy.db exists already: name another file\n")
    assert (folder / "copy.db").read_bytes() == before


def test_a_backup_is_of_one_moment_and_no_write_begins_it_anew(tmp_path: Path) -> None:
    large: dict[str, Any] = get_flow("/large", response={"body": "${'x' * 9000000}"})
    told: list[tuple[int, int]] = []
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        app.deploy("large", large)
        first = app.wait(app.submit("large").id)

        def tell(done: int, total: int) -> None:
            told.append((done, total))
            assert len(told) < 50
            app.wait(app.submit("large").id)

        astera_lite_database.backup(str(tmp_path / "jobs.db"), str(tmp_path / "copy.db"), tell)
    assert len(told) > 2 and told == sorted(told) and len({total for _, total in told}) == 1
    assert told[-1][0] == told[-1][1]
    copied = SqliteReader(str(tmp_path / "copy.db"))
    assert [job.id for job in copied.page(0, 10, None, None, None, None)] == [first.id]
    copied.close()


def test_a_backup_overwrites_no_file_that_came_meanwhile(folder: Path) -> None:
    filled(folder, 3)
    (folder / "copy.db").write_text("another's")
    with pytest.raises(StoreError, match=r"copy\.db: File exists"):
        astera_lite_database.backup(str(folder / "astera_lite.db"), str(folder / "copy.db"))
    assert (folder / "copy.db").read_text() == "another's"
    assert not (folder / "copy.db.part").exists()


def test_a_backup_of_a_damaged_database_says_so(folder: Path) -> None:
    filled(folder)
    database = folder / "astera_lite.db"
    with closing(sqlite3.connect(database)) as other:
        root = other.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'jobs'").fetchone()[0]
    spoil(database, (root - 1) * 4096)
    done = backup(folder, "copy.db")
    assert done.returncode == 4
    assert "is damaged" in done.stderr and "astera_lite.db" in done.stderr and "Traceback" not in done.stderr
    assert not (folder / "copy.db").exists()


@pytest.mark.parametrize("name", ["astera-store", "astera-housekeeper"])
def test_a_program_that_gets_no_thread_gets_its_database_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    before = set(threading.enumerate())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start_or_refuse)
        with pytest.raises(RuntimeError):
            AsteraLite(database=str(folder / "jobs.db")).start()
    until(lambda: set(threading.enumerate()) <= before)
    with AsteraLite(database=str(folder / "jobs.db")):
        pass


def test_a_program_gets_its_database_back_when_it_cannot_start(folder: Path) -> None:
    filled(folder, 100)
    database = folder / "astera_lite.db"
    whole = database.read_bytes()
    spoil(database, 4096, b"\xa5" * (len(whole) - 4096))
    for _ in range(2):
        with pytest.raises(StoreError, match="damaged"):
            AsteraLite(database=str(database)).start()
    database.write_bytes(whole)
    with AsteraLite(database=str(database)):
        pass
