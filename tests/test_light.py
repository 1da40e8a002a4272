"""Flows that only compute: they are run before their job is stored, on the thread that has the request."""

from __future__ import annotations

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from support import FakeClock, Running, Sink, get_flow, running, until

from astera_lite import Engine, build_flow

pytestmark = pytest.mark.both_stores

HEAVY = "${sum([a * b for a in range(200) for b in range(200)])}"  # 40,000 rounds
FLOWS = {
    "echo": {
        "request": {"method": "POST", "resource": "/echo", "processing": ["synchronous", "asynchronous"]},
        "steps": [{"name": "id", "set": "${uuid()}"}, {"name": "long", "set": "${len(request.body)}"}],
        "response": {"body": {"id": "${id}", "long": "${long}"}},
    },
    "branch": get_flow(
        "/branch",
        request={"parameters": {"n": {"in": "query", "type": "integer", "default": 0}}},
        steps=[
            {
                "name": "way",
                "choose": [
                    {
                        "when": "${params.n == 1}",
                        "steps": [{"name": "no", "fail": {"status": 422, "message": "not ${params.n}"}}],
                    },
                    {"when": "${params.n == 2}", "steps": [{"name": "r", "respond": {"status": 404, "body": "none"}}]},
                    {"steps": [{"name": "s", "set": "${10 // params.n}", "onError": "by zero"}]},
                ],
            }
        ],
        response={"body": "${way}"},
    ),
    "heavy": get_flow("/heavy", steps=[{"name": "s", "set": HEAVY, "onError": "caught"}], response={"body": "${s}"}),
}


class Spy:
    """Whether runs end on the thread that has the request."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[bool] = []
        original = Engine.run_at_once

        def run_at_once(engine: Engine, *args: Any) -> Any:
            outcome = original(engine, *args)
            self.tried.append(outcome is not None)
            return outcome

        monkeypatch.setattr(Engine, "run_at_once", run_at_once)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


def post(run: Running, body: Any, **headers: str) -> requests.Response:
    return run.client.post("/api/publishingAsync/echo", json=body, headers=headers)


@pytest.mark.parametrize(
    ("more", "light"),
    [
        ({}, True),
        ({"steps": [{"name": "s", "set": 1, "when": "${params}"}, {"name": "r", "respond": {"body": 1}}]}, True),
        ({"steps": [{"name": "w", "wait": 1}]}, False),
        ({"steps": [{"name": "r", "run": ["true"]}]}, False),
        ({"steps": [{"name": "s", "set": 1, "timeout": 1}]}, False),
        ({"steps": [{"name": "s", "set": 1, "retry": 3}]}, False),
        ({"steps": [{"name": "e", "each": {"of": "${[1]}", "steps": [{"name": "s", "set": 1}]}}]}, False),
        ({"steps": [{"name": "c", "choose": [{"steps": [{"name": "w", "wait": 1}]}]}]}, False),
        ({"steps": [{"name": f"s{n}", "set": 1} for n in range(33)]}, False),
        ({"response": {"body": "x" * 20_000}}, False),
        ({"concurrency": {"limit": 1}}, False),
    ],
)
def test_what_is_light(more: dict[str, Any], light: bool) -> None:
    assert build_flow({"request": {"method": "GET", "resource": "/x"}, **more}, "f").light is light


def test_a_job_of_a_light_flow_is_like_any_other(tmp_path: Path, spy: Spy) -> None:
    clock = FakeClock()
    with running(tmp_path, FLOWS, clock=clock) as run:
        accepted = post(run, "four")
        assert (accepted.status_code, accepted.json()["status"]) == (202, "Running")
        job = run.client.get(f"/api/jobs/{accepted.json()['id']}").json()
        assert (job["status"], job["attempt"]) == ("Completed", 1)
        assert job["createdAt"] == job["startedAt"] == job["finishedAt"]
        assert [(step["name"], step["state"]) for step in job["steps"]] == [("id", "finished"), ("long", "finished")]
        assert job["steps"][0]["size"] == 38
        assert job["request"]["body"] == '"four"'
        result = run.client.get(job["resultUrl"])
        assert (result.json()["long"], result.headers["Job-Status"]) == (4, "Completed")
        assert run.client.get(job["resultUrl"]).content == result.content
        clock.tick(86401)
        assert run.client.get(job["resultUrl"]).status_code == 404
    assert spy.tried == [True]


def test_a_job_ends_after_its_steps(tmp_path: Path) -> None:
    class Passing(FakeClock):
        """Each look at it takes a millisecond."""

        def now(self) -> int:
            return self.tick(0.001)

        def wall(self) -> int:
            return self.tick(0.001)

    with running(tmp_path, FLOWS, clock=Passing()) as run:
        job = run.client.get(f"/api/jobs/{post(run, 'four').json()['id']}").json()
        assert job["createdAt"] == job["startedAt"] < job["steps"][0]["startedAt"]
        assert job["steps"][-1]["finishedAt"] < job["finishedAt"] < job["expiresAt"]


@pytest.mark.parametrize(
    ("n", "code", "body", "status"),
    [
        (0, 200, "by zero", "Completed"),
        (1, 422, None, "Error"),
        (2, 404, "none", "Completed"),
        (5, 200, 2, "Completed"),
    ],
)
def test_it_ends_as_it_would_on_a_thread(tmp_path: Path, n: int, code: int, body: Any, status: str) -> None:
    with running(tmp_path, FLOWS) as run:
        now = run.client.get(f"/api/publishing/branch?n={n}")
        later = run.client.get(f"/api/publishingAsync/branch?n={n}", headers={"Prefer": "wait=5"})
        assert now.status_code == later.status_code == code
        assert later.headers["Job-Status"] == status
        assert now.json() == later.json()
        if body is not None:
            assert now.json() == body


def test_one_that_costs_too_much_gets_a_thread_and_is_not_tried_again(tmp_path: Path, spy: Spy) -> None:
    wanted = sum(a * b for a in range(200) for b in range(200))
    with running(tmp_path, FLOWS) as run:
        assert run.client.get("/api/publishing/heavy").json() == wanted  # and its onError has caught nothing
        job = run.client.finished(run.client.get("/api/publishingAsync/heavy"))
        assert run.client.get(job["resultUrl"]).json() == wanted
        assert spy.tried == [False, False]
        assert len(run.app.engine._costly) == 1


def test_a_large_body_gets_a_thread(tmp_path: Path, spy: Spy) -> None:
    with running(tmp_path, FLOWS) as run:
        for size, light in ((16_000, True), (17_000, False)):
            job = run.client.finished(post(run, "x" * size))
            assert run.client.get(job["resultUrl"]).json()["long"] == size
            assert spy.tried.pop() is light


def test_a_large_result_is_computed_once_and_later_ones_get_a_thread(tmp_path: Path, spy: Spy) -> None:
    request = {"method": "POST", "body": {}}
    with running(
        tmp_path, {"many": get_flow("/many", request=request, response={"body": "${[request.body] * 40}"})}
    ) as run:
        job = run.client.finished(run.client.post("/api/publishingAsync/many", json="x" * 16_000))
        assert run.client.get(job["resultUrl"]).json() == ["x" * 16_000] * 40
        assert 'astera_run_duration_seconds_count{flow="many"} 1' in run.client.get("/metrics").text.splitlines()
        assert run.client.post("/api/publishing/many", json="x").json() == ["x"] * 40
        assert spy.tried == [True, False]  # to write such a response holds up other requests


def test_its_callback_is_owed_in_the_same_transaction(tmp_path: Path, sink: Sink) -> None:
    with running(tmp_path, FLOWS) as run:
        for n, status in ((5, "Completed"), (1, "Error")):
            job = run.client.get(f"/api/publishingAsync/branch?n={n}&callbackUrl={sink.url}/").json()
            headers, document = sink.next()
            assert headers["location"] == f"{run.server.url}/api/jobs/{job['id']}/result"
            assert (document["id"], document["status"], document["attempt"]) == (job["id"], status, 1)
            assert document["startedAt"] == document["createdAt"]


def test_a_key_that_comes_again_brings_the_same_job_and_result(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as run, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(run, "x", **{"Idempotency-Key": "k"}), range(8)))
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert sorted(answer.headers.get("Idempotency-Replayed", "") for answer in answers) == [""] + ["true"] * 7
        results = {run.client.get(f"/api/jobs/{answer.json()['id']}/result").text for answer in answers}
        assert len(results) == 1
        assert post(run, "y", **{"Idempotency-Key": "k"}).status_code == 422


@pytest.mark.sqlite  # its writer is what fails
def test_what_cannot_be_stored_is_not_accepted(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS) as run:
        with contextlib.closing(sqlite3.connect(tmp_path / "jobs.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert post(run, "x").status_code == 503
            other.execute("ROLLBACK")
        until(lambda: post(run, "x").status_code == 202)
        assert len(run.client.get("/api/jobs").json()["jobs"]) == 1


def test_many_at_one_time_are_all_there(tmp_path: Path) -> None:
    """They go to the disk many a statement: each with its own."""
    with running(tmp_path, FLOWS) as run, ThreadPoolExecutor(40) as pool:
        url = f"{run.server.url}/api/publishingAsync/echo"
        answers = list(pool.map(lambda n: requests.post(url, json="x" * n, timeout=20), range(300)))
        assert {answer.status_code for answer in answers} == {202}
        assert len({answer.json()["id"] for answer in answers}) == 300
        for n, answer in enumerate(answers):
            result = run.client.get(f"/api/jobs/{answer.json()['id']}/result").json()
            assert result["long"] == n
