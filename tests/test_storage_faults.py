"""What a server does when its disk, its database file or the lock on it fails: real processes, real faults."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from support import ROOT, Api, get_flow, process, until

PROGRAM = str(ROOT / "astera_lite.py")
PROMPT = 0.7  # seconds in which /health answers, whatever the disk does
HELD = '''
import os, time

def held(context, size):
    """Runs until a file is there, and returns so many characters."""
    while not os.path.exists("go") and not context.cancelled:
        time.sleep(0.005)
    return "x" * size
'''
FLOWS = {
    "echo": {
        "request": {"method": "POST", "resource": "/echo", "processing": ["synchronous", "asynchronous"]},
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
        until(lambda: self.health()[0] == 503, seconds)
        return str(self.health()[1])

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


def serve(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A server that is not to start."""
    command = [sys.executable, PROGRAM, "--port", "0", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=False)


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
        assert reasons == {(503, "the disk is full")}
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


def test_large_requests_that_were_refused_leave_nothing_on_the_disk(folder: Path, small_disk: Path) -> None:
    with process(folder, "--database", "disk/jobs.db") as (_, url, _lines):
        api = Faulty(url)
        api.send("small")
        fill(small_disk, room=4 << 20)
        for _ in range(8):
            assert "the disk is full" in api.refused(api.send("y" * 9_000_000))
        until(lambda: pieces(small_disk / "jobs.db") == 0)
        api.well()
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
        assert "the disk is full, or a file may not grow" in words
        (folder / "go").touch()
        assert api.unwell() in words
        assert api.job(held)["status"] == "Running"
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (hard, hard))
        api.well()
        api.finished(held)
        api.all_there()
    assert not any("Traceback" in line for line in lines)


def test_a_disk_that_is_full_at_the_start(folder: Path, small_disk: Path) -> None:
    ballast = fill(small_disk)
    done = serve(folder, "--database", "disk/jobs.db", "--log", "off")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "disk/jobs.db" in done.stderr and "the disk is full" in done.stderr
    ballast.unlink()
    with process(folder, "--database", "disk/jobs.db") as (_, url, _lines):
        api = Faulty(url)
        api.send("now")
        api.all_there()


def test_max_database_refuses_before_the_disk_is_full_and_leaves_room_for_ends(folder: Path, small_disk: Path) -> None:
    with process(folder, "--database", "disk/jobs.db", "--max-database", "4MiB") as (_, url, lines):
        api = Faulty(url)
        held = [api.submit("/held", size=200_000) for _ in range(4)]
        began = time.monotonic()
        assert "greatest size" in refused_at_last(api, 1_000_000)
        assert time.monotonic() - began < 5
        assert api.health() == (200, None)
        (folder / "go").touch()
        for job_id in held:
            api.finished(job_id)
        api.all_there()
    assert not any("full" in line for line in lines)


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
        assert os.stat(folder / "astera_lite.db-wal").st_size < 16 << 20
        api.all_there()


def churn(api: Faulty) -> bool:
    """Write and forget 2 MB; whether that was refused."""
    answer = api.session.post(
        f"{api.url}/api/publishingAsync/echo",
        data="c" * 2_000_000,
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
                assert api.unwell() == "the database is locked by another process"
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


def filled(folder: Path, count: int = 300) -> dict[str, str]:
    """A database of finished jobs, of a server that has stopped: the bodies by id, oldest first."""
    with process(folder) as (server, url, _):
        api = Faulty(url)
        for n in range(count):
            api.send(f"{n:05} " + "b" * 3000)
        api.all_there()
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == 0
    return api.accepted


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
