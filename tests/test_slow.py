"""A thousand slow or idle connections at a server of its own process, and a client that wants its answers meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from support import get_flow, process, until

resource = pytest.importorskip("resource", reason="files may be opened without limit here")
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the server's memory is read from /proc")

LARGE = {
    "large": get_flow("/large", response={"headers": {"Content-Type": "text/plain"}, "body": "${'x' * 100000}"}),
}
HEAD = b"POST /api/nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
ASK = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Slow(NamedTuple):
    """What a slow client says at first, what it drips, whether it ends then, and how many bytes it reads at a time."""

    says: bytes
    drips: bytes = b""
    ends: bool = False
    reads: int = 65536
    leaves: bool = False


def kinds(large: str) -> dict[str, Slow]:
    """The six kinds; `large` is the path of a large answer."""
    wanted = f"GET {large} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    return {
        "slow head": Slow(b"GET /health HTTP/1.1\r\nX: ", drips=b"a"),
        "slow body": Slow(HEAD + b"\r\n", drips=b"a"),
        "slow reader": Slow(wanted * 30, reads=1),
        "half closed": Slow(wanted * 30, ends=True, reads=0),
        "idle": Slow(ASK),
        "connect and leave": Slow(b"", leaves=True),
    }


class Siege(NamedTuple):
    """What came of it. Times are seconds, sizes KiB."""

    asked: int
    answered: int
    p99: float
    cut_after: float  # from the last connection on, until the server held none of the slow ones any more
    memory: tuple[int, int]  # before, and at most
    threads: int  # at most
    held: int  # connections, at most


def status(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Asker(threading.Thread):
    """The client that all others are in the way of: ten requests a connection, until it is told to stop."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(daemon=True)
        self.host, self.port = host, port
        self.over = threading.Event()
        self.times: list[float] = []
        self.failed: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        for n in range(10**9):
            if self.over.wait(0.005):
                break
            began = time.monotonic()
            try:
                connection.request("GET", "/health")
                answer = connection.getresponse()
                answer.read()
                if answer.status != 200:
                    self.failed.append(str(answer.status))
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
            self.times.append(time.monotonic() - began)
            if n % 10 == 9:
                connection.close()
        connection.close()


def besiege(url: str, pid: int, large: str, count: int, patience: float) -> Siege:
    """Hold `count` slow connections of the six kinds until the server has cut them all, at most `patience` seconds."""
    host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)
    asker = Asker(host, port)
    asker.start()
    until(lambda: len(asker.times) > 20)
    memory = most = status(pid, "VmRSS")
    free = descriptors(pid)
    threads = held = 0
    manners = list(kinds(large).values())
    selector = selectors.DefaultSelector()
    for n in range(count):
        slow = manners[n % len(manners)]
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect((host, port))
        sock.sendall(slow.says)
        sock.setblocking(False)
        if slow.ends:
            sock.shutdown(socket.SHUT_WR)
        if slow.leaves and n % 12 > 6:
            sock.close()
        else:
            selector.register(sock, selectors.EVENT_READ, slow)
    began = time.monotonic()
    tick = threading.Event()
    while (now := time.monotonic()) < began + patience:
        for key in list(selector.get_map().values()):
            sock, slow = key.fileobj, key.data
            assert isinstance(sock, socket.socket)
            try:
                if slow.drips:
                    sock.send(slow.drips)
                if slow.reads and not sock.recv(slow.reads):
                    raise ConnectionResetError
            except BlockingIOError:
                pass
            except OSError:
                selector.unregister(sock)
                sock.close()
        open_now = descriptors(pid)
        most, threads = max(most, status(pid, "VmRSS")), max(threads, status(pid, "Threads"))
        held = max(held, open_now - free)
        if open_now <= free + 2:  # the asker's may come or go
            break
        tick.wait(0.2)
    cut_after = now - began
    asker.over.set()
    asker.join(10)
    for key in list(selector.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    selector.close()
    times = sorted(asker.times)
    answered = len(times) - len(asker.failed)
    return Siege(len(times), answered, times[int(len(times) * 0.99)], cut_after, (memory, most), threads, held)


@contextlib.contextmanager
def many_descriptors(wanted: int) -> Iterator[None]:
    """This process, and the one that it starts, may open so many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"at most {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def besieged(folder: Path, *arguments: str) -> Iterator[tuple[str, int, str]]:
    """A server process with a large result: its URL, process id, and the path of the result."""
    (folder / "flows").mkdir()
    (folder / "flows" / "large.json").write_text(json.dumps(LARGE["large"]))
    with many_descriptors(4000), process(folder, "--max-connections", "1100", *arguments) as (started, url, _):
        host = urlsplit(url).netloc
        connection = http.client.HTTPConnection(host, timeout=10)
        connection.request("GET", "/api/publishingAsync/large", headers={"Prefer": "wait=10"})
        answer = connection.getresponse()
        answer.read()
        path = urlsplit(answer.getheader("Content-Location") or "").path
        assert (answer.status, bool(path)) == (200, True)
        connection.close()
        yield url, started.pid, path


@needs_proc
def test_a_thousand_slow_connections_hold_up_nobody_and_are_cut(tmp_path: Path) -> None:
    timeout = 3.0
    with besieged(tmp_path, "--request-timeout", "3s", "--idle-timeout", "3s") as (url, pid, large):
        siege = besiege(url, pid, large, 1000, 3 * timeout)
        assert siege.held > 850  # it was tried at all
        assert siege.answered >= 0.99 * siege.asked
        assert siege.p99 < 1
        assert siege.cut_after < 2.5 * timeout
        assert siege.memory[1] - siege.memory[0] < 100 << 10
        assert siege.threads < 60
        a_crowd_gives_way(url, 1100)


def a_crowd_gives_way(url: str, most: int) -> None:
    """Over `most` idle connections every newcomer gets its answer."""
    host, port = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection((host, port), timeout=10))

        crowd = [connect() for _ in range(most)]
        crowd[-1].sendall(ASK)
        assert crowd[-1].recv(65536).startswith(b"HTTP/1.1 200 ")
        for _ in range(200):
            newcomer = connect()
            newcomer.sendall(ASK)
            assert newcomer.recv(65536).startswith(b"HTTP/1.1 200 ")
