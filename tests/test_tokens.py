"""Tokens: made by the command, kept as a hash, limited to flows; what each may see and do."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sqlite3
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from support import PROGRAM, ROOT, Client, Running, get_flow, process, running, until

from astera_lite import ConfigError, Server, main

FLOWS = {
    "hello": get_flow("/hello", response={"body": "hi"}),
    "other": get_flow("/other", response={"body": "ho"}),
    "slow": get_flow("/slow", steps=[{"name": "w", "wait": 60}]),
}


def make(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """A token, made by the command."""
    assert main(["token", *arguments, "--database", str(folder / "jobs.db")]) == 0
    return capsys.readouterr().out.strip()


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


class Tokens:
    def __init__(self, folder: Path, run: Running, texts: dict[str, str]) -> None:
        self.folder, self.app, self.server, self.client = folder, *run
        self.texts = texts

    def __call__(self, who: str, method: str, path: str, **more: Any) -> requests.Response:
        headers = {**bearer(self.texts[who]), **more.pop("headers", {})}
        return self.client(method, path, headers=headers, **more)

    def submit(self, who: str, path: str = "/hello") -> str:
        accepted = self(who, "GET", f"/api/publishingAsync{path}").json()
        if path == "/hello":
            self(who, "GET", accepted["statusUrl"], headers={"Prefer": "wait=10"})
        return str(accepted["id"])


@pytest.fixture
def tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Tokens]:
    texts = {
        "ada": make(tmp_path, capsys, "ada"),
        "bob": make(tmp_path, capsys, "bob", "--flows", "hello, slow"),
        "root": make(tmp_path, capsys, "root", "--role", "admin"),
    }
    with running(tmp_path, FLOWS) as run:
        yield Tokens(tmp_path, run, texts)


# --- the command ---


def test_a_token_is_printed_once_alone_and_kept_as_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", "ada", "--database", str(tmp_path / "jobs.db")]) == 0
    printed = capsys.readouterr()
    token = printed.out.strip()
    assert printed.out == f"{token}\n"
    assert len(token) > 40 and token.isascii() and token.isprintable() and " " not in token
    assert "not shown again" in printed.err and token not in printed.err
    for path in tmp_path.iterdir():
        assert token.encode() not in path.read_bytes()
    main(["token", "--database", str(tmp_path / "jobs.db")])
    listed = capsys.readouterr().out
    assert "ada" in listed and "user" in listed and token not in listed


def test_the_first_token_says_that_it_closes_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = ["--database", str(tmp_path / "jobs.db")]
    said = "this is the first token: from now on the server refuses requests without a token\n"
    for arguments, first in (["ada"], True), (["bob"], False), (["ada", "--revoke"], False), (["eve"], False):
        assert main(["token", *arguments, *database]) == 0
        assert capsys.readouterr().err.startswith(said) is first


def test_tokens_are_listed_with_role_and_flows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder of flows is: a program may publish them
    make(tmp_path, capsys, "bob", "--flows", "b,a")
    make(tmp_path, capsys, "ada", "--role", "admin")
    lines = make(tmp_path, capsys).splitlines()
    assert [line.split()[:2] + line.split()[3:] for line in lines] == [
        ["name", "role", "flows"],
        ["ada", "admin", "all"],
        ["bob", "user", "a,b"],
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ada"], 1, "there is a token ada already: revoke it first"),
        (["adda", "--revoke"], 1, 'the token adda is not there; did you mean "ada"?'),
        (["ada", "--revoke", "--role", "user"], 2, "--role goes with a new NAME"),
        (["--flows", "hello"], 2, "--flows goes with a new NAME"),
        (["--revoke"], 2, "--revoke needs the NAME of a token: without one, `token` lists them"),
        (["x", "--flows", "helo,hello"], 2, 'there is no flow "helo" in flows; did you mean "hello"?'),
        (["a b"], 2, '"a b" must consist of letters, digits, - and _'),
        (["x", "--flows", "../a"], 2, '"../a" must consist of letters'),
        (["x", "--flows", ","], 2, "--flows names flows"),
        (["x", "--flows", "a", "--role", "admin"], 2, "not for --role admin"),
        (["token"], 2, "token is the name of the token in the settings"),
    ],
)
def test_what_cannot_be_made_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(ROOT)
    make(tmp_path, capsys, "ada")
    assert main(["token", *arguments, "--database", str(tmp_path / "jobs.db")]) == code
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.out == ""


def test_a_database_that_is_no_database_is_4(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "jobs.db").write_text("text" * 999)
    assert main(["token", "ada", "--database", str(tmp_path / "jobs.db")]) == 4
    assert "not a database" in capsys.readouterr().err
    assert main(["token", "ada", "--database", str(tmp_path / "nowhere" / "jobs.db")]) == 4
    told = capsys.readouterr().err
    assert "there is no folder" in told and "first token" not in told


def test_made_and_revoked_while_a_server_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The server was open; from the first token on it is not, and does not open again when the last one is revoked."""
    with running(tmp_path, FLOWS) as run:
        assert run.client.get("/api/jobs").status_code == 200
        ada = make(tmp_path, capsys, "ada")
        until(lambda: run.client.get("/api/jobs").status_code == 401)
        assert run.client.get("/api/publishing/hello", headers=bearer(ada)).status_code == 200
        bob = make(tmp_path, capsys, "bob")
        until(lambda: run.client.get("/api/jobs", headers=bearer(bob)).status_code == 200)
        make(tmp_path, capsys, "ada", "--revoke")
        until(lambda: run.client.get("/api/jobs", headers=bearer(ada)).status_code == 401)
        assert run.client.get("/api/jobs", headers=bearer(bob)).status_code == 200
        make(tmp_path, capsys, "bob", "--revoke")
        until(lambda: run.client.get("/api/jobs", headers=bearer(bob)).status_code == 401)
        assert run.client.get("/api/jobs").status_code == 401
    with running(tmp_path, FLOWS) as run:
        assert run.client.get("/api/jobs").status_code == 401


def test_the_same_call_again_meets_what_changed_meanwhile(tokens: Tokens, capsys: pytest.CaptureFixture[str]) -> None:
    """A call with the same head as the last one is routed as that was, but for changed flows and tokens."""
    with requests.Session() as session:  # one connection

        def call() -> tuple[int, str]:
            answer = session.get(f"{tokens.server.url}/api/publishing/hello", headers=bearer(tokens.texts["ada"]))
            return answer.status_code, answer.text.strip()

        assert [call(), call()] == [(200, '"hi"')] * 2
        tokens.app.deploy("hello", get_flow("/hello", response={"body": "new"}))
        assert [call(), call()] == [(200, '"new"')] * 2
        make(tokens.folder, capsys, "ada", "--revoke")
        tokens.app.read_tokens()
        assert call()[0] == 401


def test_tokens_that_did_not_change_are_not_compared_with_each_request(tokens: Tokens) -> None:
    """The list stays the same one, or calls would take the longer, the more tokens there are."""
    before = tokens.app.tokens
    tokens.app.read_tokens()
    assert tokens.app.tokens is before


def test_flows_that_were_replaced_are_let_go_with_the_next_call(tokens: Tokens) -> None:
    for at in range(3):
        assert tokens("ada", "GET", "/api/publishing/hello", headers={"X-At": str(at)}).status_code == 200
    former = weakref.ref(tokens.app.deployments)
    tokens.app.deploy("hello", get_flow("/hello", response={"body": "new"}))
    assert tokens("ada", "GET", "/api/publishing/hello", headers={"X-At": "4"}).json() == "new"
    gc.collect()
    assert former() is None


def test_long_heads_are_not_kept_for_calls_to_come(tokens: Tokens) -> None:
    """512 of them would hold as much memory as an idle server has."""
    for at in range(3):
        assert tokens("ada", "GET", "/api/publishing/hello", headers={"X-Long": str(at) * 60_000}).status_code == 200
    assert not [head for head, *_ in tokens.server._routed.values() if len(head.headers.get("x-long", "")) > 1024]


def test_a_revoked_name_does_not_hand_its_jobs_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ada = make(tmp_path, capsys, "ada")
    with running(tmp_path, FLOWS) as run:
        job = run.client.get("/api/publishingAsync/hello", headers=bearer(ada)).json()["id"]
        make(tmp_path, capsys, "ada", "--revoke")
        assert "revoked" in make(tmp_path, capsys)
        assert main(["token", "ada", "--revoke", "--database", str(tmp_path / "jobs.db")]) == 1
        assert "was revoked before" in capsys.readouterr().err
        assert main(["token", "ada", "--database", str(tmp_path / "jobs.db")]) == 1
        assert "jobs of an earlier token ada are still kept" in capsys.readouterr().err
        root = make(tmp_path, capsys, "root", "--role", "admin")
        until(lambda: run.client("DELETE", f"/api/jobs/{job}", headers=bearer(root)).status_code == 204)
        again = make(tmp_path, capsys, "ada")
        until(lambda: run.client.get("/api/jobs", headers=bearer(again)).status_code == 200)
        assert run.client.get("/api/jobs", headers=bearer(ada)).status_code == 401


def test_a_server_beyond_loopback_lets_nobody_in_when_its_last_token_is_revoked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ada = make(tmp_path, capsys, "ada")
    with running(tmp_path, FLOWS, host="0.0.0.0") as run:  # the token is enough to let it listen there
        host = {"Host": "x.example"}
        url = f"http://127.0.0.1:{run.server.server_address[1]}/api/jobs"
        assert run.client.get(url, headers=bearer(ada) | host).status_code == 200
        make(tmp_path, capsys, "ada", "--revoke")
        until(lambda: run.client.get(url, headers=bearer(ada)).status_code == 401)
        assert run.client.get(url).status_code == 401


def test_the_exposure_rule_looks_at_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    database = ["--database", str(tmp_path / "jobs.db"), "--flows", str(ROOT / "flows")]
    assert main(["check", "--host", "0.0.0.0", *database]) == 1
    assert "make one with the command `token`" in capsys.readouterr().err
    make(tmp_path, capsys, "ada")
    assert main(["check", "--host", "0.0.0.0", *database]) == 0
    make(tmp_path, capsys, "ada", "--revoke")
    with running(tmp_path, FLOWS) as run, pytest.raises(ConfigError, match="command `token`"):
        Server(run.app, host="0.0.0.0", port=0)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_real_server_reads_tokens_again(tmp_path: Path) -> None:
    command = [*PROGRAM, "token"]
    env = {key: value for key, value in os.environ.items() if not key.startswith("ASTERA_")}

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    ada = run("ada")
    with process(tmp_path, "--flows", str(ROOT / "flows")) as (started, url, lines), requests.Session() as session:
        session.trust_env = False

        def code(token: str) -> int:
            return session.get(f"{url}/api/jobs", headers=bearer(token), timeout=10).status_code

        assert (code(ada), code("wrong")) == (200, 401)
        bob = run("bob")
        started.send_signal(signal.SIGHUP)
        until(lambda: code(bob) == 200)
        run("ada", "--revoke")
        until(lambda: code(ada) == 401)
        assert not any(ada in line or bob in line for line in lines)


# --- what a token may see and do ---


@pytest.mark.parametrize("path", ["", "/status", "/result"])
def test_a_token_sees_its_own_jobs_and_admin_sees_all(tokens: Tokens, path: str) -> None:
    job = tokens.submit("ada")
    assert tokens("ada", "GET", f"/api/jobs/{job}{path}").status_code == 200
    assert tokens("root", "GET", f"/api/jobs/{job}{path}").status_code == 200
    refused, unknown = (
        tokens("bob", "GET", f"/api/jobs/{each}{path}") for each in (job, "0192f0c1-0000-7000-8000-00000000000a")
    )
    assert refused.status_code == unknown.status_code == 404
    assert refused.headers["Job-Status"] == "Unknown"
    told = [answer.json() | {"id": "", "reason": ""} for answer in (refused, unknown)]
    assert told[0] | {"detail": ""} == told[1] | {"detail": ""}


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/cancel"), ("POST", "/rerun"), ("POST", "/callback"), ("DELETE", "")]
)
def test_nothing_can_be_done_to_anothers_job(tokens: Tokens, method: str, path: str) -> None:
    job = tokens.submit("ada")
    assert tokens("bob", method, f"/api/jobs/{job}{path}").status_code == 404
    assert tokens("ada", "GET", f"/api/jobs/{job}").json()["status"] == "Completed"


def test_the_list_shows_ones_own(tokens: Tokens) -> None:
    mine, theirs = tokens.submit("ada"), tokens.submit("bob")

    def listed(who: str, query: str = "") -> list[str]:
        return [job["id"] for job in tokens(who, "GET", f"/api/jobs{query}").json()["jobs"]]

    assert (listed("ada"), listed("bob"), listed("root")) == ([mine], [theirs], [theirs, mine])
    assert listed("bob", "?flow=hello&status=Completed&limit=1") == [theirs]


def test_a_limited_token_calls_its_flows_only(tokens: Tokens) -> None:
    for mode in ("publishing", "publishingAsync"):
        assert tokens("bob", "GET", f"/api/{mode}/hello").status_code in (200, 202)
        refused = tokens("bob", "GET", f"/api/{mode}/other")
        assert refused.status_code == 403
        assert refused.json()["detail"] == "The token bob may not call the flow other."
        assert 'error="insufficient_scope"' in refused.headers["WWW-Authenticate"]
        assert tokens("bob", "GET", f"/api/{mode}/nothing").status_code == 404
        assert tokens("ada", "GET", f"/api/{mode}/other").status_code in (200, 202)
    assert [flow["name"] for flow in tokens("bob", "GET", "/api/deployments").json()["deployments"]] == [
        "hello",
        "slow",
    ]
    assert tokens("bob", "GET", "/api/deployments/other").status_code == 403
    assert "other" not in tokens("bob", "GET", "/api/deployments/othe").text
    paths = tokens("bob", "GET", "/openapi.json").json()["paths"]
    assert "/api/publishing/hello" in paths and "/api/publishing/other" not in paths
    assert "/api/publishing/other" in tokens("ada", "GET", "/openapi.json").json()["paths"]
    assert [job["flow"] for job in tokens("root", "GET", "/api/jobs").json()["jobs"]] == ["other", "hello"]


def test_a_job_is_not_run_again_with_a_token_that_may_not_call_its_flow_any_more(
    tokens: Tokens, capsys: pytest.CaptureFixture[str]
) -> None:
    job = tokens.submit("bob")
    with contextlib.closing(sqlite3.connect(tokens.folder / "jobs.db")) as db, db:
        db.execute("""UPDATE tokens SET flows = '["slow"]' WHERE name = 'bob'""")
    until(lambda: tokens("bob", "GET", "/api/publishing/hello").status_code == 403)
    assert tokens("bob", "GET", f"/api/jobs/{job}/result").status_code == 200
    assert tokens("bob", "POST", f"/api/jobs/{job}/rerun").status_code == 403


def test_idempotency_keys_are_each_tokens_own(tokens: Tokens) -> None:
    def submit(who: str) -> str:
        answer = tokens(who, "GET", "/api/publishingAsync/hello", headers={"Idempotency-Key": "k"})
        return str(answer.json()["id"])

    assert submit("ada") == submit("ada") != submit("bob")


def test_only_admin_deploys(tokens: Tokens) -> None:
    for who in ("ada", "bob"):
        for method in ("PUT", "DELETE"):
            refused = tokens(who, method, "/api/deployments/hello", json={})
            assert (refused.status_code, refused.json()["detail"]) == (
                403,
                "Deploying needs a token of role admin.",
            )
            assert 'error="insufficient_scope"' in refused.headers["WWW-Authenticate"]
    assert 'error="insufficient_scope"' in tokens("bob", "GET", "/metrics").headers["WWW-Authenticate"]
    assert tokens("root", "DELETE", "/api/deployments/hello").status_code == 409  # published by the program


def test_the_setting_and_made_tokens_count_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ada = make(tmp_path, capsys, "ada")
    with running(tmp_path, FLOWS, token="of the settings") as run:
        job = run.client.get("/api/publishingAsync/hello", headers=bearer(ada)).json()["id"]
        assert run.client.get(f"/api/jobs/{job}", headers=bearer("of the settings")).status_code == 200
        assert run.client.get("/api/jobs", headers=bearer("of the setting")).status_code == 401


@pytest.mark.parametrize("value", ["", "x", "Bearer", "Bearer ", "Basic YTpi", "bearer \xff\xfe"])
def test_a_wrong_token_is_401(tokens: Tokens, value: str) -> None:
    answer = tokens.client.get("/api/jobs", headers={"Authorization": value.encode("latin-1")})
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")


def test_the_digest_itself_opens_nothing(tokens: Tokens, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(tokens.folder / "jobs.db")) as db:
        (digest,) = db.execute("SELECT hash FROM tokens WHERE name = 'ada'").fetchone()
    make(tokens.folder, capsys, "bob", "--revoke")
    until(lambda: tokens("bob", "GET", "/api/jobs").status_code == 401)
    for text in (digest.hex(), digest.hex().upper(), "", "x''", "''"):
        assert tokens.client.get("/api/jobs", headers=bearer(text)).status_code == 401


def test_a_job_outlives_its_token(tokens: Tokens, capsys: pytest.CaptureFixture[str]) -> None:
    job = tokens.submit("bob", "/slow")
    make(tokens.folder, capsys, "bob", "--revoke")
    until(lambda: tokens("bob", "GET", "/api/jobs").status_code == 401)
    assert tokens("root", "GET", f"/api/jobs/{job}/status").json()["status"] == "Running"


def test_while_tokens_cannot_be_read_those_known_count(tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    from astera_lite import StoreError

    def fails() -> Any:
        raise StoreError("the disk is gone")

    monkeypatch.setattr(tokens.app.store, "tokens", fails)
    tokens.app.read_tokens()
    assert tokens("ada", "GET", "/api/jobs").status_code == 200
    assert Client(tokens.server).get("/api/jobs").status_code == 401
