"""What the server tells systemd, at a real socket."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import process

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX") or os.name == "nt", reason="has no Unix sockets")


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.settimeout(15)
        yield sock


def said(sock: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in sock.recv(4096).decode().split("\n"))


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_it_tells_when_it_is_ready_reloads_and_stops(tmp_path: Path, kind: str) -> None:
    (tmp_path / "flows").mkdir()
    name = str(tmp_path / "notify") if kind == "path" else f"@astera-lite-{os.getpid()}"
    if kind == "abstract" and sys.platform != "linux":
        pytest.skip("abstract sockets are Linux's")
    with (
        manager(name.replace("@", "\0")) as sock,
        process(tmp_path, env={"NOTIFY_SOCKET": name}) as (started, url, _),
    ):
        assert said(sock) == {"READY": "1", "STATUS": f"listening on {url}"}
        before = time.monotonic_ns() // 1000
        started.send_signal(signal.SIGHUP)
        reloading = said(sock)
        assert before <= int(reloading.pop("MONOTONIC_USEC")) <= time.monotonic_ns() // 1000
        assert (reloading, said(sock)) == ({"RELOADING": "1"}, {"READY": "1"})
        started.terminate()
        assert said(sock) == {"STOPPING": "1"}
        assert started.wait(10) == 0
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.recv(1)  # no watchdog was asked for


def test_it_tells_the_watchdog_that_it_is_alive(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    name = str(tmp_path / "notify")
    env = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000"}
    with manager(name) as sock, process(tmp_path, env=env) as (started, _, _):
        assert said(sock)["READY"] == "1"
        times = [(said(sock), time.monotonic())[1] for _ in range(3)]
        assert times[-1] - times[0] < 2 * 3, "later than the watchdog waits"
        os.kill(started.pid, signal.SIGSTOP)  # a server that stands still says nothing
        sock.settimeout(2.5)
        with pytest.raises(TimeoutError):
            while said(sock) == {"WATCHDOG": "1"}:
                pass
        os.kill(started.pid, signal.SIGCONT)
        sock.settimeout(15)
        assert said(sock) == {"WATCHDOG": "1"}


@pytest.mark.parametrize("env", [{"NOTIFY_SOCKET": "/no/such/socket"}, {"NOTIFY_SOCKET": "nonsense"}])
def test_a_manager_that_is_not_there_hinders_nothing(tmp_path: Path, env: dict[str, str]) -> None:
    (tmp_path / "flows").mkdir()
    with process(tmp_path, env={**env, "WATCHDOG_USEC": "3000000"}) as (started, _, lines):
        started.terminate()
        assert started.wait(10) == 0
    assert not [line for line in lines if "error" in line]
