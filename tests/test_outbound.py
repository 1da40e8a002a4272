"""Room 5: whom a request may reach, which URLs are taken, and how long an answer may take."""

from __future__ import annotations

import contextlib
import gzip
import ipaddress
import itertools
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Sink, until

import astera_lite
from astera_lite import (
    AddressPolicy,
    AddressRefused,
    Answer,
    ConfigError,
    OutboundError,
    literal_addresses,
    parse_target,
)

LOOPBACK = AddressPolicy("auto", loopback=True)
OK = b"HTTP/1.1 200 OK\r\n"


def refused(policy: AddressPolicy, address: str, host: str = "receiver.example") -> bool:
    return policy.refusal(host, ipaddress.ip_address(address)) is not None


# --- addresses ---


@pytest.mark.parametrize(
    "address",
    """1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255
    169.255.0.0 172.15.255.255 172.32.0.0 192.0.1.0 192.88.98.255 192.167.255.255 192.169.0.0 198.17.255.255 198.20.0.0
    223.255.255.255 2606:4700::1111 2001:4860:4860::8888 2a00::1 ::ffff:8.8.8.8 64:ff9b::808:808
    2002:808:808::1 192.31.195.1 192.52.192.1 192.175.49.1 2620:4f:7fff::1 2001:200::1 2a00::5efe:8.8.8.8
    ::808:808""".split(),
)
def test_public_addresses_are_public(address: str) -> None:
    assert AddressPolicy("none").refusal("x.example", ipaddress.ip_address(address)) is None
    assert not refused(AddressPolicy(), address)


@pytest.mark.parametrize(
    "address",
    """0.0.0.0 0.1.2.3 10.0.0.0 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.255 169.254.0.1
    172.16.0.0 172.31.255.255 192.0.0.1 192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 198.19.255.255 198.51.100.1
    203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
    :: ::1 fe80::1 febf::1 fec0::1 fc00::1 fd00::1 ff02::1 ff0e::1 100::1 64:ff9b:1::1 2001::1 2001:10::1 2001:20::1
    2001:db8::1 3fff::1 5f00::1 4000::1
    192.31.196.1 192.52.193.1 192.175.48.1 2620:4f:8000::1 100:0:0:1::1 2001:1::1 2001:4:112::1 64:ff9b:1:ffff::808:808
    ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0.0.0.0 ::127.0.0.1 ::10.0.0.1 ::2 ::ffff:0:127.0.0.1 ::ffff:0:8.8.8.8
    2a00::5efe:10.0.0.1 2a00::200:5efe:127.0.0.1 fe80::5efe:8.8.8.8 2002:808:808::5efe:10.0.0.1
    2001:0:808:808::f7f7:f7f7
    64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b::a00:1 2002:7f00:1::1 2002:a00:1::1 2002:c0a8:1::""".split(),
)
def test_special_addresses_are_refused(address: str) -> None:
    assert AddressPolicy("none").refusal("x.example", ipaddress.ip_address(address)) is not None
    assert refused(AddressPolicy("none"), address)
    assert refused(AddressPolicy("auto"), address)


METADATA = (
    "169.254.169.254 169.254.170.2 169.254.170.23 169.254.42.42 169.254.0.23 100.100.100.200 192.0.0.192 168.63.129.16 "
    "fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:c1::a9fe:a9fe fd00:42::42 fe80::a9fe:a9fe"
).split()


@pytest.mark.parametrize("address", METADATA)
def test_metadata_addresses_are_refused_unless_named_exactly(address: str) -> None:
    wide = "169.254.0.0/16,100.64.0.0/10,192.0.0.0/24,168.0.0.0/8,fd00::/8,fe80::/10"
    assert refused(AddressPolicy(), address)
    assert refused(AddressPolicy(wide), address)
    assert refused(AddressPolicy("receiver.example"), address)
    assert not refused(AddressPolicy(f"{wide},{address}"), address)


def test_metadata_inside_an_ipv6_address_is_refused() -> None:
    public_form = ("::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1", "::169.254.169.254")
    own_form = ("::ffff:0:a9fe:a9fe", "64:ff9b:1::a9fe:a9fe", "2001::5601:5601", "fd00::5efe:a9fe:a9fe")
    for form in (*public_form, *own_form, "2a00::200:5efe:a9fe:a9fe", "2002:808:808::5efe:a9fe:a9fe"):
        assert refused(AddressPolicy("169.254.0.0/16,::/0"), form)
        assert refused(AddressPolicy("receiver.example,8.8.8.8"), form)
        assert not refused(AddressPolicy(f"0.0.0.0/0,{form}"), form)
    for form in public_form:
        assert not refused(AddressPolicy("169.254.169.254"), form)
    for form in own_form:  # the IPv4 address is named, but not the network that carries it
        assert refused(AddressPolicy("169.254.169.254"), form)


@pytest.mark.parametrize(
    ("allow", "host", "address", "allowed"),
    [
        ("10.0.0.0/8", "a.example", "10.1.2.3", True),
        ("10.0.0.0/8", "a.example", "11.0.0.1", True),  # public anyway
        ("10.0.0.0/8", "a.example", "172.16.0.1", False),
        ("10.0.0.5/8", "a.example", "10.9.9.9", True),
        ("10.0.0.5", "a.example", "10.0.0.5", True),
        ("10.0.0.5", "a.example", "10.0.0.6", False),
        ("10.0.0.0/8", "a.example", "::ffff:10.0.0.1", True),
        ("10.0.0.0/8", "a.example", "64:ff9b::a00:1", True),
        ("10.0.0.0/8", "a.example", "64:ff9b:1::a00:1", False),
        ("10.0.0.0/8,64:ff9b:1::/96", "a.example", "64:ff9b:1::a00:1", True),
        ("10.0.0.0/8", "a.example", "2002:a00:1::5efe:c0a8:1", False),
        ("fd00::/8", "a.example", "fd12::1", True),
        ("fd00::/8", "a.example", "fe80::1", False),
        ("[::1]", "a.example", "::1", True),
        (" intra.example , 10.0.0.0/8 ", "intra.example", "192.168.0.1", True),
        ("intra.example", "INTRA.Example.", "192.168.0.1", True),
        ("Intra.Example", "intra.example", "192.168.0.1", True),
        ("intra.example.", "intra.example", "192.168.0.1", True),
        ("intra.example", "a.intra.example", "192.168.0.1", False),
        ("intra.example", "xintra.example", "192.168.0.1", False),
        ("intra.example", "other.example", "192.168.0.1", False),
        ("none", "a.example", "127.0.0.1", False),
        ("", "a.example", "127.0.0.1", False),
        ("NONE", "none", "127.0.0.1", False),
    ],
)
def test_an_allow_list_names_hosts_and_networks(allow: str, host: str, address: str, allowed: bool) -> None:
    assert refused(AddressPolicy(allow), address, host) is not allowed


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_auto_names_loopback_only_for_a_loopback_server(address: str) -> None:
    assert not refused(AddressPolicy("auto", loopback=True), address)
    assert refused(AddressPolicy("auto", loopback=False), address)
    assert refused(AddressPolicy("none", loopback=True), address)


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "0.0.0.0", "::", "fe80::1"])
def test_auto_names_nothing_but_loopback(address: str) -> None:
    assert refused(AddressPolicy("auto", loopback=True), address)


@pytest.mark.parametrize(
    "allow",
    ["10.0.0.0/33", "10.0.0.256", "10.0.0", "a b", "*.example", "http://x", "x:80", "a..b", "-a", "auto,10.0.0.1",
     "none,x", "fd00::/129", "é.example"],
)  # fmt: skip
def test_a_malformed_allow_list_is_a_config_error(allow: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AddressPolicy(allow)
    assert caught.value.faults[0].where == "callback_allow"


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        ("127.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0x7f000001", "127.0.0.1"),
        ("0177.0.0.1", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("10.1", "10.0.0.1"),
        ("8.8.8.8", "8.8.8.8"),
        ("::1", "::1"),
        ("::ffff:7f00:1", "::ffff:7f00:1"),
        ("localhost", "127.0.0.1 ::1"),
        ("localhost.", "127.0.0.1 ::1"),
        ("a.localhost", "127.0.0.1 ::1"),
        ("localhost.example", ""),
        ("receiver.example", ""),
        ("1.2.3.4.5", ""),
        ("256.1.1.1", ""),
        ("a" * 300, ""),
    ],
)
def test_literal_addresses_takes_every_form_that_the_system_takes(host: str, addresses: str) -> None:
    assert set(literal_addresses(host)) == set(map(ipaddress.ip_address, addresses.split()))


# --- URLs ---


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a", ("http", "a", 80, "/")),
        ("https://a", ("https", "a", 443, "/")),
        ("HTTP://Receiver.Example:8080/Path?Q=1&x=%20", ("http", "receiver.example", 8080, "/Path?Q=1&x=%20")),
        ("http://a?q", ("http", "a", 80, "/?q")),
        ("http://a/x@y:z", ("http", "a", 80, "/x@y:z")),
        ("http://a/?u=http://b/", ("http", "a", 80, "/?u=http://b/")),
        ("http://[::1]:8/", ("http", "::1", 8, "/")),
        ("https://[2606:4700::1111]", ("https", "2606:4700::1111", 443, "/")),
        ("http://a_b.example./", ("http", "a_b.example.", 80, "/")),
        ("http://1.2.3.4:65535", ("http", "1.2.3.4", 65535, "/")),
    ],
)
def test_parse_target_takes_a_url_apart(url: str, target: tuple[str, str, int, str]) -> None:
    assert parse_target(url) == target


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "absolute"), ("/x", "absolute"), ("//h/x", "absolute"), ("h/x", "absolute"), ("http:h", "absolute"),
        ("http:/h", "absolute"), ("http://", "absolute"), ("http:///x", "absolute"), ("http://?x", "absolute"),
        ("ftp://h/", "absolute"), ("file:///etc/passwd", "absolute"), ("data:,x", "absolute"),
        ("javascript:alert(1)", "absolute"), ("gopher://h/", "absolute"), ("httpx://h", "absolute"),
        ("http://h:/", "absolute"), ("http://h:x/", "absolute"), ("http://h:-1/", "absolute"),
        ("http://h:80:80/", "absolute"), ("http://h:+80/", "absolute"), ("http://h:0/", "port"),
        ("http://h:65536/", "port"), ("http://h:99999/", "port"), ("http://h:123456/", "absolute"),
        ("http://u@h/", "user name"), ("http://u:p@h/", "user name"), ("http://@h/", "user name"),
        ("http://127.0.0.1:80@h/", "user name"), ("http://h/#f", "fragment"), ("http://h#", "fragment"),
        (" http://h", "characters"), ("http://h ", "characters"), ("http://h\n", "characters"),
        ("http://h\r\nX: y", "characters"), ("\thttp://h", "characters"), ("ht\ntp://h", "characters"),
        ("http://h/\x00", "characters"), ("http://h/\x7f", "characters"), ("http://h/a b", "characters"),
        ("http://a\\@127.0.0.1/", "characters"), ("http:\\\\h", "characters"), ("http://h/é", "characters"),
        ("http://①②⑦.0.0.1/", "characters"), ("http://h\u3002example/", "characters"),
        ("http://a..b/", "host"), ("http://.a/", "host"), ("http://-a/", "host"), ("http://" + "a" * 64, "host"),
        ("http://" + ".".join(["a" * 60] * 5), "host"), ("http://[::1", "absolute"), ("http://[]/", "absolute"),
        ("http://[::g]/", "absolute"), ("http://[:::1]/", "IPv6"), ("http://[1.2.3.4]/", "IPv6"),
        ("http://[fe80::1%25lo]/", "absolute"), ("http://::1/", "absolute"), ("http://%31.0.0.1/", "absolute"),
        ("http://a,http://b", "absolute"), ("http://a;b/", "absolute"),
    ],
)  # fmt: skip
def test_parse_target_refuses_what_is_not_one_plain_url(url: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_target(url)


def test_a_receiver_is_told_apart_by_host_and_port() -> None:
    assert parse_target("http://H/x").receiver == parse_target("http://h:80/y?z").receiver == "h:80"
    assert parse_target("https://h").receiver != parse_target("http://h").receiver


# --- one request ---


class RawServer:
    """A TCP server on loopback that does with each connection what it is told."""

    def __init__(self, serve: Callable[[socket.socket], None], read_first: bool = True) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.heads: list[bytes] = []
        self.served: list[socket.socket] = []  # connections whose client stayed until all was done
        self._serve, self._read_first = serve, read_first
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._one, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _one(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            if self._read_first:
                data = b""
                while b"\r\n\r\n" not in data:
                    piece = connection.recv(65536)
                    if not piece:
                        return
                    data += piece
                self.heads.append(data)
            self._serve(connection)
            self.served.append(connection)

    def close(self) -> None:
        # A blocked accept() is not woken by close() alone.
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self._threads:
            thread.join(5)


Serving = Callable[..., RawServer]


@pytest.fixture
def serving() -> Iterator[Serving]:
    servers: list[RawServer] = []

    def start(serve: Callable[[socket.socket], None] | bytes, **more: Any) -> RawServer:
        def say(connection: socket.socket) -> None:
            assert isinstance(serve, bytes)
            connection.sendall(serve)

        servers.append(RawServer(say if isinstance(serve, bytes) else serve, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def fetch(url: str, **more: Any) -> Answer:
    given: dict[str, Any] = {"method": "GET", "headers": {}, "body": None, "timeout": 10.0, "max_bytes": 1 << 20}
    given |= {"policy": LOOPBACK, **more}
    return astera_lite.fetch(given.pop("method"), url, given.pop("headers"), given.pop("body"), **given)


def failure(url: str, **more: Any) -> OutboundError:
    with pytest.raises(OutboundError) as caught:
        fetch(url, **more)
    return caught.value


def test_an_answer_comes_back_whole(serving: Serving) -> None:
    server = serving(b"HTTP/1.1 418 I'm a teapot\r\nX-A: 1\r\nX-A: 2\r\nContent-Length: 3\r\n\r\nabc")
    answer = fetch(server.url + "p?q=1", headers={"X-B": "3"})
    assert (answer.code, answer.body) == (418, b"abc")
    assert [value for name, value in answer.headers if name == "X-A"] == ["1", "2"]
    head = server.heads[0].decode()
    assert head.startswith("GET /p?q=1 HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{server.port}\r\n" in head
    assert "X-B: 3\r\n" in head
    assert "python" not in head.lower()


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", b"until the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (
            b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103\r\nContent-Length: 9\r\n\r\n"
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
            b"ok",
        ),
    ],
)
def test_every_framing_is_read(serving: Serving, answer: bytes, body: bytes) -> None:
    assert fetch(serving(answer).url).body == body


TEXT = b"abc" * 1000
BARE = zlib.compressobj(wbits=-15)


def coded(coding: str, body: bytes) -> bytes:
    return OK + f"Content-Encoding: {coding}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(TEXT)),
        ("X-GZIP", gzip.compress(TEXT[:600]) + gzip.compress(TEXT[600:])),
        ("deflate", zlib.compress(TEXT)),
        ("deflate", BARE.compress(TEXT) + BARE.flush()),
        ("deflate, gzip", gzip.compress(zlib.compress(TEXT))),
        ("identity", TEXT),
        ("br", TEXT),
    ],
    ids=["gzip", "two members", "zlib", "bare", "two codings", "none", "unknown"],
)
def test_codings_are_undone_within_the_limit(serving: Serving, coding: str, body: bytes) -> None:
    server = serving(coded(coding, body))
    assert fetch(server.url, max_bytes=len(TEXT)).body == TEXT
    assert failure(server.url, max_bytes=len(TEXT) - 1).kind == "too_large"
    assert fetch(server.url, max_bytes=0).code == 200


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", gzip.compress(TEXT)[:-9]),
        ("gzip", TEXT),
        ("deflate", zlib.compress(TEXT)[:-9]),
        ("deflate", b"\x78\x9cno"),
        ("deflate, gzip", gzip.compress(b"")),
    ],
    ids=["cut gzip", "no gzip", "cut deflate", "no deflate", "nothing to inflate"],
)
def test_a_damaged_coding_is_a_transport_error(serving: Serving, coding: str, body: bytes) -> None:
    assert failure(serving(coded(coding, body)).url).kind == "transport"


def test_the_answer_to_head_has_no_body(serving: Serving) -> None:
    server = serving(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    assert fetch(server.url, method="HEAD") == Answer(200, (("Content-Length", "1000"),))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(serving: Serving, status: int) -> None:
    elsewhere = serving(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    server = serving(f"HTTP/1.1 {status} Go\r\nLocation: {elsewhere.url}\r\nContent-Length: 0\r\n\r\n".encode())
    answer = fetch(server.url, method="POST", body=b"x")
    assert answer.code == status
    assert elsewhere.heads == []


@pytest.mark.parametrize("status", [401, 404, 407, 500, 503])
def test_any_status_is_an_answer(serving: Serving, status: int) -> None:
    assert fetch(serving(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode()).url).code == status


def test_proxy_variables_mean_nothing(serving: Serving, sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = serving(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nproxy")
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
    monkeypatch.setenv("no_proxy", "")
    assert fetch(sink.url, method="POST", body=b"{}").code == 204
    assert proxy.heads == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/", "data:,x", "http://u:p@127.0.0.1/", ""])
def test_other_urls_are_invalid(url: str) -> None:
    assert failure(url).kind == "address"


# --- whom it reaches ---


def lookups(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let names resolve to these answers, call after call, the last for good; the names that were looked up."""
    real, asked, left = socket.getaddrinfo, list[str](), list(answers)

    def getaddrinfo(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if not str(host).endswith(".example"):
            return real(host, port, *more, **named)
        if named.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        asked.append(host)
        found = left.pop(0) if len(left) > 1 else left[0]
        return [
            (socket.AF_INET6 if ":" in a else socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, int(port or 0)))
            for a in found
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_looked_up_once_and_its_judged_address_connected_to(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = lookups(monkeypatch, ["127.0.0.1"], ["192.0.2.1"])
    url = sink.url.replace("127.0.0.1", "rebind.example")
    assert fetch(url, method="POST", body=b"{}", policy=AddressPolicy("127.0.0.1")).code == 204
    assert asked == ["rebind.example"]
    assert sink.got.get(timeout=5)[0]["host"].startswith("rebind.example:")


def test_a_rebound_name_does_not_reach_a_private_address(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups(monkeypatch, ["8.8.8.8"], ["127.0.0.1"])
    connected: list[str] = []

    def create_connection(address: tuple[str, int], *more: Any, **named: Any) -> socket.socket:
        connected.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(astera_lite.socket, "create_connection", create_connection)
    assert failure(sink.url.replace("127.0.0.1", "rebind.example"), policy=AddressPolicy("none")).kind == "transport"
    assert connected == ["8.8.8.8"]


@pytest.mark.parametrize("answer", [["127.0.0.1", "10.0.0.1"], ["10.0.0.1", "127.0.0.1"], ["127.0.0.1", "fe80::1"]])
def test_a_mixed_answer_is_refused_whole(sink: Sink, monkeypatch: pytest.MonkeyPatch, answer: list[str]) -> None:
    lookups(monkeypatch, answer)
    with pytest.raises(AddressRefused):
        fetch(sink.url.replace("127.0.0.1", "mixed.example"), policy=AddressPolicy("127.0.0.0/8"))
    assert sink.got.empty()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "localhost", "[::ffff:7f00:1]"])
def test_loopback_is_refused_in_every_spelling(sink: Sink, host: str) -> None:
    with pytest.raises(AddressRefused):
        fetch(sink.url.replace("127.0.0.1", host), policy=AddressPolicy("none"))
    assert sink.got.empty()


def test_the_next_address_is_tried(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups(monkeypatch, ["127.0.0.2", "127.0.0.1"])
    url = sink.url.replace("127.0.0.1", "two.example")
    assert fetch(url, method="POST", body=b"{}").code == 204


def test_of_thousands_of_addresses_a_few_are_tried(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups(monkeypatch, [f"127.1.{n // 250}.{n % 250 + 1}" for n in range(4000)])
    tried: list[str] = []

    def create_connection(address: tuple[str, int], *more: Any, **named: Any) -> socket.socket:
        tried.append(address[0])
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(astera_lite.socket, "create_connection", create_connection)
    assert failure(sink.url.replace("127.0.0.1", "many.example")).kind == "transport"
    assert 1 < len(tried) <= 16


def test_a_look_up_without_memory_is_not_the_last_one_of_its_name(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    lookups(monkeypatch, ["127.0.0.1"])
    resolving, without_memory = socket.getaddrinfo, [MemoryError()]

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        if "flags" not in named and without_memory:
            raise without_memory.pop()
        return resolving(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    url = sink.url.replace("127.0.0.1", "poor.example")
    with pytest.raises(MemoryError):
        fetch(url, timeout=3)
    until(lambda: not [t for t in threading.enumerate() if t.name == "astera-resolve"])
    assert fetch(url, method="POST").code == 204


def test_lookups_left_behind_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    release, waiting = threading.Event(), threading.Semaphore(0)

    def getaddrinfo(host: Any, *more: Any, **named: Any) -> Any:
        if named.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        waiting.release()
        release.wait(20)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(astera_lite, "_MAX_LOOKUPS", 5)
    try:
        for number in range(5):
            for _ in range(3):  # a name that is asked again has no second thread
                assert "could not be resolved" in str(failure(f"http://n{number}.example/", timeout=0.02))
        for number in range(20):
            error = failure(f"http://m{number}.example/", timeout=0.02)
            assert (error.kind, "too many" in str(error)) == ("transport", True)
        count = sum(1 for thread in threading.enumerate() if thread.name == "astera-resolve")
        assert count == 5
    finally:
        release.set()
    until(lambda: not [t for t in threading.enumerate() if t.name == "astera-resolve"])
    assert failure("http://again.example/").kind == "transport"  # the places are free again


def test_a_name_that_does_not_exist_is_a_transport_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups(monkeypatch, [])
    assert failure("http://nobody.example/").kind == "transport"


def test_a_hanging_lookup_ends_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    release, real = threading.Event(), socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host == "slow.example" and not named.get("flags"):
            release.wait(10)
        return real("127.0.0.1", port, *more, **named) if host != "slow.example" else []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(astera_lite, "literal_addresses", lambda host: [])
    assert failure("http://slow.example/", timeout=0.1).kind == "timeout"
    assert not release.is_set()
    release.set()


def test_a_closed_port_is_a_transport_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    assert failure(f"http://127.0.0.1:{port}/").kind == "transport"


# --- deadline and limit ---


def drip(data: bytes, every: float = 0.01) -> Callable[[socket.socket], None]:
    """Send the data a byte at a time, again and again, for ten seconds."""

    def serve(connection: socket.socket) -> None:
        for byte in itertools.islice(itertools.cycle(data), round(10 / every)):
            connection.sendall(bytes([byte]))
            time.sleep(every)

    return serve


def endless(start: bytes, more: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Send a start, and then more: for ten seconds, or 64 MiB without a pause."""

    def serve(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(round(10 / pause) if pause else (64 << 20) // len(more)):
            connection.sendall(more)
            time.sleep(pause)

    return serve


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):  # until the client hangs up
        continue


@pytest.mark.parametrize("max_bytes", [0, 1 << 20])
@pytest.mark.parametrize(
    "serve",
    [
        silent,
        drip(b"HTTP/1.1 200 " + b"O" * 5000),
        endless(OK, b"X: y\r\n", 0.005),
        endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.005),
        endless(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 0.005),
    ],
    ids=["silent", "drips", "headers", "continues", "hints"],
)
def test_the_deadline_is_over_everything(
    serving: Serving, serve: Callable[[socket.socket], None], max_bytes: int
) -> None:
    server = serving(serve)
    error = failure(server.url, timeout=0.3, max_bytes=max_bytes)
    # A hundred headers are too many for http.client: then it is no HTTP, before the time is over.
    assert error.kind == "timeout" or "not HTTP" in str(error)


@pytest.mark.parametrize(
    "serve",
    [
        endless(OK + b"Content-Length: 1000000\r\n\r\n", b"x", 0.01),
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", 0.01),
        endless(OK + b"\r\n", b"x", 0.01),
    ],
    ids=["length", "chunked", "until close"],
)
def test_the_deadline_is_over_a_dripping_body(serving: Serving, serve: Callable[[socket.socket], None]) -> None:
    error = failure(serving(serve).url, timeout=0.3)
    assert error.kind == "timeout"
    assert "0.3" in str(error) or "300ms" in str(error)


def test_the_deadline_is_over_a_body_that_nobody_reads(serving: Serving) -> None:
    hold = threading.Event()
    server = serving(lambda connection: void(hold.wait(10)), read_first=False)
    assert failure(server.url, method="POST", body=bytes(32 << 20), timeout=0.3).kind == "timeout"
    assert server.served == []
    hold.set()


def void(_: object) -> None: ...


def test_a_tls_handshake_ends_at_the_deadline(serving: Serving) -> None:
    server = serving(silent, read_first=False)
    hello = serving(drip(b"\x16\x03\x03\x40\x00" + bytes(5000)), read_first=False)
    for url in (server.url, hello.url):
        assert failure(url.replace("http:", "https:"), timeout=0.3).kind == "timeout"
    assert hello.served == []


@pytest.mark.parametrize(
    "serve",
    [
        endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"8000\r\n" + b"x" * 0x8000 + b"\r\n"),
        endless(OK + b"\r\n", b"x" * 65536),
        endless(OK + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536),
    ],
    ids=["chunked", "until close", "length"],
)
def test_an_endless_body_ends_at_the_limit(serving: Serving, serve: Callable[[socket.socket], None]) -> None:
    error = failure(serving(serve).url, max_bytes=100_000)
    assert error.kind == "too_large"


@pytest.mark.parametrize("frame", ["Content-Length: {}\r\n\r\n", "Connection: close\r\n\r\n"])
@pytest.mark.parametrize(("size", "fits"), [(1000, True), (1001, False)])
def test_the_byte_limit_is_exact(serving: Serving, frame: str, size: int, fits: bool) -> None:
    server = serving(OK + frame.format(size).encode() + b"x" * size)
    if fits:
        assert len(fetch(server.url, max_bytes=1000).body) == size
    else:
        assert failure(server.url, max_bytes=1000).kind == "too_large"


def test_headers_are_limited_too(serving: Serving) -> None:
    server = serving(endless(b"", b"HTTP/1.1 100 Continue\r\nX: " + b"y" * 60000 + b"\r\n\r\n"))
    assert failure(server.url, max_bytes=1000).kind in ("too_large", "transport")
    assert server.served == [], "it hung up before it had read 64 MiB"


def test_no_body_is_read_when_none_is_wanted(serving: Serving) -> None:
    server = serving(endless(OK + b"Content-Length: 99999999999\r\n\r\n", b"x" * 65536))
    assert fetch(server.url, max_bytes=0).code == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        OK + b"Content-Le",
        OK + b"Content-Length: 10\r\n\r\nfive!",
        OK + b"Content-Length: 10\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n",
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabcde\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"\x00\xff" * 100,
        OK + b"X: " + b"y" * 70000 + b"\r\n\r\n",
    ],
)
def test_a_broken_answer_is_a_transport_error(serving: Serving, answer: bytes) -> None:
    error = failure(serving(answer).url)
    assert error.kind == "transport"
    assert "Traceback" not in str(error)
    assert "/" not in str(error).replace("HTTP/1.1", "")


@pytest.mark.parametrize(
    "line",
    [b"HTTP/1.1 099 Low", b"HTTP/1.1 1000 High", b"HTTP/1.1 2 Short", b"HTTP/1.1", b"HTTP/2 200 OK",
     b"HTTP/1.1 2\x0000 OK", b"<html>", b"HTTP/1.1 200 " + b"x" * 70_000, "HTTP/1.1 ٢٠٠ OK".encode(),
     OK + b"X: y\r\n" * 101],
)  # fmt: skip
def test_a_callback_s_answer_that_is_not_http_is_no_answer(serving: Serving, line: bytes) -> None:
    assert failure(serving(line + b"\r\n\r\n").url, method="POST", body=b"{}", max_bytes=0).kind == "transport"


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 \r\n\r\n", 200), (b"HTTP/1.1 200\r\n\r\n", 200), (b"HTTP/1.0 204 x\r\n\r\n", 204),
        (b"HTTP/1.1 101 Other\r\nUpgrade: x\r\n\r\n", 101), (b"HTTP/1.1 999 x\r\n\r\n", 999),
        (OK + b"X: a\0b\r\n\r\n", 200), (OK + b"Content-Length: -1\r\n\r\n", 200),
        (OK + b"Content-Length: 5\r\nContent-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\nzzz", 200),
    ],
)  # fmt: skip
def test_a_callback_is_answered_by_a_whole_head(serving: Serving, answer: bytes, status: int) -> None:
    assert fetch(serving(answer).url, method="POST", body=b"{}", max_bytes=0).code == status


@pytest.mark.parametrize("size", [2, 16 << 20])
def test_an_answer_that_comes_before_the_request_is_read_counts(serving: Serving, size: int) -> None:
    server = serving(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n", read_first=False)  # and then it resets
    assert fetch(server.url, method="POST", body=bytes(size)).code == 413


@pytest.mark.parametrize(
    ("name", "value"), [("X", "a\r\nY: z"), ("X", "a\0"), ("X", "€"), ("X\r\nY", "z"), ("X Y", "z")]
)
def test_a_header_cannot_inject(serving: Serving, name: str, value: str) -> None:
    server = serving(OK + b"Content-Length: 0\r\n\r\n")
    assert failure(server.url, headers={name: value}).kind == "address"
    assert server.heads == []


def test_a_reset_is_a_transport_error(serving: Serving) -> None:
    def reset(connection: socket.socket) -> None:
        connection.sendall(OK + b"Content-Length: 100\r\n\r\nx")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    assert failure(serving(reset).url).kind == "transport"


def test_no_socket_is_left_open(serving: Serving) -> None:
    ended = threading.Semaphore(0)

    def serve(connection: socket.socket) -> None:
        connection.sendall(OK + b"Content-Length: 100\r\n\r\nx" * 2)
        with contextlib.suppress(ConnectionError):
            while connection.recv(100):
                pass
        ended.release()

    server = serving(serve)
    fetch(server.url, max_bytes=0)
    failure(server.url, max_bytes=10)
    assert ended.acquire(timeout=5)
    assert ended.acquire(timeout=5)


# --- https ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout key.pem -out cert.pem"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True, timeout=60)
    return folder


@pytest.fixture
def secure(serving: Serving, certificate: Path) -> RawServer:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            server.heads.append(wrapped.recv(65536))
            wrapped.sendall(OK + b"Content-Length: 6\r\n\r\nsecret")

    server: RawServer = serving(serve, read_first=False)
    return server


def test_a_self_signed_certificate_is_refused(secure: RawServer) -> None:
    error = failure(secure.url.replace("http:", "https:"))
    assert error.kind == "transport"
    assert "certificate" in str(error)
    assert secure.heads == []


def test_a_trusted_certificate_is_taken_for_its_name_only(
    secure: RawServer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    astera_lite._tls_context.cache_clear()
    url = secure.url.replace("http:", "https:")
    for host in ("127.0.0.1", "localhost"):
        assert fetch(url.replace("127.0.0.1", host)).body == b"secret"
    lookups(monkeypatch, ["127.0.0.1"])
    assert "certificate" in str(failure(url.replace("127.0.0.1", "other.example")))
    monkeypatch.setattr(astera_lite, "resolve", lambda *where: [ipaddress.ip_address("127.0.0.1")])
    assert fetch(url.replace("127.0.0.1", "localhost.")).body == b"secret"  # a certificate's names have no last dot


def test_the_deadline_is_over_an_upload_that_is_read_slowly(
    serving: Serving, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem"))
    astera_lite._tls_context.cache_clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    gone = threading.Event()

    taken = 0

    def serve(connection: socket.socket) -> None:
        nonlocal taken
        with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as wrapped:
            while size := len(wrapped.recv(65536)):
                taken += size
                gone.wait(0.002)

    server = serving(serve, read_first=False)
    url = server.url.replace("http:", "https:")
    error = failure(url, method="POST", body=bytes(64 << 20), timeout=1)
    assert error.kind == "timeout"
    assert 0 < taken < 64 << 20
    gone.set()
