"""Latency of a status poll beside 8 and 32 workers that are all busy in pure-Python `python` steps.

Floor 50 ms with 8, 200 ms with 32, 10 ms with "isolate": true; aim 10, 50 and 1 ms (p99).
Four connections poll every 200 ms each, in open loop: a poll is timed from when it was due. (Polls that come faster
than a starved server answers them would only queue up, and the figure would be the length of the trial.)
"""

import json
import time

from common import HERE, arguments, ours, table, temporary

ECHO = HERE / "flows" / "echo.json"
FUNCTION = '''
import time


def burn(context, seconds):
    """Count in pure Python, for so long."""
    end, n = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        for _ in range(1000):
            n += 1
    return n
'''
TARGETS = {8: ("50 ms", "10 ms"), 32: ("200 ms", "50 ms")}
ISOLATED = ("10 ms", "1 ms")


def flow(seconds: float, isolate: bool) -> str:
    step = {"name": "burnt", "python": {"call": "bench_burn:burn", "args": {"seconds": seconds}, "isolate": isolate}}
    request = {"method": "POST", "resource": "/burn", "processing": ["asynchronous"]}
    return json.dumps({"request": request, "steps": [step], "response": {"body": "${burnt}"}})


def main() -> None:
    args = arguments(__doc__, seconds=15.0)
    rows = []
    for isolate in (False, True):
        for workers in (8, 32):
            with temporary() as flows:
                (flows / "bench_burn.py").write_text(FUNCTION)
                (flows / "burn.json").write_text(flow(args.seconds + 2, isolate))
                (flows / "echo.json").write_bytes(ECHO.read_bytes())
                with ours("--workers", str(workers), flows=flows) as server:
                    where = server.finished_job()
                    for _ in range(workers):
                        assert server.ask("POST", "/api/publishingAsync/burn")[0] == 202
                    time.sleep(1)
                    polls = server.load("poll", where, 4, args.seconds, 200)
            label = f"p99 of a status poll beside {workers} busy workers{', isolated' if isolate else ''}"
            bounds = ISOLATED if isolate else TARGETS[workers]
            reached = f"{polls['p99_us'] / 1000:.1f} ms (p50 {polls['p50_us'] / 1000:.1f})"
            rows.append((label, *bounds, reached))
    print(table(rows))


if __name__ == "__main__":
    main()
