"""/metrics: read by the real parser, and right after known traffic."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import PROGRAM, Api, Client, Sink, get_flow, process, running, until

import astera_lite
import astera_lite_admin
from astera_lite import AsteraLite, Context
from astera_lite_admin import metrics_text

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Values:
    """Every sample; asserts what the format and its users' guide ask for."""
    assert text.endswith("\n")
    lines = text.splitlines()
    values: Values = {}
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        assert [line for line in lines if line.startswith(f"# TYPE {name} ")] == [f"# TYPE {name} {family.type}"]
        assert len([line for line in lines if line.startswith(f"# HELP {name} ")]) == 1
        assert family.type in ("counter", "gauge", "histogram") and family.documentation.endswith(".")
        assert name.startswith(("astera_", "process_"))
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in values and sample.value >= 0, key
            values[key] = sample.value
            suffixes = ("_bucket", "_sum", "_count") if family.type == "histogram" else ("",)
            assert sample.name.removeprefix(name) in suffixes
        if family.type == "histogram":
            check_histogram(family)
    samples = [line for line in lines if not line.startswith("#")]
    assert len(samples) == len(values)
    return values


def check_histogram(family: Any) -> None:
    series: dict[str, list[tuple[float, float]]] = {}
    counts = {sample.labels["flow"]: sample.value for sample in family.samples if sample.name.endswith("_count")}
    for sample in family.samples:
        if sample.name.endswith("_bucket"):
            series.setdefault(sample.labels["flow"], []).append((float(sample.labels["le"]), sample.value))
    assert series.keys() == counts.keys()
    for flow, buckets in series.items():
        assert buckets == sorted(buckets) and buckets[-1] == (float("inf"), counts[flow])
        assert [count for _, count in buckets] == sorted(count for _, count in buckets)


def scrape(client: Client, **more: Any) -> Values:
    answer = client.get("/metrics", **more)
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return parsed(answer.text)


def at(values: Values, name: str, **labels: str) -> float:
    return values[name, frozenset(labels.items())]


def jobs(values: Values, flow: str) -> Mapping[str, float]:
    """How the flow's jobs ended: those that are not 0."""
    found = {dict(labels)["outcome"]: value for (name, labels), value in values.items()
             if name == "astera_jobs_finished_total" and ("flow", flow) in labels}  # fmt: skip
    assert found.keys() == {"completed", "failed", "timeout", "cancelled", "interrupted"}
    return {outcome: value for outcome, value in found.items() if value}


FLOWS = {
    "light": get_flow("/light", response={"body": 1}),
    "refusing": get_flow("/refusing", steps=[{"name": "no", "fail": {"status": 422, "message": "no"}}]),
    "resting": get_flow("/resting", steps=[{"name": "rest", "wait": "300ms"}], response={"body": 1}),
    "long": get_flow("/long", steps=[{"name": "rest", "wait": "1h"}]),
    "late": get_flow("/late", steps=[{"name": "rest", "wait": "1h"}], timeout="50ms"),
}


def test_jobs_and_runs_are_counted(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as run:
        before = scrape(run.client)
        assert at(before, "astera_jobs_accepted_total", flow="light") == 0
        for _ in range(3):
            assert run.client.get("/api/publishing/light").status_code == 200
        for path, times in (("light", 5), ("refusing", 2), ("resting", 1), ("late", 1)):
            for _ in range(times):
                run.client.finished(run.client.get(f"/api/publishingAsync/{path}"))
        accepted = run.client.get("/api/publishingAsync/long").json()
        until(lambda: run.app.engine.queue.counts()["waiting"])
        values = scrape(run.client)
        assert at(values, "astera_jobs_waiting") == 1
        assert run.client.post(f"/api/jobs/{accepted['id']}/cancel").status_code == 200
        values = scrape(run.client)
        assert jobs(values, "light") == {"completed": 5}
        assert jobs(values, "refusing") == {"failed": 2}
        assert jobs(values, "resting") == {"completed": 1}
        assert jobs(values, "long") == {"cancelled": 1}
        assert jobs(values, "late") == {"timeout": 1}
        assert {flow: at(values, "astera_jobs_accepted_total", flow=flow) for flow in FLOWS} == {
            "light": 5, "refusing": 2, "resting": 1, "long": 1, "late": 1,
        }  # fmt: skip
        runs = {flow: at(values, "astera_run_duration_seconds_count", flow=flow) for flow in FLOWS}
        assert runs == {"light": 8, "refusing": 2, "resting": 1, "long": 0, "late": 1}
        assert at(values, "astera_run_duration_seconds_bucket", flow="resting", le="0.1") == 0
        assert at(values, "astera_run_duration_seconds_bucket", flow="resting", le="2.0") == 1  # its wait included
        assert 0.3 <= at(values, "astera_run_duration_seconds_sum", flow="resting") < 2
        assert at(values, "astera_jobs_waiting") == at(values, "astera_jobs_queued") == 0


def test_what_runs_is_told(tmp_path: Path) -> None:
    go, begun = threading.Event(), threading.Semaphore(0)

    def hold(context: Context) -> int:
        begun.release()
        go.wait(10)
        return 1

    with running(tmp_path, workers=2) as run:
        run.app.flow("GET /hold", name="hold")(hold)
        accepted = [run.client.get("/api/publishingAsync/hold") for _ in range(3)]
        for _ in range(2):
            assert begun.acquire(timeout=10)
        until(lambda: run.app.engine.queue.counts()["running"] == 2)
        values = scrape(run.client)
        assert at(values, "astera_jobs_running") == 2 and at(values, "astera_jobs_queued") == 1
        assert at(values, "astera_workers") == 3 and at(values, "astera_workers_busy") >= 2
        assert at(values, "astera_flows") == 1 and at(values, "astera_healthy") == 1
        assert jobs(values, "hold") == {}
        go.set()
        for each in accepted:
            run.client.finished(each)
        values = scrape(run.client)
        assert jobs(values, "hold") == {"completed": 3} and at(values, "astera_jobs_running") == 0
        assert at(values, "astera_run_duration_seconds_count", flow="hold") == 3


def test_a_thread_that_does_not_end_is_counted_once(tmp_path: Path) -> None:
    go, ended = threading.Event(), threading.Event()

    def hold(context: Context) -> int:
        go.wait(20)
        ended.set()
        return 1

    with running(tmp_path, FLOWS) as run:
        run.app.flow("GET /hold", name="hold", timeout="500ms")(hold)  # long enough to begin
        document = run.client.finished(run.client.get("/api/publishingAsync/hold"))
        assert document["error"]["code"] == "timeout"
        go.set()
        assert ended.wait(10)
        until(lambda: run.app.engine.queue.counts()["running"] == 0)
        # what it brought in the end was written before this
        run.client.finished(run.client.get("/api/publishingAsync/light"))
        values = scrape(run.client)
        assert jobs(values, "hold") == {"timeout": 1}
        assert at(values, "astera_run_duration_seconds_count", flow="hold") == 1


def test_requests_are_counted_by_method_route_and_status(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as run:
        for path in ("/api/publishing/light", "/api/publishing/light", "/api/jobs/a/status", "/api/jobs/b/status"):
            run.client.get(path)
        for path in ("/nothing", "/nothing/" + "x" * 100, "/api/publishing/nothing"):
            assert run.client.get(path).status_code == 404
        for path in ("/api/jobs", "/anything", "/api/publishing/light"):
            run.client("OPTIONS", path)
        assert run.client("HEAD", "/api/publishing/light").status_code == 200
        assert run.client.post("/health").status_code == 405
        values = scrape(run.client)
        found = {tuple(dict(labels)[name] for name in ("method", "route", "code")): value
                 for (name, labels), value in values.items() if name == "astera_http_requests_total"}  # fmt: skip
        assert found == {
            ("GET", "/api/publishing/*", "200"): 2,
            ("HEAD", "/api/publishing/*", "200"): 1,
            ("GET", "/api/publishing/*", "404"): 1,
            ("GET", "/api/jobs/{id}/status", "404"): 2,
            ("GET", "", "404"): 2,
            ("OPTIONS", "*", "204"): 3,
            ("POST", "", "405"): 1,
        }
        assert at(values, "astera_connections") == 1
        assert at(values, "astera_database_bytes") > 4096
        assert at(scrape(run.client), "astera_http_requests_total", method="GET", route="/metrics", code="200") == 1


def test_callbacks_are_counted_by_what_followed(tmp_path: Path, sink: Sink) -> None:
    sink.answers = [500, 204, 410]
    with running(tmp_path, FLOWS, callback_retries="10ms", callback_allow="127.0.0.1") as run:
        for _ in range(2):
            run.client.finished(run.client.get("/api/publishingAsync/light", params={"callbackUrl": sink.url}))
            until(lambda: run.app.courier.under_way() == [] and sink.answers != [500, 204, 410])
        until(lambda: not sink.answers)
        outcomes = {"delivered": 1, "retried": 1, "failed": 0, "gone": 1}

        def counted() -> dict[str, float]:
            values = scrape(run.client)
            return {word: at(values, "astera_callback_attempts_total", outcome=word) for word in outcomes}

        until(lambda: counted() == outcomes)


def test_a_restart_begins_at_0_and_counts_what_was_left(tmp_path: Path) -> None:
    flows = tmp_path / "flows"
    flows.mkdir()
    tree = get_flow("/held", steps=[{"name": "held", "python": {"call": "held:held"}}], restart="fail")
    (flows / "held.json").write_text(json.dumps(tree))
    (flows / "held.py").write_text("import time\n\n\ndef held(context):\n    time.sleep(30)\n")
    with process(tmp_path) as (first, url, _):
        api = Api(url)
        job_id = api.submit("/held")
        until(lambda: api.counts()["running"] == 1)
        until(lambda: api.job(job_id)["startedAt"])
        first.kill()
        first.wait(10)
    with process(tmp_path) as (_, url, _):
        assert Api(url).job(job_id, wait=15)["error"]["code"] == "interrupted"
        values = parsed(Api(url).session.get(f"{url}/metrics", timeout=10).text)
        assert jobs(values, "held") == {"interrupted": 1}
        assert at(values, "astera_jobs_accepted_total", flow="held") == 0
        assert at(values, "astera_run_duration_seconds_count", flow="held") == 0
        assert at(values, "process_resident_memory_bytes") > 1 << 20 or sys.platform != "linux"


def test_only_deployed_flows_are_told_of(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db"), flows=str(tmp_path)) as app:
        (tmp_path / "gone.json").write_text(json.dumps(FLOWS["light"]))
        app.deployer.reload()
        app.run("gone")
        assert at(parsed(metrics_text(app)), "astera_run_duration_seconds_count", flow="gone") == 1
        (tmp_path / "gone.json").unlink()
        app.deployer.reload()
        assert not any("flow" in dict(labels) for _, labels in parsed(metrics_text(app)))


def test_who_may_read_them(tmp_path: Path) -> None:
    command = [*PROGRAM, "token"]
    with process(tmp_path):
        made = {
            name: subprocess.run([*command, name, *more], capture_output=True, text=True, cwd=tmp_path, check=True)
            for name, more in (("ada", []), ("bob", ["--flows", "light"]), ("eve", ["--role", "admin"]))
        }
    with process(tmp_path) as (_, url, _):
        session = Api(url).session
        assert session.get(f"{url}/metrics", timeout=10).status_code == 401
        codes = {}
        for name, done in made.items():
            headers = {"Authorization": f"Bearer {done.stdout.strip()}"}
            codes[name] = session.get(f"{url}/metrics", headers=headers, timeout=10).status_code
        assert codes == {"ada": 403, "bob": 403, "eve": 200}


def test_labels_are_escaped() -> None:
    value = 'a"b\\c\nd\\n'
    text = f"# HELP x X.\n# TYPE x gauge\nx{astera_lite_admin._labels(name=value)} 1\n"
    (family,) = text_string_to_metric_families(text)
    assert family.samples[0].labels == {"name": value}


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.001, 0), (0.0011, 1), (1800.0, 9), (1801.0, 10)])
def test_a_bound_belongs_to_its_bucket(seconds: float, bucket: int) -> None:
    counted = astera_lite.Metrics()
    counted.ran("x", seconds)
    assert counted.runs["x"].index(1) == bucket
