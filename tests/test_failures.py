"""Why a job failed: kept with its steps, told to whoever may know it, and masked."""

from __future__ import annotations

import base64
import json
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from support import Api, Client, Running, Sink, get_flow, process, until

import astera_lite
import astera_lite_secrets
from astera_lite import AsteraLite, Mask, Server, main
from astera_lite_secrets import hide

pytestmark = pytest.mark.both_stores

MODULE = """
import json

def parse(ctx, text):
    return inner(text)

def inner(text):
    return json.loads(text)
"""


def flow_file(folder: Path, name: str, *steps: Any, response: Any = None, **more: Any) -> None:
    (folder / "flows").mkdir(exist_ok=True)
    tree = get_flow(f"/{name}", steps=list(steps), response=response, **more)
    (folder / "flows" / f"{name}.json").write_text(json.dumps(tree, indent=1), "utf-8")


def line_of(folder: Path, name: str, text: str) -> int:
    """The line of a flow file on which a text stands."""
    lines = (folder / "flows" / f"{name}.json").read_text("utf-8").splitlines()
    [line] = [n for n, each in enumerate(lines, 1) if text in each]
    return line


@contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Running]:
    """A server of the flow files in a folder."""
    app = AsteraLite(database=str(folder / "jobs.db"), flows=str(folder / "flows"), **settings)
    with app, Server(app, port=0) as server:
        client = Client(server)
        with client.session:
            yield Running(app, server, client)


@contextmanager
def failed_jobs(folder: Path, *names: str, **settings: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """The details of a job of each of these flows, all finished."""
    with serving(folder, **settings) as it:
        found = {}
        for name in names:
            job = it.client.finished(it.client.get(f"/api/publishingAsync/{name}"))
            found[name] = it.client.get(f"/api/jobs/{job['id']}").json()
        yield found


@pytest.fixture
def api() -> Iterator[str]:
    """An API that takes no e-mail address."""
    with answering(422, b'{"message": "email is taken"}' + b" " * 1000) as url:
        yield url


@contextmanager
def answering(status: int, body: bytes | None) -> Iterator[str]:
    """An API that answers so; without a body it says what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            told = f"{self.path} {self.headers} {sent.decode()}".encode() if body is None else body
            self.send_response(status)
            self.send_header("Content-Length", str(len(told)))
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.end_headers()
            self.wfile.write(told)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


RETRY = {"attempts": 3, "delay": "1ms", "on": ["4xx", "error"]}


def test_the_job_keeps_what_the_api_said_and_where_and_in_which_attempt(tmp_path: Path, api: str) -> None:
    flow_file(tmp_path, "signup", {"name": "post", "http": {"url": f"{api}/users"}, "retry": RETRY})
    with failed_jobs(tmp_path, "signup") as found:
        details = found["signup"]
    failure = details["failure"]
    assert failure == {
        "message": "the API it calls answered 422",
        "kind": "status",
        "step": "post",
        "file": "signup.json",
        "pointer": "/steps/0/http",
        "line": line_of(tmp_path, "signup", '"http"'),
        "attempt": 3,
        "attempts": 3,
        "status": 422,
        "body": '{"message": "email is taken"}' + " " * 471,
    }
    [step] = details["steps"]
    assert step["error"] == failure
    assert step["retries"] == [failure | {"attempt": n} for n in (1, 2)]
    assert details["error"]["detail"] == 'step "post": the API it calls answered 422'


def test_it_is_kept_too_where_the_flow_goes_on(tmp_path: Path, api: str) -> None:
    on_error = {"name": "post", "http": {"url": api}, "onError": "continue"}
    worse = {"name": "worse", "http": {"url": api}, "onError": "${1 / 0}"}
    flow_file(tmp_path, "on", on_error, {"name": "last", "set": 1}, response={"body": "${post}"})
    flow_file(tmp_path, "worse", worse)
    with failed_jobs(tmp_path, "on", "worse") as found:
        pass
    assert (found["on"]["status"], found["on"]["failure"]) == ("Completed", None)
    assert [step.get("error", {}).get("status") for step in found["on"]["steps"]] == [422, None]
    assert found["worse"]["failure"]["pointer"] == "/steps/0/onError"
    assert [each["status"] for each in found["worse"]["steps"][0]["retries"]] == [422]


@pytest.mark.parametrize("isolate", [False, True])
def test_a_python_step_tells_the_line_of_the_exception(tmp_path: Path, isolate: bool) -> None:
    step = {"name": "read", "python": {"call": "prices:parse", "args": {"text": "{"}, "isolate": isolate}}
    flow_file(tmp_path, "calc", {"name": "every", "each": {"of": [1], "steps": [step]}})
    (tmp_path / "flows" / "prices.py").write_text(MODULE, "utf-8")
    with failed_jobs(tmp_path, "calc") as found:
        details = found["calc"]
    failure = details["failure"]
    assert failure["message"].startswith("JSONDecodeError: Expecting property name")
    assert (failure["kind"], failure["step"]) == ("error", "every/0/read")
    assert failure["source"] == {"file": "prices.py", "line": 8}
    assert (failure["file"], failure["line"]) == ("calc.json", line_of(tmp_path, "calc", '"python"'))
    assert [step["error"] for step in details["steps"]] == [failure, failure]  # of the step, and of that around it


FAILING: dict[str, tuple[list[Any], Any, tuple[str, str, str]]] = {
    "set": ([{"name": "a", "set": {"b": "${1 / 0}"}}], None, ("a", "/steps/0/set/b", "1 / 0: division by zero")),
    "when": ([{"name": "a", "set": 1}, {"name": "b", "when": "${a.b}", "set": 1}], None, ("b", "/steps/1/when", "")),
    "response": ([], {"body": {"x": "${[][0]}"}}, ("response", "/response/body/x", "")),
    "status": ([], [{"when": "${false}"}], ("response", "/response", "no `when` was true")),
    "fail": ([{"name": "a", "fail": {"status": 409, "message": "no"}}], None, ("a", "/steps/0/fail", "no")),
    "time": ([{"name": "a", "wait": "1h"}], None, ("a", "/steps/0/wait", "the flow exceeded its time limit")),
    "step-time": ([{"name": "a", "wait": "1h", "timeout": "50ms"}], None, ("a", "/steps/0/wait", "it exceeded")),
    "run": ([{"name": "a", "run": ["sh", "-c", "exit 3"]}], None, ("a", "/steps/0/run", "sh: the program")),
    "choose": (
        [{"name": "a", "choose": [{"steps": [{"name": "b", "set": "${'a'.nope}"}]}]}],
        None,
        ("a/0/b", "/steps/0/choose/0/steps/0/set", ""),
    ),
    "inner-when": (
        [{"name": "a", "each": {"of": [1], "steps": [{"name": "b", "when": "${item.x}", "set": 1}]}}],
        None,
        ("a/0/b", "/steps/0/each/steps/0/when", ""),
    ),
    "call": ([{"name": "a", "call": "called"}], None, ("a/response", "/response/body", "")),
}


def test_every_way_to_fail_names_its_place_and_line(tmp_path: Path) -> None:
    for name, (steps, response, _) in FAILING.items():
        flow_file(tmp_path, name, *steps, response=response, **({"timeout": "50ms"} if name == "time" else {}))
    flow_file(tmp_path, "called", response={"body": "${params.a.b}"}, request={"parameters": {"a": {"in": "query"}}})
    with failed_jobs(tmp_path, *FAILING) as found:
        pass
    for name, (_, _, (step, pointer, message)) in FAILING.items():
        failure = found[name]["failure"]
        assert (failure["step"], failure["pointer"]) == (step, pointer), name
        assert failure["message"].startswith(message), name
        file = "called" if name == "call" else name
        assert failure["file"] == f"{file}.json"
        last = pointer.rpartition("/")[2]
        assert f'"{last}"' in (tmp_path / "flows" / f"{file}.json").read_text().splitlines()[failure["line"] - 1], name


def test_the_line_is_that_of_the_file_as_it_is_as_long_as_it_is_that_flow(tmp_path: Path) -> None:
    flow_file(tmp_path, "a", {"name": "a", "set": "${1 / 0}"})
    with serving(tmp_path) as it:
        it.app.housekeeper.stop(5)  # the files are not read anew
        path = tmp_path / "flows" / "a.json"
        text, lines = path.read_text("utf-8"), []
        for changed in (text, "{}", "{", "\n\n" + text, None):
            path.unlink() if changed is None else path.write_text(changed, "utf-8")
            job = it.client.finished(it.client.get("/api/publishingAsync/a"))
            failure = it.client.get(f"/api/jobs/{job['id']}").json()["failure"]
            assert failure["pointer"] == "/steps/0/set"
            lines.append(failure["line"])
    assert lines == [lines[0], None, None, lines[0] + 2, None]


def test_the_failures_of_a_long_list_are_told_briefly(tmp_path: Path, api: str) -> None:
    step = {"name": "b", "http": api, "retry": RETRY | {"delay": 0}, "onError": "continue"}
    flow_file(tmp_path, "long", {"name": "a", "each": {"of": list(range(150)), "steps": [step]}})
    with failed_jobs(tmp_path, "long") as found:
        pass
    steps = found["long"]["steps"]
    assert [len(each.get("retries", ())) for each in steps] == [2] * 100 + [0] * 51
    assert ["body" in each["error"] for each in steps[:150]] == [True] * 100 + [False] * 50


def test_what_is_wrong_in_the_connections_has_the_place_of_the_step(tmp_path: Path) -> None:
    flow_file(tmp_path, "crm", {"name": "a", "http": {"connection": "crm"}})
    (tmp_path / "flows" / "connections.json").write_text('{"crm": {"url": "http://${secrets.HOST}/"}}', "utf-8")
    with failed_jobs(tmp_path, "crm") as found:
        failure = found["crm"]["failure"]
    assert failure["pointer"] == "/steps/0/http"
    assert failure["message"] == (
        'connections.json: /crm/url: secrets.HOST: there is no member "HOST": the setting secrets must name it; '
        'if it may be missing, write .get("HOST")'
    )


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        ("secrets.KEY", 'secrets.KEY: there is no member "KEY": the setting secrets must name it'),
        (
            "env['KEY']",
            "env['KEY']: there is no member \"KEY\": set this environment variable, which env_allow must name",
        ),
        ("{'secrets': {}}.secrets.KEY", 'no member "KEY"; if it may'),
    ],
)
def test_a_secret_or_a_variable_that_is_not_there_names_the_setting(tmp_path: Path, code: str, cure: str) -> None:
    flow_file(tmp_path, "key", {"name": "a", "set": f"${{{code}}}"})
    with failed_jobs(tmp_path, "key") as found:
        assert cure in found["key"]["failure"]["message"]


def test_a_cancelled_job_has_a_word_of_its_own(tmp_path: Path) -> None:
    flow_file(tmp_path, "slow", {"name": "no", "set": "${1 / 0}", "onError": 1}, {"name": "a", "wait": "100ms"},
              {"name": "b", "run": ["sleep", "60"]})  # fmt: skip
    with serving(tmp_path) as it:
        job = it.client.get("/api/publishingAsync/slow").json()
        for _ in range(1000):
            details = it.client.get(f"/api/jobs/{job['id']}").json()
            if details["progress"] and details["progress"]["step"] == "b":
                break
        it.client.post(f"/api/jobs/{job['id']}/cancel")
        it.client.get(f"/api/jobs/{job['id']}/status", headers={"Prefer": "wait=10"})
        details = it.client.get(f"/api/jobs/{job['id']}").json()
    assert (details["error"]["code"], details["failure"]) == ("cancelled", None)
    assert [step["state"] for step in details["steps"]] == ["failed", "finished", "cancelled"]


def test_only_who_may_know_it_is_told(tmp_path: Path, api: str, capsys: pytest.CaptureFixture[str]) -> None:
    flow_file(tmp_path, "post", {"name": "post", "http": {"url": api}, "retry": RETRY})
    keys = {}
    for name, role in (("ada", "user"), ("eve", "admin")):
        assert main(["token", name, "--role", role, "--database", str(tmp_path / "jobs.db")]) == 0
        keys[name] = {"Authorization": f"Bearer {capsys.readouterr().out.strip()}"}
    with serving(tmp_path) as it:
        it.client.session.headers.update(keys["ada"])
        job = it.client.finished(it.client.get("/api/publishingAsync/post"))
        own = it.client.get(f"/api/jobs/{job['id']}").json()
        listed = it.client.get("/api/jobs").json()
        admin = it.client.get(f"/api/jobs/{job['id']}", headers=keys["eve"]).json()
    assert admin["failure"]["status"] == 422
    (tmp_path / "jobs.db").unlink()
    with serving(tmp_path, public_url="http://flows.example", insecure_open=True) as it:
        job = it.client.get("/api/publishingAsync/post").json()
        it.client.get(f"/api/jobs/{job['id']}/status", headers={"Prefer": "wait=10"})
        behind_a_proxy = it.client.get(f"/api/jobs/{job['id']}").json()
    for seen in (own, behind_a_proxy):
        assert "failure" not in seen
        assert [step.keys() & {"error", "retries"} for step in seen["steps"]] == [set()]
    assert "email is taken" not in json.dumps([own, listed, behind_a_proxy])


def test_the_commands_and_the_log_tell_it(tmp_path: Path, api: str, capsys: pytest.CaptureFixture[str]) -> None:
    flow_file(tmp_path, "post", {"name": "post", "http": {"url": api}, "retry": RETRY})
    line = line_of(tmp_path, "post", '"http"')
    told = f"post.json:{line}: step post: the API it calls answered 422: "
    told += '{"message": "email is taken"}'
    with process(tmp_path, "--log", "json") as (_, url, lines):
        api_ = Api(url)
        job = api_.job(api_.submit("/post"), wait=10)
        until(lambda: any(job["id"] in text for text in lines))  # the log has a thread of its own
    [entry] = [entry for text in lines if text.startswith("{") and (entry := json.loads(text)).get("job") == job["id"]]
    assert json.loads(entry["message"].partition("failed: ")[2]).startswith(told)

    def say(*arguments: str) -> tuple[int, str]:
        code = main([*arguments, "--database", str(tmp_path / "astera_lite.db"), "--flows", str(tmp_path / "flows")])
        out, err = capsys.readouterr()
        return code, out + err

    code, text = say("job", job["id"])
    assert told in text
    assert text.count(" retried ") == 2
    assert "(attempt 3 of 3)" in text
    assert json.loads(say("job", job["id"], "--json")[1])["failure"]["status"] == 422
    assert told in say("jobs")[1]
    assert json.loads(say("jobs", "--json")[1])["jobs"][0]["failure"]["attempt"] == 3
    code, text = say("try", "post")
    assert code == 1
    assert [f"(attempt {n} of 3)" in text for n in (1, 2, 3)] == [True] * 3
    assert f"reason: {told}" in text


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {
    "ODD": 'pa"ss/w ör+d\\x\ny',
    "LONG": "eyJhbGciOi" + "0123456789" * 30,
    "PIN": "471147",
}
SECRET_MODULE = """
def raising(ctx, text):
    ctx.log.warning("with %s", text)
    raise ValueError(f"bad: {text!r}")

def giving(ctx, text, **more):
    return {text: [text]}
"""


def spellings(secret: str) -> list[str]:
    """What nobody may find: a secret as it is, as URLs and JSON have it, and the beginning of it."""
    return [
        secret,
        quote(secret, safe=""),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
        secret[:5],
    ]


def leaking_connections(url: str, secret: str) -> dict[str, Any]:
    """Connections that hold a secret, of an API that says what it was sent."""
    value = f"${{secrets.{secret}}}"
    oauth2 = {"tokenUrl": f"{url}/{value}", "clientId": value, "clientSecret": value, "scope": value}
    auths = {
        "basic": {"basic": {"user": value, "password": value}},
        "bearer": {"bearer": value},
        "key": {"apiKey": {"in": "query", "name": value, "value": value}},
        "key-in": {"apiKey": {"in": value, "name": "key", "value": value}},
        "oauth2": {"oauth2": oauth2},
        "oauth2-in": {"oauth2": oauth2 | {"in": value}},
    }
    found: dict[str, Any] = {name: {"url": url, "auth": auth} for name, auth in auths.items()}
    return found | {"headers": {"url": f"{url}/{value}", "headers": {"X-A": f"${{urlencode(secrets.{secret})}}"}}}


def leaking_steps(url: str, secret: str) -> dict[str, list[Any]]:
    """Steps that fail over a secret, or are followed by one that does, by flow."""
    value, number = f"${{secrets.{secret}}}", f"${{int(secrets.{secret})}}"
    json_, object_ = f"${{parse_json(secrets.{secret})}}", f"${{{{'p': secrets.{secret}}}}}"
    text = f"login with {value} refused"
    asked = {"url": url, "expect": "4xx"}
    items = {"items": "${[1]}", "maxPages": 3}
    query = {"query": "SELECT json_extract('{}', :p)"}
    inner = [{"name": "b", "set": 1}]
    keyed = [{"name": "b", "set": f"${{{{secrets.{secret}: 1}}}}"}, {"name": "c", "set": "${b.nope}"}]
    steps: dict[str, Any] = {
        "set": {"set": number},
        "key": {"set": f"${{{{'a': 1}}[secrets.{secret}]}}"},
        "long": {"set": f"${{parse_json('{'x' * 40}' + secrets.{secret})}}"},
        "output": {"set": {"a": value, "b": [text], "c": f"${{[secrets.{secret}]}}"}},
        "when": {"when": number, "set": 1},
        "fail": {"fail": {"status": 401, "message": text}},
        "fail-status": {"fail": {"status": value, "message": text}},
        "fail-header": {"fail": {"message": text, "headers": {"X-A": f"{value}\n"}}},
        "host": {"http": f"http://{value}.invalid/"},
        "path": {"http": f"{url}/{value}?q={value}"},
        "query": {"http": {"url": url, "query": {"q": value}, "headers": {"X-A": f"${{urlencode(secrets.{secret})}}"}}},
        "json": {"http": {"url": url, "method": "POST", "json": {"a": value}}, "retry": RETRY},
        "form": {"http": {"url": url, "method": "POST", "form": {"a": value}}, "onError": {"was": text}},
        "body": {"http": {"url": url, "method": "POST", "body": value}},
        "header": {"http": {"url": url, "headers": {"X-A": f"{value}\n"}}},
        "until": {"http": asked | {"until": number}},
        "page-items": {"http": asked | {"pages": {"cursor": "${null}", "parameter": "p", "items": json_}}},
        "page-cursor": {"http": asked | {"pages": items | {"cursor": json_, "parameter": "p"}}},
        "page-next": {"http": asked | {"pages": items | {"next": f"{url}/{value}"}}},
        "page-total": {"http": asked | {"pages": items | {"offset": "o", "size": 1, "total": value}}},
        **{f"auth-{name}": {"http": {"connection": name, "path": f"/{value}"}} for name in leaking_connections("", "")},
        "python": {"python": {"call": "leaks:raising", "args": {"text": text}}},
        "isolated": {"python": {"call": "leaks:raising", "args": {"text": text}, "isolate": True}},
        "argument": {"python": {"call": "leaks:giving", "args": {"text": value, "${'a'}": value}}},
        "database": {"sql": {"database": value, "query": "SELECT 1"}},
        "sql": {"sql": {"database": "a.db", **query, "params": {"p": value}}},
        "sql-object": {"sql": {"database": "a.db", **query, "params": object_}},
        "sql-list": {"sql": {"database": "a.db", "statements": [query | {"params": {"p": value}}]}},
        "sql-list-object": {"sql": {"database": "a.db", "statements": [query | {"params": object_}]}},
        "run": {"run": {"command": ["sh", "-c", "echo \"$0\" >&2; cat >&2; exit 3", text], "input": value}},
        "stdout": {"run": {"command": ["cat"], "input": f"no JSON {value}", "output": "json"}},
        "timeout": {"timeout": "50ms", "run": ["sh", "-c", "sleep 5", text]},
        "each": {"each": {"of": text, "steps": inner}},
        "each-result": {"each": {"of": [1], "steps": inner, "result": number}},
        "inside": {"each": {"of": [value], "steps": [{"name": "b", "fail": {"message": "${item}"}}]}},
        "choose": {"choose": [{"when": number, "steps": inner}]},
        "choose-member": {"choose": [{"steps": keyed}]},
        "choose-result": {"choose": [{"steps": inner, "result": number}]},
        "call": {"call": "fail"},
        "call-params": {"call": {"flow": "takes", "params": {"n": value, "m": value}}},
        "call-body": {"call": {"flow": "takes-body", "body": value}},
        "wait": {"wait": {"until": text}},
        "pause": {"wait": f"{value}x"},
        "respond": {"respond": {"status": value, "headers": {"X-A": value}, "body": value}},
    }  # fmt: skip
    last = {"name": "z", "fail": {"message": "${a}"}}
    return {name: [{"name": "a", **step}, last] for name, step in steps.items()}


def leaking_folder(folder: Path, url: str, secret: str) -> list[str]:
    """Write flows that fail over a secret, and what they need; their names."""
    flows = leaking_steps(url, secret)
    for name, steps in flows.items():
        flow_file(folder, name, *steps)
    number = {"n": {"in": "query", "type": "integer"}, "m": {"in": "query", "enum": ["a"]}}
    flow_file(folder, "takes", request={"parameters": number})
    body = {"method": "POST", "body": {"type": "object", "properties": {}}}
    flow_file(folder, "takes-body", request=body)
    flow_file(folder, "bad", response={"status": f"${{secrets.{secret}}}"})
    flow_file(folder, "own", response={"body": f"${{secrets.{secret}}}"})
    (folder / "flows" / "connections.json").write_text(json.dumps(leaking_connections(url, secret)), "utf-8")
    (folder / "flows" / "leaks.py").write_text(SECRET_MODULE, "utf-8")
    (folder / "data").mkdir()
    sqlite3.connect(folder / "data" / "a.db").close()
    return [*flows, "bad"]


def expression_places(member: astera_lite.Member, place: str) -> Iterator[str]:
    """Patterns of the places at which a member takes expressions."""
    if isinstance(member, astera_lite.Value | astera_lite.Url):
        yield place
    inner: dict[str, astera_lite.Member] = {}
    if isinstance(member, astera_lite.Elsewhere):
        inner = {"": astera_lite.wing(member.name)}
    elif isinstance(member, astera_lite.StepKind):
        inner = {"": member.members}
    elif isinstance(member, astera_lite.Table):
        inner = {f"/{name}": each for name, each in member.members.items()}
    elif isinstance(member, astera_lite.ListOf):
        inner = {"/[0-9]+": member.item}
    elif isinstance(member, astera_lite.MapOf):
        inner = {"/[^/]+": member.item}
    elif isinstance(member, astera_lite.Either):
        inner = {"": member.plain}
        yield from expression_places(member.structured, place)
    for part, each in inner.items():
        yield from expression_places(each, place + part)


def test_a_secret_stands_wherever_a_step_takes_an_expression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the search for it below would show less than it seems to."""
    leaking_folder(tmp_path, "http://127.0.0.1:1", "ODD")
    compiled, compile_ = [], astera_lite.Build.template

    def template(build: astera_lite.Build, value: Any, place: str) -> astera_lite.Template:
        compiled.append(place if "secrets." in json.dumps(value) else "")
        return compile_(build, value, place)

    monkeypatch.setattr(astera_lite.Build, "template", template)
    settings: dict[str, Any] = {"secrets": ",".join(SECRETS), "environ": SECRETS, "data": str(tmp_path / "data")}
    with AsteraLite(database=str(tmp_path / "jobs.db"), flows=str(tmp_path / "flows"), **settings) as app:
        assert app.deployments.faults == []
    places = {f"/steps/[0-9]+/{kind}": row for kind, row in astera_lite.STEP_KINDS.items()}
    places |= {f"/steps/[0-9]+/{name}": member for name, member in astera_lite._OPTIONS.items()}
    wanted = {
        pattern
        for place, member in (places | {"": astera_lite.wing("astera_lite_requests:CONNECTIONS")}).items()
        for pattern in expression_places(member, place)
    }
    assert len(wanted) > 40
    assert [each for each in sorted(wanted) if not any(re.fullmatch(each, place) for place in compiled)] == []


@pytest.mark.parametrize(
    "secret", [pytest.param(name, marks=() if name == "ODD" else pytest.mark.slow) for name in SECRETS]
)
def test_no_secret_leaves_but_in_an_answer_that_the_author_made_of_it(
    tmp_path: Path, secret: str, sink: Sink, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(422, None) as url:
        names = leaking_folder(tmp_path, url, secret)
        options = ("--secrets", ",".join(SECRETS), "--data", str(tmp_path / "data"), "--callback-allow", "127.0.0.1")
        seen: dict[str, str] = {}
        with process(tmp_path, *options, "--log", "json", "--log-level", "debug", env=SECRETS) as (server, base, lines):
            api = Api(base)
            for name in names:
                answer = api.session.get(f"{base}/api/publishing/{name}", timeout=20)
                assert answer.status_code >= 400, name
                seen[f"{name}: answer"] = f"{answer.headers} {answer.text}"
                job = api.submit(f"/{name}", callbackUrl=sink.url)
                assert api.job(job, wait=15)["status"] == "Error"
                for path in ("", "/status", "/result"):
                    seen[f"{name}: {path}"] = api.session.get(f"{base}/api/jobs/{job}{path}", timeout=10).text
                assert json.loads(seen[f"{name}: "])["failure"]["message"]
                seen[f"{name}: callback"] = json.dumps(sink.next()[1], ensure_ascii=False)
            seen["list"] = api.session.get(f"{base}/api/jobs?limit=1000", timeout=10).text
            assert api.session.get(f"{base}/api/publishing/own", timeout=10).json() == SECRETS[secret]
            server.terminate()
            assert server.wait(20) == 0
        seen |= {f"log {n}": line for n, line in enumerate(lines)}
        seen |= {
            f"log {n} read": json.loads(line).get("message", "") for n, line in enumerate(lines) if line[:1] == "{"
        }
        assert any("Traceback" in line for line in lines)
        for path in tmp_path.glob("astera_lite.db*"):
            seen[path.name] = path.read_bytes().decode("utf-8", "replace")
        for name, value in SECRETS.items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        for name in ("fail", "run", "isolated", "output") if secret == "ODD" else ():  # each reads all flows
            assert main(["try", name, *options]) == 1
            seen[f"try {name}"] = "".join(capsys.readouterr())
    forms = spellings(SECRETS[secret])
    assert [(where, form) for where, text in seen.items() for form in forms if form in text] == []
    assert sum("***" in text for text in seen.values()) > len(names)


def test_renewed_tokens_make_masking_no_slower_and_what_is_used_stays_masked() -> None:
    mask = Mask(["pass-word-of-the-settings"])
    tokens = [f"{n:04}" + "eyJhbGciOi" * 80 for n in range(600)]
    began = time.process_time()
    for token in tokens:
        hide(mask, [token])
        hide(mask, ["constant-key"])  # another connection's, which is used each time
    for _ in range(20):
        assert mask(f"a {tokens[-1]} b {tokens[-2]} c constant-key d " + tokens[-3][:50] + "…") == (
            "a *** b *** c *** d ***…"
        )
    assert time.process_time() - began < 5  # seconds; a pattern of all tokens would take minutes
    assert mask("pass-word-of-the-settings, pass-w…, pas…") == "***, ***…, pas…"


def test_a_secret_in_a_url_is_masked_whatever_the_case_of_its_percent_encoding() -> None:
    mask = Mask(["a/b+ü"])
    assert mask("?q=a%2Fb%2B%C3%BC ?q=a%2fb%2b%c3%bc /a/b%2B%C3%BC /a/b%2b%c3%bc") == "?q=*** ?q=*** /*** /***"


@pytest.mark.parametrize("secret", ["secret-pass", "a?b>c~d\xff", "1234567"])
def test_a_secret_in_base64_is_masked_wherever_it_stands(secret: str) -> None:
    mask = Mask([secret])
    for before in ("", "u", "me", "you", "user:"):
        for after in ("", "!", "?!", ", and more"):
            data = f"{before}{secret}{after}".encode()
            for encode in (base64.b64encode, base64.urlsafe_b64encode):
                text = mask(f"Basic {encode(data).decode()}")
                rest = text.removeprefix("Basic ").replace("***", "")
                assert "***" in text and len(rest) <= len(base64.b64encode((before + after).encode())) + 4
    assert Mask(["ab"])("aYWIb") == "aYWIb", "what is short may stand anywhere"


def test_credentials_that_two_runs_use_first_at_the_same_time_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, known, both = Mask(), astera_lite_secrets.Known, threading.Barrier(2)

    def at_the_same_time(*given: Any) -> astera_lite_secrets.Known:
        both.wait(10)
        return known(*given)

    monkeypatch.setattr(astera_lite_secrets, "Known", at_the_same_time)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda word: hide(mask, [word]), ("first-word", "second-word")))
    assert mask("first-word second-word") == "*** ***"
