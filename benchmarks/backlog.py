"""A backlog of 100,000 queued jobs, left by a killed server: restart to first answer, rate of draining it, memory.

The queued rows are copies of an echo job, made by SQL as if none of them had been started.
"""

import time

from common import arguments, count_jobs, database_of_jobs, ours, rss_mb, table, temporary

QUEUED = {
    "status": "'Running'",
    "attempt": "0",
    **dict.fromkeys(("started", "finished", "expires", "code", "size", "headers", "trace", "result"), "NULL"),
}


def main() -> None:
    args = arguments(__doc__, jobs=100_000, patience=300.0)
    with temporary() as folder:
        database = database_of_jobs(folder, args.jobs, **QUEUED)
        began = time.monotonic()
        with ours(folder=folder) as server:
            ready = time.monotonic() - began
            start, first = time.monotonic(), count_jobs(database, "status = 'Running'")
            idle = first
            while idle and time.monotonic() - began < args.patience:
                time.sleep(0.1)
                idle = count_jobs(database, "status = 'Running'")
            seconds = time.monotonic() - start
            peak, left = rss_mb(server.pid, "VmHWM"), rss_mb(server.pid)
            failed = count_jobs(database, "status = 'Error'")
    rows = [
        (f"restart to first answer with {args.jobs:,} jobs queued", "", "", f"{ready * 1000:.0f} ms"),
        ("drained", "", "", f"{(first - idle) / seconds:.0f}/s ({idle:,} left, {failed:,} failed)"),
        ("memory: peak, afterwards", "", "", f"{peak:.1f}, {left:.1f} MB"),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
