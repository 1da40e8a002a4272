"""Memory of the server process (RSS): idle, after many jobs, and its growth at a steady load.

Idle: floor 28 MB, aim 20 MB; the bare interpreter with `import http.server, sqlite3` is shown beside it. Idle is
measured as a script and as the installed command starts it (the module from its bytecode).
The growth is a least-squares slope over the second half of `--minutes` of cycles on 8 connections, on a server that
forgets results after a minute, so that as many jobs expire as come. With `--interval` each connection begins a
cycle every so many milliseconds, so that an hour leaves the machine to others.
"""

import statistics
import subprocess
import sys
import time

from common import (
    INSTALLED,
    SUBMIT,
    SYNC,
    arguments,
    finished_load,
    free_port,
    installed_command,
    ours,
    rss_mb,
    start,
    table,
    temporary,
)


def bare() -> float:
    code = "import http.server, sqlite3, sys; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        return rss_mb(process.pid)  # leaving the block closes its input, which ends it


def idle_as_installed() -> float:
    port = free_port()
    with temporary() as folder:
        server = start([installed_command(port)], folder, port, probe=SYNC, env=INSTALLED)
        try:
            time.sleep(2)
            return rss_mb(server.pid)
        finally:
            server.kill()


def main() -> None:
    args = arguments(__doc__, jobs=100_000, minutes=2.0, interval=0.0)
    rows: list[tuple[str, str, str, str]] = [("bare Python with its imports", "", "", f"{bare():.1f} MB")]
    with ours() as server:
        time.sleep(2)
        rows.append(("idle, `python astera_lite.py`", "28 MB", "20 MB", f"{rss_mb(server.pid):.1f} MB"))
        rows.append(("idle, installed command", "28 MB", "20 MB", f"{idle_as_installed():.1f} MB"))
        done = 0
        while done < args.jobs:
            done += server.load("completed", SUBMIT, 64, 2)["jobs"]
        time.sleep(2)
        peak = rss_mb(server.pid, "VmHWM")
        rows.append((f"after {done:,} jobs", "", "", f"{rss_mb(server.pid):.1f} MB (peak {peak:.1f})"))
    if args.minutes:
        with ours("--retention", "1m") as server:
            server.load("cycle", SUBMIT, 8, 2)
            cycling = server.start_load("cycle", SUBMIT, 8, args.minutes * 60, args.interval)
            times, sizes, began = [], [], time.monotonic()
            while cycling.poll() is None:
                times.append((time.monotonic() - began) / 3600)
                sizes.append(rss_mb(server.pid))
                time.sleep(1)
            jobs = finished_load(cycling)["jobs"]
        half = len(times) // 2
        slope = statistics.linear_regression(times[half:], sizes[half:]).slope
        sizes_then = f"{sizes[0]:.1f}, halfway {sizes[half]:.1f}, at the end {sizes[-1]:.1f} MB"
        rows.append(
            (f"growth over {args.minutes:g} minutes, {jobs:,} jobs", "", "", f"{slope:+.2f} MB/h ({sizes_then})")
        )
    print(table(rows))


if __name__ == "__main__":
    main()
