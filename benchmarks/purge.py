"""Purge of a million expired rows while 64 clients submit, beside the same server when there is nothing to purge.

Floor: rows are purged as fast as jobs are accepted, and p99 of an accept is at most ×3 of quiet; aim ×1.5.
Afterwards the server is left alone until nothing is left to purge (at most --patience seconds).
"""

import sys
import time

from common import SUBMIT, arguments, count_jobs, database_of_jobs, ours, table, temporary

DAY = 86_400_000  # ms
EXPIRED = {
    "seq": f"seq - (({DAY} + n) << 12)",
    "created": f"created - {DAY} - n",
    "started": f"started - {DAY} - n",
    "finished": f"finished - {DAY} - n",
    "expires": f"expires - {DAY} - n",
}


def main() -> None:
    args = arguments(__doc__, rows=1_000_000, seconds=5.0, patience=120.0)
    with ours() as server:
        server.load("submit", SUBMIT, 64, 1)
        quiet = server.load("submit", SUBMIT, 64, args.seconds)
    with temporary() as folder:
        database = database_of_jobs(folder, args.rows, **EXPIRED)
        before = database.stat().st_size
        limit = time.time_ns() // 1_000_000 + DAY // 2  # what is accepted from now on expires later
        with ours(folder=folder) as server:
            first, began = count_jobs(database, f"expires < {limit}"), time.monotonic()
            busy = server.load("submit", SUBMIT, 64, args.seconds)
            left = count_jobs(database, f"expires < {limit}")
            if not left:
                sys.exit(f"{first:,} rows were purged in less than {args.seconds:g} s: choose more --rows")
            rate = (first - left) / (time.monotonic() - began)
            rest, began = left, time.monotonic()
            while left and time.monotonic() - began < args.patience:
                time.sleep(0.5)
                left = count_jobs(database, f"expires < {limit}")
            alone = (rest - left) / max(time.monotonic() - began, 0.001)
            server.stop()
        after = database.stat().st_size
    slower = busy["p99_us"] / quiet["p99_us"]
    print(
        f"quiet: {quiet['rate']:.0f} accepts/s, p99 {quiet['p99_us'] / 1000:.1f} ms;"
        f" purging: {busy['rate']:.0f} accepts/s, p99 {busy['p99_us'] / 1000:.1f} ms, errors {busy['errors']};"
        f" with nothing else to do {alone:.0f} rows/s; {left:,} rows left;"
        f" file {before / 1e6:.0f} → {after / 1e6:.0f} MB\n"
    )
    rows = [
        ("p99 of an accept while purging, to quiet", "×3", "×1.5", f"×{slower:.2f}"),
        ("rows purged for each job accepted", "1", "1", f"{rate / busy['rate']:.2f} ({rate:.0f}/s)"),
        ("accepts while purging, to quiet", "", "", f"×{busy['rate'] / quiet['rate']:.2f}"),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
