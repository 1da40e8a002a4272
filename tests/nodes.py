"""Several servers on one PostgreSQL, as real processes: clusters, a standby, a proxy that can be cut, nodes, a peer.

Used by the tests that only several nodes can show, and by benchmarks.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from support import ROOT, Api

CURE = "PostgreSQL is missing: apt-get install postgresql"
_USER = "astera"
_PORT = 5432  # of a socket in a folder of its own, which no other cluster has


@functools.cache
def postgres_bin() -> Path | None:
    """The folder of PostgreSQL's programs, the newest that is installed; None where there is none."""
    found = shutil.which("initdb")
    if found is not None and (Path(found).resolve().parent / "pg_ctl").exists():
        return Path(found).resolve().parent
    versions = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if (folder / "initdb").exists()]
    return max(versions, key=lambda folder: float(folder.parent.name), default=None)


def _unprivileged() -> dict[str, Any]:
    """Arguments of `subprocess`: PostgreSQL refuses to run as root."""
    return {"user": "postgres", "group": "postgres", "extra_groups": ()} if os.geteuid() == 0 else {}


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


class Cluster:
    """A PostgreSQL of its own in a temporary folder, reached by a Unix socket there, and by TCP if `tcp`.

    `settings` go into postgresql.conf, besides those that spare the disk: a test looks at crashes of PostgreSQL, not of
    the machine, and none of those loses what the system was given to write. A benchmark sets `fsync` to "on".
    """

    def __init__(self, *, tcp: bool = False, name: str = "primary", **settings: str) -> None:
        self.name = name
        self.folder = Path(tempfile.mkdtemp(prefix="astera-pg-"))
        self.port = free_port() if tcp else _PORT
        self._host = "127.0.0.1" if tcp else str(self.folder)
        self._settings = {
            "listen_addresses": "'127.0.0.1'" if tcp else "''",
            "unix_socket_directories": f"'{self.folder}'",
            "port": str(self.port),
            "cluster_name": f"'{name}'",
            "fsync": "off",
            "max_connections": "100",
            "timezone": "'UTC'",
            **settings,
        }
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres", "postgres")

    @classmethod
    def made(cls, **more: Any) -> Cluster:
        """A cluster that runs, with an empty database `astera`."""
        cluster = cls(**more)
        try:
            cluster._run(
                "initdb", "-D", cluster.data, "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "-N"
            )
            cluster._configure()
            cluster.start()
            cluster.create("astera")
        except BaseException:
            cluster.remove()
            raise
        return cluster

    def standby(self) -> Cluster:
        """A second cluster that follows this one by streaming; commits here wait until it has them on disk."""
        other = Cluster(tcp=self._host == "127.0.0.1", name="standby")
        try:
            other._run("pg_basebackup", "-D", other.data, "-d", self.url("postgres"), "-R", "-c", "fast", "-N")
            other._configure()
            other.start()
            # Behind the copy, or the standby would wait for itself once it is promoted.
            self.query("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            self.query("SELECT pg_reload_conf()")
            end = time.monotonic() + 20
            while not self.query("SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync'"):
                assert time.monotonic() < end, other.log()
                time.sleep(0.05)
        except BaseException:
            other.remove()
            raise
        return other

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    @property
    def address(self) -> tuple[str, int] | str:
        """What a proxy connects to: host and port, or the path of the socket."""
        return (self._host, self.port) if self._host == "127.0.0.1" else f"{self._host}/.s.PGSQL.{self.port}"

    def url(self, database: str = "astera", **parameters: str) -> str:
        """The URL of a database, with parameters of libpq."""
        return database_url([(self._host, self.port)], database, **parameters)

    def _run(self, program: str, *arguments: str) -> None:
        folder = postgres_bin()
        assert folder is not None, CURE
        # Not captured by a pipe: a postmaster that pg_ctl starts would hold its other end.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [str(folder / program), *arguments],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                check=False,
                **_unprivileged(),
            )
            output.seek(0)
            assert done.returncode == 0, f"{program}: {output.read()}{self.log()}"

    def _configure(self) -> None:
        with open(f"{self.data}/postgresql.conf", "a", encoding="utf-8") as file:
            file.writelines(f"{name} = {value}\n" for name, value in self._settings.items())

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", self.data, "-l", f"{self.folder}/log", "-w", *arguments)

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        self._control("start")

    def stop(self, mode: str = "fast") -> None:
        """Stop it: "fast" tells the clients, "immediate" is a crash."""
        self._control("stop", "-m", mode)

    def promote(self) -> None:
        """Make a standby the primary."""
        self._control("promote")

    def create(self, database: str, template: str = "template1") -> str:
        """A new database; its URL."""
        self.query(f'CREATE DATABASE "{database}" TEMPLATE "{template}"', database="postgres")
        return self.url(database)

    def query(self, statement: str, *values: Any, database: str = "astera") -> list[tuple[Any, ...]]:
        """The rows of one statement on a connection of its own; none of a statement without."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=10) as connection:
            cursor = connection.execute(statement, values or None)
            return list(cursor) if cursor.description else []

    def log(self) -> str:
        """What PostgreSQL has logged."""
        file = self.folder / "log"
        return file.read_text("utf-8", "replace") if file.exists() else ""

    def remove(self) -> None:
        """Stop it if it runs, and delete its folder."""
        if Path(self.data, "postmaster.pid").exists():
            with contextlib.suppress(AssertionError):
                self.stop("immediate")
        shutil.rmtree(self.folder, ignore_errors=True)


def database_name(url: str) -> str:
    """The name of the database in a URL."""
    return url.partition("?")[0].rpartition("/")[2]


def database_url(addresses: Sequence[tuple[str, int]], database: str = "astera", **parameters: str) -> str:
    """A URL of libpq for one or more servers, by host or by folder of the socket, each with its port."""
    if all("/" not in host for host, _ in addresses):
        where = ",".join(f"{host}:{port}" for host, port in addresses)
    else:
        where = ""
        parameters = {
            "host": ",".join(host for host, _ in addresses),
            "port": ",".join(str(port) for _, port in addresses),
            **parameters,
        }
    return f"postgresql://{_USER}@{where}/{database}" + (f"?{urlencode(parameters, safe='/,')}" if parameters else "")


async def _end(server: asyncio.Server) -> None:
    """Take no more connections.

    A connection that came in this turn of the loop joins the server in the next one: asyncio leaves its socket open if
    the server is closed by then.
    """
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener)
    await asyncio.sleep(0)
    server.close()


async def _cancel_others() -> None:
    """End all other tasks of the loop, also that of a connection which comes just now."""
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    await asyncio.sleep(0)  # what was closed goes in the loop's next turn


class Proxy:
    """TCP on a free port of 127.0.0.1, passed on to an address, until it is cut.

    `cut("refuse")` ends the connections and takes no new one, as a process that is gone; `cut("silence")` keeps and
    takes them, but no byte passes, as a cable that was pulled. `mend()` lets bytes pass again.
    """

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._passing = asyncio.Event()
        self._passing.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._wait(self._listen())

    def _wait(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        self._writers.add(writer)
        try:
            if self._server is None:
                return  # cut while it came
            await self._passing.wait()
            if isinstance(self._target, str):
                there, back = await asyncio.open_unix_connection(self._target)
            else:
                there, back = await asyncio.open_connection(*self._target)
            ends.append(back)
            self._writers.add(back)
            await asyncio.wait(
                [asyncio.ensure_future(self._pump(reader, back)), asyncio.ensure_future(self._pump(there, writer))]
            )
        except (OSError, asyncio.CancelledError):
            pass  # the target is down: the client sees its connection end; or all is closed
        finally:
            for end in ends:
                self._writers.discard(end)
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._passing.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            await self._passing.wait()  # nor does an end pass
            writer.close()

    async def _cut(self, how: str) -> None:
        if how == "silence":
            self._passing.clear()
            return
        assert self._server is not None
        await _end(self._server)
        self._server = None
        for writer in list(self._writers):
            writer.transport.abort()

    async def _mend(self) -> None:
        self._passing.set()
        if self._server is None:
            await self._listen()

    async def _close(self) -> None:
        self._passing.set()
        if self._server is not None:
            await self._cut("refuse")
        await _cancel_others()

    def cut(self, how: str) -> None:
        """Let nothing pass: "refuse" or "silence"."""
        self._wait(self._cut(how))

    def mend(self) -> None:
        """Let pass again, on the same port."""
        self._wait(self._mend())

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


class Call(NamedTuple):
    """A request that came to a peer."""

    at: float  # time.monotonic()
    path: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """An HTTP server on 127.0.0.1: a receiver of callbacks, or an API that takes `delay_s` to answer `{"ok": true}`.

    `calls` keeps what came whole, unless `keep` is false. `status` is what it answers.
    """

    def __init__(self, delay_s: float = 0, *, keep: bool = True) -> None:
        self.delay_s, self.keep, self.status = delay_s, keep, 200
        self.calls: list[Call] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if self.keep:
                    self.calls.append(Call(time.monotonic(), head[0].split(" ")[1], headers, body))
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                answer = f"HTTP/1.1 {self.status} OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n"
                writer.write(answer.encode() + b'{"ok": true}')
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the other side was killed, or is done; or all is closed
        finally:
            writer.close()

    async def _close(self) -> None:
        await _end(self._server)
        await _cancel_others()

    def callbacks(self) -> dict[str, list[str]]:
        """The ids of the messages that came, by job."""
        found: dict[str, list[str]] = {}
        for call in list(self.calls):
            found.setdefault(json.loads(call.body)["id"], []).append(call.headers["webhook-id"])
        return found

    def __enter__(self) -> Peer:
        self._thread.start()
        starting = asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=1024)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(10)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


#: Runs the program with a clock that is off by so many seconds: the server reads the time from the module `time` alone,
#: and a wrong clock of a machine does not change what measures durations. Jobs that a server owns without knowing it,
#: for nobody told it whether their commit came through, are found by two looks, so many seconds apart.
_ALTERED = """
import sys, time
shift, look_s, folder, sys.argv = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[3:]
seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() + shift
time.time_ns = lambda: nanoseconds() + int(shift * 1e9)
sys.path.insert(0, folder)
import astera_lite, astera_lite_postgres
astera_lite_postgres._ORPHAN_S = look_s
sys.exit(astera_lite.main())
"""


class Node:
    """A server process on a database of PostgreSQL, which can be started again and again; its port changes.

    Its clock is off by `clock_s` seconds. It looks every `look_s` seconds, not every 30, for jobs that it owns without
    knowing it.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        database: str,
        *arguments: str,
        clock_s: float = 0,
        look_s: float = 3,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.name = folder, name
        begin = [sys.executable, "-c", _ALTERED, str(clock_s), str(look_s), str(ROOT)]
        self._command = [*begin, "--port", "0", "--database", database, "--node", name, *arguments]
        self._env = {key: value for key, value in os.environ.items() if not key.startswith("ASTERA_")} | dict(env or {})
        self._process: subprocess.Popen[str] | None = None
        self._listening = threading.Event()
        self._drain: threading.Thread | None = None
        self.lines: list[str] = []  # of its log, over all starts
        self.url = ""

    def begin(self) -> None:
        """Start the process without waiting for it."""
        assert self._process is None
        self._listening.clear()
        self.url = ""
        self._process = subprocess.Popen(
            self._command, cwd=self.folder, stderr=subprocess.PIPE, text=True, env=self._env
        )
        self._drain = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._drain.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        for line in process.stderr or ():
            self.lines.append(line.rstrip("\n"))
            if line.startswith("listening on "):
                self.url = line.rstrip("\n").removeprefix("listening on ")
                self._listening.set()
        self._listening.set()  # or it ended before

    def ready(self, seconds: float = 30) -> Node:
        """Wait until it listens."""
        assert self._listening.wait(seconds), self.said()
        assert self.url and self._process is not None and self._process.poll() is None, self.said()
        return self

    def start(self) -> Node:
        self.begin()
        return self.ready()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def api(self) -> Api:
        """A client of its own for each use: sessions are not for several threads."""
        return Api(self.url)

    def said(self, word: str = "") -> str:
        """The lines of its log that contain a word."""
        return "\n".join(line for line in self.lines if word in line)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def pause(self) -> None:
        """Stop it as a machine that is suspended."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL, 10)

    def stop(self, seconds: float = 40) -> int:
        """End it as a service manager does; its exit code."""
        return self._end(signal.SIGTERM, seconds)

    def _end(self, number: int, seconds: float) -> int:
        assert self._process is not None and self._drain is not None
        process = self._process
        if process.poll() is None:
            process.send_signal(number)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
            raise
        finally:
            self._drain.join(5)
            assert process.stderr is not None
            process.stderr.close()
            self._process = None
        return code

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self.kill()


@contextlib.contextmanager
def nodes(
    folder: Path, database: str, names: Sequence[str], *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[list[Node]]:
    """So many nodes in one folder, started at the same time; killed at the end if they still run."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(Node(folder, name, database, *arguments, env=env)) for name in names]
        for node in made:
            node.begin()
        yield [node.ready() for node in made]


def say(title: str, **figures: Any) -> None:
    """Print figures of a test, for a report (pytest -s)."""
    print(f"\n{title}: " + ", ".join(f"{name} {value}" for name, value in figures.items()), file=sys.stderr)
