"""Memory and threads for 1,000 idle connections, each of which has had one request answered.

Floor 5 MB and no thread, aim 0.8 MB and no thread.
"""

import socket
import time

from common import arguments, ours, proc_status, rss_mb, table

REQUEST = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def main() -> None:
    args = arguments(__doc__, connections=1000)
    with ours("--max-connections", str(args.connections + 10)) as server:
        for _ in range(200):  # what a server sets aside for its first requests is not the connections'
            server.ask("GET", "/health")
        time.sleep(1)
        memory, threads = rss_mb(server.pid), proc_status(server.pid, "Threads")
        held = []
        for _ in range(args.connections):
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.sendall(REQUEST)
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
            held.append(sock)
        time.sleep(1)
        memory, threads = rss_mb(server.pid) - memory, proc_status(server.pid, "Threads") - threads
        for sock in held:
            sock.close()
    reached = f"{memory:.2f} MB, {threads} threads"
    print(table([(f"{args.connections:,} idle connections", "5 MB, none", "0.8 MB, none", reached)]))


if __name__ == "__main__":
    main()
