"""A second parser of requests, to judge the server's by: written from RFC 9112 alone, strict, slow and simple."""

from __future__ import annotations

from typing import NamedTuple

TOKEN = frozenset(b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
VALUE = frozenset([0x09, *range(0x20, 0x7F), *range(0x80, 0x100)])
BLANK = b" \t"


class Refused(Exception):
    """The bytes are no request."""


class Incomplete(Exception):
    """They may become one."""


class Request(NamedTuple):
    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    body: bytes
    end: int  # where the bytes behind it begin


def check(holds: bool) -> None:
    if not holds:
        raise Refused


def is_token(text: bytes) -> bool:
    return len(text) > 0 and all(byte in TOKEN for byte in text)


class Reader:
    """Takes from the front of some bytes."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise Incomplete
        self.at += size
        return self.data[self.at - size : self.at]

    def line(self) -> bytes:
        """What stands before the next CR LF; a CR or LF by itself is an error."""
        line = bytearray()
        while True:
            byte = self.take(1)
            if byte == b"\r":
                check(self.take(1) == b"\n")
                return bytes(line)
            check(byte != b"\n")
            line += byte


def fields(reader: Reader) -> list[tuple[str, str]]:
    """Field lines up to the empty one (section 5)."""
    found = []
    while line := reader.line():
        name, colon, value = line.partition(b":")
        check(colon == b":" and is_token(name) and all(byte in VALUE for byte in value))
        found.append((name.decode("ascii").lower(), value.strip(BLANK).decode("latin-1")))
    return found


def request_line(line: bytes) -> tuple[str, str, str]:
    """Section 3."""
    words = line.split(b" ")
    check(len(words) == 3)
    method, target, version = words
    check(is_token(method))
    check(len(target) > 0 and all(0x21 <= byte <= 0x7E and byte != ord("#") for byte in target))
    check(len(version) == 8 and version.startswith(b"HTTP/1.") and version[7:].isdigit())
    if method == b"CONNECT":
        check(b"/" not in target)
    elif not target.startswith(b"/"):
        absolute = target.lower().startswith((b"http://", b"https://"))
        check(absolute or (target == b"*" and method == b"OPTIONS"))
        check(not absolute or target.partition(b"://")[2][:1] not in (b"", b"/", b"?"))
    return method.decode(), target.decode(), version.decode()


def skip_blanks(text: bytes) -> bytes:
    return text.lstrip(BLANK)


def token_then_rest(text: bytes) -> tuple[bytes, bytes]:
    size = 0
    while size < len(text) and text[size] in TOKEN:
        size += 1
    return text[:size], text[size:]


def chunk_extensions(text: bytes) -> None:
    """*( BWS ";" BWS name [ BWS "=" BWS ( token / quoted-string ) ] ), section 7.1.1."""
    while text:
        text = skip_blanks(text)
        check(text[:1] == b";")
        name, text = token_then_rest(skip_blanks(text[1:]))
        check(len(name) > 0)
        if skip_blanks(text)[:1] != b"=":
            continue
        text = skip_blanks(skip_blanks(text)[1:])
        if text[:1] != b'"':
            value, text = token_then_rest(text)
            check(len(value) > 0)
            continue
        text = text[1:]
        while text[:1] != b'"':
            check(len(text) > 0)
            if text[:1] == b"\\":
                text = text[1:]
                check(len(text) > 0)
            check(text[0] in VALUE)
            text = text[1:]
        text = text[1:]


def chunked_body(reader: Reader) -> bytes:
    """Section 7.1; the trailer is read and forgotten."""
    body = b""
    while True:
        line = reader.line()
        digits = 0
        while digits < len(line) and chr(line[digits]) in "0123456789abcdefABCDEF":
            digits += 1
        check(digits > 0)
        chunk_extensions(line[digits:])
        size = int(line[:digits].decode(), 16)
        if size == 0:
            fields(reader)
            return body
        body += reader.take(size)
        check(reader.take(2) == b"\r\n")


def read_request(data: bytes, at: int) -> Request:
    """The request that begins there; raises Refused or Incomplete."""
    reader = Reader(data, at)
    line = reader.line()
    if not line:  # section 2.2
        line = reader.line()
    method, target, version = request_line(line)
    headers = fields(reader)
    hosts, lengths, codings = (
        [value for name, value in headers if name == wanted]
        for wanted in ("host", "content-length", "transfer-encoding")
    )
    check(len(hosts) == 1 if version != "HTTP/1.0" else len(hosts) <= 1)
    check(all("@" not in host and "/" not in host and " " not in host for host in hosts))
    check(len(lengths) <= 1 and len(codings) <= 1 and not (lengths and codings))  # section 6.3
    body = b""
    if codings:
        check(version != "HTTP/1.0" and codings[0].lower() == "chunked")
        body = chunked_body(reader)
    elif lengths:
        check(len(lengths[0]) > 0 and all(digit in "0123456789" for digit in lengths[0]))
        body = reader.take(int(lengths[0]))
    return Request(method, target, version, headers, body, reader.at)


def read_requests(data: bytes) -> list[Request]:
    """Every request in the bytes, up to the first that is refused or incomplete."""
    found: list[Request] = []
    try:
        while True:
            found.append(read_request(data, found[-1].end if found else 0))
    except (Refused, Incomplete):
        return found
