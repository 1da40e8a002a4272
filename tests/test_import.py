"""The command `import`: a SQLite database moves to PostgreSQL, with jobs of all states."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from nodes import Cluster, database_name, free_port
from support import ROOT, Sink, get_flow, running

import astera_lite
from astera_lite import AsteraLite, SqliteStore, main
from astera_lite_postgres import PostgresStore

Command = Callable[..., tuple[int, str, str]]
ECHO = get_flow(
    "/echo/{word}", response={"headers": {"X-Word": "${params.word}"}, "body": "${params.word + '\\u0000🐘'}"}
)


_numbers = itertools.count()


@pytest.fixture
def database_url(cluster: Cluster) -> str:
    """An empty PostgreSQL database."""
    return cluster.create(f"import-{next(_numbers)}")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def old(tmp_path: Path, sink: Sink) -> str:
    """A database as version 1.0 left it when it was killed a moment ago: jobs of all states, a callback, a token."""
    path = str(tmp_path / "old.db")
    text = (ROOT / "tests" / "version-1.0.sql").read_text("utf-8")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(text.replace("127.0.0.1:9470", sink.url.removeprefix("http://")))
        age = round(time.time() * 1000) - db.execute("SELECT max(created) FROM jobs").fetchone()[0]
        for statement in astera_lite._MOVE_TIMES:
            db.execute(statement, {"by": age})
        db.commit()
    return path


def test_all_that_a_database_holds_goes_on_in_another(
    database_url: str, old: str, tmp_path: Path, sink: Sink, command: Command
) -> None:
    before = Path(old).read_bytes()
    code, out, told = command("import", old, "--database", database_url)
    assert (code, out) == (0, "")
    assert told == "imported flows: 5, jobs: 7, pieces: 2, steps: 4, callbacks: 1, attempts: 1, tokens: 1\n"
    assert Path(old).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["old.db"]
    _, listed, _ = command("token", "--database", database_url)
    assert "ada" in listed

    with closing(sqlite3.connect(old)) as db:
        flows = dict(db.execute("SELECT name, text FROM flows"))
    with AsteraLite(database=database_url, callback_allow="127.0.0.1") as app:
        for name, flow in flows.items():  # or nobody would take their jobs
            app.deploy(name, json.loads(flow))
        found = {job.flow: job for job in app.store.page(app.clock.now(), 100, None, None, None, None)}
        ended = {flow: app.wait(job.id) for flow, job in found.items()}
        assert {flow: (job.status, job.error and job.error["code"]) for flow, job in ended.items()} == {
            "done": ("Completed", None),
            "big": ("Completed", None),
            "bad": ("Error", "failed"),
            "waits": ("Completed", None),
            "busy": ("Completed", None),
        }
        bodies = {flow: app.result(job.id).content for flow, job in ended.items()}
        assert bodies.pop("bad").startswith(b'{"type":"about:blank","title":"Unprocessable')
        assert bodies == {"done": b'{"n":7}\n', "big": b"x" * 300_000, "waits": b'"one\\n"\n', "busy": b'"one\\n"\n'}
        assert sink.next()[1]["flow"] == "done"
    for flow, job in ended.items():
        code, out, _ = command("job", job.id, "--database", database_url)
        assert code == 0 and f"flow      {flow}" in out
    _, listed, _ = command("jobs", "--database", database_url)
    assert all(job.id in listed for job in ended.values())


def test_jobs_keep_their_ids_keys_and_bytes(database_url: str, tmp_path: Path, command: Command) -> None:
    key = {"Idempotency-Key": "k"}
    with running(tmp_path, {"echo": ECHO}) as (_, _, client):
        path = "/api/publishingAsync/echo/a%22%5C"
        first = client.finished(client.get(path, headers=key))
        body, headers = (client.get(first["resultUrl"]).content, client.get(first["resultUrl"]).headers["X-Word"])
    assert command("backup", "copy.db", "--database", "jobs.db")[0] == 0
    assert command("import", "copy.db", "--database", database_url)[0] == 0
    code, _, told = command("job", first["id"], "--result", "--database", database_url)
    assert code == 0 and "Completed" in told
    with running(tmp_path, {"echo": ECHO}, database=database_url) as (_, _, client):
        again = client.get(path, headers=key)
        assert again.json()["id"] == first["id"]
        result = client.get(f"/api/jobs/{first['id']}/result")
        assert (result.content, result.headers["X-Word"]) == (body, headers)
        assert client.finished(client.get(path))["id"] != first["id"]


@pytest.mark.slow
def test_a_table_may_take_the_database_longer_than_a_server_would_wait(
    database_url: str, cluster: Cluster, old: str, command: Command
) -> None:
    PostgresStore(database_url).close()  # makes the tables
    name = database_name(database_url)
    body = "BEGIN PERFORM pg_sleep(17); RETURN NULL; END"
    cluster.query(f"CREATE FUNCTION late() RETURNS trigger AS '{body}' LANGUAGE plpgsql", database=name)
    statement = "CREATE TRIGGER late AFTER INSERT ON jobs FOR EACH STATEMENT EXECUTE FUNCTION late()"
    cluster.query(statement, database=name)
    code, _, told = command("import", old, "--database", database_url)
    assert (code, told.partition(",")[0]) == (0, "imported flows: 5")


def test_what_is_not_empty_not_there_or_in_use_is_refused(database_url: str, tmp_path: Path, command: Command) -> None:
    def refused(*words: str) -> str:
        code, out, told = command("import", *words)
        assert (code != 0, out) == (True, "")
        return told

    assert (
        refused("none.db")
        == "import fills a PostgreSQL database: set `database` to its address, postgresql://USER@HOST/NAME\n"
    )
    assert "there is no database" in refused("none.db", "--database", database_url)
    (tmp_path / "text.db").write_text("something else" * 100)
    assert "not a database" in refused("text.db", "--database", database_url)
    store = SqliteStore("mine.db")
    assert "a server uses mine.db" in refused("mine.db", "--database", database_url)
    store.close()
    assert command("token", "ada", "--database", database_url)[0] == 0
    told = refused("mine.db", "--database", database_url)
    assert "has tokens already" in told
    assert database_url not in told


def test_a_fault_in_the_middle_leaves_the_database_empty(
    database_url: str, old: str, command: Command, cluster: Cluster
) -> None:
    with closing(sqlite3.connect(old)) as db:  # what SQLite takes and PostgreSQL does not
        db.execute("INSERT INTO attempts VALUES (1, 1, 1, 1 << 62, 1 << 62, '')")
        db.commit()
    code, _, told = command("import", old, "--database", database_url)
    assert code == 4 and told.startswith("nothing was imported: ")
    name = database_name(database_url)
    assert cluster.query("SELECT (SELECT count(*) FROM jobs) + (SELECT count(*) FROM flows)", database=name) == [(0,)]


def test_a_backup_is_the_work_of_postgresql(database_url: str, tmp_path: Path, command: Command) -> None:
    assert command("token", "ada", "--database", database_url)[0] == 0
    code, out, told = command("backup", "copy.db", "--database", database_url)
    assert (code, out) == (1, "")
    assert "pg_dump" in told
    assert not (tmp_path / "copy.db").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--port", "0"],
        ["check", "--host", "0.0.0.0"],
        ["jobs"],
        ["job", "x"],
        ["token"],
        ["token", "ada"],
        ["import", "a.db"],
    ],
)
def test_a_database_that_cannot_be_reached_is_told_without_its_password(
    words: list[str], command: Command, tmp_path: Path
) -> None:
    pytest.importorskip("psycopg", reason="the driver is missing: pip install psycopg[binary]")
    (tmp_path / "flows").mkdir()
    SqliteStore("a.db").close()
    code, out, told = command(
        *words, "--database", f"postgresql://ada:s3cret@127.0.0.1:{free_port()}/jobs?connect_timeout=5"
    )
    assert (code, out) == (4, "")
    assert "PostgreSQL 127.0.0.1/jobs: " in told and "refused" in told
    assert "s3cret" not in told and "Traceback" not in told


def test_check_needs_no_database_where_the_server_needs_no_token(command: Command, tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    assert command("check", "--database", "postgresql://ada@127.0.0.1:1/jobs") == (0, "", "0 flows OK, 0 errors\n")


@pytest.mark.parametrize("address", ["postgresql://ada:s3cret@[/jobs", "postgres://ada:s3cret@h/jobs?no=such"])
def test_an_address_that_is_none_is_told_without_its_password(address: str, command: Command) -> None:
    pytest.importorskip("psycopg", reason="the driver is missing: pip install psycopg[binary]")
    code, out, told = command("jobs", "--database", address)
    assert (code, out) == (1, "")
    assert told.startswith("database: is no address of a PostgreSQL database: write postgresql://USER:PASSWORD@HOST")
    assert "s3cret" not in told
