"""The `http` step in full: connections, pages, until, limits; against real servers."""

from __future__ import annotations

import base64
import email.utils
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support import FakeClock, get_flow

from astera_lite import AsteraLite, FlowError, Server, Status, build_flow

Reply = tuple[int, Any, Any]  # status, headers (also as pairs), body (JSON, or bytes)


class Api:
    """A server that answers by a function of (path, query, handler), and keeps what it was asked."""

    def __init__(self, reply: Callable[[str, dict[str, str], BaseHTTPRequestHandler], Reply | None]) -> None:
        api = self
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                api.bodies.append(self.body)
                api.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                found = reply(parts.path, query, self)
                if found is None:
                    self.close_connection = True
                    return
                code, headers, body = found
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(code)
                pairs = list(headers.items()) if isinstance(headers, dict) else headers
                if "Content-Type" not in dict(pairs):
                    self.send_header("Content-Type", "application/json")
                for name, value in [*pairs, ("Content-Length", str(len(data)))]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_GET

            def log_message(self, *args: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def api(reply: Callable[[str, dict[str, str], Any], Reply | None]) -> Iterator[Api]:
    found = Api(reply)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def serving(folder: Path, connections: Any, *steps: Any, clock: Any = None, **settings: Any) -> Iterator[AsteraLite]:
    flows = folder / "flows"
    flows.mkdir(exist_ok=True)
    if connections is not None:
        (flows / "connections.json").write_text(json.dumps(connections))
    (flows / "f.json").write_text(json.dumps(get_flow("/f", steps=list(steps), request=V)))
    app = AsteraLite(flows=str(flows), database=str(folder / "jobs.db"), clock=clock, shutdown_timeout=5, **settings)
    with app:
        yield app


V = {"parameters": {"v": {"in": "query"}}}


def step(**spec: Any) -> dict[str, Any]:
    return {"name": "c", "http": {"connection": "a", **spec}}


def answer(app: AsteraLite, **params: Any) -> Any:
    result = app.run("f", params)
    assert result.status_code == 200, result.text
    return result.json()


def echo(path: str, query: dict[str, str], handler: Any) -> Reply:
    return 200, {}, {"path": path, "query": query}


# ---- connections -----------------------------------------------------------------------------------------------------


def test_a_connection_gives_address_headers_and_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTERA_FLOW_TENANT", "t1")
    headers = {"X-Tenant": "${env.ASTERA_FLOW_TENANT}", "X-Kind": "shared", "User-Agent": "mine"}
    with api(echo) as there:
        connection = {"a": {"url": there.url + "/v2/", "headers": headers, "timeout": 5}}
        spec = step(path="/people/${params.v}", query={"q": "a b"}, headers={"x-kind": "own"})
        with serving(tmp_path, connection, spec, callback_allow="none") as app:  # its address is the author's choice
            assert answer(app, v="a/ä?x")["body"] == {"path": "/v2/people/a%2F%C3%A4%3Fx", "query": {"q": "a b"}}
            [(_, sent)] = there.seen
            assert (sent["x-tenant"], sent["x-kind"], sent["user-agent"]) == ("t1", "own", "mine")
            assert app.run("f", {"v": ".."}).status_code == 500


@pytest.mark.parametrize(
    ("path", "asked", "query"),
    [
        (None, "/v2", {"key": "1"}),
        ("/people", "/v2/people", {"key": "1", "q": "2"}),
        ("/people?a=3", "/v2/people", {"key": "1", "a": "3", "q": "2"}),
        ("?a=3", "/v2", {"key": "1", "a": "3"}),
    ],
)
def test_the_query_of_a_connection_is_sent_with_every_path(
    tmp_path: Path, path: str | None, asked: str, query: dict[str, str]
) -> None:
    spec = {} if path is None else {"path": path}
    with api(echo) as there:
        more = {"query": {"q": 2}} if "q" in query else {}
        with serving(tmp_path, {"a": {"url": there.url + "/v2?key=1"}}, step(**spec, **more)) as app:
            assert answer(app)["body"] == {"path": asked, "query": query}


AUTHS = [
    ({"bearer": "${secrets.KEY}"}, "authorization", "Bearer hidden"),
    ({"basic": {"user": "ä", "password": "${secrets.KEY}"}}, "authorization", "Basic " + base64.b64encode("ä:hidden".encode()).decode()),  # noqa: E501
    ({"apiKey": {"in": "header", "name": "X-Key", "value": "${secrets.KEY}"}}, "x-key", "hidden"),
]  # fmt: skip


@pytest.mark.parametrize(("auth", "name", "text"), AUTHS)
def test_credentials_are_sent_but_not_to_another_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auth: Any, name: str, text: str
) -> None:
    monkeypatch.setenv("KEY", "hidden")
    with api(echo) as other, api(lambda path, query, handler: (302, {"Location": other.url + "/o"}, None)) as there:
        connection = {"a": {"url": there.url, "auth": auth, "headers": {"X-Other": "x"}}}
        with serving(tmp_path, connection, step(), secrets="KEY", callback_allow="127.0.0.1") as app:
            assert answer(app)["body"]["path"] == "/o"
        assert there.seen[0][1][name] == text
        assert not {name, "x-other"} & other.seen[0][1].keys()


def test_an_api_key_in_the_query(tmp_path: Path) -> None:
    with api(echo) as there:
        auth = {"apiKey": {"in": "query", "name": "key", "value": "k/1"}}
        with serving(tmp_path, {"a": {"url": there.url, "auth": auth}}, step(query={"x": 1})) as app:
            assert answer(app)["body"]["query"] == {"x": "1", "key": "k/1"}
            assert app.outside.masked("key=k%2F1 k/1") == "key=*** ***"


@pytest.mark.parametrize("where", ["header", "body"])
def test_an_oauth_token_is_got_once_kept_and_renewed(tmp_path: Path, where: str) -> None:
    tokens: list[str] = []
    clock = FakeClock()

    def reply(path: str, query: dict[str, str], handler: Any) -> Reply:
        if path == "/token":
            form = {name: values[0] for name, values in parse_qs(handler.body.decode()).items()}
            assert (form["grant_type"], form["scope"]) == ("client_credentials", "read")
            basic = "Basic " + base64.b64encode(b"id:se%2Fcret").decode()
            given = (
                handler.headers["Authorization"] == basic if where == "header" else form["client_secret"] == "se/cret"
            )
            tokens.append(f"token-{len(tokens)}")
            return (200 if given else 401), {}, {"access_token": tokens[-1], "expires_in": 600, "token_type": "Bearer"}
        fresh = handler.headers["Authorization"] == f"Bearer {tokens[-1]}" and path != "/revoked"
        return (200 if fresh else 401), {}, {"ok": True}

    with api(reply) as there:
        oauth = {
            "tokenUrl": there.url + "/token",
            "clientId": "id",
            "clientSecret": "se/cret",
            "scope": "read",
            "in": where,
        }
        with serving(tmp_path, {"a": {"url": there.url, "auth": {"oauth2": oauth}}}, step(), clock=clock) as app:
            for _ in range(3):
                answer(app)
            assert tokens == ["token-0"]
            assert app.outside.masked("Bearer token-0, se/cret") == "Bearer ***, ***"
            clock.tick(575)
            answer(app)
            assert tokens == ["token-0", "token-1"]
            tokens.append("token-2")  # the one that is kept was revoked
            answer(app)
            assert len(tokens) == 4
            app.deploy("f", get_flow("/f", steps=[step(path="/revoked")]))
            assert app.run("f").status_code == 502  # a second 401 is the answer
            assert len(tokens) == 5
            assert app.run("f").status_code == 502  # it is no reason to get a token, which the next call would replace
            assert len(tokens) == 6


@pytest.mark.parametrize(
    ("life", "asked"), [("600", 2), (600.5, 2), (None, 1), ("", 1), ("soon", 1), ([], 1), (-1, 1), (0, 1), ("NaN", 1)]
)
def test_a_token_is_taken_from_any_success_whatever_form_its_life_has(tmp_path: Path, life: Any, asked: int) -> None:
    clock, tokens = FakeClock(), [0]

    def reply(path: str, query: dict[str, str], handler: Any) -> Reply:
        if path == "/token":
            tokens[0] += 1
            text = json.dumps({"access_token": "t", "expires_in": life}).encode()
            return 201, {"Content-Type": "text/plain"}, b"\xef\xbb\xbf" + text
        return (200 if handler.headers["Authorization"] == "Bearer t" else 401), {}, None

    with api(reply) as there:
        oauth = {"tokenUrl": there.url + "/token", "clientId": "id", "clientSecret": "s"}
        with serving(tmp_path, {"a": {"url": there.url, "auth": {"oauth2": oauth}}}, step(), clock=clock) as app:
            for _ in range(2):
                assert answer(app)["status"] == 200
                clock.tick(900)
            assert tokens == [asked]


@pytest.mark.parametrize("token", [None, "", 7, []])
def test_what_is_no_token_is_not_sent(tmp_path: Path, token: Any) -> None:
    with api(lambda *_: (200, {}, {"access_token": token})) as there:
        oauth = {"tokenUrl": there.url + "/token", "clientId": "id", "clientSecret": "s"}
        with serving(tmp_path, {"a": {"url": there.url, "auth": {"oauth2": oauth}}}, step()) as app:
            assert app.run("f").status_code == 502
        assert [path for path, _ in there.seen] == ["/token"]


def test_a_token_that_cannot_be_had_is_a_502_without_secrets(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with api(lambda path, query, handler: (403, {}, {"clientSecret": "xyzzy"})) as there:
        oauth = {"tokenUrl": there.url, "clientId": "id", "clientSecret": "xyzzy"}
        with serving(tmp_path, {"a": {"url": there.url, "auth": {"oauth2": oauth}}}, step()) as app:
            result = app.run("f")
    assert (result.status_code, result.json()["detail"]) == (
        502,
        'step "c": no token could be obtained for the API it calls',
    )
    assert "xyzzy" not in caplog.text and "403" in caplog.text


@pytest.mark.parametrize(
    ("connections", "message"),
    [
        ({"a": {}}, 'connections.json: /a: needs a member "url"'),
        ({"a": {"url": "crm.example"}}, 'connections.json: /a/url: "crm.example" must begin with http:// or https://'),
        ({"a": {"url": "http://x/${params.v}"}}, "connections.json: /a/url"),
        (
            {"a": {"url": "http://x/", "auth": {"bearer": "a", "basic": {}}}},
            "connections.json: /a/auth: needs exactly one of bearer, basic, apiKey, oauth2",
        ),
        (
            {"a": {"url": "http://x/", "auth": {"basic": {"user": "u"}}}},
            'connections.json: /a/auth/basic: needs a member "password"',
        ),
        (
            {"a": {"url": "http://x/", "auth": {"apikey": {}}}},
            'is not known here (known: bearer, basic, apiKey, oauth2); did you mean "apiKey"?',
        ),
        ({"a": {"url": "http://x/", "timeout": "5 sec"}}, 'connections.json: /a/timeout: "5 sec" is not a duration'),
        ({"b": {"url": "http://x/"}}, 'f.json: /steps/0/http/connection: there is no "a" in connections.json'),
    ],
)  # fmt: skip
def test_faults_of_connections(tmp_path: Path, connections: Any, message: str) -> None:
    with serving(tmp_path, connections, step()) as app:
        assert any(message in str(fault) for fault in app.deployments.faults), app.deployments.faults


def test_a_flow_that_lacks_a_connection_is_no_further_fault_of_a_faulty_file(tmp_path: Path) -> None:
    with serving(tmp_path, {"a": {}}, step()) as app:
        assert [str(fault) for fault in app.deployments.faults] == [
            'connections.json: /a: needs a member "url": an http or https URL'
        ]


def test_a_changed_connection_counts_at_once_and_a_faulty_one_not_at_all(tmp_path: Path) -> None:
    with (
        api(lambda *_: (200, {}, 1)) as one,
        api(lambda *_: (200, {}, 2)) as two,
        serving(tmp_path, {"a": {"url": one.url}}, step()) as app,
    ):
        assert answer(app)["body"] == 1
        path = tmp_path / "flows" / "connections.json"
        path.write_text(json.dumps({"a": {"url": two.url}}))
        assert app.deployer.reload() == []
        assert answer(app)["body"] == 2
        path.write_text("{")
        assert len(app.deployer.reload()) == 1
        assert answer(app)["body"] == 2


# ---- failures --------------------------------------------------------------------------------------------------------

TAKEN = {"message": "email is taken"}
LIMIT = "64KiB"


def failing(path: str, query: dict[str, str], handler: Any) -> Reply | None:
    if path == "/drop":
        return None
    if path == "/hang":
        threading.Event().wait(0.5)
    return {
        "/taken": (422, {"X-Why": "email"}, TAKEN),
        "/text": (404, {"Content-Type": "text/plain"}, b"gone"),
        "/broken": (200, {}, b"{no"),
        "/large": (200, {}, "x" * (70 << 10)),
    }.get(path, (200, {}, TAKEN))


FAILURES = [
    ("/taken", {}, "status", 422, TAKEN, "the API it calls answered 422"),
    ("/text", {}, "status", 404, "gone", "the API it calls answered 404"),
    ("/broken", {}, "body", 200, "{no", "the API it calls answered with invalid JSON"),
    ("/drop", {}, "transport", None, None, "the API it calls gave no answer"),
    ("/hang", {"timeout": "50ms"}, "timeout", None, None, "no answer within 50ms"),
    ("/large", {}, "size", None, None, "the answer is larger than 64KiB"),
    ("/${1 / 0}", {}, "expression", None, None, "division by zero"),
]


@pytest.mark.parametrize(("path", "more", "kind", "status", "body", "message"), FAILURES)
def test_a_flow_that_goes_on_knows_what_failed(
    tmp_path: Path, path: str, more: Any, kind: str, status: Any, body: Any, message: str
) -> None:
    spec = {**step(path=path, **more), "onError": {"kind": "${error.kind}", "why": "${error.headers.get('x-why')}"}}
    seen = {"name": "seen", "set": {"before": "${c}", "error": "${error}"}}
    with (
        api(failing) as there,
        serving(tmp_path, {"a": {"url": there.url}}, spec, seen, max_step_response=LIMIT) as app,
    ):
        found = answer(app)
        assert found["before"] == {"kind": kind, "why": "email" if path == "/taken" else None}
        error = found["error"]
        assert (error["kind"], error["status"], error["body"]) == (kind, status, body)
        assert message in error["message"]


def test_what_an_api_refuses_is_passed_on_in_one_step(tmp_path: Path) -> None:
    tried = {**step(path="/${params.v}"), "onError": "continue"}
    known = {"name": "no", "when": "${error}"}
    fail = known | {"fail": {"status": "${error.status}", "message": "${error.body.message}"}}
    respond = known | {"respond": {"status": "${error.status}", "body": "${error.body}"}}
    with api(failing) as there, serving(tmp_path, {"a": {"url": there.url}}, tried, fail) as app:
        result = app.run("f", {"v": "taken"})
        assert (result.status_code, result.json()["detail"]) == (422, "email is taken")
        assert app.run("f", {"v": "ok"}).status_code == 200  # nothing failed: error is null
        outer = get_flow("/g", steps=[{"name": "c", "call": {"flow": "f", "params": {"v": "taken"}}}])
        app.deploy("g", outer)
        assert app.run("g").status_code == 422
        app.deploy("f", get_flow("/f", steps=[tried, respond], request=V))
        result = app.run("f", {"v": "taken"})
        assert (result.status_code, result.json()) == (422, TAKEN)
        fail["fail"] = {"status": "${error.status - 200}", "message": "x"}
        app.deploy("f", get_flow("/f", steps=[tried, fail], request=V))
        assert app.run("f", {"v": "taken"}).status_code == 500  # 222 is no error


def test_a_failure_inside_is_known_outside_and_repeated_by_its_kind(tmp_path: Path) -> None:
    inner = {"name": "inner", "choose": [{"steps": [step(path="/taken", method="POST")]}]}
    told = {**inner, "retry": {"attempts": 2, "delay": 0, "on": [422]}, "onError": "${error.body.message}"}
    with api(failing) as there, serving(tmp_path, {"a": {"url": there.url}}, told) as app:
        assert answer(app) == "email is taken"
        assert len(there.seen) == 2
        app.deploy("f", get_flow("/f", steps=[{**told, "retry": {"attempts": 2, "delay": 0}}]))
        assert answer(app) == "email is taken"
        assert len(there.seen) == 3  # a POST that may have done something is not repeated unasked


def odd(path: str, query: dict[str, str], handler: Any) -> Reply:
    body = json.dumps({"q": handler.path.partition("?")[2]}).encode()
    return {
        "/gzip": (200, {"Content-Encoding": "gzip"}, gzip.compress(body)),
        "/refused": (422, {"Content-Encoding": "gzip"}, gzip.compress(b'{"message": "no"}')),
        "/br": (200, {"Content-Encoding": "br"}, b"\x8b"),
        "/text": (200, {"Content-Type": "text/plain"}, b'{"a": 1}'),
        "/bytes": (200, {"Content-Type": "application/octet-stream"}, b'\xef\xbb\xbf{"a": 1}'),
        "/moved": (302, {"Location": "/to a/?q=\u00c3\u00a4 b"}, None),
    }.get(path, (200, {}, {"path": handler.path}))


def test_an_answer_is_read_as_it_was_sent(tmp_path: Path) -> None:
    with api(odd) as there, serving(tmp_path, {"a": {"url": there.url}}, step(path="/${params.v}")) as app:
        assert answer(app, v="gzip")["body"] == {"q": ""}
        result = app.run("f", {"v": "br"})
        assert (result.status_code, 'br": gzip and deflate are known' in result.json()["detail"]) == (502, True)
        assert answer(app, v="moved")["body"] == {"path": "/to%20a/?q=%C3%A4%20b"}
        asked = {**step(path="/moved", follow=False, expect=302)}
        going = {"name": "d", "http": {"connection": "a", "path": "/größe?q=${params.v}"}}
        there_ = {"name": "e", "http": {"url": there.url + "${c.headers.location}"}}
        app.deploy(
            "f", get_flow("/f", steps=[asked, going, there_, {"name": "s", "set": "${[d.body, e.body]}"}], request=V)
        )
        assert [one["path"] for one in answer(app, v="ä b")] == [
            "/gr%C3%B6%C3%9Fe?q=%C3%A4%20b",
            "/to%20a/?q=%C3%A4%20b",
        ]
        gone_on = {**step(path="/refused"), "onError": "${error.body.message}"}
        app.deploy("f", get_flow("/f", steps=[gone_on]))
        assert answer(app) == "no"
        app.deploy("f", get_flow("/f", steps=[step(path="/bytes"), {"name": "s", "set": "${parse_json(c.body).a}"}]))
        assert answer(app) == 1
        spec = step(path="/x", query={"q": "a b+c"}, form={"q": "a b+c"})
        app.deploy("f", get_flow("/f", steps=[spec]))
        assert answer(app)["body"] == {"path": "/x?q=a%20b%2Bc"}
        assert there.bodies[-1] == b"q=a+b%2Bc"


@pytest.mark.parametrize("path", ["/text", "/bytes"])
def test_who_takes_text_for_json_is_told_of_parse_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    with (
        api(odd) as there,
        serving(tmp_path, {"a": {"url": there.url}}, step(path=path), {"name": "s", "set": "${c.body.a}"}) as app,
    ):
        assert app.run("f").status_code == 500
    assert "parse_json(c.body) reads it if it is JSON" in caplog.text


def test_a_client_is_not_told_what_the_system_says_of_an_api(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    with serving(tmp_path, None, {"name": "c", "http": url}) as app:
        detail = app.run("f").json()["detail"]
    assert detail == 'step "c": the API it calls gave no answer: the connection failed'
    assert f"{detail.partition(': ')[2]}: Connection refused" in caplog.text


def test_a_client_does_not_learn_which_address_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps = [{"name": "c", "http": {"url": "http://${params.v}/"}}]
    with serving(tmp_path, None, *steps, callback_allow="none") as app:
        result = app.run("f", {"v": "localhost"})
    assert result.status_code == 502
    assert "127.0.0.1" not in result.text and "::1" not in result.text
    assert "127.0.0.1 is not a public address" in caplog.text


def test_a_step_may_be_called_error_and_a_wrong_member_of_the_failure_is_a_fault() -> None:
    own = [{"name": "error", "set": {"own": 1}}, {"name": "s", "set": "${error.own}"}]
    build_flow(get_flow("/f", steps=own), "f")
    with pytest.raises(FlowError, match=r'there is no "error.stauts"; did you mean "status"'):
        build_flow(get_flow("/f", steps=[{"name": "s", "set": "${error.stauts}"}]), "f")


# ---- pages -----------------------------------------------------------------------------------------------------------

ROWS = list(range(23))


def paged(path: str, query: dict[str, str], handler: Any) -> Reply:
    """A list of 23 rows, in every style."""
    size = int(query.get("limit", 5))
    number = int(query.get("page", 0))
    begin = int(query.get("offset", query.get("cursor", number * size)))
    rows, more = ROWS[begin : begin + size], begin + size < len(ROWS)
    following = f"/list?cursor={begin + size}"
    end = '</list>; crossorigin; rel=first; title="a \\" <b>; rel=next"'
    link = f'<{following}>; crossorigin; title="a, \\"b\\""; rel="next", {end}' if more else end
    body = {"rows": rows, "next": following if more else None, "cursor": str(begin + size) if more else ""}
    return 200, {"Link": link}, rows if path == "/plain" else body


@pytest.mark.parametrize(
    ("path", "pages", "count"),
    [
        ("/list", {"items": "${page.body.rows}", "next": "${page.body.next}"}, 5),
        ("/list", {"items": "${page.body.rows}", "link": True}, 5),
        ("/list", {"items": "${page.body.rows}", "cursor": "${page.body.cursor}", "parameter": "cursor"}, 5),
        ("/plain", {"offset": "offset", "limit": "limit", "size": 6}, 5),
        ("/plain", {"offset": "offset", "limit": "limit", "size": 7, "total": "${23}"}, 4),
        ("/plain", {"page": "page", "start": 0}, 6),
        ("/plain", {"page": "page", "start": 0, "total": "${23}"}, 5),
    ],
)
def test_every_style_of_pages(tmp_path: Path, path: str, pages: Any, count: int) -> None:
    with api(paged) as there, serving(tmp_path, {"a": {"url": there.url}}, step(path=path, pages=pages)) as app:
        found = answer(app)
        assert (found["items"], found["pages"], found["more"], found["status"]) == (ROWS, count, False, 200)
        assert len(there.seen) == count
        app.deploy("f", get_flow("/f", steps=[step(path=path, pages={**pages, "maxItems": 7})]))
        found = answer(app)
        assert (found["items"], found["more"]) == (ROWS[:7], True)
        app.deploy("f", get_flow("/f", steps=[step(path=path, pages={**pages, "maxPages": 2})]))
        found = answer(app)
        assert (found["pages"], found["more"]) == (2, True)


def capped(path: str, query: dict[str, str], handler: Any) -> Reply:
    """250 rows, 50 at a time whatever is asked for; the Link header in two lines."""
    begin = int(query.get("offset", int(query.get("page", 1)) * 50 - 50))
    rows = list(range(250))[begin : begin + 50]
    link = f"<{path}?page={begin // 50 + 2}>; rel=next" if begin < 200 else "</>; rel=prev"
    return 200, [("Link", "</>; rel=first"), ("Link", link)], {"rows": rows, "total": 250}


@pytest.mark.parametrize(
    ("pages", "count"),
    [
        ({"offset": "offset", "size": 100}, 6),
        ({"offset": "offset", "size": 100, "total": "${page.body.total}"}, 5),
        ({"page": "page"}, 6),
        ({"page": "page", "total": "${page.body.total}"}, 5),
        ({"link": True}, 5),
    ],
)
def test_a_server_with_a_limit_of_its_own_gives_all_rows(tmp_path: Path, pages: Any, count: int) -> None:
    spec = step(path="/list", pages={"items": "${page.body.rows}", **pages})
    with api(capped) as there, serving(tmp_path, {"a": {"url": there.url}}, spec) as app:
        found = answer(app)
        assert (found["items"], found["pages"], found["more"]) == (list(range(250)), count, False)


def test_pages_are_followed_to_the_end_or_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = lambda path, query, handler: (200, {}, [1] if int(query["offset"]) < 120 else [])  # noqa: E731
    spec = step(pages={"offset": "offset", "size": 1})
    with api(single) as there, serving(tmp_path, {"a": {"url": there.url}}, spec) as app:
        found = answer(app)
        assert (len(found["items"]), found["more"]) == (120, False)
        app.deploy("f", get_flow("/f", steps=[step(pages={**spec["http"]["pages"], "total": "${500}"})]))
        result = app.run("f")
        assert (result.status_code, "has 500 items, as it says, and gave 120" in result.text) == (502, True)
        monkeypatch.setattr("astera_lite_requests._MAX_PAGES", 100)
        app.deploy("f", get_flow("/f", steps=[spec]))
        result = app.run("f")
        assert (result.status_code, "more than 100 pages" in result.text) == (502, True)
        app.deploy("f", get_flow("/f", steps=[step(pages={**spec["http"]["pages"], "maxPages": 110})]))
        found = answer(app)
        assert (len(found["items"]), found["more"]) == (110, True)


def test_a_failed_page_is_asked_for_again_and_not_those_before_it(tmp_path: Path) -> None:
    asked: list[str] = []

    def limited(path: str, query: dict[str, str], handler: Any) -> Reply:
        asked.append(query["offset"])
        if len(asked) % 2 and len(asked) < 11:
            return 429, {}, None
        return capped(path, query, handler)

    spec = step(pages={"items": "${page.body.rows}", "offset": "offset"}, path="/list")
    with api(limited) as there, serving(tmp_path, {"a": {"url": there.url}}, spec) as app:
        app.deploy("f", get_flow("/f", steps=[{**spec, "retry": {"attempts": 2, "delay": 0}}]))
        assert answer(app)["items"] == list(range(250))
        assert asked == ["0", "0", "50", "50", "100", "100", "150", "150", "200", "200", "250"]
        asked[:] = []
        around = {"name": "whole", "choose": [{"steps": [spec]}], "retry": {"attempts": 2, "delay": 0}}
        app.deploy("f", get_flow("/f", steps=[around]))
        assert app.run("f").status_code == 502  # the step around has two attempts in all
        assert asked == ["0", "0", "50"]


def test_a_further_attempt_waits_as_long_as_the_api_asks(tmp_path: Path) -> None:
    began: list[float] = []

    def limited(path: str, query: dict[str, str], handler: Any) -> Reply:
        began.append(time.monotonic())
        early = began[-1] - began[0] < 0.9
        date = email.utils.formatdate(time.time() + 2, usegmt=True)  # of a second that has begun
        return 429 if early else 200, {"Retry-After": "1" if path == "/seconds" else date}, None

    retry = {"attempts": 2, "delay": 0}
    with api(limited) as there:
        steps = [{**step(path=f"/{form}"), "retry": retry} for form in ("seconds", "date")]
        steps[1]["name"] = "d"
        with serving(tmp_path, {"a": {"url": there.url}}, steps[0]) as app:
            assert answer(app)["status"] == 200
            began.clear()
            app.deploy("f", get_flow("/f", steps=steps[1:]))
            assert answer(app)["status"] == 200
            began.clear()
            late = lambda path, query, handler: (503, {"Retry-After": "9999"}, None)  # noqa: E731
            with api(late) as other:
                spec = {"name": "c", "http": other.url, "retry": retry}
                app.deploy("f", get_flow("/f", steps=[spec], timeout="30s"))
                result = app.run("f")  # fails at once, with what the API said: the flow has no time for another
                assert (result.status_code, "answered 503" in result.text) == (502, True)
                assert len(other.seen) == 1


@pytest.mark.parametrize("following", ["${page.body.next}", "/list"])
def test_pages_without_end_and_pages_too_large_are_errors(tmp_path: Path, following: str) -> None:
    same = lambda path, query, handler: (200, {}, {"rows": ["x" * 9000], "next": "/list"})  # noqa: E731
    spec = step(path="/list", pages={"items": "${page.body.rows}", "next": following})
    with api(same) as there, serving(tmp_path, {"a": {"url": there.url}}, spec) as app:
        result = app.run("f")
        assert (result.status_code, "again and again" in result.text) == (502, True)
        assert len(there.seen) == 2
    growing = lambda path, query, handler: (  # noqa: E731
        200, {}, {"rows": ["x" * 9000], "next": f"?p={int(query.get('p', 0)) + 1}"}
    )  # fmt: skip
    spec = step(path="/list", pages={"items": "${page.body.rows}", "next": "${page.body.next}"})
    with api(growing) as there, serving(tmp_path, {"a": {"url": there.url}}, spec, max_step_response="64KiB") as app:
        assert app.run("f").status_code == 502
        assert len(there.seen) == 8


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ({}, "/pages: needs exactly one of next, link, cursor, offset, page"),
        ({"next": "${page.x}", "page": "p"}, "/pages: needs exactly one of"),
        ({"cursor": "${page.x}"}, '/pages: needs "parameter": the query parameter that takes the cursor'),
        ({"next": "${page.x}", "size": 5}, "/pages/size: belongs to offset, not to next"),
        ({"link": True, "total": 5}, "/pages/total: belongs to offset, page, not to link"),
        ({"page": "p", "maxPages": 0}, "/pages/maxPages: 0 is not a number, 1 or more"),
        ({"offset": "${x}"}, '/pages/offset: "${x}" is not the name of a query parameter'),
    ],
)
def test_faults_of_pages(pages: Any, message: str) -> None:
    tree = get_flow("/f", steps=[{"name": "c", "http": {"url": "http://x/", "pages": pages}}])
    with pytest.raises(FlowError) as caught:
        build_flow(tree, "f")
    assert any(message in str(fault) for fault in caught.value.faults)


# ---- until -----------------------------------------------------------------------------------------------------------


def polls(app: AsteraLite, count: int) -> None:
    for _ in range(10_000):
        if app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": count}:
            return
        threading.Event().wait(0.002)
    raise AssertionError(app.engine.queue.counts())


def test_until_polls_without_a_thread_and_survives_a_restart(tmp_path: Path) -> None:
    clock, turns = FakeClock(), [0]

    def reply(path: str, query: dict[str, str], handler: Any) -> Reply:
        turns[0] += 1
        return 200, {"Retry-After": "60"} if turns[0] == 2 else {}, {"done": turns[0] == 4}

    spec = step(until="${answer.body.done}", every="10s")
    with api(reply) as there:
        with serving(tmp_path, {"a": {"url": there.url}}, spec, clock=clock) as app:
            job = app.submit("f")
            polls(app, 1)
            clock.tick(10)
            app.housekeeper.tick(clock.now())
            polls(app, 1)
            clock.tick(59)  # the API asked for 60 s
            app.housekeeper.tick(clock.now())
            polls(app, 1)
            assert turns == [2]
        with serving(tmp_path, {"a": {"url": there.url}}, spec, clock=clock) as app:
            for _ in range(2):
                polls(app, 1)
                clock.tick(10)
                app.housekeeper.tick(clock.now())
            assert app.wait(job.id, 10).status is Status.COMPLETED
            assert app.result(job.id).json()["body"] == {"done": True}
            assert turns == [4]


def test_the_timeout_of_the_step_bounds_all_polls(tmp_path: Path) -> None:
    clock = FakeClock()
    spec = {**step(until="${false}", every="10s"), "timeout": "25s"}
    with api(echo) as there, serving(tmp_path, {"a": {"url": there.url}}, spec, clock=clock) as app:
        job = app.submit("f")
        for _ in range(3):
            polls(app, 1)
            clock.tick(10)
            app.housekeeper.tick(clock.now())
        found = app.wait(job.id, 10)
        assert found.error and found.error["code"] == "timeout"
        assert len(there.seen) == 3


def test_a_flow_consumes_another_astera_lite(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "other.db"), port=0) as other, Server(other) as server:
        other.deploy("nap", get_flow("/nap", steps=[{"name": "w", "wait": "300ms"}], response={"body": "rested"}))
        steps = [
            {"name": "submitted", "http": {"url": server.url + "/api/publishingAsync/nap"}},
            {
                "name": "finished",
                "http": {
                    "url": "${submitted.headers.location}",
                    "until": "${answer.body.status != 'Running'}",
                    "every": 0.1,
                },
            },
            {"name": "result", "http": {"url": "${finished.headers.location}"}},
            {"name": "body", "set": "${result.body}"},
        ]  # fmt: skip
        with serving(tmp_path, None, *steps, callback_allow="127.0.0.1") as app:
            job = app.submit("f")
            assert app.wait(job.id, 10).status is Status.COMPLETED
            assert app.result(job.id).json() == "rested"
            assert answer(app) == "rested"


def test_a_step_may_lower_the_limit_of_its_response(tmp_path: Path) -> None:
    spec = step(maxResponse="4KiB")
    with api(lambda *_: (200, {}, "x" * 5000)) as there, serving(tmp_path, {"a": {"url": there.url}}, spec) as app:
        assert app.run("f").status_code == 502


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"url": "http://x/", "path": "/y"}, "/path: needs a connection: name one, or write the whole address as url"),
        ({"path": "/y"}, "/steps/0/http: needs exactly one of url, connection"),
        ({}, "/steps/0/http: needs exactly one of url, connection"),
        ({"url": "http://x/", "every": 5}, "/every: sets how often `until` is checked, but there is no `until`"),
        ({"url": "http://x/", "until": "${answer}", "pages": {"link": True}}, "has pages and until: a step has one of"),
        ({"connection": "a", "url": "http://x/"}, "needs exactly one of url, connection, not url and connection"),
    ],
)  # fmt: skip
def test_faults_of_http(spec: Any, message: str) -> None:
    with pytest.raises(FlowError) as caught:
        build_flow(get_flow("/f", steps=[{"name": "c", "http": spec}]), "f")
    assert any(message in str(fault) for fault in caught.value.faults)
