"""Results of 10 MB: how many are fetched on 4 connections, with what memory, and what a status poll beside it waits.

Also the time from the submission of such a job to its result. Four connections poll every 100 ms each, in open loop.
"""

import json
import time

from common import HERE, arguments, finished_load, ours, rss_mb, table, temporary

FUNCTION = "def text(context, size):\n    return 'x' * size\n"


def flow(size: int) -> str:
    step = {"name": "made", "python": {"call": "bench_large:text", "args": {"size": size}}}
    request = {"method": "POST", "resource": "/large", "processing": ["asynchronous"]}
    return json.dumps({"request": request, "steps": [step], "response": {"body": "${made}"}})


def main() -> None:
    args = arguments(__doc__, megabytes=10.0, seconds=10.0)
    size = int(args.megabytes * 1e6)
    with temporary() as flows:
        (flows / "bench_large.py").write_text(FUNCTION)
        (flows / "large.json").write_text(flow(size))
        (flows / "echo.json").write_bytes((HERE / "flows" / "echo.json").read_bytes())
        with ours(flows=flows) as server:
            where = server.finished_job()
            idle, began = rss_mb(server.pid), time.monotonic()
            large = server.finished_job("/api/publishingAsync/large").replace("/status", "/result")
            took = (time.monotonic() - began) * 1000
            made = rss_mb(server.pid, "VmHWM")
            length = len(server.ask("GET", large)[2])
            assert length >= size, length
            fetching = server.start_load("get", large, 4, args.seconds)
            polls = server.load("poll", where, 4, args.seconds, 100)
            fetched = finished_load(fetching)
            peak, left = rss_mb(server.pid, "VmHWM"), rss_mb(server.pid)
    megabytes = f"{fetched['rate'] * length / 1e6:.0f} MB/s ({fetched['rate']:.1f} results/s)"
    rows = [
        (f"results of {args.megabytes:g} MB on 4 connections", "", "", megabytes),
        ("p99 of a status poll beside them", "", "", f"{polls['p99_us'] / 1000:.1f} ms"),
        ("one such job, from submission to result", "", "", f"{took:.0f} ms"),
        ("memory: idle, making one, fetching, then", "", "", f"{idle:.0f}, {made:.0f}, {peak:.0f}, {left:.0f} MB"),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
