"""CPU time of the server for each job as the table grows from 1 thousand over 100 thousand to 1 million rows.

Floor ×1.2, aim ×1.05 of what it takes with 1 thousand. The rows are copies of a finished job, written by SQL before
the server starts; jobs are submitted and completed on 64 connections (that adds some thousand rows, which are deleted
before the next round). The sizes take turns, ratios are made within a round.
"""

import contextlib
import sqlite3
import statistics

from common import SUBMIT, arguments, cpu_seconds, database_of_jobs, ours, spread, table, temporary


def main() -> None:
    args = arguments(__doc__, most=1_000_000, seconds=2.0, rounds=5)
    sizes = sorted({1000, min(100_000, args.most), args.most})
    cost: dict[int, list[float]] = {size: [] for size in sizes}
    newest: dict[int, int] = {}
    with contextlib.ExitStack() as stack:
        folders = {size: stack.enter_context(temporary()) for size in sizes}
        for size, folder in folders.items():
            with contextlib.closing(sqlite3.connect(database_of_jobs(folder, size))) as db:
                newest[size] = db.execute("SELECT max(seq) FROM jobs").fetchone()[0]
        for _ in range(args.rounds):
            for size, folder in folders.items():
                with ours(folder=folder) as server:
                    server.load("completed", SUBMIT, 64, 0.5)
                    before = cpu_seconds(server.pid)
                    figures = server.load("completed", SUBMIT, 64, args.seconds)
                    cost[size].append((cpu_seconds(server.pid) - before) / figures["jobs"] * 1e6)
                    server.stop()
                with contextlib.closing(sqlite3.connect(folder / "astera_lite.db")) as db, db:
                    db.execute("DELETE FROM jobs WHERE seq > ?", (newest[size],))
        rows = []
        for size in sizes:
            ratio = spread([mine / least for mine, least in zip(cost[size], cost[sizes[0]], strict=True)])
            microseconds = statistics.median(cost[size])
            cells = ("×1.2", "×1.05", f"×{ratio}, {microseconds:.0f} µs")
            rows.append((f"CPU for each job, {size:,} rows", *cells))
    print(table(rows))


if __name__ == "__main__":
    main()
