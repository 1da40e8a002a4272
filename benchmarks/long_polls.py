"""256 long polls (Prefer: wait) open at once on one job: memory and threads that they take, and how soon all are woken.

A poll is late by the time from the job's `finishedAt` (whole milliseconds) to the arrival of its answer here.
"""

import json
import selectors
import socket
import statistics
import time
from datetime import datetime

from common import HERE, arguments, ours, proc_status, rss_mb, table, temporary

NAP = {
    "request": {"method": "POST", "resource": "/nap", "processing": ["asynchronous"]},
    "steps": [{"name": "nap", "wait": 3}],
    "response": {"body": {"rested": True}},
}


def main() -> None:
    args = arguments(__doc__, polls=256)
    with temporary() as flows:
        (flows / "nap.json").write_text(json.dumps(NAP))
        (flows / "echo.json").write_bytes((HERE / "flows" / "echo.json").read_bytes())
        with ours(flows=flows) as server:
            server.finished_job("/api/publishingAsync/nap")
            waking = selectors.DefaultSelector()
            memory, threads = rss_mb(server.pid), proc_status(server.pid, "Threads")
            where = server.ask("POST", "/api/publishingAsync/nap")[1]["Location"].partition(f":{server.port}")[2]
            request = f"GET {where} HTTP/1.1\r\nHost: 127.0.0.1\r\nPrefer: wait=30\r\n\r\n".encode()
            for _ in range(args.polls):
                sock = socket.create_connection(("127.0.0.1", server.port))
                sock.sendall(request)
                waking.register(sock, selectors.EVENT_READ)
            time.sleep(0.5)
            early = waking.select(0)
            assert not early, "they were to be open while the job runs"
            memory, threads = rss_mb(server.pid) - memory, proc_status(server.pid, "Threads") - threads
            arrived: list[float] = []
            answer = b""
            while waking.get_map():
                for key, _ in waking.select(60):
                    arrived.append(time.time())
                    assert isinstance(key.fileobj, socket.socket)
                    answer = key.fileobj.recv(65536)
                    assert answer.startswith(b"HTTP/1.1 200"), answer
                    waking.unregister(key.fileobj)
                    key.fileobj.close()
            document = json.loads(answer.partition(b"\r\n\r\n")[2])
    finished = datetime.fromisoformat(document["finishedAt"]).timestamp()
    late = sorted((moment - finished) * 1000 for moment in arrived)
    woken = f"{late[-1]:.0f} ms (first {late[0]:.0f}, median {statistics.median(late):.0f})"
    rows = [
        (f"{args.polls} long polls open at once", "", "", f"{memory:.2f} MB, {threads} threads"),
        ("all of them answered after the job's end", "", "", woken),
    ]
    print(table(rows))


if __name__ == "__main__":
    main()
