"""What a finished echo job costs on disk: bytes that stay, bytes written and syncs, at 1, 64 and 256 connections.

Its request body has 400 bytes, its result about 430. Written is what the process sent to the disk (/proc/PID/io), which
counts the log of the database and its checkpoints too; syncs are counted by a preloaded library that slows nothing.
"""

from common import SUBMIT, arguments, count_jobs, ours, table, temporary, written_bytes


def main() -> None:
    args = arguments(__doc__, seconds=3.0)
    rows = []
    for durability, pages in (("full", "4KiB"), ("normal", "4KiB"), ("full", "1KiB"), ("normal", "1KiB")):
        for connections in (1, 64, 256):
            settings = ("--durability", durability, "--page-size", pages)
            with temporary() as folder, ours(*settings, folder=folder, sync_ms=0) as server:
                database = folder / "astera_lite.db"
                empty, written, syncs = database.stat().st_size, written_bytes(server.pid), server.syncs()
                jobs = server.load("completed", SUBMIT, connections, args.seconds)["jobs"]
                written, syncs = written_bytes(server.pid) - written, server.syncs() - syncs
                server.stop()
                assert count_jobs(database) == jobs
                stays = database.stat().st_size - empty
            cells = (f"{stays / jobs:.0f}", f"{written / jobs:.0f}", f"{syncs / jobs:.3f}")
            rows.append((f"{durability}, {pages}, {connections} connection(s)", f"{jobs:,}", *cells))
    print(table(rows, ("durability, pages", "jobs", "bytes kept for each", "bytes written for each", "syncs for each")))


if __name__ == "__main__":
    main()
