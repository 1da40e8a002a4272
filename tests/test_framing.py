"""Framing (RFC 9112) as a hostile client tries it: raw bytes to a running server; its parser beside an honest one."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from honest import Request, read_requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import ECHO, Running, running

from astera_lite import Head, RequestParser, WireError

MAX_HEADER, MAX_URL, MAX_BODY = 1024, 256, 1000
HOST = b"Host: localhost\r\n"
NEXT = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
JSON = b"Content-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    limits = {"max_header": MAX_HEADER, "max_url": MAX_URL, "max_body": MAX_BODY}
    with running(tmp_path_factory.mktemp("framing"), {"echo": ECHO}, **limits) as it:
        yield it


class Case(NamedTuple):
    """Bytes, the status codes that answer them, and whether the server closes then."""

    raw: bytes
    codes: list[int]
    closes: bool


def get(*lines: bytes, line: bytes = b"GET /health HTTP/1.1", host: bytes = HOST) -> bytes:
    return line + b"\r\n" + host + b"".join(item + b"\r\n" for item in lines) + b"\r\n"


def post(body: bytes, *lines: bytes, version: bytes = b"1.1") -> bytes:
    return get(JSON[:-2], *lines, line=b"POST /api/publishing/echo HTTP/" + version) + body


def chunked(body: bytes) -> bytes:
    return post(body, b"Transfer-Encoding: chunked")


def sized(size: int) -> bytes:
    """A JSON string that is so many bytes."""
    return b'"' + b"a" * (size - 2) + b'"'


def url(size: int) -> bytes:
    return get(line=b"GET /health?" + b"a" * (size - 8) + b" HTTP/1.1")


def header_block(size: int) -> bytes:
    """A request whose header lines, with the line end before them, are so many bytes."""
    return get(b"X: " + b"a" * (size - 2 - len(HOST) - 5))


def open_(raw: bytes, *codes: int) -> Case:
    return Case(raw, list(codes) or [200], False)


def ends(raw: bytes, *codes: int) -> Case:
    """Answered, and then the connection is closed; what stands behind is not answered."""
    return Case(raw + NEXT, list(codes) or [200], True)


def refused(raw: bytes, code: int = 400) -> Case:
    """Refused: neither what is behind it nor a part of it is taken for a request."""
    return Case(raw + NEXT * 2, [code], True)


ONE = b"1\r\n1\r\n0\r\n\r\n"  # the chunked body 1
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"

CASES: dict[str, Case] = {
    # --- request line ---
    "plain": open_(get()),
    "HTTP/1.2 is answered as HTTP/1.1": open_(get(line=b"GET /health HTTP/1.2")),
    "HTTP/1.9": open_(get(line=b"GET /health HTTP/1.9")),
    "HTTP/1.0": ends(get(line=b"GET /health HTTP/1.0")),
    "HTTP/1.0 without Host": ends(get(line=b"GET /health HTTP/1.0", host=b"")),
    "HTTP/1.0 kept alive": open_(get(b"Connection: keep-alive", line=b"GET /health HTTP/1.0")),
    "HTTP/0.9": refused(b"GET /health\r\n\r\n"),
    "HTTP/0.9 in words": refused(get(line=b"GET /health HTTP/0.9"), 505),
    "HTTP/2 preface": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/2": refused(get(line=b"GET /health HTTP/2"), 400),
    "HTTP/2.0": refused(get(line=b"GET /health HTTP/2.0"), 505),
    "HTTP/3.0": refused(get(line=b"GET /health HTTP/3.0"), 505),
    "HTTP/1.10": refused(get(line=b"GET /health HTTP/1.10")),
    "HTTP/11.1": refused(get(line=b"GET /health HTTP/11.1")),
    "HTTP/1,1": refused(get(line=b"GET /health HTTP/1,1")),
    "HTTP/1.": refused(get(line=b"GET /health HTTP/1.")),
    "HTTP/1": refused(get(line=b"GET /health HTTP/1")),
    "HTTP/+1.1": refused(get(line=b"GET /health HTTP/+1.1")),
    "HTTP /1.1": refused(get(line=b"GET /health HTTP /1.1")),
    "http/1.1": refused(get(line=b"GET /health http/1.1")),
    "Http/1.1": refused(get(line=b"GET /health Http/1.1")),
    "HTTPS/1.1": refused(get(line=b"GET /health HTTPS/1.1")),
    "ICY/1.1": refused(get(line=b"GET /health ICY/1.1")),
    "no version": refused(get(line=b"GET /health")),
    "no target": refused(get(line=b"GET HTTP/1.1")),
    "no method": refused(get(line=b" /health HTTP/1.1")),
    "tabs": refused(get(line=b"GET\t/health\tHTTP/1.1")),
    "tab before the version": refused(get(line=b"GET /health\tHTTP/1.1")),
    "vertical tab": refused(get(line=b"GET\x0b/health HTTP/1.1")),
    "two blanks": refused(get(line=b"GET  /health HTTP/1.1")),
    "two blanks before the version": refused(get(line=b"GET /health  HTTP/1.1")),
    "blank at the end": refused(get(line=b"GET /health HTTP/1.1 ")),
    "blank at the beginning": refused(b" " + get()),
    "byte order mark": refused(b"\xef\xbb\xbf" + get()),
    "no-break space": refused(get(line=b"GET\xa0/health HTTP/1.1")),
    "blank in the target": refused(get(line=b"GET /health a HTTP/1.1")),
    "a request in the target": refused(get(line=b"GET /health HTTP/1.1 /a HTTP/1.1")),
    "response": refused(b"HTTP/1.1 200 OK\r\n\r\n"),
    "TLS": refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
    "a SOCKS greeting": refused(b"\x05\x01\x00\r\n\r\n"),
    "an SSH greeting": refused(b"SSH-2.0-x\r\n\r\n"),
    "one empty line before": open_(b"\r\n" + get()),
    "two empty lines before": refused(b"\r\n\r\n" + get()),
    "bare LF before": refused(b"\n" + get()),
    "bare CR before": refused(b"\r" + get()),
    # --- methods ---
    "HEAD": open_(get(line=b"HEAD /health HTTP/1.1")),
    "OPTIONS": open_(get(line=b"OPTIONS /health HTTP/1.1"), 204),
    "OPTIONS *": open_(get(line=b"OPTIONS * HTTP/1.1"), 204),
    "GET *": refused(get(line=b"GET * HTTP/1.1")),
    "OPTIONS **": refused(get(line=b"OPTIONS ** HTTP/1.1")),
    "TRACE": ends(get(line=b"TRACE /health HTTP/1.1"), 405),
    "method not allowed": ends(get(line=b"DELETE /health HTTP/1.1"), 405),
    "method not allowed, with a body": ends(get(b"Content-Length: 40", line=b"PUT /health HTTP/1.1") + b"a" * 40, 405),
    "CONNECT": refused(get(line=b"CONNECT localhost:80 HTTP/1.1"), 405),
    "CONNECT of a path": refused(get(line=b"CONNECT / HTTP/1.1"), 405),
    "CONNECT with a tunnel": refused(get(line=b"CONNECT localhost:80 HTTP/1.1") + SMUGGLED, 405),
    "QUERY": ends(get(b"Content-Length: 40", line=b"QUERY /health HTTP/1.1") + b"a" * 40, 405),
    "PROPFIND": ends(get(line=b"PROPFIND /health HTTP/1.1"), 405),
    "unknown method": refused(get(line=b"BREW /health HTTP/1.1"), 501),
    "get": refused(get(line=b"get /health HTTP/1.1"), 501),
    "GETGET": refused(get(line=b"GETGET /health HTTP/1.1"), 501),
    "method too long": refused(get(line=b"G" * 100 + b" /health HTTP/1.1"), 501),
    "method with a colon": refused(get(line=b"GET: /health HTTP/1.1")),
    "method with NUL": refused(get(line=b"GE\0T /health HTTP/1.1")),
    "method of obs-text": refused(get(line=b"G\xcbT /health HTTP/1.1")),
    "method in quotes": refused(get(line=b'"GET" /health HTTP/1.1')),
    # --- target ---
    "absolute form": open_(get(line=b"GET http://localhost/health HTTP/1.1")),
    "absolute form in capitals": open_(get(line=b"GET HTTP://LOCALHOST/health HTTP/1.1")),
    "absolute form with a port": open_(get(line=b"GET http://localhost:80/health HTTP/1.1")),
    "absolute form of https": open_(get(line=b"GET https://localhost/health HTTP/1.1")),
    "absolute form without path": open_(get(line=b"OPTIONS http://localhost HTTP/1.1"), 204),
    "absolute form beside another Host": open_(get(line=b"GET http://localhost/health HTTP/1.1", host=b"Host: a\r\n")),
    "absolute form of another host": open_(get(line=b"GET http://other/health HTTP/1.1"), 421),
    "absolute form without Host": refused(get(line=b"GET http://localhost/health HTTP/1.1", host=b"")),
    "absolute form with a bad Host": refused(get(line=b"GET http://localhost/ HTTP/1.1", host=b"Host: a b\r\n")),
    "absolute form in HTTP/1.0": ends(get(line=b"GET http://localhost/health HTTP/1.0", host=b"")),
    "userinfo": refused(get(line=b"GET http://a@localhost/health HTTP/1.1")),
    "userinfo with password": refused(get(line=b"GET http://a:b@localhost/health HTTP/1.1")),
    "empty userinfo": refused(get(line=b"GET http://@localhost/health HTTP/1.1")),
    "empty host": refused(get(line=b"GET http:///health HTTP/1.1")),
    "port without host": refused(get(line=b"GET http://:80/health HTTP/1.1")),
    "port 99999": refused(get(line=b"GET http://localhost:99999/health HTTP/1.1")),
    "port 65536": refused(get(line=b"GET http://localhost:65536/health HTTP/1.1")),
    "port 65535": open_(get(line=b"GET http://localhost:65535/health HTTP/1.1")),
    "port -1": refused(get(line=b"GET http://localhost:-1/health HTTP/1.1")),
    "port with letters": refused(get(line=b"GET http://localhost:8a/health HTTP/1.1")),
    "backslash in the host": refused(get(line=b"GET http://localhost\\a/health HTTP/1.1")),
    "one slash": refused(get(line=b"GET http:/localhost/health HTTP/1.1")),
    "no slash": refused(get(line=b"GET http:health HTTP/1.1")),
    "ftp": refused(get(line=b"GET ftp://localhost/health HTTP/1.1")),
    "file": refused(get(line=b"GET file:///etc/passwd HTTP/1.1")),
    "scheme without name": refused(get(line=b"GET ://localhost/health HTTP/1.1")),
    "authority form of a GET": refused(get(line=b"GET localhost:80 HTTP/1.1")),
    "relative": refused(get(line=b"GET health HTTP/1.1")),
    "only a query": refused(get(line=b"GET ?a HTTP/1.1")),
    "dots": refused(get(line=b"GET ../health HTTP/1.1")),
    "two slashes": open_(get(line=b"GET //health HTTP/1.1"), 404),
    "dot segments are not resolved": open_(get(line=b"GET /a/../health HTTP/1.1"), 404),
    "fragment": refused(get(line=b"GET /health#a HTTP/1.1")),
    "fragment behind the query": refused(get(line=b"GET /health?a#b HTTP/1.1")),
    "fragment of an absolute form": refused(get(line=b"GET http://localhost/health#a HTTP/1.1")),
    "encoded fragment": open_(get(line=b"GET /health?%23a HTTP/1.1")),
    "UTF-8": refused(get(line=b"GET /h\xc3\xa9alth HTTP/1.1")),
    "latin-1": refused(get(line=b"GET /h\xe9alth HTTP/1.1")),
    "NUL in the target": refused(get(line=b"GET /health\0 HTTP/1.1")),
    "DEL in the target": refused(get(line=b"GET /health\x7f HTTP/1.1")),
    "escape in the target": refused(get(line=b"GET /health\x1b[2J HTTP/1.1")),
    "%00": open_(get(line=b"GET /health%00 HTTP/1.1"), 404),
    "%0d%0a": open_(get(line=b"GET /a%0d%0aX:%20b HTTP/1.1"), 404),
    "%zz": open_(get(line=b"GET /a%zz HTTP/1.1"), 404),
    "CR in the target": refused(get(line=b"GET /health\rX HTTP/1.1")),
    "LF in the target": refused(get(line=b"GET /health\nX HTTP/1.1")),
    # --- Host ---
    "no Host": refused(get(host=b"")),
    "empty Host": refused(get(host=b"Host:\r\n")),
    "blank Host": refused(get(host=b"Host: \t \r\n")),
    "two Hosts": refused(get(b"Host: other")),
    "two equal Hosts": refused(get(b"Host: localhost")),
    "two Hosts, one in capitals": refused(get(b"HOST: localhost")),
    "two Hosts in HTTP/1.0": refused(get(b"Host: localhost", line=b"GET /health HTTP/1.0")),
    "two Hosts, apart": refused(get(b"X: 1", b"Y: 2", b"Host: localhost")),
    "list of Hosts": refused(get(host=b"Host: localhost, localhost\r\n")),
    "Host with userinfo": refused(get(host=b"Host: a@localhost\r\n")),
    "Host with a blank": refused(get(host=b"Host: local host\r\n")),
    "Host with a path": refused(get(host=b"Host: localhost/a\r\n")),
    "Host with a scheme": refused(get(host=b"Host: http://localhost\r\n")),
    "Host with a query": refused(get(host=b"Host: localhost?a\r\n")),
    "Host longer than a name can be": refused(get(host=b"Host: " + b"a" * 262 + b"\r\n")),
    "Host with port": open_(get(host=b"Host: localhost:1\r\n")),
    "Host with the last port": open_(get(host=b"Host: localhost:65535\r\n")),
    "Host with port out of range": refused(get(host=b"Host: localhost:65536\r\n")),
    "Host with port 99999": refused(get(host=b"Host: localhost:99999\r\n")),
    "Host with a long port": refused(get(host=b"Host: localhost:000080\r\n")),
    "Host with a negative port": refused(get(host=b"Host: localhost:-1\r\n")),
    "Host with a port of letters": refused(get(host=b"Host: localhost:http\r\n")),
    "Host with two ports": refused(get(host=b"Host: localhost:1:2\r\n")),
    "Host with unicode digits": refused(get(host=b"Host: localhost:\xd9\xa1\r\n")),
    "Host only a port": refused(get(host=b"Host: :80\r\n")),
    "Host IPv4": open_(get(host=b"Host: 127.0.0.1:80\r\n")),
    "Host IPv6": open_(get(host=b"Host: [::1]:80\r\n")),
    "Host IPv6 without brackets": refused(get(host=b"Host: ::1\r\n")),
    "Host IPv6 that is none": refused(get(host=b"Host: [::1::2]\r\n")),
    "Host IPv6 not closed": refused(get(host=b"Host: [::1\r\n")),
    "Host of only a bracket": refused(get(host=b"Host: []\r\n")),
    "Host with a half escape": refused(get(host=b"Host: local%6\r\n")),
    "Host of obs-text": refused(get(host=b"Host: caf\xe9\r\n")),
    "Host with NUL": refused(get(host=b"Host: localhost\0\r\n")),
    "Host of another name": open_(get(host=b"Host: evil.example\r\n"), 421),
    "Host behind blanks": open_(get(host=b"Host: \t localhost \t\r\n")),
    "Host folded": refused(get(host=b"Host:\r\n localhost\r\n")),
    # --- header lines ---
    "bare LF everywhere": refused(get().replace(b"\r\n", b"\n")),
    "bare CR everywhere": refused(get().replace(b"\r\n", b"\r")),
    "bare LF behind the request line": refused(b"GET /health HTTP/1.1\n" + HOST + b"\r\n"),
    "bare CR behind the request line": refused(b"GET /health HTTP/1.1\r" + HOST + b"\r\n"),
    "bare LF behind a header": refused(get(b"X: 1\nY: 2")),
    "bare LF as the empty line": refused(b"GET /health HTTP/1.1\r\n" + HOST + b"\n"),
    "LF LF": refused(b"GET /health HTTP/1.1\r\nHost: localhost\n\n"),
    "LF CR LF": refused(b"GET /health HTTP/1.1\r\nHost: localhost\n\r\n"),
    "CR CR LF": refused(b"GET /health HTTP/1.1\r\nHost: localhost\r\r\n\r\n"),
    "bare CR in a value": refused(get(b"X: 1\rY: 2")),
    "bare CR in a name": refused(get(b"X\rY: 2")),
    "CR that hides a length": refused(post(b"1", b"X: 1\rContent-Length: 1")),
    "LF that hides a length": refused(post(b"1", b"X: 1\nContent-Length: 1")),
    "obs-fold": refused(get(b"X: 1", b" 2")),
    "obs-fold by a tab": refused(get(b"X: 1", b"\t2")),
    "obs-fold of a blank line": refused(get(b"X: 1", b" ")),
    "obs-fold before any header": refused(get(host=b" X: 1\r\n" + HOST)),
    "obs-fold of a length": refused(post(b"1", b"Content-Length:", b" 1")),
    "obs-fold of chunked": refused(post(ONE, b"Transfer-Encoding:", b" chunked")),
    "blank before the colon": refused(get(b"X : 1")),
    "tab before the colon": refused(get(b"X\t: 1")),
    "blank before the colon of a length": refused(post(b"1", b"Content-Length : 1")),
    "blank before the colon of chunked": refused(post(ONE, b"Transfer-Encoding : chunked")),
    "line without colon": refused(get(b"X")),
    "line without colon hides a length": refused(post(b"1", b"X", b"Content-Length: 1")),
    "empty name": refused(get(b": 1")),
    "only a colon": refused(get(b":")),
    **{
        f"name with {byte!r}": refused(get(b"X" + byte + b"Y: 1"))
        for byte in (
            b"\0", b"\x01", b"\x0b", b"\x0c", b"\x1f", b"\x7f", b"\x80", b"\xff", b" ", b'"', b"(", b")", b",", b"/",
            b";", b"<", b"=", b">", b"?", b"@", b"[", b"\\", b"]", b"{", b"}",
        )
    },
    "name of every allowed sign": open_(get(b"!#$%&'*+-.^_`|~: 1")),
    **{
        f"value with {byte!r}": refused(get(b"X: a" + byte + b"b"))
        for byte in (b"\0", b"\x08", b"\x0b", b"\x0c", b"\x7f")
    },
    "value of obs-text": open_(get(b"X: \x80\xff")),
    "value with a tab": open_(get(b"X: a\tb")),
    "empty value": open_(get(b"X:")),
    "many small headers": open_(get(*[b"a:"] * 200)),
    "too many small headers": refused(get(*[b"a:"] * 300), 431),
    "one huge header": refused(get(b"X: " + b"a" * 5000), 431),
    "one huge name": refused(get(b"a" * 5000 + b": 1"), 431),
    "header block at the limit": open_(header_block(MAX_HEADER)),
    "header block one over": refused(header_block(MAX_HEADER + 1), 431),
    "URL at the limit": open_(url(MAX_URL)),
    "URL one over": refused(url(MAX_URL + 1), 414),
    "URL far over": refused(url(9000), 414),
    # --- Connection and Upgrade ---
    "close": ends(get(b"Connection: close")),
    "CLOSE": ends(get(b"Connection: CLOSE")),
    "close in a list": ends(get(b"Connection: x ,\tclose")),
    "close in two lines": ends(get(b"Connection: x", b"Connection: close")),
    "close and keep-alive": ends(get(b"Connection: keep-alive, close")),
    "keep-alive": open_(get(b"Connection: keep-alive")),
    "closed is not close": open_(get(b"Connection: closed")),
    "close behind a no-break space is not close": open_(get(b"Connection: \xa0close")),
    "Connection names the length": open_(post(b"1", b"Connection: Content-Length", b"Content-Length: 1")),
    "h2c": open_(get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")),
    "websocket": open_(get(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")),
    "Proxy-Connection means nothing": open_(get(b"Proxy-Connection: close")),
    # --- Content-Length ---
    "length": open_(post(b"1", b"Content-Length: 1")),
    "length 0": open_(get(b"Content-Length: 0")),
    "no length is no body": open_(post(b"") + get(), 200, 200),
    "length with leading zeros": open_(post(b"1", b"Content-Length: 0001")),
    "length with forty leading zeros": open_(post(b"1", b"Content-Length: " + b"0" * 40 + b"1")),
    "length behind a tab": open_(post(b"1", b"Content-Length:\t1\t")),
    "GET with a body": open_(get(b"Content-Length: %d" % len(SMUGGLED)) + SMUGGLED),
    "GET with a chunked body": open_(get(b"Transfer-Encoding: chunked") + ONE),
    "HEAD with a body": open_(get(b"Content-Length: 3", line=b"HEAD /health HTTP/1.1") + b"abc"),
    "body that is a request": open_(post(SMUGGLED, b"Content-Length: %d" % len(SMUGGLED)), 400),
    "body of a path that there is not": open_(
        get(b"Content-Length: %d" % len(SMUGGLED), line=b"POST /no HTTP/1.1") + SMUGGLED, 404
    ),
    "body at the limit": open_(post(sized(MAX_BODY), b"Content-Length: %d" % MAX_BODY)),
    "body one over": refused(post(sized(MAX_BODY + 1), b"Content-Length: %d" % (MAX_BODY + 1)), 413),
    "length of 18 digits": refused(post(b"1", b"Content-Length: 999999999999999999"), 413),
    "length of 2 to the 64": refused(post(b"1", b"Content-Length: 18446744073709551617"), 413),
    "length of 900 digits": refused(post(b"1", b"Content-Length: " + b"9" * 900), 413),
    **{
        f"length {value!r}": refused(post(b"11111", b"Content-Length: " + value))
        for value in (
            b"", b"5, 5", b"5,5", b"5, 6", b"5,", b",5", b"+5", b"-5", b"-0", b"0x5", b"5 5", b"5;", b"5.0", b"5e0",
            b"1_0",
            b"five", b'"5"', b"\xb2", b"\xd9\xa5", b"\xef\xbc\x95", b"5\t5", b"\x0b5", b"5\x0c", b"5\xa0", b"5\0",
            b"5; q=1", b"5 ,5", b"chunked",
        )
    },
    "length with a trailing blank": open_(post(b"1", b"Content-Length: 1 ")),
    "two lengths": refused(post(b"11", b"Content-Length: 1", b"Content-Length: 2")),
    "two equal lengths": refused(post(b"1", b"Content-Length: 1", b"Content-Length: 1")),
    "two lengths, one in capitals": refused(post(b"1", b"Content-Length: 1", b"CONTENT-LENGTH: 1")),
    "two lengths, apart": refused(post(b"1", b"Content-Length: 1", b"X: 1", b"Content-Length: 0")),
    "length of another name": open_(post(b"", b"Content_Length: 5", b"Content-Length: 0")),
    # --- Transfer-Encoding ---
    "chunked": open_(chunked(ONE)),
    "CHUNKED": open_(post(ONE, b"Transfer-Encoding: CHUNKED")),
    "chunked behind a tab": open_(post(ONE, b"Transfer-Encoding:\tchunked \t")),
    "CL.TE": refused(post(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: 6", b"Transfer-Encoding: chunked")),
    "TE.CL": refused(post(b"0\r\n\r\n" + SMUGGLED, b"Transfer-Encoding: chunked", b"Content-Length: 3")),
    "TE.CL 0": refused(post(ONE, b"Transfer-Encoding: chunked", b"Content-Length: 0")),
    "TE in HTTP/1.0": refused(post(ONE, b"Transfer-Encoding: chunked", version=b"1.0")),
    "TE and CL in HTTP/1.0": refused(post(ONE, b"Transfer-Encoding: chunked", b"Content-Length: 5", version=b"1.0")),
    "TE.TE": refused(post(ONE, b"Transfer-Encoding: chunked", b"Transfer-Encoding: cow")),
    "TE.TE, equal": refused(post(ONE, b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    "TE.TE, in capitals": refused(post(ONE, b"Transfer-Encoding: chunked", b"TRANSFER-ENCODING: identity")),
    "TE.TE, another first": refused(post(ONE, b"Transfer-Encoding: cow", b"Transfer-Encoding: chunked")),
    "gzip, chunked": refused(post(ONE, b"Transfer-Encoding: gzip, chunked")),
    "identity, chunked": refused(post(ONE, b"Transfer-Encoding: identity, chunked")),
    **{
        f"coding {value!r}": refused(post(ONE, b"Transfer-Encoding: " + value))
        for value in (
            b"", b"gzip", b"identity", b"chunked, gzip", b"chunked, identity", b"chunked,chunked", b"chunked,",
            b",chunked",
            b", chunked", b"chunked;q=1", b"chunked; a=b", b"xchunked", b"chunkedx", b"chunke", b'"chunked"',
            b"'chunked'",
            b"\x0bchunked", b"\x0cchunked", b"\xa0chunked", b"chunked\xa0", b"chunked\0", b"\0chunked", b"chun ked",
            b"chunked chunked", b"chunked\tchunked", b"x chunked", b"[chunked]", b"chunk\xe9d", b"1",
        )
    },
    "coding of another name": open_(post(b"1", b"Transfer_Encoding: chunked", b"Content-Length: 1")),
    "TE header means nothing": open_(post(b"1", b"TE: chunked, trailers", b"Content-Length: 1")),
    "Content-Encoding is no framing": Case(post(b"1", b"Content-Encoding: gzip", b"Content-Length: 1"), [415], False),
    # --- chunks ---
    "chunk size in hex": open_(chunked(b"a\r\n1234567890\r\n0\r\n\r\n")),
    "chunk size in capital hex": open_(chunked(b"A\r\n1234567890\r\n0\r\n\r\n")),
    "chunk size with leading zeros": open_(chunked(b"0001\r\n1\r\n0000\r\n\r\n")),
    "chunks of one byte": open_(chunked(b"1\r\n1\r\n" * 9 + b"0\r\n\r\n")),
    "extension": open_(chunked(b"1;a\r\n1\r\n0;b=c\r\n\r\n")),
    "extension in quotes": open_(chunked(b'1;a="b;\\"c\xe9"\r\n1\r\n0\r\n\r\n')),
    "extension between blanks": open_(chunked(b"1 ; a = b\t;c\r\n1\r\n0\r\n\r\n")),
    **{
        f"chunk size {size!r}": refused(chunked(size + b"\r\n11111\r\n0\r\n\r\n"))
        for size in (
            b"", b"g", b"+5", b"-5", b"0x5", b"0X5", b"x5", b" 5", b"\t5", b"5 ", b"5\t", b"5 5", b"5,", b"5,5",
            b"5:a", b"5.0",
            b"1_0", b"5h", b"\xb2", b"\xef\xbc\x95", b"5\0", b"\x0b5", b"5\xa0", b"5;", b"5;;a", b"5;=a", b"5;a=",
            b"5;a b",
            b"5; ", b"5;\0", b"5;a=\x7f", b"5;a\x0b", b'5;a="b', b'5;a="b"c', b'5;a="\\"', b"5;a=\xe9", b"5;a\nb",
            b"5;a\rb",
            b'5;a="\n"', b'5;a="\r"', b"5\r", b"5\n", b"fffffffffffffffff", b"10000000000000005", b"5;" + b"a" * 5000,
        )
    },
    "chunk size ended by LF": refused(chunked(b"5\n11111\r\n0\r\n\r\n")),
    "chunk size ended by CR": refused(chunked(b"5\r11111\r\n0\r\n\r\n")),
    "chunk ended by LF": refused(chunked(b"5\r\n11111\n0\r\n\r\n")),
    "chunk ended by CR": refused(chunked(b"5\r\n11111\r0\r\n\r\n")),
    "chunk ended by nothing": refused(chunked(b"5\r\n111110\r\n\r\n")),
    "chunk longer than it says": refused(chunked(b"4\r\n11111\r\n0\r\n\r\n")),
    "chunk shorter than it says": refused(chunked(b"6\r\n11111\r\n0\r\n\r\n")),
    "chunk too large": refused(chunked(b"3e9\r\n"), 413),
    "chunk size of 60 bits": refused(chunked(b"fffffffffffffff\r\n"), 413),
    "chunks at the limit": open_(
        chunked(b"1f4\r\n" + sized(1000)[:500] + b"\r\n1f4\r\n" + sized(1000)[500:] + b"\r\n0\r\n\r\n")
    ),
    "chunks one over": refused(chunked(b"1f4\r\n" + b"1" * 500 + b"\r\n1f5\r\n"), 413),
    # --- trailers ---
    "trailer": open_(chunked(b"1\r\n1\r\n0\r\nX: 1\r\nY: 2\r\n\r\n")),
    "length in the trailer": open_(chunked(b"1\r\n1\r\n0\r\nContent-Length: 400\r\n\r\n")),
    "coding in the trailer": open_(chunked(b"1\r\n1\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n")),
    "Host in the trailer": open_(chunked(b"1\r\n1\r\n0\r\nHost: other\r\n\r\n")),
    "close in the trailer means nothing": open_(chunked(b"1\r\n1\r\n0\r\nConnection: close\r\n\r\n")),
    "request in the trailer": refused(chunked(b"1\r\n1\r\n0\r\n" + SMUGGLED)),
    "trailer ended by LF": refused(chunked(b"1\r\n1\r\n0\r\n\n")),
    "trailer with a bare LF": refused(chunked(b"1\r\n1\r\n0\r\nX: 1\nY: 2\r\n\r\n")),
    "trailer with a bare CR": refused(chunked(b"1\r\n1\r\n0\r\nX: 1\rY: 2\r\n\r\n")),
    "trailer folded": refused(chunked(b"1\r\n1\r\n0\r\nX: 1\r\n 2\r\n\r\n")),
    "trailer without colon": refused(chunked(b"1\r\n1\r\n0\r\nX\r\n\r\n")),
    "trailer with a blank before the colon": refused(chunked(b"1\r\n1\r\n0\r\nX : 1\r\n\r\n")),
    "trailer with NUL": refused(chunked(b"1\r\n1\r\n0\r\nX: \0\r\n\r\n")),
    "trailer too long": refused(chunked(b"1\r\n1\r\n0\r\n" + b"X: 1\r\n" * 300 + b"\r\n")),
    # --- HTTP/1.0 bodies ---
    "HTTP/1.0 with a length": ends(post(b"1", b"Content-Length: 1", version=b"1.0")),
    "HTTP/1.0 POST without length has no body": ends(post(b"1", version=b"1.0")),
    "HTTP/1.0 PUT without length has no body": ends(get(line=b"PUT /health HTTP/1.0") + b"1", 405),
    # --- Expect ---
    "expectation, the body at once": open_(post(b"1", b"Expect: 100-continue", b"Content-Length: 1")),
    "expectation in capitals": open_(post(b"1", b"EXPECT: 100-CONTINUE", b"Content-Length: 1")),
    "expectation without body": open_(get(b"Expect: 100-continue")),
    "expectation of an empty body": open_(get(b"Expect: 100-continue", b"Content-Length: 0")),
    "expectation in HTTP/1.0": ends(post(b"1", b"Expect: 100-continue", b"Content-Length: 1", version=b"1.0")),
    "another expectation": refused(post(b"1", b"Expect: a-miracle", b"Content-Length: 1"), 417),
    "empty expectation": refused(post(b"1", b"Expect:", b"Content-Length: 1"), 417),
    "two expectations": refused(post(b"1", *[b"Expect: 100-continue"] * 2, b"Content-Length: 1"), 417),
    "expectation with a parameter": refused(post(b"1", b"Expect: 100-continue; a", b"Content-Length: 1"), 417),
    "expectation of too much": refused(post(b"", b"Expect: 100-continue", b"Content-Length: 1001"), 413),
    # --- pipelining ---
    "good, good": open_(get() * 2, 200, 200),
    "in order": open_(get(line=b"GET /a HTTP/1.1") + get() + post(b"1", b"Content-Length: 1"), 404, 200, 200),
    "chunked, then good": open_(chunked(ONE) + get(), 200, 200),
    "an empty line before each": open_((b"\r\n" + get()) * 3, 200, 200, 200),
    "good, bad": Case(get() + b"nonsense\r\n\r\n" + NEXT, [200, 400], True),
    "bad, good": refused(b"nonsense\r\n\r\n" + get()),
    "good, bad length, good": Case(get() + post(b"1", b"Content-Length: +1") + NEXT, [200, 400], True),
    "body, two empty lines, good": Case(post(b"1", b"Content-Length: 1") + b"\r\n\r\n" + NEXT, [200, 400], True),
    "body longer than its length": Case(post(b"11", b"Content-Length: 1") + NEXT, [200, 501], True),
    "close, good": ends(get(b"Connection: close")),
    "thirty": open_(get() * 30, *[200] * 30),
}  # fmt: skip


def codes(data: bytes) -> list[int]:
    """The status codes of the answers in some bytes; nothing may be left over."""
    found = []
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        assert end, head
        status = re.match(rb"HTTP/1\.1 ([0-9]{3}) ", head)
        assert status, head
        found.append(int(status[1]))
        length = re.search(rb"\r\nContent-Length: ([0-9]+)", head)
        if length and data and not data.startswith(b"HTTP/1.1 "):  # such is the answer to HEAD
            body, data = data[: int(length[1])], data[int(length[1]) :]
            if int(status[1]) >= 400:
                assert json.loads(body)["status"] == int(status[1])
    return found


def exchange(server: Running, packets: list[bytes]) -> bytes:
    """Everything that comes back for some packets, until the server closes."""
    host, port = server.server.server_address[:2]
    with socket.create_connection((str(host), int(port)), timeout=10) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        data = bytearray()
        try:
            for packet in packets:
                sock.sendall(packet)
            while piece := sock.recv(1 << 16):
                data += piece
        except (BrokenPipeError, ConnectionResetError):  # a byte came after it had stopped to listen
            pass
        return bytes(data)


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 200


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bytes_are_answered_as_the_rfc_has_it_however_they_are_cut(server: Running, case: Case) -> None:
    wire = case.raw if case.closes else case.raw + LAST  # one that is kept answers one more, and closes as it asks
    expected = case.codes if case.closes else [*case.codes, 200]
    ways = [[wire], cut(wire, (len(wire) + 1) // 2)] + ([cut(wire, 1)] if len(wire) < 400 else [])
    for packets in ways:
        assert [code for code in codes(exchange(server, packets)) if code != 100] == expected


# --- the parser beside an honest one ---

FEW = settings(
    max_examples=1500, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


def mostly(good: list[bytes], bad: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of the good in nine of ten cases."""
    return st.integers(0, 9).flatmap(lambda n: st.sampled_from(bad if n == 9 else good))


LINE_ENDS = mostly([b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b" \r\n", b"\r\n\r\n", b"\r\n "])
METHODS = mostly([b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS"], [b"CONNECT", b"get", b"BREW", b"", b" GET", b"G\0T"])
TARGETS = mostly(
    [b"/", b"/a?b", b"http://localhost/a", b"*", b"/%00"],
    [b"", b"a", b"/a b", b"/#", b"http://", b"http:///", b"//", b"a:80", b"/\xe9", b"/\0", b"http://a@b/",
     b"/" + b"a" * 300],
)  # fmt: skip
VERSIONS = mostly([b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0"], [b"HTTP/1.2", b"HTTP/2.0", b"http/1.1", b"", b"HTTP/1.1 "])
HOSTS = mostly([b"Host: localhost", b"host:a:1"], [b"Host: a@b", b"Host:", b"Host : a", b"Host: a b", b"X: 1"])
FIELDS = mostly(
    [b"X: 1", b"Accept: */*", b"Y:", b"Connection: close", b"Z: \xe9", b"Expect: 100-continue"],
    [b"X : 1", b"X", b": 1", b" X: 1", b"\tY: 2", b"X: \0", b"X: 1\rY: 2", b"Host: b", b"X(: 1", b"",
     b"X: " + b"a" * 1100],
)  # fmt: skip
CODING = mostly(
    [b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED\t"],
    [
        b"Transfer-Encoding : chunked", b"Transfer-Encoding: chunked, chunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding: identity", b" Transfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"Content-Length: 3\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked;a", b"X: chunked",
    ],
)  # fmt: skip
LENGTH = mostly(
    [b"Content-Length: %d"],
    [
        b"Content-Length : %d", b"Content-Length: +%d", b"Content-Length: 0x%d", b"Content-Length: %d, %d",
        b"Content-Length: 0%d",
        b"Content-Length: %d\r\nContent-Length: %d", b"Content-Length: %d\r\nX: 1\r\ncontent-length: 0",
        b"Content-Length: 1%d",
        b"Content-Length: %d ", b"Content-Length: %d;", b"Content-Length:\x0b%d", b"Content-Length: -%d", b"X: %d",
    ],
)  # fmt: skip
BODIES = st.sampled_from([b"", b"a", b"hello", b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", SMUGGLED, NEXT, b"a" * 1001])
CHUNK_TAIL = mostly([b"", b"", b";a", b";a=b", b' ; a="b"'], [b";", b" ", b";\xe9", b';"', b";a=", b"\r", b";a\nb"])
CHUNK_SIZE = mostly(
    [b"%x", b"%X", b"0%x"], [b"+%x", b"0x%x", b" %x", b"%x0", b"-%x", b"", b"00000000000000000%x", b"g"]
)
CHUNK_END = mostly([b"\r\n"], [b"\n", b"\r", b"", b"\r\r\n", b"a\r\n"])
TRAILERS = mostly([b"", b"", b"X: 1\r\n", b"Content-Length: 5\r\n"], [b"X\r\n", b" X: 1\r\n", b"X: 1\n", b"\n", NEXT])


@st.composite
def wire_request(draw: st.DrawFn) -> bytes:
    """A request that is well-formed but for, now and then, one or two places."""
    end = draw(LINE_ENDS)
    lines = [
        b" ".join([draw(METHODS), draw(TARGETS), draw(VERSIONS)]),
        draw(HOSTS),
        *draw(st.lists(FIELDS, max_size=3)),
    ]
    body = draw(BODIES)
    kind = draw(st.sampled_from(["length", "length", "chunked", "chunked", "none"]))
    if kind == "length":
        form = draw(LENGTH)
        lines.append(form % ((len(body),) * form.count(b"%d")))
    elif kind == "chunked":
        lines.append(draw(CODING))
        cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=3)))
        pieces = [body[low:high] for low, high in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        body = b""
        for piece in [*(piece for piece in pieces if piece), b""]:
            form = draw(CHUNK_SIZE)
            body += (form % len(piece) if b"%" in form else form) + draw(CHUNK_TAIL) + draw(LINE_ENDS)
            body += piece + draw(CHUNK_END) if piece else draw(TRAILERS) + draw(LINE_ENDS)
    else:
        body = b""
    places = draw(st.lists(st.integers(0, len(lines)), max_size=2))
    block = b"".join(line + (end if place in places else b"\r\n") for place, line in enumerate(lines))
    lead = draw(mostly([b"", b"\r\n"], [b"\n", b"\r\n\r\n", b" "]))
    return lead + block + (end if len(lines) in places else b"\r\n") + body


@st.composite
def wire_stream(draw: st.DrawFn) -> bytes:
    """Requests one behind the other, with a few bytes changed in some."""
    data = bytearray(b"".join(draw(st.lists(wire_request(), min_size=1, max_size=4))))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(data)))
        data[at : at + draw(st.integers(0, 2))] = draw(
            st.sampled_from([b"", b"\r", b"\n", b"\0", b" ", b":", b"0", b"\r\n"])
        )
    return bytes(data)


class Read(NamedTuple):
    heads: list[tuple[Head, bytes, int]]  # with the body, and where the bytes behind it begin
    refusal: int | None


def read(packets: list[bytes]) -> Read:
    """What the server's parser makes of some packets."""
    parser = RequestParser(MAX_HEADER, MAX_URL, MAX_BODY)
    found: list[tuple[Head, bytes, int]] = []
    head, fed = None, 0
    try:
        for packet in packets:
            parser.feed(packet)
            fed += len(packet)
            while (head := head or parser.head()) and (body := parser.body()) is not None:
                found.append((head, body, fed - parser.buffered))
                head = None
    except WireError as error:
        return Read(found, error.status)
    return Read(found, None)


def agree(head: Head, body: bytes, end: int, honest: Request) -> None:
    assert (head.method, body, end) == (honest.method, honest.body, honest.end)
    assert head.version == (10 if honest.version == "HTTP/1.0" else 11)
    target = head.path + ("?" + head.query if head.query else "")
    assert honest.target.removesuffix("?").endswith(target) or (target.startswith("/") and "://" in honest.target)
    for name in {name for name, _ in honest.headers} - {"host"}:
        assert head.headers[name] == ", ".join(value for other, value in honest.headers if other == name)


@FEW
@given(wire_stream())
@example(chunked(b"0\r\n\r\n") + SMUGGLED)
@example(post(b"0\r\n\r\n" + SMUGGLED, b"Content-Length: 6", b"Transfer-Encoding: chunked"))
def test_what_the_server_takes_for_a_request_an_honest_parser_takes_for_the_same(data: bytes) -> None:
    honest = read_requests(data)
    taken = read([data]).heads
    assert len(taken) <= len(honest)
    for (head, body, end), expected in zip(taken, honest, strict=False):
        agree(head, body, end, expected)
        assert head.path.startswith("/") or (head.method, head.path) == ("OPTIONS", "*")
        assert len(body) <= MAX_BODY


@FEW
@given(wire_stream(), st.data())
def test_the_same_requests_are_read_however_the_bytes_are_cut(data: bytes, draw: Any) -> None:
    whole = read([data])
    places = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=8)))
    packets = [data[low:high] for low, high in zip([0, *places], [*places, len(data)], strict=True)]
    for other in (packets, cut(data, 1)):
        found = read(other)
        assert [(head, body) for head, body, _ in found.heads] == [(head, body) for head, body, _ in whole.heads]
        assert found.refusal == whole.refusal
        assert found.refusal in {None, 400, 405, 413, 414, 417, 431, 501, 505}


@FEW
@given(st.binary(max_size=400), st.integers(0, 400))
def test_noise_behind_a_head_is_read_as_an_honest_parser_does(noise: bytes, at: int) -> None:
    raw = chunked(ONE) + get() + post(b"1", b"Content-Length: 1")
    data = raw[:at] + noise + raw[at:]
    taken, honest = read([data]), read_requests(data)
    for (head, body, end), expected in zip(taken.heads, honest, strict=False):
        agree(head, body, end, expected)
    assert len(taken.heads) <= len(honest)
    assert read(cut(data, 1)).refusal == taken.refusal


def test_the_streams_are_neither_all_good_nor_all_bad() -> None:
    """Or the comparisons above would show nothing."""
    seen = {"taken": 0, "refused": 0, "bodies": 0}

    @settings(FEW, max_examples=150)
    @given(wire_stream())
    def count(data: bytes) -> None:
        found = read([data])
        seen["taken"] += len(found.heads)
        seen["bodies"] += sum(bool(body) for _, body, _ in found.heads)
        seen["refused"] += found.refusal is not None

    count()
    assert min(seen.values()) > 20, seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_honest_parser_agrees_about_every_case(case: Case) -> None:
    taken, honest = read([case.raw]).heads, read_requests(case.raw)
    assert len(taken) <= len(honest)
    for (head, body, end), expected in zip(taken, honest, strict=False):
        agree(head, body, end, expected)
