"""Steps that hold steps (each, choose, call), limits of flows, and what of all that outlives a crash."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import FakeClock, get_flow, running, until

from astera_lite import (
    ANYBODY,
    AsteraLite,
    Busy,
    Clock,
    Deployments,
    FlowError,
    InputError,
    Job,
    Status,
    build_flow,
    from_saved,
    to_saved,
)

Call = Callable[..., Any]


@contextmanager
def serving(folder: Path, flows: dict[str, Any], clock: Clock | None = None, **settings: Any) -> Iterator[AsteraLite]:
    app = AsteraLite(clock=clock, **{"database": str(folder / "jobs.db"), "shutdown_timeout": 5, **settings})
    for name, tree in flows.items():
        app.deploy(name, tree)
    with app:
        yield app


def steps(*given: Any, **more: Any) -> dict[str, Any]:
    return get_flow("/f", steps=list(given), **more)


def python(function: Call, name: str = "p", args: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"name": name, "python": {"call": function, "args": args or {}}, **more}


def each(inner: list[Any], **more: Any) -> dict[str, Any]:
    return {"name": "every", "each": {"of": "${[1, 2, 3]}", "steps": inner, **more}}


def answer(folder: Path, tree: dict[str, Any], **settings: Any) -> Any:
    with serving(folder, {"f": tree}, **settings) as app:
        result = app.run("f")
        assert result.status_code == 200, result.text
        job = app.submit("f")
        assert app.wait(job.id, 10).status is Status.COMPLETED
        assert app.result(job.id).content == result.content  # both modes give the same
        return result.json()


def faults(tree: dict[str, Any]) -> list[str]:
    with pytest.raises(FlowError) as caught:
        build_flow(tree, "t")
    return [f"{fault.place}: {fault.message}" for fault in caught.value.faults]


# ---- each ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 64])
def test_each_gives_the_results_in_the_order_of_the_items(tmp_path: Path, width: int) -> None:
    def double(context: Any, n: int) -> int:
        context.sleep(0.003 * (4 - n))  # the first takes longest
        return 2 * n

    inner = [python(double, "d", {"n": "${item}"}), {"name": "s", "set": {"n": "${item}", "d": "${d}"}}]
    assert answer(tmp_path, steps(each(inner, concurrency=width))) == [{"n": n, "d": 2 * n} for n in (1, 2, 3)]


def test_each_names_its_item_and_its_result(tmp_path: Path) -> None:
    tree = steps({
        "name": "every",
        "each": {"of": "${[[1, 2], [3]]}", "as": "row", "result": "${sum(inner) + len(row)}", "steps": [
            {"name": "inner", "each": {"of": "${row}", "as": "n", "steps": [{"name": "m", "set": "${10 * n}"}]}},
        ]},
    })  # fmt: skip
    assert answer(tmp_path, tree) == [32, 31]


@pytest.mark.parametrize("items", ["${[]}", "${[7]}"])
def test_each_of_few_items_needs_nobody(tmp_path: Path, items: str) -> None:
    tree = steps({"name": "every", "each": {"of": items, "concurrency": 8, "steps": [{"name": "s", "set": "${item}"}]}})
    assert answer(tmp_path, tree) == json.loads(items[2:-1])


def test_items_are_worked_on_at_the_same_time_but_no_more_than_allowed(tmp_path: Path) -> None:
    both, most, lock, now = threading.Barrier(2, timeout=10), [0], threading.Lock(), [0]

    def work(context: Any) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        both.wait()
        with lock:
            now[0] -= 1

    tree = steps({"name": "every", "each": {"of": "${range(6)}", "concurrency": 2, "steps": [python(work)]}})
    with serving(tmp_path, {"f": tree}) as app:
        assert app.run("f").status_code == 200
    assert most == [2]


def test_items_are_worked_on_where_no_thread_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, both = threading.Thread.start, threading.Barrier(2)

    def start_no_helper(thread: threading.Thread) -> None:
        if thread.name == "astera-helper":
            raise RuntimeError("can't start new thread")
        start(thread)

    def meet(context: Any) -> None:
        both.wait(5)

    flows = {"few": steps(each([{"name": "s", "set": "${item}"}], concurrency=3))}
    flows["both"] = get_flow(
        "/both", steps=[{"name": "e", "each": {"of": [1, 2], "concurrency": 2, "steps": [python(meet)]}}]
    )
    with serving(tmp_path, flows) as app:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start_no_helper)
            assert {app.run("few").text for _ in range(70)} == {"[1,2,3]\n"}
        assert app.run("both").status_code == 200  # no helper was lost


@pytest.mark.parametrize("width", [1, 4])
def test_the_first_error_stops_the_rest(tmp_path: Path, width: int) -> None:
    ran: list[int] = []

    def work(context: Any, n: int) -> None:
        ran.append(n)
        if n == 2:
            raise ValueError("two")
        if n > 2:
            context.sleep(20)  # ends with the error of its sibling

    inner = python(work, args={"n": "${item}"})
    tree = steps({"name": "every", "each": {"of": "${range(50)}", "concurrency": width, "steps": [inner]}})
    with serving(tmp_path, {"f": tree}) as app:
        job = app.submit("f")
        found = app.wait(job.id, 10)
    assert found.status is Status.ERROR
    assert len(ran) <= 8


def test_each_with_on_error_goes_on(tmp_path: Path) -> None:
    inner = [{"name": "s", "set": "${1 // (item - 2)}", "onError": -1}]
    assert answer(tmp_path, steps(each(inner))) == [-1, -1, 1]


def test_respond_inside_each_answers(tmp_path: Path) -> None:
    inner = [{"name": "r", "when": "${item == 2}", "respond": {"body": "${item}"}}]
    assert answer(tmp_path, steps(each(inner, concurrency=3), {"name": "never", "fail": {"message": "x"}})) == 2


def test_a_timeout_of_each_bounds_its_items(tmp_path: Path) -> None:
    def work(context: Any) -> None:
        context.sleep(20)

    tree = steps(each([python(work)], concurrency=2) | {"timeout": "50ms"})
    with serving(tmp_path, {"f": tree}) as app:
        result = app.run("f")
    assert result.status_code == 504
    assert result.json()["detail"].startswith('step "every": step "p": ')


def test_cancel_ends_all_items(tmp_path: Path) -> None:
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def work(context: Any) -> None:
        begun.release()
        try:
            context.sleep(20)
        finally:
            ended.release()

    with serving(tmp_path, {"f": steps(each([python(work)], concurrency=3))}) as app:
        job = app.submit("f")
        assert all(begun.acquire(timeout=10) for _ in range(3))
        app.cancel(job.id)
        found = app.wait(job.id, 10)
        assert found.error and found.error["code"] == "cancelled"
        assert all(ended.acquire(timeout=10) for _ in range(3))


def test_more_helpers_than_there_are_do_not_block(tmp_path: Path) -> None:
    tree = steps({
        "name": "a",
        "each": {"of": "${range(9)}", "as": "x", "concurrency": 64, "steps": [
            {"name": "b", "each": {"of": "${range(9)}", "as": "y", "concurrency": 64, "steps": [
                {"name": "c", "each": {"of": "${range(9)}", "as": "z", "concurrency": 64, "steps": [
                    {"name": "s", "set": "${x + y + z}"}]}, "timeout": 20}]}}]},
    })  # fmt: skip
    expected = [[[x + y + z for z in range(9)] for y in range(9)] for x in range(9)]
    with serving(tmp_path, {"f": tree}) as app:
        assert app.run("f").json() == expected
    assert not [thread for thread in threading.enumerate() if thread.name == "astera-helper"]


def test_progress_counts_items(tmp_path: Path) -> None:
    at_two, go_on = threading.Event(), threading.Event()

    def work(context: Any, n: int) -> None:
        if n == 3:
            at_two.set()
            assert go_on.wait(10)

    with running(tmp_path, {"f": steps(each([python(work, args={"n": "${item}"})]))}) as server:
        location = server.client.get("/api/publishingAsync/f").headers["Location"]
        assert at_two.wait(10)
        assert server.client.get(location).json()["progress"] == {"step": "every", "done": 2, "total": 3}
        go_on.set()


# ---- choose ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "value"), [(1, "one"), (2, "two"), (3, "many")])
def test_choose_takes_the_first_branch_that_holds(tmp_path: Path, n: int, value: str) -> None:
    tree = steps(
        {"name": "n", "set": n},
        {"name": "c", "choose": [
            {"when": "${n == 1}", "steps": [{"name": "v", "set": "one"}]},
            {"when": "${n <= 2}", "steps": [{"name": "v", "set": "two"}]},
            {"steps": [{"name": "v", "set": "x"}], "result": "many"},
        ]},
    )  # fmt: skip
    assert answer(tmp_path, tree) == value


def test_choose_without_a_branch_is_null(tmp_path: Path) -> None:
    assert (
        answer(tmp_path, steps({"name": "c", "choose": [{"when": "${false}", "steps": [{"name": "v", "set": 1}]}]}))
        is None
    )


# ---- call ------------------------------------------------------------------------------------------------------------

GREET = {
    "request": {
        "method": "GET",
        "resource": "/greet/{name}",
        "parameters": {"loud": {"in": "query", "type": "boolean"}},
    },
    "response": {
        "status": 201,
        "headers": {"X-Len": "${len(params.name)}"},
        "body": {"hi": "${params.name.upper() if params.loud else params.name}"},
    },
}


def test_call_runs_another_flow(tmp_path: Path) -> None:
    call = {"name": "c", "call": {"flow": "greet", "params": {"name": "a/ä", "loud": True}}}
    with serving(tmp_path, {"greet": GREET, "f": steps(call)}) as app:
        assert app.run("f").json() == {
            "status": 201,
            "headers": {"x-len": "3", "content-type": "application/json"},
            "body": {"hi": "A/Ä"},
        }


LISTS = {
    "request": {
        "method": "GET",
        "resource": "/lists/{path}",
        "parameters": {
            "path": {"in": "path", "type": "array"},
            "query": {"in": "query", "type": "array", "default": ["none"]},
            "X-Head": {"in": "header", "type": "array"},
            "one": {"in": "query"},
        },
    },
    "response": {"body": "${[params.path, params.query, params['X-Head']]}"},
}


@pytest.mark.parametrize(
    "lists",
    [
        [["a", "b"], ["Doe, John", "x"], ["c", "d e"]],
        [["a"], ["Doe, John"], ["c"]],
        [["a/ä"], [","], ["c"]],
        [["a"], [], None],
        [["a"], None, None],
    ],
)
def test_a_list_arrives_as_the_list_that_it_was(tmp_path: Path, lists: list[Any]) -> None:
    params = {name: value for name, value in zip(("path", "query", "X-Head"), lists, strict=True) if value is not None}
    came = [lists[0], ["none"] if lists[1] is None else lists[1], lists[2]]
    call = {"name": "c", "call": {"flow": "lists", "params": params}}
    with serving(tmp_path, {"lists": LISTS, "f": steps(call)}) as app:
        assert app.run("f").json()["body"] == came
        assert app.run("lists", params).json() == came
        job = app.submit("lists", params)
        app.wait(job.id, 10)
        assert app.result(job.id).json() == came


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"path": ["a"], "query": ["b", ""]}, "query query: has an empty item"),
        ({"path": ["a,b", "c"]}, "path path: has an item with a comma, which divides items there"),
        ({"path": ["a"], "X-Head": ["a, b"]}, "header X-Head: has an item with a comma, which divides items there"),
        ({"path": ["a"], "one": ["b", "c"]}, "query one: must be given once"),
    ],
)
def test_a_list_that_a_request_cannot_carry_is_refused(tmp_path: Path, params: Any, message: str) -> None:
    with serving(tmp_path, {"lists": LISTS}) as app, pytest.raises(InputError, match=f"^{message}$"):
        app.run("lists", params)


@pytest.mark.parametrize(
    ("callee", "status", "detail"),
    [
        ({"steps": [{"name": "x", "fail": {"status": 422, "message": "no"}}]}, 422, 'step "c": no'),
        ({"steps": [{"name": "x", "fail": {"status": 422, "message": ""}}]}, 422, 'step "c": '),
        ({"steps": [{"name": "x", "set": "${1 // 0}"}]}, 500, "The flow failed."),
        ({"request": {"parameters": {"n": {"in": "query", "required": True}}}}, 500, "refused its input"),
        ({"steps": [{"name": "x", "wait": 9}], "timeout": "20ms"}, 504, "exceeded"),
    ],
)
def test_a_called_flow_that_fails_is_a_failed_step(tmp_path: Path, callee: Any, status: int, detail: str) -> None:
    flows = {"other": get_flow("/other", **callee), "f": steps({"name": "c", "call": "other"})}
    with serving(tmp_path, flows) as app:
        result = app.run("f")
        assert (result.status_code, detail in result.json()["detail"]) == (status, True), result.text
        app.deploy("f", steps({"name": "c", "call": "other", "onError": "instead"}))
        assert app.run("f").json() == "instead"


def test_flows_that_call_what_is_not_there_or_in_a_circle_are_faults() -> None:
    def calling(name: str, *others: str) -> Any:
        inner = [{"name": f"c{n}", "call": other} for n, other in enumerate(others)]
        block = {"name": "e", "choose": [{"steps": inner}]}
        return build_flow(get_flow(f"/{name}", steps=[block] if inner else []), name)

    flows = [calling("a", "b"), calling("b", "c", "leaf"), calling("c", "a"), calling("leaf"), calling("d", "leef")]
    found = Deployments([*flows, calling("self", "self")])
    assert sorted(found.by_name) == ["leaf"]
    messages = {str(fault) for fault in found.faults}
    place = "/steps/0/choose/0/steps/0/call/flow"
    assert f'd: {place}: there is no flow "leef" in service; did you mean "leaf"?' in messages
    assert f'self: {place}: it would never end: "self" calls "self"' in messages
    assert f'a: {place}: it would never end: "a" calls "b" calls "c" calls "a"' in messages


def test_a_flow_stays_as_it_was_where_its_new_text_cannot_be_in_service() -> None:
    old, leaf = build_flow(get_flow("/a"), "a"), build_flow(get_flow("/leaf"), "leaf")
    before = Deployments([old, leaf])
    new = build_flow(get_flow("/a", steps=[{"name": "c", "call": "gone"}]), "a")
    after = Deployments([new, leaf], [], before.by_name)
    assert after.by_name["a"] is old and len(after.faults) == 1
    thief = build_flow(get_flow("/leaf"), "a-thief")  # earlier in the alphabet
    after = Deployments([thief, leaf], [], before.by_name)
    assert sorted(after.by_name) == ["leaf"]
    assert 'claimed by "leaf"' in str(after.faults[0])


# ---- faults ----------------------------------------------------------------------------------------------------------


SET = {"name": "s", "set": 1}
OTHER = {"name": "b", "set": 1}


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"each": {"of": "${[1]}"}}, '/each: needs a member "steps": a list of steps'),
        ({"each": {"of": "${[1]}", "steps": []}}, "/each/steps: must be a list with at least one item"),
        (
            {"each": {"of": "${[1]}", "concurrency": 0, "steps": [SET]}},
            "/each/concurrency: 0 is not a number from 1 to 64",
        ),
        (
            {"each": {"of": "${[1]}", "as": "len", "steps": [SET]}},
            '/each/as: "len" has a meaning in expressions already: choose another name',
        ),
        (
            {"each": {"of": "${[1]}", "step": []}},
            '/each/step: is not known here (known: of, as, concurrency, steps, result); did you mean "steps"?',
        ),
        ({"choose": {}}, "/choose: must be a list with at least one item, not an object"),
        (
            {"choose": [{"steps": [SET]}, {"steps": [OTHER]}]},
            "/choose/0: has no `when`, so nothing after it is ever reached: put it last",
        ),
        (
            {"call": {"flow": "${params.x}"}},
            '/call/flow: "${params.x}" is not the name of a flow: expressions are not evaluated here',
        ),
        ({"call": {}}, '/call: needs a member "flow": the name of a flow'),
    ],
)
def test_faults_of_blocks(step: dict[str, Any], message: str) -> None:
    assert f"/steps/0{message}" in faults(steps({"name": "x", **step}))


def test_names_inside_a_block_are_unknown_behind_it() -> None:
    tree = steps(each([{"name": "inner", "set": 1}]), {"name": "later", "set": "${inner + item}"})
    [first] = faults(tree)
    assert '"inner" is known only inside the step that it belongs to' in first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"limit": 0}, "/concurrency/limit: 0 is not a number of runs, 1 or more"),
        ({}, '/concurrency: needs a member "limit": a number of runs, 1 or more'),
        ({"limit": 1, "whenFull": "reject"}, '/concurrency/whenFull: "reject" is not one of queue, refuse'),
    ],
)
def test_faults_of_limits(spec: Any, message: str) -> None:
    assert faults(steps(concurrency=spec)) == [message]


# ---- limits of flows -------------------------------------------------------------------------------------------------


class Gate:
    def __init__(self) -> None:
        self.begun, self.open = threading.Semaphore(0), threading.Event()
        self.lock, self.now, self.most = threading.Lock(), 0, 0

    def __call__(self, context: Any) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        self.begun.release()
        assert self.open.wait(20)
        with self.lock:
            self.now -= 1


def test_a_limit_queues_jobs_and_calls_alike(tmp_path: Path) -> None:
    gate = Gate()
    flows = {"f": steps(python(gate), concurrency={"limit": 2}), "free": get_flow("/free")}
    with serving(tmp_path, flows) as app:
        jobs = [app.submit("f") for _ in range(6)]
        assert gate.begun.acquire(timeout=10) and gate.begun.acquire(timeout=10)
        answers: list[int] = []
        callers = [threading.Thread(target=lambda: answers.append(app.run("f").status_code)) for _ in range(3)]
        for caller in callers:
            caller.start()
        assert app.run("free").status_code == 200
        app.cancel(jobs[5].id)
        gate.open.set()
        for caller in callers:
            caller.join(10)
        assert answers == [200] * 3
        assert [app.wait(job.id, 10).status for job in jobs] == [Status.COMPLETED] * 5 + [Status.ERROR]
        assert app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 0}
    assert gate.most == 2


def test_a_job_that_is_cancelled_when_its_turn_comes_keeps_nobody_out(tmp_path: Path) -> None:
    gate = Gate()
    with serving(tmp_path, {"f": steps(python(gate), concurrency=1)}) as app:
        first, second, third = [app.submit("f") for _ in range(3)]
        assert gate.begun.acquire(timeout=10)
        until(lambda: len(app.engine.queue._held["f"]) == 2)
        with app.engine.queue.changed:  # the second is let in, and cancelled before a thread takes it
            app.engine.queue._ready.append(app.engine.queue._held["f"].pop(0))
        app.cancel(second.id)
        gate.open.set()
        assert [app.wait(job.id, 10).status for job in (first, second, third)] == ["Completed", "Error", "Completed"]


def test_a_changed_limit_counts_for_jobs_that_wait_and_a_removed_flow_keeps_its_limit(tmp_path: Path) -> None:
    gate, go_on = Gate(), threading.Semaphore(0)
    gate.open.wait = lambda timeout=None: go_on.acquire(timeout=timeout)  # type: ignore[method-assign, misc, assignment]

    def begun(count: int) -> bool:
        return all(gate.begun.acquire(timeout=10) for _ in range(count))

    with serving(tmp_path, {"f": steps(python(gate), concurrency=1)}) as app:
        jobs = [app.submit("f") for _ in range(7)]
        assert begun(1)
        app.deploy("f", steps(python(gate), concurrency=3))
        go_on.release()
        assert begun(3)
        assert (gate.most, app.engine.queue.counts()["queued"]) == (3, 3)
        app.deployer.deployments = app.deployer.replaced("f")  # it is in service no more
        go_on.release()
        assert begun(1) and not gate.begun.acquire(timeout=0.1)
        for _ in jobs[2:]:
            go_on.release()
        assert [app.wait(job.id, 10).status for job in jobs] == [Status.COMPLETED] * 7
    assert gate.most == 3


def test_a_call_for_which_there_is_no_room_in_time_is_a_timeout(tmp_path: Path) -> None:
    gate, clock = Gate(), FakeClock()
    with serving(tmp_path, {"f": steps(python(gate), concurrency=1)}, clock) as app:
        app.submit("f")
        assert gate.begun.acquire(timeout=10)
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(app.run("f").status_code))
        caller.start()
        until(lambda: len(app.engine.queue.entries) == 2)
        clock.tick(app.settings.sync_timeout)
        app.housekeeper.tick(clock.now())
        caller.join(10)
        assert answers == [504]
        gate.open.set()


def test_a_flow_that_refuses_is_429_with_retry_after(tmp_path: Path) -> None:
    gate = Gate()
    tree = steps(python(gate), concurrency={"limit": 2, "whenFull": "refuse"})
    with running(tmp_path, {"f": tree}) as server:
        accepted = [server.client.get("/api/publishingAsync/f", headers={"Idempotency-Key": key}) for key in "ab"]
        for path in ("/api/publishingAsync/f", "/api/publishing/f"):
            refused = server.client.get(path)
            assert refused.status_code == 429
            assert refused.json()["detail"] == "The flow has reached its limit of concurrent runs (2). Try again later."
            assert int(refused.headers["Retry-After"]) >= 1
        replay = server.client.get("/api/publishingAsync/f", headers={"Idempotency-Key": "a"})
        assert (replay.status_code, replay.headers["Location"]) == (202, accepted[0].headers["Location"])
        gate.open.set()
        for location in [answer.headers["Location"] for answer in accepted]:
            server.client.get(location, headers={"Prefer": "wait=10"})
        assert server.client.get("/api/publishing/f").status_code == 200


def test_one_key_twice_at_one_instant_is_one_job_also_where_there_is_room_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    tree = steps(python(gate), concurrency={"limit": 1, "whenFull": "refuse"})
    with serving(tmp_path, {"f": tree}) as app:
        add, find_key, looked = app.store.add, app.store.find_key, threading.Event()

        def add_late(*arguments: Any) -> None:
            looked.wait(0.05)  # the other must not look for the key before the job is on its way
            add(*arguments)

        def look(*arguments: Any) -> None:
            find_key(*arguments)
            looked.set()

        monkeypatch.setattr(app.store, "add", add_late)
        monkeypatch.setattr(app.store, "find_key", look)
        ids: list[str] = []
        start = threading.Barrier(2, timeout=10)

        def submit(key: str) -> None:
            start.wait()
            ids.append(app.submit("f", idempotency_key=key).id)

        for key in "abcdefgh":
            gate.open.clear()
            both = [threading.Thread(target=submit, args=key) for _ in range(2)]
            for thread in both:
                thread.start()
            for thread in both:
                thread.join(10)
            gate.open.set()
            assert len(ids) == 2 and len(set(ids)) == 1
            assert app.wait(ids[0], 10).status is Status.COMPLETED
            until(lambda: not app.engine.queue._unfinished["f"])
            ids.clear()
            looked.clear()


def test_unfinished_jobs_count_after_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    tree = steps({"name": "w", "wait": 60}, concurrency={"limit": 1, "whenFull": "refuse"})
    with serving(tmp_path, {"f": tree}, clock) as app:
        job = app.submit("f")
        with pytest.raises(Busy):
            app.submit("f")
    with serving(tmp_path, {"f": tree}, clock) as app:
        with pytest.raises(Busy):
            app.submit("f")
        until(lambda: app.engine.queue.counts()["waiting"] == 1)
        clock.tick(61)
        app.housekeeper.wake()
        assert app.wait(job.id, 10).status is Status.COMPLETED
        app.submit("f")


# ---- what outlives a crash -------------------------------------------------------------------------------------------


def crash(app: AsteraLite, folder: Path, name: str) -> Path:
    """A copy of the database as a kill would leave it."""
    copy = folder / name
    with closing(sqlite3.connect(app.settings.database)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy


@pytest.mark.parametrize("width", [1, 3])
def test_a_resumed_each_repeats_no_finished_item(tmp_path: Path, width: int) -> None:
    counts: dict[int, int] = {}
    reached, gate, lock = threading.Semaphore(0), threading.Event(), threading.Lock()

    def count(context: Any, n: int) -> int:
        with lock:
            counts[n] = counts.get(n, 0) + 1
        return n * n

    def stop(context: Any, n: int) -> None:
        reached.release()
        if n == 3:
            assert gate.wait(20)

    inner = [python(count, "a", {"n": "${item}"}), python(stop, "b", {"n": "${item}"})]
    tree = steps(each(inner, concurrency=width, result="${a}"))
    with serving(tmp_path, {"f": tree}) as app:
        job = app.submit("f")
        assert all(reached.acquire(timeout=10) for _ in range(3))  # every item is behind its first step
        app.engine._store.find_key(
            "", "", "", b"", 0, lambda result, error: reached.release()
        )  # what is recorded is on disk
        assert reached.acquire(timeout=10)
        copy = crash(app, tmp_path, "crashed.db")
        gate.set()
    with serving(tmp_path, {"f": tree}, database=str(copy)) as app:
        found = app.wait(job.id, 10)
        assert (found.status, found.attempt) == (Status.COMPLETED, 2)
        assert app.result(job.id).json() == [1, 4, 9]
    assert counts[1] == counts[3] == 1 and counts[2] == 1


def test_a_wait_inside_each_holds_no_thread_and_resumes(tmp_path: Path) -> None:
    clock, ran = FakeClock(), []
    inner = [python(lambda context, n: ran.append(n), "a", {"n": "${item}"}), {"name": "w", "wait": 60}]
    with serving(tmp_path, {"f": steps(each(inner, result="${item}"))}, clock, workers=1) as app:
        job = app.submit("f")
        for turn in (1, 2, 3):
            until(lambda turn=turn: ran == list(range(1, turn + 1)))  # type: ignore[misc]
            until(lambda: app.engine.queue.counts() == {"queued": 0, "running": 0, "waiting": 1})
            found = app.find(job.key, ANYBODY)
            assert found is not None and found[1] is not None
            assert (found[1].step, found[1].done, found[1].total) == ("every", turn - 1, 3) or turn == 1
            clock.tick(60)
            app.housekeeper.wake()
        assert app.wait(job.id, 10).status is Status.COMPLETED
        assert app.result(job.id).json() == [1, 2, 3]


def test_a_called_flow_keeps_its_input_across_a_suspension(tmp_path: Path) -> None:
    clock = FakeClock()
    id_ = {"in": "query"}
    kept = python(lambda context, id: id, "kept", {"id": "${params.id + request.body}"})
    inner = get_flow(
        "/g", steps=[kept, {"name": "w", "wait": 60}, {"name": "again", "set": "${params.id + request.body}"}]
    )
    inner["request"] |= {"method": "POST", "parameters": {"id": id_}, "contentTypes": ["text"]}
    inner["response"] = {"body": "${[kept, again]}"}
    call = {"name": "c", "call": {"flow": "g", "params": {"id": "${uuid()}", "none": "${null}"}, "body": "${uuid()}"}}
    inner["request"]["parameters"]["none"] = id_
    with serving(tmp_path, {"g": inner, "f": steps(call, response={"body": "${c.body}"})}, clock) as app:
        job = app.submit("f")
        until(lambda: app.engine.queue.counts()["waiting"] == 1)
        clock.tick(60)
        app.housekeeper.tick(clock.now())
        assert app.wait(job.id, 10).status is Status.COMPLETED
        kept_id, later_id = app.result(job.id).json()
    assert kept_id == later_id


def test_a_timeout_holds_across_a_suspension(tmp_path: Path) -> None:
    clock = FakeClock()
    inner = [{"name": "w", "wait": 40}]
    tree = steps(each(inner) | {"timeout": 60})
    with serving(tmp_path, {"f": tree}, clock) as app:
        job = app.submit("f")
        for _ in range(2):
            until(lambda: app.engine.queue.counts()["waiting"] == 1)
            clock.tick(40)
            app.housekeeper.tick(clock.now())
        found: Job = app.wait(job.id, 10)
    assert found.error and found.error["code"] == "timeout"


# ---- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {"KEY": 's3cr"et\\é', "LONGER": 's3cr"et\\é-and-more', "EMPTY": ""}


@pytest.mark.parametrize(
    "value",
    [
        SECRETS["KEY"], {"a": ["x" + SECRETS["KEY"] + "y", 1]}, {SECRETS["KEY"]: None}, SECRETS["LONGER"],
        "\0KEY;", "\0\0KEY;", {"\0bytes": "QQ=="}, {"\0bytes": b"\0"}, "\0", b"x", [b"", {"b": b"\xff"}], "KEY", None,
    ],
)  # fmt: skip
def test_a_saved_output_holds_no_secret_and_reads_back_the_same(value: Any) -> None:
    text = to_saved(value, SECRETS)
    assert json.dumps("s3cr")[1:-1] not in text
    assert from_saved(text, SECRETS) == value


def test_a_marked_secret_that_is_gone_is_stars() -> None:
    assert from_saved(to_saved(["a" + SECRETS["KEY"]], SECRETS), {}) == ["a***"]


def test_nobody_gets_a_secret_by_sending_its_mark(tmp_path: Path) -> None:
    assert from_saved(to_saved("\0KEY;", {"KEY": "hidden"}), {"KEY": "hidden"}) == "\0KEY;"


def test_a_step_output_with_a_secret_is_marked_on_disk_and_whole_in_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_KEY", "verysecretvalue")
    clock, seen = FakeClock(), []
    tree = steps(
        python(lambda context: "Bearer " + context.secrets["TEST_KEY"], "token"),
        {"name": "w", "wait": 60},
        python(lambda context: seen.append(context.steps["token"]), "use"),
        response={"body": "done"},
    )
    with serving(tmp_path, {"f": tree}, clock, secrets="TEST_KEY") as app:
        job = app.submit("f")
        until(lambda: app.engine.queue.counts()["waiting"] == 1)
        with closing(sqlite3.connect(crash(app, tmp_path, "copy.db"))) as copy:
            dump = "\n".join(copy.iterdump())
        assert "verysecretvalue" not in dump and "Bearer" in dump
    with serving(tmp_path, {"f": tree}, clock, secrets="TEST_KEY") as app:
        clock.tick(61)
        app.housekeeper.wake()
        assert app.wait(job.id, 10).status is Status.COMPLETED
        assert "verysecretvalue" not in str(app.store.trace(job.key))
    assert seen == ["Bearer verysecretvalue"]
