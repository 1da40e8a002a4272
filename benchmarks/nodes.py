"""Astera Lite on PostgreSQL: one node against SQLite and against peers, and what two and three nodes bring.

  accepts  accepts, completed jobs and cycles a second at 64 connections, and processor time of a completed job:
           one node, SQLite on the same disk, FastAPI with Procrastinate, FastAPI with DBOS
  scale    jobs a second and their p99 with 1, 2 and 3 nodes, for a flow that calls an API which answers after 200 ms
  idle     queries a second of a node that has nothing to do
  held     the same flow (API: 10 ms) while a transaction is held open, so that no dead row can be removed

The cluster is one of its own in a temporary folder (TMPDIR says on which disk), reached by TCP, with PostgreSQL's own
settings, which are printed. Every measurement has an empty database. What is compared takes turns in each round;
ratios are made within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psycopg
from common import (
    HERE,
    ROOT,
    SUBMIT,
    Figures,
    Server,
    cpu_seconds,
    environment,
    free_port,
    ours,
    spread,
    start,
    table,
    temporary,
    tool,
)

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from nodes import Cluster, Peer  # noqa: E402  (of the tests)

PYTHON = "python/bin/python"
UVICORN = ("-m", "uvicorn", "--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning")
SETTINGS = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_connections")


class Rival(NamedTuple):
    """A server to compare with; its commands are arguments of the peers' Python, {port} is replaced."""

    label: str
    commands: tuple[tuple[str, ...], ...] = ()
    before: tuple[str, ...] = ()  # run once in an empty database
    sql: str = ""  # then this


RIVALS = {
    "postgres": Rival("Astera Lite, PostgreSQL"),
    "sqlite": Rival("Astera Lite, SQLite"),
    "procrastinate": Rival(
        "FastAPI + Procrastinate",
        (
            (*UVICORN, "--port", "{port}", "fastapi_procrastinate:app"),
            ("-m", "procrastinate", "worker", "--concurrency", "30"),
        ),
        ("-m", "procrastinate", "schema", "--apply"),
        "CREATE TABLE results (job bigint PRIMARY KEY, result text NOT NULL)",
    ),
    "dbos": Rival("FastAPI + DBOS", (("fastapi_dbos.py",),)),
}
COUNTS = (0, 1, 2, 3)  # of nodes; 0: one on SQLite
MODES = {"submit": "accepts/s", "completed": "completed/s", "cycle": "cycles/s"}


@contextlib.contextmanager
def database(cluster: Cluster) -> Iterator[str]:
    """The URL of an empty database, which is dropped at the end."""
    name = f"bench{time.monotonic_ns()}"
    url = cluster.create(name)
    cluster.query("CHECKPOINT")  # none that is due for the work before falls into this one's
    try:
        yield url
    finally:
        cluster.query(f"DROP DATABASE {name} WITH (FORCE)", database="postgres")


def postgres_cpu(cluster: Cluster) -> float:
    """CPU time of PostgreSQL so far: the postmaster, its processes, and those that have ended."""
    master = (Path(cluster.data) / "postmaster.pid").read_text().split()[0]
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            if fields[1] == master:
                ticks += int(fields[11]) + int(fields[12])
            elif stat.parent.name == master:
                ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def used(cluster: Cluster, servers: list[Server]) -> tuple[float, float, float]:
    """CPU seconds so far of the servers, of PostgreSQL, and of this process."""
    processes = [process.pid for server in servers for process in server.processes]
    return sum(cpu_seconds(pid) for pid in processes), postgres_cpu(cluster), time.process_time()


@contextlib.contextmanager
def rival(name: str, url: str) -> Iterator[Server]:
    """One of RIVALS, started on a database."""
    if name in ("postgres", "sqlite"):
        with ours(*(("--database", url) if name == "postgres" else ())) as server:
            yield server
        return
    port, python = free_port(), tool(PYTHON)
    with temporary() as folder:
        for file in (HERE / "peers").glob("*.py"):
            shutil.copy(file, folder)
        env = {"DATABASE_URL": url, "PORT": str(port), "PYTHONPATH": str(folder)}
        env |= {"PROCRASTINATE_APP": "fastapi_procrastinate.queue", "PROCRASTINATE_LOG_LEVEL": "warning"}
        if RIVALS[name].before:
            subprocess.run(
                [python, *RIVALS[name].before],
                cwd=folder,
                env=environment(**env),
                stdout=subprocess.DEVNULL,
                check=True,
            )
        commands = [[python, *(word.format(port=port) for word in line)] for line in RIVALS[name].commands]
        server = start(commands, folder, port, probe="/sync?a=1&b=hello", env=env)
        try:
            yield server
        finally:
            server.kill()


def measure(cluster: Cluster, name: str, mode: str, seconds: float) -> Figures:
    """Load one server, started on an empty database."""
    path = SUBMIT if name in ("postgres", "sqlite") else "/submit?a=1&b=hello"
    with database(cluster) as url:
        if RIVALS[name].sql:
            cluster.query(RIVALS[name].sql, database=url.rpartition("/")[2])
        with rival(name, url) as server:
            server.load(mode, path, 16, min(0.5, seconds / 4))  # warm-up
            before = used(cluster, [server])
            figures = server.load(mode, path, 64, seconds)
            spent = [late - early for early, late in zip(before, used(cluster, [server]), strict=True)]
    if not figures["requests"]:
        sys.exit(f"{RIVALS[name].label}: nothing succeeded: {figures['errors']}")
    figures["cpu_us"], figures["postgres_us"] = (cpu / figures["jobs"] * 1e6 for cpu in spent[:2])
    errors = f"  errors {figures['errors']}" if figures["errors"] else ""
    print(f"{RIVALS[name].label:<26} {mode:<10} {figures['rate']:>8.0f}/s{errors}", file=sys.stderr)
    return figures


def accepts(cluster: Cluster, args: argparse.Namespace) -> None:
    rounds: list[dict[tuple[str, str], Figures]] = []
    names = list(RIVALS)
    for number in range(args.rounds):
        first = number % len(names)
        rounds.append(
            {
                (name, mode): measure(cluster, name, mode, args.seconds)
                for mode in MODES
                for name in names[first:] + names[:first]
            }
        )
    rows = []
    for name in names:
        cells = [RIVALS[name].label]
        for mode in MODES:
            rate = statistics.median(each[name, mode]["rate"] for each in rounds)
            ratio = spread([each["postgres", mode]["rate"] / each[name, mode]["rate"] for each in rounds])
            cells.append(f"{rate:,.0f}" + (f", ×{ratio}" if name != "postgres" else ""))
        cells += [
            f"{statistics.median(each[name, 'completed'][field] for each in rounds):,.0f}"
            for field in ("cpu_us", "postgres_us")
        ]
        rows.append(cells)
    head = ("server", *(f"{label}, ours to it" for label in MODES.values()))
    print(table(rows, (*head, "µs of its processes a job", "µs of PostgreSQL a job")))
    ratio = spread([each["postgres", "submit"]["rate"] / each["sqlite", "submit"]["rate"] for each in rounds])
    print(table([("accepts on PostgreSQL to SQLite", "", "×0.4", f"×{ratio}")]))


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def ask(connection: Connection, request: str) -> tuple[str, bytes]:
    """One request, without its last lines: head and body of its answer."""
    reader, writer = connection
    writer.write(f"{request}\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode())
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = head.lower().partition("content-length:")[2].split("\r\n")[0]
    return head, await reader.readexactly(int(length))


async def client(ports: list[int], number: int, end: float, done: list[tuple[float, float]]) -> None:
    """Submit a job to one node and wait at the next one until it has ended, again and again."""
    nodes = [await asyncio.open_connection("127.0.0.1", port) for port in ports]
    while (began := time.monotonic()) < end:
        head, body = await ask(nodes[number % len(nodes)], "POST /api/publishingAsync/wait HTTP/1.1")
        number += 1
        if not head.startswith("HTTP/1.1 202"):
            sys.exit(f"a submission was answered with {head}{body[:300]!r}")
        job = json.loads(body)
        while job["status"] == "Running":
            request = f"GET /api/jobs/{job['id']}/status HTTP/1.1\r\nPrefer: wait=30"
            job = json.loads((await ask(nodes[number % len(nodes)], request))[1])
        if job["status"] != "Completed":
            sys.exit(f"a job failed: {job}")
        now = time.monotonic()
        done.append((now, now - began))
    for _, writer in nodes:
        writer.close()


def drive(cluster: Cluster, servers: list[Server], count: int, seconds: float) -> Figures:
    """Let so many clients work for a second, and then so long: jobs a second, latency in ms, cores, µs of a job."""
    done: list[tuple[float, float]] = []
    before, begin = used(cluster, servers), time.monotonic()
    end = begin + 1 + seconds

    async def clients() -> None:
        ports = [server.port for server in servers]
        await asyncio.gather(*(client(ports, number, end, done) for number in range(count)))

    asyncio.run(clients())
    spent = [late - early for early, late in zip(before, used(cluster, servers), strict=True)]
    took = sorted(took * 1000 for moment, took in done if begin + 1 <= moment < end)
    figures = {"rate": len(took) / seconds, "p50": took[len(took) // 2], "p99": took[len(took) * 99 // 100]}
    for name, cpu in zip(("nodes", "postgres", "client"), spent, strict=True):
        figures |= {f"{name}_cores": cpu / (time.monotonic() - begin), f"{name}_us": cpu / len(done) * 1e6}
    print({name: round(value, 2) for name, value in figures.items()}, file=sys.stderr)
    return figures


@contextlib.contextmanager
def waiting(url: str, count: int, workers: int, delay_s: float) -> Iterator[list[Server]]:
    """So many nodes on one database (0: one on SQLite), whose flow `wait` calls an API that takes so long."""
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(Peer(delay_s, keep=False))
        flows = stack.enter_context(temporary())
        shutil.copy(HERE / "flows" / "echo.json", flows)
        flow = {
            "request": {"method": "POST", "resource": "/wait", "processing": ["asynchronous"]},
            "steps": [{"name": "told", "http": {"url": f"{api.url}/"}}],
            "response": {"body": "${told.body}"},
        }
        (flows / "wait.json").write_text(json.dumps(flow))
        common = ("--workers", str(workers))
        each = [(*common, "--database", url, "--node", f"node{number}") for number in range(count)] or [common]
        yield [stack.enter_context(ours(*settings, flows=flows)) for settings in each]


def scale(cluster: Cluster, args: argparse.Namespace) -> None:
    rounds: list[dict[int, Figures]] = []
    for number in range(args.rounds):
        rounds.append({})
        for turn in range(len(COUNTS)):
            count = COUNTS[(turn + number) % len(COUNTS)]
            with database(cluster) as url, waiting(url, count, args.workers, 0.2) as servers:
                rounds[-1][count] = drive(cluster, servers, 2 * args.workers * len(servers), args.seconds)
    ratios = {count: spread([each[count]["rate"] / each[1]["rate"] for each in rounds]) for count in COUNTS}
    rows = []
    for count in COUNTS:
        middle = {name: statistics.median(each[count][name] for each in rounds) for name in rounds[0][count]}
        cells = [f"{middle[name]:,.0f}" for name in ("rate", "p50", "p99", "nodes_us", "postgres_us")]
        cores = " + ".join(f"{middle[f'{name}_cores']:.2f}" for name in ("nodes", "postgres", "client"))
        rows.append((count or "SQLite", f"{cells[0]}, ×{ratios[count]}", *cells[1:], cores))
    print(f"{args.workers} workers a node, so at most {args.workers / 0.2:.0f} jobs/s each; twice as many clients.\n")
    head = ("nodes", "jobs/s, to one", "p50 ms", "p99 ms", "µs of nodes a job", "µs of PostgreSQL a job")
    print(table(rows, (*head, "cores: nodes + PostgreSQL + clients and API")))
    print(table([("jobs/s of two nodes to one", "", "×1.9", f"×{ratios[2]}")]))


def idle(cluster: Cluster, args: argparse.Namespace) -> None:
    with database(cluster) as url:
        name = url.rpartition("/")[2]
        cluster.query("CREATE EXTENSION pg_stat_statements", database=name)
        cluster.query(f"ALTER DATABASE {name} SET pg_stat_statements.track = 'top'")
        with ours("--database", url) as server:
            server.finished_job()
            time.sleep(3)
            cluster.query("SELECT pg_stat_statements_reset()", database=name)
            before = used(cluster, [server])
            time.sleep(args.quiet)
            spent = [late - early for early, late in zip(before, used(cluster, [server]), strict=True)]
            calls = cluster.query(
                "SELECT calls, regexp_replace(left(query, 100), '[\\s|]+', ' ', 'g') FROM pg_stat_statements"
                " JOIN pg_database ON oid = dbid WHERE datname = current_database()"
                " AND query NOT LIKE '%pg_stat_statements%' ORDER BY calls DESC",
                database=name,
            )
    counts = [("**all**", sum(count for count, _ in calls)), *((f"`{query}`", count) for count, query in calls)]
    rows = [(query, f"{count / args.quiet:.2f}") for query, count in counts]
    print(table(rows, ("statement of an idle node", "a second")))
    cores = [f"{cpu / args.quiet:.2%}" for cpu in spent[:2]]
    print(f"processor time of the idle node {cores[0]} of a core, of PostgreSQL {cores[1]}\n")


def held(cluster: Cluster, args: argparse.Namespace) -> None:
    dying = (  # one transaction
        "CREATE TEMPORARY TABLE oldest AS SELECT * FROM jobs ORDER BY seq LIMIT 1;"
        " UPDATE oldest SET status = 'Running', owner = NULL, due = NULL;"
        " INSERT INTO jobs SELECT (jsonb_populate_record(o, jsonb_build_object('seq', seq - (n << 12)))).*"
        f" FROM oldest o, generate_series(1, {args.dead}) n; DELETE FROM jobs WHERE seq < (SELECT seq FROM oldest)"
    )
    rows = []
    for label in ("nothing else", "a transaction held open"):
        with contextlib.ExitStack() as stack:
            url = stack.enter_context(database(cluster))
            name = url.rpartition("/")[2]
            servers = stack.enter_context(waiting(url, 1, args.workers, 0.01))
            servers[0].finished_job("/api/publishingAsync/wait")
            if label != "nothing else":
                other = stack.enter_context(psycopg.connect(url))
                other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                other.execute("SELECT count(*) FROM jobs")
            parts = [drive(cluster, servers, 4 * args.workers, args.held / 10 - 1)]
            cluster.query(dying, database=name)
            parts += [drive(cluster, servers, 4 * args.workers, args.held / 10 - 1) for _ in range(9)]
            time.sleep(2)  # until PostgreSQL has counted
            dead = cluster.query("SELECT sum(n_dead_tup) FROM pg_stat_user_tables", database=name)[0][0]
        for when, part in (("before the dead rows", parts[0]), ("after them", parts[1]), ("at the end", parts[-1])):
            cells = [f"{part[name]:,.0f}" for name in ("rate", "p99", "nodes_us", "postgres_us")]
            rows.append((f"{label}, {when}", *cells))
        print(f"{label}: {dead:,} dead rows at the end", file=sys.stderr)
    print(f"{args.held:.0f} s each, {args.workers} workers, four times as many clients, API of 10 ms;")
    print(f"after a tenth of the time {args.dead:,} jobs that are free become dead rows, before all others.\n")
    print(table(rows, ("beside", "jobs/s", "p99 ms", "µs of the node a job", "µs of PostgreSQL a job")))


FIGURES = {"accepts": accepts, "scale": scale, "idle": idle, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=f"{', '.join(FIGURES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round of a second each, to see that it works")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5, help="for each figure (default: 5)")
    parser.add_argument("--workers", type=int, default=8, help="of a node, in scale and held (default: 8)")
    parser.add_argument("--quiet", type=float, default=30, help="seconds of idle (default: 30)")
    parser.add_argument("--held", type=float, default=300, help="seconds of held, twice (default: 300)")
    parser.add_argument("--dead", type=int, default=100_000, help="dead rows of held (default: 100,000)")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.quiet, args.held = 1, 1.0, 10.0, 20.0
    cluster = Cluster.made(
        tcp=True,
        fsync="on",
        shared_preload_libraries="pg_stat_statements",
        **{"pg_stat_statements.track": "none"},  # but of the idle node
    )
    try:
        settings = [f"{name} {cluster.query(f'SHOW {name}')[0][0]}" for name in SETTINGS]
        print(f"PostgreSQL: {', '.join(settings)}\n")
        for name in args.figures or FIGURES:
            FIGURES[name](cluster, args)
    finally:
        cluster.remove()


if __name__ == "__main__":
    main()
