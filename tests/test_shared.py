"""Two servers on one PostgreSQL, in one process: what one does is seen, and can be changed, through the other.

What needs real processes, which are killed and stopped, is in test_nodes.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from nodes import Cluster, database_name
from support import Client, get_flow, until

from astera_lite import (
    AsteraLite,
    ConfigError,
    JobKey,
    JobKeys,
    Server,
    Settings,
    StoreError,
)

TOKEN = "t0ken-of-the-admin"
HELLO = get_flow("/hello", response={"body": "hello"})
WAITING = get_flow("/waiting", steps=[{"name": "w", "wait": 60}])


class Gate:
    """A step that runs until it is told to end; `begun` counts its runs."""

    def __init__(self) -> None:
        self.begun, self.open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, context: Any) -> int:
        self.begun.release()
        while not self.open.acquire(timeout=0.02):
            if context.cancelled:
                return 0
        return 1


class Two(NamedTuple):
    """The servers, a client of each, and the gate that their flows `gate` and `one` wait at."""

    apps: tuple[AsteraLite, AsteraLite]
    clients: tuple[Client, Client]
    gate: Gate


def ended(client: Client, accepted: Any) -> dict[str, Any]:
    """The status document of a finished job, by polls of this client's server, whichever accepted the job."""
    for _ in range(4):
        path = f"/api/jobs/{accepted.json()['id']}/status"
        document: dict[str, Any] = client.get(path, headers={"Prefer": "wait=10"}).json()
        if document["status"] != "Running":
            return document
    raise AssertionError("the job does not finish")


_count = iter(range(1 << 30))


@pytest.fixture
def url(cluster: Cluster) -> str:
    return cluster.create(f"shared-{next(_count)}")


def serving(stack: ExitStack, url: str, name: str, gate: Gate, folder: Path, **settings: Any) -> tuple[Any, Client]:
    folder.mkdir(exist_ok=True)
    more = {"flows": str(folder), "token": TOKEN, "port": 0, "shutdown_timeout": 5, "workers": 4}
    app = AsteraLite(database=url, node=name, **more | settings)
    stack.enter_context(app)
    step = {"name": "g", "python": {"call": gate}}
    app.deploy("gate", get_flow("/gate", steps=[step], response={"body": "${g}"}))
    app.deploy("one", get_flow("/one", steps=[step], concurrency=1))
    app.deploy("full", get_flow("/full", steps=[step], concurrency={"limit": 1, "whenFull": "refuse"}))
    app.deploy("waiting", WAITING)
    client = Client(stack.enter_context(Server(app)))
    client.session.headers["Authorization"] = f"Bearer {TOKEN}"
    stack.callback(client.session.close)
    return app, client


@pytest.fixture
def two(url: str, tmp_path: Path) -> Iterator[Two]:
    gate = Gate()
    with ExitStack() as stack:
        found = [serving(stack, url, name, gate, tmp_path / name) for name in ("a", "b")]
        stack.callback(lambda: [gate.open.release() for _ in range(50)])
        yield Two((found[0][0], found[1][0]), (found[0][1], found[1][1]), gate)


def test_a_job_is_polled_and_fetched_through_another_server(two: Two) -> None:
    a, b = two.clients
    accepted = a.get("/api/publishingAsync/gate")
    assert two.gate.begun.acquire(timeout=10)
    path = f"/api/jobs/{accepted.json()['id']}"
    assert b.get(f"{path}/status").json()["status"] == "Running"
    assert b.get(f"{path}/result").status_code == 202
    polling = threading.Thread(target=lambda: got.append(b.get(f"{path}/status", headers={"Prefer": "wait=20"}).json()))
    got: list[dict[str, Any]] = []
    polling.start()
    two.gate.open.release()
    polling.join(15)
    assert got[0]["status"] == "Completed"
    assert b.get(f"{path}/result").json() == 1
    again = b.post(f"{path}/rerun")
    assert again.status_code == 202 and two.gate.begun.acquire(timeout=10)
    two.gate.open.release()
    assert ended(a, again)["status"] == "Completed"
    assert b("DELETE", path).status_code == 204
    assert a.get(f"{path}/status").status_code == 404


def test_an_idempotency_key_counts_on_all_servers(two: Two) -> None:
    a, b = two.clients
    first = a.get("/api/publishingAsync/waiting", headers={"Idempotency-Key": "k"})
    again = b.get("/api/publishingAsync/waiting", headers={"Idempotency-Key": "k"})
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (202, "true")
    assert again.json()["id"] == first.json()["id"]
    other = b.get("/api/publishingAsync/waiting?x=1", headers={"Idempotency-Key": "k"})
    assert other.status_code == 422
    now = b.get("/api/publishingAsync/waiting", headers={"Idempotency-Key": "k", "Prefer": "wait=0"})
    assert (now.status_code, now.json()["id"]) == (202, first.json()["id"])


@pytest.mark.parametrize("path", ["/gate", "/waiting"])
def test_a_job_is_cancelled_through_another_server(two: Two, path: str) -> None:
    a, b = two.clients
    job = a.get(f"/api/publishingAsync{path}").json()["id"]
    if path == "/gate":
        assert two.gate.begun.acquire(timeout=10)
    else:
        until(lambda: two.apps[0].engine.queue.counts()["waiting"])
    answer = b.post(f"/api/jobs/{job}/cancel")
    assert answer.status_code == 200, answer.text
    assert (answer.json()["status"], answer.json()["error"]["code"]) == ("Error", "cancelled")
    late = b.post(f"/api/jobs/{job}/cancel")
    assert (late.status_code, late.headers["Job-Status"]) == (409, "Error")
    assert a.get(f"/api/jobs/{job}/status").json()["error"]["code"] == "cancelled"


def test_an_embedding_program_cancels_a_job_of_another_server(two: Two) -> None:
    a, b = two.apps
    job = a.submit("gate")
    assert two.gate.begun.acquire(timeout=10)
    assert b.cancel(job.id)
    error = b.wait(job.id, 10).error
    assert error is not None and error["code"] == "cancelled"


def test_jobs_that_one_server_has_no_room_for_are_run_by_the_others(two: Two) -> None:
    a, b = two.clients
    accepted = [a.get("/api/publishingAsync/gate") for _ in range(30)]
    for _ in range(8):  # four threads of each
        assert two.gate.begun.acquire(timeout=10)
    assert two.apps[0].engine.queue.busy == two.apps[1].engine.queue.busy == 4
    for _ in accepted:
        two.gate.open.release()
    assert {ended(b, one)["status"] for one in accepted} == {"Completed"}
    ids = [JobKey.parse(one.json()["id"]) for one in accepted]
    assert {key.seq % 64 for key in ids if key} == {two.apps[0].store.node}


def test_a_server_that_stops_leaves_at_once_what_it_has_not_begun(two: Two) -> None:
    a, b = two.clients
    accepted = [a.get("/api/publishingAsync/gate") for _ in range(4)]
    for _ in accepted:
        assert two.gate.begun.acquire(timeout=10)
    accepted += [a.get("/api/publishingAsync/gate") for _ in range(4)]  # they wait for a thread of the same server
    assert two.apps[0].engine.queue.queued == 4
    stopping = threading.Thread(target=two.apps[0].stop)
    stopping.start()
    for _ in range(4):
        assert two.gate.begun.acquire(timeout=10)
    assert two.apps[0].engine.queue.busy == two.apps[1].engine.queue.busy == 4
    for _ in accepted:
        two.gate.open.release()
    stopping.join(20)
    assert {(document["status"], document["attempt"]) for document in (ended(b, one) for one in accepted)} == {
        ("Completed", 1)
    }


def test_a_limit_of_a_flow_counts_the_jobs_of_all_servers(two: Two) -> None:
    a, b = two.clients
    accepted = [client.get("/api/publishingAsync/one") for client in (a, b) * 3]
    for _ in accepted:
        assert two.gate.begun.acquire(timeout=10)
        assert sum(app.engine.queue.counts()["running"] for app in two.apps) == 1
        assert not two.gate.begun.acquire(timeout=0.1)
        two.gate.open.release()
    assert {ended(b, one)["status"] for one in accepted} == {"Completed"}
    until(lambda: not any(app.engine.queue.entries for app in two.apps))  # none counts where it does not run


def test_a_flow_that_is_full_refuses_on_all_servers(two: Two) -> None:
    a, b = two.clients
    accepted = a.get("/api/publishingAsync/full")
    assert two.gate.begun.acquire(timeout=10)
    for client in (a, b):
        refused = client.get("/api/publishingAsync/full")
        assert refused.status_code == 429, refused.text
        assert int(refused.headers["Retry-After"]) >= 1
    two.gate.open.release()
    assert ended(b, accepted)["status"] == "Completed"
    assert b.get("/api/publishingAsync/full").status_code == 202


def test_a_job_of_a_limited_flow_leaves_its_place_while_it_waits(two: Two) -> None:
    nap = get_flow("/nap", steps=[{"name": "w", "wait": 2}, {"name": "s", "set": 1}], concurrency=1)
    for app in two.apps:
        app.deploy("nap", nap)
    a, b = two.clients
    accepted = [client.get("/api/publishingAsync/nap") for client in (a, b, a)]
    for one in accepted:
        key = JobKey.parse(one.json()["id"])
        assert key is not None
        until(lambda key=key: (job := two.apps[0].store.get(key)) is not None and job.due is not None)
    assert [app.engine.queue.counts()["waiting"] for app in two.apps] == [0, 0]  # they wait in the database
    assert {ended(b, one)["status"] for one in accepted} == {"Completed"}


@pytest.mark.parametrize("later", [{}, {"concurrency": 1}], ids=["no limit any more", "a limit by now"])
def test_the_limit_in_service_says_whether_a_job_leaves_its_server_while_it_waits(
    two: Two, later: dict[str, Any]
) -> None:
    before: dict[str, Any] = {} if later else {"concurrency": 1}
    steps = [{"name": "g", "python": {"call": two.gate}}, {"name": "w", "wait": 60}]
    for limit in (before, later):
        for app in two.apps:
            app.deploy("nap", get_flow("/nap", steps=steps, **limit))
        if limit is before:
            accepted = two.clients[0].get("/api/publishingAsync/nap")
            assert two.gate.begun.acquire(timeout=10)
    key = JobKey.parse(accepted.json()["id"])
    [queue] = [app.engine.queue for app in two.apps if app.engine.queue.busy]
    two.gate.open.release()
    if later:
        until(lambda: key is not None and key.seq not in queue)  # it waits in the database
    else:
        until(lambda: queue.counts()["waiting"] == 1)


def test_what_waits_in_the_database_counts_for_the_queue_of_each_server(url: str, tmp_path: Path) -> None:
    gate = Gate()
    with ExitStack() as stack:
        found = [serving(stack, url, name, gate, tmp_path / name, workers=1, max_queue=10) for name in ("a", "b")]
        stack.callback(lambda: [gate.open.release() for _ in range(100)])
        for _, client in found:
            until(lambda client=client: client.get("/api/publishingAsync/gate").status_code == 503)
        assert int(found[0][1].get("/api/publishingAsync/gate").headers["Retry-After"]) >= 1


def test_a_deployment_reaches_all_servers_and_wins_over_a_file(two: Two) -> None:
    a, b = two.clients
    assert a("PUT", "/api/deployments/hello", json=HELLO).status_code == 201
    until(lambda: b.get("/api/publishing/hello").status_code == 200)
    assert a("PUT", "/api/deployments/hello", json=HELLO | {"description": "x"}).status_code == 200
    until(lambda: b.get("/api/deployments/hello").json()["description"] == "x")
    (Path(two.apps[1].settings.flows) / "hello.json").write_text('{"request": {"method": "GET", "resource": "/other"}}')
    two.apps[1].deployer.reload()
    assert b.get("/api/deployments/hello").json()["resource"] == "/hello"
    assert b("DELETE", "/api/deployments/hello").status_code == 204
    until(lambda: a.get("/api/publishing/hello").status_code == 404)
    assert b.get("/api/deployments/hello").json()["resource"] == "/other"
    refused = b("DELETE", "/api/deployments/hello")
    assert refused.status_code == 409
    assert "delete hello.json there, on each server that has it" in refused.json()["detail"]
    assert b("DELETE", "/api/deployments/nothing").status_code == 404
    assert a("PUT", "/api/deployments/gate", json=HELLO).status_code == 409  # the program's own


def test_a_deployment_that_is_deleted_while_the_news_is_read_stays_deleted(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    app, client = two.apps[0], two.clients[0]
    assert client("PUT", "/api/deployments/hello", json=HELLO).status_code == 201
    deployed, has_read, go_on = app.store.deployed, threading.Event(), threading.Event()
    assert app.node is not None
    reader = threading.Thread(target=app.node.read_flows)

    def held() -> Any:
        rows = deployed()
        if threading.current_thread() is reader and not has_read.is_set():
            has_read.set()
            assert go_on.wait(10)
        return rows

    monkeypatch.setattr(app.store, "deployed", held)
    reader.start()
    assert has_read.wait(10)
    assert client("DELETE", "/api/deployments/hello").status_code == 204
    go_on.set()
    reader.join(10)
    assert client.get("/api/deployments/hello").status_code == 404


def test_a_faulty_deployment_is_refused_and_known_by_its_tag(two: Two) -> None:
    a, b = two.clients
    assert a("PUT", "/api/deployments/hello", json={"request": 1}).status_code == 400
    only_new = {"If-None-Match": "*"}
    assert a("PUT", "/api/deployments/hello", json=HELLO, headers=only_new).status_code == 201
    until(lambda: b.get("/api/deployments/hello").status_code == 200)
    assert b("PUT", "/api/deployments/hello", json=HELLO, headers=only_new).status_code == 412


def test_health_and_metrics_tell_of_the_servers(two: Two) -> None:
    a, b = two.clients
    for name, client in (("a", a), ("b", b)):
        until(lambda client=client: len(client.get("/health").json()["nodes"]) == 2)
        found = client.get("/health").json()
        assert found["node"] == name
        assert {node["name"]: node["self"] for node in found["nodes"]} == {"a": name == "a", "b": name == "b"}
        assert all(0 < node["leaseLeftMs"] <= 15_000 for node in found["nodes"])
        text = client.get("/metrics").text
        assert f'astera_node_info{{node="{name}"}} 1\n' in text
        assert "astera_nodes 2\n" in text
    del a.session.headers["Authorization"]
    assert a.get("/health").json().keys().isdisjoint({"node", "nodes"})


def test_progress_is_shown_by_another_server(url: str, tmp_path: Path) -> None:
    gate = Gate()

    def far(context: Any) -> None:
        context.progress(1, 3)
        gate(context)

    flow = get_flow("/far", steps=[{"name": "f", "python": {"call": far}}])
    with ExitStack() as stack:
        found = [serving(stack, url, name, gate, tmp_path / name, lease="2s") for name in ("a", "b")]
        stack.callback(gate.open.release)
        found[0][0].deploy("far", flow)
        job = found[0][1].get("/api/publishingAsync/far").json()["id"]
        assert gate.begun.acquire(timeout=10)
        path = f"/api/jobs/{job}/status"
        until(lambda: found[1][1].get(path).json()["progress"] == {"step": "f", "done": 1, "total": 3})


def test_a_server_that_was_buried_leaves_its_jobs_to_the_others(two: Two, cluster: Cluster, url: str) -> None:
    a, b = two.clients
    job = a.get("/api/publishingAsync/gate")
    assert two.gate.begun.acquire(timeout=10)
    number = two.apps[0].store.node
    database = urlsplit(url).path[1:]
    cluster.query("DELETE FROM nodes WHERE number = %s", number, database=database)
    assert two.gate.begun.acquire(timeout=20)  # its second run, on either server
    for _ in range(2):  # the first run may still go on, and what it returns is not stored
        two.gate.open.release()
    assert ended(b, job)["attempt"] == 2


def test_a_job_that_was_taken_since_a_lost_lease_is_not_dropped(two: Two) -> None:
    job = two.clients[0].get("/api/publishingAsync/gate")
    assert two.gate.begun.acquire(timeout=10)
    two.apps[0].node.abandon()  # late: the job has the number that the server has now
    two.gate.open.release()
    document = ended(two.clients[1], job)
    assert (document["status"], document["attempt"]) == ("Completed", 1)


def test_flows_that_could_not_be_read_are_read_again(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    a, failed = two.apps[0], threading.Event()
    reload = a.deployer.reload

    def fail() -> None:
        monkeypatch.setattr(a.deployer, "reload", reload)
        failed.set()
        raise OSError("the folder cannot be read")

    monkeypatch.setattr(a.deployer, "reload", fail)
    assert two.clients[1]("PUT", "/api/deployments/hello", json=HELLO).status_code == 201
    assert failed.wait(10)
    until(lambda: two.clients[0].get("/api/publishing/hello").status_code == 200)


def test_a_job_that_is_to_be_cancelled_is_not_run_by_the_server_that_claims_it(
    two: Two, cluster: Cluster, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise StoreError("cut")

    for app in two.apps:  # neither finds the job by its look for jobs to cancel
        monkeypatch.setattr(app.store, "cancelled", fail)
    # each new job is to be cancelled, as if the server that was asked had died then
    cluster.query("ALTER TABLE jobs ALTER cancel SET DEFAULT true", database=database_name(url))
    accepted = two.clients[0].get("/api/publishingAsync/one")  # any server may claim it: its flow's limit counts on all
    assert ended(two.clients[1], accepted)["error"]["code"] == "cancelled"
    assert not two.gate.begun.acquire(blocking=False)


def test_the_time_is_that_of_the_database(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        app, client = serving(stack, url, "a", Gate(), tmp_path / "a")
        now = app.store.now()
        monkeypatch.setattr("time.time_ns", lambda: 1_000_000_000_000_000_000)
        app.housekeeper.look_at_clock()
        assert abs(app.clock.now() - now) < 60_000
        assert app.clock.wall() - app.clock.now() < 1000
        created = client.get("/api/publishingAsync/waiting").json()["createdAt"]
        assert not created.startswith("2001")


def test_keys_of_servers_are_never_the_same() -> None:
    keys = [JobKeys(4711, node, 64) for node in (0, 5, 63)]
    made = [keys[n % 3].new(1_790_000_000_000 + n // 100).seq for n in range(3000)]
    assert len(set(made)) == 3000
    assert {seq % 64 for seq in made} == {0, 5, 63}
    assert all(made[n::3] == sorted(made[n::3]) for n in range(3))
    assert JobKeys(1 << 59, 7, 64).new(0).seq > 1 << 59


def test_the_settings_of_servers() -> None:
    assert (Settings().lease, Settings().node) == (15.0, None)
    with pytest.raises(ConfigError, match="must be at least 2s"):
        Settings.load(lease="1s")
