"""What the benchmarks share: servers in temporary folders, the load generator, /proc, Markdown."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
ENVIRONMENT = Path(os.environ.get("ASTERA_LITE_BENCHMARKS") or _CACHE / "astera-lite-benchmarks")

QUERY = "?a=1&b=hello"
SUBMIT = f"/api/publishingAsync/echo{QUERY}"
SYNC = f"/api/publishing/echo{QUERY}"
BODY = json.dumps({"pad": "x" * 389}).encode()  # 400 bytes
JSON = {"Content-Type": "application/json"}

Figures = dict[str, Any]  # what the load generator prints; load.c says what is in it


def tool(name: str) -> str:
    """Path of something that setup.sh installs; ends the program if it did not."""
    path = ENVIRONMENT / name
    if not path.exists():
        sys.exit(f"{path} is missing: run benchmarks/setup.sh first")
    return str(path)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@dataclass
class Server:
    """A server that runs, in a folder of its own."""

    port: int
    folder: Path
    processes: list[subprocess.Popen[bytes]]

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def syncs(self) -> int:
        """Calls of fsync and fdatasync so far; only of a server that was started with `sync_ms`."""
        count: int = struct.unpack("Q", (self.folder / "syncs").read_bytes())[0]
        return count

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """One request on a connection of its own: status code, headers, body."""
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            client.request(method, path, body, {**(headers or {}), **(JSON if body else {})})
            answer = client.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            client.close()

    def load(self, mode: str, path: str, connections: int, seconds: float, interval_ms: float = 0) -> Figures:
        """Run the load generator."""
        return finished_load(self.start_load(mode, path, connections, seconds, interval_ms))

    def start_load(
        self, mode: str, path: str, connections: int, seconds: float, interval_ms: float = 0
    ) -> subprocess.Popen[bytes]:
        command = [tool("load"), mode, f"127.0.0.1:{self.port}", path, str(connections), str(seconds), str(interval_ms)]
        return subprocess.Popen(command, stdout=subprocess.PIPE)

    def finished_job(self, path: str = SUBMIT, method: str = "POST") -> str:
        """Path of the status of a new job, once that is finished."""
        status, headers, body = self.ask(method, path, BODY if method == "POST" else None)
        if status != 202:
            sys.exit(f"{path} answers {status}: {body[:300]!r}")
        where = headers["Location"].partition(f":{self.port}")[2]
        wait_for(lambda: b'"Running"' not in self.ask("GET", where)[2], "a job does not finish")
        return where

    def stop(self) -> None:
        """As an administrator would: it finishes what it does, and leaves one file."""
        self.processes[0].terminate()
        self.processes[0].wait(60)

    def kill(self) -> None:
        """As a power cut would: at once, with whatever the server has started."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finished_load(process: subprocess.Popen[bytes]) -> Figures:
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(f"the load generator failed: {process.args!r}")
    figures: Figures = json.loads(output)
    return figures


def wait_for(holds: Callable[[], object], complaint: str, seconds: float = 60) -> None:
    """Poll `holds` every 5 ms."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            sys.exit(complaint)
        time.sleep(0.005)


def environment(**more: str) -> dict[str, str]:
    """The environment of a server: without settings of ours, or of Python's (which might forbid its bytecode files)."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ASTERA_", "PYTHON"))}
    return kept | more


def _answers(server: Server, probe: str) -> bool:
    try:
        return server.ask("POST", probe, BODY)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def start(
    commands: Iterable[Sequence[str]],
    folder: Path,
    port: int,
    *,
    probe: str,
    env: Mapping[str, str] | None = None,
    sync_ms: float | None = None,
) -> Server:
    """Start the processes of a server; return once a POST to `probe` is answered with 200.

    `sync_ms`: every sync of the disk takes so much more (0: syncs are only counted).
    """
    environ = environment(**(env or {}))
    if sync_ms is not None:
        environ |= {
            "LD_PRELOAD": tool("slowsync.so"),
            "SLOWSYNC_MS": str(sync_ms),
            "SLOWSYNC_COUNT": str(folder / "syncs"),
        }
    server = Server(port, folder, [])
    with open(folder / "server.log", "ab") as log:
        for command in commands:
            server.processes.append(
                subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log, start_new_session=True)
            )
    end = time.monotonic() + 60
    while not _answers(server, probe):
        if time.monotonic() > end or any(process.poll() is not None for process in server.processes):
            server.kill()
            sys.exit(f"one of these does not start: {commands}\n{server.log[-3000:]}")
        time.sleep(0.02)
    return server


def our_command(port: int, *settings: str, flows: Path | None = None) -> list[str]:
    """`python astera_lite.py` as a user types it."""
    script = str(ROOT / "astera_lite.py")
    return [sys.executable, script, "--port", str(port), "--flows", str(flows or HERE / "flows"), *settings]


def installed_command(port: int) -> list[str]:
    """What the installed `astera-lite` does; its environment wants INSTALLED. The module comes from its bytecode."""
    code = "import sys, astera_lite; sys.exit(astera_lite.main())"
    return [sys.executable, "-c", code, *our_command(port)[2:]]


INSTALLED = {"PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A folder for databases; TMPDIR says on which disk."""
    with tempfile.TemporaryDirectory(prefix="astera-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def ours(
    *settings: str,
    folder: Path | None = None,
    flows: Path | None = None,
    env: Mapping[str, str] | None = None,
    sync_ms: float | None = None,
) -> Iterator[Server]:
    """Astera Lite on a free port, in `folder` or a temporary one, its log in a file."""
    with temporary() as made:
        port = free_port()
        command = our_command(port, *settings, flows=flows)
        server = start([command], folder or made, port, probe=SYNC, env=env, sync_ms=sync_ms)
        try:
            yield server
        finally:
            server.kill()


def database_of_jobs(folder: Path, count: int, **changes: str) -> Path:
    """A database with `count` more copies of a finished echo job, a millisecond apart, made without a server.

    `changes` are SQL expressions of columns, in which `n` is the number of the copy, from 1.
    """
    with ours(folder=folder) as server:
        server.finished_job()
        server.stop()
    database = folder / "astera_lite.db"
    columns = {"seq": "seq - (n << 12)", "created": "created - n", "started": "started - n", **changes}
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = OFF")
        names = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
        values = ", ".join(columns.get(name, name) for name in names)
        db.execute(
            f"WITH RECURSIVE counted (n) AS (SELECT {count} UNION ALL SELECT n - 1 FROM counted WHERE n > 1)"
            f" INSERT INTO jobs ({', '.join(names)})"
            f" SELECT {values} FROM counted, (SELECT * FROM jobs ORDER BY seq DESC LIMIT 1)"
        )
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return database


def count_jobs(database: Path, where: str = "TRUE") -> int:
    """How many rows there are, also while the server runs."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as db:
        count: int = db.execute(f"SELECT count(*) FROM jobs WHERE {where}").fetchone()[0]
        return count


def proc_status(pid: int, field: str) -> int:
    """A number of /proc/PID/status: VmRSS and VmHWM (its peak) in KiB, Threads."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def rss_mb(pid: int, field: str = "VmRSS") -> float:
    """Resident memory in MB (10^6 bytes)."""
    return proc_status(pid, field) * 1024 / 1e6


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def written_bytes(pid: int) -> int:
    """What a process has sent to the disk so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["write_bytes"])


def spread(values: Sequence[float], form: str = "{:.3g}") -> str:
    """Median, and the least and greatest if there are several."""
    middle = form.format(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({form.format(min(values))}–{form.format(max(values))})"


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ("figure", "floor", "aim", "reached")) -> str:
    """A Markdown table; its first column is text, the others are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def arguments(text: str, **defaults: float) -> argparse.Namespace:
    """The options of a small benchmark: numbers, each with its default, and --help with `text`."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    return parser.parse_args()
