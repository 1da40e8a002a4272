"""The two example programs, run as a user runs them: processes on port 0, spoken to over loopback."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DEADLINE_S = 20  # only a failing test waits that long


# ---- Helpers ---------------------------------------------------------------------------------------------------------


def load(name: str) -> ModuleType:
    """An example as a module, for what is tested without a process."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Program:
    """A running example: its address, and its output line by line."""

    def __init__(self, errors: Path, name: str, *flags: str) -> None:
        self.errors = errors
        command = [sys.executable, "-B", str(EXAMPLES / f"{name}.py"), "--port", "0", *flags]
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", env=os.environ | {"PYTHONUTF8": "1"}
            )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="reader")
        self._reader.start()
        first = self._lines.get(timeout=DEADLINE_S)
        assert first.startswith("listening on http://127.0.0.1:"), first
        self.url = first.removeprefix("listening on ")

    def _read(self) -> None:
        assert self.process.stdout
        with self.process.stdout as stdout:
            for line in stdout:
                self._lines.put(line.rstrip("\n"))

    def until(self, start: str) -> list[str]:
        """The lines up to the first that starts so."""
        lines: list[str] = []
        while not (lines and lines[-1].startswith(start)):
            lines.append(self._lines.get(timeout=DEADLINE_S))
        return lines

    def raw(self, request: bytes) -> bytes:
        """What comes back for bytes that no client library would send."""
        parts = urlsplit(self.url)
        with closing(socket.create_connection((parts.hostname, parts.port), timeout=DEADLINE_S)) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def stop(self) -> None:
        """Ends the process; no test may have made it print a traceback."""
        self.process.terminate()
        self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        assert "Traceback" not in self.errors.read_text()


Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts examples and stops them after the test."""
    running: list[Program] = []

    def run(name: str, *flags: str) -> Program:
        running.append(Program(tmp_path / f"{len(running)}.err", name, *flags))
        return running[-1]

    yield run
    for program in running:
        program.stop()


@pytest.fixture
def client() -> Iterator[requests.Session]:
    """A client that obeys no proxy variables."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


class Results(ThreadingHTTPServer):
    """Where results lie: `/result` (when allowed to answer) and `/moved`; keeps what was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), ResultHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.allowed = threading.Event()
        self.asked: list[tuple[str, str | None]] = []


class ResultHandler(BaseHTTPRequestHandler):
    """Answers for Results."""

    server: Results

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.server.allowed.wait(DEADLINE_S)
        self.send_response(302 if self.path == "/moved" else 203)
        self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"city":"Z\xc3\xbcrich\x9b"}' if self.path == "/binary" else '{"city":"Zürich"}'.encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def results() -> Iterator[Results]:
    """A running Results."""
    with Results() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="results")
        thread.start()
        yield server
        server.allowed.set()
        server.shutdown()
        thread.join(DEADLINE_S)


def signed(body: bytes, webhook_id: str = "msg_1", age_s: int = 0) -> dict[str, str]:
    """The headers of a delivery signed with SECRET."""
    listener = load("callback_listener")
    timestamp = str(int(time.time()) - age_s)
    signature = listener.sign(listener.webhook_key(SECRET), webhook_id, timestamp, body)
    return {"webhook-id": webhook_id, "webhook-timestamp": timestamp, "webhook-signature": signature}


# ---- The listener: signatures ----------------------------------------------------------------------------------------


def test_known_answer_of_standard_webhooks() -> None:
    listener = load("callback_listener")
    body = b'{"test": 2432232314}'
    signature = listener.sign(listener.webhook_key(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", "1614265330", body)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!!", "whsec_abc", "whsec_é"])
def test_useless_secrets_are_refused(secret: str) -> None:
    with pytest.raises(ValueError):
        load("callback_listener").webhook_key(secret)


def test_signed_deliveries(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener", "--secret", SECRET)
    body = b'{"status": "Completed"}'
    good = signed(body)
    other = "v1," + base64.b64encode(bytes(32)).decode()
    assert client.post(listener.url, body, headers=good).status_code == 204
    several = good | {"webhook-signature": f"v1a,x {other} {good['webhook-signature']}"}
    assert client.post(listener.url, body, headers=several).status_code == 204
    assert client.post(listener.url, body, headers=signed(body, age_s=290)).status_code == 204

    refused = {
        "tampered": (body.replace(b"Completed", b"Error"), good),
        "other id": (body, good | {"webhook-id": "msg_2"}),
        "other signature": (body, good | {"webhook-signature": other}),
        "not ASCII": (body, good | {"webhook-signature": "v1,é"}),
        "too old": (body, signed(body, age_s=310)),
        "from the future": (body, signed(body, age_s=-310)),
        "no number": (body, good | {"webhook-timestamp": "1_0"}),
        "unsigned": (body, {}),
    }
    listener.until("← 204")
    for what, (content, headers) in refused.items():
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = client.post(listener.url, content, headers=encoded)
        assert answer.status_code == 401, what
        assert answer.text.strip() in listener.until("← 401")[-1]


def test_forged_deliveries_do_not_count_as_seen(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener", "--secret", SECRET, "--fail", "1")
    assert client.post(listener.url, b"{}", headers=signed(b"[]")).status_code == 401
    assert client.post(listener.url, b"{}", headers=signed(b"{}")).status_code == 500
    assert "REPEATED" not in "".join(listener.until("← 500"))


# ---- The listener: what it prints ------------------------------------------------------------------------------------


def test_prints_location_first_and_marks_repeats(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener")
    headers = {"Location": "http://127.0.0.1:1/api/jobs/7/result", "webhook-id": "msg_7"}
    for _ in range(2):
        answer = client.post(f"{listener.url}hook?x=1", json={"status": "Completed"}, headers=headers)
        assert (answer.status_code, answer.content) == (204, b"")
    first, second = listener.until("← 204"), listener.until("← 204")
    assert first[0].endswith("── callback")
    assert first[1:3] == ["→ Location: http://127.0.0.1:1/api/jobs/7/result", "POST /hook?x=1 HTTP/1.1"]
    assert "webhook-id: msg_7" in first
    assert '  "status": "Completed"' in first
    assert any("REPEATED: delivery 2" in line for line in second)


def test_nothing_sent_reaches_the_terminal_raw(start: Start) -> None:
    listener = start("callback_listener")
    body = b'{"a": "\x7f\\u001b[2J\\u202e\\ud800\\n"}\r'
    head = b"POST /\x9b2J HTTP/1.1\r\nLocation: \x1b]0;x\x07\r\nX: \xc2\x9b\r\n y\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    assert listener.raw(head + body).startswith(b"HTTP/1.0 204 ")
    printed = listener.until("← 204")
    assert all(line.isprintable() for line in printed), printed
    assert "→ Location: \\x1b]0;x\\x07" in printed


def test_forgets_the_oldest_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("callback_listener")
    monkeypatch.setattr(module, "MAX_REMEMBERED_IDS", 2)
    with module.Listener(("127.0.0.1", 0)) as listener:
        assert [listener.count_delivery(name) for name in ("a", "a", "b", "a", "c", "a", "b")] == [1, 2, 1, 3, 1, 4, 1]
        assert listener.count_delivery(None) == listener.count_delivery(None) == 1


def test_deep_nesting_is_cut_not_multiplied() -> None:
    module = load("callback_listener")
    wide_and_deep = b"[" * 300 + b",".join([b"0"] * 300_000) + b"]" * 300
    assert len(module.readable(wide_and_deep)) < 2 * module.MAX_SHOWN_CHARS


# ---- The listener: its other answers ---------------------------------------------------------------------------------


def test_fail_answers_500_to_the_first_ones(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener", "--fail", "2")
    headers = {"webhook-id": "msg_1"}
    statuses = [client.post(listener.url, b"{}", headers=headers).status_code for _ in range(4)]
    assert statuses == [500, 500, 204, 204]


def test_too_long_a_body_is_413(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener")
    assert client.post(listener.url, b" " * (2 * 1024 * 1024)).status_code == 413
    assert client.post(listener.url, b" " * (1024 * 1024 - 2) + b"{}").status_code == 204


def test_nonsense_does_not_disturb_it(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener", "--fetch")
    post = b"POST / HTTP/1.1\r\n"
    cases = {
        post: b"411",
        post + b"no colon here\r\nContent-Length: 2\r\n\r\n{}": b"411",
        post + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n": b"411",
        post + b"Content-Length: -1\r\n\r\n": b"400",
        post + b"Content-Length: 1_0\r\n\r\n": b"400",
        post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}": b"400",
        post + b"Content-Length: 99\r\n\r\n{}": b"400",
        post + b"Content-Length: 9999999999999\r\n\r\n{}": b"413",
        post + b"Content-Length: 0\r\n\r\n": b"400",
        post + b"Content-Length: 2\r\n\r\n{]": b"400",
        post + b"Content-Length: 2\r\n\r\n\xff\xff": b"400",
        post + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000: b"400",
        post + b"Content-Length: 9000\r\n\r\n" + b"9" * 9000: b"400",
        post + b"Location: http://[\r\nContent-Length: 2\r\n\r\n{}": b"204",
        post + b"Location: file:///\r\nContent-Length: 2\r\n\r\n{}": b"204",
        b"DELETE / HTTP/1.1\r\n\r\n": b"501",
    }
    for request, status in cases.items():
        answer = listener.raw(request)
        assert answer.startswith(b"HTTP/1.0 " + status), (request[:80], answer[:200])
    # http.server takes a line that it cannot read for HTTP/0.9, and then answers without a status line.
    assert b"Error code: 400" in listener.raw(b"\x16\x03\x01 \x00\xff nonsense\r\n\r\n")
    assert listener.raw(b"\r\n") == listener.raw(b"") == b""
    assert client.get(listener.url).status_code == 405
    assert client.post(listener.url, json={}).status_code == 204


def test_a_connection_that_breaks_is_no_traceback(start: Start, client: requests.Session) -> None:
    listener = start("callback_listener")
    parts = urlsplit(listener.url)
    with socket.create_connection((parts.hostname, parts.port)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        # Closing with a linger time of zero resets the connection.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    assert client.post(listener.url, json={}).status_code == 204


@pytest.mark.parametrize("start", [b"", b"POST / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nContent-Length: 999\r\n\r\n"])
def test_a_sender_that_drips_is_hung_up_on(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("callback_listener")
    monkeypatch.setattr(module, "CONNECTION_S", 0.2)
    with module.Listener(("127.0.0.1", 0)) as listener:
        listener.show = lambda text: None
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        with socket.create_connection(listener.server_address) as connection:
            connection.sendall(start)
            connection.settimeout(0.02)
            began, ended = time.monotonic(), False
            while not ended and time.monotonic() - began < 5:
                with contextlib.suppress(TimeoutError):
                    try:
                        connection.sendall(b"x")
                        ended = not connection.recv(1000).startswith(b"HTTP/")
                    except ConnectionError:
                        ended = True
        listener.shutdown()
        thread.join(5)
    assert ended


# ---- The listener: fetching ------------------------------------------------------------------------------------------


def test_fetches_after_it_has_answered(start: Start, client: requests.Session, results: Results) -> None:
    listener = start("callback_listener", "--fetch", "--token", "t0ken")
    location = f"{results.url}/result"
    assert client.post(listener.url, json={}, headers={"Location": location}).status_code == 204
    results.allowed.set()  # only now, so a listener that fetched first would not have answered
    listener.until("← 204")
    shown = listener.until("}")
    assert shown[1].endswith(f"── result {location}")
    assert shown[2:] == ["203 Non-Authoritative Information", "application/json", "", "{", '  "city": "Zürich"', "}"]
    assert results.asked == [("/result", "Bearer t0ken")]


def test_a_result_that_is_a_redirect_is_shown_not_followed(
    start: Start, client: requests.Session, results: Results
) -> None:
    listener = start("callback_listener", "--fetch")
    results.allowed.set()
    client.post(listener.url, json={}, headers={"Location": f"{results.url}/moved"})
    assert listener.until("302")[-1] == "302 Found"
    assert results.asked == [("/moved", None)]


def test_a_result_that_is_not_text_is_shown_escaped(start: Start, client: requests.Session, results: Results) -> None:
    listener = start("callback_listener", "--fetch")
    results.allowed.set()
    client.post(listener.url, json={}, headers={"Location": f"{results.url}/binary"})
    assert listener.until('{"city"')[-1] == '{"city":"Zürich\\x9b"}'


@pytest.mark.parametrize("location", [None, "file:///", "/relative", "http://127.0.0.1:1/", "http://[", "http://a b/"])
def test_what_cannot_be_fetched(location: str | None) -> None:
    module = load("callback_listener")
    shown: list[str] = []
    with module.Listener(("127.0.0.1", 0), fetching=True) as listener:
        listener.show = shown.append
        listener.fetch_and_show(location, b"{}")
    assert "not fetched: " in shown[0]


def test_a_location_that_was_not_signed_is_not_fetched(
    start: Start, client: requests.Session, results: Results
) -> None:
    listener = start("callback_listener", "--fetch", "--secret", SECRET, "--token", "t0ken")
    results.allowed.set()
    location = f"{results.url}/result"
    body = json.dumps({"resultUrl": location}).encode()
    client.post(listener.url, body, headers=signed(body) | {"Location": f"{results.url}/other"})
    assert "resultUrl" in listener.until("not fetched: ")[-1]
    client.post(listener.url, body, headers=signed(body) | {"Location": location})
    listener.until("203 ")
    assert results.asked == [("/result", "Bearer t0ken")]


# ---- The slow API ----------------------------------------------------------------------------------------------------


def test_slow_api_answers_like_the_real_one_but_later(start: Start, client: requests.Session) -> None:
    api = start("slow_api", "--delay", "0.3")
    began = time.monotonic()
    found = client.get(f"{api.url}v1/search", params={"name": "Berlin", "count": "1"}).json()
    assert time.monotonic() - began >= 0.3
    [berlin] = found["results"]
    assert (berlin["name"], berlin["country_code"], berlin["timezone"]) == ("Berlin", "DE", "Europe/Berlin")
    query = {"daily": "temperature_2m_max,temperature_2m_min", "forecast_days": "3", "timezone": "auto"}
    place = {name: str(berlin[name]) for name in ("latitude", "longitude")}
    weather = client.get(f"{api.url}v1/forecast", params=query | place).json()
    assert weather["timezone"] == "Europe/Berlin"
    assert weather["daily_units"]["temperature_2m_max"] == "°C"
    daily = weather["daily"]
    assert [len(daily[name]) for name in ("time", "temperature_2m_max", "temperature_2m_min")] == [3, 3, 3]
    assert all(low < high for low, high in zip(daily["temperature_2m_min"], daily["temperature_2m_max"], strict=True))


def test_slow_api_statuses_and_delays(start: Start, client: requests.Session) -> None:
    api = start("slow_api", "--delay", "0")
    for code in (200, 204, 299, 304, 404, 429, 503, 599):
        assert client.get(f"{api.url}status/{code}", allow_redirects=False).status_code == code
    began = time.monotonic()
    assert client.get(f"{api.url}delay/0.2").json() == {"delay": 0.2}
    assert time.monotonic() - began >= 0.2
    assert client.get(f"{api.url}nothing").status_code == 404
    # The name as typed into a terminal: UTF-8 that nobody escaped.
    assert "Zürich".encode() in api.raw("GET /v1/search?name=Zürich HTTP/1.0\r\n\r\n".encode())


def test_slow_api_never_waits_more_than_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("slow_api")
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    assert module.respond("/delay/3600", 0) == (200, {"delay": 60.0})
    assert slept == [60.0]


@pytest.mark.parametrize("name", ["Atlantis", "", "b"])
def test_slow_api_leaves_results_out_when_there_are_none(name: str) -> None:
    status, answer = load("slow_api").respond(f"/v1/search?name={name}", 0)
    assert status == 200
    assert "results" not in answer


def test_slow_api_finds_without_accents_and_counts() -> None:
    module = load("slow_api")
    assert module.respond("/v1/search?name=sao%20p", 0)[1]["results"][0]["name"] == "São Paulo"
    assert len(module.respond("/v1/search?name=BERLIN", 0)[1]["results"]) == 2
    assert module.respond("/v1/forecast?latitude=0&longitude=0&timezone=auto", 0)[1]["timezone"] == "GMT"


@pytest.mark.parametrize(
    "target",
    [
        "/v1/search",
        "/v1/search?name=Berlin&count=0",
        "/v1/search?name=Berlin&count=1.5",
        "/v1/forecast",
        "/v1/forecast?latitude=91&longitude=0",
        "/v1/forecast?latitude=nan&longitude=0",
        "/v1/forecast?latitude=0&longitude=181",
        "/v1/forecast?latitude=0&longitude=0&forecast_days=17",
        "/v1/forecast?latitude=0&longitude=0&daily=happiness",
        "/status/99",
        "/status/abc",
        "/delay/-1",
        "/delay/soon",
    ],
)
def test_slow_api_bad_parameters(target: str) -> None:
    status, answer = load("slow_api").respond(target, 0)
    assert status == 400
    assert answer["error"] is True
    assert answer["reason"]


# ---- Both: starting and ending ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["callback_listener", "slow_api"])
@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to another process there")
def test_ctrl_c_ends_quietly(name: str, start: Start) -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program = start(name)
    finally:
        signal.signal(signal.SIGINT, before)
    program.process.send_signal(signal.SIGINT)
    assert program.process.wait(DEADLINE_S) == 0
    assert program.errors.read_text() == ""


@pytest.mark.parametrize("name", ["callback_listener", "slow_api"])
def test_a_port_in_use_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as ended:
        load(name).main(["--port", str(taken.getsockname()[1])])
    assert ended.value.code == 3
    assert capsys.readouterr().err.startswith("cannot listen on 127.0.0.1:")


@pytest.mark.parametrize("name", ["callback_listener", "slow_api"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(name).main(["--help"])
    assert ended.value.code == 0
    assert "--port" in capsys.readouterr().out
