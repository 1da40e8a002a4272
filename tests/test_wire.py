"""Room 13: bytes to requests, strictly, and the same however the bytes are cut into packets."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any

import pytest

from astera_lite import Reply, RequestParser, WireError, parse_head, response_head

MAX_HEADER, MAX_URL, MAX_BODY = 2048, 300, 1000

HOST = b"Host: localhost\r\n"


def read(packets: Iterable[bytes]) -> list[Any]:
    """What a connection sees: (method, path, query, body) of each request, then the status of the refusal, if any."""
    parser = RequestParser(MAX_HEADER, MAX_URL, MAX_BODY)
    seen: list[Any] = []
    head = None
    try:
        for packet in packets:
            parser.feed(packet)
            while (head := head or parser.head()) and (body := parser.body()) is not None:
                seen.append((head.method, head.path, head.query, body))
                head = None
    except WireError as error:
        seen.append(error.status)
    return seen


def single_bytes(data: bytes) -> list[bytes]:
    return [data[at : at + 1] for at in range(len(data))]


def get(*lines: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = HOST) -> bytes:
    return line + b"\r\n" + host + b"".join(item + b"\r\n" for item in lines) + b"\r\n"


def post(body: bytes, *lines: bytes) -> bytes:
    return get(*lines, line=b"POST /a HTTP/1.1") + body


def chunked(body: bytes) -> bytes:
    return post(body, b"Transfer-Encoding: chunked")


GET = ("GET", "/", "", b"")
LONG_LINE = b"GET /" + b"a" * (MAX_URL - 1) + b" HTTP/1.1"  # the longest URL there may be


def header_block(size: int) -> bytes:
    """A request whose header lines, with the line end before them, are so many bytes."""
    return get(b"X: " + b"a" * (size - 2 - len(HOST) - 5))


ACCEPTED = {
    "plain": (get(), [GET]),
    "query": (get(line=b"GET /a/b?c=d&e HTTP/1.1"), [("GET", "/a/b", "c=d&e", b"")]),
    "empty query": (get(line=b"GET /a? HTTP/1.1"), [("GET", "/a", "", b"")]),
    "raw path": (get(line=b"GET /%2F//..;a=b/%zz HTTP/1.1"), [("GET", "/%2F//..;a=b/%zz", "", b"")]),
    "second question mark": (get(line=b"GET /a?b?c HTTP/1.1"), [("GET", "/a", "b?c", b"")]),
    "longest URL": (get(line=LONG_LINE), [("GET", "/" + "a" * (MAX_URL - 1), "", b"")]),
    "longest header block": (header_block(MAX_HEADER), [GET]),
    "no blank behind the colon": (get(host=b"Host:localhost\r\n"), [GET]),
    "blanks around a value": (get(b"X: \t a \t "), [GET]),
    "empty value": (get(b"X:"), [GET]),
    "latin-1 value": (get(b"X: caf\xe9"), [GET]),
    "every name character": (get(b"!#$%&'*+-.^_`|~09azAZ: 1"), [GET]),
    "repeated header": (get(b"X: 1", b"X: 2"), [GET]),
    "host with port": (get(host=b"Host: localhost:9261\r\n"), [GET]),
    "IPv6 host": (get(host=b"Host: [::1]:9261\r\n"), [GET]),
    "lower-case host": (get(host=b"host: LOCALHOST\r\n"), [GET]),
    "empty line before": (b"\r\n" + get(), [GET]),
    "empty line before the longest URL": (b"\r\n" + get(line=LONG_LINE), [("GET", "/" + "a" * (MAX_URL - 1), "", b"")]),
    "empty line before the longest header block": (b"\r\n" + header_block(MAX_HEADER), [GET]),
    "empty line between": (get() + b"\r\n" + get(), [GET, GET]),
    "pipelined": (get() * 3, [GET, GET, GET]),
    "absolute form": (get(line=b"GET http://localhost:1/a?b HTTP/1.1"), [("GET", "/a", "b", b"")]),
    "absolute form without path": (get(line=b"GET HTTPS://localhost?b HTTP/1.1"), [("GET", "/", "b", b"")]),
    "asterisk form": (get(line=b"OPTIONS * HTTP/1.1"), [("OPTIONS", "*", "", b"")]),
    "HTTP/1.0": (get(line=b"GET / HTTP/1.0", host=b""), [GET]),
    "HTTP/1.0 without any header": (b"GET / HTTP/1.0\r\n\r\n", [GET]),
    "later minor version": (get(line=b"GET / HTTP/1.7"), [GET]),
    "length": (post(b"hello", b"Content-Length: 5"), [("POST", "/a", "", b"hello")]),
    "length 0": (post(b"", b"Content-Length: 0"), [("POST", "/a", "", b"")]),
    "length with leading zeros": (post(b"hello", b"Content-Length: 0005"), [("POST", "/a", "", b"hello")]),
    "no length": (post(b"") + get(), [("POST", "/a", "", b""), GET]),
    "longest body": (post(b"a" * MAX_BODY, b"Content-Length: 1000"), [("POST", "/a", "", b"a" * MAX_BODY)]),
    "body that looks like a request": (
        post(get(), b"Content-Length: %d" % len(get())) + get(),
        [("POST", "/a", "", get()), GET],
    ),
    "body of line ends": (post(b"\r\n\r\n", b"Content-Length: 4") + get(), [("POST", "/a", "", b"\r\n\r\n"), GET]),
    "body of a GET": (get(b"Content-Length: 2") + b"hi" + get(), [("GET", "/", "", b"hi"), GET]),
    "chunked": (chunked(b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n") + get(), [("POST", "/a", "", b"hello!"), GET]),
    "chunked, in capitals": (post(b"0\r\n\r\n", b"transfer-encoding: CHUNKED"), [("POST", "/a", "", b"")]),
    "chunk size in either case": (
        chunked(b"a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n"),
        [("POST", "/a", "", b"01234567890123456789")],
    ),
    "chunk size with leading zeros": (chunked(b"0002\r\nhi\r\n000\r\n\r\n"), [("POST", "/a", "", b"hi")]),
    "chunk of line ends": (chunked(b"4\r\n\r\n\r\n\r\n0\r\n\r\n"), [("POST", "/a", "", b"\r\n\r\n")]),
    "chunk extensions": (chunked(b'2;a=b;c="d e"\r\nhi\r\n0 ;z\r\n\r\n'), [("POST", "/a", "", b"hi")]),
    "trailer": (chunked(b"2\r\nhi\r\n0\r\nDigest: x\r\nB: y\r\n\r\n") + get(), [("POST", "/a", "", b"hi"), GET]),
    "longest chunked body": (
        chunked(b"1f4\r\n" + b"a" * 500 + b"\r\n1F4\r\n" + b"b" * 500 + b"\r\n0\r\n\r\n"),
        [("POST", "/a", "", b"a" * 500 + b"b" * 500)],
    ),
    "expectation": (post(b"hi", b"Expect: 100-Continue", b"Content-Length: 2"), [("POST", "/a", "", b"hi")]),
}

REFUSED = {
    # request line
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2.0": (get(line=b"GET / HTTP/2.0"), 505),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/0.9 in words": (get(line=b"GET / HTTP/0.9"), 505),
    "version of two digits": (get(line=b"GET / HTTP/1.10"), 400),
    "version in lower case": (get(line=b"GET / http/1.1"), 400),
    "no version": (get(line=b"GET / "), 400),
    "no target": (get(line=b"GET  HTTP/1.1"), 400),
    "two blanks": (get(line=b"GET  / HTTP/1.1"), 400),
    "tab": (get(line=b"GET\t/ HTTP/1.1"), 400),
    "blank before": (b" " + get(), 400),
    "blank behind": (get(line=b"GET / HTTP/1.1 "), 400),
    "blank in the target": (get(line=b"GET /a b HTTP/1.1"), 400),
    "unknown method": (get(line=b"BREW / HTTP/1.1"), 501),
    "method in lower case": (get(line=b"get / HTTP/1.1"), 501),
    "method of other characters": (get(line=b"G(T / HTTP/1.1"), 400),
    "authority form": (get(line=b"CONNECT localhost:80 HTTP/1.1"), 405),
    "authority form of a GET": (get(line=b"GET localhost:80 HTTP/1.1"), 400),
    "asterisk form of a GET": (get(line=b"GET * HTTP/1.1"), 400),
    "relative target": (get(line=b"GET a HTTP/1.1"), 400),
    "fragment": (get(line=b"GET /a#b HTTP/1.1"), 400),
    "absolute form of another scheme": (get(line=b"GET ftp://localhost/ HTTP/1.1"), 400),
    "absolute form with userinfo": (get(line=b"GET http://a@localhost/ HTTP/1.1"), 400),
    "absolute form without host": (get(line=b"GET http:///a HTTP/1.1"), 400),
    "NUL in the target": (get(line=b"GET /\0 HTTP/1.1"), 400),
    "non-ASCII target": (get(line=b"GET /\xc3\xa9 HTTP/1.1"), 400),
    "delete character in the target": (get(line=b"GET /\x7f HTTP/1.1"), 400),
    "URL too long by one": (get(line=LONG_LINE.replace(b"/", b"/a", 1)), 414),
    "URL much too long": (get(line=b"GET /" + b"a" * 1000 + b" HTTP/1.1"), 414),
    "URL longer than everything": (get(line=b"GET /" + b"a" * 9000 + b" HTTP/1.1"), 414),
    "URL too long, without an end": (b"GET /" + b"a" * 3000, 414),
    "two empty lines before": (b"\r\n\r\n" + get(), 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400),
    # header lines
    "bare LF": (get().replace(b"\r\n", b"\n"), 400),
    "bare LF behind the request line": (b"GET / HTTP/1.1\n" + HOST + b"\r\n", 400),
    "bare LF behind a header": (get(b"X: 1\nY: 2"), 400),
    "bare LF as the empty line": (b"GET / HTTP/1.1\r\n" + HOST + b"\n", 400),
    "LF CR": (b"GET / HTTP/1.1\n\r" + HOST + b"\n\r", 400),
    "bare CR in a value": (get(b"X: 1\rY: 2"), 400),
    "CR CR LF": (get(b"X: 1\r"), 400),
    "obs-fold": (get(b"X: 1", b" 2"), 400),
    "obs-fold with tab": (get(b"X: 1", b"\t2"), 400),
    "obs-fold of the first line": (get(b"X: 1", host=b" " + HOST), 400),
    "blank before the colon": (get(b"X : 1"), 400),
    "tab before the colon": (get(b"X\t: 1"), 400),
    "blank before the colon of Content-Length": (post(b"hi", b"Content-Length : 2"), 400),
    "no colon": (get(b"X"), 400),
    "no colon, then a length": (post(b"hi", b"X", b"Content-Length: 2"), 400),
    "no name": (get(b": 1"), 400),
    "name with a blank": (get(b"X Y: 1"), 400),
    "name with a bracket": (get(b"X(1): 1"), 400),
    "non-ASCII name": (get(b"caf\xe9: 1"), 400),
    "NUL in a name": (get(b"X\0: 1"), 400),
    "NUL in a value": (get(b"X: a\0b"), 400),
    "escape in a value": (get(b"X: \x1b[2J"), 400),
    "vertical tab in a value": (get(b"X: a\x0bb"), 400),
    "delete character in a value": (get(b"X: \x7f"), 400),
    "no Host": (get(host=b""), 400),
    "two Hosts": (get(HOST[:-2]), 400),
    "two Hosts in different case": (get(b"hOST: localhost"), 400),
    "two Hosts in HTTP/1.0": (get(b"Host: a", line=b"GET / HTTP/1.0"), 400),
    "no Host beside an absolute form": (get(line=b"GET http://localhost/ HTTP/1.1", host=b""), 400),
    "empty Host": (get(host=b"Host:\r\n"), 400),
    "Host with path": (get(host=b"Host: a/b\r\n"), 400),
    "Host with userinfo": (get(host=b"Host: a@b\r\n"), 400),
    "Host with blank": (get(host=b"Host: a b\r\n"), 400),
    "Host of two names": (get(host=b"Host: a, b\r\n"), 400),
    "Host with a bad port": (get(host=b"Host: a:b\r\n"), 400),
    "Host with an open bracket": (get(host=b"Host: [::1\r\n"), 400),
    "non-ASCII Host": (get(host=b"Host: caf\xe9\r\n"), 400),
    "header block too long by one": (header_block(MAX_HEADER + 1), 431),
    "header block too long by two": (header_block(MAX_HEADER + 2), 431),
    "header block too long by three": (header_block(MAX_HEADER + 3), 431),
    "header block much too long": (header_block(MAX_HEADER * 3), 431),
    "many headers": (get(*[b"X%d: a" % n for n in range(400)]), 431),
    "header block too long, without an end": (b"GET / HTTP/1.1\r\nX: " + b"a" * 3000, 431),
    "another expectation": (post(b"", b"Expect: 200-ok"), 417),
    # what is malformed counts before all else that is wrong, up to where a head is too long
    "unknown method, then a bare LF": (get(b"X: 1\nY: 2", line=b"BREW / HTTP/1.1"), 400),
    "another version, then a bare LF": (get(b"X: 1\nY: 2", line=b"GET / HTTP/3.0"), 400),
    "long URL, then a bare LF": (get(b"X: 1\nY: 2", line=LONG_LINE.replace(b"/", b"/a", 1)), 400),
    "long URL, then a long header block": (get(b"X: " + b"a" * 9000, line=LONG_LINE.replace(b"/", b"/a", 1)), 431),
    "long and malformed request line": (get(line=b"GET /" + b"a b" * 300 + b" HTTP/1.1"), 400),
    "long header block, then a bare LF": (get(b"X: " + b"a" * 3000 + b"\nY: 2"), 431),
    "bare LF, then a long header block": (get(b"X: 1\nY: " + b"a" * 3000), 400),
    # Content-Length
    **{
        f"Content-Length {value!r}": (post(b"hello", b"Content-Length: " + value), 400)
        for value in (
            b"", b"+5", b"-5", b"-0", b"5 5", b"5,5", b"5, 5", b"5;", b"0x5", b"5.0", b"5e0", b"1_0", b"five", b"5\t5",
            b"\xb2", b"\xd9\xa5",
        )
    },
    "Content-Length twice, different": (post(b"hello", b"Content-Length: 5", b"Content-Length: 6"), 400),
    "Content-Length twice, the same": (post(b"hello", b"Content-Length: 5", b"Content-Length: 5"), 400),
    "Content-Length twice in different case": (post(b"hello", b"Content-Length: 5", b"CONTENT-LENGTH: 5"), 400),
    "Content-Length with vertical tab": (post(b"hello", b"Content-Length: \x0b5"), 400),
    "Content-Length too large": (post(b"", b"Content-Length: 1001"), 413),
    "Content-Length of 18 digits": (post(b"", b"Content-Length: 999999999999999999"), 413),
    # Transfer-Encoding
    "length and chunked": (post(b"0\r\n\r\n", b"Content-Length: 5", b"Transfer-Encoding: chunked"), 400),
    "chunked and length": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Content-Length: 5"), 400),
    "length and another coding": (post(b"hello", b"Content-Length: 5", b"Transfer-Encoding: identity"), 400),
    "chunked twice": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked, chunked"), 400),
    "chunked twice, with a tab": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked,\tchunked"), 400),
    "chunked in two lines": (post(b"0\r\n\r\n", *[b"Transfer-Encoding: chunked"] * 2), 400),
    "another coding, chunked last": (post(b"0\r\n\r\n", b"Transfer-Encoding: gzip, chunked"), 400),
    "another coding only": (post(b"", b"Transfer-Encoding: gzip"), 400),
    "identity": (post(b"", b"Transfer-Encoding: identity"), 400),
    "chunked, then another coding": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked, gzip"), 400),
    "empty coding": (post(b"", b"Transfer-Encoding:"), 400),
    "chunked in quotes": (post(b"0\r\n\r\n", b'Transfer-Encoding: "chunked"'), 400),
    "chunked with vertical tab": (post(b"0\r\n\r\n", b"Transfer-Encoding: \x0bchunked"), 400),
    "chunked in HTTP/1.0": (get(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0") + b"0\r\n\r\n", 400),
    # chunks
    **{
        f"chunk size {size!r}": (chunked(size + b"\r\nhello\r\n0\r\n\r\n"), 400)
        for size in (
            b"", b"g", b"+5", b"-5", b"0x5", b" 5", b"5 ", b"5 5", b"5\t", b"5,", b"5:a", b"5;\0", b"5;\x7f", b"1_0",
            b"\xb2", b"5\r", b"5\n", b"5;a\nb", b"5;a\rb", b"0000000000000005",
            b"ffffffffffffffff", b"5;" + b"a" * 5000,
        )
    },
    "chunk longer than it says": (chunked(b"4\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk shorter than it says": (chunked(b"6\r\nhello\r\n0\r\n\r\n"), 400),
    "chunk ended by LF": (chunked(b"5\r\nhello\n0\r\n\r\n"), 400),
    "chunk ended by CR": (chunked(b"5\r\nhello\r0\r\n\r\n"), 400),
    "chunk ended by CR CR": (chunked(b"5\r\nhello\r\r\n0\r\n\r\n"), 400),
    "chunk size ended by LF": (chunked(b"5\nhello\r\n0\r\n\r\n"), 400),
    "chunk too large": (chunked(b"3e9\r\n"), 413),
    "chunks too large together": (chunked(b"1f4\r\n" + b"a" * 500 + b"\r\n1f5\r\n"), 413),
    "endless chunk": (chunked(b"fffffffffffffff\r\n"), 413),
    "trailer without colon": (chunked(b"0\r\nX\r\n\r\n"), 400),
    "trailer with a fold": (chunked(b"0\r\nX: 1\r\n 2\r\n\r\n"), 400),
    "trailer with a bare LF": (chunked(b"0\r\nX: 1\nY: 2\r\n\r\n"), 400),
    "trailer ended by LF": (chunked(b"0\r\n\n"), 400),
    "trailer with blank before the colon": (chunked(b"0\r\nX : 1\r\n\r\n"), 400),
    "trailer too long": (chunked(b"0\r\n" + b"X: 1\r\n" * 400 + b"\r\n"), 400),
}  # fmt: skip

INCOMPLETE = {
    "nothing": b"",
    "empty line": b"\r\n",
    "half a line end": b"\r",
    "request line": b"GET / HTTP/1.1\r\n",
    "head": get()[:-1],
    "body": post(b"hell", b"Content-Length: 5"),
    "chunk": chunked(b"5\r\nhell"),
    "end of a chunk": chunked(b"5\r\nhello\r"),
    "last chunk": chunked(b"5\r\nhello\r\n0\r\n"),
    "trailer": chunked(b"5\r\nhello\r\n0\r\nX: 1\r\n"),
}


@pytest.mark.parametrize(("raw", "expected"), ACCEPTED.values(), ids=ACCEPTED)
def test_well_formed_requests_are_read_whole_and_byte_by_byte(raw: bytes, expected: list[Any]) -> None:
    assert read([raw]) == expected
    assert read(single_bytes(raw)) == expected


@pytest.mark.parametrize(("raw", "status"), REFUSED.values(), ids=REFUSED)
def test_malformed_requests_are_refused_whole_and_byte_by_byte(raw: bytes, status: int) -> None:
    assert read([raw]) == [status]
    assert read(single_bytes(raw)) == [status]


@pytest.mark.parametrize(("raw", "status"), REFUSED.values(), ids=REFUSED)
def test_nothing_behind_a_refused_request_is_read(raw: bytes, status: int) -> None:
    assert read([get() + raw + get() * 2]) == [GET, status]


@pytest.mark.parametrize("raw", INCOMPLETE.values(), ids=INCOMPLETE)
def test_an_incomplete_request_waits_for_the_rest(raw: bytes) -> None:
    assert read([raw]) == []
    assert read(single_bytes(raw)) == []


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\rH", 400),
        (b"GET /\r\n", 400),
        (b"nonsense\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: 1\nY", 400),
        (b"GET /" + b"a" * 3000, 414),
        (b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 500, 431),
        (chunked(b"5\n"), 400),
        (chunked(b"5\r\nhello\n"), 400),
        (chunked(b"a" * 5000), 400),
    ],
)
def test_what_can_not_become_a_request_any_more_is_refused_before_its_end(raw: bytes, status: int) -> None:
    assert read([raw]) == [status]


@pytest.mark.parametrize("at", range(3))
def test_one_empty_line_is_ignored_and_two_are_not_wherever_they_are_cut(at: int) -> None:
    assert read([b"\r\n"[:at], b"\r\n"[at:], get()]) == [GET]
    assert read([b"\r\n" + b"\r\n"[:at], b"\r\n"[at:], get()]) == [400]


def test_every_request_of_a_stream_may_be_led_by_an_empty_line() -> None:
    assert read([b"\r\n" + get(), b"\r\n" + post(b"hi", b"Content-Length: 2"), b"\r\n" + get()]) == [
        GET,
        ("POST", "/a", "", b"hi"),
        GET,
    ]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_refused_or_waits_but_is_no_request(seed: int) -> None:
    noise = random.Random(seed).randbytes(4096)
    assert read([noise]) in ([400], [414])


@pytest.mark.parametrize(
    "line",
    [
        b"Content-Length: " + b"0" * 60000 + b"x",
        b"Content-Length: " + b"1" * 60000 + b"x",
        b"Transfer-Encoding: " + b"a," * 30000 + b"x",
        b"Transfer-Encoding: " + b"a" + b" " * 60000 + b"x",
        b"Transfer-Encoding: " + b"a,  \t" * 10000 + b"chunke",
        b"Host: " + b"a" * 60000 + b"/",
        b"Host: " + b"%61" * 20000 + b"%6",
        b"Host: [" + b":" * 60000 + b"]",
    ],
    ids=lambda line: line[:24],
)
def test_a_hostile_value_costs_no_more_than_its_length(line: bytes) -> None:
    block = b"GET / HTTP/1.1\r\n" + (b"" if line.startswith(b"Host") else HOST) + line + b"\r\n"
    began = time.process_time()
    with pytest.raises(WireError) as caught:
        parse_head(block, MAX_URL)
    assert caught.value.status == 400
    assert time.process_time() - began < 1  # backtracking would take minutes


# --- heads ---


def head_of(*lines: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = HOST) -> Any:
    return parse_head(get(*lines, line=line, host=host)[:-2], MAX_URL)


def test_header_names_are_lower_case_and_repeated_values_joined() -> None:
    head = head_of(b"X-Thing: a", b"Accept:  b ", b"x-thing:\tc", b"Empty:", b"Latin: \xe9")
    assert head.headers == {"host": "localhost", "x-thing": "a, c", "accept": "b", "empty": "", "latin": "é"}


def test_the_host_of_an_absolute_form_replaces_the_header() -> None:
    assert head_of(line=b"GET http://other.example:80/a HTTP/1.1").headers["host"] == "other.example:80"
    assert head_of().headers["host"] == "localhost"


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", None, True),
        (b"1.1", b"keep-alive", True),
        (b"1.1", b"close", False),
        (b"1.1", b"Upgrade , CLOSE", False),
        (b"1.1", b"keep-alive, close", False),
        (b"1.1", b"closed", True),
        (b"1.0", None, False),
        (b"1.0", b"Keep-Alive", True),
        (b"1.0", b"keep-alive, close", False),
    ],
)
def test_who_keeps_the_connection(version: bytes, connection: bytes | None, keep_alive: bool) -> None:
    lines = [b"Connection: " + connection] if connection is not None else []
    head = head_of(*lines, line=b"GET / HTTP/" + version)
    assert head.keep_alive is keep_alive
    assert head.version == (10 if version == b"1.0" else 11)


def test_connection_headers_of_several_lines_count_together() -> None:
    assert head_of(b"Connection: x", b"Connection: close").keep_alive is False


def test_framing_is_told() -> None:
    assert (head_of().length, head_of().chunked, head_of().expects_continue) == (0, False, False)
    assert head_of(b"Content-Length: 17").length == 17
    assert head_of(b"Transfer-Encoding: chunked").chunked is True
    assert head_of(b"Expect: 100-continue").expects_continue is True


def test_an_expectation_of_http_1_0_is_ignored() -> None:
    assert head_of(b"Expect: 100-continue", b"Content-Length: 0", line=b"POST / HTTP/1.0").expects_continue is False


def test_heads_with_the_same_headers_are_read_each_for_itself() -> None:
    first, second = head_of(line=b"GET http://a/ HTTP/1.1"), head_of(line=b"DELETE /b HTTP/1.0")
    assert (first.headers["host"], second.headers["host"]) == ("a", "localhost")
    assert (first.keep_alive, second.keep_alive) == (True, False)


def test_the_parser_tells_what_it_holds() -> None:
    parser = RequestParser(MAX_HEADER, MAX_URL, MAX_BODY)
    assert (parser.begun, parser.buffered) == (False, 0)
    parser.feed(b"\r\n")
    assert parser.head() is None
    assert parser.begun is False
    parser.feed(chunked(b"3\r\nabc"))
    assert parser.head() is not None
    assert parser.body() is None
    assert (parser.begun, parser.buffered) == (True, 6)  # a chunk is decoded when it is complete
    parser.feed(b"\r\n0\r\n\r\n" + b"GE")
    assert parser.body() == b"abc"
    assert (parser.begun, parser.buffered) == (True, 2)


# --- answers ---


def answered(reply: Reply, keep_alive: bool = True, version: int = 11) -> tuple[bytes, dict[bytes, bytes]]:
    head = response_head(reply, "r1", keep_alive, version)
    assert head.endswith(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    return first, dict(line.split(b": ", 1) for line in lines)  # type: ignore[misc]


def test_an_answer_has_date_length_and_request_id() -> None:
    line, headers = answered(Reply(200, [("Content-Type", "text/plain")], b"hello"))
    assert line == b"HTTP/1.1 200 OK"
    assert headers.pop(b"Date").endswith(b" GMT")
    assert headers == {b"Content-Type": b"text/plain", b"Content-Length": b"5", b"X-Request-Id": b"r1"}


@pytest.mark.parametrize(
    ("reply", "length"),
    [
        (Reply(200), b"0"),
        (Reply(404, (), b"no"), b"2"),
        (Reply(200, (), b"", iter([b"x"]), 70_000), b"70000"),
        (Reply(204), None),
        (Reply(304), None),
    ],
)
def test_the_length_of_an_answer(reply: Reply, length: bytes | None) -> None:
    assert answered(reply)[1].get(b"Content-Length") == length


@pytest.mark.parametrize(
    ("keep_alive", "version", "connection"),
    [(True, 11, None), (False, 11, b"close"), (True, 10, b"keep-alive"), (False, 10, b"close")],
)
def test_the_connection_header_of_an_answer(keep_alive: bool, version: int, connection: bytes | None) -> None:
    assert answered(Reply(200), keep_alive, version)[1].get(b"Connection") == connection


@pytest.mark.parametrize(("status", "line"), [(299, b"HTTP/1.1 299 "), (429, b"HTTP/1.1 429 Too Many Requests")])
def test_a_status_without_a_phrase_is_written_too(status: int, line: bytes) -> None:
    assert answered(Reply(status))[0] == line
