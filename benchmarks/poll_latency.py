"""Latency of a status poll while 64 clients submit and every sync of the disk takes 50 ms, as on an SD card.

Floor 20 ms, aim 2 ms (p99). Four connections poll every 10 ms each, in open loop: a poll is timed from when it was due.
"""

import sys

from common import SUBMIT, arguments, finished_load, ours, table


def main() -> None:
    args = arguments(__doc__, seconds=10.0, sync=50.0)
    with ours(sync_ms=args.sync) as server:
        where = server.finished_job()
        before = server.syncs()
        submitting = server.start_load("submit", SUBMIT, 64, args.seconds)
        polls = server.load("poll", where, 4, args.seconds, 10)
        accepts = finished_load(submitting)
        syncs = server.syncs() - before
    if not syncs:
        sys.exit("the slow disk is not in effect")
    print(f"{accepts['rate']:.0f} accepts/s, {syncs} slow syncs, {polls['requests']} polls, errors {polls['errors']}\n")
    reached = f"{polls['p99_us'] / 1000:.2f} ms (p50 {polls['p50_us'] / 1000:.2f}, max {polls['max_us'] / 1000:.0f})"
    print(table([("p99 of a status poll beside syncs of 50 ms", "20 ms", "2 ms", reached)]))


if __name__ == "__main__":
    main()
