"""Room 15: the server on real sockets: connections, deadlines, limits, TLS, stopping."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from support import ECHO, Client, FakeClock, Running, get_flow, running, talk

import astera_lite
import astera_lite_admin
import astera_lite_documents
from astera_lite import AsteraLite, ConfigError, Flow, Handler, Server, StoreError

FLOWS = {
    "echo": ECHO,
    "hello": get_flow("/hello/{n}", response={"body": "${params.n}"}, request={"parameters": {"n": {"in": "path"}}}),
}


class Gate:
    """A flow, GET /gate, that runs until it is opened; `entered` is set once it runs."""

    def __init__(self, app: AsteraLite) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

        @app.flow("GET /gate")
        def gate(context: Any) -> str:
            self.entered.set()
            assert self.opened.wait(20)
            return "through"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all that leave it as they found it."""
    with running(tmp_path_factory.mktemp("loop"), FLOWS) as it:
        yield it


def request(
    method: str, path: str, *headers: str, body: bytes = b"", version: str = "1.1", close: bool = False
) -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def post_json(path: str, body: bytes, *headers: str, close: bool = False) -> bytes:
    return request("POST", path, "Content-Type: application/json", *headers, body=body, close=close)


class Answered:
    """An answer read from raw bytes."""

    def __init__(self, head: bytes, body: bytes) -> None:
        line, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(line.split(" ")[1])
        self.headers = {name.lower(): value for name, _, value in (item.partition(": ") for item in lines)}
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def answers(data: bytes, head_only: bool = False) -> list[Answered]:
    """Every answer in the bytes; nothing may be left over."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        assert end, data
        answered = Answered(head, b"")
        size = 0 if head_only else int(answered.headers.get("content-length", "0"))
        assert len(rest) >= size
        answered.body, data = rest[:size], rest[size:]
        found.append(answered)
    return found


@contextmanager
def connected(server: Server, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    host, port = server.server_address[:2]
    with socket.socket() as sock:
        if receive_buffer is not None:  # before connecting, for the window to be as small
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(10)
        sock.connect((str(host), int(port)))
        yield sock


def receive(sock: socket.socket, until: bytes) -> bytes:
    data = b""
    while until not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


def one_answer(sock: socket.socket) -> Answered:
    head, _, body = receive(sock, b"\r\n\r\n").partition(b"\r\n\r\n")
    answered = Answered(head, body)
    while len(answered.body) < int(answered.headers["content-length"]):
        piece = sock.recv(65536)
        assert piece
        answered.body += piece
    return answered


def read_to_end(sock: socket.socket) -> bytes:
    data = bytearray()
    try:
        while piece := sock.recv(1 << 20):
            data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def sync(path: str) -> str:
    return "/api/publishing" + path


# --- connections ---


def test_a_connection_is_kept_for_many_requests(server: Running) -> None:
    with connected(server.server) as sock:
        for n in range(5):
            sock.sendall(request("GET", sync(f"/hello/{n}")))
            answered = one_answer(sock)
            assert (answered.status, answered.json) == (200, str(n))
            assert "connection" not in answered.headers


@pytest.mark.parametrize(
    ("version", "headers", "connection"),
    [
        ("1.1", ["Connection: close"], "close"),
        ("1.1", ["Connection: keep-alive, Close"], "close"),
        ("1.0", [], "close"),
        ("1.0", ["Connection: close"], "close"),
    ],
)
def test_the_connection_is_closed_where_the_client_wants_it(
    server: Running, version: str, headers: list[str], connection: str
) -> None:
    asked = request("GET", sync("/hello/1"), *headers, version=version)
    (answered,) = answers(talk(server.server, asked + asked))
    assert (answered.status, answered.headers["connection"]) == (200, connection)


def test_http_1_0_keeps_the_connection_if_asked_to(server: Running) -> None:
    kept = request("GET", sync("/hello/1"), "Connection: keep-alive", version="1.0")
    found = answers(talk(server.server, kept, request("GET", sync("/hello/2"), version="1.0")))
    assert [(item.json, item.headers["connection"]) for item in found] == [("1", "keep-alive"), ("2", "close")]


def test_http_1_0_needs_no_host(server: Running) -> None:
    (answered,) = answers(talk(server.server, b"GET /health HTTP/1.0\r\n\r\n"))
    assert answered.status == 200


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    paths = [sync("/hello/1"), "/nothing", "/health", sync("/hello/2"), "/api/jobs", sync("/nothing"), sync("/hello/3")]
    wire = b"".join(request("GET", path, close=path == paths[-1]) for path in paths)
    found = answers(talk(server.server, wire))
    assert [item.status for item in found] == [200, 404, 200, 200, 200, 404, 200]
    assert [found[n].json for n in (0, 3, 6)] == ["1", "2", "3"]
    assert len({item.headers["x-request-id"] for item in found}) == len(paths)


def test_a_slow_request_is_not_overtaken_by_the_next(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        gate = Gate(it.app)
        with connected(it.server) as sock:
            sock.sendall(request("GET", sync("/gate")) + request("GET", "/nothing", close=True))
            assert gate.entered.wait(5)
            assert it.client.get("/health").status_code == 200  # others are served meanwhile
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
            sock.settimeout(10)
            gate.opened.set()
            assert [item.status for item in answers(read_to_end(sock))] == [200, 404]


@pytest.mark.parametrize("path", ["/nothing", sync("/hello/7")])
def test_two_thousand_pipelined_requests_are_all_answered(server: Running, path: str) -> None:
    wire = request("GET", path) * 1999 + request("GET", path, close=True)
    with connected(server.server) as sock:
        sender = threading.Thread(target=sock.sendall, args=(wire,))
        sender.start()
        found = answers(read_to_end(sock))
        sender.join(5)
    assert len(found) == 2000
    assert len({(item.status, item.body) for item in found}) == 1


def test_many_connections_are_served_at_once(server: Running) -> None:
    def ask(n: int) -> Any:
        return answers(talk(server.server, request("GET", sync(f"/hello/{n}"), close=True)))[0].json

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(200))) == [str(n) for n in range(200)]


def test_a_request_may_come_byte_by_byte(server: Running) -> None:
    wire = post_json(sync("/echo?a=1"), b'{"x": 1}', close=True)
    (answered,) = answers(talk(server.server, *(wire[at : at + 1] for at in range(len(wire)))))
    assert answered.json == {"params": {"a": 1, "b": None}, "body": {"x": 1}}


def test_a_half_closed_client_still_gets_its_answer(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        gate = Gate(it.app)
        with connected(it.server) as sock:
            sock.sendall(request("GET", sync("/gate")))
            sock.shutdown(socket.SHUT_WR)
            assert gate.entered.wait(5)
            it.client.get("/health")  # by now the loop has seen the end
            gate.opened.set()
            (answered,) = answers(read_to_end(sock))
            assert answered.json == "through"


def test_a_client_that_hangs_up_within_a_long_poll_holds_no_place(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        gate = Gate(it.app)
        poll = urlsplit(it.client.get("/api/publishingAsync/gate").json()["statusUrl"]).path
        assert gate.entered.wait(5)
        held = len(it.server.handlers)
        waits = "Prefer: wait=60"
        for path in (
            poll,
            poll.replace("/status", "/result"),
            "/api/publishingAsync/hello/1",
            "/api/publishingAsync/gate",
        ):
            with connected(it.server) as sock:
                sock.sendall(request("GET", path, waits) * 2)
        eventually(lambda: len(it.server.handlers) == held)
        with connected(it.server) as half:  # who still reads is told how it stands
            half.sendall(request("GET", poll, waits) * 2)
            half.shutdown(socket.SHUT_WR)
            assert [each.json["status"] for each in answers(read_to_end(half))] == ["Running", "Running"]
        gate.opened.set()


def test_a_half_closed_client_gets_every_answer_it_asked_for(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        gate = Gate(it.app)
        with connected(it.server) as sock:
            sock.sendall(request("GET", sync("/gate")) + request("GET", sync("/hello/1")) + request("GET", "/nothing"))
            sock.shutdown(socket.SHUT_WR)
            assert gate.entered.wait(5)
            it.client.get("/health")
            gate.opened.set()
            assert [item.status for item in answers(read_to_end(sock))] == [200, 200, 404]


@pytest.mark.parametrize(
    "wire", [b"", b"GET / HT", request("GET", "/health")[:-2], post_json(sync("/echo"), b"{}")[:-1]]
)
def test_a_client_that_ends_within_a_request_is_let_go_without_an_answer(server: Running, wire: bytes) -> None:
    assert talk(server.server, wire, end=True) == b""


def test_a_complete_request_is_answered_though_another_breaks_off(server: Running) -> None:
    (answered,) = answers(talk(server.server, request("GET", sync("/hello/1")) + b"GET / HT", end=True))
    assert answered.json == "1"


def test_a_client_that_vanishes_harms_nobody(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        gate = Gate(it.app)
        with connected(it.server) as sock:
            sock.sendall(request("GET", sync("/gate")))
            assert gate.entered.wait(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close resets
        eventually(lambda: not it.server.handlers)
        gate.opened.set()
        assert it.client.get(sync("/hello/1")).json() == "1"


# --- bodies ---


@pytest.mark.parametrize(
    "chunks", [[b'{"x": 1}'], [b'{"x', b'": ', b"1}"], [bytes([byte]) for byte in b'{"x": 1}']], ids=len
)
def test_a_chunked_body_is_put_together(server: Running, chunks: list[bytes]) -> None:
    def produce() -> Iterator[bytes]:
        yield from chunks

    answer = server.client.post(sync("/echo"), data=produce(), headers={"Content-Type": "application/json"})
    assert answer.json()["body"] == {"x": 1}


def test_extensions_and_trailers_of_a_chunked_body_are_ignored(server: Running) -> None:
    head = request("POST", sync("/echo"), "Content-Type: application/json", "Transfer-Encoding: chunked")
    wire = head + b'2;a="b"\r\n[1\r\n1\r\n]\r\n0\r\nX-Digest: y\r\n\r\n' + request("GET", "/nothing", close=True)
    first, second = answers(talk(server.server, wire))
    assert first.json["body"] == [1]
    assert second.status == 404


def test_the_body_of_a_refused_request_is_not_taken_for_the_next(server: Running) -> None:
    smuggled = request("GET", sync("/hello/1"))
    wire = request("POST", "/nothing", body=smuggled) + request("GET", sync("/hello/2"), close=True)
    assert [item.status for item in answers(talk(server.server, wire))] == [404, 200]


def test_a_head_request_is_answered_without_body(server: Running) -> None:
    for path in (sync("/hello/1"), "/nothing", "/health"):
        wire = request("HEAD", path) + request("HEAD", path, close=True)
        first, second = answers(talk(server.server, wire), head_only=True)
        assert first.status == second.status == (404 if path == "/nothing" else 200)
        assert int(first.headers["content-length"]) > 0


def test_an_answer_without_body_is_followed_by_the_next(tmp_path: Path) -> None:
    flows = {"none": get_flow("/none", response={"status": 204}), **FLOWS}
    with running(tmp_path, flows) as it:
        wire = request("GET", sync("/none")) + request("GET", sync("/hello/1"), close=True)
        first, second = answers(talk(it.server, wire))
    assert (first.status, "content-length" in first.headers, second.json) == (204, False, "1")


# --- Expect: 100-continue ---


def test_the_body_is_asked_for_once_the_head_has_passed(server: Running) -> None:
    wire = post_json(sync("/echo"), b"[1]", "Expect: 100-continue")
    with connected(server.server) as sock:
        for _ in range(2):
            sock.sendall(wire[:-3])
            assert receive(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            sock.sendall(wire[-3:])
            answered = one_answer(sock)
            assert answered.json["body"] == [1]


def test_a_chunked_body_is_asked_for_too(server: Running) -> None:
    head = ["Content-Type: application/json", "Transfer-Encoding: chunked", "Expect: 100-continue"]
    with connected(server.server) as sock:
        sock.sendall(request("POST", sync("/echo"), *head))
        assert receive(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"3\r\n[1]\r\n0\r\n\r\n")
        answered = one_answer(sock)
        assert answered.json["body"] == [1]


def test_a_body_that_is_there_already_is_not_asked_for(server: Running) -> None:
    (answered,) = answers(talk(server.server, post_json(sync("/echo"), b"[1]", "Expect: 100-continue", close=True)))
    assert answered.status == 200


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [("/nothing", 5, 404), (sync("/nothing"), 5, 404), (sync("/hello/1"), 5, 405), (sync("/echo"), 11 << 20, 413)],
)
def test_a_body_that_would_be_refused_is_not_asked_for(server: Running, path: str, length: int, status: int) -> None:
    head = request("POST", path, f"Content-Length: {length}", "Expect: 100-continue")
    (answered,) = answers(talk(server.server, head))
    assert (answered.status, answered.headers["connection"]) == (status, "close")


def test_a_body_without_the_token_is_not_asked_for(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, token="secret") as it:
        (answered,) = answers(talk(it.server, post_json(sync("/echo"), b"[1]", "Expect: 100-continue")[:-3]))
    assert (answered.status, answered.headers["connection"]) == (401, "close")


def test_an_unknown_expectation_is_refused(server: Running) -> None:
    (answered,) = answers(talk(server.server, request("POST", sync("/echo"), "Expect: a-miracle")))
    assert answered.status == 417


def test_an_expectation_of_http_1_0_is_not_answered(server: Running) -> None:
    head = request(
        "POST", sync("/echo"), "Content-Type: application/json", "Content-Length: 3", "Expect: 100-continue",
        version="1.0",
    )  # fmt: skip
    with connected(server.server) as sock:
        sock.sendall(head)
        server.client.get("/health")  # the loop has had its turn
        sock.sendall(b"[1]")
        (answered,) = answers(read_to_end(sock))
        assert answered.status == 200


# --- refusals and limits ---


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (request("GET", "/health", "Host: localhost"), 400),
        (request("GET", "/health").replace(b"\r\n", b"\n"), 400),
        (request("GET", "/health", "X : y"), 400),
        (request("GET", "/health", "X: y", " z"), 400),
        (request("POST", sync("/echo"), "Content-Length: 1", "Content-Length: 1") + b"1", 400),
        (request("POST", sync("/echo"), "Content-Length: 1", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
        (request("POST", sync("/echo"), "Transfer-Encoding: chunked") + b"x\r\n\r\n", 400),
        (request("BREW", "/health"), 501),
        (request("GET", "/health", version="2.0"), 505),
    ],
)
def test_bytes_behind_a_refused_request_are_never_answered(server: Running, wire: bytes, status: int) -> None:
    (answered,) = answers(talk(server.server, wire + request("GET", sync("/hello/1")) * 3))
    assert (answered.status, answered.headers["connection"]) == (status, "close")
    assert answered.headers["content-type"] == "application/problem+json"
    document = answered.json
    assert document["status"] == status
    assert document["title"]


def test_what_came_before_a_refused_request_is_answered(server: Running) -> None:
    found = answers(talk(server.server, request("GET", sync("/hello/1")) * 2 + b"nonsense\r\n\r\n"))
    assert [item.status for item in found] == [200, 200, 400]


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (request("GET", "/" + "a" * 255), 404),
        (request("GET", "/" + "a" * 256), 414),
        (request("GET", "/" + "a" * 9000), 414),
        (request("GET", "/health", "X: " + "a" * 900), 200),
        (request("GET", "/health", "X: " + "a" * 1024), 431),
        (request("GET", "/health", *["X: a"] * 5000), 431),
        (post_json(sync("/echo"), b"[" + b" " * 98 + b"]"), 200),
        (post_json(sync("/echo"), b"[" + b" " * 99 + b"]"), 413),
        (request("POST", sync("/echo"), "Transfer-Encoding: chunked") + b"65\r\n", 413),
        (request("POST", sync("/echo"), "Transfer-Encoding: chunked") + b"a\r\n0123456789\r\n" * 11, 413),
    ],
)
def test_limits_of_url_header_and_body(limited: Running, wire: bytes, status: int) -> None:
    refused = status in (413, 414, 431)
    found = answers(talk(limited.server, wire + request("GET", "/health", close=True)))
    assert [item.status for item in found] == ([status] if refused else [status, 200])
    assert found[-1].headers["connection"] == "close"


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (request("HEAD", "/" + "a" * 256), 414),
        (b"HEAD /" + b"a" * 9000, 414),
        (b"\r\n" + request("HEAD", "/health", "X: " + "a" * 1024), 431),
        (b"HEAD /health HTTP/1.1\r\nX: " + b"a" * 9000, 431),
        (request("HEAD", "/health", "Content-Length: 101"), 413),
        (request("HEAD", "/health", "Expect: more"), 417),
        (request("HEAD", "/health", "Host: localhost"), 400),
        (request("HEAD", "/health", version="2.0"), 505),
    ],
)
def test_a_head_request_that_is_refused_early_is_answered_without_body(
    limited: Running, wire: bytes, status: int
) -> None:
    _, refused = answers(talk(limited.server, request("HEAD", "/health") + wire), head_only=True)
    assert (refused.status, refused.headers["connection"]) == (status, "close")
    assert int(refused.headers["content-length"]) > 0


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("limited"), FLOWS, max_url=256, max_header=1024, max_body=100) as it:
        yield it


def test_a_client_that_sends_too_much_can_read_why(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, max_body=1000) as it:
        # without lingering the unread megabytes would reset the connection under the answer
        answer = it.client.post(sync("/echo"), data=b" " * (4 << 20), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


@contextmanager
def working(it: Running) -> Iterator[tuple[socket.socket, threading.Event]]:
    """A connection whose request runs until the event is set."""
    gate = Gate(it.app)
    with connected(it.server) as sock:
        sock.sendall(request("GET", sync("/gate"), close=True))
        assert gate.entered.wait(5)
        try:
            yield sock, gate.opened
        finally:
            gate.opened.set()


def aged(server: Server, sock: socket.socket) -> Handler:
    """The server's side of a connection, which from now on is there for longer than all that are not aged."""
    (found,) = (each for each in server.handlers if each.client_address == sock.getsockname())
    eventually(lambda: found.state != "sending")  # when its answer is sent, its time begins anew
    found.since -= 10
    return found


def answers_a_newcomer(server: Server) -> bool:
    return answers(talk(server, request("GET", "/health", close=True)))[0].status == 200


def test_where_all_are_at_work_one_connection_too_many_is_turned_away(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, max_connections=1) as it, working(it) as (first, opened):
        (answered,) = answers(talk(it.server))
        assert (answered.status, answered.headers["connection"]) == (503, "close")
        assert int(answered.headers["retry-after"]) >= 1
        assert answered.json["status"] == 503
        opened.set()  # who is in stays in
        assert answers(read_to_end(first))[0].json == "through"
        first.close()
        eventually(lambda: not it.server.handlers)
        assert answers_a_newcomer(it.server)


@pytest.mark.parametrize(
    "wire",
    [b"", request("GET", "/nothing"), b"GET /health HTTP/1.1\r\nX: ", post_json(sync("/echo"), b"12")[:-1]],
    ids=["never asked", "idle", "half a head", "half a body"],
)
def test_who_keeps_the_server_waiting_longest_gives_way_to_a_newcomer(tmp_path: Path, wire: bytes) -> None:
    with (
        running(tmp_path, FLOWS, max_connections=3) as it,
        working(it) as (worker, opened),
        connected(it.server) as other,
        connected(it.server) as longest,
    ):
        longest.sendall(wire)
        if wire == request("GET", "/nothing"):
            one_answer(longest)
        for sock in (worker, other, longest):
            other.sendall(request("GET", "/nothing"))  # so that the server has read what the others sent
            one_answer(other)
            aged(it.server, sock)
        aged(it.server, longest)
        assert answers_a_newcomer(it.server)
        assert longest.recv(1) == b""
        other.sendall(request("GET", "/nothing"))
        assert one_answer(other).status == 404
        opened.set()
        assert answers(read_to_end(worker))[0].json == "through"


def test_many_idle_connections_lock_nobody_out(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, max_connections=100) as it, ExitStack() as stack:
        for _ in range(300):
            idle = stack.enter_context(connected(it.server))
        idle.sendall(request("GET", "/nothing"))
        eventually(lambda: answers_a_newcomer(it.server))
        assert len(it.server.handlers) <= 100


def test_a_client_that_has_gone_while_its_flow_runs_gives_way(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, max_connections=1) as it, working(it) as (gone, _):
        handler = aged(it.server, gone)
        gone.shutdown(socket.SHUT_WR)
        eventually(lambda: handler.at_end)
        assert answers_a_newcomer(it.server)


def test_who_has_sent_a_request_does_not_give_way(tmp_path: Path) -> None:
    """Its bytes may be there before the newcomer, but not read yet."""
    with running(tmp_path, FLOWS, max_connections=1) as it, connected(it.server) as first:
        first.sendall(request("GET", "/nothing"))
        one_answer(first)
        aged(it.server, first)
        with held_up(it.server):
            newcomer = stack_free(it.server)
            first.sendall(request("GET", "/nothing"))
        assert one_answer(first).status == 404
        with newcomer:
            assert one_answer(newcomer).status == 503


def test_who_came_together_do_not_push_each_other_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(astera_lite, "_GRACE_S", 0)  # the loop may be slow: none of them has had a chance yet
    with running(tmp_path, FLOWS, max_connections=2) as it, ExitStack() as stack:
        with held_up(it.server):
            crowd = [stack.enter_context(stack_free(it.server)) for _ in range(3)]
            for sock in crowd:
                sock.sendall(request("GET", "/nothing"))
        assert sorted(one_answer(sock).status for sock in crowd) == [404, 404, 503]


def hold(server: Server) -> tuple[threading.Event, threading.Event]:
    """Hold the loop up from its next turn on: set once it is, and to be set to let it go on."""
    entered, go_on = threading.Event(), threading.Event()

    def held() -> None:
        entered.set()
        go_on.wait(10)

    server.post(held)
    return entered, go_on


@contextmanager
def held_up(server: Server) -> Iterator[None]:
    """The loop does nothing meanwhile; what was sent to it then is there all at once."""
    entered, go_on = hold(server)
    assert entered.wait(5)
    try:
        yield
    finally:
        go_on.set()


def test_of_clients_that_wait_the_one_that_was_answered_longest_ago_comes_first(tmp_path: Path) -> None:
    """A selector may tell first of those that it told of last, whenever they have sent."""
    with running(tmp_path, FLOWS) as it, connected(it.server) as idle, connected(it.server) as busy:
        for sock in (idle, busy):
            sock.sendall(request("GET", "/nothing"))
            one_answer(sock)
        with held_up(it.server):
            busy.sendall(request("GET", "/nothing"))
            again, go_on = hold(it.server)
        assert again.wait(5)
        one_answer(busy)
        for sock in (idle, busy):
            sock.sendall(request("GET", "/nothing"))
        go_on.set()
        first, second = (one_answer(sock).headers["x-request-id"] for sock in (idle, busy))
        assert first < second, "the ids are counted in the order of the requests"


def test_who_is_turned_away_can_read_why_although_he_has_sent_much(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, max_connections=1) as it, working(it):
        with held_up(it.server):
            newcomers = [stack_free(it.server) for _ in range(20)]
            for sock in newcomers:
                sock.sendall(post_json(sync("/echo"), b" " * 60000))
        for sock in newcomers:
            with sock:
                data = b""
                while piece := sock.recv(65536):  # closing without reading what came would reset it
                    data += piece
                (answered,) = answers(data)
                assert (answered.status, answered.headers["retry-after"]) == (503, "5")
        eventually(lambda: len(it.server.handlers) == 1)
        eventually(lambda: not it.server.leaving)


def stack_free(server: Server) -> socket.socket:
    """A connection that the caller closes."""
    host, port = server.server_address[:2]
    return socket.create_connection((str(host), int(port)), timeout=10)


def test_beyond_those_who_may_read_why_newcomers_are_still_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_MAX_LEAVING", 0)
    with running(tmp_path, FLOWS, max_connections=1) as it, working(it):
        assert answers(talk(it.server))[0].status == 503


def test_who_is_turned_away_takes_no_place(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, max_connections=1) as it:
        with working(it) as (first, opened):
            newcomer = stack_free(it.server)
            one_answer(newcomer)
            opened.set()
            read_to_end(first)
        eventually(lambda: not it.server.handlers)  # although the newcomer does not close
        with newcomer:
            assert answers_a_newcomer(it.server)


# --- what takes long ---


@contextmanager
def held_in(owner: Any, name: str, patch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Whoever calls a function waits in it until the end of the block; the event is set once somebody does."""
    entered, go_on = threading.Event(), threading.Event()
    function = getattr(owner, name)

    def held(*arguments: Any, **more: Any) -> Any:
        entered.set()
        assert go_on.wait(20)
        return function(*arguments, **more)

    with patch.context() as context:
        context.setattr(owner, name, held)
        try:
            yield entered
        finally:
            go_on.set()


SLOW: dict[str, tuple[Any, str, bytes]] = {
    "OpenAPI": (astera_lite_documents, "openapi_document", request("GET", "/openapi.json", close=True)),
    "Postman": (astera_lite_documents, "postman_document", request("GET", "/postman.json", close=True)),
    "jobs": (astera_lite.SqliteStore, "page", request("GET", "/api/jobs", close=True)),
    "deployments": (astera_lite_admin, "deployment_document", request("GET", "/api/deployments", close=True)),
    "a job": (astera_lite_admin, "_request_document", request("GET", "/api/jobs/{id}", close=True)),
    "rerun": (astera_lite.SqliteStore, "request", request("POST", "/api/jobs/{id}/rerun", close=True)),
    "a large body": (Flow, "bind", post_json(sync("/echo"), b'"' + b"x" * 100_000 + b'"', close=True)),
    "and a job": (Flow, "bind", post_json("/api/publishingAsync/echo", b'"' + b"x" * 100_000 + b'"', close=True)),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_takes_long_keeps_nobody_else_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, function, wire = SLOW[name]
    with running(tmp_path, FLOWS) as it, ThreadPoolExecutor(1) as pool:
        job = it.client.finished(it.client.get("/api/publishingAsync/hello/1"))["id"]
        with held_in(owner, function, monkeypatch) as entered:
            answered = pool.submit(talk, it.server, wire.replace(b"{id}", job.encode()))
            assert entered.wait(10)
            assert it.client.get("/health").status_code == 200
            assert not answered.done()
        assert answers(answered.result(20))[0].status in (200, 202)


def test_an_error_of_what_takes_long_is_answered(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        assert answers(talk(it.server, request("GET", "/api/jobs?limit=x", close=True)))[0].status == 400
        assert answers(talk(it.server, post_json(sync("/echo"), b"[" * 100_000, close=True)))[0].status == 400


# --- fairness and memory ---


def test_a_client_that_does_not_wait_for_answers_lets_others_have_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, FLOWS) as it, connected(it.server) as greedy, connected(it.server) as modest:
        for sock in (greedy, modest):
            sock.sendall(request("GET", "/nothing"))
            one_answer(sock)
        order: list[str] = []
        original = Handler.answer

        def recording(handler: Handler, x: Any, reply: Any) -> None:
            order.append(x.head.path)
            original(handler, x, reply)

        monkeypatch.setattr(Handler, "answer", recording)
        with held_up(it.server):
            greedy.sendall(request("GET", "/greedy") * 199 + request("GET", "/greedy", close=True))
            modest.sendall(request("GET", "/modest", close=True))
        assert answers(read_to_end(modest))[0].status == 404
        assert len(answers(read_to_end(greedy))) == 200
    assert order.index("/modest") < 5


def test_requests_of_a_client_that_does_not_wait_for_answers_are_not_read_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire = request("GET", "/nothing?" + "x" * 200) * 4000 + request("GET", "/nothing", close=True)
    held: list[int] = []
    with running(tmp_path, FLOWS) as it, connected(it.server) as sock, ThreadPoolExecutor() as pool:
        look = lambda: held.extend(handler.parser.buffered for handler in it.server.handlers)  # noqa: E731
        monkeypatch.setattr(it.server, "service_actions", look)
        pool.submit(sock.sendall, wire)
        assert len(answers(read_to_end(sock))) == 4001
    assert max(held) < 400 << 10 < len(wire)


def test_a_half_closed_client_that_did_not_wait_gets_every_answer(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        assert len(answers(talk(it.server, request("GET", "/nothing") * 100, end=True))) == 100


def test_the_body_of_a_request_in_flight_counts_as_held(tmp_path: Path) -> None:
    with running(tmp_path) as it:
        entered, opened = threading.Event(), threading.Event()

        @it.app.flow("POST /gate")
        def gate(context: Any) -> str:
            entered.set()
            assert opened.wait(10)
            return "through"

        with connected(it.server) as sock:
            sock.sendall(post_json(sync("/gate"), json.dumps("x" * 100_000).encode(), close=True))
            assert entered.wait(5)
            assert it.server.buffered > 100_000
            opened.set()
            assert answers(read_to_end(sock))[0].status == 200
        eventually(lambda: not it.server.handlers)
        assert it.server.buffered == 0


def test_large_answers_that_nobody_takes_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_MAX_BUFFERED", 6 << 20)
    size = 1_000_000
    with running(tmp_path, FLOWS) as it:

        @it.app.flow("GET /big", response={"headers": {"Content-Type": "text/plain"}, "body": "${result}"})
        def big(context: Any) -> str:
            return "x" * (size * 4)

        with connected(it.server, 4096) as lazy:
            lazy.sendall(request("GET", sync("/big")))
            receive(lazy, b"\r\n\r\n")
            eventually(lambda: it.server.buffered > 2 * size)
            answer = it.client.get(sync("/big"))
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
            assert it.client.get(sync("/hello/1")).status_code == 200  # small ones are not concerned
        eventually(lambda: it.server.buffered < size)
        assert len(it.client.get(sync("/big")).content) == 4 * size


# --- deadlines ---


@pytest.mark.parametrize(
    "wire",
    [b"GET /hea", request("GET", "/health")[:-2], post_json(sync("/echo"), b"[1]")[:-1]],
    ids=["line", "head", "body"],
)
def test_a_request_that_takes_too_long_is_408(tmp_path: Path, wire: bytes) -> None:
    with running(tmp_path, FLOWS, request_timeout=0.1, idle_timeout=30) as it:
        found = answers(talk(it.server, request("GET", sync("/hello/1")) + wire))
    assert [item.status for item in found] == [200, 408]
    assert found[1].headers["connection"] == "close"
    assert found[1].json["status"] == 408


def test_dripping_bytes_does_not_prolong_a_request(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, request_timeout=0.3, idle_timeout=30) as it, connected(it.server) as sock:
        began, data = time.monotonic(), b""
        sock.settimeout(0.02)
        sock.sendall(b"GET / HTTP/1.1\r\nX: ")
        while not data and time.monotonic() < began + 5:
            sock.sendall(b"a")
            try:
                data = sock.recv(65536)
            except TimeoutError:
                pass
        assert data.startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_is_closed_without_a_word(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, idle_timeout=0.1, request_timeout=30) as it, connected(it.server) as silent:
        (answered,) = answers(talk(it.server, request("GET", sync("/hello/1"))))
        assert answered.status == 200
        assert read_to_end(silent) == b""


def test_a_request_in_flight_is_not_cut_by_the_deadlines(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, idle_timeout=0.1, request_timeout=0.1) as it:
        gate = Gate(it.app)
        with connected(it.server) as sock, connected(it.server) as idle:
            sock.sendall(request("GET", sync("/gate"), close=True))
            assert gate.entered.wait(5)
            assert read_to_end(idle) == b""  # closed by a sweep that has seen the other too
            gate.opened.set()
            assert answers(read_to_end(sock))[0].status == 200


def test_a_client_that_takes_nothing_of_its_answers_is_cut(tmp_path: Path) -> None:
    flows = {"page": get_flow("/page", response={"body": "${'x' * 60000}"})}
    with running(tmp_path, flows, request_timeout=0.2, idle_timeout=30) as it, connected(it.server, 4096) as sock:
        sock.sendall(request("GET", sync("/page")) * 200)
        eventually(lambda: bool(it.server.handlers))
        eventually(lambda: not it.server.handlers)
        assert len(read_to_end(sock)) < 200 * 60000


def test_asking_for_the_body_does_not_prolong_the_request(tmp_path: Path) -> None:
    wire = post_json(sync("/echo"), b"[1]", "Expect: 100-continue", close=True)
    with running(tmp_path, FLOWS) as it, connected(it.server) as sock:
        sock.sendall(wire[:20])
        eventually(lambda: any(handler.parser.begun for handler in list(it.server.handlers)))
        (handler,) = it.server.handlers
        deadline = handler.deadline
        sock.sendall(wire[20:-3])
        assert receive(sock, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        it.client.get("/health")  # the loop has done all that belongs to it
        assert handler.deadline == deadline
        sock.sendall(wire[-3:])
        assert answers(read_to_end(sock))[0].status == 200


def test_a_body_that_never_comes_after_it_was_asked_for_is_408(tmp_path: Path) -> None:
    wire = post_json(sync("/echo"), b"[1]", "Expect: 100-continue")
    with running(tmp_path, FLOWS, request_timeout=0.1) as it:
        assert [item.status for item in answers(talk(it.server, wire[:-3]))] == [100, 408]


def test_a_request_that_began_while_another_was_answered_has_a_deadline_too(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, request_timeout=0.1, idle_timeout=30) as it:
        gate = Gate(it.app)
        with connected(it.server) as sock:
            sock.sendall(request("GET", sync("/gate")))
            assert gate.entered.wait(5)
            sock.sendall(b"GET /he")
            it.client.get("/health")
            gate.opened.set()
            assert [item.status for item in answers(read_to_end(sock))] == [200, 408]


def test_an_end_that_never_comes_while_a_client_goes_on_sending_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_LINGER_S", 0.1)
    with running(tmp_path, FLOWS) as it, connected(it.server) as sock:
        sock.sendall(b"nonsense\r\n\r\n")
        deadline = time.monotonic() + 8
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < deadline:
                sock.sendall(b"a" * 4096)
        eventually(lambda: not it.server.handlers)


# --- large results ---

LARGE = 6 << 20


@pytest.fixture
def large(tmp_path: Path) -> Iterator[tuple[Running, str, bytes]]:
    """A server with a finished job of some MB, whose result is stored in pieces."""
    with running(tmp_path) as it:
        text = random.Random(1).randbytes(LARGE // 2).hex()

        @it.app.flow("GET /large", response={"headers": {"Content-Type": "text/plain"}, "body": "${result}"})
        def large(context: Any) -> str:
            return text

        accepted = it.client.get("/api/publishingAsync/large")
        assert it.client.finished(accepted)["status"] == "Completed"
        path = "/api/jobs/" + accepted.json()["id"] + "/result"
        yield it, path, text.encode()


def test_a_large_result_is_read_slowly_and_exactly(large: tuple[Running, str, bytes]) -> None:
    it, path, text = large
    with connected(it.server, 4096) as sock:
        sock.sendall(request("GET", path))
        data = receive(sock, b"\r\n\r\n")
        head, _, rest = data.partition(b"\r\n\r\n")
        assert Answered(head, b"").headers["content-length"] == str(len(text))
        assert it.client.get("/health").status_code == 200  # the loop does not wait for the slow reader
        body = bytearray(rest)
        while len(body) < len(text):
            piece = sock.recv(7919)
            assert piece
            body += piece
        assert body == text
        sock.sendall(request("GET", "/nothing", close=True))
        assert answers(read_to_end(sock))[0].status == 404


def test_a_large_result_is_given_in_part(large: tuple[Running, str, bytes]) -> None:
    it, path, text = large
    size = len(text)
    whole = it.client.get(path)
    tag = whole.headers["ETag"]
    assert (whole.status_code, whole.headers["Accept-Ranges"], len(whole.content)) == (200, "bytes", size)
    boundary = 256 << 10  # of two pieces as they are stored
    for wanted, first, last in (
        ("0-0", 0, 0), ("0-9", 0, 9), (f"{boundary - 5}-{boundary + 4}", boundary - 5, boundary + 4),
        (f"{boundary}-{2 * boundary - 1}", boundary, 2 * boundary - 1), ("100-", 100, size - 1),
        ("-1", size - 1, size - 1), (f"{size - 1}-", size - 1, size - 1), (f"5-{size * 2}", 5, size - 1),
        (f"-{size * 2}", 0, size - 1),
    ):  # fmt: skip
        for more in ({}, {"If-Range": tag}, {"If-Match": tag}):
            part = it.client.get(path, headers={"Range": f"bytes={wanted}", **more})
            assert (part.status_code, part.headers["Content-Range"]) == (206, f"bytes {first}-{last}/{size}")
            assert part.content == text[first : last + 1]
            assert (part.headers["ETag"], part.headers["Content-Type"]) == (tag, whole.headers["Content-Type"])
    for beyond in (f"bytes={size}-", "bytes=-0", f"BYTES={size}-{size + 5}"):
        answer = it.client.get(path, headers={"Range": beyond})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    "more",
    [
        {"Range": "bytes=0-1,5-6"}, {"Range": "bytes=5-4"}, {"Range": "bytes=x"}, {"Range": "lines=1-2"},
        {"Range": "bytes=0-9", "If-Range": '"another"'},
        {"Range": "bytes=0-9", "If-Range": "Tue, 24 Nov 2026 12:40:42 GMT"},
    ],
)  # fmt: skip
def test_a_range_that_cannot_be_served_brings_the_whole(
    large: tuple[Running, str, bytes], more: dict[str, str]
) -> None:
    it, path, text = large
    answer = it.client.get(path, headers=more)
    assert (answer.status_code, answer.content == text) == (200, True)


def test_ranges_are_of_large_results_and_of_get_only(large: tuple[Running, str, bytes]) -> None:
    it, path, text = large
    head = it.client("HEAD", path, headers={"Range": "bytes=0-9"})
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(len(text)))
    known = {"Range": "bytes=0-9", "If-None-Match": head.headers["ETag"]}
    assert it.client.get(path, headers=known).status_code == 304
    for other in (sync("/large"), "/health"):
        assert it.client.get(other, headers={"Range": "bytes=0-9"}).status_code == 200


def test_a_large_result_is_followed_by_the_next_answer(large: tuple[Running, str, bytes]) -> None:
    it, path, text = large
    wire = request("GET", path) * 2 + request("HEAD", path) + request("GET", "/nothing", close=True)
    with connected(it.server) as sock:
        sock.sendall(wire)
        data = read_to_end(sock)
    for _ in range(2):
        head, _, data = data.partition(b"\r\n\r\n")
        assert data[: len(text)] == text
        data = data[len(text) :]
    head, _, data = data.partition(b"\r\n\r\n")
    assert Answered(head, b"").headers["content-length"] == str(len(text))
    assert answers(data)[0].status == 404


def test_a_result_that_is_forgotten_while_it_is_read_ends_the_connection(large: tuple[Running, str, bytes]) -> None:
    it, path, text = large
    with connected(it.server, 4096) as sock:
        sock.sendall(request("GET", path) + request("GET", "/nothing"))
        data = receive(sock, b"\r\n\r\n")
        assert it.client("DELETE", path.removesuffix("/result")).status_code == 204
        body = (data + read_to_end(sock)).partition(b"\r\n\r\n")[2]
    assert len(body) < len(text)  # otherwise the system's buffers held it all, and nothing was tried
    assert body == text[: len(body)]  # never filled up with the next answer


def test_a_result_that_expires_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    clock, text = FakeClock(), random.Random(1).randbytes(LARGE // 2).hex()
    with running(tmp_path, {"small": get_flow("/small", response={"body": 1})}, clock=clock, retention=60) as it:
        app = it.app

        @app.flow("GET /large", response={"headers": {"Content-Type": "text/plain"}, "body": "${result}"})
        def large(context: Any) -> str:
            return text

        large_one, small_one = (app.wait(app.submit(name)) for name in ("large", "small"))
        purged = partial(app.store.get, small_one.key)
        with connected(it.server, 4096) as sock:
            sock.sendall(request("GET", f"/api/jobs/{large_one.id}/result", close=True))
            data = receive(sock, b"\r\n\r\n")
            clock.tick(61)
            app.housekeeper.wake()
            eventually(lambda: purged() is None)
            assert (data + read_to_end(sock)).partition(b"\r\n\r\n")[2] == text.encode()
        clock.tick(2)
        app.housekeeper.wake()
        eventually(lambda: app.store.get(large_one.key) is None)


def test_a_reader_that_takes_nothing_of_a_large_result_is_cut(tmp_path: Path) -> None:
    with running(tmp_path, request_timeout=0.3) as it:

        @it.app.flow("GET /large", response={"headers": {"Content-Type": "text/plain"}, "body": "${result}"})
        def large(context: Any) -> str:
            return "x" * (20 << 20)  # at 64 KiB a second this would take five minutes

        accepted = it.client.get("/api/publishingAsync/large")
        assert it.client.finished(accepted)["status"] == "Completed"
        for path in (sync("/large"), "/api/jobs/" + accepted.json()["id"] + "/result"):
            with connected(it.server, 4096) as sock:
                sock.sendall(request("GET", path))
                receive(sock, b"\r\n\r\n")
                (handler,) = [handler for handler in it.server.handlers if handler.out]
                eventually(lambda handler=handler: handler not in it.server.handlers)  # type: ignore[misc]


def test_a_reader_that_is_slow_but_honest_gets_all(large: tuple[Running, str, bytes]) -> None:
    it, path, text = large
    it.server.settings = it.server.settings._replace(request_timeout=0.2)
    pause = threading.Event()
    with connected(it.server, 16384) as sock:
        sock.sendall(request("GET", path, close=True))
        began, got = time.monotonic(), bytearray()
        while piece := sock.recv(65536):
            got += piece
            pause.wait(max(began + len(got) / (2 << 20) - time.monotonic(), 0))  # 2 MiB a second, and no faster
    assert time.monotonic() - began > 2  # which two sweeps have seen
    assert got.partition(b"\r\n\r\n")[2] == text


def test_a_reader_that_takes_nothing_holds_up_the_answers_behind(large: tuple[Running, str, bytes]) -> None:
    it, path, _ = large
    calls: list[int] = []

    @it.app.flow("GET /count")
    def count(context: Any) -> int:
        calls.append(1)
        return len(calls)

    with connected(it.server, 4096) as sock:
        sock.sendall(request("GET", path) + request("GET", sync("/count")) * 500)
        receive(sock, b"\r\n\r\n")
        for _ in range(20):
            it.client.get("/health")
        assert len(calls) <= 1  # or every answer would wait in memory for a client that does not read


# --- stopping ---


def test_stopping_answers_open_requests_and_closes_idle_connections(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        gate = Gate(it.app)
        with connected(it.server) as idle, connected(it.server) as sock:
            idle.sendall(request("GET", "/nothing"))
            one_answer(idle)
            sock.sendall(request("GET", sync("/gate")) + request("GET", "/nothing"))
            assert gate.entered.wait(5)
            it.server.request_stop()
            assert read_to_end(idle) == b""
            with pytest.raises(OSError, match=r"refused|reset"):
                talk(it.server)
            gate.opened.set()
            (answered,) = answers(read_to_end(sock))
            assert (answered.json, answered.headers["connection"]) == ("through", "close")
        assert it.server.ended(10)  # well before shutdown_timeout, which is for who does not end


def test_stopping_does_not_wait_for_a_client_that_has_read_its_answer_to_the_end(
    large: tuple[Running, str, bytes],
) -> None:
    it, path, text = large
    with connected(it.server, 4096) as sock:
        sock.sendall(request("GET", path))  # and the connection is to be kept
        begun = receive(sock, b"\r\n\r\n").partition(b"\r\n\r\n")[2]
        it.server.settings = it.server.settings._replace(shutdown_timeout=60)
        it.server.request_stop()
        eventually(lambda: it.server.stopping)
        assert begun + read_to_end(sock) == text
    assert it.server.ended(10)


def test_stopping_answers_long_polls_at_once(tmp_path: Path) -> None:
    with running(tmp_path, {"long": get_flow("/long", steps=[{"name": "w", "wait": 60}])}) as it:
        job = it.client.get("/api/publishingAsync/long").json()["id"]
        polls = [
            request("GET", f"/api/jobs/{job}/status", "Prefer: wait=50"),
            request("GET", f"/api/jobs/{job}/result", "Prefer: wait=50"),
            request("GET", "/api/publishingAsync/long", "Prefer: wait=50"),
        ]
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(talk, it.server, poll) for poll in polls]
            eventually(lambda: sum(item.at_deadline is not None for item in list(it.server.handlers)) == 3)
            it.server.stop()
            found = [answers(future.result(5))[0] for future in waiting]
    assert [item.status for item in found] == [200, 202, 202]
    for item in found:
        assert item.json["status"] == "Running"
        assert item.headers["connection"] == "close"


def test_a_request_that_never_ends_does_not_hold_up_stopping_for_ever(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, shutdown_timeout=0.2) as it, connected(it.server) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n")
        eventually(lambda: any(item.parser.begun for item in list(it.server.handlers)))
        it.server.stop()
        assert it.server.ended(0)
        read_to_end(sock)  # it is closed


def test_a_call_that_ends_after_the_server_has_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(tmp_path, FLOWS, shutdown_timeout=0.1) as it, connected(it.server) as sock:
        gate = Gate(it.app)
        sock.sendall(request("GET", sync("/gate")))
        assert gate.entered.wait(5)
        it.server.stop()
        assert it.server.ended(0)
        gate.opened.set()
        eventually(lambda: sum(it.app.metrics.requests.values()) == 1)
        assert read_to_end(sock) == b""
    assert "failed" not in caplog.text


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="descriptors cannot be counted here")


@needs_proc
def test_stopping_gives_threads_and_descriptors_back(tmp_path: Path) -> None:
    def cycle(n: int) -> None:
        folder = tmp_path / str(n)
        folder.mkdir()
        with running(folder, FLOWS) as it, connected(it.server) as idle:
            idle.sendall(b"GET /he")
            assert it.client.get(sync("/hello/1")).status_code == 200
            job = it.client.get("/api/publishingAsync/hello/1")
            assert it.client.finished(job)["status"] == "Completed"
            idle.shutdown(socket.SHUT_WR)

    cycle(0)  # what is loaded once
    gc.collect()  # what earlier tests left
    before = descriptors(), set(threading.enumerate())
    for n in range(1, 4):
        cycle(n)
    assert (descriptors(), set(threading.enumerate())) == before


@needs_proc
def test_a_server_that_cannot_listen_gives_its_descriptors_back(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        before = descriptors()
        for _ in range(3):
            with pytest.raises(OSError, match="in use"):
                Server(app, port=taken.getsockname()[1])
        assert descriptors() == before


@needs_proc
def test_a_server_that_never_served_can_be_closed(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        before = descriptors()
        Server(app, port=0).server_close()
        assert descriptors() == before


def test_a_posted_function_that_fails_does_not_end_the_server(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as it:
        it.server.post(lambda: json.loads("{"))
        assert it.client.get(sync("/hello/1"), timeout=2).status_code == 200


def test_what_fails_while_an_answer_is_handed_over_is_an_error_of_that_request_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*given: Any) -> None:
        raise StoreError("disk I/O error")

    with running(tmp_path, FLOWS) as it:
        asked = {"headers": {"Idempotency-Key": "k"}, "timeout": 2}
        assert it.client.get("/api/publishingAsync/hello/1", **asked).status_code == 202
        with monkeypatch.context() as patch:
            patch.setattr(it.app, "find", unreadable)
            assert it.client.get("/api/publishingAsync/hello/1", **asked).status_code == 503
        assert it.client.get("/api/publishingAsync/hello/1", **asked).headers["Idempotency-Replayed"] == "true"


def test_serving_in_the_calling_thread_ends_on_request(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        server = Server(app, port=0)
        server.post(server.request_stop)
        server.serve_forever()
        server.server_close()
        with pytest.raises(ConnectionRefusedError):
            talk(server)


# --- an http.server ---


def test_a_server_is_used_as_those_of_http_server_are(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app, Server(app, port=0) as server:
        threading.Timer(0.2, server.shutdown).start()
        assert talk(server, request("GET", "/health", close=True)).startswith(b"HTTP/1.1 200 ")
        server.serve_forever()
        with pytest.raises(ConnectionRefusedError):
            talk(server)


def test_serving_again_after_the_end_is_refused(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        server = Server(app, port=0)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert talk(server, request("GET", "/health", close=True)).startswith(b"HTTP/1.1 200 ")
        server.shutdown()
        thread.join(5)
        assert not thread.is_alive()
        with pytest.raises(RuntimeError, match="stopped: make a new one"):
            server.serve_forever()
        server.server_close()


def test_a_single_request_cannot_be_handled(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        server = Server(app, port=0)
        with pytest.raises(NotImplementedError, match=r"serve_forever\(\)"):
            server.handle_request()
        server.server_close()


class Hooked(Server):
    """Calls of the hooks, each with the port of the client; the first connection is refused by `verify_request`."""

    def __init__(self, app: AsteraLite) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.looked = threading.Event()
        super().__init__(app, port=0)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.calls.append(("verify", client_address[1]))
        return len(self.calls) > 1

    def process_request(self, request: Any, client_address: Any) -> None:
        self.calls.append(("process", client_address[1]))
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.calls.append(("finish", client_address[1]))
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.calls.append(("error", client_address[1]))

    def service_actions(self) -> None:
        self.looked.set()


def test_the_hooks_of_http_server_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app, Hooked(app) as server:
        assert talk(server, request("GET", "/health", close=True)) == b""
        ((_, refused),) = server.calls
        server.calls.append(("verified", None))
        del server.calls[0]
        with connected(server) as sock:
            port = sock.getsockname()[1]
            assert port != refused
            sock.sendall(request("GET", "/health"))
            assert one_answer(sock).status == 200
            assert server.calls[1:] == [("verify", port), ("process", port), ("finish", port)]
            monkeypatch.setattr(Handler, "receive", lambda handler: 1 / 0)
            sock.sendall(request("GET", "/health"))
            assert read_to_end(sock) == b""  # it ends, and only it
            assert server.calls[4:] == [("error", port)]
            monkeypatch.undo()
        server.looked.clear()
        assert server.looked.wait(5)
        assert talk(server, request("GET", "/health", close=True)).startswith(b"HTTP/1.1 200 ")


# --- addresses and TLS ---


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "192.0.2.1", "example.com"])
def test_beyond_loopback_it_listens_only_with_a_token(tmp_path: Path, host: str) -> None:
    app = AsteraLite(database=str(tmp_path / "jobs.db"))
    with pytest.raises(ConfigError, match="token"):
        Server(app, host=host, port=0)


def test_a_public_url_is_refused_without_a_token(tmp_path: Path) -> None:
    app = AsteraLite(database=str(tmp_path / "jobs.db"), public_url="https://api.example")
    with pytest.raises(ConfigError, match="token"):
        Server(app, port=0)


@pytest.mark.parametrize("settings", [{"token": "secret"}, {"insecure_open": True}])
def test_with_a_token_or_told_so_it_listens_everywhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    with (
        AsteraLite(database=str(tmp_path / "jobs.db"), **settings) as app,
        Server(app, host="0.0.0.0", port=0) as server,
    ):
        assert talk(server, request("GET", "/health", close=True)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "127.1"])
def test_every_loopback_address_may_be_listened_on(tmp_path: Path, host: str) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        try:
            server = Server(app, host=host, port=0)
        except OSError:
            pytest.skip(f"{host} is no address of this machine")
        with server:
            assert talk(server, request("GET", "/health", close=True)).startswith(b"HTTP/1.1 200 ")


def test_ipv6_loopback(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        app.deploy("hello", FLOWS["hello"])
        try:
            server = Server(app, host="::1", port=0)
        except OSError:
            pytest.skip("there is no IPv6 here")
        with server:
            assert server.url.startswith("http://[::1]:")
            client = Client(server)
            accepted = client.get("/api/publishingAsync/hello/1")
            assert accepted.headers["Location"].startswith(server.url + "/api/jobs/")
            assert client.finished(accepted)["status"] == "Completed"
            client.session.close()


@contextmanager
def secured(server: Server, cert: str) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=cert)
    with connected(server) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
        yield sock


def test_tls(tmp_path: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    with running(tmp_path, FLOWS, tls_cert=cert, tls_key=key) as it:
        assert it.server.url.startswith("https://")
        it.client.session.verify = cert
        accepted = it.client.get("/api/publishingAsync/hello/1")
        assert accepted.headers["Location"].startswith(it.server.url)
        assert it.client.finished(accepted)["status"] == "Completed"
        for n in range(3):
            assert it.client.get(sync(f"/hello/{n}")).json() == str(n)


def test_tls_with_large_bodies_both_ways_and_pipelining(tmp_path: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    body = json.dumps("x" * (2 << 20)).encode()
    wire = post_json(sync("/echo"), body) + request("GET", sync("/hello/1")) * 50
    with running(tmp_path, FLOWS, tls_cert=cert, tls_key=key) as it, secured(it.server, cert) as sock:
        sock.sendall(wire + request("GET", "/nothing", close=True))
        first, *rest = answers(read_to_end(sock))
    assert first.json["body"] == json.loads(body)
    assert [item.status for item in rest] == [200] * 50 + [404]


def test_tls_bytes_that_come_in_one_record_with_others_are_not_forgotten(
    tmp_path: Path, certificate: tuple[str, str]
) -> None:
    cert, key = certificate
    with running(tmp_path, FLOWS, tls_cert=cert, tls_key=key) as it, secured(it.server, cert) as sock:
        for _ in range(5):
            sock.sendall(request("GET", sync("/hello/1")) * 300)  # decrypted at once, more than one read's worth
            data = b""
            while data.count(b'\r\n\r\n"1"\n') < 300:
                piece = sock.recv(1 << 20)
                assert piece
                data += piece


def test_a_client_without_tls_harms_nobody(tmp_path: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    with running(tmp_path, FLOWS, tls_cert=cert, tls_key=key) as it:
        assert b"HTTP/1.1" not in talk(it.server, request("GET", "/health"))
        with connected(it.server):  # one that never shakes hands
            it.client.session.verify = cert
            assert it.client.get(sync("/hello/1")).status_code == 200
        with pytest.raises(requests.exceptions.SSLError):
            it.client.get(sync("/hello/1"), verify=True)  # it trusts nobody who signed for himself


def test_a_client_that_sends_too_much_by_tls_can_read_why(tmp_path: Path, certificate: tuple[str, str]) -> None:
    cert, key = certificate
    with running(tmp_path, FLOWS, tls_cert=cert, tls_key=key, max_body=1000) as it:
        it.client.session.verify = cert
        answer = it.client.post(sync("/echo"), data=b" " * (4 << 20), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        it.client.session.close()
        eventually(lambda: not it.server.handlers)


def test_one_connection_too_many_is_told_so_by_tls_too(
    tmp_path: Path, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = certificate
    with (
        running(tmp_path, FLOWS, tls_cert=cert, tls_key=key, max_connections=1) as it,
        secured(it.server, cert) as first,
    ):
        gate = Gate(it.app)
        first.sendall(request("GET", sync("/gate")))
        assert gate.entered.wait(5)
        with secured(it.server, cert) as sock:
            sock.sendall(request("GET", "/health"))
            (answered,) = answers(read_to_end(sock))
            assert (answered.status, answered.headers["retry-after"]) == (503, "5")
        eventually(lambda: len(it.server.handlers) == 1)
        turns: list[int] = []
        monkeypatch.setattr(it.server, "service_actions", lambda: turns.append(1))
        with connected(it.server) as silent:
            assert read_to_end(silent) == b""  # it does not begin the handshake
        assert len(turns) < 100
        gate.opened.set()
        one_answer(first)
        aged(it.server, first)
        with secured(it.server, cert) as sock:  # TLS gives way too
            sock.sendall(request("GET", "/health"))
            assert one_answer(sock).status == 200


@pytest.mark.parametrize("wire", [b"", b"\x16\x03\x01\x02\x00"], ids=["never begun", "broken off"])
def test_a_handshake_has_the_time_of_a_request(tmp_path: Path, certificate: tuple[str, str], wire: bytes) -> None:
    cert, key = certificate
    with running(tmp_path, FLOWS, tls_cert=cert, tls_key=key, request_timeout=0.1, idle_timeout=30) as it:
        with connected(it.server) as sock:
            sock.sendall(wire)
            assert read_to_end(sock) == b""
        with secured(it.server, cert) as idle:
            eventually(lambda: len(it.server.handlers) == 1)
            (handler,) = it.server.handlers
            eventually(lambda: handler.deadline > time.monotonic() + 20)  # after the handshake it is idle
            idle.sendall(request("GET", "/nothing"))
            one_answer(idle)


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_an_unusable_certificate_is_a_fault_of_the_settings(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "cert.pem"
    if text is not None:
        path.write_text(text)
    app = AsteraLite(database=str(tmp_path / "jobs.db"), tls_cert=str(path))
    with pytest.raises(ConfigError, match="tls_cert"):
        Server(app, port=0)
