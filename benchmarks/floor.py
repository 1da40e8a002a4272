"""What there is below: a bare loop of sockets that answers without looking, and bare SQLite that commits.

The loop takes 64 connections of the same load as the comparison, and finds the end of a request by its last bytes.
SQLite inserts rows as large as those of a finished echo job, with the schema's indexes, so many in a synced commit.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import selectors
import socket
import sqlite3
import statistics
import time
from pathlib import Path

from common import BODY, ROOT, SYNC, Server, arguments, table, temporary

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


def bare_loop(listener: socket.socket) -> None:
    """Answer whatever comes, as soon as as many bytes have come as a request of the load has."""
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    while True:
        for key, _ in selector.select():
            if key.data is None:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(connection, selectors.EVENT_READ, connection)
                continue
            data = key.data.recv(65536)
            if not data:
                selector.unregister(key.data)
                key.data.close()
            elif data.endswith(b"}"):
                key.data.send(ANSWER)


def bare_sqlite(folder: Path, batch: int, seconds: float) -> float:
    """Rows a second, `batch` in each commit."""
    with contextlib.closing(sqlite3.connect(folder / f"bare-{batch}.db", isolation_level=None)) as db:
        db.executescript((ROOT / "schema.sql").read_text("utf-8"))
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        columns = (
            "seq, salt, flow, version, created, token, base, request, request_body, status, attempt, started, finished,"
            " expires, code, size, headers, result"
        )
        sql = f"INSERT INTO jobs ({columns}) VALUES ({', '.join('?' * 18)})"
        rows, began = 0, time.monotonic()
        while time.monotonic() < began + seconds:
            now = time.time_ns() // 1_000_000
            db.execute("BEGIN")
            for _ in range(batch):
                rows += 1
                seq = (now << 12) + rows
                head = (seq, 1, "echo", 1, now, "", "http://127.0.0.1:9261", "x" * 120, BODY, "Completed", 1, now, now)
                db.execute(sql, (*head, now, 200, 430, "x" * 40, BODY))
            db.execute("COMMIT")
        return rows / (time.monotonic() - began)


def main() -> None:
    args = arguments(__doc__, seconds=3.0)
    rows = []
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener, temporary() as folder:
        loop = multiprocessing.get_context("fork").Process(target=bare_loop, args=(listener,), daemon=True)
        loop.start()
        try:
            server = Server(listener.getsockname()[1], folder, [])
            rates = [server.load("sync", SYNC, 64, args.seconds)["rate"] for _ in range(3)]
        finally:
            loop.kill()
            loop.join()
        rows.append(("bare loop, 64 connections", f"{statistics.median(rates):,.0f}/s"))
        for batch in (1, 8, 64, 256):
            rows.append((f"bare SQLite, {batch} in a commit", f"{bare_sqlite(folder, batch, args.seconds):,.0f}/s"))
    print(table(rows, ("what is below", "reached")))


if __name__ == "__main__":
    main()
