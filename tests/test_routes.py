"""Rooms 11 and 14 through HTTP: publishing, jobs, documents and errors, as the HTTP contract has them."""

from __future__ import annotations

import re
import socket
import sqlite3
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
from support import ECHO, Client, FakeClock, Running, Sink, get_flow, running, talk

import astera_lite
from astera_lite import Answer, FlowError, Job, JobKey, Outcome, Store, StoreError

pytestmark = pytest.mark.both_stores

WORDS = {"Running", "Completed", "Error", "Unknown"}
MEMBERS = {
    "id", "status", "flow", "createdAt", "startedAt", "finishedAt", "expiresAt", "attempt", "progress", "statusUrl",
    "resultUrl", "error", "callback",
}  # fmt: skip
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
SECRET = "Pa55/w&rd-x"
INSIDE = re.compile(
    r"Traceback|\.py\b|sqlite|SELECT |INSERT |UPDATE jobs|jobs\.db|/tmp/|ValueError|RuntimeError|hidden-cause", re.I
)


class Watching(Client):
    """A client that checks on every answer what every answer must keep."""

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        answer = super().__call__(method, path, **more)
        assert re.fullmatch(r"[0-9a-zA-Z-]{8,}", answer.headers["X-Request-Id"])
        kind = answer.headers.get("Content-Type", "")
        assert not INSIDE.search(answer.text), answer.text
        if answer.status_code in (204, 304):
            assert answer.content == b""
        if kind == "application/problem+json" and method != "HEAD":
            assert answer.json().keys() >= {"type", "title", "status", "detail"}
            assert answer.json()["status"] == answer.status_code
            assert answer.headers["Cache-Control"] == "no-store"
            for error in answer.json().get("errors", []):
                assert set(error) == {"in", "name", "message"}
        if "Job-Status" in answer.headers:
            assert answer.headers["Job-Status"] in WORDS
        if "Retry-After" in answer.headers:
            assert re.fullmatch("[1-9][0-9]*", answer.headers["Retry-After"])
        return answer


@contextmanager
def serving(folder: Path, flows: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    with running(folder, flows, **settings) as run:
        client = Watching(run.server)
        try:
            yield run._replace(client=client)
        finally:
            client.session.close()


class Gate:
    """A step that holds its thread until the gate is opened."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Semaphore(0)

    def hold(self, context: Any) -> str:
        self.entered.release()
        while not self.open.wait(0.01) and not context.cancelled:
            pass
        return "through"

    def steps(self) -> list[Any]:
        return [{"name": "hold", "python": {"call": self.hold}}, {"name": "after", "set": "done"}]

    def await_entry(self) -> None:
        assert self.entered.acquire(timeout=10)


def explode(context: Any) -> None:
    raise RuntimeError("hidden-cause in /tmp/somewhere.py: SELECT * FROM jobs")


BIG = {"text": "ü" * 400_000}
FLOWS: dict[str, Any] = {
    "echo": ECHO,
    "hello": get_flow("/hello/{name}", response={"body": {"hello": "${params.name}"}}),
    "literal": get_flow("/hello/world", response={"body": "literal"}),
    "only-sync": get_flow("/only/sync", request={"processing": ["synchronous"]}, response={"body": 1}),
    "only-async": get_flow("/only/async", request={"processing": ["asynchronous"]}, response={"body": 1}),
    "typed": get_flow(
        "/typed",
        request={
            "parameters": {
                "n": {"in": "query", "type": "integer", "required": True, "minimum": 1},
                "yes": {"in": "query", "type": "boolean"},
                "X-Mode": {"in": "header", "enum": ["a", "b"]},
            }
        },
        response={"body": "${params}"},
    ),
    "code": get_flow(
        "/code/{code}",
        request={"parameters": {"code": {"in": "path", "type": "integer"}}},
        response={
            "status": "${params.code}",
            "headers": {"X-Own": "yes", "Cache-Control": "max-age=9"},
            "body": {"own": 1},
        },
    ),
    "nothing": get_flow("/nothing", response={"status": 204}),
    "binary": get_flow("/binary", steps=[{"name": "b", "python": {"call": lambda context: bytes(range(256))}}]),
    "plain": get_flow("/plain", response={"headers": {"Content-Type": "text/plain"}, "body": "grüße"}),
    "large": get_flow("/large", steps=[{"name": "l", "python": {"call": lambda context: BIG}}]),
    "refuse": get_flow("/refuse", steps=[{"name": "no", "fail": {"status": 422, "message": "kein Käse"}}]),
    "gone": get_flow("/gone", steps=[{"name": "no", "http": {"url": "http://127.0.0.1:1/", "timeout": 2}}]),
    "late": get_flow("/late", timeout="50ms", steps=[{"name": "z", "wait": "200ms"}]),
    "broken": get_flow("/broken", steps=[{"name": "boom", "python": {"call": explode}}]),
    "division": get_flow("/division", steps=[{"name": "boom", "set": "${1 / 0}"}]),
    "moment": get_flow("/moment", steps=[{"name": "z", "wait": "100ms"}], response={"body": "ok"}),
    "forever": get_flow("/forever", steps=[{"name": "z", "wait": "1h"}], response={"body": "ok"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("routes"), FLOWS, max_wait="2s") as server:
        yield server


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def count(run: Running) -> int:
    return len(run.client.get("/api/jobs?limit=1000").json()["jobs"])


def until(holds: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := holds():
            return value
        time.sleep(0.005)
    raise AssertionError("it does not come about")


# --- publishing ---


def test_synchronous_answers_with_the_flows_response_and_stores_nothing(run: Running) -> None:
    before = count(run)
    answer = run.client.get("/api/publishing/hello/Ada")
    assert (answer.status_code, answer.json()) == (200, {"hello": "Ada"})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "private, no-store"
    assert answer.headers["Vary"] == "Prefer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Content-Security-Policy"] == "sandbox"
    assert "Job-Status" not in answer.headers
    assert count(run) == before


def test_asynchronous_answers_202_with_a_status_url_that_works_at_once(run: Running) -> None:
    for _ in range(20):
        answer = run.client.get("/api/publishingAsync/hello/Ada")
        document = answer.json()
        assert answer.status_code == 202
        assert (
            answer.headers["Location"] == document["statusUrl"] == f"{run.server.url}/api/jobs/{document['id']}/status"
        )
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Vary"] == "Prefer"
        assert answer.headers["Job-Status"] == document["status"] == "Running"
        assert int(answer.headers["Retry-After"]) >= 1
        assert set(document) == MEMBERS
        assert document["resultUrl"] is document["error"] is document["finishedAt"] is document["expiresAt"] is None
        assert uuid.UUID(document["id"]).version == 7
        assert run.client.get(answer.headers["Location"]).status_code == 200


@pytest.mark.parametrize("prefix", ["/api/publishing", "/api/publishingAsync"])
@pytest.mark.parametrize(
    "path", ["", "/", "/none", "/hello", "/hello/", "/hello/a/", "/hello//", "/hello/a/b", "//hello/a",
             "/Hello/a", "/only"]
)  # fmt: skip
def test_what_no_flow_publishes_is_404(run: Running, prefix: str, path: str) -> None:
    answer = run.client.get(prefix + path)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("sent", "got"),
    [("a%2Fb", "a/b"), ("%252F", "%2F"), ("a+b", "a+b"), ("%E2%98%83", "☃"), ("world%20", "world "),
     ("%77orld", "world")],
)  # fmt: skip
def test_a_path_parameter_is_decoded_once_after_matching(run: Running, sent: str, got: str) -> None:
    answer = talk(run.server, f"GET /api/publishing/hello/{sent} HTTP/1.0\r\n\r\n".encode())
    assert answer.partition(b"\r\n\r\n")[2].decode() == f'{{"hello":"{got}"}}\n'


def test_a_literal_beats_a_parameter(run: Running) -> None:
    assert run.client.get("/api/publishing/hello/world").json() == "literal"


def test_escapes_in_a_resource_are_the_same_in_small_letters_and_capitals(tmp_path: Path) -> None:
    flows = {"a": get_flow("/gr%c3%B6%c3%9fe/{x}", response={"body": "${params.x}"})}
    with running(tmp_path, flows) as run:
        for path in ("/gr%C3%B6%C3%9Fe/a%c3%9F", "/gr%c3%b6%c3%9fe/a%C3%9f"):
            assert talk(run.server, f"GET /api/publishing{path} HTTP/1.0\r\n\r\n".encode()).endswith('"aß"\n'.encode())
        with pytest.raises(FlowError, match='claimed by "a"'):
            run.app.deploy("b", get_flow("/gr%C3%B6%C3%9Fe/{y}", response={"body": 1}))


@pytest.mark.parametrize("part", ["%zz", "%", "%ff", "%00"])
def test_a_path_parameter_that_does_not_decode_is_400(run: Running, part: str) -> None:
    answer = talk(run.server, f"GET /api/publishing/hello/{part} HTTP/1.0\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"in":"path"' in answer.replace(b": ", b":")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/api/publishing/echo", {"POST", "OPTIONS"}),
        ("PUT", "/api/publishingAsync/echo", {"POST", "OPTIONS"}),
        ("DELETE", "/api/publishing/hello/a", {"GET", "HEAD", "OPTIONS"}),
        ("HEAD", "/api/publishingAsync/hello/a", {"GET", "OPTIONS"}),
        ("HEAD", "/api/publishing/echo", {"POST", "OPTIONS"}),
        ("QUERY", "/api/publishing/echo", {"POST", "OPTIONS"}),
        ("LOCK", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("VERSION-CONTROL", "/api/jobs", {"GET", "HEAD", "OPTIONS"}),
        ("TRACE", "/", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_another_method_is_405_with_allow(run: Running, method: str, path: str, allowed: set[str]) -> None:
    answer = run.client(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == allowed
    assert method != "HEAD" or "Content-Length" not in answer.headers  # which would be that of a GET
    options = run.client("OPTIONS", path)
    assert (options.status_code, set(options.headers["Allow"].split(", "))) == (204, allowed)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", {"GET", "HEAD"}),
        ("PUT", "/api/jobs", {"GET", "HEAD"}),
        ("POST", "/api/jobs/x", {"GET", "HEAD", "DELETE"}),
        ("GET", "/api/jobs/x/cancel", {"POST"}),
        ("POST", "/api/deployments", {"GET", "HEAD"}),
    ],
)
def test_allow_of_our_own_routes_names_what_they_take(run: Running, method: str, path: str, allowed: set[str]) -> None:
    answer = run.client(method, path)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) - {"OPTIONS"} == allowed
    assert set(run.client("OPTIONS", path).headers["Allow"].split(", ")) == allowed | {"OPTIONS"}


def test_the_other_mode_is_404_and_named(run: Running) -> None:
    answer = run.client.get("/api/publishingAsync/only/sync")
    assert answer.status_code == 404
    assert "synchronously" in answer.json()["detail"]
    assert "/api/publishing/only/sync" in answer.json()["detail"]
    answer = run.client.get("/api/publishing/only/async")
    assert answer.status_code == 404
    assert "asynchronously" in answer.json()["detail"]
    assert "/api/publishingAsync/only/async" in answer.json()["detail"]


def test_head_runs_a_synchronous_get(run: Running) -> None:
    whole, head = run.client.get("/api/publishing/plain"), run.client("HEAD", "/api/publishing/plain")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == whole.headers["Content-Length"] == str(len("grüße".encode()))
    assert head.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("prefix", ["/api/publishing", "/api/publishingAsync"])
def test_refused_input_lists_every_fault_and_stores_nothing(run: Running, prefix: str) -> None:
    before = count(run)
    answer = run.client.get(f"{prefix}/typed?n=x&yes=maybe", headers={"X-Mode": "c"})
    assert answer.status_code == 400
    assert {(e["in"], e["name"]) for e in answer.json()["errors"]} == {
        ("query", "n"), ("query", "yes"), ("header", "X-Mode")
    }  # fmt: skip
    assert count(run) == before


@pytest.mark.parametrize(
    "query", ["n=", "n=1&n=2", "n=+5", "n=1_0", "n=0", "n=²", "n=9223372036854775808", "", "n=1&yes=1"]
)
def test_what_is_no_integer_or_boolean_is_400(run: Running, query: str) -> None:
    assert run.client.get(f"/api/publishingAsync/typed?{query}").status_code == 400


@pytest.mark.parametrize("body", [b"{", b"NaN", b"\xff", b'{"a":1,"a":2}', b"1e400", b"[" * 5000, b'"\\ud800"'])
def test_a_body_that_is_no_json_is_400_with_a_pointer(run: Running, body: bytes) -> None:
    answer = run.client.post("/api/publishingAsync/echo", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["in"] == "body"


def test_faults_of_key_callback_and_parameters_are_listed_together(run: Running) -> None:
    answer = run.client.get(
        "/api/publishingAsync/typed?n=x&callbackUrl=ftp://x/", headers={"Idempotency-Key": "a b", "X-Mode": "c"}
    )
    assert answer.status_code == 400
    assert {e["name"] for e in answer.json()["errors"]} == {"n", "X-Mode", "callbackUrl", "Idempotency-Key"}


def test_415_says_what_is_taken(tmp_path: Path) -> None:
    text = {"method": "PATCH", "contentTypes": ["text", "json"]}
    flows = {"x": get_flow("/x", request={"method": "POST", "body": {}}), "y": get_flow("/y", request=text)}
    with serving(tmp_path, flows, token=SECRET) as run:
        run.client.session.headers["Authorization"] = f"Bearer {SECRET}"
        types = {"Content-Type": "image/png"}
        for method, path, taken in (
            ("POST", "/api/publishing/x", "application/json"),
            ("PATCH", "/api/publishingAsync/y", "text/plain, application/json"),
            ("PUT", "/api/deployments/x", "application/json"),
        ):
            answer = run.client(method, path, data=b"x", headers=types)
            assert (answer.status_code, answer.headers["Accept"]) == (415, taken)
            patch = taken if method == "PATCH" else None
            assert answer.headers.get("Accept-Patch") == patch
            assert run.client("OPTIONS", path).headers.get("Accept-Patch") == patch
            answer = run.client(method, path, data=b"x", headers={"Content-Encoding": "gzip"})
            assert (answer.status_code, answer.headers["Accept-Encoding"]) == (415, "identity")


@pytest.mark.parametrize(
    ("code", "title"),
    [
        (413, "Content Too Large"),
        (414, "URI Too Long"),
        (416, "Range Not Satisfiable"),
        (422, "Unprocessable Content"),
    ],
)
def test_titles_are_those_of_rfc_9110_on_every_python(tmp_path: Path, code: int, title: str) -> None:
    fail = {"status": code, "message": "no", "headers": {"Content-Range": "bytes */9"}}
    with serving(tmp_path, {"x": get_flow("/x", steps=[{"name": "a", "fail": fail}])}) as run:
        answer = run.client.get("/api/publishing/x")
        assert (answer.status_code, answer.reason, answer.json()["title"]) == (code, title, title)


def test_utf8_goes_through_unharmed(run: Running) -> None:
    text = "žluťoučký ☃ 𝄞"
    answer = run.client.post(f"/api/publishing/echo?b={quote(text)}", json={"k": text})
    assert answer.json() == {"params": {"a": None, "b": text}, "body": {"k": text}}
    assert text.encode() in answer.content


# --- callbackUrl ---


@pytest.mark.parametrize(
    "url",
    [
        "", "/relative", "//127.0.0.1/", "127.0.0.1:80", "http:127.0.0.1", "http://", "http:///x", "ftp://example.com/",
        "file:///etc/passwd", "javascript:alert(1)", "http://user@example.com/", "http://u:p@example.com/",
        "http://example.com/#top", "http://example.com/#", "http://example.com:0/", "http://example.com:65536/",
        "http://exa mple.com/", " http://example.com/", "http://example.com/\n", "http://example.com/\tx",
        "http://example.com/\x00", "http://example.com/\r\nX: y", "http://exämple.com/", "http://a\\@127.0.0.1/",
        "http://[::1", "http://[fe80::1%25lo]/", "http://-x.example/", "http://x..example/", "http://example.com/\x7f",
        "http://10.0.0.1/", "http://192.168.1.1/", "http://172.16.0.9/", "http://169.254.169.254/latest/",
        "http://100.64.0.1/", "http://0/", "http://0.0.0.0/", "http://10.1/", "http://167772161/", "http://0xa.1/",
        "http://012.0.0.1/", "http://[::ffff:10.0.0.1]/", "http://[64:ff9b::a00:1]/", "http://[2002:a00:1::]/",
        "http://[fc00::1]/", "http://[fe80::1]/", "http://[ff02::1]/", "http://[::]/", "http://224.0.0.1/",
        "http://255.255.255.255/",
    ],
)  # fmt: skip
def test_a_callback_url_that_must_not_be_called_is_400_and_no_job(run: Running, url: str) -> None:
    before = count(run)
    answer = run.client.get(f"/api/publishingAsync/hello/a?callbackUrl={quote(url, safe='')}")
    assert answer.status_code == 400
    assert [(e["in"], e["name"]) for e in answer.json()["errors"]] == [("query", "callbackUrl")]
    assert count(run) == before


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1", "localhost", "LOCALHOST.", "x.localhost",
             "[::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]"]
)  # fmt: skip
def test_loopback_in_every_form_is_refused_where_nothing_is_allowed(strict: Running, host: str) -> None:
    answer = strict.client.get(f"/api/publishingAsync/hello/a?callbackUrl={quote(f'http://{host}:9/', safe='')}")
    assert answer.status_code == 400
    assert strict.client.get("/api/jobs").json()["jobs"] == []


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tmp_path_factory.mktemp("strict"), FLOWS, callback_allow="none") as server:
        yield server


@pytest.mark.parametrize(
    ("query", "name", "words"),
    [
        ("a=1&callbackUrl=http://h/p?a=1&sig=x%2Fy&b=2", "callbackUrl", "http%3A%2F%2Fh%2Fp%3Fa%3D1%26sig%3Dx%252Fy"),
        ("callbackURL=http%3A%2F%2Fh%2F", "callbackURL", "write callbackUrl"),
        ("callback_url=http%3A%2F%2Fh%2F", "callback_url", "write callbackUrl"),
        ("callbackUrl=http%3A%2F%2Fb%C3%BCcher.example%3A9%2F", "callbackUrl", "write xn--bcher-kva.example"),
        ("callbackUrl=http%3A%2F%2Fh%2F%C3%BC", "callbackUrl", "percent-encode"),
    ],
)
def test_a_callback_url_that_would_be_cut_or_ignored_is_refused_with_the_cure(
    run: Running, query: str, name: str, words: str
) -> None:
    before = count(run)
    for prefix in ("/api/publishingAsync", "/api/publishing"):
        answer = run.client.post(f"{prefix}/echo?{query}", json={})
        (error,) = answer.json()["errors"]
        assert (answer.status_code, error["in"], error["name"]) == (400, "query", name)
        assert words in error["message"] or (prefix == "/api/publishing" and name == "callbackUrl")
    assert count(run) == before


def test_a_callback_url_with_a_query_may_stand_beside_declared_parameters(run: Running, sink: Sink) -> None:
    for url in (f"{sink.url}/?x=1", quote(f"{sink.url}/?x=1&y=2", safe="")):
        assert run.client.post(f"/api/publishingAsync/echo?b=0&callbackUrl={url}&a=1", json={}).status_code == 202
        sink.next()
    assert run.client.get(f"/api/publishingAsync/hello/a?callbackUrl={quote(sink.url)}&more=1").status_code == 202
    sink.next()


def test_a_plus_that_became_a_space_is_told(tmp_path: Path) -> None:
    parameters = {"at": {"in": "query", "type": "date-time"}, "phone": {"in": "query", "pattern": "^[+][0-9]+$"}}
    flow = get_flow("/x", request={"parameters": parameters}, response={"body": "${params}"})
    with serving(tmp_path, {"x": flow}) as run:
        for name, sent, came in (
            ("at", "2026-01-02T03:04:05+02:00", "2026-01-02T03:04:05 02:00"),
            ("phone", "+491", " 491"),
        ):
            (error,) = run.client.get(f"/api/publishing/x?{name}={sent}").json()["errors"]
            assert error["name"] == name and f'"{came}" came' in error["message"] and "%2B" in error["message"]
            encoded = sent.replace("+", "%2B")
            assert run.client.get(f"/api/publishing/x?{name}={encoded}").json()[name] == sent
        (error,) = run.client.get("/api/publishing/x?at=soon").json()["errors"]
        assert "%2B" not in error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("'{customer:Ada}'", "shells of Windows"),
        ('\'{"a":', "shells of Windows"),
        ("{customer: Ada}", "a shell may have"),
    ],
)
def test_quotes_that_a_shell_changed_are_told(run: Running, body: str, words: str) -> None:
    answer = run.client.post("/api/publishing/echo", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["errors"][0]["message"]


def test_a_repeated_callback_url_is_400(run: Running) -> None:
    url = quote("http://127.0.0.1:1/", safe="")
    for query in (f"callbackUrl={url}&callbackUrl={url}", f"callbackUrl={url}&callback%55rl={url}"):
        assert run.client.get(f"/api/publishingAsync/hello/a?{query}").status_code == 400


def test_a_callback_url_on_a_synchronous_request_is_400_unless_respond_async_applies(run: Running, sink: Sink) -> None:
    query = f"?callbackUrl={quote(sink.url, safe='')}"
    prefer = {"Prefer": "respond-async"}
    assert run.client.get(f"/api/publishing/hello/a{query}").status_code == 400
    assert run.client.get(f"/api/publishing/only/sync{query}", headers=prefer).status_code == 400
    accepted = run.client.get(f"/api/publishing/hello/a{query}", headers=prefer)
    assert accepted.status_code == 202
    assert sink.next()[1]["id"] == accepted.json()["id"]


def test_a_callback_url_for_a_flow_without_jobs_is_told_a_cure_that_helps(run: Running) -> None:
    answer = run.client.get(
        "/api/publishing/only/sync?callbackUrl=http%3A%2F%2Fh%2F", headers={"Prefer": "respond-async"}
    )
    assert answer.status_code == 400
    assert "leave it out, or publish the flow asynchronously too" in answer.json()["detail"]


def test_the_callback_url_is_not_handed_to_the_flow(tmp_path: Path, sink: Sink) -> None:
    flow = get_flow(
        "/query", response={"body": "${request.query}"}, request={"strict": True, "parameters": {"x": {"in": "query"}}}
    )
    with serving(tmp_path, {"query": flow}) as run:
        accepted = run.client.get(f"/api/publishingAsync/query?x=1&callbackUrl={quote(sink.url, safe='')}")
        assert run.client.get(run.client.finished(accepted)["resultUrl"]).json() == {"x": "1"}


# --- Prefer ---


@pytest.mark.parametrize(
    "value",
    [
        "respond-async", "RESPOND-ASYNC", "foo, respond-async", "respond-async;x=y, bar=1",
        "return=minimal,respond-async", ",,respond-async,", 'foo="bar", respond-async', "respond-async, respond-async",
        'respond-async=""',
    ],
)  # fmt: skip
def test_respond_async_makes_a_synchronous_request_asynchronous(run: Running, value: str) -> None:
    answer = run.client.get("/api/publishing/moment", headers={"Prefer": value})
    assert answer.status_code == 202
    assert answer.headers["Preference-Applied"] == "respond-async"
    assert answer.headers["Vary"] == "Prefer"
    assert run.client.finished(answer)["status"] == "Completed"


@pytest.mark.parametrize(
    "value",
    ["", ",", "respond_async", "respond-asynchronously", "x-respond-async", 'foo="a, respond-async, b"',
     "foo=respond-async",
     "foo;respond-async", '"respond-async"', "=respond-async", "wait=1"],
)  # fmt: skip
def test_other_preferences_leave_it_synchronous(run: Running, value: str) -> None:
    answer = run.client.get("/api/publishing/hello/a", headers={"Prefer": value})
    assert answer.status_code == 200
    assert "Preference-Applied" not in answer.headers


def test_respond_async_is_ignored_where_only_one_mode_is_published(run: Running) -> None:
    prefer = {"Prefer": "respond-async"}
    for path in ("/api/publishing/only/sync", "/api/publishingAsync/only/async"):
        answer = run.client.get(path, headers=prefer)
        assert "Preference-Applied" not in answer.headers
        assert answer.status_code == (202 if "Async" in path else 200)
    assert run.client.get("/api/publishing/only/async", headers=prefer).status_code == 404


@pytest.mark.parametrize(
    ("value", "applied"),
    [
        ("wait=1", "wait=1"), ("Wait=1", "wait=1"), ('wait="1"', "wait=1"), ("wait = 1", "wait=1"),
        ("wait=01", "wait=1"),
        ("foo, wait=1;x", "wait=1"), ("wait=1, wait=2", "wait=1"), ("wait=99", "wait=2"),
        ("wait=" + "9" * 30, "wait=2"),
        ("respond-async, wait=1", "wait=1"), ('foo="\\", wait=1', None), ('foo="a, wait=1"', None),
        ('foo="a, wait=1, b"', None), ("wait=x, wait=1", "wait=1"),
    ],
)  # fmt: skip
def test_wait_on_an_asynchronous_request_in_every_spelling(run: Running, value: str, applied: str | None) -> None:
    answer = run.client.get("/api/publishingAsync/hello/a", headers={"Prefer": value})
    assert answer.headers.get("Preference-Applied") == applied
    assert answer.status_code == (200 if applied else 202)


@pytest.mark.parametrize(
    "value", ["wait", "wait=", "wait=x", "wait=-1", "wait=1.5", "wait=+1", "wait=1s", "wait=²", "wait=1_0", 'wait="1']
)
def test_a_malformed_wait_is_ignored(run: Running, value: str) -> None:
    answer = run.client.get("/api/publishingAsync/hello/a", headers={"Prefer": value.encode()})
    assert answer.status_code == 202
    assert "Preference-Applied" not in answer.headers


def test_prefer_in_two_headers_counts_as_one(run: Running) -> None:
    head = b"GET /api/publishing/moment HTTP/1.0\r\nPrefer: wait=2\r\nPrefer: respond-async\r\n\r\n"
    lines = talk(run.server, head).decode().split("\r\n")
    assert lines[0].startswith("HTTP/1.1 200")
    applied = next(line for line in lines if line.startswith("Preference-Applied: "))
    assert set(applied.partition(": ")[2].split(", ")) == {"respond-async", "wait=2"}


def test_wait_gives_the_result_when_it_comes_in_time(run: Running) -> None:
    answer = run.client.get("/api/publishingAsync/moment", headers={"Prefer": "wait=2"})
    assert (answer.status_code, answer.json()) == (200, "ok")
    assert answer.headers["Job-Status"] == "Completed"
    again = run.client.get(answer.headers["Content-Location"])
    assert (again.status_code, again.content) == (200, answer.content)


def test_wait_gives_202_when_it_does_not_and_is_capped(tmp_path: Path) -> None:
    with serving(tmp_path, FLOWS, max_wait="1s") as run:
        began = time.monotonic()
        answer = run.client.get("/api/publishingAsync/forever", headers={"Prefer": "wait=600"})
        assert answer.status_code == 202
        assert answer.headers["Preference-Applied"] == "wait=1"
        assert "Content-Location" not in answer.headers
        assert 0.9 < time.monotonic() - began < 5
        run.client.post(f"/api/jobs/{answer.json()['id']}/cancel")


@pytest.mark.parametrize("route", ["status", "result"])
def test_status_and_result_wait_until_the_job_is_finished(tmp_path: Path, gate: Gate, route: str) -> None:
    with serving(tmp_path, {"held": get_flow("/held", steps=gate.steps())}) as run, ThreadPoolExecutor(1) as pool:
        accepted = run.client.get("/api/publishingAsync/held").json()
        waiting = pool.submit(
            Watching(run.server).get, f"/api/jobs/{accepted['id']}/{route}", headers={"Prefer": "wait=9"}
        )
        gate.await_entry()
        until(lambda: run.app.watchers.by_job)
        assert not waiting.done()
        gate.open.set()
        answer = waiting.result(5)
        assert (answer.status_code, answer.headers["Job-Status"]) == (200, "Completed")
        assert answer.headers["Preference-Applied"] == "wait=9"
        assert run.app.watchers.by_job == {}


# --- Idempotency-Key ---


def keyed(run: Running, key: str, path: str = "echo?a=1", **more: Any) -> requests.Response:
    headers = {"Idempotency-Key": key} | more.pop("headers", {})
    return run.client.post(f"/api/publishingAsync/{path}", headers=headers, **more)


def test_the_same_key_and_payload_give_the_same_job(run: Running) -> None:
    first = keyed(run, "k-same", json={"x": 1})
    assert "Idempotency-Replayed" not in first.headers
    run.client.finished(first)
    for key, more in (("k-same", {}), ('"k-same"', {}), ("k-same", {"headers": {"Prefer": "foo"}})):
        again = keyed(run, key, json={"x": 1}, **more)
        assert again.status_code == 202
        assert again.headers["Location"] == first.headers["Location"]
        assert again.headers["Idempotency-Replayed"] == "true"
        assert again.json()["status"] == again.headers["Job-Status"] == "Completed"
    spelled = keyed(run, "k-same", "echo?%61=%31", json={"x": 1})
    assert spelled.headers["Location"] == first.headers["Location"], "the query counts decoded"


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("echo?a=2", {"json": {"x": 1}}),
        ("echo", {"json": {"x": 1}}),
        ("echo?a=1", {"json": {"x": 2}}),
        ("echo?a=1", {}),
        ("echo?a=1", {"data": b'{"x": 1}', "headers": {"Content-Type": "application/vnd.x+json"}}),
        ("echo?a=1&callbackUrl=http%3A%2F%2F127.0.0.1%3A1%2F", {"json": {"x": 1}}),
    ],
)
def test_the_same_key_with_another_payload_is_422(run: Running, path: str, more: dict[str, Any]) -> None:
    key = f"k-other-{uuid.uuid4()}"
    assert keyed(run, key, json={"x": 1}).status_code == 202
    before = count(run)
    answer = keyed(run, key, path, **more)
    assert answer.status_code == 422
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert count(run) == before


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, "é", '"a b"'])
def test_a_key_that_is_none_is_400(run: Running, key: str) -> None:
    answer = keyed(run, key.encode("latin-1"))  # type: ignore[arg-type]
    assert answer.status_code == 400
    assert answer.json()["errors"][0] == {**answer.json()["errors"][0], "in": "header", "name": "Idempotency-Key"}


def test_a_key_on_a_synchronous_request_is_refused_with_the_way_that_heeds_it(tmp_path: Path) -> None:
    own = get_flow(
        "/own", request={"parameters": {"Idempotency-Key": {"in": "header"}}}, response={"body": "${params}"}
    )
    sync = get_flow("/sync", request={"processing": ["synchronous"]}, response={"body": 1})
    flows = {"both": get_flow("/both", response={"body": 1}), "sync": sync, "own": own}
    key = {"Idempotency-Key": "k"}
    with serving(tmp_path, flows) as run:
        for path, words in (("/both", "/api/publishingAsync/both with Prefer: wait=60"), ("/sync", "leave it out")):
            answer = run.client.get(f"/api/publishing{path}", headers=key)
            (error,) = answer.json()["errors"]
            assert (answer.status_code, error["in"], error["name"]) == (400, "header", "Idempotency-Key")
            assert words in error["message"]
        ids = set()
        for _ in range(2):
            assert run.client.get("/api/publishingAsync/both", headers=key | {"Prefer": "wait=60"}).json() == 1
            ids.add(run.client.get("/api/publishing/both", headers=key | {"Prefer": "respond-async"}).json()["id"])
        assert len(ids) == 1
        assert run.client.get("/api/publishing/own", headers=key).json() == {"Idempotency-Key": "k"}


def test_sixteen_at_once_with_one_key_give_one_job(run: Running) -> None:
    barrier = threading.Barrier(16)

    def submit() -> tuple[str, bool]:
        client = Watching(run.server)
        barrier.wait(10)
        answer = client.get("/api/publishingAsync/hello/once", headers={"Idempotency-Key": "k-sixteen"})
        client.session.close()
        assert answer.status_code == 202
        return answer.json()["id"], "Idempotency-Replayed" in answer.headers

    with ThreadPoolExecutor(16) as pool:
        answers = [future.result() for future in [pool.submit(submit) for _ in range(16)]]
    assert len({job for job, _ in answers}) == 1
    assert [replayed for _, replayed in answers].count(False) == 1


def test_keys_are_scoped_to_the_flow(run: Running) -> None:
    headers = {"Idempotency-Key": "k-scope"}
    one = run.client.get("/api/publishingAsync/hello/a", headers=headers)
    two = run.client.get("/api/publishingAsync/moment", headers=headers)
    assert (one.status_code, two.status_code) == (202, 202)
    assert one.json()["id"] != two.json()["id"]


def test_a_key_is_known_after_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path, FLOWS) as run:
        first = keyed(run, "k-restart", json=1)
        run.client.finished(first)
    with serving(tmp_path, FLOWS) as run:
        again = keyed(run, "k-restart", json=1)
        assert again.json()["id"] == first.json()["id"]
        assert again.headers["Idempotency-Replayed"] == "true"
        assert keyed(run, "k-restart", json=2).status_code == 422


def test_a_key_of_an_expired_job_is_free_before_the_purge(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, FLOWS, clock=clock, retention="1h") as run:
        first = keyed(run, "k-old", json=1)
        run.client.finished(first)
        run.app.store.purge = lambda *given: None  # type: ignore[method-assign] # purging does not come round
        clock.tick(3601)
        again = keyed(run, "k-old", json=1)
        assert again.status_code == 202
        assert "Idempotency-Replayed" not in again.headers
        assert again.json()["id"] != first.json()["id"]
        run.client.finished(again)


@pytest.mark.parametrize(("at", "status"), [("find", 200), ("result", 202)])
def test_a_repeated_submission_whose_job_expires_at_that_moment_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, status: int
) -> None:
    monkeypatch.setattr(astera_lite, "_RECENT", 0)  # ends that are answered from memory
    clock = FakeClock()
    with serving(tmp_path, FLOWS, clock=clock, retention="1h") as run:
        first = keyed(run, "k-now", json=1)
        run.client.finished(first)
        clock.tick(3599)
        job, where = JobKey.parse(first.json()["id"]), run.app if at == "find" else run.app.store
        look = getattr(where, at)

        def late(*given: Any) -> Any:
            clock.tick(2)
            if at == "result":
                run.app.housekeeper.tick(clock.now())
                until(lambda: job and run.app.store.get(job) is None)
            return look(*given)

        monkeypatch.setattr(where, at, late)
        again = keyed(run, "k-now", json=1, headers={"Prefer": "wait=5"})
        assert (again.status_code, again.headers["Idempotency-Replayed"]) == (status, "true")
        assert first.json()["id"] in again.headers["Content-Location" if status == 200 else "Location"]


# --- max_queue ---


def test_a_full_queue_is_503_but_known_keys_are_answered(tmp_path: Path, gate: Gate) -> None:
    with serving(tmp_path, {"held": get_flow("/held", steps=gate.steps())}, workers=1, max_queue=1) as run:
        url = "/api/publishingAsync/held"
        running_job = run.client.get(url)
        gate.await_entry()
        queued = run.client.get(url, headers={"Idempotency-Key": "k-full"})
        assert queued.status_code == 202
        assert queued.json()["startedAt"] is None
        refused = run.client.get(url)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) >= 1
        again = run.client.get(url, headers={"Idempotency-Key": "k-full"})
        assert (again.status_code, again.json()["id"]) == (202, queued.json()["id"])
        assert run.client.get(url + "?x=1", headers={"Idempotency-Key": "k-full"}).status_code == 422
        assert run.client.post(f"/api/jobs/{queued.json()['id']}/cancel").status_code == 200
        assert run.client.get(url).status_code == 202, "a cancelled job waits no more"
        gate.open.set()
        assert run.client.finished(running_job)["status"] == "Completed"


@pytest.mark.sqlite  # the lock of its file is what holds up the commit
def test_a_burst_during_one_commit_does_not_overfill_the_queue(tmp_path: Path, gate: Gate) -> None:
    flows = {"held": get_flow("/held", steps=gate.steps())}
    with serving(tmp_path, flows, workers=1, max_queue=5) as run, ThreadPoolExecutor(20) as pool:
        with closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # no commit gets through
            answers = [pool.submit(requests.get, f"{run.server.url}/api/publishingAsync/held") for _ in range(20)]
            until(lambda: sum(answer.done() for answer in answers) == 15)
            other.execute("COMMIT")
        codes = [answer.result().status_code for answer in answers]
        assert sorted(codes) == [202] * 5 + [503] * 15
        gate.open.set()


# --- status ---


def test_the_status_document_while_it_runs(tmp_path: Path, gate: Gate) -> None:
    with serving(tmp_path, {"held": get_flow("/held", steps=gate.steps())}) as run:
        accepted = run.client.get("/api/publishingAsync/held").json()
        gate.await_entry()
        answer = run.client.get(f"/api/jobs/{accepted['id']}/status")
        document = answer.json()
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Job-Status"] == "Running"
        assert int(answer.headers["Retry-After"]) >= 1
        assert "Location" not in answer.headers
        assert TIME.fullmatch(document["createdAt"])
        assert TIME.fullmatch(document["startedAt"])
        progress = {"step": "hold", "done": 0, "total": 2}
        assert document == accepted | {"startedAt": document["startedAt"], "attempt": 1, "progress": progress}
        result = run.client.get(f"/api/jobs/{accepted['id']}/result")
        assert (result.status_code, result.headers["Job-Status"]) == (202, "Running")
        assert result.headers["Location"] == accepted["statusUrl"]
        assert result.json()["id"] == accepted["id"]
        assert int(result.headers["Retry-After"]) >= 1
        gate.open.set()


def test_the_status_document_of_a_completed_job(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, FLOWS, clock=clock, retention="1h") as run:
        document = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
        assert set(document) == MEMBERS
        assert document["status"] == "Completed"
        assert document["createdAt"] == document["startedAt"] == document["finishedAt"] == "2026-09-21T14:13:20.000Z"
        assert document["expiresAt"] == "2026-09-21T15:13:20.000Z"
        assert (document["attempt"], document["error"], document["callback"]) == (1, None, None)
        assert document["resultUrl"] == f"{run.server.url}/api/jobs/{document['id']}/result"
        answer = run.client.get(document["statusUrl"])
        assert answer.headers["Location"] == document["resultUrl"]
        assert "Retry-After" not in answer.headers


ERRORS = [("refuse", 422, "failed"), ("gone", 502, "failed"), ("late", 504, "timeout"), ("broken", 500, "failed"),
          ("division", 500, "failed")]  # fmt: skip


@pytest.mark.parametrize(("flow", "code", "word"), ERRORS)
def test_an_error_has_the_response_of_the_synchronous_call(run: Running, flow: str, code: int, word: str) -> None:
    sync = run.client.get(f"/api/publishing/{flow}")
    assert sync.status_code == code
    assert sync.headers["Content-Type"] == "application/problem+json"
    accepted = run.client.get(f"/api/publishingAsync/{flow}")
    document = run.client.finished(accepted)
    assert document["status"] == "Error"
    assert document["error"]["code"] == word
    assert document["error"]["status"] == code
    result = run.client.get(document["resultUrl"])
    assert (result.status_code, result.headers["Job-Status"]) == (code, "Error")
    assert result.headers["Content-Type"] == "application/problem+json"
    assert result.json() == document["error"]
    assert result.json()["detail"] == sync.json()["detail"]
    if code == 500:
        assert sync.json()["detail"] == "The flow failed. Look up `requestId` in the server's log for the reason."
        assert sync.json()["requestId"] == sync.headers["X-Request-Id"]
        assert result.json()["requestId"] == document["id"]


@pytest.mark.parametrize("code", [200, 202, 204, 304, 400, 404, 409, 500, 503, 599])
def test_any_response_of_the_flow_is_completed(run: Running, code: int) -> None:
    document = run.client.finished(run.client.get(f"/api/publishingAsync/code/{code}"))
    assert (document["status"], document["error"]) == ("Completed", None)
    for answer in (run.client.get(document["resultUrl"]), run.client.get(f"/api/publishing/code/{code}")):
        assert answer.status_code == code
        assert answer.headers["X-Own"] == "yes"
        assert answer.headers["Cache-Control"] == "max-age=9"
        assert answer.content == (b"" if code in (204, 304) else b'{"own":1}\n')
    assert run.client.get(document["resultUrl"]).headers["Job-Status"] == "Completed"


@pytest.mark.parametrize(
    ("method", "response", "code", "owed"),
    [
        ("GET", {"status": "${205}", "body": 1}, 205, {"Content-Length": "0"}),
        ("GET", {"status": 401}, 401, {"WWW-Authenticate": "Bearer"}),
        ("GET", {"status": 401, "headers": {"www-authenticate": "Own"}}, 401, {"WWW-Authenticate": "Own"}),
        ("GET", {"status": "${405}", "headers": {"Allow": None}}, 405, {"Allow": ""}),
        ("GET", {"status": 405, "headers": {"Allow": "PUT"}}, 405, {"Allow": "PUT"}),
        ("GET", {"status": 206, "headers": {"Content-Range": "rows 1-2/9"}, "body": 1}, 206, {}),
        ("GET", {"status": 308, "headers": {"Location": "/x"}}, 308, {"Location": "/x"}),
        ("GET", {"status": 304}, 304, {}),
        ("GET", {"status": "${300 + 1}"}, 500, {}),
        ("GET", {"status": 303, "headers": {"Location": "${null}"}}, 500, {}),
        ("GET", {"status": "${416}"}, 500, {}),
        ("GET", {"status": "${407}"}, 500, {}),
        ("POST", {"status": "${304}"}, 500, {}),
    ],
)
def test_a_status_brings_what_it_owes(tmp_path: Path, method: str, response: Any, code: int, owed: Any) -> None:
    flow = get_flow("/x", request={"method": method}, response=response)
    stepped = get_flow("/y", request={"method": method}, steps=[{"name": "a", "respond": response}])
    with serving(tmp_path, {"x": flow, "y": stepped}) as run:
        for path in ("/x", "/y"):
            answer = run.client(method, f"/api/publishing{path}")
            assert answer.status_code == code
            assert {name: answer.headers.get(name) for name in owed} == owed
            assert answer.content == b"" or code in (206, 500)


_UNSETTABLE = ", which flows cannot set: choose another status"


@pytest.mark.parametrize(
    ("method", "response", "fault"),
    [
        ("GET", {"status": 205, "body": 1}, "/response/body: a response of status 205 has no body: leave it out"),
        ("GET", {"status": 206}, "/response/status: status 206 needs the header Content-Range"),
        ("GET", {"status": 416}, "/response/status: status 416 needs the header Content-Range"),
        ("GET", {"status": 302}, "/response/status: status 302 needs the header Location"),
        ("GET", {"status": 426}, f"/response/status: status 426 needs the header Upgrade{_UNSETTABLE}"),
        ("GET", {"status": 407}, f"/response/status: status 407 needs the header Proxy-Authenticate{_UNSETTABLE}"),
        ("POST", {"status": 304}, "/response/status: status 304 is only for GET and HEAD"),
        (
            "GET",
            {"headers": {"A": "1", "a": "2"}},
            "/response/headers/a: is the same header as A: leave one of them out",
        ),
    ],
)
def test_a_response_that_owes_something_is_not_published(
    tmp_path: Path, method: str, response: Any, fault: str
) -> None:
    with serving(tmp_path, {}) as run:
        with pytest.raises(FlowError) as caught:
            run.app.deploy("x", get_flow("/x", request={"method": method}, response=response))
        assert [str(fault).partition(": ")[2] for fault in caught.value.faults] == [fault]


def test_fail_may_set_headers(tmp_path: Path) -> None:
    flow = get_flow(
        "/x",
        request={"parameters": {"code": {"in": "query", "type": "integer"}, "by": {"in": "query"}}},
        steps=[
            {
                "name": "no",
                "fail": {
                    "status": "${params.code}",
                    "message": "no",
                    "headers": {"WWW-Authenticate": "${params.by}", "X-A": "a\r\nb", "Retry-After": 9, "Vary": "A"},
                },
            }
        ],
    )
    calling = get_flow("/y", steps=[{"name": "c", "call": {"flow": "x", "params": {"code": 401}}}])
    with serving(tmp_path, {"x": flow, "y": calling}) as run:
        for code, by, sent, got in ((401, "Own", 401, "Own"), (401, None, 401, "Bearer"), (416, "Own", 500, None)):
            answer = run.client.get("/api/publishing/x", params={"code": code, "by": by})
            assert (answer.status_code, answer.headers.get("WWW-Authenticate")) == (sent, got)
            assert answer.headers["Content-Type"] == "application/problem+json"
            document = run.client.finished(run.client.get("/api/publishingAsync/x", params={"code": code, "by": by}))
            result = run.client.get(document["resultUrl"])
            assert (result.status_code, result.headers.get("WWW-Authenticate")) == (sent, got)
            if sent == 401:
                assert (answer.headers["X-A"], answer.headers["Retry-After"]) == ("a%0D%0Ab", "9")
                assert answer.headers["Vary"] == "A, Prefer"
        answer = run.client.get("/api/publishing/y")
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        for headers in ({"Content-Type": "text/plain"}, {"Date": "x"}, {"A": 1, "a": 2}, {"a b": 1}, 1):
            with pytest.raises(FlowError):
                run.app.deploy("z", get_flow("/z", steps=[{"name": "a", "fail": {"message": "", "headers": headers}}]))


@pytest.mark.parametrize("code", [100, 199, 600, -1])
def test_a_status_that_no_flow_may_have_is_an_error_of_ours(run: Running, code: int) -> None:
    assert run.client.get(f"/api/publishing/code/{code}").status_code == 500


@pytest.mark.parametrize("flow", ["binary", "plain", "large", "nothing"])
def test_a_result_is_what_the_synchronous_call_gives_as_often_as_asked(run: Running, flow: str) -> None:
    sync = run.client.get(f"/api/publishing/{flow}")
    document = run.client.finished(run.client.get(f"/api/publishingAsync/{flow}"))
    for _ in range(3):
        answer = run.client.get(document["resultUrl"])
        assert (answer.status_code, answer.content) == (sync.status_code, sync.content)
        assert answer.headers.get("Content-Type") == sync.headers.get("Content-Type")
        assert answer.headers.get("Content-Length") == sync.headers.get("Content-Length")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == "sandbox"
        assert answer.headers["Cache-Control"] == "private, no-cache"
    head = run.client("HEAD", document["resultUrl"])
    assert (head.content, head.headers.get("Content-Length")) == (b"", sync.headers.get("Content-Length"))
    expected = {"binary": bytes(range(256)), "plain": "grüße".encode(), "nothing": b""}
    assert flow == "large" or sync.content == expected[flow]


def test_what_does_not_change_is_sent_once(run: Running) -> None:
    document = run.client.finished(run.client.get("/api/publishingAsync/hello/Ada"))
    for path in (document["statusUrl"], document["resultUrl"], "/openapi.json", "/postman.json"):
        whole = run.client.get(path)
        tag, policy = whole.headers["ETag"], whole.headers["Cache-Control"]
        assert (whole.status_code, policy) == (200, "private, no-cache")
        for method in ("GET", "HEAD"):
            for listed in (tag, f'"x", W/{tag} , "y"', "*"):
                same = run.client(method, path, headers={"If-None-Match": listed})
                assert (same.status_code, same.content) == (304, b""), (path, listed)
                assert (same.headers["ETag"], same.headers["Cache-Control"]) == (tag, policy)
                assert not {"Content-Type", "Content-Length"} & set(same.headers)
            for name, code in (("If-None-Match", 200), ("If-Match", 412)):
                for listed in ('"x"', tag.strip('"'), f"{tag[:-1]}", "", '"*"'):
                    assert run.client(method, path, headers={name: listed}).status_code == code, (path, listed)
            assert run.client(method, path, headers={"If-Match": tag, "If-None-Match": '"x"'}).status_code == 200
        if "result" not in path:
            continue
        assert run.client.get(path, headers={"If-Unmodified-Since": OLD}).status_code == 200
        assert same.headers["Job-Status"] == "Completed"


def test_a_status_document_that_changed_has_another_etag(run: Running, sink: Sink) -> None:
    url = f"/api/publishingAsync/hello/a?callbackUrl={quote(sink.url, safe='')}"
    document = run.client.finished(run.client.get(url))
    sink.next()
    until(lambda: run.client.get(document["statusUrl"]).json()["callback"]["state"] == "delivered")
    tag = run.client.get(document["statusUrl"]).headers["ETag"]
    assert run.client.get(document["statusUrl"], headers={"If-None-Match": tag}).status_code == 304
    assert run.client.post(f"/api/jobs/{document['id']}/callback").status_code == 202
    sink.next()
    until(lambda: run.client.get(document["statusUrl"]).json()["callback"]["attempts"] == 2)
    assert run.client.get(document["statusUrl"], headers={"If-None-Match": tag}).status_code == 200


OLD, NEW = "Sat, 01 Jan 2000 00:00:00 GMT", "Saturday, 01-Jan-28 00:00:00 GMT"


@pytest.mark.parametrize(
    ("own", "sent", "code"),
    [
        ({"ETag": '"a"'}, {"If-None-Match": '"a"'}, 304),
        ({"ETag": 'W/"a"'}, {"If-None-Match": '"a"'}, 304),
        ({"ETag": '"a,b"'}, {"If-None-Match": '"x", "a,b"'}, 304),
        ({"ETag": '"a,b"'}, {"If-None-Match": '"a", "b"'}, 200),
        ({"etag": '"a"'}, {"If-None-Match": '"A"'}, 200),
        ({"ETag": '"a"'}, {"If-Match": '"b", "a"'}, 200),
        ({"ETag": 'W/"a"'}, {"If-Match": 'W/"a"'}, 412),
        ({"ETag": '"a"'}, {"If-Match": "*"}, 200),
        ({}, {"If-Match": "*"}, 200),
        ({}, {"If-Match": '"a"'}, 412),
        ({}, {"If-None-Match": '"a"'}, 200),
        ({}, {"If-None-Match": "*"}, 304),
        ({}, {"If-Modified-Since": NEW}, 200),
        ({"Last-Modified": OLD}, {"If-Modified-Since": OLD}, 304),
        ({"Last-Modified": OLD}, {"If-Modified-Since": NEW}, 304),
        ({"Last-Modified": NEW}, {"If-Modified-Since": OLD}, 200),
        ({"Last-Modified": OLD}, {"If-Modified-Since": "soon"}, 200),
        ({"Last-Modified": OLD, "ETag": '"a"'}, {"If-Modified-Since": NEW, "If-None-Match": '"b"'}, 200),
        ({"Last-Modified": NEW}, {"If-Unmodified-Since": OLD}, 412),
        ({"Last-Modified": OLD}, {"If-Unmodified-Since": NEW}, 200),
        ({"Last-Modified": NEW, "ETag": '"a"'}, {"If-Unmodified-Since": OLD, "If-Match": '"a"'}, 200),
        ({"ETag": '"a"'}, {"If-Match": '"a"', "If-None-Match": '"a"'}, 304),
    ],
)
def test_preconditions_of_a_flow_that_reads(
    tmp_path: Path, own: dict[str, str], sent: dict[str, str], code: int
) -> None:
    flow = get_flow("/x", response={"headers": own | {"X-A": "b"}, "body": {"a": 1}})
    with serving(tmp_path, {"x": flow}) as run:
        whole = run.client.get("/api/publishing/x")
        answer = run.client.get("/api/publishing/x", headers=sent)
        assert answer.status_code == code
        if code == 200:
            assert (answer.content, answer.headers.get("ETag")) == (whole.content, whole.headers.get("ETag"))
        elif code == 304:
            assert answer.content == b""
            for name in ("ETag", "Cache-Control", "Vary", "X-A"):
                assert answer.headers.get(name) == whole.headers.get(name)
            assert "Content-Type" not in answer.headers
        assert ("no-cache" in whole.headers["Cache-Control"]) == ("etag" in whole.headers)
        job = run.client.get("/api/publishingAsync/x", headers=sent)
        assert job.status_code == 202, "a job that was accepted is told of, whatever was asked"


def test_an_answer_that_is_no_success_heeds_no_precondition(run: Running) -> None:
    for path in ("/api/publishing/code/404", "/api/jobs/x/status", "/nothing"):
        code = run.client.get(path).status_code
        assert code >= 400
        for name in ("If-None-Match", "If-Match"):
            for value in ("*", '"x"'):
                assert run.client.get(path, headers={name: value}).status_code == code


@pytest.mark.parametrize(("name", "value"), [("If-Match", '"x"'), ("If-None-Match", "*")])
def test_what_acts_does_not_if_a_precondition_fails(run: Running, name: str, value: str) -> None:
    before = count(run)
    for prefix in ("/api/publishing", "/api/publishingAsync"):
        answer = run.client.post(f"{prefix}/echo", json={}, headers={name: value})
        assert (answer.status_code, answer.headers["Content-Type"]) == (412, "application/problem+json")
        assert "does not hold" in answer.json()["detail"]
    assert count(run) == before
    document = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
    for method, path in (("POST", "/cancel"), ("POST", "/rerun"), ("POST", "/callback"), ("DELETE", "")):
        refused = run.client(method, f"/api/jobs/{document['id']}{path}", headers={name: value})
        assert (refused.status_code, refused.headers.get("Job-Status")) == (412, "Completed"), path
    assert run.client.get(document["resultUrl"]).status_code == 200
    other = {"If-Match": "If-None-Match", "If-None-Match": "If-Match"}[name]
    good = {"If-Match": "*", "If-None-Match": '"x"'}[other]
    assert run.client("DELETE", f"/api/jobs/{document['id']}", headers={other: good}).status_code == 204


def test_a_412_about_a_job_tells_its_state(run: Running) -> None:
    document = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
    for path in (document["statusUrl"], document["resultUrl"], "/api/publishingAsync/hello/a"):
        answer = run.client.get(path, headers={"If-Match": '"x"', "Prefer": "wait=5"})
        assert (answer.status_code, answer.headers.get("Job-Status")) == (412, "Completed"), path


def test_a_flow_that_declares_a_precondition_heeds_it_itself(tmp_path: Path) -> None:
    request = {"method": "PUT", "parameters": {"If-Match": {"in": "header"}}}
    flow = get_flow("/x", request=request, response={"status": "${412 if params['If-Match'] != '\"a\"' else 200}"})
    with serving(tmp_path, {"x": flow}) as run:
        for tag, code in (('"a"', 200), ('"b"', 412)):
            assert run.client("PUT", "/api/publishing/x", headers={"If-Match": tag}).status_code == code


def test_a_large_body_goes_through(run: Running) -> None:
    value = {"data": "ñ" * 1_500_000}
    document = run.client.finished(run.client.post("/api/publishingAsync/echo", json=value))
    assert run.client.get(document["resultUrl"]).json()["body"] == value
    details = run.client.get(f"/api/jobs/{document['id']}").json()
    assert details["request"]["bodySize"] > 3_000_000
    assert len(details["request"]["body"]) <= 4096


def test_upper_case_ids_are_the_same_job(run: Running) -> None:
    document = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
    for path in ("", "/status", "/result"):
        assert run.client.get(f"/api/jobs/{document['id'].upper()}{path}").status_code == 200


# --- Unknown ---


def id_at(ms: int) -> str:
    return str(JobKey(ms << 12, 12345))


BAD_IDS = [
    "x", "status", "1", "%00", "0" * 36, "0192f0c1-0000-4000-8000-000000000000", "0192f0c1000070008000000000000000",
    "%7B0192f0c1-0000-7000-8000-000000000000%7D", "9" * 2000, "%F0%9F%98%80", "..%2F..%2Fetc", "'%20OR%201=1--",
]  # fmt: skip
UNDER_ID = [("GET", "/status"), ("GET", "/result"), ("GET", ""), ("POST", "/cancel"), ("POST", "/rerun"),
            ("POST", "/callback"), ("DELETE", "")]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), UNDER_ID)
def test_an_unknown_job_is_404_everywhere_with_its_reason(run: Running, method: str, path: str) -> None:
    now = run.app.clock.now()
    known = [(text, "not-found") for text in BAD_IDS]
    known += [
        (id_at(now - 90_000_000), "expired"),
        (id_at(now - 80_000_000), "not-found"),
        (id_at(now + 10**9), "not-found"),
    ]
    for text, reason in known:
        answer = run.client(method, f"/api/jobs/{text}{path}")
        assert answer.status_code == 404, text
        assert answer.headers["Job-Status"] == "Unknown"
        assert answer.headers["Cache-Control"] == "no-store"
        document = answer.json()
        assert document["reason"] == reason
        assert document["detail"]
        if path == "/status":
            assert answer.headers["Content-Type"] == "application/json"
            assert set(document) == {"id", "status", "reason", "detail"}
            assert (document["status"], document["id"]) == ("Unknown", text[:100])
        else:
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert document["id"] == text[:100]


def test_waiting_for_an_unknown_job_does_not_wait(run: Running) -> None:
    answer = run.client.get(f"/api/jobs/{id_at(1)}/status", headers={"Prefer": "wait=60"}, timeout=20)
    assert answer.status_code == 404


def test_from_the_moment_of_expiry_a_job_is_unknown_though_its_row_is_there(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, FLOWS, clock=clock, retention="1h") as run:
        document = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
        run.app.store.purge = lambda *given: None  # type: ignore[method-assign] # purging does not come round
        clock.tick(3599.999)
        assert run.client.get(document["resultUrl"]).status_code == 200
        clock.tick(0.001)
        for path in ("/status", "/result", ""):
            answer = run.client.get(f"/api/jobs/{document['id']}{path}")
            assert (answer.status_code, answer.headers["Job-Status"]) == (404, "Unknown")
        assert run.client.get(document["statusUrl"]).json()["reason"] == "expired"
        assert run.client.get("/api/jobs").json()["jobs"] == []
        assert run.client("DELETE", f"/api/jobs/{document['id']}").status_code == 404


# --- list ---


def test_the_list_walks_over_all_jobs_newest_first(tmp_path: Path) -> None:
    with serving(tmp_path, FLOWS) as run:
        made = [run.client.get(f"/api/publishingAsync/hello/{n}") for n in range(57)]
        made += [run.client.get("/api/publishingAsync/refuse") for _ in range(6)]
        forever = run.client.get("/api/publishingAsync/forever").json()["id"]
        for accepted in made:
            run.client.finished(accepted)
        ids = [*(answer.json()["id"] for answer in made), forever][::-1]
        for limit in (1, 7, 63, 64, 65):
            seen: list[str] = []
            cursor: str | None = ""
            while cursor is not None:
                page = run.client.get(f"/api/jobs?limit={limit}" + (f"&cursor={cursor}" if cursor else "")).json()
                assert set(page) == {"jobs", "next"}
                assert 0 < len(page["jobs"]) <= limit
                seen += [job["id"] for job in page["jobs"]]
                cursor = page["next"]
            assert seen == ids
        assert len(run.client.get("/api/jobs").json()["jobs"]) == 50
        assert all(set(job) == MEMBERS for job in run.client.get("/api/jobs").json()["jobs"])

        def found(query: str) -> list[str]:
            return [job["id"] for job in run.client.get(f"/api/jobs?limit=1000&{query}").json()["jobs"]]

        assert found("status=Running") == [forever]
        assert found("status=Error") == found("flow=refuse") == ids[1:7]
        assert found("status=Completed&flow=hello") == ids[7:]
        assert found("status=Error&flow=hello") == found("flow=nobody") == found("flow=") == []
        run.client.post(f"/api/jobs/{forever}/cancel")


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("limit=0", {"limit"}), ("limit=1001", {"limit"}), ("limit=-1", {"limit"}), ("limit=", {"limit"}),
        ("limit=1.0", {"limit"}), ("limit=%C2%B2", {"limit"}), ("limit=99999999999999999999", {"limit"}),
        ("limit=0000000501001", {"limit"}), (f"limit=000000050{'9' * 5000}", {"limit"}),
        ("status=running", {"status"}), ("status=Unknown", {"status"}), ("status=", {"status"}),
        ("cursor=", {"cursor"}), ("cursor=x", {"cursor"}), ("cursor=-1", {"cursor"}), ("cursor=' OR 1", {"cursor"}),
        ("cursor=ffffffffffffffff", {"cursor"}), ("limit=x&status=y&cursor=z", {"limit", "status", "cursor"}),
        ("status=Running&status=Error&flow=a&flow=b", {"status", "flow"}), ("limit=1&limit=1", {"limit"}),
    ],
)  # fmt: skip
def test_a_bad_list_query_is_400_and_names_every_fault(run: Running, query: str, names: set[str]) -> None:
    answer = run.client.get(f"/api/jobs?{query}")
    assert answer.status_code == 400
    assert {error["name"] for error in answer.json()["errors"]} == names


@pytest.mark.parametrize(
    "query", ["limit=1", "limit=1000", "flow=%27%3B--", "flow=%E2%98%83", "cursor=fffffffffffffff", "unknown=1"]
)
def test_a_good_list_query_is_200(run: Running, query: str) -> None:
    answer = run.client.get(f"/api/jobs?{query}")
    assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-store")


# --- cancel, rerun, delete, callback again ---


def test_cancel_of_a_queued_a_running_and_a_finished_job(tmp_path: Path, gate: Gate) -> None:
    with serving(tmp_path, {"held": get_flow("/held", steps=gate.steps())}, workers=1) as run:
        one, two = (run.client.get("/api/publishingAsync/held") for _ in range(2))
        gate.await_entry()
        queued = run.client.post(f"/api/jobs/{two.json()['id']}/cancel")
        assert queued.status_code == 200
        assert (queued.json()["status"], queued.json()["error"]["code"]) == ("Error", "cancelled")
        assert queued.json()["startedAt"] is None
        running_job = run.client.post(f"/api/jobs/{one.json()['id']}/cancel")
        assert (running_job.status_code, running_job.headers["Job-Status"]) == (202, "Running")
        for accepted in (one, two):
            document = run.client.finished(accepted)
            assert document["error"]["code"] == "cancelled"
            result = run.client.get(document["resultUrl"])
            assert (result.status_code, result.headers["Job-Status"]) == (409, "Error")
            assert run.client.post(f"/api/jobs/{document['id']}/cancel").status_code == 409
        steps = run.client.get(f"/api/jobs/{one.json()['id']}").json()["steps"]
        assert [step["name"] for step in steps] == ["hold"], "the step after it did not run"


def test_cancel_in_the_instant_of_the_end_is_409(run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = run.client.get("/api/publishingAsync/forever").json()
    until(lambda: run.app.engine.queue.counts()["waiting"])
    cancel = run.app.engine.cancel

    def too_late(job: Job) -> bool:  # it ends between the look and the cancel
        run.app.engine.end(job, Outcome(Answer(200, (), b"by itself")))
        return cancel(job)

    monkeypatch.setattr(run.app.engine, "cancel", too_late)
    answer = run.client.post(f"/api/jobs/{accepted['id']}/cancel")
    assert (answer.status_code, answer.headers["Job-Status"]) == (409, "Completed")


def test_cancel_of_a_waiting_job_ends_it_now(run: Running) -> None:
    accepted = run.client.get("/api/publishingAsync/forever")
    job = accepted.json()["id"]
    until(lambda: run.app.engine.queue.counts()["waiting"])
    answer = run.client.post(f"/api/jobs/{job}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (200, "cancelled")
    assert run.client.get(f"/api/jobs/{job}/result").status_code == 409


@pytest.mark.parametrize(("method", "path"), [("POST", "/rerun"), ("POST", "/callback"), ("DELETE", "")])
def test_what_needs_a_finished_job_is_409_while_it_runs(run: Running, method: str, path: str) -> None:
    accepted = run.client.get("/api/publishingAsync/forever?callbackUrl=http%3A%2F%2F127.0.0.1%3A1%2F").json()
    answer = run.client(method, f"/api/jobs/{accepted['id']}{path}")
    assert answer.status_code == 409
    assert answer.headers["Job-Status"] == "Running"
    assert run.client.get(accepted["statusUrl"]).json()["status"] == "Running"
    run.client.post(f"/api/jobs/{accepted['id']}/cancel")


@pytest.mark.parametrize("path", ["/cancel", "/callback"])
def test_a_409_about_a_finished_job_tells_its_state(run: Running, path: str) -> None:
    document = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
    answer = run.client.post(f"/api/jobs/{document['id']}{path}")
    assert (answer.status_code, answer.headers.get("Job-Status")) == (409, "Completed")


def test_rerun_is_a_new_job_of_the_flow_as_it_is_now(tmp_path: Path, sink: Sink) -> None:
    def version(n: int) -> dict[str, Any]:
        return ECHO | {"response": {"body": {"v": n, "params": "${params}", "body": "${request.body}"}}}

    with serving(tmp_path, {"echo": version(1)}) as run:
        query = f"a=7&callbackUrl={quote(sink.url, safe='')}"
        first = keyed(run, "k-rerun", f"echo?{query}", json=["x"])
        run.client.finished(first)
        run.app.deploy("echo", version(2))
        again = run.client.post(f"/api/jobs/{first.json()['id']}/rerun")
        assert again.status_code == 202
        assert again.headers["Location"] == again.json()["statusUrl"]
        assert again.json()["id"] != first.json()["id"]
        assert again.json()["callback"]["url"] == sink.url
        assert "Idempotency-Replayed" not in again.headers
        result = run.client.get(run.client.finished(again)["resultUrl"]).json()
        assert result == {"v": 2, "params": {"a": 7, "b": None}, "body": ["x"]}
        assert {sink.next()[1]["id"], sink.next()[1]["id"]} == {first.json()["id"], again.json()["id"]}
        run.app.deploy("echo", ECHO | {"request": ECHO["request"] | {"resource": "/elsewhere"}})
        gone = run.client.post(f"/api/jobs/{first.json()['id']}/rerun")
        assert (gone.status_code, gone.headers.get("Job-Status")) == (409, "Completed")


@pytest.mark.sqlite  # reads of a shared database have begun a thread already
def test_a_request_that_gets_no_thread_is_refused_and_not_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def start_or_refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("astera-slow"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with serving(tmp_path, FLOWS) as run:
        job = run.client.post("/api/publishingAsync/echo", json=1, headers={"Prefer": "wait=2"})
        rerun = job.headers["Content-Location"].replace("/result", "/rerun")
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start_or_refuse)
            answer = run.client.post(rerun)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert count(run) == 1
        assert run.client.post(rerun).status_code == 202
        assert count(run) == 2


def test_a_rerun_is_stored_at_once(run: Running) -> None:
    job = run.client.finished(run.client.get("/api/publishingAsync/hello/a"))
    times = []
    for _ in range(5):
        began = time.monotonic()
        assert run.client.post(f"/api/jobs/{job['id']}/rerun").status_code == 202
        times.append(time.monotonic() - began)
    assert sorted(times)[2] < 0.5  # not when the loop wakes for another reason


def test_rerun_of_input_that_the_flow_refuses_now_is_400(tmp_path: Path) -> None:
    with serving(tmp_path, {"echo": ECHO}) as run:
        first = run.client.finished(run.client.post("/api/publishingAsync/echo?a=7"))
        less = ECHO["request"] | {"parameters": {"a": {"in": "query", "type": "integer", "maximum": 5}}}
        run.app.deploy("echo", ECHO | {"request": less})
        refused = run.client.post(f"/api/jobs/{first['id']}/rerun")
        assert (refused.status_code, refused.headers.get("Job-Status")) == (400, "Completed")
        assert count(run) == 1


def test_delete_forgets_a_finished_job(run: Running) -> None:
    document = run.client.finished(run.client.get("/api/publishingAsync/large"))
    assert run.client("DELETE", f"/api/jobs/{document['id']}").status_code == 204
    gone = run.client.get(document["statusUrl"])
    assert (gone.status_code, gone.json()["reason"]) == (404, "not-found")
    assert run.client.get(document["resultUrl"]).status_code == 404
    assert run.client("DELETE", f"/api/jobs/{document['id']}").status_code == 404


def test_a_callback_is_sent_again_with_the_same_id_and_its_history_kept(run: Running, sink: Sink) -> None:
    sink.answers = [500]
    accepted = run.client.get(f"/api/publishingAsync/hello/a?callbackUrl={quote(sink.url, safe='')}")
    job = accepted.json()["id"]
    assert accepted.json()["callback"] == {
        "url": sink.url, "state": "pending", "attempts": 0, "lastStatus": None, "nextAttemptAt": None
    }  # fmt: skip
    first = sink.next()
    until(lambda: run.client.get(f"/api/jobs/{job}/status").json()["callback"]["attempts"] == 1)
    owed = run.client("DELETE", f"/api/jobs/{job}")
    assert (owed.status_code, owed.headers.get("Job-Status")) == (409, "Completed")
    again = run.client.post(f"/api/jobs/{job}/callback")
    assert (again.status_code, again.headers["Job-Status"]) == (202, "Completed")
    second = sink.next()
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert first[1] == second[1]
    assert first[0]["location"] == first[1]["resultUrl"]
    until(lambda: run.client.get(f"/api/jobs/{job}/status").json()["callback"]["state"] == "delivered")
    callback = run.client.get(f"/api/jobs/{job}").json()["callback"]
    assert [(entry["status"], entry["error"]) for entry in callback["history"]] == [(500, None), (204, None)]
    assert (callback["attempts"], callback["lastStatus"], callback["nextAttemptAt"]) == (2, 204, None)
    assert run.client("DELETE", f"/api/jobs/{job}").status_code == 204


# --- details ---


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    steps = [
        {"name": "skip", "when": "${False}", "set": 1},
        {"name": "show", "set": "key ${secrets.KEY}"},
        {"name": "far", "set": "${'x' * 195 + secrets.KEY}"},
    ]
    flows = {
        "keep": ECHO | {"steps": steps},
        "tell": get_flow("/tell", steps=[{"name": "t", "fail": {"status": 400, "message": "not ${secrets.KEY}"}}]),
    }
    with serving(tmp_path_factory.mktemp("s"), flows, secrets="KEY", environ={"KEY": SECRET}) as server:
        yield server


def test_details_have_request_steps_and_no_secrets(secretive: Running) -> None:
    run = secretive
    before = "y" * 4090
    path = f"/api/publishingAsync/echo?b={quote(SECRET, safe='')}"
    body = (before + SECRET).encode()
    document = run.client.finished(run.client.post(path, data=body, headers={"Content-Type": "text/plain"}))
    answer = run.client.get(f"/api/jobs/{document['id']}")
    details = answer.json()
    assert answer.headers["Job-Status"] == "Completed"
    assert {key: details[key] for key in MEMBERS} == document
    assert details["request"]["method"] == "POST"
    assert details["request"]["path"] == "/echo"
    assert details["request"]["bodySize"] == len(body)
    steps = {step["name"]: step for step in details["steps"]}
    assert [(name, step["kind"], step["state"]) for name, step in steps.items()] == [
        ("skip", "set", "skipped"), ("show", "set", "finished"), ("far", "set", "finished")
    ]  # fmt: skip
    assert all(
        step.keys() >= {"name", "kind", "state", "startedAt", "finishedAt", "size", "preview"}
        for step in steps.values()
    )
    assert "***" in steps["show"]["preview"]
    assert SECRET not in answer.text


def test_a_secret_is_not_shown_percent_encoded(secretive: Running) -> None:
    encoded = quote(SECRET, safe="")
    document = secretive.client.finished(secretive.client.post(f"/api/publishingAsync/echo?b={encoded}"))
    assert encoded not in secretive.client.get(f"/api/jobs/{document['id']}").text


def test_no_part_of_a_secret_is_shown_where_a_text_is_cut(secretive: Running) -> None:
    body = ("y" * 4090 + SECRET).encode()
    more = {"data": body, "headers": {"Content-Type": "text/plain"}}
    document = secretive.client.finished(secretive.client.post("/api/publishingAsync/echo", **more))
    details = secretive.client.get(f"/api/jobs/{document['id']}").json()
    assert SECRET[:4] not in details["request"]["body"]
    assert SECRET[:4] not in str(details["steps"])


def test_a_secret_in_a_message_is_masked_in_the_status(secretive: Running) -> None:
    document = secretive.client.finished(secretive.client.get("/api/publishingAsync/tell"))
    assert document["error"]["detail"] == "not ***"


# --- URLs ---


def test_urls_come_from_the_host_of_the_request(run: Running) -> None:
    port = run.server.server_address[1]
    for host in (f"localhost:{port}", "localhost", "[::1]:81"):
        forwarded = {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https", "Forwarded": "host=evil.example"}
        answer = run.client.get("/api/publishingAsync/hello/a", headers={"Host": host} | forwarded)
        assert answer.headers["Location"].startswith(f"http://{host}/api/jobs/")
        assert answer.headers["Location"] == answer.json()["statusUrl"]
        status = run.client.get(f"/api/jobs/{answer.json()['id']}/status", headers={"Host": "localhost:5"})
        assert status.json()["statusUrl"].startswith("http://localhost:5/")


def test_urls_come_from_public_url_if_set(tmp_path: Path, sink: Sink) -> None:
    base = "https://jobs.example/astera"
    with serving(tmp_path, FLOWS, public_url=base + "/", insecure_open=True, callback_allow="127.0.0.1") as run:
        answer = run.client.get(f"/api/publishingAsync/hello/a?callbackUrl={quote(sink.url, safe='')}")
        job = answer.json()["id"]
        assert answer.headers["Location"] == answer.json()["statusUrl"] == f"{base}/api/jobs/{job}/status"
        assert sink.next()[0]["location"] == f"{base}/api/jobs/{job}/result"
        done = run.client.get("/api/publishingAsync/hello/a", headers={"Prefer": "wait=5"})
        assert done.headers["Content-Location"].startswith(base + "/api/jobs/")
        listed = run.client.get("/api/deployments/hello").json()["urls"]
        assert listed["synchronous"] == f"{base}/api/publishing/hello/{{name}}"


def test_a_callback_has_the_base_of_the_submission(run: Running, sink: Sink) -> None:
    url = f"/api/publishingAsync/hello/a?callbackUrl={quote(sink.url, safe='')}"
    run.client.get(url, headers={"Host": "localhost:777"})
    headers, body = sink.next()
    assert headers["location"] == body["resultUrl"]
    assert body["statusUrl"].startswith("http://localhost:777/")
    assert set(body) == MEMBERS - {"callback"}


# --- the rest ---


def test_health(run: Running) -> None:
    answer = run.client.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert answer.headers["Cache-Control"] == "no-store"


def test_deployments_are_listed(run: Running) -> None:
    document = run.client.get("/api/deployments").json()
    assert {flow["name"] for flow in document["deployments"]} == set(FLOWS)
    assert document["faults"] == []
    one = run.client.get("/api/deployments/typed").json()
    assert one in document["deployments"]
    assert (one["method"], one["resource"], one["processing"]) == ("GET", "/typed", ["synchronous", "asynchronous"])
    assert one["urls"]["asynchronous"] == f"{run.server.url}/api/publishingAsync/typed"
    assert one["parameters"]["n"]["minimum"] == 1
    missing = run.client.get("/api/deployments/typde")
    assert missing.status_code == 404
    assert "typed" in missing.json()["detail"]


def test_a_faulty_file_shows_in_deployments_and_the_others_are_served(tmp_path: Path) -> None:
    flows = tmp_path / "flows"
    flows.mkdir()
    (flows / "bad.json").write_text('{"request": {"method": "FETCH", "resource": "/bad"}}')
    (flows / "good.json").write_text('{"request": {"method": "GET", "resource": "/good"}, "response": {"body": 1}}')
    with serving(tmp_path, flows=None, database=str(tmp_path / "f.db")) as run:
        run.app.deployer.folder = flows
        run.app.deployer.reload()
        document = run.client.get("/api/deployments").json()
        assert [flow["name"] for flow in document["deployments"]] == ["good"]
        assert document["faults"][0]["file"] == "bad.json"
        assert run.client.get("/api/publishing/good").json() == 1
        assert run.client.get("/health").json()["deployments"] == {"published": 1, "faults": len(document["faults"])}


@pytest.mark.parametrize(
    "path", ["/nothing-here", "/api", "/api/", "/api/jobs/", "/api/jobs/x/y", "/api/jobs/x/status/", "//api/jobs"]
)
def test_what_is_not_there_is_404(run: Running, path: str) -> None:
    answer = run.client.get(path)
    assert answer.status_code == 404
    assert answer.headers["Content-Type"] == "application/problem+json"


def test_sync_timeout_is_504(tmp_path: Path) -> None:
    with serving(tmp_path, FLOWS, sync_timeout="100ms") as run:
        answer = run.client.get("/api/publishing/forever")
        assert answer.status_code == 504
        assert answer.headers["Content-Type"] == "application/problem+json"


def test_a_client_that_hangs_up_does_not_cancel(tmp_path: Path, gate: Gate) -> None:
    ended = threading.Event()
    steps = [*gate.steps(), {"name": "end", "python": {"call": lambda context: ended.set()}}]
    with serving(tmp_path, {"held": get_flow("/held", steps=steps)}) as run:
        with pytest.raises(requests.exceptions.ReadTimeout):
            run.client.get("/api/publishing/held", timeout=0.2)
        gate.await_entry()
        gate.open.set()
        assert ended.wait(5)


def test_a_store_that_fails_is_503_and_the_server_lives_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(astera_lite, "_RECENT", 0)  # ends that are answered from memory
    with serving(tmp_path, FLOWS) as run:
        first = keyed(run, "k-store")
        document = run.client.finished(first)

        def fail(self: Store, *values: Any) -> Any:
            raise StoreError("it cannot be read")

        for name, call in (
            ("get", lambda: run.client.get(document["statusUrl"])),
            ("get", lambda: keyed(run, "k-store")),
            ("result", lambda: run.client.get(document["resultUrl"])),
            ("page", lambda: run.client.get("/api/jobs")),
            ("request", lambda: run.client.post(f"/api/jobs/{document['id']}/rerun")),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(type(run.app.store), name, fail)
                answer = call()
                assert (answer.status_code, answer.headers["Content-Type"]) == (503, "application/problem+json")
                assert int(answer.headers["Retry-After"]) >= 1
            assert run.client.get(document["statusUrl"]).status_code == 200


def test_an_unforeseen_error_is_a_500_that_tells_nothing(run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: Any) -> Any:
        raise RuntimeError("hidden-cause")

    monkeypatch.setattr(run.app.store, "page", fail)
    answer = run.client.get("/api/jobs")
    assert answer.status_code == 500
    assert answer.json()["detail"] == "The server failed. Look up `requestId` in its log for the reason."
    assert answer.json()["requestId"] == answer.headers["X-Request-Id"]


def test_request_ids_differ(run: Running) -> None:
    assert len({run.client.get("/health").headers["X-Request-Id"] for _ in range(20)}) == 20


@pytest.mark.parametrize("path", ["/api/publishing/nothing", "/api/publishingAsync/nothing"])
def test_publishing_answers_vary_by_prefer_also_as_errors(tmp_path: Path, path: str) -> None:
    with running(tmp_path, {}) as server:
        assert server.client.get(path).headers["Vary"] == "Prefer"
        assert "Vary" not in server.client.get("/api/jobs").headers


def test_an_encoded_slash_makes_another_request_of_a_key(tmp_path: Path) -> None:
    flow = get_flow("/p/{a}/{b}", response={"body": "${params}"})
    with running(tmp_path, {"p": flow}) as server:
        key = {"Idempotency-Key": "k"}
        assert server.client.get("/api/publishingAsync/p/x%2Fy/z", headers=key).status_code == 202
        assert server.client.get("/api/publishingAsync/p/x/y%2Fz", headers=key).status_code == 422
        assert server.client.get("/api/publishingAsync/p/x%2fy/%7A", headers=key).status_code == 202


def test_a_job_of_a_flow_that_is_synchronous_only_by_now_is_not_rerun(tmp_path: Path) -> None:
    with running(tmp_path, {"p": get_flow("/p")}) as server:
        job = server.client.finished(server.client.get("/api/publishingAsync/p"))
        server.app.deploy("p", get_flow("/p", request={"processing": ["synchronous"]}))
        refused = server.client.post(f"/api/jobs/{job['id']}/rerun")
        assert refused.status_code == 409 and "synchronously only" in refused.json()["detail"]


def test_a_long_poll_whose_client_has_gone_leaves_no_watcher(tmp_path: Path) -> None:
    with running(tmp_path, {"w": get_flow("/w", steps=[{"name": "w", "wait": 60}])}) as server:
        path = server.client.get("/api/publishingAsync/w").headers["Location"].removeprefix(server.client.url)
        host, port = server.client.url.removeprefix("http://").split(":")
        pollers = [socket.create_connection((host, int(port)), timeout=10) for _ in range(5)]
        for poller in pollers:
            poller.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nPrefer: wait=50\r\n\r\n".encode())
        until(lambda: sum(map(len, server.app.watchers.by_job.values())) == 5)
        for poller in pollers:
            poller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            poller.close()  # a reset, not an end
        until(lambda: not server.app.watchers.by_job)


def test_a_client_that_goes_while_its_job_changes_leaves_no_watcher(tmp_path: Path) -> None:
    with running(tmp_path, {"w": get_flow("/w", steps=[{"name": "w", "wait": 60}])}) as server:
        where = server.client.get("/api/publishingAsync/w").headers["Location"]
        key = JobKey.parse(where.split("/")[-2])
        assert key is not None
        host, port = server.client.url.removeprefix("http://").split(":")
        poller = socket.create_connection((host, int(port)), timeout=10)
        path = where.removeprefix(server.client.url)
        poller.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nPrefer: wait=50\r\n\r\n".encode())
        until(lambda: server.app.watchers.by_job)
        entered, leave = threading.Event(), threading.Event()
        server.server.post(lambda: (entered.set(), leave.wait(10))[0])
        assert entered.wait(10)  # the loop is held: it sees the end of the connection first, then the news of the job
        poller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        poller.close()
        server.app.watchers.tell(key)
        done = threading.Event()
        leave.set()
        server.server.post(lambda: server.server.post(done.set))
        assert done.wait(10)
        assert not server.app.watchers.by_job
