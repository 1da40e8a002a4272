"""Rooms 9 and 10: a finished job's callback is signed, sent, sent again on schedule, and never holds up another."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import os
import queue
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from support import ECHO, Client, FakeClock, Running, Sink, database_in, get_flow, running, until

import astera_lite
from astera_lite import AsteraLite, Attempt, Clock, ConfigError, next_try, parse_retry_after
from astera_lite_secrets import sign, signing_key

pytestmark = pytest.mark.both_stores

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
HELLO = get_flow("/hello", response={"body": {"hello": "world"}})
BROKEN = get_flow("/broken", steps=[{"name": "no", "fail": {"status": 422, "message": "no such thing"}}])
FLOWS = {"hello": HELLO, "broken": BROKEN, "echo": ECHO}


# --- the signature ---


def test_the_signature_has_the_known_answer() -> None:
    signature = sign(signing_key(SECRET), "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def encoded(size: int) -> str:
    return base64.b64encode(bytes(range(size))).decode()


@pytest.mark.parametrize("size", [24, 32, 64])
def test_a_secret_has_24_to_64_bytes(size: int) -> None:
    assert signing_key("whsec_" + encoded(size)) == bytes(range(size))


@pytest.mark.parametrize(
    "secret",
    ["", "whsec_", SECRET.removeprefix("whsec_"), "WHSEC_" + encoded(32), "whsec_" + encoded(23),
     "whsec_" + encoded(65), SECRET[:-1], SECRET + "\n", "whsec_ " + encoded(32), "whsec_!" + encoded(32),
     "whsec_" + "é" * 32, "whsec_whsec_" + encoded(32), base64.urlsafe_b64encode(b"\xff" * 32).decode()],
)  # fmt: skip
def test_a_malformed_secret_is_a_config_error_that_does_not_show_it(secret: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AsteraLite(callback_secret=secret)
    (fault,) = caught.value.faults
    assert "callback" in fault.where
    assert not secret or secret.removeprefix("whsec_").strip("=\n ") not in str(fault) or secret == "whsec_"


# --- what follows from an attempt ---

RETRIES = (5.0, 300.0, 1800.0)
NOW, LATER = 1_000_000_000_000, 1_000_086_400_000


def follows(status: int | None, number: int = 1, retry_after: float = 0, **more: Any) -> tuple[str, int | None]:
    attempt = Attempt(NOW, 12, status, more.get("error") or (None if status else "timed out"))
    return next_try(attempt, number, retry_after, RETRIES, NOW, more.get("expires", LATER))


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_delivered(status: int) -> None:
    assert follows(status) == follows(status, 9, 60) == ("delivered", None)


def test_410_stops_for_good() -> None:
    assert follows(410) == follows(410, 1, 60) == ("gone", None)


@pytest.mark.parametrize(
    "status", [None, 100, 199, 300, 301, 302, 303, 304, 307, 308, 400, 401, 404, 409, 429, 500, 503]
)
@pytest.mark.parametrize(("number", "pause"), [(1, 5), (2, 300), (3, 1800)])
def test_anything_else_is_tried_again_on_schedule_with_jitter(status: int | None, number: int, pause: float) -> None:
    moments = set()
    for _ in range(50):
        state, at = follows(status, number)
        assert state == "pending"
        assert at is not None
        assert pause * 0.5 <= (at - NOW) / 1000 <= pause * 1.5
        moments.add(at)
    assert len(moments) > 5  # a fixed pause would send what failed together together again


@pytest.mark.parametrize("status", [None, 302, 500])
def test_after_the_last_pause_it_is_failed(status: int | None) -> None:
    assert follows(status, 4) == follows(status, 5, 60) == ("failed", None)


def test_a_refused_address_is_failed_at_once() -> None:
    assert follows(None, 1, error="refused") == ("failed", None)


def test_a_longer_retry_after_is_honoured_and_a_shorter_one_not() -> None:
    assert follows(503, 1, 3600) == ("pending", NOW + 3_600_000)
    _, at = follows(503, 2, 1)
    assert at is not None
    assert at - NOW > 150_000


def test_every_attempt_lies_inside_the_life_of_the_result() -> None:
    assert follows(500, 1, expires=NOW + 1000) == ("failed", None)
    assert follows(503, 1, 7200, expires=NOW + 8_000_000) == ("pending", NOW + 7_200_000)
    for advice in (7200, 172_800, 999_999_999):  # advice that is no use: the last moment that leaves time to fetch
        assert follows(503, 1, advice, expires=NOW + 7_200_000) == ("pending", NOW + 6_480_000)
    assert follows(503, 1, 7200, expires=NOW + 1000) == ("failed", None)
    assert follows(503, 4, 7200) == ("failed", None)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, 0), ("0", 0), ("120", 120), (" 120 ", 120), ("", 0), ("-1", 0), ("+5", 0), ("1.5", 0), ("1e9", 0),
        ("١٢", 0), ("²", 0), ("soon", 0), ("1, 2", 0), ("9" * 5000, 0), ("\x00", 0), ("Sun, 99 Nov 2050", 0),
        ("Sun, 09 Sep 2001 01:47:40 GMT", 60), ("Sunday, 09-Sep-01 01:47:40 GMT", 60),
        ("Sun Sep  9 01:47:40 2001", 60), ("Sun, 09 Sep 2001 01:46:00 GMT", 0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", 0), ("Mon, 01 Jan 0001 00:00:00 GMT", 0),
    ],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date(value: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # a date without a zone is GMT, wherever the server stands
    time.tzset()
    try:
        assert parse_retry_after(value, NOW) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


# --- a delivery ---


class Ticking:
    """A server whose clock and housekeeper do nothing by themselves."""

    def __init__(self, parts: Running, clock: FakeClock) -> None:
        self.app, self.server, self.client = parts
        self.clock = clock
        self.app.housekeeper.stop(5)

    def submit(self, url: str, path: str = "/hello", **more: Any) -> dict[str, Any]:
        join = "&" if "?" in path else "?"
        path = f"/api/publishingAsync{path}{join}callbackUrl={quote(url, safe='')}"
        return self.client.finished(self.client(more.pop("method", "GET"), path, **more))

    def tick(self, seconds: float = 0) -> None:
        """Let time pass, do what is due, and wait until every delivery begun is on record."""
        self.app.housekeeper.tick(self.clock.tick(seconds))
        self.settle()

    def settle(self) -> None:
        until(lambda: not self.app.courier.under_way(), 10)

    def status(self, job: dict[str, Any]) -> dict[str, Any]:
        return self.client.get(f"/api/jobs/{job['id']}/status").json()  # type: ignore[no-any-return]

    def callback(self, job: dict[str, Any]) -> dict[str, Any]:
        return self.client.get(f"/api/jobs/{job['id']}").json()["callback"]  # type: ignore[no-any-return]

    def wait_s(self, job: dict[str, Any]) -> float:
        """Seconds until the next attempt, by the status document."""
        at = datetime.fromisoformat(self.callback(job)["nextAttemptAt"])
        return at.timestamp() - self.clock.now() / 1000


@contextlib.contextmanager
def ticking(folder: Path, **settings: Any) -> Iterator[Ticking]:
    clock = FakeClock()
    with running(folder, FLOWS, clock=clock, **settings) as parts:
        yield Ticking(parts, clock)


@pytest.fixture
def tick(tmp_path: Path) -> Iterator[Ticking]:
    with ticking(tmp_path, callback_secret=SECRET) as parts:
        yield parts


def verified(headers: dict[str, str], body: bytes) -> bool:
    """Verify a delivery as a receiver would, with nothing of ours."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    return headers["webhook-signature"] == wanted


def test_a_callback_tells_where_the_result_is(tick: Ticking, sink: Sink) -> None:
    job = tick.submit(sink.url + "/hook?token=a%20b")
    assert job["callback"]["state"] == "pending"
    tick.tick()
    headers, body = sink.got.get(timeout=5)
    assert headers["location"] == f"{tick.server.url}/api/jobs/{job['id']}/result" == job["resultUrl"]
    assert headers["content-type"] == "application/json"
    assert headers["webhook-timestamp"] == str(tick.clock.now() // 1000)
    assert verified(headers, body)
    frozen = json.loads(body)
    assert frozen == {name: value for name, value in job.items() if name != "callback"}
    assert frozen["status"] == "Completed"
    assert tick.client.get(headers["location"]).json() == {"hello": "world"}


def test_without_a_secret_a_callback_is_not_signed(tmp_path: Path, sink: Sink) -> None:
    with ticking(tmp_path) as tick:
        tick.submit(sink.url)
        tick.tick()
        headers, _ = sink.next()
    assert "webhook-signature" not in headers
    assert headers["webhook-id"]
    assert headers["webhook-timestamp"]


@pytest.mark.parametrize(("path", "word", "code"), [("/hello", "Completed", 200), ("/broken", "Error", 422)])
def test_a_job_that_ends_in_error_calls_back_too(tick: Ticking, sink: Sink, path: str, word: str, code: int) -> None:
    job = tick.submit(sink.url, path)
    tick.tick()
    headers, body = sink.next()
    assert (body["status"], job["status"]) == (word, word)
    assert tick.client.get(headers["location"]).status_code == code
    assert (body["error"] is None) is (word == "Completed")


def test_a_cancelled_job_calls_back(tick: Ticking, sink: Sink) -> None:
    tick.app.deploy("long", get_flow("/long", steps=[{"name": "pause", "wait": 3600}], response={"body": 1}))
    accepted = tick.client.get(f"/api/publishingAsync/long?callbackUrl={quote(sink.url, safe='')}")
    assert tick.client.post(f"/api/jobs/{accepted.json()['id']}/cancel").status_code in (200, 202)
    assert tick.client.finished(accepted)["error"]["code"] == "cancelled"
    tick.tick()
    assert sink.next()[1]["error"]["code"] == "cancelled"


def test_retries_are_the_same_message_with_a_new_timestamp(tick: Ticking, sink: Sink) -> None:
    sink.answers = [500, 500]
    tick.submit(sink.url)
    seen = []
    for seconds in (0, 6, 400):
        tick.tick(seconds)
        seen.append(sink.got.get(timeout=5))
    headers, bodies = [head for head, _ in seen], {body for _, body in seen}
    assert len(bodies) == 1
    assert len({head["webhook-id"] for head in headers}) == 1
    assert len({head["webhook-timestamp"] for head in headers}) == 3
    assert len({head["webhook-signature"] for head in headers}) == 3
    assert all(verified(head, body) for head, body in seen)


def test_two_jobs_have_two_message_ids(tick: Ticking, sink: Sink) -> None:
    for _ in range(2):
        tick.submit(sink.url)
        tick.tick()
    assert sink.next()[0]["webhook-id"] != sink.next()[0]["webhook-id"]


def test_the_schedule_is_kept_and_written_down(tick: Ticking, sink: Sink) -> None:
    sink.answers = [500] * 20
    job = tick.submit(sink.url)
    tick.tick()
    pauses = [5, 300, 1800, 7200, 18000, 36000]
    for number, pause in enumerate(pauses, 1):
        document = tick.status(job)["callback"]
        assert (document["state"], document["attempts"], document["lastStatus"]) == ("pending", number, 500)
        left = tick.wait_s(job)
        assert pause * 0.5 <= left <= pause * 1.5
        tick.tick(left - 0.5)
        assert tick.callback(job)["attempts"] == number  # not a moment too soon
        tick.tick(0.5)
    document = tick.callback(job)
    assert sink.got.qsize() == 7
    assert (document["state"], document["attempts"], document["nextAttemptAt"]) == ("failed", 7, None)
    history = document["history"]
    assert [entry["status"] for entry in history] == [500] * 7
    assert all(entry["error"] is None and entry["durationMs"] >= 0 for entry in history)
    assert [entry["at"] for entry in history] == sorted({entry["at"] for entry in history})


def test_a_delivered_callback_is_not_sent_again(tick: Ticking, sink: Sink) -> None:
    job = tick.submit(sink.url)
    for seconds in (0, 10, 1000):
        tick.tick(seconds)
    document = tick.status(job)["callback"]
    wanted = {"url": sink.url, "state": "delivered", "attempts": 1, "lastStatus": 204, "nextAttemptAt": None}
    assert document == wanted
    assert sink.got.qsize() == 1


def test_gone_is_gone(tick: Ticking, sink: Sink) -> None:
    sink.answers = [410]
    job = tick.submit(sink.url)
    for seconds in (0, 10, 1000):
        tick.tick(seconds)
    document = tick.status(job)["callback"]
    assert (document["state"], document["lastStatus"], document["attempts"]) == ("gone", 410, 1)
    assert sink.got.qsize() == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed_but_tried_again(tick: Ticking, sink: Sink, status: int) -> None:
    sink.answers = [status]
    job = tick.submit(sink.url)
    tick.tick()
    document = tick.status(job)["callback"]
    assert (document["state"], document["lastStatus"], sink.got.qsize()) == ("pending", status, 1)
    tick.tick(10)
    assert tick.status(job)["callback"]["state"] == "delivered"


def test_nobody_there_is_tried_again_and_the_error_written_down(tick: Ticking) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/"
    job = tick.submit(url)
    tick.tick()
    document = tick.callback(job)
    assert (document["state"], document["lastStatus"], document["attempts"]) == ("pending", None, 1)
    assert document["history"][0]["status"] is None
    assert document["history"][0]["error"]


@contextlib.contextmanager
def receiver(headers: dict[str, str], status: int = 503) -> Iterator[str]:
    """A receiver with this answer for everybody."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.mark.parametrize("form", ["number", "date"])
def test_the_receivers_retry_after_is_honoured(tick: Ticking, form: str) -> None:
    date = format_datetime(datetime.fromtimestamp(tick.clock.now() // 1000 + 1000, UTC), usegmt=True)
    with receiver({"Retry-After": "1000" if form == "number" else date}) as url:
        job = tick.submit(url)
        tick.tick()
        assert 999 <= tick.wait_s(job) <= 1001
        tick.tick(900)
        assert tick.callback(job)["attempts"] == 1
        tick.tick(102)
        assert tick.callback(job)["attempts"] == 2


def test_a_retry_after_beyond_the_life_of_the_result_uses_up_no_more_than_that_allows(tick: Ticking) -> None:
    with receiver({"Retry-After": "172800"}) as url:
        job = tick.submit(url)
        tick.tick()
        for attempts in range(2, 8):
            assert tick.callback(job)["state"] == "pending"
            tick.tick(tick.wait_s(job) + 1)
            assert tick.callback(job)["attempts"] == attempts
            if tick.callback(job)["state"] == "failed":  # the schedule's own pause is longer than the result lives
                break
        assert attempts > 2
        assert tick.callback(job)["state"] == "failed"


@pytest.mark.parametrize("text", ["-1", "soon", "9" * 400, "Sun, 09 Sep 2001 01:46:00 GMT", "1e9", "\xb2"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_useless_retry_after_is_none(tick: Ticking, text: str, status: int) -> None:
    with receiver({"Retry-After": text}, status) as url:
        job = tick.submit(url)
        tick.tick()
        assert tick.callback(job)["state"] == "pending"
        assert 4 <= tick.wait_s(job) <= 6


def test_a_receiver_that_answers_and_drips_its_body_has_got_it_at_once(tick: Ticking) -> None:
    hold, answered = threading.Event(), threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.wfile.write(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            hold.wait(10)
            answered.set()

        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        job = tick.submit(f"http://127.0.0.1:{server.server_address[1]}/")
        tick.tick()
        assert tick.callback(job)["state"] == "delivered"
        assert not answered.is_set()
        hold.set()
        server.shutdown()


def test_a_receiver_with_the_library_of_standard_webhooks_is_content(tick: Ticking, sink: Sink) -> None:
    webhooks = pytest.importorskip("standardwebhooks")
    tick.clock.ms = round(time.time() * 1000)  # the library looks at the time of day
    sink.answers = [500]
    tick.submit(sink.url)
    for seconds in (0, 6):
        tick.tick(seconds)
        headers, body = sink.got.get(timeout=5)
        assert webhooks.Webhook(SECRET).verify(body, headers)["status"] == "Completed"
        with pytest.raises(webhooks.WebhookVerificationError):
            webhooks.Webhook(SECRET).verify(body + b" ", headers)


def test_no_callback_is_sent_for_an_expired_result(tmp_path: Path, sink: Sink) -> None:
    with ticking(tmp_path, retention="10m") as tick:
        sink.answers = [500]
        tick.submit(sink.url)
        tick.tick()
        now = tick.clock.tick(3600)  # as if the machine had slept
        assert tick.app.store.claim_deliveries(now, 10, held=(), busy=(), likely=False) == []


def test_the_debt_survives_a_restart(tmp_path: Path, sink: Sink) -> None:
    with ticking(tmp_path) as tick:
        job = tick.submit(sink.url)
        base = tick.server.url
    assert sink.got.empty()
    with running(tmp_path, FLOWS, clock=FakeClock()) as (_, server, client):
        headers, body = sink.next()
        assert base != server.url
        # The base of the submission: a proxy's or a host's name, not the new process's port.
        assert headers["location"] == f"{base}/api/jobs/{job['id']}/result"
        assert body["resultUrl"] == headers["location"]
        assert client.get(f"/api/jobs/{job['id']}/status").json()["status"] == "Completed"


def test_the_location_uses_the_host_of_the_submission(tick: Ticking, sink: Sink) -> None:
    port = tick.server.url.rpartition(":")[2]
    tick.submit(sink.url, headers={"Host": f"localhost:{port}", "X-Forwarded-Host": "evil.example"})
    tick.tick()
    headers, body = sink.next()
    assert headers["location"].startswith(f"http://localhost:{port}/api/jobs/")
    assert body["statusUrl"].startswith(f"http://localhost:{port}/api/jobs/")


def test_the_location_uses_the_public_url(tmp_path: Path, sink: Sink) -> None:
    more: dict[str, Any] = {"public_url": "https://api.example/lite/", "insecure_open": True}
    with ticking(tmp_path, callback_allow="127.0.0.1", **more) as tick:
        job = tick.client.get(f"/api/publishingAsync/hello?callbackUrl={quote(sink.url, safe='')}").json()
        until = time.monotonic() + 10
        path = f"/api/jobs/{job['id']}/status"
        while tick.client.get(path).json()["status"] == "Running":
            assert time.monotonic() < until
        tick.tick()
        headers, _ = sink.next()
    assert headers["location"] == f"https://api.example/lite/api/jobs/{job['id']}/result"


# --- sent again by hand ---


def test_a_callback_is_sent_again_when_asked(tick: Ticking, sink: Sink) -> None:
    job = tick.submit(sink.url)
    tick.tick()
    first = sink.got.get(timeout=5)
    answer = tick.client.post(f"/api/jobs/{job['id']}/callback")
    assert answer.status_code == 202
    assert answer.headers["Job-Status"] == "Completed"
    assert answer.json()["callback"]["state"] == "pending"
    tick.tick(1)
    second = sink.got.get(timeout=5)
    assert first[1] == second[1]
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert tick.callback(job)["state"] == "delivered"
    assert tick.callback(job)["attempts"] == len(tick.callback(job)["history"]) == 2


@pytest.mark.parametrize("status", [410, 500])
def test_what_was_given_up_can_be_sent_again(tmp_path: Path, sink: Sink, status: int) -> None:
    with ticking(tmp_path, callback_retries="") as tick:
        sink.answers = [status]
        job = tick.submit(sink.url)
        tick.tick()
        assert tick.callback(job)["state"] in ("gone", "failed")
        assert tick.client.post(f"/api/jobs/{job['id']}/callback").status_code == 202
        tick.tick()
        assert tick.callback(job)["state"] == "delivered"


def test_sending_again_brings_the_whole_schedule_again(tmp_path: Path, sink: Sink) -> None:
    with ticking(tmp_path, callback_retries="5s,5s") as tick:
        sink.answers = [500] * 5
        job = tick.submit(sink.url)
        for attempts, state in ((1, "pending"), (2, "pending"), (3, "failed")):
            tick.tick(6)
            assert (tick.callback(job)["attempts"], tick.callback(job)["state"]) == (attempts, state)
        assert tick.client.post(f"/api/jobs/{job['id']}/callback").json()["callback"]["attempts"] == 3
        for attempts, state in ((4, "pending"), (5, "pending"), (6, "delivered")):
            tick.tick(6)
            assert (tick.callback(job)["attempts"], tick.callback(job)["state"]) == (attempts, state)
        assert [entry["status"] for entry in tick.callback(job)["history"]] == [500] * 5 + [204]


def test_only_a_finished_job_with_a_callback_can_be_sent_again(tick: Ticking, sink: Sink) -> None:
    plain = tick.client.finished(tick.client.get("/api/publishingAsync/hello"))
    assert plain["callback"] is None
    assert tick.client.post(f"/api/jobs/{plain['id']}/callback").status_code == 409
    tick.app.deploy("long", get_flow("/long", steps=[{"name": "pause", "wait": 3600}], response={"body": 1}))
    url = f"/api/publishingAsync/long?callbackUrl={quote(sink.url, safe='')}"
    job = tick.client.get(url).json()
    assert tick.client.post(f"/api/jobs/{job['id']}/callback").status_code == 409
    assert tick.client.post("/api/jobs/0192f0c1-0000-7000-8000-000000000000/callback").status_code == 404
    tick.client.post(f"/api/jobs/{job['id']}/cancel")


def test_a_rerun_calls_back_to_the_same_place(tick: Ticking, sink: Sink) -> None:
    job = tick.submit(sink.url)
    again = tick.client.finished(tick.client.post(f"/api/jobs/{job['id']}/rerun"))
    tick.tick()
    tick.tick()
    assert {sink.next()[1]["id"], sink.next()[1]["id"]} == {job["id"], again["id"]}


# --- whom it reaches ---


def test_a_name_that_resolves_to_a_private_address_is_failed(
    tick: Ticking, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        if host != "inside.example":
            return real(host, port, *more, **named)
        if named.get("flags"):
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", int(port)))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    job = tick.submit("http://inside.example/hook")
    tick.tick()
    document = tick.callback(job)
    assert (document["state"], document["attempts"], document["nextAttemptAt"]) == ("failed", 1, None)
    (entry,) = document["history"]
    assert (entry["status"], entry["error"]) == (None, "refused")


@pytest.mark.parametrize(
    "url",
    ["", "x", "/hook", "ftp://receiver.example/", "http://u:p@receiver.example/", "http://receiver.example/#f",
     "http://10.0.0.1/", "http://167772161/", "http://0x0a.1/", "http://0/", "http://[::]/", "http://169.254.169.254/",
     "http://[::ffff:10.0.0.1]/", "http://[64:ff9b::a00:1]/", "http://[2002:a00:1::]/", "http://224.0.0.1/",
     "http://receiver.example/ x", "http://receiver.example/\nx", "http://receiver.example\\@10.0.0.1/"],
)  # fmt: skip
def test_a_callback_url_that_can_be_judged_is_judged_at_once(tick: Ticking, url: str) -> None:
    answer = tick.client.get(f"/api/publishingAsync/hello?callbackUrl={quote(url, safe='')}")
    assert answer.status_code == 400
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert [(e["in"], e["name"]) for e in answer.json()["errors"]] == [("query", "callbackUrl")]
    assert tick.client.get("/api/jobs").json()["jobs"] == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1", "2130706433", "localhost", "a.localhost", "[::1]"])
def test_loopback_is_refused_when_nothing_is_allowed(tmp_path: Path, host: str) -> None:
    with ticking(tmp_path, callback_allow="none") as tick:
        answer = tick.client.get(f"/api/publishingAsync/hello?callbackUrl={quote(f'http://{host}:9/', safe='')}")
    assert answer.status_code == 400
    assert "callback_allow" in answer.json()["errors"][0]["message"]


def test_two_callback_urls_are_refused(tick: Ticking, sink: Sink) -> None:
    url = quote(sink.url, safe="")
    answer = tick.client.get(f"/api/publishingAsync/hello?callbackUrl={url}&callbackUrl={url}")
    assert answer.status_code == 400


def test_a_flow_does_not_see_the_callback_url(tick: Ticking, sink: Sink) -> None:
    job = tick.submit(sink.url, "/echo?a=1", method="POST", json={})
    result = tick.client.get(job["resultUrl"]).text
    assert sink.url not in result
    assert "callbackUrl" not in result


# --- one does not hold up another ---


@contextlib.contextmanager
def hanging(count: int) -> Iterator[list[str]]:
    """Receivers that take a connection and never say a word."""
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        yield [url_of(listener) for listener in listeners]


def url_of(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}/"


def attempts(client: Client, job: dict[str, Any]) -> int:
    """The deliveries of a job's callback that have ended."""
    return client.get(job["statusUrl"]).json()["callback"]["attempts"]  # type: ignore[no-any-return]


def submitted(client: Client, url: str) -> dict[str, Any]:
    return client.get(f"/api/publishingAsync/hello?callbackUrl={quote(url, safe='')}").json()  # type: ignore[no-any-return]


def test_forty_hanging_receivers_delay_nobody_else(tmp_path: Path, sink: Sink) -> None:
    with (
        hanging(40) as urls,
        running(tmp_path, FLOWS, callback_timeout="30s", shutdown_timeout=0.1) as (_, _, client),
    ):
        hung = [submitted(client, url) for url in urls]
        job = submitted(client, sink.url)
        assert sink.next(timeout=20)[1]["id"] == job["id"]
        assert not any(attempts(client, each) for each in hung), "none of them has timed out"


def test_many_hanging_receivers_delay_nobody_else_nor_do_their_retries(
    tmp_path: Path, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_MAX_DELIVERIES", 50)
    monkeypatch.setattr(astera_lite, "_MAX_DOUBTFUL", 8)
    more: dict[str, Any] = {"callback_timeout": "30s", "callback_retries": "1s,1s,1s", "shutdown_timeout": 0.1}
    with contextlib.ExitStack() as stack, running(tmp_path, FLOWS, **more) as (app, _, client), Sink() as later:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(40)]
        hung = [submitted(client, url_of(listener)) for listener in listeners]
        until(lambda: len(app.courier.under_way()) == 40)
        job = submitted(client, sink.url)
        assert sink.next()[1]["id"] == job["id"]
        for listener in listeners:
            listener.accept()[0].close()
        until(lambda: all(attempts(client, each) for each in hung))
        until(lambda: len(app.courier.under_way()) == 8)  # each failed: they share
        job = submitted(client, later.url)
        assert later.next()[1]["id"] == job["id"]


class Outcomes:
    """A store that is told how deliveries ended."""

    def __init__(self) -> None:
        self.got: queue.Queue[str] = queue.Queue()

    def record_delivery(self, key: Any, attempt: Attempt, seen: Any, state: str, next_at: Any, done: Any) -> None:
        done(None, None)
        self.got.put(state)


def a_courier(store: Any, timeout: float = 1.0) -> astera_lite.Courier:
    policy = astera_lite.AddressPolicy("auto", loopback=True)
    return astera_lite.Courier(store, policy, Clock(), astera_lite.Metrics(), timeout=timeout)


@pytest.mark.sqlite  # the store is not what is tested
def test_a_receiver_that_answers_late_gets_one_at_a_time_until_it_is_quick_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_LATE_MS", 20)
    store = Outcomes()
    courier = a_courier(store)
    with AsteraLite(database=database_in(tmp_path)) as app:
        app.housekeeper.stop(5)  # an attempt of the server's own that failed would make the receiver doubtful
        app.deploy("hello", HELLO)
        job = app.wait(app.submit("hello", callback_url="http://127.0.0.1:9/").id, 10)
    assert job.callback is not None
    assert job.callback.tries == 0
    go_on = threading.Semaphore(0)
    for took, most in ((50, 1), (10, 4)):

        def deliver(*_: Any, took: int = took) -> tuple[Attempt, float]:
            go_on.acquire()
            return Attempt(0, took, 200), 0.0

        monkeypatch.setattr(courier, "deliver", deliver)
        go_on.release()
        assert courier._begin(job, job.callback, lambda: None)
        assert store.got.get(timeout=5) == "delivered"
        others = [job._replace(key=job.key._replace(seq=n)) for n in range(6)]
        assert [courier._begin(other, job.callback, lambda: None) for other in others] == [n < most for n in range(6)]
        for _ in range(most):
            go_on.release()
            assert store.got.get(timeout=5) == "delivered"


@pytest.mark.sqlite  # the store is not what is tested
def test_the_receivers_that_were_silent_before_a_restart_are_bounded(
    tick: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_MAX_DOUBTFUL_KNOWN", 2)
    courier = a_courier(Outcomes())
    tick.submit("http://127.0.0.1:9/")
    courier.stop(0)  # it judges what is due, and sends nothing
    (job,) = tick.app.store.page(tick.clock.now(), 9, None, None, None, None)
    assert job.callback is not None
    for n in range(5):
        assert not courier._begin(job, job.callback._replace(receiver=f"r{n}:80", tries=1), lambda: None)
    assert courier._doubtful == {"r0:80", "r1:80"}


def test_a_delivery_whose_outcome_cannot_be_recorded_is_made_again_when_its_lease_has_ended(
    tick: Ticking, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tick.app.store.record_delivery
    lost = lambda *a: a[-1](None, astera_lite.StoreError("odd"))  # noqa: E731
    monkeypatch.setattr(tick.app.store, "record_delivery", lost)
    job = tick.submit(sink.url)
    tick.app.housekeeper.tick(tick.clock.now())
    first = sink.next()
    tick.app.housekeeper.tick(tick.clock.tick(20))
    assert sink.got.empty()
    monkeypatch.setattr(tick.app.store, "record_delivery", record)
    tick.tick(6)
    assert sink.next()[0]["webhook-id"] == first[0]["webhook-id"]
    assert tick.callback(job)["state"] == "delivered"


def test_a_url_that_is_none_any_more_holds_up_nobody(
    tick: Ticking, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = tick.submit("http://old.example/"), tick.submit(sink.url)
    real = astera_lite.parse_target

    def strict(url: str) -> Any:
        if "old.example" in url:
            raise ValueError("is not taken any more")
        return real(url)

    monkeypatch.setattr(astera_lite, "parse_target", strict)
    tick.tick()
    assert sink.next()[1]["id"] == new["id"]
    assert "not taken any more" in tick.callback(old)["history"][0]["error"]


def test_failed_deliveries_leave_nothing_behind(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}/"
    courier = a_courier(Outcomes(), timeout=0.05)
    with AsteraLite(database=database_in(tmp_path)) as app, hanging(1) as (silent,):
        app.deploy("hello", HELLO)
        job = app.wait(app.submit("hello", callback_url=url).id, 10)
        assert job.callback is not None
        courier.deliver(job, job.callback)  # what is loaded at the first time
        until(lambda: not app.courier.under_way())
        before = threading.active_count(), len(os.listdir("/proc/self/fd"))
        for number in range(1000):
            away = silent if number % 50 == 0 else url
            attempt, _ = courier.deliver(job, job.callback._replace(url=away))
            assert attempt.status is None
            assert attempt.error
        for number in range(1000):
            target = job.callback._replace(url=url.replace("127.0.0.1", f"127.0.{number // 250}.{number % 250}"))
            until(lambda target=target: courier._begin(job, target, lambda: None))  # type: ignore[misc]
        until(lambda: not courier.under_way())
        until(lambda: threading.active_count() <= before[0])
        assert len(os.listdir("/proc/self/fd")) <= before[1] + 10  # the store may have opened a few more connections


def test_a_hundred_callbacks_for_a_hanging_receiver_delay_nobody_else(tmp_path: Path, sink: Sink) -> None:
    with (
        hanging(1) as (url,),
        running(tmp_path, FLOWS, callback_timeout="30s", shutdown_timeout=0.1) as (app, _, client),
    ):
        hung = [submitted(client, url) for _ in range(100)]
        job = submitted(client, sink.url)
        assert sink.next(timeout=20)[1]["id"] == job["id"]
        assert not any(attempts(client, each) for each in hung), "none of them has timed out"
        assert len(app.courier.under_way()) <= 5  # a receiver gets four at a time


@pytest.mark.sqlite  # the backlog is made in its file
def test_a_backlog_for_dead_receivers_delays_no_live_one_after_a_restart(tmp_path: Path, sink: Sink) -> None:
    with hanging(100) as urls:
        with running(tmp_path, FLOWS, callback_timeout="100ms") as (_, _, client):
            for url in [*urls, *[urls[0]] * 200]:
                client.finished(client.get(f"/api/publishingAsync/hello?callbackUrl={quote(url, safe='')}"))
        with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)) as database:
            database.execute("UPDATE callbacks SET attempts = 1, next = 1")  # all were tried, and all are due
        more = {"callback_timeout": "30s", "callback_retries": "100ms", "shutdown_timeout": 0.1}
        with running(tmp_path, FLOWS, **more) as (app, _, client):
            until(lambda: len(app.courier.under_way()) == 64)  # as many as wait for doubtful receivers at one time
            sink.answers.append(503)
            job = submitted(client, sink.url)
            assert [sink.next(timeout=5)[1]["id"] for _ in range(2)] == [job["id"]] * 2


def test_many_callbacks_for_one_receiver_all_arrive(tmp_path: Path, sink: Sink) -> None:
    with running(tmp_path, FLOWS) as (_, _, client):
        wanted = {submitted(client, sink.url)["id"] for _ in range(60)}
        got = [sink.next()[1]["id"] for _ in wanted]
    assert set(got) == wanted
    assert len(got) == len(set(got))


def test_a_delivery_under_way_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    with hanging(1) as (url,):
        with running(tmp_path, FLOWS, callback_timeout="60s", shutdown_timeout=0.1) as (app, _, client):
            submitted(client, url)
            until(lambda: app.courier.under_way())
            app.stop()
            assert app.courier.under_way(), "it has not timed out"
        with running(tmp_path, FLOWS, shutdown_timeout=0.1) as (_, _, client):  # the debt is still there
            (job,) = client.get("/api/jobs").json()["jobs"]
            assert job["callback"]["state"] == "pending"


# --- secrets ---


def test_the_secret_is_shown_nowhere(
    tick: Ticking, sink: Sink, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level("DEBUG", astera_lite.log.name)
    sink.answers = [500]
    job = tick.submit(sink.url)
    tick.tick()
    texts = [caplog.text, str(sink.got.get(timeout=5))]
    paths = ["/health", "/api/deployments", "/api/deployments/hello", "/api/jobs", f"/api/jobs/{job['id']}"]
    for path in [*paths, f"/api/jobs/{job['id']}/status", "/nowhere"]:
        answer = tick.client.get(path)
        texts.append(f"{answer.headers} {answer.text}")
    tick.app.stop()
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir()).decode("latin-1")
    secret = SECRET.removeprefix("whsec_")
    assert not [text for text in [*texts, stored] if secret in text]
    assert job["id"] in texts[0]
