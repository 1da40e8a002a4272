"""Trace context: taken in, kept with the job, passed on, and in the log; the lines of the JSON log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support import Api, Sink, get_flow, process, running, until

from astera_lite_notices import parse_trace

ID, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = {"traceparent": f"00-{ID}-{PARENT}-01", "tracestate": "rojo=00f067aa0ba902b7,congo@x=t61 a"}


def calling(url: str, name: str = "call", **headers: Any) -> dict[str, Any]:
    return {"name": name, "http": {"url": url, "json": {"from": name}, "headers": headers}}


def check(headers: dict[str, str], flags: str = "01", state: str | None = SENT["tracestate"]) -> str:
    """The headers carry the trace on; the id of this request in it."""
    match = re.fullmatch(rf"00-{ID}-([0-9a-f]{{16}})-{flags}", headers["traceparent"])
    assert match is not None, headers["traceparent"]
    assert match[1] != PARENT and headers.get("tracestate") == state
    return match[1]


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (f"00-{ID}-{PARENT}-01", 1),
        (f"00-{ID}-{PARENT}-00", 0),
        (f"00-{ID}-{PARENT}-02", 2),
        (f"00-{ID}-{PARENT}-fc", 0),
        (f"00-{ID}-{PARENT}-ff", 3),
        (f"cc-{ID}-{PARENT}-01", 1),
        (f"cc-{ID}-{PARENT}-01-what-the-future-will-be-like", 1),
    ],
)
def test_what_is_well_formed_is_taken(text: str, flags: int) -> None:
    trace = parse_trace({"traceparent": text})
    assert trace is not None and (trace.id, trace.flags, trace.state) == (ID, flags, "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"ff-{ID}-{PARENT}-01",
        f"00-{ID}-{PARENT}-01-more",
        f"cc-{ID}-{PARENT}-01.more",
        f"00-{ID.upper()}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{ID}-{'0' * 16}-01",
        f"00-{ID[1:]}-{PARENT}-01",
        f"00-{ID}-{PARENT}-1",
        f"00-{ID}-{PARENT}-0x",
        f"0-{ID}-{PARENT}-01",
        f"00-{ID}-{PARENT}-01, 00-{ID}-{PARENT}-01",
        f"00_{ID}_{PARENT}_01",
    ],
)
def test_what_is_malformed_is_as_if_it_was_not_there(text: str) -> None:
    assert parse_trace({"traceparent": text, "tracestate": "a=1"}) is None


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        *((text, text) for text in ("a=1", "a=1,b=2", "0-_*/=~", "tenant@system=x y!", "a=" + "x" * 256)),
        ("a=1 , \tb=2,", "a=1,b=2"),
        (", ,\ta=b ,,", "a=b"),
        (",".join(f"k{n}=1" for n in range(32)), ",".join(f"k{n}=1" for n in range(32))),
        (",".join(f"k{n}=1" for n in range(33)), ",".join(f"k{n}=1" for n in range(32))),
        (f"a={'x' * 253},b={'x' * 254}", f"a={'x' * 253},b={'x' * 254}"),
        (f"a={'x' * 253},b={'x' * 255},c=1", f"a={'x' * 253}"),
        *((text, "") for text in ("a=1," + "b" * 257 + "=1", "a=" + "x" * 257, "a=1,a=2", "A=1", "a", "a=", "a=1=2")),
        *((text, "") for text in ("a=é", ",,", "", ",".join(f"k{n}=1" for n in range(32)) + ",A=1")),
    ],
)
def test_tracestate_is_passed_on_as_far_as_it_is_well_formed_and_fits(text: str, kept: str) -> None:
    trace = parse_trace({"traceparent": SENT["traceparent"], "tracestate": text})
    assert trace is not None and trace.state == kept


def test_a_synchronous_run_passes_it_on(tmp_path: Path, sink: Sink) -> None:
    sink.answers = [503, 204]
    retried = calling(sink.url) | {"retry": {"attempts": 2, "delay": "1ms", "on": ["5xx"]}}
    with running(tmp_path, {"both": get_flow("/both", steps=[retried, calling(sink.url, "again")])}) as run:
        assert run.client.get("/api/publishing/both", headers=SENT).status_code == 200
        ids = [check(sink.next()[0]) for _ in range(3)]
        assert len(set(ids)) == 3
        unsampled = {"traceparent": SENT["traceparent"][:-1] + "0", "tracestate": "not valid"}
        run.client.get("/api/publishing/both", headers=unsampled)
        check(sink.next()[0], "00", None)
        sink.next()
        for headers in ({}, {"traceparent": "nonsense"}, {"tracestate": "a=1"}):
            run.client.get("/api/publishing/both", headers=headers)
            for _ in range(2):
                assert not {"traceparent", "tracestate"} & set(sink.next()[0])


def test_a_flow_may_set_its_own(tmp_path: Path, sink: Sink) -> None:
    own = f"00-{'a' * 32}-{PARENT}-00"
    flows = {
        "own": get_flow("/own", steps=[calling(sink.url, TraceParent=own)]),
        "state": get_flow("/state", steps=[calling(sink.url, TraceState="a=1")]),
    }
    with running(tmp_path, flows) as run:
        run.client.get("/api/publishing/own", headers=SENT)
        headers = sink.next()[0]
        assert headers["traceparent"] == own and "tracestate" not in headers
        run.client.get("/api/publishing/state", headers=SENT)
        check(sink.next()[0], state="a=1")


def test_a_job_passes_it_on_and_its_callback_too(tmp_path: Path, sink: Sink) -> None:
    flow = get_flow("/job", steps=[calling(sink.url)])
    with running(tmp_path, {"job": flow}, callback_allow="127.0.0.1", callback_retries="1ms") as run:
        query = {"callbackUrl": f"{sink.url}/done"}
        sink.answers = [204, 500, 204]
        document = run.client.finished(run.client.get("/api/publishingAsync/job", params=query, headers=SENT))
        ids = [check(sink.next()[0]) for _ in range(3)]
        assert len(set(ids)) == 3
        again = {"traceparent": f"00-{'b' * 32}-{PARENT}-01"}  # who runs it again causes the new run
        run.client.finished(run.client.post(f"/api/jobs/{document['id']}/rerun", headers=again))
        for _ in range(2):
            assert sink.next()[0]["traceparent"].startswith(f"00-{'b' * 32}-")


def test_it_survives_a_kill(tmp_path: Path, sink: Sink) -> None:
    (tmp_path / "flows").mkdir()
    flow = get_flow("/job", steps=[{"name": "rest", "wait": "1s"}, calling(sink.url)])
    (tmp_path / "flows" / "job.json").write_text(json.dumps(flow))
    with process(tmp_path) as (first, url, _):
        api = Api(url)
        query = {"callbackUrl": f"{sink.url}/done"}
        accepted = api.session.get(f"{url}/api/publishingAsync/job", params=query, headers=SENT, timeout=10)
        assert accepted.status_code == 202
        until(lambda: api.counts()["waiting"] == 1)
        first.kill()
        first.wait(10)
    with process(tmp_path):
        headers, body = sink.next()
        check(headers)
        assert body == {"from": "call"}
        headers, body = sink.next()
        check(headers)
        assert body["status"] == "Completed"


def test_lines_of_the_json_log_say_what_they_are_about(tmp_path: Path, sink: Sink) -> None:
    (tmp_path / "flows").mkdir()
    flows = {
        "light": get_flow("/light", response={"body": 1}),
        "failing": get_flow("/failing", steps=[{"name": "no", "fail": {"message": 'it is \u2028 "no"\n'}}]),
        "going-on": get_flow("/going-on", steps=[calling(sink.url) | {"onError": 1}]),
        "speaking": get_flow("/speaking", steps=[{"name": "speak", "python": {"call": "speak:speak"}}]),
        "apart": get_flow("/apart", steps=[{"name": "speak", "python": {"call": "speak:speak", "isolate": True}}]),
    }
    for name, tree in flows.items():
        (tmp_path / "flows" / f"{name}.json").write_text(json.dumps(tree))
    text = "def speak(context):\n    context.log.warning('spoken %s', 'aloud')\n    return 1\n"
    (tmp_path / "flows" / "speak.py").write_text(text)
    sink.answers = [500, 500]
    jobs = {}
    with process(tmp_path, "--log", "json", "--log-level", "debug") as (started, url, lines):
        api = Api(url)
        for name in flows:
            api.session.get(f"{url}/api/publishing/{name}?secret=hush", headers=SENT, timeout=10)
            query = {"callbackUrl": "http://127.0.0.1:1/refused"} if name == "light" else {}
            target = f"{url}/api/publishingAsync/{name}"
            jobs[name] = api.session.get(target, params=query, headers=SENT, timeout=10).json()["id"]
            api.job(jobs[name], wait=10)
        api.session.get(f"{url}/api/publishing/light", timeout=10)
        until(lambda: any("callback of job" in line for line in lines))
        started.terminate()
        assert started.wait(10) == 0
    logged = [json.loads(line) for line in lines[lines.index(f"listening on {url}") + 1 :]]
    assert "hush" not in json.dumps(logged)
    assert all(entry.keys() >= {"time", "level", "message"} for entry in logged)
    of_jobs = [entry for entry in logged if entry.get("job") and "method" not in entry]
    assert [entry for entry in logged if re.search(r"\bjob 0", entry["message"])] == [
        entry for entry in of_jobs if re.search(r"\bjob 0", entry["message"])
    ]
    for name, job_id in jobs.items():
        mine = [entry for entry in of_jobs if entry["job"] == job_id]
        assert mine and all((entry["flow"], entry["trace"]) == (name, ID) for entry in mine)
    words = {entry["job"]: " ".join(e["message"] for e in of_jobs if e["job"] == entry["job"]) for entry in of_jobs}
    assert "callback of job" in words[jobs["light"]] and "ended as failed" in words[jobs["failing"]]
    assert "continues after a failure" in words[jobs["going-on"]] and "spoken aloud" in words[jobs["speaking"]]
    assert "spoken aloud" in words[jobs["apart"]]
    assert [entry for entry in logged if entry.get("step") == "speak" and "request" in entry]
    access = [entry for entry in logged if "status" in entry]
    assert len(access) >= 16
    for entry in access:
        assert entry.keys() >= {"request", "method", "path", "status", "ms"} and entry["ms"] >= 0
    assert [e["trace"] for e in access if e["path"] == "/api/publishing/light" and "trace" in e] == [ID]
    assert [e for e in access if e["path"].endswith("/status") and e["job"] in jobs.values()]
