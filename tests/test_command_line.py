"""Room 16: the program as its users start it, in processes of its own."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import requests
from support import PROGRAM, ROOT, SCRIPT, Sink, get_flow, process

import astera_lite
from astera_lite import ADMIN_TOKEN, SETTING_FIELDS, AsteraLite, __version__, log, main
from astera_lite_tools import COMMANDS, command_parser, starter_flow

HELLO = get_flow("/hello", response={"body": {"hello": "world"}})
POST = {
    "request": {"method": "POST", "resource": "/sum/{a}", "parameters": {"a": {"in": "path", "type": "integer"}}},
    "steps": [{"name": "total", "set": "${params.a + request.body.b}"}],
    "response": {"status": 201, "headers": {"X-Total": "${total}"}, "body": {"total": "${total}"}},
}


def environment(more: dict[str, str] | None = None) -> dict[str, str]:
    # Without PYTHONUNBUFFERED, which users do not have either: it would hide what goes wrong in the last flush.
    plain = {k: v for k, v in os.environ.items() if not k.startswith("ASTERA_") and k != "PYTHONUNBUFFERED"}
    return {**plain, "COLUMNS": "120", **(more or {})}


def run(
    folder: Path, *arguments: str, env: dict[str, str] | None = None, program: Sequence[str] = PROGRAM
) -> subprocess.CompletedProcess[str]:
    command = [*program, *arguments]
    more: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 30, "stdin": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=folder, env=environment(env), check=False, **more)
    assert "Traceback" not in done.stderr, done.stderr
    return done


class Here:
    """The command line in this process, for the many calls that only look at a message and an exit code."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.chdir(folder)
        for name in os.environ:
            if name.startswith("ASTERA_"):
                monkeypatch.delenv(name)

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        with self._monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            try:
                code = main(arguments)
            except SystemExit as leaving:  # argparse's way
                code = int(leaving.code or 0)
        said = self._capsys.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Here]:
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    yield Here(tmp_path, monkeypatch, capsys)
    log.handlers[:] = handlers
    log.setLevel(level)
    log.propagate = propagate


def write(folder: Path, **flows: Any) -> Path:
    (folder / "flows").mkdir(exist_ok=True)
    for name, tree in flows.items():
        (folder / "flows" / f"{name}.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return folder


def get(url: str, **more: Any) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False
        return session.get(url, timeout=10, **more)


def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def refuses(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


# --- help ---


@pytest.fixture(scope="module")
def help_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    done = run(tmp_path_factory.mktemp("help"), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("name", SETTING_FIELDS)
def test_help_names_every_setting_and_its_default(help_text: str, name: str) -> None:
    item = SETTING_FIELDS[name]
    flag = "--" + name.replace("_", "-")
    if item.secret:
        assert not re.search(rf"{flag}\b(?!-)", help_text)
        assert f"ASTERA_LITE_{name.upper()}" in help_text
        return
    entry = re.search(rf"^  {flag} (.*?)(?=^  -|^\S)", help_text, re.MULTILINE | re.DOTALL)
    assert entry is not None
    text = " ".join(entry[1].split())
    assert re.sub(r"\s", "", item.help) in re.sub(r"\s", "", text)
    assert "(default: " in text
    if isinstance(item.default, str):
        assert f"(default: {item.default})" in text


_PLAIN = [
    *("serve", "--port", "--port=1", "--config", "--config=c", "--database", "--access-log", "--access-log=true"),
    "--token",
    *("--no-such", "--help", "--limit", "--flows=a=b", "--log=", "-", "-x", "--", "1", "a", "a=b", "", "check", "text"),
]  # fmt: skip


@hypothesis.given(st.lists(st.sampled_from(_PLAIN), max_size=5))
@hypothesis.example([])
@hypothesis.example(["serve", "--port", "1", "--config=c", "--port=2", "--access-log", "true"])
def test_settings_alone_are_read_as_the_whole_parser_reads_them(given: list[str]) -> None:
    flags = astera_lite.serve_flags(given)
    if flags is None:
        return
    parsed = vars(command_parser().parse_args(given))
    assert parsed.pop("command") in (None, "serve")
    assert parsed == {f"set_{name}": value for name, value in flags.items()}


def test_a_server_loads_no_module_that_it_has_no_use_for(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    for flow in (ROOT / "flows").glob("*.json"):
        shutil.copy(flow, tmp_path / "flows")
    code = """
import os, signal, sys, astera_lite
start = astera_lite.Server.start
def ready(server):
    start(server)
    print(*sys.modules, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
astera_lite.Server.start = ready
sys.exit(astera_lite.main(["--port", "0"]))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"sqlite3", "http.server"} <= loaded
    spared = "argparse asyncio dataclasses hmac inspect pathlib subprocess tomllib urllib.request"
    assert not loaded.intersection(spared.split())


@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="/proc tells how a process was started: Linux")
def test_the_list_of_processes_shows_what_was_typed(tmp_path: Path) -> None:
    with process(tmp_path, "--workers", "2", program=(sys.executable, SCRIPT)) as (started, _, _):
        words = Path(f"/proc/{started.pid}/cmdline").read_text().split("\0")
    assert words[0] == sys.executable and words[-6:] == [SCRIPT, "--port", "0", "--workers", "2", ""]
    assert not any(" " in word or "\n" in word for word in words)


def test_help_names_every_command_and_exit_code(help_text: str) -> None:
    for name, row in COMMANDS.items():
        assert re.search(rf"^ +{name} +{re.escape(row.help)}", help_text, re.MULTILINE)
    assert re.search("0 .*1 .*2 .*3 .*4 ", help_text[help_text.index("exit codes") :], re.DOTALL)


def test_help_fits_a_wide_terminal(help_text: str) -> None:
    assert max(map(len, help_text.splitlines())) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(here: Here, name: str) -> None:
    done = here(name, "--help")
    assert done.returncode == 0
    assert done.stdout.lower().count(COMMANDS[name][1].lower()) == 1
    for argument, _ in COMMANDS[name][2]:
        assert argument in done.stdout or argument == "values"


def test_version(tmp_path: Path) -> None:
    done = run(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"Astera Lite {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["--nonsense"], ["--por", "0"], ["new"], ["job"], ["try"], ["jobs", "--limit", "x"],
     ["jobs", "--status", "Done"], ["--token", "t"], ["--callback-secret", "s"], ["serve", "--token=t"]],
)  # fmt: skip
def test_wrong_usage_is_2(here: Here, tmp_path: Path, arguments: list[str]) -> None:
    done = here(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
    assert " [settings]" not in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prot", "9270"], 'there is no --prot; did you mean "--port"?'),
        (["-p", "9270"], "there is no -p"),
        (["check", "--prot=1"], 'there is no --prot; did you mean "--port"?'),
        (["jobs", "--limt", "3"], 'there is no --limt; did you mean "--limit"?'),
        (["--limit", "5", "jobs"], "--limit must follow its command"),
        (["try"], "the following arguments are required: NAME"),
        (["jobs", "--limit", "0"], 'argument --limit: "0" is not a whole number of 1 or more'),
        (["jobs", "--flow", "\udcff"], 'argument --flow: "\\udcff" must consist of letters, digits, - and _'),
        (["--token", "t"], "--token would show in `ps`: set ASTERA_LITE_TOKEN, or write it into the --config file"),
    ],
)
def test_wrong_usage_is_told_by_what_was_meant(here: Here, arguments: list[str], said: str) -> None:
    done = here(*arguments)
    assert (done.returncode, done.stderr.splitlines()[-1].partition("error: ")[2]) == (2, said)
    assert here("try", "nothing", "--", "--prot=1").stderr.endswith('there is no flow "nothing"\n')


# --- settings ---


def test_the_later_spelling_of_a_setting_wins(here: Here, tmp_path: Path) -> None:
    for folder in ("a", "b", "c", "d"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, **{folder: HELLO})
    (tmp_path / "astera_lite.toml").write_text('flows = "a/flows"\n')
    (tmp_path / "own.toml").write_text('flows = "b/flows"\n')
    env = {"ASTERA_LITE_FLOWS": "c/flows"}
    assert here("try", "a").returncode == 0
    assert here("try", "b").returncode == 1
    assert here("--config", "own.toml", "try", "b").returncode == 0
    assert here("try", "b", "--config", "own.toml").returncode == 0
    assert here("try", "c", "--config", "own.toml", **env).returncode == 0
    assert here("try", "d", "--config", "own.toml", "--flows", "d/flows", **env).returncode == 0
    assert here("--flows", "d/flows", "try", "d", **env).returncode == 0


def test_a_request_that_hangs_on_a_thread_of_its_own_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    (tmp_path / "hangs.py").write_text(
        "import sys, time, astera_lite\n"
        "def hang(*more):\n    print('hangs', file=sys.stderr, flush=True)\n    time.sleep(600)\n"
        "astera_lite.SqliteStore.page = hang\n"
        "sys.exit(astera_lite.main())\n"
    )
    program = (sys.executable, "hangs.py")
    with process(tmp_path, "--shutdown-timeout", "100ms", program=program) as (server, url, lines):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as sock:
            sock.sendall(b"GET /api/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            until(lambda: any("hangs" in line for line in lines), "the request does not begin")
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0


def test_what_cannot_be_tried_or_made_is_told(here: Here, tmp_path: Path) -> None:
    write(tmp_path, bad={"request": {}})
    tried, made = here("try", "bad"), here("new", "bad")
    assert (tried.returncode, made.returncode) == (1, 1)
    assert tried.stderr.endswith('the flow "bad" has the faults listed above\n')
    assert made.stderr == f"{Path('flows') / 'bad.json'} exists already: choose another name\n"


def test_faulty_settings_are_listed_all_at_once(here: Here, tmp_path: Path) -> None:
    (tmp_path / "astera_lite.toml").write_text('retention = "soon"\nworkerz = 3\n')
    done = here("--port", "99999", ASTERA_LITE_MAX_BODY="10 apples", ASTERA_LITE_LOG="xml")
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    for part in (
        "astera_lite.toml: retention",
        "workerz",
        "workers",
        "--port",
        "ASTERA_LITE_MAX_BODY",
        "ASTERA_LITE_LOG",
    ):
        assert [line for line in lines if part in line], part
    assert len(lines) == 5
    assert not (tmp_path / "astera_lite.db").exists()


IMPOSSIBLE = [
    ({"ASTERA_LITE_CALLBACK_SECRET": "hunter2"}, "callback_secret"),
    ({"ASTERA_LITE_CALLBACK_ALLOW": "10.0.0.0/99"}, "callback_allow"),
    ({"ASTERA_LITE_SECRETS": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE"),
    ({"ASTERA_LITE_SECRETS": "none.toml"}, "none.toml"),
    ({"ASTERA_LITE_HOST": "0.0.0.0"}, "token"),
    ({"ASTERA_LITE_PUBLIC_URL": "https://api.example"}, "token"),
    ({"ASTERA_LITE_PUBLIC_URL": "api.example", "ASTERA_LITE_TOKEN": "t" * 32}, "public_url"),
]


@pytest.mark.parametrize(("env", "named"), IMPOSSIBLE)
def test_check_tells_of_a_setting_that_cannot_work(here: Here, tmp_path: Path, env: dict[str, str], named: str) -> None:
    write(tmp_path, hello=HELLO)
    done = here("check", **env)
    assert done.returncode == 1
    assert named in done.stderr + done.stdout
    assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.parametrize(("env", "named"), [*IMPOSSIBLE[4:], ({"ASTERA_LITE_TLS_CERT": "none.pem"}, "tls_cert")])
def test_serve_does_not_start_with_a_setting_that_cannot_work(tmp_path: Path, env: dict[str, str], named: str) -> None:
    done = run(write(tmp_path, hello=HELLO), "--port", "0", env=env)
    assert done.returncode == 1
    assert named in done.stderr


def test_a_key_that_cannot_be_used_is_told_and_no_password_asked_for(
    tmp_path: Path, certificate: tuple[str, str]
) -> None:
    cert, key = certificate
    command = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", "locked.pem"]
    subprocess.run(command, cwd=tmp_path, timeout=30, check=True)
    both = Path(cert).read_text() + (tmp_path / "locked.pem").read_text()
    (tmp_path / "both.pem").write_text(both)
    cure = "is encrypted: decrypt it, because the server asks for no password: openssl pkey -in KEY -out NEW"
    for flags, said in (
        (["--tls-cert", cert, "--tls-key", "locked.pem"], f"tls_key: {cure}"),
        (["--tls-cert", "both.pem"], f"tls_cert: {cure}"),
        (["--tls-cert", cert, "--tls-key", "none.pem"], "tls_key: cannot be read: No such file or directory"),
        (["--tls-key", key], "tls_cert: is missing: tls_key goes with a certificate"),
    ):
        done = run(tmp_path, "--port", "0", *flags)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


def test_two_settings_that_cannot_work_are_both_told(here: Here) -> None:
    env = {"ASTERA_LITE_CALLBACK_SECRET": "hunter2", "ASTERA_LITE_CALLBACK_ALLOW": "10.0.0.0/99"}
    done = here("check", **env)
    assert done.returncode == 1
    assert "callback_secret" in done.stderr
    assert "callback_allow" in done.stderr


@pytest.mark.parametrize("text", ["port = ", "port = 1\nport = 2", "\xff", None])
def test_a_config_file_that_cannot_be_read_is_1(here: Here, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "x.toml").write_bytes(text.encode("latin-1"))
    done = here("check", "--config", "x.toml")
    assert done.returncode == 1
    assert done.stderr.startswith("x.toml: ")


# --- serve ---


def test_serve_prints_every_endpoint_ready_to_use(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO, sum=POST, both=json.loads(starter_flow("both")))
    with process(tmp_path) as (_, url, lines):
        assert re.fullmatch(r"http://127\.0\.0\.1:[0-9]+", url)
        printed = [line.split(maxsplit=2) for line in lines if "/api/publishing" in line]
        assert [row[:2] for row in printed] == [
            ["both", "synchronous"], ["both", "asynchronous"], ["hello", "synchronous"], ["hello", "asynchronous"],
            ["sum", "synchronous"],
        ]  # fmt: skip
        assert printed[4][2] == f"-X POST '{url}/api/publishing/sum/1'"
        for row in printed[:4]:
            code = 200 if row[1] == "synchronous" else 202
            assert get(row[2].strip("'")).status_code == code
        assert lines[-1] == f"listening on {url}"


ODD = {
    "request": {
        "method": "POST",
        "resource": "/odd/{who}",
        "contentTypes": ["form"],
        "body": {"type": "object", "properties": {"it's": {"type": "string", "example": "@home & more"}}},
        "parameters": {
            "who": {"in": "path", "example": "O'Hara/ü"},
            "page[size]&": {"in": "query", "required": True, "type": "integer"},
            "tags": {"in": "query", "required": True, "type": "array", "example": ["a&b", "c d"]},
            "X-Mode": {"in": "header", "required": True, "enum": ["it's fast"]},
        },
    },
    "response": {"body": {"params": "${params}", "body": "${request.body}"}},
}


@pytest.fixture
def slow_api() -> Iterator[str]:
    command = [sys.executable, str(ROOT / "examples" / "slow_api.py"), "--port", "0", "--delay", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as api:
        try:
            assert api.stdout is not None
            yield api.stdout.readline().split()[-1].rstrip("/")
        finally:
            api.kill()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here: apt-get install curl")
@pytest.mark.parametrize("flows", ["flows", "examples/flows", "odd"])
def test_what_a_start_prints_works_behind_curl(tmp_path: Path, slow_api: str, flows: str) -> None:
    """As it stands, in a new folder; the flow that loads what others show goes first."""
    write(tmp_path, odd=ODD)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    env = {f"ASTERA_FLOW_{name}": slow_api for name in ("WEATHER_URL", "GEOCODING_URL")}
    env["ASTERA_FLOW_SELF"] = f"http://127.0.0.1:{port}"
    folder = [] if flows == "odd" else ["--flows", str(ROOT / flows)]
    with process(tmp_path, *folder, "--port", port, env=env) as (_, _, lines):
        printed = [line.split(maxsplit=2) for line in lines if "/api/publishing" in line]
        assert printed
        for name, mode, command in sorted(printed, key=lambda row: row[0] != "airports-load"):
            curl = f"curl -sS --noproxy '*' -m 20 -o answer -w '%{{http_code}}' {command}"
            done = subprocess.run(
                curl, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
            )
            answer = (tmp_path / "answer").read_text()
            assert done.stdout in (("200", "201") if mode == "synchronous" else ("202",)), (name, done, answer)
            if name == "odd":
                params = {"who": "O'Hara/ü", "page[size]&": 1, "tags": ["a&b", "c d"], "X-Mode": "it's fast"}
                assert json.loads(answer) == {"params": params, "body": {"it's": "@home & more"}}


def test_serve_works_without_a_flow(tmp_path: Path) -> None:
    with process(tmp_path) as (_, url, lines):
        assert get(url + "/health").status_code == 200
        assert any("there is no such folder: start where it is, or set `flows` to its path" in line for line in lines)
        assert "published: no flow; `new NAME` writes a first flow" in lines


def test_serve_tells_of_faulty_flows_and_serves_the_others(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO, broken="{", wrong=get_flow("/wrong", response={"body": "${nothing}"}))
    with process(tmp_path) as (_, url, lines):
        for name in ("broken.json", "wrong.json"):
            assert [line for line in lines if name in line]
        assert get(url + "/api/publishing/hello").json() == {"hello": "world"}
        assert get(url + "/health").json()["deployments"] == {"published": 1, "faults": 2}


def test_a_port_that_is_taken_is_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run(tmp_path, "--port", str(taken.getsockname()[1]))
    assert done.returncode == 3
    assert "cannot listen on 127.0.0.1:" in done.stderr
    assert "--port" in done.stderr


def test_an_address_that_is_not_here_is_3(tmp_path: Path) -> None:
    done = run(tmp_path, "--host", "192.0.2.1", "--port", "0", "--insecure-open")
    assert done.returncode == 3
    assert "cannot listen on 192.0.2.1:0: " in done.stderr and "--host" in done.stderr


def test_an_address_of_a_family_that_is_not_here_is_3(tmp_path: Path) -> None:
    code = """
import errno, os, socket, sys, astera_lite
class WithoutIpv6(socket.socket):
    def __init__(self, family=-1, *more, **named):
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        super().__init__(family, *more, **named)
socket.socket = WithoutIpv6
sys.exit(astera_lite.main(["--host", "::1", "--port", "0"]))
"""
    done = run(tmp_path, program=(sys.executable, "-c", code))
    assert done.returncode == 3
    assert "cannot listen on ::1:0: " in done.stderr and "--host" in done.stderr


@pytest.mark.parametrize("name", ["stderr", "store", "housekeeper", "loop"])
@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["thread", "memory"])
def test_a_start_that_gets_too_little_is_no_fault_in_settings(tmp_path: Path, name: str, error: Exception) -> None:
    code = f"""
import sys, threading, astera_lite
start = threading.Thread.start
def start_or_refuse(thread):
    if thread.name == "astera-{name}":
        raise {error!r}
    start(thread)
threading.Thread.start = start_or_refuse
sys.exit(astera_lite.main(["--port", "0"]))
"""
    done = run(tmp_path, program=(sys.executable, "-c", code))
    assert done.returncode == 5
    told = f"{str(error) or 'out of memory'}: allow this process more threads and memory"
    assert done.stderr.splitlines()[-1] == told


def test_a_server_that_may_open_few_files_says_so_and_takes_fewer_connections(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))"
    code = f"import resource, sys, astera_lite; {limit}; sys.exit(astera_lite.main())"
    with process(tmp_path, program=(sys.executable, "-c", code)) as (_, url, lines), ExitStack() as stack:
        words = "only 300 files may be open (ulimit -Hn): at most 150 connections, not the 1000 of max_connections"
        assert [line for line in lines if "warning" in line and line.endswith(words)]
        port = int(url.rpartition(":")[2])
        for _ in range(320):  # those that came first give way
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        until(
            lambda: get(url + "/health").status_code == 200, "all connections stay busy"
        )  # once the last of them is no newcomer any more
    assert not any("cannot be accepted" in line for line in lines)


def test_a_database_that_is_in_use_is_4(tmp_path: Path) -> None:
    with process(tmp_path):
        done = run(tmp_path, "--port", "0")
    assert done.returncode == 4
    assert "astera_lite.db" in done.stderr


UNUSABLE = ["nowhere/jobs.db", "text.db", "folder"]


@pytest.fixture
def unusable(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database, but long enough to be one\n" * 100)
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize("path", UNUSABLE)
def test_serve_with_an_unusable_database_is_4(tmp_path: Path, unusable: None, path: str) -> None:
    done = run(tmp_path, "--port", "0", "--database", path, "--log", "off")
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert path.partition("/")[0] in done.stderr


@pytest.mark.parametrize("command", [["jobs"], ["job", "0192f0c1-0000-7000-8000-000000000000"]])
@pytest.mark.parametrize("path", UNUSABLE)
def test_to_look_at_an_unusable_database_is_4(here: Here, unusable: None, command: list[str], path: str) -> None:
    done = here(*command, "--database", path)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert path.partition("/")[0] in done.stderr


def test_a_missing_schema_says_what_to_do(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path / "astera_lite.py")
    done = run(tmp_path, "--port", "0", program=(sys.executable, "astera_lite.py"))
    assert done.returncode == 1
    assert "schema.sql" in done.stderr
    assert "beside astera_lite.py" in done.stderr
    (tmp_path / "schema.sql").mkdir()
    done = run(tmp_path, "--port", "0", program=(sys.executable, "astera_lite.py"))
    assert (done.returncode, done.stderr) == (1, f"{tmp_path / 'schema.sql'}: cannot be read: Is a directory\n")


def test_it_serves_on_a_python_whose_json_has_no_part_in_c(tmp_path: Path) -> None:
    (tmp_path / "_json.py").write_text("raise ImportError\n")  # stands in for the part in C
    write(tmp_path, hello=get_flow("/hello", response={"body": {"é": [1, None, 0.5]}}))
    with process(tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as (_, url, _lines):
        assert get(url + "/api/publishing/hello").text == '{"é":[1,null,0.5]}\n'


# --- signals ---


@pytest.mark.parametrize(
    "program", [PROGRAM, (sys.executable, SCRIPT), (sys.executable, "one.pyz")], ids=["module", "script", "zipapp"]
)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_ctrl_c_while_the_program_loads_ends_it_without_a_traceback(
    tmp_path: Path, program: tuple[str, ...], command: str
) -> None:
    if "one.pyz" in program:
        run(tmp_path, "zipapp", "one.pyz")
    (tmp_path / "bisect.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )  # stands in for Python's
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = run(tmp_path, command, program=program, env=env)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")  # a shell says 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_gracefully(tmp_path: Path, sink: Sink, number: int) -> None:
    call = {"name": "call", "http": {"method": "POST", "url": sink.url, "body": {}}}
    steps = [call, {"name": "pause", "wait": 0.4}]
    write(tmp_path, slow=get_flow("/slow", steps=steps, response={"body": "done"}))
    answers: list[requests.Response] = []
    with process(tmp_path) as (started, url, _):
        job = get(url + "/api/publishingAsync/slow").json()
        sink.next()
        client = threading.Thread(target=lambda: answers.append(get(url + "/api/publishing/slow")))
        client.start()
        sink.next()  # the synchronous run is under way
        started.send_signal(number)
        client.join(10)
        assert started.wait(10) == 0
    assert answers[0].json() == "done"
    shown = run(tmp_path, "job", job["id"], "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["status"] in ("Running", "Completed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_says_what_it_waits_for_and_what_came_of_it(tmp_path: Path, number: int) -> None:
    hold = get_flow("/hold", steps=[{"name": "hold", "python": "hold:hold"}])
    write(tmp_path, hold=hold, also=get_flow("/also", steps=hold["steps"]))
    code = "import os, time\n\ndef hold(context):\n    while not os.path.exists('go'):\n        time.sleep(0.01)\n"
    (tmp_path / "flows" / "hold.py").write_text(code)
    again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
    more = f"{again} stops at once; unfinished jobs run again at the next start"
    for jobs, said in (
        ([], "stopping"),
        (["hold"], f"stopping: waiting up to 30 s for 1 job (hold); {more}"),
        (["hold", "also", "hold"], f"stopping: waiting up to 30 s for 3 jobs (also, hold); {more}"),
    ):
        (tmp_path / "go").unlink(missing_ok=True)
        with process(tmp_path) as (started, url, lines):
            for name in jobs:
                get(f"{url}/api/publishingAsync/{name}")
            until(lambda: get(url + "/health").json()["jobs"]["running"] == len(jobs), "the jobs do not begin")  # noqa: B023
            started.send_signal(number)
            until(lambda: any(line.rstrip().endswith(" " + said) for line in lines), said)  # noqa: B023
            (tmp_path / "go").touch()
            assert started.wait(10) == 0
        assert lines[-1].rstrip().endswith("info    stopped")


def test_a_stop_says_that_it_waits_for_a_callback(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    said = "stopping: waiting up to 30 s for 1 callback; a second signal stops at once"
    with socket.create_server(("127.0.0.1", 0)) as receiver, process(tmp_path) as (started, url, lines):
        get(f"{url}/api/publishingAsync/hello?callbackUrl=http%3A%2F%2F127.0.0.1%3A{receiver.getsockname()[1]}")
        with receiver.accept()[0]:
            started.send_signal(signal.SIGTERM)
            until(lambda: any(line.rstrip().endswith(said) for line in lines), said)
        assert started.wait(10) == 0


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    steps = [{"name": "hold", "python": "hold:hold"}]
    write(tmp_path, hold=get_flow("/hold", steps=steps, response={"body": 1}))
    code = "import time\n\n\ndef hold(context):\n    time.sleep(20)\n"
    (tmp_path / "flows" / "hold.py").write_text(code)
    with process(tmp_path) as (started, url, _):
        get(url + "/api/publishingAsync/hold")
        until(lambda: get(url + "/health").json()["jobs"]["running"] >= 1, "the job does not begin")
        started.send_signal(signal.SIGTERM)
        # The listener closes when the first signal was taken.
        port = int(url.rpartition(":")[2])
        until(lambda: refuses(port), "the listener stays open")
        began = time.monotonic()
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0
        assert time.monotonic() - began < 5


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_sighup_reads_the_flows_again_and_goes_on_serving(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO, old=get_flow("/old", response={"body": 1}))
    with process(tmp_path) as (started, url, lines):
        assert get(url + "/api/publishing/old").json() == 1
        write(tmp_path, hello="{ broken", new=get_flow("/new", response={"body": 2}))
        (tmp_path / "flows" / "old.json").unlink()
        started.send_signal(signal.SIGHUP)
        until(lambda: get(url + "/api/publishing/new").status_code == 200, "the new flow is not served")
        assert get(url + "/api/publishing/old").status_code == 404
        assert get(url + "/api/publishing/hello").json() == {"hello": "world"}  # what was there stays in service
        told = "read the flows again: 2 published, 1 fault; the version before stays in service: hello.json"
        until(lambda: [line for line in lines if told in line], "the fault is not told")
        assert [line for line in lines if "hello.json: line 1" in line]
        write(tmp_path, hello=HELLO)
        started.send_signal(signal.SIGHUP)
        well = "read the flows again: 2 published, 0 faults\n"
        until(lambda: [line for line in lines if well in line], "the cure is not told")


# --- the log ---


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
def test_requests_are_answered_while_the_flows_are_read_again(tmp_path: Path) -> None:
    code = """
import sys, astera_lite
reload = astera_lite.Deployer.reload
def held(app):
    if app.deployments.by_name:  # not at the start
        print("entered", flush=True)
        sys.stdin.readline()
    print(reload(app), flush=True)
astera_lite.Deployer.reload = held
sys.exit(astera_lite.main(sys.argv[1:]))
"""
    program = (sys.executable, "-c", code)
    with process(
        write(tmp_path, hello=HELLO), program=program, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as (started, url, _):  # fmt: skip
        assert started.stdin and started.stdout
        assert started.stdout.readline() == "[]\n"
        started.send_signal(signal.SIGHUP)
        assert started.stdout.readline() == "entered\n"
        assert get(f"{url}/api/publishing/hello").status_code == 200
        started.stdin.write("\n")
        started.stdin.flush()
        assert started.stdout.readline() == "[]\n"


def test_json_lines_are_json_lines(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO, broken="{")
    with process(tmp_path, "--log", "json", "--log-level", "debug") as (started, url, lines):
        get(url + "/api/publishing/hello")
        get(url + "/nowhere/%0a%22quoted%22%e2%80%a8?x=%0d%0a")
        until(lambda: [line for line in lines if "nowhere" in line], "the request is not logged")
        started.terminate()
        assert started.wait(10) == 0
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    after = lines[lines.index(f"listening on {url}") + 1 :]
    assert after and all(line.startswith("{") for line in after)
    assert all({"time", "level", "message"} <= set(entry) for entry in logged)
    assert [entry for entry in logged if "broken.json" in entry["message"] and entry["level"] == "error"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc tells the memory of a process: Linux")
def test_the_first_start_takes_no_more_memory_than_the_next(tmp_path: Path) -> None:
    for name in ("astera_lite.py", "schema.sql", "console.html"):
        shutil.copy(ROOT / name, tmp_path)
    program = [sys.executable, str(tmp_path / "astera_lite.py")]
    sizes = []
    for _ in range(2):
        with process(tmp_path, program=program, env={"PYTHONDONTWRITEBYTECODE": ""}) as (started, _, _lines):
            status = Path(f"/proc/{started.pid}/status").read_text()
            sizes.append(int(status.partition("VmRSS:")[2].split()[0]))
    assert sizes[0] < 1.2 * sizes[1]


def test_requests_are_logged_where_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    with process(tmp_path, "--access-log") as (started, url, lines):
        asked = requests.get(url + "/api/publishing/hello?name=secret", timeout=10)
        requests.post(url + "/nowhere", timeout=10)
        started.terminate()
        assert started.wait(10) == 0
    told = [line.split(maxsplit=2)[2].rstrip("\n") for line in lines if " GET /" in line or " POST /" in line]
    assert len(told) == 2 and not any("secret" in line for line in lines)
    request_id = asked.headers["X-Request-Id"]
    assert re.fullmatch(rf"{request_id} GET /api/publishing/hello 200 [0-9.]+ ms, 127\.0\.0\.1 -", told[0])
    assert re.fullmatch(r"[0-9a-f]+ POST /nowhere 404 [0-9.]+ ms, 127\.0\.0\.1 -", told[1])


def test_requests_in_the_json_log_name_client_and_token(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    arguments = ("--log", "json", "--access-log")
    with process(tmp_path, *arguments, env={"ASTERA_LITE_TOKEN": "t" * 20}) as (started, url, lines):
        for headers in ({"Authorization": "Bearer " + "t" * 20}, {}):
            requests.get(url + "/api/publishing/hello", headers=headers, timeout=10)
        started.terminate()
        assert started.wait(10) == 0
    logged = [entry for line in lines if line.startswith("{") and "method" in (entry := json.loads(line))]
    assert [(entry["status"], entry["client"], entry.get("token")) for entry in logged] == [
        (200, "127.0.0.1", ADMIN_TOKEN),
        (401, "127.0.0.1", None),
    ]
    assert all(entry["level"] == "info" and entry["path"] == "/api/publishing/hello" for entry in logged)


def test_requests_are_not_logged_unless_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    with process(tmp_path) as (started, url, lines):
        requests.get(url + "/api/publishing/hello", timeout=10)
        started.terminate()
        assert started.wait(10) == 0
    assert not any("GET" in line for line in lines)


def test_a_fault_of_the_servers_own_is_no_fault_in_settings(tmp_path: Path) -> None:
    code = """
import sys, astera_lite
def fail(self, poll_interval=0.5):
    raise ArithmeticError("on purpose")
astera_lite.Server.serve_forever = fail
sys.exit(astera_lite.main(["serve", "--port", "0", "--log", "json"]))
"""
    more: dict[str, Any] = {"env": environment(), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=30, check=False, **more)
    last = json.loads(done.stderr.splitlines()[-1])
    assert done.returncode == 5 and last["level"] == "critical" and "on purpose" in last["exception"]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("isolated", [False, True])
def test_a_log_call_that_is_wrong_is_a_line_all_the_same(tmp_path: Path, form: str, isolated: bool) -> None:
    step = {"call": "own:talk"} | ({"isolate": True} if isolated else {})
    write(tmp_path, talk=get_flow("/talk", steps=[{"name": "talk", "python": step}], response={"body": "said"}))
    (tmp_path / "flows" / "own.py").write_text("""
import logging, warnings
def talk(context):
    context.log.warning("bad %s %d", "x")
    context.log.warning("bad %d", "\\n", extra={"job": {1}})
    logging.getLogger("astera_lite").warning("a set", extra={"job": {1}})
    warnings.warn("a new one")
""")
    with process(tmp_path, "--log", form) as (started, url, lines):
        assert get(url + "/api/publishing/talk").json() == "said"
        until(lambda: [line for line in lines if "a new one" in line], "the warning is not logged")
        started.terminate()
        assert started.wait(10) == 0
    after = lines if form == "json" else lines[lines.index(f"listening on {url}") + 1 :]
    said = [line for line in after if not line.startswith("listening on ")]
    if form == "json":
        assert {"time", "level", "message"} <= set.intersection(*(set(json.loads(line)) for line in said))
        assert [line for line in said if f"published: talk synchronous '{url}/api/publishing/talk'" in line]
    else:
        assert all(re.match(r"[0-9T:.-]+Z \w+ ", line) for line in said)
    told = "\n".join(said)
    assert told.count("cannot be formatted: [") == 2 and "a set" in told and "--- Logging error" not in told


@pytest.mark.parametrize("form", ["text", "json", "off"])
def test_what_is_logged_before_the_form_is_known_has_it_too(tmp_path: Path, form: str) -> None:
    env = {"ASTERA_LITE_SERVICE_HOST": "x", "ASTERA_LITE_LOG": form}
    with process(tmp_path, env=env) as (_, url, lines):
        assert lines[-1] == f"listening on {url}"
        early = lines[:-1]
    if form == "off":
        assert not [line for line in early if "SERVICE_HOST" in line]
    elif form == "json":
        assert "ASTERA_LITE_SERVICE_HOST is ignored" in json.loads(early[0])["message"]
    else:
        assert re.match(r"[0-9T:.-]+Z warning ASTERA_LITE_SERVICE_HOST is ignored", early[0])


def test_a_path_cannot_forge_a_line_of_the_log(tmp_path: Path) -> None:
    with process(tmp_path, "--log-level", "debug") as (started, url, lines):
        port = int(url.rpartition(":")[2])
        for path in ("/x%0aERROR%20forged", "/x%0d%0aforged", "/x\x1b[2Jforged", "/x\x85forged", "/\x0bx"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                sock.sendall(head.encode("latin-1"))
                while sock.recv(65536):
                    pass
        started.terminate()
        assert started.wait(10) == 0
    after = [line.removesuffix("\n") for line in lines[lines.index(f"listening on {url}") + 1 :]]
    assert [line for line in after if "forged" in line]
    assert all(re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z \w+ ", line) for line in after)
    assert all(line.isprintable() for line in after)


def test_the_log_can_be_off(tmp_path: Path) -> None:
    write(tmp_path, broken="{")
    with process(tmp_path, "--log", "off") as (_, url, lines):
        get(url + "/nowhere")
    head = "published: no flow; `new NAME` writes a first flow"
    assert lines == [head, f"console: {url}/", f"listening on {url}"]


# --- check ---


def test_check_lists_every_fault_of_every_file(here: Here, tmp_path: Path) -> None:
    write(
        tmp_path,
        hello=HELLO,
        syntax='{"request": ',
        two={"request": {"method": "FLY", "resource": "no-slash"}, "response": {"body": 1}},
        names=get_flow("/names", response={"body": "${nothing}"}),
        twin=get_flow("/hello", response={"body": 1}),
    )
    done = here("check")
    assert done.returncode == 1
    faults = done.stdout.splitlines()
    names = {f"flows/{name}.json" for name in ("syntax", "two", "names", "twin")}
    assert {line.partition(":")[0] for line in faults} == names
    assert len([line for line in faults if line.startswith("flows/two.json:1: /request/")]) == 2
    assert any("hello" in line for line in faults if line.startswith("flows/twin.json"))
    assert any(line.startswith("flows/syntax.json:1:13: is not JSON") for line in faults)
    assert f", {len(faults)} error" in done.stderr
    assert not (tmp_path / "astera_lite.db").exists()


def test_check_of_named_files(here: Here, tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO, broken="{")
    good = here("check", "flows/hello.json")
    assert (good.returncode, good.stdout) == (0, "")
    bad = here("check", "flows/hello.json", "flows/broken.json", "flows/missing.json")
    assert bad.returncode == 1
    assert [line.partition(": ")[0] for line in bad.stdout.splitlines()] == [
        "flows/missing.json",
        "flows/broken.json:1:2",
    ]
    (tmp_path / "flows" / "a.toml").write_text("[request]\nmethod = GET\n")
    (tmp_path / "flows" / "b.yaml").write_text("request:\n")
    for name, said in (
        ("nope.json", "nope.json: there is no such file"),
        ("flows", "flows: is a folder: name its files, or check all of it with --flows flows"),
        ("flows/a.toml", "flows/a.toml:2:10: is not TOML: Invalid value: text stands in quotes there"),
        ("flows/b.yaml", "flows/b.yaml: is not a flow file: flow files end in .json or .toml"),
    ):
        done = here("check", name)
        assert (done.returncode, done.stdout) == (1, said + "\n")


def test_what_is_not_read_is_told(here: Here, tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    (tmp_path / "flows" / "more").mkdir()
    (tmp_path / "flows" / "more" / "sum.json").write_text(json.dumps(POST))
    (tmp_path / "flows" / "y.yaml").write_text("request: {}\n")
    done = here("check")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "flows/more: flows in a folder inside are not read: move them one up",
        "flows/y.yaml: is not read: write it as JSON or TOML, in a file that ends in .json or .toml, not .yaml",
    ]
    with process(tmp_path) as (_, _, lines):
        assert [line.partition(": ")[0].split()[-1] for line in lines if " error " in line] == ["more", "y.yaml"]


def test_what_is_no_file_is_told_and_holds_nothing_up(tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    os.mkfifo(tmp_path / "flows" / "pipe.json")
    (tmp_path / "flows" / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "flows" / "line\n\x1b[31m.json").mkdir()
    done = run(tmp_path, "check")
    assert (done.returncode, done.stdout.splitlines()) == (
        1,
        [
            "flows/line\\x0a\\x1b[31m.json: cannot be read: Is a directory",  # on one line, whatever its name
            *(f"flows/{name}.json: cannot be read: it is not a regular file" for name in ("pipe", "zero")),
        ],
    )


def test_a_database_may_have_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 %.db")
    try:
        (tmp_path / name).touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    write(tmp_path, hello=HELLO)
    with process(tmp_path, "--database", name) as (_, url, _):
        answer = requests.get(f"{url}/api/publishingAsync/hello", timeout=20)
        assert requests.get(answer.json()["statusUrl"], timeout=20).status_code == 200
    done = run(tmp_path, "jobs", "--database", name)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)


def test_check_without_a_folder_names_the_cure(here: Here, tmp_path: Path) -> None:
    done = here("check")
    assert done.returncode == 1
    cure = "start where it is, or set `flows` to its path; `new NAME` makes one with a first flow"
    assert done.stdout == f"flows: there is no such folder: {cure}\n"
    (tmp_path / "flows").write_text("")
    assert here("check").stdout == f"flows: is no folder: {cure}\n"


def test_the_flows_of_the_checkout_are_well() -> None:
    done = run(ROOT, "check")
    assert (done.returncode, done.stdout) == (0, "")


def test_new_leaves_the_connections_alone(here: Here, tmp_path: Path) -> None:
    done = here("new", "connections")
    assert (done.returncode, done.stderr) == (1, "connections.json holds the connections: choose another name\n")
    assert list(tmp_path.iterdir()) == []


# --- try ---


def test_try_shows_the_steps_and_the_answer(tmp_path: Path) -> None:
    write(tmp_path, sum=POST)
    done = run(tmp_path, "try", "sum", "a=2", 'body={"b": 40}')
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"total": 42}
    assert re.search(r"^total +set +\w+ +[0-9]+ ms +42$", done.stderr, re.MULTILINE)
    assert "Completed 201 Created" in done.stderr
    assert "X-Total: 42" in done.stderr
    assert not (tmp_path / "astera_lite.db").exists()


def test_try_reads_a_body_from_a_file(here: Here, tmp_path: Path) -> None:
    write(tmp_path, sum=POST)
    (tmp_path / "body.json").write_text('{"b": 1}')
    assert json.loads(here("try", "sum", "a=-2", "body=@body.json").stdout) == {"total": -1}


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["summ", "a=1"], 1, 'did you mean "sum"'),
        (["sum", "body={}"], 1, "path a"),
        (["sum", "a=x", "body={}"], 1, "path a"),
        (["sum", "a=1", "b=2", "body={}"], 1, "query b"),
        (["sum", "a=1", "body={"], 1, "body"),
        (["sum", "a"], 2, "name=value"),
        (["sum", "a=1", "body=@missing.json"], 1, "missing.json"),
        (["sum", "a=1", "body={}"], 1, "Error 500"),
    ],
)
def test_try_tells_what_is_wrong(here: Here, tmp_path: Path, arguments: list[str], code: int, named: str) -> None:
    write(tmp_path, sum=POST)
    done = here("try", *arguments)
    assert done.returncode == code
    assert named in done.stderr


def test_try_and_test_say_why_a_flow_failed_for_there_is_no_log(here: Here, tmp_path: Path) -> None:
    tests = [{"name": "t", "response": {"body": 1}}]
    write(tmp_path, bad=get_flow("/bad", steps=[{"name": "a", "set": "${1 / 0}"}], tests=tests))
    done, tested = here("try", "bad"), here("test", "bad")
    reason = "bad.json:1: step a: 1 / 0: division by zero"
    assert f"reason: {reason}" in done.stderr
    answer = json.loads(done.stdout)
    assert (answer["status"], answer["detail"], answer.get("requestId")) == (500, reason, None)
    assert tested.stdout == f"FAILED bad: t (steps replaced: 0)\n         status: expected 200, got 500 {reason}\n"


def test_try_of_a_flow_that_waits(here: Here, tmp_path: Path) -> None:
    write(tmp_path, slow=get_flow("/slow", steps=[{"name": "pause", "wait": 0.01}], response={"body": "done"}))
    done = here("try", "slow")
    assert (done.returncode, json.loads(done.stdout)) == (0, "done")


# --- new ---


def test_a_new_flow_is_well_and_runs_and_is_not_overwritten(here: Here, tmp_path: Path) -> None:
    done = here("new", "look-up_2")
    assert done.returncode == 0
    assert "try look-up_2 id=7" in done.stderr
    assert here("check").returncode == 0
    tried = here("try", "look-up_2", "id=7")
    assert json.loads(tried.stdout)["double"] == 14
    path = tmp_path / "flows" / "look-up_2.json"
    path.write_text("mine")
    again = here("new", "look-up_2")
    assert again.returncode == 1
    assert "look-up_2.json" in again.stderr
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["../up", "a/b", "a.b", "", " ", "a\nb", "é", "/tmp/x"])
def test_a_new_flow_has_a_plain_name(here: Here, tmp_path: Path, name: str) -> None:
    assert here("new", name).returncode == 1
    assert not list(tmp_path.rglob("*.json"))


# --- jobs and job ---


def test_jobs_and_job_look_at_a_running_servers_database(here: Here, tmp_path: Path, sink: Sink) -> None:
    write(tmp_path, hello=HELLO, broken=get_flow("/broken", steps=[{"name": "no", "fail": {"message": "no"}}]))
    with process(tmp_path) as (_, url, _):
        callback = requests.utils.quote(sink.url, safe="")
        first = get(f"{url}/api/publishingAsync/hello?callbackUrl={callback}").json()["id"]
        sink.next()
        second = get(url + "/api/publishingAsync/broken").json()["id"]
        get(f"{url}/api/jobs/{second}/status", headers={"Prefer": "wait=5"})
        until(lambda: "delivered" in get(f"{url}/api/jobs/{first}").text, "the callback is not on record")

        listed = here("jobs")
        assert listed.returncode == 0
        head, *rows = listed.stdout.splitlines()
        assert head.split() == ["id", "flow", "status", "created", "finished", "callback", "reason"]
        assert [row.split()[:3] for row in rows] == [[second, "broken", "Error"], [first, "hello", "Completed"]]
        assert rows[1].endswith("delivered (1)")
        for more, wanted in ((["--flow", "hello"], first), (["--status", "Error"], second), (["--limit", "1"], second)):
            found = here("jobs", *more).stdout.splitlines()[1:]
            assert [row.split()[0] for row in found] == [wanted]

        document = json.loads(here("job", first, "--json").stdout)
        assert (document["id"], document["status"]) == (first, "Completed")
        assert document["statusUrl"] == f"{url}/api/jobs/{first}/status"
        assert [entry["status"] for entry in document["callback"]["history"]] == [204]
        result = here("job", first, "--result", "--json")
        assert json.loads(result.stdout) == {"hello": "world"}
        assert json.loads(result.stderr)["id"] == first
        assert json.loads(here("job", second, "--json").stdout)["error"]["code"] == "failed"
        assert get(url + "/health").status_code == 200


@pytest.mark.parametrize("name", ["x", "", "0192f0c1-0000-7000-8000-000000000000", "' OR 1=1 --"])
def test_a_job_that_is_not_there_is_1(here: Here, tmp_path: Path, name: str) -> None:
    with AsteraLite(database=str(tmp_path / "astera_lite.db")):
        pass
    done = here("job", name)
    assert done.returncode == 1
    assert "there is no job" in done.stderr


def test_jobs_without_a_database_is_4_and_makes_none(here: Here, tmp_path: Path) -> None:
    done = here("jobs")
    assert done.returncode == 4
    assert "astera_lite.db" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["jobs"], ["try", "big"], ["check"]])
def test_a_reader_that_goes_away_is_no_fault(tmp_path: Path, command: list[str]) -> None:
    write(tmp_path, big=get_flow("/big", response={"body": "${'x' * 200000}"}), faulty="{")
    with AsteraLite(database=str(tmp_path / "astera_lite.db")) as app:
        app.deploy("hello", HELLO)
        app.wait(app.submit("hello").id)
    read, wrote = os.pipe()
    os.close(read)  # as `head` that has had enough
    try:
        done = subprocess.run(
            [*PROGRAM, *command], cwd=tmp_path, env=environment(), stdout=wrote, stderr=subprocess.PIPE,
            text=True, timeout=30, check=False,
        )  # fmt: skip
    finally:
        os.close(wrote)
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if command == ["check"] else 0)


@pytest.mark.parametrize(
    ("command", "code"),
    [("check", 1), ("try ok", 0), ("jobs --json", 0), ("schema", 0), ("openapi", 1), ("token", 0), ("nonsense", 2)],
)
def test_commands_work_whatever_stdout_and_stderr_are(tmp_path: Path, command: str, code: int) -> None:
    write(tmp_path, ok=get_flow("/ok", description="größe 😀", response={"body": "ok"}), faulty='{"größe": 1}')
    with AsteraLite(database=str(tmp_path / "astera_lite.db")):
        pass

    def command_with(streams: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            f'{shlex.join(PROGRAM)} {command} {streams}', cwd=tmp_path, env=environment(env), shell=True,
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip

    def untimed(text: str) -> str:
        return re.sub("[0-9]", "", text)

    usual = command_with("")
    assert usual.returncode == code
    for streams in ("2>&-", "2>/dev/full", "2>/dev/full <&-"):
        done = command_with(streams)
        assert (done.returncode, done.stdout, done.stderr) == (code, usual.stdout, "")
    done = command_with(">&- <&-")
    assert (done.returncode, untimed(done.stderr)) == (code, untimed(usual.stderr))
    done = command_with(">/dev/full")
    if usual.stdout:
        assert (done.returncode, done.stderr.splitlines()[-1:]) == (
            1,
            ["the output cannot be written: No space left on device"],
        )
    done = command_with("", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert done.stdout.isascii()
    if done.stdout.startswith("{"):
        assert json.loads(done.stdout) == json.loads(usual.stdout)


@pytest.mark.parametrize("command", ["--help", "check --help"])
def test_help_is_given_in_ascii_too(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, *command.split(), env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout[:6]) == (0, "usage:")


@contextmanager
def serving_with(
    folder: Path, streams: str, *arguments: str, stderr: int | None = None, program: Sequence[str] = PROGRAM
) -> Iterator[tuple[str, int]]:
    """A server whose standard streams are as the shell is told: its URL and process id. It must stop when told to."""
    ports = iter(lambda: random.randrange(15_000, 32_000), 0)  # of those that the system gives to nobody by itself
    port = next(port for port in ports if refuses(port))
    words = f"exec {shlex.join(program)} --port {port} {' '.join(arguments)} {streams}"
    with subprocess.Popen(words, cwd=folder, env=environment(), shell=True, stderr=stderr) as server:
        try:
            until(lambda: server.poll() is not None or not refuses(port), "it does not start")
            yield f"http://127.0.0.1:{port}", server.pid
            server.terminate()
            assert server.wait(20) == 0
        finally:
            server.kill()


@pytest.mark.parametrize("program", [PROGRAM, (sys.executable, SCRIPT)], ids=["module", "script"])
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&- <&-", "2>/dev/full", ">/dev/full 2>&1"])
def test_a_server_serves_whatever_its_streams_are(tmp_path: Path, streams: str, program: Sequence[str]) -> None:
    folder = write(tmp_path, hello=HELLO, faulty="{")
    with serving_with(folder, streams, "--access-log", program=program) as (url, pid):
        for _ in range(20):
            assert get(f"{url}/api/publishing/hello").json() == {"hello": "world"}
        if "2>&-" in streams and Path("/proc/self/fd").exists():  # else the database would be what is written to
            assert os.readlink(f"/proc/{pid}/fd/2") == os.devnull


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    read, wrote = os.pipe()
    os.set_blocking(wrote, False)
    with suppress(BlockingIOError):
        while True:
            os.write(wrote, b"." * 4096)
    os.set_blocking(wrote, True)
    yield read, wrote
    os.close(read)
    os.close(wrote)


def test_a_server_whose_log_nobody_reads_starts_serves_and_stops(tmp_path: Path, full_pipe: tuple[int, int]) -> None:
    with serving_with(write(tmp_path, hello=HELLO), "", "--access-log", stderr=full_pipe[1]) as (url, _):
        assert get(f"{url}/api/publishing/hello").status_code == 200


def test_what_the_log_lost_while_nobody_read_it_is_told(tmp_path: Path, full_pipe: tuple[int, int]) -> None:
    read, wrote = full_pipe
    ask = b"GET /api/publishing/hello HTTP/1.1\r\nHost: localhost\r\n"
    with (
        serving_with(write(tmp_path, hello=HELLO), "", "--access-log", "--log", "json", stderr=wrote) as (url, _),
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as sock,
    ):
        asks = (ask + b"\r\n") * 6000 + ask + b"Connection: close\r\n\r\n"
        sender = threading.Thread(target=sock.sendall, args=[asks])
        sender.start()
        data = b""
        while piece := sock.recv(1 << 20):
            data += piece
        sender.join()
        assert data.count(b"HTTP/1.1 200 OK") == 6001
        text = ""
        while not (lost := re.search(r'"([0-9]+) lines of the log are lost.*"', text)):
            text += os.read(read, 1 << 16).decode()
        lines = text.lstrip(".").splitlines()
        assert "listening on" in text
        assert 500 < int(lost[1]) < 6001
        json.loads(lines[1])


# --- where it stands ---


def test_files_are_found_from_the_working_directory(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, hello=HELLO)
    with process(tmp_path) as (_, url, _):
        assert get(url + "/api/publishing/hello").status_code == 200
        assert (tmp_path / "astera_lite.db").exists()
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    assert here("check", "--flows", "../flows").returncode == 0


@pytest.mark.parametrize("command", [[], ["check"], ["jobs"]])
def test_a_working_folder_that_was_deleted_is_told(tmp_path: Path, command: list[str]) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    done = run(gone, *command, program=("sh", "-c", 'rmdir "$PWD"; exec "$@"', "sh", *PROGRAM))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("the working folder was deleted: change to another")


def test_a_backup_under_load_is_whole_and_a_server_goes_on_from_it(here: Here, tmp_path: Path) -> None:
    write(tmp_path, hello=HELLO)
    stop = threading.Event()
    with process(tmp_path) as (_, url, _):
        ids: list[str] = []

        def submit() -> None:
            with requests.Session() as session:
                session.trust_env = False
                while not stop.is_set():
                    ids.append(session.get(f"{url}/api/publishingAsync/hello", timeout=10).json()["id"])

        loaders = [threading.Thread(target=submit) for _ in range(4)]
        for loader in loaders:
            loader.start()
        until(lambda: len(ids) > 50, "jobs are accepted")
        before = list(ids)
        done = here("backup", "copy.db")
        stop.set()
        for loader in loaders:
            loader.join(10)
    assert (done.returncode, "wrote copy.db" in done.stderr) == (0, True)
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert copy.execute("SELECT count(*) FROM jobs").fetchone()[0] >= len(before)
    again = here("backup", "copy.db")
    assert (again.returncode, again.stderr) == (1, "copy.db exists already: name another file\n")
    assert here("backup", "nowhere/copy.db").returncode == 4
    with process(tmp_path, "--database", "copy.db") as (_, url, _):
        for job_id in before[:5]:
            found = get(f"{url}/api/jobs/{job_id}/status", headers={"Prefer": "wait=5"}).json()
            assert found["status"] == "Completed"
