"""Deployments: files watched, the API, jobs that keep their flow, own kinds of steps, the schema, tests of flows."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import threading
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Client, FakeClock, database_in, get_flow

from astera_lite import (
    STEP_KINDS,
    AsteraLite,
    ConfigError,
    Flow,
    FlowError,
    Server,
    Status,
    build_flow,
    health_document,
)
from astera_lite_documents import flow_schema
from astera_lite_steps import run_test

pytestmark = pytest.mark.both_stores

HELLO = get_flow("/hello", response={"body": "one"})
TOKEN = "t0ken-of-the-admin"


@contextmanager
def serving(folder: Path, clock: Any = None, token: str | None = None, **files: Any) -> Iterator[AsteraLite]:
    flows = folder / "flows"
    flows.mkdir(exist_ok=True)
    for name, tree in files.items():
        (flows / f"{name}.json").write_text(json.dumps(tree))
    settings = {"flows": str(flows), "database": database_in(folder), "port": 0, "shutdown_timeout": 5}
    with AsteraLite(clock=clock, **settings, **({"token": token} if token else {})) as app:
        yield app


@contextmanager
def calling(app: AsteraLite, token: str | None = TOKEN) -> Iterator[Client]:
    with Server(app) as server:
        client = Client(server)
        if token:
            client.session.headers["Authorization"] = f"Bearer {token}"
        yield client


def write(folder: Path, name: str, text: Any) -> None:
    path = folder / "flows" / name
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    os.utime(path, ns=(before + 10**9, before + 10**9))  # a second later, however coarse the file system's clock is


def look(app: AsteraLite, clock: FakeClock, times: int = 2) -> None:
    app.housekeeper.stop(10)  # its thread might look in the same moment, too
    for _ in range(times):
        app.housekeeper.tick(clock.tick(1))


# ---- files watched ---------------------------------------------------------------------------------------------------


def test_changed_new_and_removed_files_are_noticed(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, hello=HELLO) as app:
        before = app.deployments
        look(app, clock, 5)
        assert app.deployments is before  # nothing changed, nothing read
        write(tmp_path, "hello.json", get_flow("/hello", response={"body": "two"}))
        write(tmp_path, "more.toml", '[request]\nmethod = "GET"\nresource = "/more"\n')
        look(app, clock)
        assert app.run("hello").json() == "two"
        assert app.run("more").status_code == 200
        (tmp_path / "flows" / "more.toml").unlink()
        look(app, clock)
        assert sorted(app.deployments.by_name) == ["hello"]


def test_a_link_to_nowhere_does_not_hide_what_changes(tmp_path: Path) -> None:
    """As Emacs makes one beside each file that it edits."""
    clock = FakeClock()
    with serving(tmp_path, clock, hello=HELLO, zero=HELLO) as app:
        for name in (".#a.json", "b.json"):
            (tmp_path / "flows" / name).symlink_to("nobody@nowhere:1")
        (tmp_path / "flows" / "zero.json").unlink()
        look(app, clock)
        assert [fault.where for fault in app.deployments.faults] == ["b.json"]
        for turn in range(8):  # the order of a folder is not known
            write(tmp_path, f"more{turn}.json", get_flow(f"/more/{turn}"))
            look(app, clock, 3)  # its own housekeeper may look meanwhile
            assert f"more{turn}" in app.deployments.by_name
        (tmp_path / "flows" / "b.json").unlink()
        look(app, clock)
        assert app.deployments.faults == []


def test_the_file_of_connections_is_no_deployment(tmp_path: Path) -> None:
    crm = {"crm": {"baseUrl": "http://127.0.0.1:1"}}
    with serving(tmp_path, None, TOKEN, connections=crm) as app, calling(app) as client:
        assert client("PUT", "/api/deployments/connections", json=HELLO).status_code == 409
        assert client("DELETE", "/api/deployments/connections").status_code == 409
        assert json.loads((tmp_path / "flows" / "connections.json").read_text()) == crm


def test_a_file_that_is_being_written_is_left_alone(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, hello=HELLO) as app:
        app.housekeeper.stop(10)  # its first look may be late
        for part in ("{", '{"request"', '{"request": {}'):
            write(tmp_path, "hello.json", part)
            look(app, clock, 1)
        assert app.deployments.faults == []


def test_a_file_that_became_faulty_keeps_its_flow_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, hello=HELLO) as app:
        write(tmp_path, "hello.json", '{"request": ')
        look(app, clock, 6)
        assert app.run("hello").json() == "one"
        assert [fault.where for fault in app.deployments.faults] == ["hello.json"]
        assert caplog.text.count("hello.json: line 1") == 1
        assert health_document(app)["deployments"] == {"published": 1, "faults": 1}
        write(tmp_path, "hello.json", HELLO)
        look(app, clock)
        assert app.deployments.faults == []


def test_one_bad_file_leaves_the_others_in_service(tmp_path: Path) -> None:
    clock = FakeClock()
    with serving(tmp_path, clock, TOKEN, hello=HELLO) as app, calling(app) as client:
        bad = get_flow("/bad", steps=[{"name": "a", "http": {"connection": {"name": "crm"}}}])
        python = get_flow("/python", steps=[{"name": "a", "python": "odd:f"}])
        write(tmp_path, "odd.py", "def __getattr__(name):\n    raise RuntimeError('odd \\udcff')\n")
        for name, text in (("bad", bad), ("python", python), ("connections", [1])):
            write(tmp_path, f"{name}.json", text)
        with contextlib.suppress(OSError):  # a name that not every system takes
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/flows/\xff.json")).write_text("{}")
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/flows/\xff.yaml")).write_text("{}")
        write(tmp_path, "new.json", get_flow("/new", response={"body": "new"}))
        look(app, clock)
        assert client.get("/api/publishing/new").json() == "new"
        faults = client.get("/api/deployments").json()["faults"]
        assert [fault["message"] for fault in faults][:3] == [
            "must be an object, not a list",
            '{"name": "crm"} is not the name of a connection',
            "cannot be deployed: RuntimeError: odd ?",
        ]
        for refused in (bad, python, [bad], 1.5, "x"):
            assert client("PUT", "/api/deployments/put", json=refused).status_code == 400, refused
        assert client("PUT", "/api/deployments/put", json=HELLO | get_flow("/put")).status_code == 201


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with serving(tmp_path, None, TOKEN, hello=HELLO) as app, calling(app) as client:
        if app.node is not None:
            pytest.skip("servers that share a database keep deployments there")
        for name in ("new", "hello"):
            path = tmp_path / "flows" / f"{name}.json"
            path.unlink(missing_ok=True)
            path.mkdir()
            for method, more in (("PUT", {"json": HELLO | get_flow("/new")}), ("DELETE", {})):
                answer = client(method, f"/api/deployments/{name}", **more)
                assert (answer.status_code, "Retry-After" in answer.headers) == (503, True)
                assert answer.json()["detail"] == f"The file {name}.json cannot be changed: Is a directory."
        assert sorted(path.name for path in (tmp_path / "flows").iterdir()) == ["hello.json", "new.json"]
        assert client.get("/api/publishing/hello").json() == "one"


def test_a_changed_python_module_is_loaded_anew(tmp_path: Path) -> None:
    clock = FakeClock()
    (tmp_path / "flows").mkdir()
    write(tmp_path, "mine.py", "def f(context):\n    return 1\n")
    with serving(tmp_path, clock, p=get_flow("/p", steps=[{"name": "p", "python": "mine:f"}])) as app:
        assert app.run("p").json() == 1
        write(tmp_path, "mine.py", "def f(context):\n    return 2\n")
        look(app, clock)
        assert app.run("p").json() == 2


def test_no_request_is_dropped_while_flows_are_reloaded(tmp_path: Path) -> None:
    clock, stop = FakeClock(), threading.Event()
    with serving(tmp_path, clock, hello=HELLO) as app, calling(app, None) as client:
        codes: set[int] = set()

        def call() -> None:
            while not stop.is_set():
                codes.add(client.get("/api/publishing/hello").status_code)

        caller = threading.Thread(target=call)
        caller.start()
        for turn in range(30):
            write(tmp_path, "hello.json", get_flow("/hello", response={"body": turn}))
            look(app, clock)
        stop.set()
        caller.join(10)
        assert codes == {200}
        assert client.get("/api/publishing/hello").json() == 29


def test_a_job_keeps_the_flow_it_began_with_across_edit_and_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    steps = [{"name": "s", "set": "old"}, {"name": "w", "wait": 60}]
    old = get_flow("/f", steps=steps, response={"body": "${s}"})
    new = get_flow("/f", steps=[{"name": "s", "set": "new"}, steps[1]], response={"body": "${s}"})
    with serving(tmp_path, clock, f=old) as app:
        first = app.submit("f")
        while app.engine.queue.counts()["waiting"] != 1:
            pass
        write(tmp_path, "f.json", new)
        look(app, clock)
        second = app.submit("f")
        while app.engine.queue.counts()["waiting"] != 2:
            pass
    with serving(tmp_path, clock) as app:
        clock.tick(61)
        app.housekeeper.wake()
        for job, text in ((first, "old"), (second, "new")):
            assert app.wait(job.id, 10).status is Status.COMPLETED
            assert app.result(job.id).json() == text


# ---- PUT and DELETE --------------------------------------------------------------------------------------------------


def test_of_flows_that_were_replaced_only_some_stay_in_memory(tmp_path: Path) -> None:
    wait = {"name": "w", "wait": "1s"}  # whose job is read from the database, behind the wait
    with serving(tmp_path) as app:
        jobs = []
        for n in range(100):
            app.deploy("f", get_flow("/f", steps=[wait], response={"body": n}))
            jobs.append(app.submit("f"))
        app.deploy("f", get_flow("/f", response={"body": "new"}))
        assert {app.wait(job.id, 10).status for job in jobs} == {Status.COMPLETED}
        assert [app.result(job.id).json() for job in jobs] == list(range(100))
        gc.collect()
        assert sum(isinstance(each, Flow) and each.name == "f" for each in gc.get_objects()) < 70


@pytest.mark.sqlite  # files are looked at; test_shared.py has the same for rows
def test_deploy_replace_and_remove(tmp_path: Path) -> None:
    with serving(tmp_path, token=TOKEN) as app, calling(app) as client:
        made = client("PUT", "/api/deployments/hello", json=HELLO)
        assert (made.status_code, made.json()["name"]) == (201, "hello")
        assert client.get(made.headers["Location"]).json() == made.json()
        assert client.get("/api/publishing/hello").json() == "one"
        assert json.loads((tmp_path / "flows" / "hello.json").read_text()) == HELLO
        again = client("PUT", "/api/deployments/hello", json=get_flow("/hello", response={"body": "two"}))
        assert (again.status_code, client.get("/api/publishing/hello").json()) == (200, "two")
        assert client("DELETE", "/api/deployments/hello").status_code == 204
        assert client.get("/api/publishing/hello").status_code == 404
        assert client("DELETE", "/api/deployments/hello").status_code == 404
        assert os.listdir(tmp_path / "flows") == []


def test_a_deployment_has_an_etag_and_no_update_is_lost(tmp_path: Path) -> None:
    two, three = (get_flow("/hello", response={"body": word}) for word in ("two", "three"))
    path = "/api/deployments/hello"
    with serving(tmp_path, token=TOKEN) as app, calling(app) as client:

        def put(tree: Any, **conditions: str) -> int:
            headers = {name.replace("_", "-"): value for name, value in conditions.items()}
            return client("PUT", path, json=tree, headers=headers).status_code

        assert put(HELLO, If_Match="*") == put(HELLO, If_Match='"x"') == 412  # there is none yet
        assert not app.deployments.by_name
        assert put(HELLO, If_None_Match="*") == 201
        assert put(two, If_None_Match="*") == 412
        first = client.get(path)
        tag = first.headers["ETag"]
        assert first.headers["Cache-Control"] == "private, no-cache"
        again = client.get(path, headers={"If-None-Match": f'"x", W/{tag}'})
        assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", tag)
        assert put(two, If_Match=f"W/{tag}") == 412  # weak tags never match here
        assert put(two, If_Match=tag, If_None_Match='"x"') == 200
        assert client.get(path).headers["ETag"] != tag
        lost = client("PUT", path, json=three, headers={"If-Match": tag})
        assert (lost.status_code, lost.headers["Content-Type"]) == (412, "application/problem+json")
        assert app.run("hello").json() == "two"
        assert client.get(path, headers={"If-Match": tag}).status_code == 412
        assert client.get(path, headers={"If-None-Match": tag}).status_code == 200
        assert client("DELETE", path, headers={"If-Match": tag}).status_code == 412
        assert client("DELETE", path, headers={"If-None-Match": "*"}).status_code == 412
        assert put(three, If_Match="*") == 200
        assert client("DELETE", path, headers={"If-Match": client.get(path).headers["ETag"]}).status_code == 204
        assert client("DELETE", path, headers={"If-Match": tag}).status_code == 404


@pytest.mark.sqlite  # there are no files where servers share
def test_a_file_with_faults_is_not_made_anew(tmp_path: Path) -> None:
    with serving(tmp_path, token=TOKEN, hello={"request": 1}) as app, calling(app) as client:
        for condition in ({"If-None-Match": "*"}, {"If-Match": '"x"'}):
            assert client("PUT", "/api/deployments/hello", json=HELLO, headers=condition).status_code == 412
        assert client("PUT", "/api/deployments/hello", json=HELLO).status_code == 201


def test_a_faulty_flow_is_refused_with_every_fault_and_changes_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, token=TOKEN, hello=HELLO) as app, calling(app) as client:
        bad = get_flow("hello", steps=[{"name": "x", "set": "${nothing}"}])
        refused = client("PUT", "/api/deployments/hello", json=bad)
        assert refused.status_code == 400
        assert [(e["in"], e["name"]) for e in refused.json()["errors"]] == [
            ("body", "/request/resource"), ("body", "/steps/0/set"),
        ]  # fmt: skip
        assert client.get("/api/publishing/hello").json() == "one"
        assert json.loads((tmp_path / "flows" / "hello.json").read_text()) == HELLO
        for text, code in ((b"{", 400), (b"\xff", 400), (b"[]", 400)):
            answer = client("PUT", "/api/deployments/x", data=text, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["errors"][0]["name"]) == (code, "")  # the place as a JSON Pointer
        for media in ("text/plain", "application/json; charset=latin-1"):
            answer = client("PUT", "/api/deployments/x", data=b"{}", headers={"Content-Type": media})
            assert answer.status_code == 415
        thief = client("PUT", "/api/deployments/thief", json=HELLO)
        assert thief.status_code == 400 and '"hello"' in thief.json()["errors"][0]["message"]
        assert sorted(os.listdir(tmp_path / "flows")) == ["hello.json"]


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%2Fb", "a.b", "%00", "-x", "a" * 65, ".hello"])
def test_names_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    with serving(tmp_path, token=TOKEN) as app, calling(app) as client:
        for method in ("PUT", "DELETE"):
            assert client(method, f"/api/deployments/{name}", json=HELLO).status_code in (400, 404)
        assert os.listdir(tmp_path / "flows") == []


@pytest.mark.sqlite  # there are no files where servers share
def test_conflicts(tmp_path: Path) -> None:
    caller = get_flow("/caller", steps=[{"name": "c", "call": "hello"}])
    with serving(tmp_path, token=TOKEN, hello=HELLO, caller=caller) as app, calling(app) as client:
        app.deploy("own", get_flow("/own"))
        write(tmp_path, "t.toml", '[request]\nmethod = "GET"\nresource = "/t"\n')
        app.deployer.reload()
        for method, name in (("PUT", "own"), ("DELETE", "own"), ("PUT", "t"), ("DELETE", "t"), ("DELETE", "hello")):
            answer = client(method, f"/api/deployments/{name}", json=get_flow("/new"))
            assert answer.status_code == 409, (method, name, answer.text)
        assert "change or delete caller first" in client("DELETE", "/api/deployments/hello").json()["detail"]


def test_deploying_needs_the_admin_token(tmp_path: Path) -> None:
    with serving(tmp_path, hello=HELLO) as app, calling(app, None) as client:
        for method in ("PUT", "DELETE"):
            refused = client(method, "/api/deployments/hello", json=HELLO)
            assert refused.status_code == 403 and "token" in refused.json()["detail"]
        assert client.get("/api/publishing/hello").json() == "one"
    with serving(tmp_path, token=TOKEN) as app, calling(app, "wrong") as client:
        assert client("PUT", "/api/deployments/hello", json=HELLO).status_code == 401


def test_deployments_at_the_same_time_do_not_lose_each_other(tmp_path: Path) -> None:
    flows = {f"f{n}": get_flow(f"/f{n}") for n in range(24)}
    with serving(tmp_path, token=TOKEN) as app, calling(app) as client, ThreadPoolExecutor(8) as pool:
        done = [pool.submit(client, "PUT", f"/api/deployments/{name}", json=flow) for name, flow in flows.items()]
        reloaded = [pool.submit(app.deployer.reload) for _ in range(8)]
        assert {each.result(20).status_code for each in done} == {201}
        assert [each.result(20) for each in reloaded] == [[]] * 8
        assert sorted(app.deployments.by_name) == sorted(flows)


# ---- own step kinds --------------------------------------------------------------------------------------------------


def test_a_program_adds_a_kind_of_step(tmp_path: Path) -> None:
    with serving(tmp_path) as app:

        @app.step("greet")
        def greet(context: Any, name: str, times: int = 1) -> list[str]:
            """Greets."""
            return [f"{context.params['v']} {name}"] * times

        spec = {"name": "Ada", "times": "${1 + 1}"}
        v = {"parameters": {"v": {"in": "query"}}}
        app.deploy("g", get_flow("/g", steps=[{"name": "g", "greet": spec}], request=v))
        assert app.run("g", {"v": "Hi"}).json() == ["Hi Ada", "Hi Ada"]
        assert (app.deployer.kinds["greet"].word, "greet" in STEP_KINDS) == ("Greets.", False)
        for wrong, message in (
            ({"nam": "x"}, 'did you mean "name"?'),
            ({}, 'needs a member "name"'),
            ("x", "must be an object with name, times, not text"),
        ):
            with pytest.raises(FlowError, match="greet") as caught:
                app.deploy("h", get_flow("/h", steps=[{"name": "g", "greet": wrong}]))
            assert message in str(caught.value)
        for name in ("http", "when", "a b", ""):
            with pytest.raises(ConfigError):
                app.step(name)
        found = flow_schema(app.deployer.kinds)["$defs"]["step"]["properties"]["greet"]
        assert (found["required"], found["description"]) == (["name"], "Greets.")


def test_a_file_may_wait_for_the_kind_of_step_that_it_uses(tmp_path: Path) -> None:
    with serving(tmp_path, f=get_flow("/f", steps=[{"name": "x", "shout": {"text": "a"}}])) as app:
        assert app.deployments.by_name == {}
        app.step("shout")(lambda context, text: text.upper())
        assert app.run("f").json() == "A"


# ---- the schema ------------------------------------------------------------------------------------------------------

FILES = [path for folder in ("flows", "examples/flows") for path in sorted((ROOT / folder).iterdir())]
FILES = [path for path in FILES if path.suffix in (".json", ".toml") and path.name != "connections.json"]
SCHEMA = flow_schema(STEP_KINDS)


@pytest.fixture
def validator() -> Any:
    """Of the extra `test`; the suite runs without it."""
    return pytest.importorskip("jsonschema").Draft202012Validator


def test_the_schema_is_a_schema_and_knows_every_kind(validator: Any) -> None:
    validator.check_schema(SCHEMA)
    specs = SCHEMA["$defs"]["step"]["properties"]
    assert all(len(specs[kind]) > 1 for kind in STEP_KINDS if kind != "set")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_flow_file_is_valid_by_the_schema(path: Path, validator: Any) -> None:
    text = path.read_text()
    tree = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    validator(SCHEMA).validate(tree)


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"request": {"method": "GET"}},
        get_flow("hello"),
        get_flow("/a", steps=[{"name": "x"}]),
        get_flow("/a", steps=[{"name": "x", "set": 1, "wait": 1}]),
        get_flow("/a", steps=[{"name": "x", "htpp": "http://x/"}]),
        get_flow("/a", steps=[{"name": "x", "each": {"of": [1]}}]),
        get_flow("/a", response={"status": 99}),
        get_flow("/a", respose={}),
        get_flow("/a", request={"parameters": {"p": {"type": "integer"}}}),
    ],
)
def test_the_schema_refuses_what_is_wrong(tree: Any, validator: Any) -> None:
    assert not validator(SCHEMA).is_valid(tree)


# ---- tests of flows --------------------------------------------------------------------------------------------------

TESTED = get_flow(
    "/t/{city}",
    steps=[
        {"name": "place", "http": {"url": "http://nowhere.invalid/", "query": {"q": "${params.city}"}}},
        {"name": "pause", "wait": 3600},
        {"name": "extra", "http": {"url": "http://nowhere.invalid/"}, "onError": "none", "when": "${place.body.n > 1}"},
    ],
    response={"headers": {"X-N": "${place.body.n}"}, "body": {"n": "${place.body.n}", "extra": "${extra}"}},
)


def result_of(**test: Any) -> list[str]:
    flow = build_flow({**TESTED, "tests": [{"name": "t", "request": {"params": {"city": "B"}}, **test}]}, "t")
    return run_test(flow, flow.tests[0], AsteraLite().outside)[0]  # not entered: nothing is opened


ONE = {"place": {"status": 200, "headers": {}, "body": {"n": 1}}}
TWO = {"place": {"status": 200, "headers": {}, "body": {"n": 2}}}


@pytest.mark.parametrize(
    ("test", "lines"),
    [
        ({"steps": ONE, "response": {"headers": {"x-n": 1}, "body": {"n": 1, "extra": None}}}, []),
        ({"steps": TWO, "fails": {"extra": 502}, "response": {"body": {"n": 2, "extra": "none"}}}, []),
        ({"fails": {"place": 504}, "response": {"status": 504}}, []),
        ({"steps": TWO, "fails": {"extra": {"status": 422, "body": "no"}}, "response": {"body": {"n": 2, "extra": "none"}}}, []),  # noqa: E501
        ({"fails": {"place": {"status": 422}}, "response": {"status": 502}}, []),
        (
            {"steps": ONE, "response": {"body": {"n": 2}}},
            ["body/n: expected 2, got 1", "body/extra: expected nothing, got null"],
        ),
        ({"steps": ONE, "response": {"status": 404}}, ["status: expected 404, got 200"]),
        ({"steps": {"place": {"body": {}}}, "response": {"body": {}}}, [
            'status: expected 200, got 500 t: /steps/2/when: step extra: place.body.n: there is no member "n" '
            '(members: none); if it may be missing, write .get("n")',
        ]),
        ({"steps": ONE, "response": {"headers": {"X-N": "9"}}}, ['header X-N: expected "9", got "1"']),
        ({"response": {}}, ['the step "place" has side effects: add its output, "steps": {"place": …}']),
        ({"request": {}, "response": {"status": 400}}, []),
    ],
)  # fmt: skip
def test_the_tests_of_a_flow(test: Any, lines: list[str]) -> None:
    assert result_of(**test) == lines


def test_a_parameter_that_is_null_in_a_test_is_missing_as_in_a_call() -> None:
    request = {"parameters": {"n": {"in": "query", "type": "integer", "default": 3}}}
    tests = [{"name": "t", "request": {"params": {"n": None}}, "response": {"body": 3}}]
    flow = build_flow(get_flow("/t", request=request, response={"body": "${params.n}"}, tests=tests), "t")
    assert run_test(flow, flow.tests[0], AsteraLite().outside) == ([], 0)


def test_the_output_of_a_step_that_answers_need_not_be_whole() -> None:
    steps = [{"name": name, "http": "http://nowhere.invalid/"} for name in ("a", "b", "c")]
    steps.append({"name": "d", "set": 1})
    outputs = {"a": {"body": 1}, "b": {"status": 404, "body": 2}, "c": "none", "d": {"body": 3}}
    seen = {"a": {"status": 200, "headers": {}, "body": 1}, "b": {"status": 404, "headers": {}, "body": 2}}
    test = {"name": "t", "steps": outputs, "response": {"body": outputs | seen}}
    response = {"body": {name: f"${{{name}}}" for name in outputs}}
    flow = build_flow(get_flow("/t", steps=steps, response=response, tests=[test]), "t")
    assert run_test(flow, flow.tests[0], AsteraLite().outside) == ([], 4)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({}, '/tests/0: needs a member "name"'),
        ({"name": "t"}, '/tests/0: needs a member "response"'),
        ({"name": "t", "response": {}, "steps": {"plcae": 1}}, 'there is no step "plcae"; did you mean "place"?'),
        ({"name": "t", "response": {}, "fails": {"place": "x"}}, '/fails/place: "x" is not a status from 200 to 599'),
        ({"name": "t", "response": {}, "fails": {"place": {}}}, '/tests/0/fails/place: needs a member "status"'),
        ({"name": "t", "response": {"code": 1}}, "/tests/0/response/code: is not known here"),
    ],
)  # fmt: skip
def test_faults_of_tests(test: Any, message: str) -> None:
    with pytest.raises(FlowError) as caught:
        build_flow({**TESTED, "tests": [test]}, "t")
    assert any(message in str(fault) for fault in caught.value.faults)
