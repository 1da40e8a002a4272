"""What is PostgresStore's own: whose a job is, several servers on one database, and what becomes of a lost one."""

from __future__ import annotations

import math
import queue
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import pytest
from nodes import Cluster, Proxy, database_name, database_url
from support import ROOT, get_flow, until
from test_store import T, done, finish, job, submission

import astera_lite_postgres
from astera_lite import (
    PIECE,
    Attempt,
    Busy,
    Conflict,
    Flow,
    Job,
    JobKey,
    NotFound,
    Progress,
    Status,
    StoreError,
    Token,
    build_flow,
)
from astera_lite_database import edit_tokens
from astera_lite_postgres import PostgresReader, PostgresStore

Open = Callable[..., PostgresStore]
FLOWS = {"f": None}


@pytest.fixture
def url(cluster: Cluster, request: pytest.FixtureRequest) -> str:
    return cluster.create(f"own-{abs(hash(request.node.name)) % 10**12}")


@pytest.fixture
def open_store(url: str) -> Iterator[Open]:
    """Opens stores on one database; they are closed at the end."""
    with ExitStack() as stack:
        yield lambda **more: stack.enter_context(closing(PostgresStore(url, **more)))


@pytest.fixture
def store(open_store: Open) -> PostgresStore:
    return open_store(name="a")


def look(url: str, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(sql, values or None)  # type: ignore[call-overload]
        return list(cursor) if cursor.description else []


def add(store: PostgresStore, owned: bool = True, limit: int | None = None, key: str | None = None, **more: Any) -> Job:
    new = job(**more)
    answer = done(store.add, submission(new, key=key)._replace(owned=owned, limit=limit))
    assert answer == new
    return new


def told(store: PostgresStore, **progress: Any) -> queue.SimpleQueue[str]:
    words: queue.SimpleQueue[str] = queue.SimpleQueue()
    store.open(words.put, lambda: progress)
    return words


def claimed(store: PostgresStore, limit: int = 10, flows: Any = FLOWS, held: Any = ()) -> list[int]:
    return [each.seq for each in store.claim(held, limit, flows)]


def bury(url: str, store: PostgresStore) -> None:
    """As if the lease had run out while another server looked."""
    look(url, "DELETE FROM nodes WHERE start = %s", store._start)


# ---- Whose a job is --------------------------------------------------------------------------------------------------


def test_a_job_is_its_acceptors_or_whoever_claims_it(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    owned, free, of_nobody = add(one), [add(one, owned=False).key.seq for _ in range(5)], add(one, False, flow="g")
    assert claimed(other, 2) == free[:2]
    assert claimed(one, 2) == free[2:4]
    assert claimed(other) == free[4:]
    assert claimed(one) == claimed(other) == []
    assert claimed(other, flows={"g": None, "f": None}) == [of_nobody.key.seq]
    assert done(other.start, owned.key, 1, T) is False
    assert done(one.start, owned.key, 1, T) is True
    one._free_at = other._free_at = 0.0  # the next look counts
    wanted = [("a", 0, 3, True), ("b", 1, 4, False)]
    until(lambda: [(node["name"], node["number"], node["jobs"], node["self"]) for node in one.members()] == wanted)


def test_many_servers_claim_each_job_once(open_store: Open) -> None:
    stores = [open_store(name=str(n)) for n in range(4)]
    jobs = {add(stores[0], owned=False).key.seq for _ in range(200)}
    with ThreadPoolExecutor(4) as pool:
        found = [list(pool.map(lambda store: claimed(store, 10), stores)) for _ in range(6)]
    taken = [seq for some in found for part in some for seq in part]
    assert sorted(taken) == sorted(jobs)


def test_what_a_run_writes_is_fenced_by_the_owner(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    new = add(one)
    assert done(one.start, new.key, 1, T) is True
    lost = told(one)
    before = one._start
    bury(url, one)
    assert claimed(other) == [new.key.seq]
    assert done(other.start, new.key, 2, T) is True
    suspended = new._replace(attempt=2, started=T, due=T + 5)
    for late in (
        (one.save_step, new.key, 2, "a", "1"),
        (one.suspend, suspended, "w", T, "[]", False),
        (one.finish, finish(new, attempt=2, fenced=False)),
        (one.start, new.key, 2, T),
    ):
        assert done(*late) is False, late
    one.requeue(new.key, 2)
    done(one.find_key, "", "", "", b"", 0)
    assert one.get(new.key) == new._replace(attempt=2, started=T)
    assert look(url, "SELECT count(*) FROM steps") == [(0,)]
    one._renew_at = 0.0  # as a refused write tells it: the lease is looked at before it is due
    while lost.get(timeout=10) != "lost":
        pass
    assert one._start > before
    assert done(other.finish, finish(new, attempt=2)) is True


def test_a_job_that_is_claimed_again_after_a_loss_is_not_written_by_the_run_before(open_store: Open, url: str) -> None:
    store = open_store(name="a")
    new, words = add(store), told(store)
    bury(url, store)
    store._renew_at = 0.0
    while words.get(timeout=10) != "lost":
        pass
    assert done(store.finish, finish(new)) is False
    assert claimed(store) == [new.key.seq]
    assert done(store.finish, finish(new)) is True


def test_what_is_taken_after_a_loss_is_told_from_what_was_lost(open_store: Open, url: str) -> None:
    store = open_store(name="a")
    old, words = add(store), told(store)
    assert store.owns(old.key.seq)
    bury(url, store)
    store._renew_at = 0.0
    while words.get(timeout=10) != "lost":
        pass
    new, free = add(store), add(store, owned=False)
    assert claimed(store, held={old.key.seq}) == [old.key.seq, free.key.seq]
    assert [store.owns(each.key.seq) for each in (old, new, free)] == [False, True, True]  # the first run goes on
    for each in (new, free):
        assert done(store.finish, finish(each)) is True
    assert store._mine == {}


def test_a_lease_that_runs_out_frees_the_jobs_and_others_hear_of_it(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b", lease=1)
    new, words = add(one), told(other)
    one._end.set()  # its thread renews no more
    one._follower.join()
    look(url, "UPDATE nodes SET lease_until = now() WHERE start = %s", one._start)
    until(lambda: words.get(timeout=10) == "jobs" and claimed(other) == [new.key.seq])
    assert [node["name"] for node in other.members()] == ["b"]


def test_an_orderly_stop_leaves_jobs_to_others_at_once(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    runs, waits = add(one), add(one)
    done(one.start, runs.key, 1, T)
    words = told(other)
    one.requeue(runs.key, 1)
    one.close()
    while words.get(timeout=10) != "jobs":
        pass
    assert claimed(other) == [runs.key.seq, waits.key.seq]
    found = other.get(runs.key)
    assert found is not None and (found.attempt, found.started) == (0, T)


def test_what_a_server_leaves_that_stops_is_found_at_once_however_old(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    old = add(one)
    young = job()._replace(key=JobKey(old.key.seq + (60_000 << 12), 1))
    assert done(one.add, submission(young)) == young
    until(lambda: other._free_from > old.key.seq)  # it looks no longer at what is as old
    words = told(other)
    one.release([old.key.seq])
    while words.get(timeout=10) != "jobs" or claimed(other) != [old.key.seq]:
        pass


def test_what_a_start_frees_is_found_at_once_however_old(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    old = add(one)
    young = job()._replace(key=JobKey(old.key.seq + (60_000 << 12), 1))
    assert done(other.add, submission(young)) == young
    one._end.set()  # its thread renews no more
    one._follower.join()
    other._bury_at = math.inf  # the start comes first
    until(lambda: other._free_from > old.key.seq)
    words = told(other)
    look(url, "UPDATE nodes SET lease_until = now() WHERE start = %s", one._start)
    open_store(name="c", lease=1)
    while words.get(timeout=10) != "jobs" or claimed(other) != [old.key.seq]:
        pass


def test_numbers_are_the_smallest_that_are_free(open_store: Open) -> None:
    stores = [open_store() for _ in range(3)]
    assert [store.node for store in stores] == [0, 1, 2]
    stores[1].close()
    assert [open_store().node for _ in range(2)] == [1, 3]


def test_an_id_that_another_server_has_made_is_refused_for_a_moment(open_store: Open) -> None:
    # by a server that makes ids with a number that it has lost with its lease
    stores, new = [open_store(name=name) for name in "ab"], job()
    assert done(stores[0].add, submission(new)) == new
    with pytest.raises(Busy, match="try again"):
        done(stores[1].add, submission(new))
    assert stores[1].fault is None


def test_more_servers_than_numbers_are_refused(store: PostgresStore, url: str) -> None:
    store._end.set()  # it looks for servers that are gone no more
    store._follower.join()
    look(url, "INSERT INTO nodes (number, name, lease_until) SELECT n, '', now() + '1h' FROM generate_series(1, 63) n")
    with pytest.raises(StoreError, match="64 servers use this database, which is as many as can: stop one"):
        PostgresStore(url)
    look(url, "UPDATE nodes SET lease_until = now() - interval '1s' WHERE number > 0")
    with pytest.raises(StoreError, match="64 servers"):  # the database started less than a lease ago
        PostgresStore(url, lease=10**6)
    PostgresStore(url, lease=0.1).close()


def test_a_server_that_was_alone_tells_one_that_came_later(cluster: Cluster) -> None:
    """It tells of a change at once, not only after its next renewal of the lease (20 minutes away here)."""
    url = cluster.create("test-came-later")
    met: queue.Queue[str] = queue.Queue()
    heard: queue.Queue[str] = queue.Queue()
    with closing(PostgresStore(url, lease=3600)) as first:
        first.open(met.put, dict)
        for _ in range(5):  # all that it may have missed before it listened
            met.get(timeout=10)
        with closing(PostgresStore(url, lease=3600)) as second:
            sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'DELETE%%SKIP LOCKED%%' AND datname = %s"
            until(lambda: cluster.query(sql, database_name(url)) == [(2,)])  # looked already
            second.open(heard.put, dict)
            for _ in range(5):
                heard.get(timeout=10)
            first.close()
            assert heard.get(timeout=10) == "jobs"


# ---- Limits ----------------------------------------------------------------------------------------------------------


def limited(limit: int, when_full: str = "queue", name: str = "f") -> Flow:
    rule = {"limit": limit, "whenFull": when_full}
    return build_flow({**get_flow("/f"), "concurrency": rule}, name)


def entered(store: PostgresStore, number: int, flow: Flow) -> queue.SimpleQueue[Any]:
    """What a call is told: None if it may run."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    store.enter_call(number, flow, math.inf, answers.put)
    done(store.find_key, "", "", "", b"", 0)  # what was written before is
    return answers


def test_calls_run_in_their_order_and_share_their_limit_with_jobs(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    flow, limits = limited(2), {"f": 2}
    running = add(one, owned=False).key.seq
    assert claimed(one, flows=limits) == [running]
    add(one, owned=False)
    calls = [entered(store, -n, flow) for n, store in enumerate((one, other, one, other))]
    assert calls[0].get(timeout=10) is None
    done(one.leave_call, -2)  # it waits no longer
    assert claimed(other, flows=limits) == claimed(one, flows=limits) == []
    assert calls[1].empty() and calls[3].empty()
    done(one.leave_call, 0)
    assert calls[1].get(timeout=10) is None
    assert calls[3].empty()
    assert (
        done(
            one.finish, finish(next(each for each in one.page(T, 9, None, None, None, None) if each.key.seq == running))
        )
        is True
    )
    assert calls[3].get(timeout=10) is None
    assert claimed(one, flows=limits) == []
    bury(url, other)
    assert len(claimed(one, flows=limits)) == 1
    assert look(url, "SELECT count(*) FROM calls") == [(0,)]
    assert calls[2].empty()


def test_a_call_that_waits_is_refused_where_its_server_lost_its_lease(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    flow = limited(1)
    assert entered(other, -1, flow).get(timeout=10) is None
    waiting = entered(one, -1, flow)
    bury(url, one)
    assert isinstance(waiting.get(timeout=10), Busy | StoreError)
    again = entered(one, -2, flow)
    done(other.leave_call, -1)
    assert again.get(timeout=10) is None


def test_a_flow_that_refuses_counts_calls_and_jobs(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    flow = limited(2, "refuse")
    add(one, owned=False, limit=2)
    assert entered(one, -1, flow).get(timeout=10) is None
    refused = [entered(other, -1, flow).get(timeout=10)]
    with pytest.raises(Busy) as error:
        done(other.add, submission(job())._replace(owned=False, limit=2))
    assert [each.status for each in (*refused, error.value)] == [429, 429]
    done(one.leave_call, -1)
    assert entered(other, -2, flow).get(timeout=10) is None


def test_a_limit_counts_over_all_servers(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    jobs = [add(one, owned=False) for _ in range(5)]
    seqs = [each.key.seq for each in jobs]
    limit = {"f": 3, "g": None}
    assert claimed(one, 2, limit) == seqs[:2]
    assert claimed(other, 10, limit) == seqs[2:3]
    assert claimed(one, 10, limit) == []
    assert done(one.finish, finish(jobs[0])) is True
    assert claimed(other, 10, limit) == seqs[3:4]
    waiting = jobs[2]._replace(attempt=1, started=T, due=T + 5)
    assert done(other.suspend, waiting, "w", T + 5, "[]", True) is True  # it is due
    assert sorted(claimed(one, 10, limit)) in ([seqs[2]], [seqs[4]])
    assert claimed(one, 10, limit) == []


def test_a_flow_that_refuses_when_full_refuses_over_all_servers(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    with ThreadPoolExecutor(2) as pool:

        def submit(store: PostgresStore) -> Any:
            try:
                return done(store.add, submission(job())._replace(owned=False, limit=3))
            except Busy as error:
                return error

        answers = list(pool.map(submit, [one, other] * 5))
    assert [type(answer) for answer in answers].count(Job) == 3
    assert {answer.status for answer in answers if isinstance(answer, Busy)} == {429}
    assert len(one.page(T, 100, None, None, None, None)) == 3
    known = done(one.add, submission(job("g"), key="k")._replace(owned=False, limit=1))
    replayed = done(other.add, submission(job("g"), key="k")._replace(owned=False, limit=1))
    assert replayed == known  # although the flow is full


# ---- Lost and found --------------------------------------------------------------------------------------------------


def test_a_job_that_is_owned_and_not_known_is_found_at_the_second_look(store: PostgresStore) -> None:
    lost, known = add(store), add(store)
    held = {known.key.seq}
    assert claimed(store, held=held) == []
    store._orphans_at = 0.0
    assert claimed(store, held=held) == [lost.key.seq]
    store._orphans_at = 0.0
    assert claimed(store, held={*held, lost.key.seq}) == []


def test_a_job_of_a_flow_that_nobody_has_is_taken_after_an_hour(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    strange = add(store, owned=False, flow="strange")
    assert claimed(store) == []
    store._orphans_at, store._strange = 0.0, {seq: since - 3601 for seq, since in store._strange.items()}
    assert claimed(store) == [strange.key.seq]


def test_a_job_whose_time_has_come_and_whose_flow_nobody_has_is_taken_after_an_hour(
    store: PostgresStore, url: str
) -> None:
    waiting, later = add(store, owned=False, flow="strange"), add(store, owned=False, flow="strange")
    for each, due in ((waiting, T), (later, 1 << 50)):
        look(url, "UPDATE jobs SET due = %s WHERE seq = %s", due, each.key.seq)
    assert claimed(store) == []
    store._orphans_at, store._strange = 0.0, {seq: since - 3601 for seq, since in store._strange.items()}
    assert claimed(store) == [waiting.key.seq]


def test_a_job_is_left_to_a_living_server_that_serves_its_flow(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    add(one, owned=False, flow="rare")
    assert claimed(other, limit=0, flows={"rare": 1}) == []
    other._renew_at = 0.0
    until(lambda: look(url, "SELECT flows FROM nodes WHERE name = 'b'") == [('["rare"]',)])
    assert (claimed(one), one._strange) == ([], {})


def test_a_cancel_reaches_the_owner(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    owned, free, ended = add(one), add(one, owned=False), add(one)
    done(one.finish, finish(ended))
    words = told(one)
    assert [done(other.ask_cancel, each.key) for each in (owned, free, ended)] == [True, True, False]
    assert done(other.ask_cancel, owned.key._replace(salt=1)) is False
    while words.get(timeout=10) != "cancel":
        pass
    assert [each.key for each in one.cancelled()] == [owned.key]
    assert [each.key for each in other.cancelled()] == [free.key]
    assert done(one.finish, finish(owned)) is True
    assert one.cancelled() == []


def test_a_cancel_of_a_job_that_becomes_free_reaches_whoever_looks(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    add(one, flow="limited", owned=False), add(one)
    [seq] = claimed(one, flows={"limited": 1})
    limited = next(each for each in one.page(T, 9, None, None, None, None) if each.key.seq == seq)
    died = add(other)
    for each in (limited, died):
        assert done(one.ask_cancel, each.key) is True
    waiting = limited._replace(attempt=1, started=T, due=T + 5)
    assert done(one.suspend, waiting, "w", T + 5, "[]", True) is True
    assert [each.key for each in one.cancelled()] == [limited.key]  # it was not set free
    look(url, "UPDATE jobs SET owner = NULL WHERE seq = %s", died.key.seq)  # as if its owner had died
    assert [each.key for each in one.cancelled()] == [limited.key, died.key]


def test_what_was_left_to_any_server_since_the_last_look_is_counted(store: PostgresStore) -> None:
    store._end.set()  # no look any more
    store._follower.join()
    store.queued = 0
    add(store)
    for n in range(1, 4):
        add(store, owned=False)
        assert store.queued == n


def test_progress_is_seen_on_another_server(open_store: Open) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    new = add(one)
    assert other.progress(new.key) is None
    one.open(lambda word: None, lambda: {new.key.seq: Progress("fetch", 1, 3)})
    one._renew_at = 0.0  # the next renewal is now
    until(lambda: other.progress(new.key) == Progress("fetch", 1, 3))


def test_a_callback_is_delivered_by_one_server_and_by_another_when_that_is_gone(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    new = add(one, callback="http://r/x")
    done(one.finish, finish(new, callback=("r:80", "the body"), expires=T + 10**6))

    def due(store: PostgresStore) -> list[JobKey]:
        found = store.claim_deliveries(T + 20, 10, held=(), busy=(), likely=False)
        return [each.key for each, _ in found]

    assert (due(one), due(other), due(one)) == ([new.key], [], [new.key])
    before = one._start
    bury(url, one)
    assert due(other) == [new.key]
    one._renew_at = 0.0
    until(lambda: one._start > before)
    done(other.record_delivery, new.key, Attempt(T, 1, 500, "a\0b"), T + 10, "pending", T + 11)
    assert due(one) == [new.key]
    assert other.attempts(new.key) == [Attempt(T, 1, 500, "ab")]


def test_a_delivery_that_is_recorded_twice_counts_once(store: PostgresStore) -> None:
    new = add(store, callback="http://r/x")
    done(store.finish, finish(new, callback=("r:80", "the body"), expires=T + 10**6))
    for _ in range(2):  # the answer to the first commit was lost
        done(store.record_delivery, new.key, Attempt(T, 1, 500), T + 10, "pending", T + 11)
    assert store.attempts(new.key) == [Attempt(T, 1, 500)]
    found = store.get(new.key)
    assert found is not None and found.callback is not None
    assert (found.callback.attempts, found.callback.next_at) == (1, T + 11)


def test_a_claim_that_breaks_off_brings_what_it_took(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = add(store, owned=False, flow="limited")
    monkeypatch.setattr(astera_lite_postgres, "_ORPHAN_S", 3600)

    def broken(*arguments: Any) -> Any:
        raise StoreError("cut off")

    monkeypatch.setattr(store, "_look_for_lost", broken)
    assert claimed(store, flows={"limited": 1}) == [taken.key.seq]
    store._orphans_at = 0.0
    with pytest.raises(StoreError, match="cut off"):
        claimed(store)


# ---- Keys, texts, deployments, tokens --------------------------------------------------------------------------------


def test_one_key_on_two_servers_is_one_job(open_store: Open) -> None:
    stores = [open_store(name="a"), open_store(name="b")] * 10
    with ThreadPoolExecutor(2) as pool:
        jobs = [job() for _ in stores]
        add = [
            partial(done, store.add, submission(new, b"", "k", b"1")) for store, new in zip(stores, jobs, strict=True)
        ]
        answers = list(pool.map(lambda write: write(), add))
    assert answers == [answers[0]] * 20
    assert answers[0] in jobs
    with pytest.raises(Conflict):
        done(stores[0].add, submission(job(), b"", "k", b"2"))


def test_texts_are_forgotten_when_no_server_has_used_them_for_a_while(store: PostgresStore, url: str) -> None:
    old = add(store)
    add(store, version=8)
    done(store.finish, finish(old))
    done(store.purge, T + 2000, 10)
    for ago, left in (("1 min", [(7,), (8,)]), ("2 h", [(8,)])):
        look(url, f"UPDATE flows SET used = now() - interval '{ago}'")
        store.forget_flows()
        done(store.find_key, "", "", "", b"", 0)
        assert look(url, "SELECT version FROM flows ORDER BY version") == left


def test_a_deployment_and_a_token_are_news(open_store: Open, url: str) -> None:
    one, other = open_store(name="a"), open_store(name="b")
    words = told(other)
    assert done(one.deploy, "f", "{}") is True
    assert done(one.deploy, "f", '{"a": 1}') is True
    assert other.deployed() == [("f", '{"a": 1}')]
    assert done(one.deploy, "f", None) is True
    assert (done(one.deploy, "f", None), other.deployed()) == (False, [])
    edit_tokens(url, "ada", Token("ada", b"x" * 32, "user", frozenset("fg"), T))
    assert [token.flows for token in other.tokens()] == [frozenset("fg")]
    heard = set[str]()
    until(lambda: heard.add(words.get(timeout=10)) or heard >= {"flows", "tokens"})


def test_tokens_are_made_once_and_revoked_once(url: str) -> None:
    token = Token("ada", b"x" * 32, created=T)
    edit_tokens(url, "ada", token)  # makes the tables, too
    with pytest.raises(Conflict, match="there is a token ada already"):
        edit_tokens(url, "ada", token)
    with pytest.raises(NotFound, match='the token adda is not there; did you mean "ada"'):
        edit_tokens(url, "adda")
    edit_tokens(url, "ada")
    with pytest.raises(NotFound, match="was revoked before"):
        edit_tokens(url, "ada")
    with closing(PostgresStore(url)) as store:
        add(store, token="ada")
    with pytest.raises(Conflict, match="jobs of an earlier token ada are still kept"):
        edit_tokens(url, "ada", token)


# ---- The database is away --------------------------------------------------------------------------------------------

_GONE = "INSERT INTO nodes (number, name, lease_until) VALUES (9, 'gone', now() - interval '1s')"
_CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"


def looked(store: PostgresStore) -> None:
    """Wait for a whole look at what is free and who is gone."""
    for _ in range(2):  # the first may be under way
        store._free_at = 0.0
        until(lambda: store._free_at > 0)


def test_who_was_cut_off_does_not_bury_others_before_they_can_be_back(open_store: Open, url: str) -> None:
    import psycopg

    store = open_store(name="a", lease=1)
    words = told(store)
    for _ in range(5):  # it is connected
        words.get(timeout=10)
    store._lease = 100  # of which the database is older: see below
    with psycopg.connect(url) as held:
        held.execute(_GONE)
        held.execute(_CUT, (held.info.backend_pid,))
    for _ in range(5):  # it is connected again
        words.get(timeout=10)
    store._lease = 1
    looked(store)
    assert look(url, "SELECT name FROM nodes ORDER BY name") == [("a",), ("gone",)]
    store._bury_at = 0.0
    until(lambda: look(url, "SELECT name FROM nodes") == [("a",)])


def test_who_was_held_up_for_a_lease_does_not_bury_who_was_held_up_as_long(cluster: Cluster, url: str) -> None:
    """As by a lost standby: nothing fails, and the renewals that were under way come through."""
    with ExitStack() as stack:
        proxies = [stack.enter_context(Proxy(cluster.address)) for _ in "ab"]
        addresses = [database_url([("127.0.0.1", proxy.port)], database_name(url)) for proxy in proxies]
        a, b = (stack.enter_context(closing(PostgresStore(there, lease=3))) for there in addresses)
        starts = [a._start, b._start]
        for store in (a, b):
            told(store)
            until(lambda store=store: store._free_at > 0)  # it has begun to look
        for proxy in proxies:
            proxy.cut("silence")
        until(lambda: look(url, "SELECT bool_and(lease_until < now()) FROM nodes") == [(True,)])
        proxies[0].mend()
        looked(a)
        proxies[1].mend()
        until(b.leased)
        assert look(url, "SELECT start FROM nodes ORDER BY start") == [(start,) for start in starts]


def test_a_lock_on_jobs_does_not_cost_the_lease(open_store: Open, url: str) -> None:
    import psycopg

    store = open_store(name="a", lease=3)
    told(store)
    with psycopg.connect(url) as held:
        held.execute("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        (began,) = held.execute("SELECT now()").fetchone() or ()

        def is_over() -> bool:
            sql = "SELECT lease_until > now(), now() > %s + interval '5 s' FROM nodes WHERE start = %s"
            [(lives, over)] = look(url, sql, began, store._start)
            assert lives
            return bool(over)

        until(is_over)


def test_a_loss_is_told_although_what_follows_it_fails(
    store: PostgresStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, keep_time, start = told(store), store._keep_time, store._start

    def cut_off(db: Any) -> None:
        if store._start != start:
            monkeypatch.setattr(store, "_keep_time", keep_time)
            raise StoreError("cut off")
        keep_time(db)

    monkeypatch.setattr(store, "_keep_time", cut_off)
    bury(url, store)
    store._renew_at = 0.0
    while words.get(timeout=10) != "lost":
        pass


def test_a_lost_connection_is_made_again_and_ends_are_kept(open_store: Open, url: str, cluster: Cluster) -> None:
    store = open_store(name="a")
    new = add(store)
    name = url.partition("/own")[2].partition("?")[0]
    look(cluster.url("postgres"), f'ALTER DATABASE "own{name}" ALLOW_CONNECTIONS false')
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
    look(cluster.url("postgres"), end, f"own{name}")
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    store.finish(finish(new), lambda result, error: answers.put((result, error)))
    until(lambda: store.fault)
    with pytest.raises(StoreError) as refused:
        done(store.add, submission(job()))
    assert name not in f"{store.fault} {refused.value}"
    assert answers.empty()
    look(cluster.url("postgres"), f'ALTER DATABASE "own{name}" ALLOW_CONNECTIONS true')
    assert answers.get(timeout=20) == (True, None)
    until(lambda: store.fault is None)
    assert store.get(new.key) is not None
    add(store)


def test_an_end_that_was_committed_when_the_connection_was_lost_is_an_end(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    new, transact, lost = add(store), store._transact, threading.Event()

    def committed_unheard(batch: Any) -> Any:
        results = transact(batch)
        if not lost.is_set():
            lost.set()
            raise psycopg.OperationalError("the server closed the connection")
        return results

    monkeypatch.setattr(store, "_transact", committed_unheard)
    assert done(store.finish, finish(new)) is True
    assert lost.is_set() and store.fault is None


def test_a_read_is_sent_again_where_the_connections_have_died_meanwhile(store: PostgresStore, url: str) -> None:
    new = add(store)
    with store._reading(), store._reading():
        pass
    look(url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
              " AND pid <> pg_backend_pid()")  # fmt: skip
    assert store.get(new.key) == new


def test_a_read_only_database_keeps_ends_and_refuses_jobs(store: PostgresStore, url: str) -> None:
    new = add(store)
    store._db.execute("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY")
    store._db.commit()
    with pytest.raises(StoreError, match="the database is read-only"):
        done(store.add, submission(job()))
    assert done(store.finish, finish(new)) is True  # on a new connection
    free = add(store, owned=False)
    with store._reading() as db:
        db.execute("SET default_transaction_read_only = on")
    with pytest.raises(StoreError, match="the database is read-only"):
        claimed(store)
    assert claimed(store) == [free.key.seq]


# ---- Opening ---------------------------------------------------------------------------------------------------------


def test_servers_that_start_at_once_make_the_tables_once(url: str) -> None:
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda n: PostgresStore(url, name=str(n)), range(6)))
    assert sorted(store.node for store in stores) == list(range(6))
    for store in stores:
        store.close()
    assert look(url, "SELECT version FROM astera_lite") == [(astera_lite_postgres.SCHEMA_VERSION,)]


@pytest.mark.parametrize("kind", [PostgresStore, PostgresReader])
@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("CREATE TABLE theirs (a int)", "is a database of another program: set `database` to another one"),
        (
            "CREATE TABLE astera_lite (version int); INSERT INTO astera_lite VALUES (99)",
            r"was made by a newer version \(99\): use that one; nothing was changed",
        ),
    ],
)
def test_a_database_that_is_not_ours_is_refused_unchanged(url: str, sql: str, message: str, kind: Any) -> None:
    look(url, sql)
    with pytest.raises(StoreError, match=message):
        kind(url)
    assert look(url, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == [(1,)]


def test_a_postgresql_that_is_too_old_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(astera_lite_postgres, "_OLDEST", 99)
    with pytest.raises(StoreError, match=r"is PostgreSQL \d\d: 99 or newer is needed$"):
        PostgresStore(url)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_whose_encoding_has_not_all_characters_is_refused(cluster: Cluster, url: str, encoding: str) -> None:
    name = f"in_{encoding.lower()}"
    look(url, f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(StoreError, match=f"has the encoding {encoding}, and not UTF8: make one with CREATE DATABASE"):
        PostgresStore(cluster.url(name))


def test_the_encoding_of_the_system_does_not_matter(open_store: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    store = open_store()
    assert done(store.deploy, "f", '{"a": "中€"}') is True
    assert store.deployed() == [("f", '{"a": "中€"}')]


def test_an_older_database_is_upgraded_and_one_that_cannot_be_is_left(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(PostgresStore(url)) as store:
        new = add(store)
    now = astera_lite_postgres.SCHEMA_VERSION
    monkeypatch.setattr(astera_lite_postgres, "SCHEMA_VERSION", now + 2)
    good = {now: "ALTER TABLE jobs ADD colour text", now + 1: "UPDATE jobs SET colour = 'red'"}
    for upgrades in ({**good, now + 1: "DROP TABLE nowhere"}, good):
        monkeypatch.setattr(astera_lite_postgres, "UPGRADES", upgrades)
        if upgrades is not good:
            with pytest.raises(StoreError, match="nowhere"):
                PostgresStore(url)
            assert look(url, "SELECT version FROM astera_lite") == [(now,)]
            assert look(url, "SELECT 1 FROM pg_attribute WHERE attname = 'colour'") == []
        else:
            with closing(PostgresStore(url)) as store:
                assert store.get(new.key) == new
            assert look(url, "SELECT colour FROM jobs") == [("red",)]


def test_what_cannot_be_opened_is_said_in_a_sentence_without_secrets(
    cluster: Cluster, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    look(url, "CREATE ROLE nobody LOGIN; REVOKE ALL ON SCHEMA public FROM PUBLIC")
    secret = "hunter2secret"
    host = f"?host={cluster.folder}&port={cluster.port}"
    database = url.partition("@/")[2].partition("?")[0]
    for wrong, message in {
        f"postgresql://astera:{secret}@/absent{host}": 'PostgreSQL .*/absent: .*database "absent" does not exist',
        f"postgresql://absent:{secret}@/{database}{host}": 'role "absent" does not exist',
        f"postgresql://nobody:{secret}@/{database}{host}": "permission denied|no schema has been selected",
        f"postgresql://astera:{secret}@127.0.0.1:1/x": "PostgreSQL 127.0.0.1/x: .*Connection refused",
    }.items():
        with pytest.raises(StoreError, match=message) as caught:
            PostgresStore(wrong)
        assert secret not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(astera_lite_postgres.ConfigError, match="is no address of a PostgreSQL database") as refused:
        PostgresStore(f"postgresql://astera:{secret}@[::/x?{secret}")
    assert secret not in str(refused.value)
    for password in (f"p@{secret}", f"p/{secret}", f"p@{secret}:1"):
        with pytest.raises(astera_lite_postgres.ConfigError, match="with %40 for an @ in the password") as refused:
            PostgresStore(f"postgresql://astera:{password}@127.0.0.1:1/x")
        assert secret not in str(refused.value)
    monkeypatch.setattr(astera_lite_postgres, "psycopg", None)
    with pytest.raises(astera_lite_postgres.ConfigError, match=r"psycopg 3\.2 or newer, which is not installed"):
        PostgresStore(url)


@pytest.mark.parametrize(("durability", "level"), [("full", "on"), ("normal", "off")])
def test_durability_is_that_of_the_setting(open_store: Open, durability: str, level: str) -> None:
    store = open_store(durability=durability)
    add(store)
    assert store._db.execute("SHOW synchronous_commit").fetchone() == (level,)
    store._db.rollback()


# ---- Writes together -------------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_buffer_of_a_socket_is_written(store: PostgresStore) -> None:
    jobs = [job() for _ in range(40)]
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for new in jobs:
        store.add(submission(new, b"x" * (PIECE - 1)), lambda result, error: answers.put(error))
    store.add(submission(job(), b"y" * (9 * PIECE)), lambda result, error: answers.put(error))
    store.flush()
    assert [answers.get(timeout=30) for _ in range(41)] == [None] * 41
    found = store.request(jobs[7].key)
    assert found is not None and found[1] == PIECE - 1


def test_all_that_becomes_of_a_job_may_be_one_batch(store: PostgresStore) -> None:
    new, answers = add(store), list[Any]()
    one_batch = [
        astera_lite_postgres._Write(run=lambda db: None, done=lambda *told: answers.append("first")),
    ]
    assert len(astera_lite_postgres._grouped(one_batch)) == 1
    took: queue.SimpleQueue[Any] = queue.SimpleQueue()
    keep = lambda result, error: took.put((result, error))  # noqa: E731
    store.start(new.key, 1, T, keep)
    store.save_step(new.key, 1, "a", "1", keep)
    store.save_step(new.key, 1, "a", "2", keep)
    store.save_step(new.key, 1, "b", "3", keep)
    store.finish(finish(new), keep)
    store.save_step(new.key, 1, "c", "4", keep)
    assert [took.get(timeout=10) for _ in range(6)] == [(True, None)] * 5 + [(False, None)]
    found = store.get(new.key)
    assert found is not None and found.status is Status.COMPLETED


def test_the_start_of_a_run_changes_no_index(url: str) -> None:
    with closing(PostgresStore(url)) as store:
        jobs = [add(store).key for _ in range(100)]
        for key in jobs:
            assert done(store.start, key, 1, T) is True
    hot = "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'jobs'"
    until(lambda: look(url, hot) == [(100,)])  # PostgreSQL counts them a little later


# ---- Schema ----------------------------------------------------------------------------------------------------------


def columns_of(text: str) -> dict[str, set[str]]:
    tables = re.findall(r"CREATE TABLE (\w+) \((.*?)\n\)", text, re.DOTALL)
    return {name: set(re.findall(r"^    ([a-z_]+) ", body, re.MULTILINE)) for name, body in tables}


def test_the_schema_is_that_of_one_server_and_what_several_need(store: PostgresStore, url: str) -> None:
    ours = (ROOT / "schema_postgres.sql").read_text("utf-8")
    of_one = columns_of((ROOT / "schema.sql").read_text("utf-8"))
    assert of_one.pop("clock")
    assert f"version {astera_lite_postgres.SCHEMA_VERSION} of the schema" in ours
    for table, columns in of_one.items():
        assert columns <= columns_of(ours)[table], table
    lines = ours.splitlines()
    for n, line in enumerate(lines):
        if line.startswith("CREATE"):
            assert re.match("-- [A-Z].*[.]$", lines[n - 1]), line
    uncommented = look(
        url,
        "SELECT relname, attname FROM pg_class c JOIN pg_attribute a ON attrelid = c.oid WHERE relkind = 'r'"
        " AND relnamespace = 'public'::regnamespace AND attnum > 0 AND col_description(c.oid, attnum) IS NULL",
    )
    assert uncommented == []


def test_a_transaction_that_is_held_open_does_not_make_claims_slower(store: PostgresStore, url: str) -> None:
    """What was claimed since stays in the index: it is not to be looked at by each claim."""
    import psycopg

    told(store)
    with psycopg.connect(url) as held:
        held.execute("SELECT 1 FROM jobs").fetchall()
        held.execute("SELECT txid_current()").fetchall()
        for n in range(30):
            for _ in range(100):
                new = submission(job(created=T + n * 1000))._replace(owned=False)
                store.add(new, lambda result, error: None)
            store.flush()
            done(store.find_key, "", "", "", b"", 0)
            assert len(claimed(store, 200)) == 100
        until(lambda: store._free_from > T << 12)
        add(store, owned=False, created=T + 31_000)
        sql = astera_lite_postgres._CLAIM
        values = (["f"], 1, ["f"], store._free_from, 1, store._start, 1)
        plan = look(url, f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {sql}", *values)[0][0][0]["Plan"]
        assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 700  # of 3,000 jobs
    late = add(store, owned=False, created=T)
    store._free_at = 0.0
    until(lambda: claimed(store) == [late.key.seq])


# ---- A million jobs --------------------------------------------------------------------------------------------------

_MILLION = """
INSERT INTO nodes (number, name, lease_until) SELECT n, 'n' || n, now() + '1 day' FROM generate_series(60, 62) n;
INSERT INTO jobs (seq, salt, flow, version, status, created, token, base, attempt, started, finished, expires, code,
    size, headers, request, request_body, result, idempotency_key, callback_url)
SELECT ({t} + n) << 12, 1, 'f' || n % 3, 7, CASE WHEN n % 1000 = 0 THEN 'Error' ELSE 'Completed' END, {t} + n,
    CASE WHEN n BETWEEN 60 AND 64 THEN 'ada' WHEN n % 2 = 0 THEN 'bob' ELSE '' END,
    'http://x', 1, {t} + n, {t} + n, {t} + 10^9 + n, 200, 2, '[]', {request}, '', '',
    CASE WHEN n % 10 = 0 THEN 'key' || n END, CASE WHEN n % 50 = 0 THEN 'http://r' END
FROM generate_series(1, 1000000) n;
INSERT INTO jobs (seq, salt, flow, version, status, created, token, base, request, owner, due, attempt)
SELECT ({t} + n * 100) << 12 | 64, 1, 'f' || (n / 3) % 3, 7, 'Running', {t}, '', 'http://x', {request},
    CASE WHEN n % 3 = 0 THEN (SELECT min(start) + n % 2 FROM nodes) END,
    CASE WHEN n % 3 = 1 THEN {t} + 10^12 END, 0
FROM generate_series(1, 9000) n;
INSERT INTO callbacks (job, receiver, state, next, body)
SELECT ({t} + n * 50) << 12, 'r:80', CASE WHEN n % 100 = 0 THEN 'pending' ELSE 'delivered' END,
    CASE WHEN n % 100 = 0 THEN {t} + 10^8 END, '{{}}' FROM generate_series(1, 20000) n;
INSERT INTO attempts SELECT job, 1, {t}, 5, 204, NULL FROM callbacks;
INSERT INTO steps SELECT seq, 'a', NULL, '1' FROM jobs WHERE status = 'Running';
INSERT INTO flows (version, name, text) SELECT n, 'f' || n % 3, '{{}}' FROM generate_series(7, 40) n;
"""


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from scans(part)


def hot(store: PostgresStore, nth: int) -> None:
    """Have the store send its hot statements, the first or a second time."""
    old, name = JobKey((T + 45 + nth) << 12, 1), f"new{nth}"
    fresh, again = job(), job()
    done(store.add, submission(fresh, key=name))
    done(store.add, submission(again, key=name))
    done(store.add, submission(job(), key=f"limited{nth}")._replace(limit=10**6))
    done(store.start, fresh.key, 1, T)
    done(store.save_step, fresh.key, 1, "a", "1")
    store.get(old), store.result(old), store.request(old), store.load(fresh.key.seq), store.trace(old)
    store.attempts(old), store.ended([old, fresh.key]), store.cancelled(), store.progress(fresh.key), store.members()
    assert len(store.claim((), 16, {"f0": None, "f1": 10**6})) == 16
    assert len(store.claim_deliveries(T + 10**9, 16, held=(), busy=(), likely=False)) == 16
    store.next_delivery(T), store.last_seq(), store.flow_text(7)
    for number, flow in ((1, limited(10**6, "refuse", "f1")), (2, limited(1, name="f1"))):
        store.enter_call(number, flow, math.inf, lambda refusal: None)
    done(store.leave_call, 1)  # and the other call is looked for
    done(store.ask_cancel, fresh.key)
    waiting = fresh._replace(attempt=1, started=T, due=T + 5)
    done(store.suspend, waiting, "w", T, "[]", False)
    assert done(store.finish, finish(fresh, callback=("r:80", "{}"))) is True
    done(store.record_delivery, fresh.key, Attempt(T, 1, 204), T + 10, "delivered", None)
    done(store.resend, fresh.key, T)
    done(store.find_key, "f0", "", "key30", None, T)
    done(store.delete, old)
    assert done(store.purge, T + 10**9 + 50, 20) == 20
    done(store.leave_call, 2)


def lists(store: PostgresStore) -> None:
    for flow, status, token in [
        (None, None, None), ("f1", None, None), (None, Status.ERROR, None), (None, Status.RUNNING, None),
        (None, None, "ada"), (None, None, "none"), ("none", None, None), (None, Status.COMPLETED, "bob"),
    ]:  # fmt: skip
        store.page(T, 50, None, flow, status, token)


@pytest.mark.slow
def test_no_hot_statement_looks_at_more_than_a_few_of_a_million_jobs(
    open_store: Open, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psycopg

    store = open_store(name="a")
    told(store)
    look(url, "ALTER TABLE jobs SET (autovacuum_enabled = off)")
    look(url, _MILLION.format(t=T, request='\'{"method": "GET", "path": "/f"}\''))
    sent: list[tuple[str, Any]] = []
    execute = psycopg.Connection.execute

    def spy(self: Any, query: Any, values: Any = None, **more: Any) -> Any:
        sent.append((query, values))
        return execute(self, query, values, **more)

    def costly() -> list[Any]:
        wrong = []
        with closing(store._address.connect(autocommit=False)) as db:
            for query, values in {query: (query, values) for query, values in sent}.values():
                if re.match("SELECT|INSERT|UPDATE|DELETE|WITH", query) and "pg_" not in query:
                    [[[found]]] = db.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}", values).fetchall()
                    db.rollback()
                    blocks = found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"]
                    through = {
                        part["Relation Name"]
                        for part in scans(found["Plan"])
                        if part["Node Type"] == "Seq Scan" and part["Relation Name"] not in ("nodes", "flows")
                    }
                    if blocks > 1500 or through:
                        wrong.append((blocks, through, query))
        return wrong

    with monkeypatch.context() as patched:
        patched.setattr(psycopg.Connection, "execute", spy)
        hot(store, 0)
    assert costly() == []
    look(url, "VACUUM ANALYZE")  # as PostgreSQL does by itself after a minute; nothing waits for a list
    sent.clear()
    with monkeypatch.context() as patched:
        patched.setattr(psycopg.Connection, "execute", spy)
        hot(store, 1)
        lists(store)
    assert costly() == []
