"""What the commands show to people: in a terminal's width there, plain and complete elsewhere."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import PROGRAM, Api, get_flow, process, until

fcntl = pytest.importorskip("fcntl", reason="there are no pseudo-terminals here")
import pty  # noqa: E402
import termios  # noqa: E402

COLOUR = re.compile(r"\x1b\[[0-9]+m")
WIDE = "文字" * 60
EVIL = "\x1b[2J\nevil\u202e"


def environment(**more: str) -> dict[str, str]:
    dropped = ("NO_COLOR", "COLUMNS", "LINES", "TERM")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ASTERA_") and name not in dropped}
    return kept | {"TERM": "xterm"} | more


def on_terminal(folder: Path, *arguments: str, columns: int = 80, code: int = 0, **env: str) -> str:
    """What a command writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [*PROGRAM, *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=theirs, stderr=theirs, env=environment(**env)) as started:
        os.close(theirs)
        written = b""
        while True:
            try:
                data = os.read(ours, 65536)
            except OSError:  # Linux says so at the end
                break
            if not data:
                break
            written += data
        os.close(ours)
        assert started.wait(60) == code, written
    return written.decode().replace("\r\n", "\n")


def elsewhere(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=environment())


class Place(NamedTuple):
    folder: Path
    jobs: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("terminal")
    (folder / "flows").mkdir()
    long_name = "a-flow-with-a-name-that-is-as-long-as-sixty-four-characters-are"
    flows: dict[str, Any] = {
        long_name: get_flow("/long", steps=[{"name": "text", "set": WIDE}, {"name": "e", "set": "e\u0301" * 90}]),
        "failing": get_flow("/failing", steps=[{"name": "no", "fail": {"status": 422, "message": f"no {EVIL}"}}]),
        "waiting": get_flow("/waiting", steps=[{"name": "rest", "wait": "1h"}]),
        "large": get_flow("/large", steps=[{"name": "text", "set": "${'x' * 9000000}"}]),
    }
    flows["failing"]["tests"] = [{"name": f"no {n}", "response": {"status": 422}} for n in range(3)]
    for name, tree in flows.items():
        (folder / "flows" / f"{name}.json").write_text(json.dumps(tree))
    jobs = {}
    with process(folder, "--callback-retries", "") as (_, url, _):
        api = Api(url)
        for name, tree in flows.items():
            jobs[name] = api.submit(tree["request"]["resource"], callbackUrl="http://127.0.0.1:1/none")
            until(lambda: api.counts()["running"] == 0)
        until(lambda: all("failed" in elsewhere(folder, "job", jobs[name]).stdout for name in [long_name, "failing"]))
        yield Place(folder, {**jobs, "long": jobs[long_name]})


def test_columns_are_aligned(place: Place) -> None:
    lines = COLOUR.sub("", on_terminal(place.folder, "job", place.jobs["long"], columns=80)).splitlines()
    head, *rows = lines[lines.index("") + 1 : lines.index("", lines.index("") + 1)]
    assert head.split() == ["step", "kind", "state", "took", "bytes", "output"]
    for row in rows:
        assert row[head.index("output") - 1] == " " and row[head.index("output")] == '"'
    head, *rows = COLOUR.sub("", on_terminal(place.folder, "jobs", columns=200)).splitlines()
    assert [row.split()[0] for row in rows] == [*place.jobs.values()][3::-1]
    for name in ("status", "flow", "created"):
        assert all(row[head.index(name) - 1] == " " != row[head.index(name)] for row in rows)


def test_a_terminal_shows_words_and_a_little_colour(place: Place) -> None:
    text = on_terminal(place.folder, "jobs", columns=200)
    assert re.search(r"\x1b\[31mError \(failed\) *\x1b\[0m", text)
    assert re.search(r"\x1b\[33mRunning \(waiting\) *\x1b\[0m", text)
    assert re.search(r"\d m?s ago", text) and "failed (1)" in text
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in on_terminal(place.folder, "jobs", columns=200, **env)
    one = on_terminal(place.folder, "job", place.jobs["failing"], columns=200, NO_COLOR="1")
    assert re.search(r"^created   \d{4}-\d\d-\d\d \d\d:\d\d:\d\d \(.* ago\)$", one, re.MULTILINE)
    assert re.search(r"^expires   .* \(in 23 h\)$", one, re.MULTILINE)


def test_what_came_from_outside_does_not_reach_the_terminal_as_it_is(place: Place) -> None:
    for text in (
        on_terminal(place.folder, "job", place.jobs["failing"], NO_COLOR="1"),
        elsewhere(place.folder, "job", place.jobs["failing"]).stdout,
    ):
        assert "\\x1b[2J" in text and "evil" in text
        assert "\x1b" not in text and "\u202e" not in text and "\nevil" not in text


def test_json_and_bodies_do_not_command_the_terminal(tmp_path: Path) -> None:
    nasty = "\x1b[2J\x7f\x9b2J\u202eSão 文字 \U000e0001"
    parameters = {"m": {"in": "query"}}
    flow = get_flow("/say", request={"parameters": parameters}, steps=[{"name": "m", "set": "${params.m}"}])
    fail = {"name": "no", "fail": {"status": 422, "message": "${params.m}"}}
    (tmp_path / "flows").mkdir()
    for name, tree in (
        ("say", flow | {"response": {"body": "${params.m}"}}),
        ("text", flow | {"response": {"headers": {"Content-Type": "text/plain"}, "body": "${params.m}"}}),
        ("fail", flow | {"steps": [fail]}),
    ):
        tree = tree | {"request": tree["request"] | {"resource": f"/{name}"}}
        (tmp_path / "flows" / f"{name}.json").write_text(json.dumps(tree))
    with process(tmp_path) as (_, url, _):
        api = Api(url)
        ids = {name: api.submit(f"/{name}", m=nasty) for name in ("say", "text", "fail")}
        until(lambda: api.counts()["running"] == 0)
        written = [on_terminal(tmp_path, "jobs", "--json"), elsewhere(tmp_path, "jobs", "--json").stdout]
        for job_id in ids.values():
            for more in (["--json"], ["--result"], ["--json", "--result"]):
                written.append(on_terminal(tmp_path, "job", job_id, *more, NO_COLOR="1"))
            assert "São 文字 \\udb40\\udc01" in written[-1]
        written += [on_terminal(tmp_path, "try", name, f"m={nasty}", code=name == "fail", NO_COLOR="1") for name in ids]
    for text in written:
        assert all(char.isprintable() or char in "\t\n" for char in text), text
    raw = subprocess.run([*PROGRAM, "try", "text", f"m={nasty}"], cwd=tmp_path, capture_output=True, env=environment())
    assert raw.stdout == nasty.encode()


def test_elsewhere_everything_is_there(place: Place) -> None:
    done = elsewhere(place.folder, "jobs")
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["id", "flow", "status", "created", "finished", "callback", "reason"]
    found = {row.split()[0]: row.split() for row in rows}
    for name in ("large", "waiting", "failing"):
        assert found[place.jobs[name]][1] == name
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[0-9:]{8}\.\d{3}Z", found[place.jobs[name]][4 if name != "large" else 3])
    waiting = found[place.jobs["waiting"]]
    assert waiting[2:] == ["Running", "(waiting)", waiting[4], "pending", "(0)"]
    assert "\x1b" not in done.stdout and "…" not in done.stdout and done.stderr == ""
    done = elsewhere(place.folder, "jobs", "--flow", "nosuch")
    assert (len(done.stdout.splitlines()), done.stderr, done.returncode) == (1, "none\n", 0)
    text = elsewhere(place.folder, "job", place.jobs["failing"]).stdout
    for line in (f"id +{place.jobs['failing']}", "flow +failing", r"status +Error \(failed\)", "result +422, .* bytes"):
        assert re.search(f"^{line}$", text, re.MULTILINE), text
    assert re.search(r"^no +fail +failed", text, re.MULTILINE) and "http://127.0.0.1:1/none" in text


def test_programs_get_json(place: Place) -> None:
    listed = json.loads(elsewhere(place.folder, "jobs", "--json", "--flow", "failing").stdout)
    assert [job["id"] for job in listed["jobs"]] == [place.jobs["failing"]]
    assert listed == json.loads(on_terminal(place.folder, "jobs", "--json", "--flow", "failing"))
    one = json.loads(elsewhere(place.folder, "job", place.jobs["failing"], "--json").stdout)
    assert one.items() >= {k: v for k, v in listed["jobs"][0].items() if k != "callback"}.items()
    assert one["steps"][0]["name"] == "no" and len(one["callback"]["history"]) == 1


def test_progress_is_told_where_the_terminal_is_one(place: Place) -> None:
    text = on_terminal(place.folder, "backup", "copy-1.db")
    assert re.search(r"\rcopying \d+ %\x1b\[K", text) and re.search(r"\r\x1b\[Kwrote copy-1\.db, ", text)
    done = elsewhere(place.folder, "backup", "copy-2.db")
    assert re.fullmatch(r"wrote copy-2\.db, [0-9,]+ bytes\n", done.stderr) and done.stdout == ""
    text = on_terminal(place.folder, "test")
    assert "\rtesting 0 %\x1b[K\r\x1b[Kok " in text and text.count("\r\x1b[Kok ") == 3
    done = elsewhere(place.folder, "test")
    assert "\r" not in done.stdout + done.stderr and "testing" not in done.stderr
