"""Receives the callbacks of Astera Lite and prints them: an example of a receiver, and a tool for trying things out.

A callback is a POST whose `Location` header names the result of the finished job and whose JSON body is the status
document of that job. What a receiver should do is all here:

- answer quickly with a 2xx, and do the work (here: fetching the result) afterwards;
- check the signature over the bytes that arrived, before believing any of them;
- expect the same `webhook-id` again, because a delivery whose answer got lost is repeated.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import hashlib
import hmac
import io
import json
import re
import socket
import socketserver
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from email.message import Message
from http import HTTPStatus
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

MAX_BODY_BYTES = 1024 * 1024
MAX_SHOWN_CHARS = 20_000
MAX_REMEMBERED_IDS = 10_000
MAX_DROPPED_BYTES = 16 * 1024 * 1024
TOLERANCE_S = 300
REQUEST_TIMEOUT_S = 10
CONNECTION_S = 30
FETCH_TIMEOUT_S = 10
LINGER_S = 2

EXAMPLES = """\
for example:
  python examples/callback_listener.py --fetch
  curl -G http://127.0.0.1:9261/api/publishingAsync/weather/Berlin --data-urlencode callbackUrl=http://127.0.0.1:9262/
"""


class Refused(Exception):
    """A delivery that is not accepted: the status to answer with, and why."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


# ---- Signatures (Standard Webhooks 1.0) ------------------------------------------------------------------------------


def webhook_key(secret: str) -> bytes:
    """The signing key inside a secret of the form `whsec_<base64>`; ValueError if there is none."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except binascii.Error as fault:
        raise ValueError("not base64") from fault
    if not key:
        raise ValueError("empty secret")
    return key


def sign(key: bytes, webhook_id: str, timestamp: str, body: bytes) -> str:
    """The `v1` signature of one delivery."""
    # http.server decodes headers as Latin-1, so this gives back the bytes that were sent.
    signed = f"{webhook_id}.{timestamp}.".encode("latin-1") + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


def check_signature(key: bytes, headers: Message, body: bytes, now_s: float) -> None:
    """Raises Refused (401) unless one of the signatures in the header is right and the timestamp is recent."""
    webhook_id, timestamp, given = (headers.get(f"webhook-{part}") for part in ("id", "timestamp", "signature"))
    if not (webhook_id and timestamp and given):
        raise Refused(HTTPStatus.UNAUTHORIZED, "webhook-id, webhook-timestamp or webhook-signature is missing")
    # int() alone would also take "+1", "1_0" and the digits of other scripts.
    if not re.fullmatch(r"[0-9]{1,12}", timestamp) or abs(now_s - int(timestamp)) > TOLERANCE_S:
        raise Refused(HTTPStatus.UNAUTHORIZED, f"webhook-timestamp is not within {TOLERANCE_S} s of now")
    expected = sign(key, webhook_id, timestamp, body).encode()
    # While a secret is being replaced, the header holds several. Bytes, because compare_digest refuses non-ASCII text.
    if not any(hmac.compare_digest(expected, one) for one in given.encode("latin-1").split(b" ")):
        raise Refused(HTTPStatus.UNAUTHORIZED, "the signature is wrong")


# ---- Reading and showing ---------------------------------------------------------------------------------------------


def read_body(headers: Message, stream: io.BufferedIOBase) -> bytes:
    """The body as announced by Content-Length, or Refused."""
    lengths = headers.get_all("Content-Length", [])
    if not lengths or "Transfer-Encoding" in headers:
        raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body with a Content-Length is needed")
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,20}", lengths[0]):
        raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length is not one number")
    length = int(lengths[0])
    if length > MAX_BODY_BYTES:
        raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is longer than {MAX_BODY_BYTES} bytes")
    body = stream.read(length)
    if len(body) < length:
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is shorter than its Content-Length")
    return body


def parse_json(body: bytes) -> Any:
    """The JSON value, or Refused (400); thousands of brackets inside each other are a RecursionError."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as fault:
        raise Refused(HTTPStatus.BAD_REQUEST, "the body is not JSON") from fault


def visible(text: str) -> str:
    """The text with everything unprintable escaped: what strangers send must not steer the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def indented(value: Any) -> str:
    """The value as indented JSON, up to what is shown: deep nesting makes indentation a thousand times the value."""
    text = io.StringIO()
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False).iterencode(value):
        text.write(piece)
        if text.tell() > MAX_SHOWN_CHARS:
            break
    return text.getvalue()


def readable(content: bytes) -> str:
    """JSON indented, anything else as text; safe for a terminal, and cut if long."""
    try:
        text = indented(parse_json(content))
    except (Refused, RecursionError):
        text = content.decode(errors="backslashreplace")
    cut = "\n… (cut)" if len(text) > MAX_SHOWN_CHARS else ""
    return "\n".join(visible(line) for line in text[:MAX_SHOWN_CHARS].splitlines()) + cut


def block(title: str, *parts: str) -> str:
    """What is printed about one event."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return "\n".join((f"── {now} ── {title}", *filter(None, parts), ""))


def status_line(status: int, reason: str = "") -> str:
    """Such as `401 Unauthorized: the signature is wrong`."""
    return f"{status} {HTTPStatus(status).phrase}" + (f": {reason}" if reason else "")


# ---- Fetching --------------------------------------------------------------------------------------------------------


def fetch(url: str, token: str | None) -> str:
    """GETs the result and tells what came; whatever its status is, it is the flow's answer."""
    if urlsplit(url).scheme not in {"http", "https"}:
        raise ValueError("neither http nor https")
    # The usual opener would obey proxy variables, open files, and carry the token along a redirect to another host.
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.HTTPHandler())
    opener.add_handler(urllib.request.HTTPSHandler())
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    with opener.open(request, timeout=FETCH_TIMEOUT_S) as response:
        content = response.read(MAX_BODY_BYTES)
        content_type = response.headers.get("Content-Type", "no Content-Type")
        return f"{response.status} {visible(response.reason)}\n{visible(content_type)}\n\n{readable(content)}"


def check_location(location: str | None, body: bytes, signed: bool) -> str:
    """The URL to fetch, or ValueError."""
    if location is None:
        raise ValueError("the callback has no Location")
    # The signature covers the body only; a Location that somebody changed on the way must not get the token.
    document = parse_json(body)
    if signed and not (isinstance(document, dict) and document.get("resultUrl") == location):
        raise ValueError("Location is not the resultUrl of the signed body")
    return location


# ---- Server ----------------------------------------------------------------------------------------------------------


class Listener(ThreadingHTTPServer):
    """Takes callbacks on one address and prints them; remembers which it has seen."""

    request_queue_size = 128  # many jobs may finish at once; the default backlog is 5

    def __init__(
        self,
        address: tuple[str, int],
        *,
        key: bytes | None = None,
        failures: int = 0,
        fetching: bool = False,
        token: str | None = None,
    ) -> None:
        super().__init__(address, Handler)
        self.key = key
        self.fetching = fetching
        self.token = token
        self._failures_left = failures
        self._deliveries: dict[str, int] = {}
        self._lock = threading.Lock()  # guards the two above
        self._screen = threading.Lock()  # keeps blocks in one piece

    def server_bind(self) -> None:
        """Binds; HTTPServer would also look the host's name up, which can wait for DNS."""
        socketserver.TCPServer.server_bind(self)

    def count_delivery(self, webhook_id: str | None) -> int:
        """How many deliveries of this id there have been, with this one; without an id each is the first."""
        if webhook_id is None:
            return 1
        with self._lock:
            count = self._deliveries.pop(webhook_id, 0) + 1
            self._deliveries[webhook_id] = count
            if len(self._deliveries) > MAX_REMEMBERED_IDS:
                del self._deliveries[next(iter(self._deliveries))]
        return count

    def fail_if_told(self) -> None:
        """Raises Refused (500) for as many deliveries as `--fail` says."""
        with self._lock:
            if self._failures_left:
                self._failures_left -= 1
                reason = f"failing on purpose, {self._failures_left} more to come"
                raise Refused(HTTPStatus.INTERNAL_SERVER_ERROR, reason)

    def fetch_and_show(self, location: str | None, body: bytes) -> None:
        """Fetches the result that a callback tells of, and prints it."""
        try:
            url = check_location(location, body, signed=self.key is not None)
            outcome = fetch(url, self.token)
        except (OSError, HTTPException, ValueError) as fault:
            outcome = visible(f"not fetched: {fault}")
        self.show(block(f"result {visible(location or '')}", outcome))

    def show(self, text: str) -> None:
        """Prints one block."""
        with self._screen:
            print(text, flush=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line for a connection that broke, which is everyday life; a traceback for anything else."""
        fault = sys.exception()
        if isinstance(fault, OSError):
            print(f"{client_address[0]}: {fault}", file=sys.stderr)
        else:
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection with one request: in HTTP/1.0 an unread rest can never be taken for the next request."""

    server: Listener
    timeout = REQUEST_TIMEOUT_S

    def setup(self) -> None:
        """Starts the clock: `timeout` is for each read, so a sender that drips could hold a thread for ever."""
        super().setup()
        self._alarm = threading.Timer(CONNECTION_S, self.hang_up)
        self._alarm.daemon = True
        self._alarm.start()

    def finish(self) -> None:
        """Stops the clock."""
        self._alarm.cancel()
        super().finish()

    def hang_up(self) -> None:
        """Ends whatever is still being read or written."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_POST(self) -> None:
        """Takes a callback: check, print, answer, and only then what takes time."""
        body, delivery, status, reason = b"", 1, HTTPStatus.NO_CONTENT, ""
        try:
            body = read_body(self.headers, self.rfile)
            if self.server.key:
                check_signature(self.server.key, self.headers, body, time.time())
            parse_json(body)
            delivery = self.server.count_delivery(self.headers.get("webhook-id"))
            self.server.fail_if_told()
        except Refused as refusal:
            status, reason = refusal.status, str(refusal)
        # Printed before it is answered, or the next delivery could be printed before this one.
        self.server.show(self.describe(body, delivery, status_line(status, reason)))
        self.answer(status, reason)
        if status is not HTTPStatus.NO_CONTENT:
            self.linger()
        elif self.server.fetching:
            # In a thread of its own, so that the connection can be closed at once.
            job = (self.headers.get("Location"), body)
            threading.Thread(target=self.server.fetch_and_show, args=job, name="fetch", daemon=True).start()

    def do_GET(self) -> None:
        """Tells a browser what this is."""
        self.answer(HTTPStatus.METHOD_NOT_ALLOWED, "this listens for callbacks, which are POSTs")

    def answer(self, status: HTTPStatus, reason: str) -> None:
        """Sends the whole answer."""
        self.send_response(status)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "POST")
        if status is HTTPStatus.NO_CONTENT:
            self.end_headers()
            return
        text = f"{reason}\n".encode()
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def describe(self, body: bytes, delivery: int, answered: str) -> str:
        """The block about one callback, its Location first."""
        location = f"→ Location: {visible(self.headers.get('Location', '(missing)'))}"
        if sys.stdout.isatty():
            location = f"\x1b[1m{location}\x1b[0m"
        repeated = f", REPEATED: delivery {delivery} of this webhook-id" if delivery > 1 else ""
        headers = (
            f"{visible(name)}: {visible(value)}" for name, value in self.headers.items() if name.lower() != "location"
        )
        content = f"\n{readable(body)}\n" if body else ""
        request = visible(self.requestline)
        return block(f"callback{repeated}", location, request, *headers, content, f"← {answered}")

    def linger(self) -> None:
        """Drops what is still being sent: closing a connection over unread bytes can destroy the answer on its way."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            dropped = 0
            while dropped < MAX_DROPPED_BYTES and (piece := self.rfile.read1(65536)):
                dropped += len(piece)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Nothing: the block has told it."""


# ---- Command line ----------------------------------------------------------------------------------------------------


def secret_argument(text: str) -> bytes:
    """`webhook_key` with an error that argparse shows."""
    try:
        return webhook_key(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"not of the form whsec_<base64>: {fault}") from fault


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Listens for callbacks of Astera Lite and prints each: time, Location, request, headers, body.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=9262, help="port, 0 picks a free one (default: %(default)s)")
    parser.add_argument("--fetch", action="store_true", help="GET the result that Location names, and print it")
    parser.add_argument("--token", help="bearer token for --fetch; without --secret it goes wherever Location points")
    parser.add_argument(
        "--secret",
        type=secret_argument,
        metavar="whsec_…",
        help="check signatures (the server's callback_secret); a callback without a right one is answered 401",
    )
    parser.add_argument("--fail", type=int, default=0, metavar="N", help="answer the first N deliveries with 500")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Listens until Ctrl-C."""
    parser = argument_parser()
    options = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an arrow must not be fatal in a terminal without one
    try:
        listener = Listener(
            (options.host, options.port),
            key=options.secret,
            failures=max(0, options.fail),
            fetching=options.fetch,
            token=options.token,
        )
    except (OSError, OverflowError) as fault:
        parser.exit(3, f"cannot listen on {options.host}:{options.port}: {fault}\n")
    with listener, contextlib.suppress(KeyboardInterrupt):
        host, port = listener.server_address[:2]
        print(f"listening on http://{host!s}:{port}/", flush=True)
        listener.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
