"""Compare Astera Lite with what people use instead; write the table, the plot and the raw figures to results/.

Each round takes the rows one after the other, and within a row every server in turn (another one first in each round),
so that what disturbs the machine for a while disturbs all alike. Every measurement has a server started afresh, with
an empty database: no server works on what an earlier row left behind, and none idles beside the one that is measured.
Ratios are made within a round; what is shown is their median over the rounds, with the least and the greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from common import HERE, ROOT, SUBMIT, SYNC, Figures, free_port, our_command, spread, start, table, temporary, tool
from plot import Group, Line, plot

RESULTS = HERE / "results"
OURS = "astera-lite"


class Peer(NamedTuple):
    """A server; in its commands {port}, {folder}, {python} and {environment} are replaced."""

    label: str
    commands: tuple[str, ...]
    files: tuple[str, ...] = ()  # copied to its folder
    durable: bool = True
    submit: str = "/submit?a=1&b=hello"
    sync: str = "/sync?a=1&b=hello"


class Row(NamedTuple):
    """One measurement: a mode of the load generator, and the disk."""

    label: str
    mode: str
    connections: int
    sync_ms: float | None = None


class Target(NamedTuple):
    """What performance.md wants of the ratio to a peer (more is better), or of our own latency in syncs (less is)."""

    row: str
    figure: str  # rate, p99 or syncs
    peer: str
    floor: float
    aim: float


_UVICORN = "{python} -m uvicorn --port {port} --loop uvloop --http httptools --no-access-log --log-level warning "
_GUNICORN = "{python} -m gunicorn --bind 127.0.0.1:{port} --worker-class gthread --workers 2 --threads 16 "
_CONSUMER = "{python} {environment}/python/bin/huey_consumer --quiet --workers 4 --delay 0.005 --max-delay 0.02 "
_NODE_RED = "{environment}/nodered/node_modules/.bin/node-red --userDir {folder} --settings {folder}/settings.js"

PEERS = {
    OURS: Peer("Astera Lite", (), submit=SUBMIT, sync=SYNC),
    "fastapi-sqlite3": Peer("FastAPI + sqlite3", (_UVICORN + "fastapi_sqlite3:app",), ("fastapi_sqlite3.py",)),
    "fastapi-aiosqlite": Peer("FastAPI + aiosqlite", (_UVICORN + "fastapi_aiosqlite:app",), ("fastapi_aiosqlite.py",)),
    "fastapi-aiosqlite-mixed": Peer(
        "FastAPI + aiosqlite, mixed", ("env MIXED=1 " + _UVICORN + "fastapi_aiosqlite:app",), ("fastapi_aiosqlite.py",)
    ),
    "starlette": Peer("Starlette, grouped", (_UVICORN + "starlette_grouped:app",), ("starlette_grouped.py",)),
    "flask-huey": Peer(
        "Flask + SqliteHuey", (_GUNICORN + "flask_huey:app", _CONSUMER + "flask_huey.huey"), ("flask_huey.py",)
    ),
    "node-red": Peer(
        "Node-RED (in memory)", (_NODE_RED,), ("nodered/flows.json", "nodered/settings.js"), durable=False
    ),
}

ROWS = {
    "accepts-1": Row("accepts, 1 connection", "submit", 1),
    "accepts-64": Row("accepts, 64 connections", "submit", 64),
    "accepts-256": Row("accepts, 256 connections", "submit", 256),
    "completed-256": Row("completed jobs, 256 connections", "completed", 256),
    "cycles-64": Row("submit–poll–fetch, 64 connections", "cycle", 64),
    "sync-64": Row("synchronous, 64 connections", "sync", 64),
    "slow-disk-256": Row("accepts, 256 connections, 4 ms per sync", "submit", 256, sync_ms=4),
}
QUICK_ROWS = ("accepts-64", "completed-256", "cycles-64", "sync-64", "slow-disk-256")

TARGETS = (
    Target("accepts-64", "rate", "fastapi-sqlite3", 12, 30),
    Target("accepts-64", "rate", "fastapi-aiosqlite", 8, 20),
    Target("accepts-64", "rate", "starlette", 1.5, 3),
    Target("completed-256", "rate", "fastapi-sqlite3", 14, 35),
    Target("cycles-64", "rate", "fastapi-sqlite3", 10, 25),
    Target("cycles-64", "rate", "starlette", 1.5, 3),
    Target("sync-64", "rate", "fastapi-sqlite3", 5, 12),
    Target("sync-64", "rate", "starlette", 1, 2),
    Target("accepts-64", "p99", "fastapi-sqlite3", 10, 40),
    Target("slow-disk-256", "syncs", OURS, 6, 3),
    Target("slow-disk-256", "rate", "fastapi-sqlite3", 80, 150),
)

TARGET_HEAD = ("figure", "floor", "aim", "reached", "stands at")

Rounds = list[dict[str, dict[str, Figures]]]  # for each round: row -> server -> figures


def measure(name: str, row: Row, seconds: float) -> Figures:
    """Start one server, warm it up, and load it."""
    peer, port = PEERS[name], free_port()
    with temporary() as folder:
        for file in peer.files:
            shutil.copy(HERE / "peers" / file, folder)
        words = {"port": port, "folder": folder, "python": tool("python/bin/python")}
        words["environment"] = Path(tool("load")).parent
        commands = [shlex.split(command.format_map(words)) for command in peer.commands] or [our_command(port)]
        server = start(commands, folder, port, probe=peer.sync, env={"PORT": str(port)}, sync_ms=row.sync_ms)
        try:
            path = peer.sync if row.mode == "sync" else peer.submit
            server.load(row.mode, path, min(row.connections, 16), min(0.5, seconds / 4))  # warm-up
            before = server.syncs() if row.sync_ms is not None else 0
            figures = server.load(row.mode, path, row.connections, seconds)
            if row.sync_ms is not None:
                figures["syncs"] = server.syncs() - before
                if not figures["syncs"]:
                    sys.exit(f"{peer.label}: the slow disk is not in effect")
        finally:
            server.kill()
    if not figures["requests"]:
        sys.exit(f"{peer.label}, {row.label}: nothing succeeded: {figures['errors']}")
    return figures


def run(rows: list[str], peers: list[str], rounds: int, seconds: float) -> Rounds:
    """All measurements, interleaved."""
    measured: Rounds = []
    for number in range(rounds):
        measured.append({})
        first = number % len(peers)
        for name in rows:
            row, figures = ROWS[name], measured[-1].setdefault(name, {})
            for peer in peers[first:] + peers[:first]:
                if row.sync_ms is not None and not PEERS[peer].durable:
                    continue
                figures[peer] = got = measure(peer, row, seconds)
                errors = f"  errors {got['errors']}" if got["errors"] else ""
                print(
                    f"{number + 1}/{rounds} {row.label:<40} {PEERS[peer].label:<27} {got['rate']:>9.0f}/s"
                    f" p99 {got['p99_us'] / 1000:>8.1f} ms{errors}",
                    file=sys.stderr,
                )
    return measured


def ratios(rounds: Rounds, row: str, figure: str, peer: str) -> list[float]:
    """Ours to a peer's in each round, more being better; `syncs`: our p99 by the time of one sync."""
    found = []
    for each in rounds:
        mine, other = each.get(row, {}).get(OURS), each.get(row, {}).get(peer)
        if mine is None or other is None:
            continue
        if figure == "rate":
            found.append(mine["rate"] / other["rate"])
        elif figure == "p99":
            found.append(other["p99_us"] / max(1, mine["p99_us"]))
        else:
            found.append(mine["p99_us"] / 1000 / (ROWS[row].sync_ms or 1))
    return found


def verdict(target: Target, value: float) -> str:
    """Where a figure stands between floor and aim."""
    floor, aim = (value <= bound if target.figure == "syncs" else value >= bound for bound in target[3:])
    return "aim" if aim else "floor" if floor else "below"


def target_rows(rounds: Rounds) -> list[tuple[str, ...]]:
    words = {"rate": "×{}", "p99": "p99 1/{}", "syncs": "p99 {} syncs"}
    rows = []
    for target in TARGETS:
        found = ratios(rounds, target.row, target.figure, target.peer)
        if found:
            against = "" if target.figure == "syncs" else f"; against {PEERS[target.peer].label}"
            cells = [words[target.figure].format(value) for value in (*target[3:], spread(found))]
            stands = verdict(target, statistics.median(found))
            rows.append((f"{ROWS[target.row].label}{against}", *cells, stands))
    return rows


def server_rows(rounds: Rounds, row: str) -> list[tuple[str, ...]]:
    """For each server: rate, latency, and the ratios of ours to it."""
    rows = []
    for peer in PEERS:
        all_of = [each[row][peer] for each in rounds if peer in each.get(row, {})]
        if not all_of:
            continue
        faults = sum(sum(figures["errors"].values()) for figures in all_of)
        cells = [PEERS[peer].label + (f" ({faults} errors)" if faults else "")]
        cells.append(f"{statistics.median(figures['rate'] for figures in all_of):,.0f}")
        cells += [
            f"{statistics.median(figures[name] for figures in all_of) / 1000:.1f}" for name in ("p50_us", "p99_us")
        ]
        for figure in ("rate", "p99"):
            found = ratios(rounds, row, figure, peer)
            cells.append("" if peer == OURS or not found else spread(found))
        rows.append(tuple(cells))
    return rows


def markdown(document: Figures) -> str:
    rounds: Rounds = document["rounds"]
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items())
    targets = target_rows(rounds)
    parts = [
        f"{document['date']}, `{document['command']}`: {len(rounds)} round(s) of {document['seconds']:g} s for each"
        " figure. Client and servers share the cores.\n",
        f"Machine: {machine}.\n",
        f"Versions: {versions}.\n",
        "Ratios, ours to the peer's: median of the rounds (least–greatest).\n",
        table(targets, TARGET_HEAD) if targets else "None of the chosen rows and peers has a floor.\n",
        "All servers: medians of the rates and latencies; × is how many times as many we do (rate) and how many times"
        " as long the peer takes (p99).\n",
    ]
    head = ("server", "per second", "p50 ms", "p99 ms", "× rate", "× p99")
    for row in ROWS:
        if any(row in each for each in rounds):
            parts += [f"**{ROWS[row].label[0].upper()}{ROWS[row].label[1:]}**\n", table(server_rows(rounds, row), head)]
    return "\n".join(parts)


def picture(document: Figures) -> str:
    """The ratios of the rates as SVG."""
    rounds: Rounds = document["rounds"]
    bounds = {(target.row, target.peer): target[3:] for target in TARGETS if target.figure == "rate"}
    groups = []
    for row in ROWS:
        lines = []
        for peer in PEERS:
            found = ratios(rounds, row, "rate", peer)
            if found and peer != OURS:
                lines.append(Line(PEERS[peer].label, found, *bounds.get((row, peer), ())))
        if lines:
            groups.append(Group(ROWS[row].label, lines))
    return plot("Requests or jobs per second: how many times as many as each peer", groups)


def sync_ms() -> float:
    """Median time of a 4 KiB write and fdatasync where the databases are, in ms."""
    with temporary() as folder, open(folder / "probe", "wb", buffering=0) as file:
        times = []
        for _ in range(50):
            began = time.perf_counter()
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
            times.append((time.perf_counter() - began) * 1000)
        return statistics.median(times)


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return {
        "CPU": models[0] if models else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "sync of the disk": f"{sync_ms():.2f} ms",
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def versions() -> dict[str, str]:
    def told(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()

    names = ("fastapi", "starlette", "uvicorn", "uvloop", "httptools", "aiosqlite", "flask", "gunicorn", "huey")
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    node_red = Path(tool("nodered/node_modules/node-red/package.json"))
    return {
        "astera-lite": told("git", "describe", "--always", "--dirty") or "?",
        "Python": platform.python_version(),
        "SQLite": sqlite3.sqlite_version,
        **json.loads(told(tool("python/bin/python"), "-c", code)),
        "node": told("node", "--version").lstrip("v"),
        "node-red": json.loads(node_red.read_text())["version"],
    }


def same_python() -> None:
    """Ours and the peers are to run on the same interpreter."""
    theirs = subprocess.check_output([tool("python/bin/python"), "-c", "import sys; print(sys.version)"], text=True)
    if theirs.strip() != sys.version:
        sys.exit(f"the peers have Python {theirs.strip()}, this is {sys.version}: PYTHON={sys.executable} setup.sh")


def listed(allowed: Mapping[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(allowed)}")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of a second each, fewer rows: two minutes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="for each figure (default: 4)")
    parser.add_argument("--rows", type=listed(ROWS), default=[], help=",".join(ROWS))
    parser.add_argument("--peers", type=listed(PEERS), default=list(PEERS), help=",".join(PEERS))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--render", action="store_true", help="measure nothing: table and plot from comparison.json")
    args = parser.parse_args()
    if args.render:
        document = json.loads((args.results / "comparison.json").read_text())
    else:
        same_python()
        if args.quick:
            args.rounds, args.seconds = 1, 1.0
        document = {
            "date": time.strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
            "seconds": args.seconds,
            "machine": machine(),
            "versions": versions(),
        }
        peers = [OURS, *(peer for peer in args.peers if peer != OURS)]
        rows = args.rows or list(QUICK_ROWS if args.quick else ROWS)
        document["rounds"] = run(rows, peers, args.rounds, args.seconds)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "comparison.json").write_text(json.dumps(document, indent=1) + "\n")
    (args.results / "comparison.md").write_text(markdown(document))
    (args.results / "comparison.svg").write_text(picture(document))
    print(table(target_rows(document["rounds"]), TARGET_HEAD))


if __name__ == "__main__":
    main()
