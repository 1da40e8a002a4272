"""The steps `sql` and `run`, and `python` in a process of its own: real files, real processes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import PROGRAM, Api, get_flow, process, until

from astera_lite import AsteraLite, Context, FlowError, Result, Status, build_flow

PY = sys.executable
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@contextmanager
def serving(folder: Path, *steps: Any, **settings: Any) -> Iterator[AsteraLite]:
    more = {name: settings.pop(name) for name in ("timeout", "response") if name in settings}
    (folder / "data").mkdir(exist_ok=True)
    defaults = {"database": str(folder / "jobs.db"), "data": str(folder / "data"), "shutdown_timeout": 5}
    app = AsteraLite(**{**defaults, **settings})
    app.deploy("f", get_flow("/f", steps=list(steps), request={"parameters": {"v": {"in": "query"}}}, **more))
    with app:
        yield app


def run(folder: Path, *steps: Any, v: str = "", **settings: Any) -> Result:
    with serving(folder, *steps, **settings) as app:
        return app.run("f", {"v": v})


def value(folder: Path, *steps: Any, **settings: Any) -> Any:
    result = run(folder, *steps, **settings)
    assert result.status_code == 200, result.text
    return result.json()


def faults(step: dict[str, Any]) -> list[str]:
    with pytest.raises(FlowError) as caught:
        build_flow(get_flow("/f", steps=[{"name": "x", **step}]), "f")
    return [f"{fault.place.removeprefix('/steps/0')}: {fault.message}" for fault in caught.value.faults]


# ---- sql -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    with closing(sqlite3.connect(tmp_path / "data" / "shop.db")) as db:
        db.executescript(
            "CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT, price REAL, picture BLOB);"
            "INSERT INTO item VALUES (1, 'pen', 1.5, x'00ff'), (2, 'ink', 4, NULL), (3, 'O''Brien', 9, NULL);"
        )
    return tmp_path


def sql(query: str, params: Any = None, **more: Any) -> dict[str, Any]:
    return {"name": "q", "sql": {"database": "shop.db", "query": query, "params": params or {}, **more}}


def test_rows_are_objects(shop: Path) -> None:
    rows = value(shop, sql("SELECT id, name FROM item WHERE price > :low ORDER BY id", {"low": 2}))
    assert rows == [{"id": 2, "name": "ink"}, {"id": 3, "name": "O'Brien"}]


@pytest.mark.parametrize(("name", "found"), [("O'Brien", {"id": 3}), ("' OR 1=1 --", None), ("", None)])
def test_a_value_is_never_part_of_the_statement(shop: Path, name: str, found: Any) -> None:
    query = sql(
        "SELECT id FROM item WHERE name = :name -- :x ? \n /* ? */ AND '?' <> ':y'", {"name": "${params.v}"}, one=True
    )
    assert value(shop, query, v=name) == found


def test_full_text_search_works(shop: Path) -> None:
    for query in ("CREATE VIRTUAL TABLE word USING fts5(t)", "INSERT INTO word VALUES ('hello world')"):
        value(shop, sql(query, write=True))
    assert value(shop, sql("SELECT t FROM word WHERE word MATCH 'hello'")) == [{"t": "hello world"}]


def test_bytes_pass_through(shop: Path) -> None:
    steps = sql("SELECT picture FROM item WHERE id = 1", one=True)
    result = run(shop, steps, response={"headers": {"Content-Type": "image/x"}, "body": "${q.picture}"})
    assert result.content == b"\x00\xff"


def test_a_list_and_bytes_are_told_with_what_to_write(shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = "SELECT name FROM item WHERE id IN (:ids)"
    assert run(shop, sql(listed, {"ids": [1, 2]})).status_code == 500
    assert "is a list: give json(…), which the query reads by IN (SELECT value FROM json_each(:ids))" in caplog.text
    cured = listed.replace(":ids", "SELECT value FROM json_each(:ids)")
    assert value(shop, sql(cured, {"ids": "${json([1, 2])}"})) == [{"name": "pen"}, {"name": "ink"}]
    picture = sql("SELECT picture FROM item WHERE id = 1", one=True)
    assert run(shop, picture, response={"body": "${q}"}).status_code == 500
    assert "bytes cannot be written as JSON: base64(…) makes text of them" in caplog.text
    assert run(shop, picture, response={"body": "${base64(q.picture)}"}).json() == "AP8="


@pytest.mark.parametrize(
    ("step", "cure"),
    [
        (sql("DELETE FROM item"), 'readonly database: a step that writes needs "write": true'),
        (sql("SELECT 1; SELECT 2"), 'one statement at a time: list them in "statements"'),
        (sql("SELECT 1", database="none.db"), 'there is no "none.db" in the data folder: a step with "write": true'),
        (sql("SELECT 1", database="none/a.db", write=True), "unable to open database file: its folder must exist"),
    ],
)
def test_a_failure_of_a_database_says_what_to_write(
    shop: Path, caplog: pytest.LogCaptureFixture, step: dict[str, Any], cure: str
) -> None:
    assert run(shop, step).status_code == 500
    assert cure in caplog.text.replace("\\", "")


def test_a_write_tells_what_it_did_and_statements_are_one_transaction(shop: Path) -> None:
    insert = "INSERT INTO item (name, price) VALUES (:name, 1)"
    assert value(shop, sql(insert, {"name": "cap"}, write=True)) == {"rowcount": 1, "lastrowid": 4}
    both = {"database": "shop.db", "write": True}
    both["statements"] = [{"query": insert, "params": {"name": "a"}}, {"query": "INSERT INTO item (id) VALUES (1)"}]
    assert run(shop, {"name": "q", "sql": both}).status_code == 500
    both["statements"][1] = {"query": "UPDATE item SET price = 0 WHERE id < 3 RETURNING id"}
    assert value(shop, {"name": "q", "sql": both})[1] == [{"id": 1}, {"id": 2}]
    assert value(shop, sql("SELECT count(*) AS n FROM item WHERE name = 'a'", one=True)) == {"n": 1}


@pytest.mark.parametrize(
    "query",
    [
        "INSERT INTO item (name) VALUES ('x')",
        "DROP TABLE item",
        "ATTACH 'other.db' AS o",
        "VACUUM INTO 'copy.db'",
        "PRAGMA writable_schema = ON",
        "PRAGMA query_only = OFF",
        "PRAGMA user_version = 5",
        "SELECT load_extension('x')",
        "SELECT 1; SELECT 2",
        "SELECT * FROM nothing",
        "SELEC",
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_what_a_statement_may_not_do_is_a_500_without_its_text(
    shop: Path, query: str, write: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if write and query.startswith(("INSERT", "DROP")):
        return
    before = sorted(os.listdir(shop / "data"))
    result = run(shop, sql(query, write=write))
    assert result.status_code == 500
    assert result.json()["detail"] == 'step "q": its database failed'
    assert "shop.db: " in caplog.text
    assert sorted(os.listdir(shop / "data")) == before
    assert value(shop, sql("SELECT count(*) AS n FROM item", one=True)) == {"n": 3}


@pytest.mark.parametrize(
    "name",
    ["../jobs.db", "/etc/passwd", "..", "", ".", "link.db", "sub/../../jobs.db", "jobs.db", "jobs.db-wal"],
)
def test_no_other_file_is_reached(shop: Path, name: str) -> None:
    (shop / "secret.db").write_bytes((shop / "data" / "shop.db").read_bytes())
    (shop / "data" / "link.db").symlink_to(shop / "secret.db")
    step = {"name": "q", "sql": {"database": "${params.v}", "query": "SELECT * FROM item", "write": True}}
    where = {"database": str(shop / "data" / "jobs.db")} if name.startswith("jobs") else {}
    result = run(shop, step, v=name, **where)
    assert (result.status_code, result.json()["detail"]) == (500, 'step "q": its database cannot be used')


def test_the_folder_is_made_by_the_first_write_and_a_missing_database_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = str(tmp_path / "new" / "data")
    result = run(tmp_path, sql("SELECT 1"), data=data)
    assert (result.status_code, result.json()["detail"]) == (500, 'step "q": its database is missing')
    assert 'there is no \\"shop.db\\" in the data folder' in caplog.text
    assert run(tmp_path, sql("CREATE TABLE t (a)", write=True), data=data).status_code == 200
    assert value(tmp_path, sql("SELECT * FROM t"), data=data) == []


def test_a_statement_ends_at_the_timeout_and_on_cancel(shop: Path) -> None:
    endless = sql("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) AS m FROM n")
    with serving(shop, {**endless, "timeout": "50ms"}) as app:
        assert app.run("f").status_code == 504
    with serving(shop, endless) as app:
        job = app.submit("f")
        until(lambda: app.engine.queue.counts()["running"])
        app.cancel(job.id)
        found = app.wait(job.id, 10)
        assert found.error and found.error["code"] == "cancelled"


def test_too_many_rows_and_columns_of_one_name_are_refused(shop: Path) -> None:
    many = sql("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 100000) SELECT i FROM n")
    assert run(shop, many, max_step_response="64KiB").status_code == 500
    with serving(shop, sql("SELECT 1 AS a, 2 AS a")) as app:
        job = app.wait(app.submit("f").id, 10)
        assert job.status is Status.ERROR


def test_a_locked_database_can_be_tried_again(shop: Path) -> None:
    step = sql("UPDATE item SET price = 7", write=True)
    with closing(sqlite3.connect(shop / "data" / "shop.db", isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        assert run(shop, {**step, "timeout": "50ms"}).status_code == 504
        db.execute("COMMIT")
    assert value(shop, {**step, "retry": {"attempts": 2, "on": ["locked"]}})["rowcount"] == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"query": "${params.x}"}, '/sql/query: "${params.x}" is not plain SQL, in which :name stands for'),
        ({"query": "SELECT ?"}, "/sql/query: has a ? parameter: write :name and give it by params"),
        ({"query": "SELECT :id"}, '/sql/params: lacks "id", which the query uses'),
        ({"query": "SELECT :id", "params": {"ID": 1}}, 'not used by the query: it has no :ID; did you mean "id"?'),
        ({"query": "SELECT ':id'", "params": {"id": 1}}, "not used by the query: it has no :id outside quotes"),
        ({}, '/sql: needs exactly one of query, statements'),
        ({"statements": []}, '/sql/statements: must be a list with at least one item'),
        ({"query": "SELECT 1", "write": "yes"}, '/sql/write: "yes" is not true or false'),
    ],
)  # fmt: skip
def test_faults_of_sql(spec: Any, message: str) -> None:
    assert any(message in fault for fault in faults({"sql": {"database": "x.db", **spec}}))


# ---- run -------------------------------------------------------------------------------------------------------------


def program(code: str, *args: Any, **more: Any) -> dict[str, Any]:
    return {"name": "r", "run": {"command": [PY, "-c", code, *args], **more}}


ECHO = "import sys; sys.stdout.write(sys.stdin.read() + '|'.join(sys.argv[1:]))"


def test_arguments_input_and_output(tmp_path: Path) -> None:
    step = program(ECHO, "${params.v}", "$HOME; ls", "${[1, null]}", 5, input="in:")
    assert value(tmp_path, step, v="a b'\"") == {"code": 0, "stdout": "in:a b'\"|$HOME; ls|[1,null]|5", "stderr": ""}


@pytest.mark.parametrize(("output", "stdout"), [("text", '["a"]\n'), ("json", ["a"]), ("lines", ['["a"]'])])
def test_forms_of_output(tmp_path: Path, output: str, stdout: Any) -> None:
    step = (
        program(ECHO, input=["a"], output=output)
        if output != "lines"
        else program(ECHO, input='["a"]\n', output=output)
    )
    found = value(tmp_path, step)["stdout"]
    assert found == (stdout if output != "text" else '["a"]')


def test_codes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = program("import sys; sys.exit('my inner trouble')")
    result = run(tmp_path, bad)
    assert (result.status_code, result.json()["detail"]) == (500, 'step "r": the program ended with code 1')
    assert "my inner trouble" in caplog.text and "inner" not in result.text
    assert value(tmp_path, program("import sys; sys.exit(3)", expect=[0, 3]))["code"] == 3
    assert run(tmp_path, {"name": "r", "run": ["no-such-program-anywhere"]}).status_code == 500
    assert run(tmp_path, program("print('x')", output="json")).status_code == 500


def test_the_environment_holds_no_settings_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASTERA_LITE_TOKEN", "t0ken")
    monkeypatch.setenv("TEST_SECRET", "s3cret")
    monkeypatch.setenv("TEST_OPEN", "open")
    step = program("import os, json; print(json.dumps(dict(os.environ)))", output="json")
    environ = value(tmp_path, step, secrets="TEST_SECRET")["stdout"]
    assert environ["TEST_OPEN"] == "open"
    assert not {"ASTERA_LITE_TOKEN", "TEST_SECRET"} & environ.keys()


def test_too_much_output_ends_the_program(tmp_path: Path) -> None:
    step = program("import sys\nwhile True: sys.stdout.write('x' * 1000)", maxOutput="64KiB")
    assert run(tmp_path, step).status_code == 500


PARENT = (
    "import subprocess, sys, os, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}')\n"
)


def pids(path: Path) -> list[int]:
    until(lambda: path.exists() and len(path.read_text().split()) == 2)
    return [int(word) for word in path.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@linux
def test_a_child_that_left_the_group_holds_nobody_up(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)"
    escaped = int(value(tmp_path, program(code))["stdout"])
    assert alive(escaped)
    os.kill(escaped, signal.SIGKILL)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "astera-child"])


@linux
@pytest.mark.parametrize("how", ["timeout", "cancel", "stop", "ends"])
def test_a_program_ends_with_its_children(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    note = tmp_path / "pids"
    code = PARENT if how == "ends" else PARENT + "time.sleep(60)\n"
    step = program(code, str(note)) | ({"timeout": "1s"} if how == "timeout" else {})
    with serving(tmp_path, step, shutdown_timeout=0.1) as app:
        job = app.submit("f")
        both = pids(note)
        if how == "cancel":
            app.cancel(job.id)
        if how != "stop":
            found = app.wait(job.id, 20)
            codes = {"timeout": "timeout", "cancel": "cancelled", "ends": None}
            assert (found.error and found.error["code"]) == codes[how]
    until(lambda: not any(alive(pid) for pid in both))
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "astera-child"])
    assert any("left processes behind" in line for line in caplog.messages) == (how == "ends")


@linux
@pytest.mark.parametrize("how", ["twice", "left over"])
def test_no_program_outlives_the_server(tmp_path: Path, how: str) -> None:
    note = tmp_path / "pids"
    (tmp_path / "flows").mkdir()
    flow = get_flow("/f", steps=[program(PARENT + "time.sleep(60)\n", str(note))])
    (tmp_path / "flows" / "f.json").write_text(json.dumps(flow))
    timeout = "30s" if how == "twice" else "100ms"
    with process(tmp_path, "--shutdown-timeout", timeout) as (server, url, lines):
        Api(url).submit("/f")
        both = pids(note)
        server.send_signal(signal.SIGINT)
        if how == "twice":
            until(lambda: any("for 1 job" in line for line in lines))
            server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
    until(lambda: not any(alive(pid) for pid in both))


@linux
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_no_program_outlives_or_holds_up_a_start_that_is_broken_off(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    note = tmp_path / "pids"
    (tmp_path / "flows").mkdir()
    flow = get_flow("/f", steps=[program(PARENT + "time.sleep(60)\n", str(note))])
    (tmp_path / "flows" / "f.json").write_text(json.dumps(flow))
    with process(tmp_path) as (server, url, _):
        Api(url).submit("/f")
        both = pids(note)
        server.kill()
    os.killpg(both[0], signal.SIGKILL)
    note.unlink()
    os.mkfifo(tmp_path / "cert")  # holds the start, whose job runs again
    command = [*PROGRAM, "--port", "0", "--tls-cert", "cert"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as started:
        both = pids(note)
        started.send_signal(number)
        os.close(os.open(tmp_path / "cert", os.O_RDWR))
        try:
            assert started.wait(20) == code
        finally:
            started.kill()
    until(lambda: not any(alive(pid) for pid in both))


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_program_outlives_the_command_try(tmp_path: Path, number: signal.Signals) -> None:
    note = tmp_path / "pids"
    (tmp_path / "flows").mkdir()
    step = program(PARENT + "time.sleep(60)\n", str(note))
    flow = get_flow("/f", steps=[{"name": "e", "each": {"of": [1], "as": "n", "concurrency": 2, "steps": [step]}}])
    (tmp_path / "flows" / "f.json").write_text(json.dumps(flow))
    with subprocess.Popen([*PROGRAM, "try", "f"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as started:
        both = pids(note)
        started.send_signal(number)
        assert (started.communicate(timeout=20)[1], started.returncode) == ("", 128 + number)
    until(lambda: not any(alive(pid) for pid in both))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ls -l", '/run/command: must be a list with at least one item, not text'),
        ([], '/run/command: must be a list with at least one item'),
        (["${request.id}"], "/run/command/0: must be plain text: the program to run is never computed"),
        ({"command": ["x"], "output": "xml"}, '/run/output: "xml" is not one of text, json, lines'),
        ({"command": ["x"], "expect": "ok"}, '/run/expect: "ok" is not an exit code from -255 to 255'),
    ],
)  # fmt: skip
def test_faults_of_run(spec: Any, message: str) -> None:
    assert message in faults({"run": spec})


# ---- python, isolated ------------------------------------------------------------------------------------------------

MODULE = """
import os, time, sys

def who(context, **args):
    print("noise on stdout")
    context.progress(1, 2)
    context.log.warning("it says %s", "hello")
    return {"pid": os.getpid(), "args": args, "params": context.params, "steps": context.steps,
            "environ": sorted(os.environ)}

def spin(context, note):
    open(note, "w").write(f"{os.getpid()} {os.getppid()}")
    while True:
        pass

def raises(context):
    raise ValueError("inner trouble")

def dies(context):
    os._exit(7)

def odd(context):
    return object()

def data(context, d):
    return d[::-1]
"""


@pytest.fixture
def flows(tmp_path: Path) -> Path:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "heavy.py").write_text(MODULE)
    return tmp_path


def isolated(function: str, args: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": "p", "python": {"call": f"heavy:{function}", "args": args or {}, "isolate": True}, **more}


def test_it_runs_in_a_warm_process_of_its_own(flows: Path, caplog: pytest.LogCaptureFixture) -> None:
    step = isolated("who", {"a": "${s}"})
    with serving(flows, {"name": "s", "set": [1]}, step, flows=str(flows / "flows")) as app:
        first, second = app.run("f", {"v": "x"}).json(), app.run("f", {"v": "y"}).json()
        assert first["pid"] == second["pid"] != os.getpid()
        assert (first["args"], first["params"], first["steps"]) == ({"a": [1]}, {"v": "x"}, {"s": [1]})
        assert "it says hello" in caplog.text
        pid = first["pid"]
    if sys.platform == "linux":
        until(lambda: not alive(pid))


@linux
@pytest.mark.parametrize("how", ["timeout", "cancel"])
def test_an_endless_loop_is_really_killed(flows: Path, how: str) -> None:
    note = flows / "pids"
    step = isolated("spin", {"note": str(note)}, **({"timeout": "1s"} if how == "timeout" else {}))
    with serving(flows, step, flows=str(flows / "flows")) as app:
        app.deploy("warm", get_flow("/warm", steps=[isolated("who")]))
        assert app.run("warm").status_code == 200  # the start of the process is not what the timeout bounds here
        job = app.submit("f")
        [pid, _] = pids(note)
        if how == "cancel":
            app.cancel(job.id)
        found = app.wait(job.id, 20)
        assert found.error and found.error["code"] == {"timeout": "timeout", "cancel": "cancelled"}[how]
        until(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("function", "reason"),
    [("raises", "ValueError: inner trouble"), ("dies", "code 7"), ("odd", "did not return JSON")],
)
def test_what_goes_wrong_there_fails_the_step(
    flows: Path, function: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(flows, isolated(function), flows=str(flows / "flows")) as app:
        for _ in range(2):
            result = app.run("f")
            assert result.status_code == 500 and "inner" not in result.text
        assert reason in caplog.text
        app.deploy("f", get_flow("/f", steps=[isolated("who")]))
        assert app.run("f").status_code == 200


def test_bytes_go_both_ways(flows: Path) -> None:
    body = {"method": "POST", "resource": "/b", "contentTypes": ["binary"]}
    with serving(flows, flows=str(flows / "flows")) as app:
        app.deploy("b", {"request": body, "steps": [isolated("data", {"d": "${request.body}"})]})
        assert app.run("b", body=b"\x00\x01\xff").content == b"\xff\x01\x00"


def test_more_calls_than_cores_take_turns(flows: Path) -> None:
    tree = {
        "name": "e",
        "each": {"of": "${range(12)}", "concurrency": 12, "steps": [isolated("who", {"n": "${item}"})]},
    }
    with serving(flows, tree, flows=str(flows / "flows")) as app:
        values = app.run("f").json()
    assert [value["args"]["n"] for value in values] == list(range(12))
    assert len({value["pid"] for value in values}) <= (os.cpu_count() or 1)


def test_a_function_object_cannot_be_isolated() -> None:
    def function(context: Context) -> None: ...

    step = {"name": "x", "python": {"call": function, "isolate": True}}
    with pytest.raises(FlowError) as caught:
        AsteraLite().deploy("f", get_flow("/f", steps=[step]))  # not entered: nothing is opened
    [fault] = caught.value.faults
    assert fault.place == "/steps/0/python/isolate"
    assert fault.message.startswith('needs the function by name, "module:function"')


TAKING = """
import functools

def alone(x):
    return x

def with_database(function):
    @functools.wraps(function)
    def call(context, **args):
        return function(context, "db", **args)
    return call

@with_database
def needs(context, database, x):
    return [database, x]
"""


def test_a_function_that_does_not_take_its_arguments_is_a_fault_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "taking.py").write_text(TAKING)

    def calling(function: str) -> dict[str, Any]:
        return {"name": "p", "python": {"call": f"taking:{function}", "args": {"x": 1}}}

    with serving(tmp_path, calling("needs"), flows=str(tmp_path)) as app:
        assert app.run("f").json() == ["db", 1]
        with pytest.raises(
            FlowError, match=r"alone\(x\) is called as alone\(context, x=…\): multiple values for argument 'x'"
        ):
            app.deploy("f", get_flow("/f", steps=[calling("alone")]))
