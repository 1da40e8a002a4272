"""Room 7, the store: its contract, on real files and on a real PostgreSQL; and what is SqliteStore's own."""

from __future__ import annotations

import itertools
import os
import queue
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Sink, database_in, until

import astera_lite
import astera_lite_database
from astera_lite import (
    PIECE,
    Answer,
    AsteraLite,
    Attempt,
    Busy,
    Conflict,
    Delivery,
    Finish,
    Job,
    JobKey,
    JobKeys,
    Outcome,
    SqliteReader,
    SqliteStore,
    Status,
    StoredRequest,
    StoreError,
    Submission,
    is_postgres,
)

pytestmark = pytest.mark.both_stores
sqlite = pytest.mark.sqlite

T = 1_790_000_000_000
LARGE = [PIECE + 1, 3 * PIECE, 3 * PIECE + 17]
keys = JobKeys()
#: The changes of a state that the store makes; others are refused by its conditional UPDATEs.
MOVES: dict[str, dict[str, frozenset[str]]] = {
    "job": {"Running": frozenset({"Completed", "Error"}), "Completed": frozenset(), "Error": frozenset()},
    "callback": {
        "pending": frozenset({"delivered", "failed", "gone"}),
        "delivered": frozenset({"pending"}),
        "failed": frozenset({"pending"}),
        "gone": frozenset({"pending"}),
    },
}


class Written:
    """What became of a write: its result, or the error raised."""

    def __init__(self, write: Callable[..., None], *arguments: Any) -> None:
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        write(*arguments, lambda result, error: self._answers.put((result, error)))
        store = getattr(write, "__self__", None)
        if hasattr(store, "flush"):
            store.flush()

    def get(self, timeout: float = 10) -> Any:
        result, error = self._answers.get(timeout=timeout)
        if error is not None:
            raise error
        return result


def done(write: Callable[..., None], *arguments: Any) -> Any:
    return Written(write, *arguments).get()


def job(flow: str = "f", callback: str | None = None, version: int = 7, **more: Any) -> Job:
    created = more.pop("created", T)
    delivery = Delivery(callback) if callback else None
    return Job(keys.new(created), flow, version, Status.RUNNING, created, "http://here", callback=delivery, **more)


def submission(new: Job, body: bytes = b"", key: str | None = None, fingerprint: bytes = b"") -> Submission:
    sent = StoredRequest("POST", "/f", "a=1", {"content-type": "application/json"}, body)
    return Submission(new, sent, '{"the": "flow"}', key, fingerprint)


def finish(of: Job, body: bytes = b"{}", attempt: int = 1, expires: int = T + 1000, **more: Any) -> Finish:
    outcome = more.pop("outcome", Outcome(Answer(200, (("Content-Type", "application/json"),), body)))
    ended = {"status": outcome.status, "due": None, "finished": T + 10, "expires": expires, "error": outcome.error}
    return Finish(of._replace(attempt=attempt, started=T, **ended), outcome, **more)


def added(store: SqliteStore, **more: Any) -> Job:
    new = job(**more)
    assert done(store.add, submission(new)) == new
    return new


def owing(store: SqliteStore, expires: int = T + 1000, receiver: str = "r:80") -> Job:
    new = added(store, callback=f"http://{receiver}/x")
    assert done(store.finish, finish(new, callback=(receiver, "the body"), expires=expires))
    return new


@pytest.fixture
def path(tmp_path: Path) -> str:
    """The setting `database`."""
    return database_in(tmp_path)


def opened(path: str) -> SqliteStore:
    """The store of a server; PostgreSQL's has no type in common with it, only its methods."""
    kind: Any = SqliteStore
    if is_postgres(path):
        from astera_lite_postgres import PostgresStore as kind
    store: SqliteStore = kind(path)
    return store


@pytest.fixture
def store(path: str) -> Iterator[SqliteStore]:
    with closing(opened(path)) as made:
        yield made


@contextmanager
def held(store: SqliteStore) -> Iterator[None]:
    """Hold the writer, so that what is written in the block is committed together."""
    begun, go_on = threading.Event(), threading.Event()

    def hold(result: Any, error: Exception | None) -> None:
        begun.set()
        go_on.wait(10)

    store.find_key("", "", "", b"", 0, hold)
    assert begun.wait(10)
    try:
        yield
    finally:
        go_on.set()


def due(store: SqliteStore, now: int, limit: int = 10, **more: Any) -> list[tuple[Job, Delivery]]:
    return store.claim_deliveries(now, limit, **{"held": (), "busy": (), "likely": False, **more})


def look(path: str, sql: str) -> Any:
    if is_postgres(path):
        import psycopg

        with psycopg.connect(path, autocommit=True) as connection:
            return connection.execute(sql).fetchall()  # type: ignore[call-overload]
    with closing(sqlite3.connect(path)) as other:
        return other.execute(sql).fetchall()


# ---- Jobs ------------------------------------------------------------------------------------------------------------


def test_a_new_job_is_found_by_its_whole_id_only(store: SqliteStore) -> None:
    new = added(store, token="ada", callback="http://r/x")
    assert store.get(new.key) == new
    assert store.get(JobKey(new.key.seq, new.key.salt ^ 1)) is None
    assert store.get(JobKey(new.key.seq + 1, new.key.salt)) is None
    assert store.last_seq() == new.key.seq
    assert store.flow_text(7) == ("f", '{"the": "flow"}')
    assert store.flow_text(8) is None
    assert store.result(new.key) is None


def test_an_empty_store_answers_that_there_is_nothing(store: SqliteStore) -> None:
    key = keys.new(T)
    assert store.last_seq() == 0
    assert (store.get(key), store.load(key.seq), store.request(key), store.result(key)) == (None, None, None, None)
    assert (store.trace(key), store.attempts(key), store.claim((), 10)) == ([], [], [])
    assert store.page(T, 10, None, None, None, None) == []
    assert (due(store, T, 10), store.next_delivery(T)) == ([], None)
    assert done(store.delete, key) == "absent"
    assert done(store.resend, key, T) is False
    assert done(store.finish, finish(job()._replace(key=key))) is False
    assert done(store.purge, T, 10) == 0


@pytest.mark.parametrize("size", [0, 1, PIECE, *LARGE])
def test_request_and_result_come_back_byte_for_byte(store: SqliteStore, path: str, size: int) -> None:
    sent, given = os.urandom(size), os.urandom(size)
    new = job()
    done(store.add, submission(new, sent))
    assert store.request(new.key) == (submission(new).request._replace(body=sent), size)
    loaded = store.load(new.key.seq)
    assert loaded is not None and loaded.request.body == sent
    assert done(store.finish, finish(new, given)) is True
    result = store.result(new.key)
    assert result is not None
    assert (result.answer[:2], result.size) == ((200, (("Content-Type", "application/json"),)), size)
    assert result.in_pieces is (size > PIECE and not is_postgres(path))
    if not result.in_pieces:
        assert result.answer.body == given
    else:
        pieces = list(store.result_pieces(new.key, 0, size))
        assert (result.answer.body, b"".join(pieces)) == (b"", given)
        assert max(map(len, pieces)) <= PIECE


@sqlite
def test_values_in_pieces_are_forgotten_with_their_job(store: SqliteStore, path: str) -> None:
    new = job()
    done(store.add, submission(new, b"x" * LARGE[1]))
    done(store.finish, finish(new, b"y" * LARGE[2]))
    pieces = store.result_pieces(new.key, 0, LARGE[2])
    assert len(next(pieces)) == PIECE
    assert done(store.delete, new.key) == "deleted"
    with pytest.raises(StoreError, match="missing"):
        next(pieces)
    assert look(path, "SELECT count(*) FROM pieces") == [(0,)]


def test_a_result_of_which_a_part_is_lost_is_not_read_as_if_it_were_whole(store: SqliteStore) -> None:
    new = added(store)
    done(store.finish, finish(new, b"y" * LARGE[2]))
    done(store._run, lambda execute: execute("DELETE FROM pieces WHERE n = 1", ()) and None)
    result = store.result(new.key)
    assert result is not None and result.in_pieces
    with pytest.raises(StoreError, match="missing"):
        list(store.result_pieces(new.key, 0, result.size))


def test_what_is_forgotten_is_gone_and_the_rest_stays_as_it_ended(store: SqliteStore) -> None:
    first, second, third = added(store), added(store), added(store)
    for each in (first, second, third):
        assert done(store.finish, finish(each, expires=T + 10)) is True
    assert done(store.delete, first.key) == "deleted"
    assert done(store.purge, T + 10, 1) == 1
    assert [store.get(each.key) is not None for each in (first, second, third)] == [False, False, True]
    assert done(store.finish, finish(third, attempt=2)) is False  # an end that came too late changes nothing
    assert store.get(third.key) == third._replace(
        status=Status.COMPLETED, attempt=1, started=T, finished=T + 10, expires=T + 10
    )


@sqlite
def test_the_purge_spares_a_large_result_from_the_moment_it_is_asked_for(store: SqliteStore) -> None:
    new, body = added(store), b"y" * LARGE[2]
    end = finish(new, body)
    assert done(store.finish, end) is True
    pieces = store.result_pieces(new.key, 0, len(body))  # not read yet: the head of the answer goes first
    assert done(store.purge, end.job.expires, 10) == 0
    assert b"".join(pieces) == body
    unread = store.result_pieces(new.key, 0, len(body))
    del unread  # whose reader has gone, or only wanted the head
    assert done(store.purge, end.job.expires, 10) == 1


def test_a_large_request_that_is_a_replay_leaves_no_pieces(store: SqliteStore, path: str) -> None:
    body = b"x" * LARGE[0]
    for fingerprint in (b"1", b"1"):
        done(store.add, submission(job(), body, "k", fingerprint))
    with pytest.raises(Conflict):
        done(store.add, submission(job(), body, "k", b"2"))
    assert look(path, "SELECT count(*), count(DISTINCT job) FROM pieces") == [(2, 1)]


def test_a_finished_job_tells_its_end(store: SqliteStore) -> None:
    new = added(store)
    failed = Outcome.failed("failed", 422, "No.")
    assert done(store.finish, finish(new, outcome=failed, trace='[{"path": "a"}]')) is True
    found = store.get(new.key)
    assert found is not None
    assert (found.status, found.attempt, found.started) == (Status.ERROR, 1, T)
    assert (found.finished, found.expires, found.error) == (T + 10, T + 1000, failed.error)
    assert store.trace(new.key) == [{"path": "a"}]
    assert store.load(new.key.seq) is None
    assert store.claim((), 10) == []


def test_a_job_that_is_to_be_cancelled_says_so_to_the_run_that_loads_it(store: SqliteStore) -> None:
    new, other = added(store), added(store)
    assert done(store.ask_cancel, new.key) is True
    assert [store.load(each.key.seq).cancelled for each in (new, other)] == [True, False]  # type: ignore[union-attr]


def test_a_late_result_changes_nothing(store: SqliteStore, path: str) -> None:
    new = added(store)
    assert done(store.finish, finish(new, b"first", attempt=2)) is False  # the first one is not on record
    assert done(store.finish, finish(new, b"first", attempt=2, fenced=False)) is True
    before = store.get(new.key)
    for attempt in (1, 2, 3):
        assert done(store.finish, finish(new, b"late" * PIECE, attempt=attempt, callback=("r:1", "x"))) is False
    assert store.get(new.key) == before
    result = store.result(new.key)
    assert result is not None and result.answer.body == b"first"
    assert look(path, "SELECT (SELECT count(*) FROM pieces) + (SELECT count(*) FROM callbacks)") == [(0,)]


def test_the_end_of_an_earlier_attempt_does_not_end_a_later_one(store: SqliteStore) -> None:
    new = added(store)
    assert done(store.start, new.key, 2, T) is False
    assert [done(store.start, new.key, attempt, T) for attempt in (1, 1, 2)] == [True] * 3
    assert done(store.start, new.key, 3, T) is True
    assert [done(store.save_step, new.key, attempt, "a", "1") for attempt in (2, 3, 4)] == [False, True, False]
    assert done(store.finish, finish(new, attempt=2)) is False
    assert done(store.finish, finish(new, attempt=3)) is True


def test_an_empty_output_takes_the_place_of_what_was_saved(store: SqliteStore) -> None:
    new = added(store)
    done(store.start, new.key, 1, T)
    for place in ("a", "b@"):
        done(store.save_step, new.key, 1, place, "1")
    done(store.suspend, new._replace(attempt=1, started=T, due=T + 5), "w", T + 5, "[]", False)
    for place in ("a", "b@", "w"):
        assert done(store.save_step, new.key, 1, place, "") is True
    loaded = store.load(new.key.seq)
    assert loaded is not None and (loaded.saved, loaded.waits) == ({}, {})


@sqlite
def test_claims_bring_what_nobody_holds_in_turn(store: SqliteStore) -> None:
    jobs = [added(store).key.seq for _ in range(5)]
    assert [claimed.seq for claimed in store.claim((), 2)] == jobs[:2]
    assert [claimed.seq for claimed in store.claim({jobs[2]}, 2)] == jobs[3:4]
    assert [claimed.seq for claimed in store.claim((), 2)] == jobs[4:]
    assert store.claim(set(jobs), 10) == []
    assert len(store.claim((), 10)) == 5


def test_ended_are_those_that_do_not_run(store: SqliteStore) -> None:
    runs, ended = added(store), added(store)
    done(store.finish, finish(ended))
    other = runs.key._replace(salt=runs.key.salt ^ 1)
    assert store.ended([runs.key, ended.key, other]) == [ended.key, other]


@pytest.mark.parametrize("state", sorted(MOVES["job"]))
@pytest.mark.parametrize("to", ["Completed", "Error"])
def test_a_job_makes_the_moves_of_the_table_and_no_other(store: SqliteStore, state: str, to: str) -> None:
    outcomes = {"Completed": Outcome(Answer(200)), "Error": Outcome.failed("failed", 500, "x")}
    new = added(store)
    if state != "Running":
        done(store.finish, finish(new, outcome=outcomes[state]))
    assert done(store.finish, finish(new, outcome=outcomes[to])) is (to in MOVES["job"][state])
    found = store.get(new.key)
    assert found is not None and found.status == (to if to in MOVES["job"][state] else state)


def test_nothing_is_recorded_of_a_job_that_is_finished(store: SqliteStore, path: str) -> None:
    new = added(store)
    done(store.finish, finish(new))
    before = store.get(new.key)
    assert done(store.start, new.key, 2, T) is False
    assert done(store.save_step, new.key, 2, "a", "1") is False
    assert done(store.suspend, new._replace(attempt=2, started=T, due=T), "w", T, "[]", False) is False
    store.requeue(new.key, 1)
    done(store.find_key, "", "", "", b"", 0)
    assert store.get(new.key) == before
    assert look(path, "SELECT count(*) FROM steps") == [(0,)]


def test_a_run_is_loaded_with_its_outputs_waits_and_trace(store: SqliteStore) -> None:
    new = added(store)
    done(store.start, new.key, 1, T + 1)
    outputs: dict[str, Any] = {
        "a": {"x": [1, 2.5, None, "é\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")]},
        "b": b"\x00\xff",
        "c": {"body": b"", "n": "\ud800"},
        "each/3/fetch": None,
        "odd": {"\0bytes": "QQ=="},
        "odder": {"\0bytes": "a"},
        "oddest": [{"\0bytes": None}],
    }
    for place, value in outputs.items():
        assert done(store.save_step, new.key, 1, place, astera_lite.to_saved(value)) is True
    waiting = new._replace(attempt=1, started=T + 1, due=T + 500)
    assert done(store.suspend, waiting, "w", T + 900, '[{"path": "a"}]', False) is True
    loaded = store.load(new.key.seq)
    assert loaded is not None
    assert {place: astera_lite.from_saved(text) for place, text in loaded.saved.items()} == outputs
    assert loaded.waits == {"w": T + 900}
    assert loaded.trace == [{"path": "a"}]
    assert (loaded.job.attempt, loaded.job.started, loaded.job.due) == (1, T + 1, T + 500)
    free = [] if store.shared else [(new.key.seq, T + 500, new.flow)]
    assert store.claim((), 10, {new.flow: None}) == free  # its owner has it in hand


@sqlite
def test_a_requeued_run_began_and_does_not_count(store: SqliteStore) -> None:
    new = added(store)
    store.requeue(new.key, 1)  # its beginning was not on record: there is nothing to take back
    done(store.find_key, "", "", "", b"", 0)
    assert store.get(new.key) == new
    done(store.start, new.key, 1, T)
    for _ in range(2):
        store.requeue(new.key, 1)
        done(store.find_key, "", "", "", b"", 0)
        assert store.get(new.key) == new._replace(started=T)


@pytest.mark.parametrize(
    ("state", "outcome"), [("running", "running"), ("finished", "deleted"), ("owed", "owed"), ("delivered", "deleted")]
)
def test_only_a_finished_job_that_owes_nothing_is_deleted(store: SqliteStore, state: str, outcome: str) -> None:
    new = added(store) if state in ("running", "finished") else owing(store)
    if state == "finished":
        done(store.finish, finish(new))
    if state == "delivered":
        done(store.record_delivery, new.key, Attempt(T, 1, 204), T + 10, "delivered", None)
    assert done(store.delete, JobKey(new.key.seq, new.key.salt ^ 1)) == "absent"
    assert done(store.delete, new.key) == outcome
    assert (store.get(new.key) is None) is (outcome == "deleted")
    assert store.attempts(new.key) == [] or outcome != "deleted"


def test_pages_are_newest_first_and_filtered(store: SqliteStore) -> None:
    jobs = [added(store, flow="fg"[n % 2], token=("", "ada")[n % 3 == 0], created=T + n) for n in range(12)]
    for old in jobs[::4]:
        done(store.finish, finish(old, expires=T + 100))
    done(store.finish, finish(jobs[1], outcome=Outcome.failed("failed", 500, "x"), expires=T + 50))

    def numbers(now: int = T, limit: int = 100, before: int | None = None, *rest: Any) -> list[int]:
        flow, status, token = rest or (None, None, None)
        order = [each.key for each in jobs]
        return [order.index(found.key) for found in store.page(now, limit, before, flow, status, token)]

    assert numbers() == list(range(11, -1, -1))
    assert numbers(T, 3) == [11, 10, 9]
    assert numbers(T, 3, jobs[9].key.seq) == [8, 7, 6]
    assert numbers(T, 100, None, "f", None, None) == [10, 8, 6, 4, 2, 0]
    assert numbers(T, 100, None, None, Status.COMPLETED, None) == [8, 4, 0]
    assert numbers(T, 100, None, None, Status.ERROR, None) == [1]
    assert numbers(T, 100, None, None, None, "ada") == [9, 6, 3, 0]
    assert numbers(T, 100, jobs[9].key.seq, "f", Status.RUNNING, "ada") == [6]
    assert numbers(T + 50, 100, None, None, Status.ERROR, None) == []
    assert numbers(T + 100) == [11, 10, 9, 7, 6, 5, 3, 2]


# ---- Idempotency keys ------------------------------------------------------------------------------------------------


def test_a_key_belongs_to_one_job_also_when_many_come_together(store: SqliteStore) -> None:
    jobs = [job() for _ in range(20)]
    with held(store):
        writes = [Written(store.add, submission(new, b"", "k", b"same")) for new in jobs]
    answers = [write.get() for write in writes]
    assert answers == [jobs[0]] * 20
    assert len(store.page(T, 100, None, None, None, None)) == 1
    assert done(store.find_key, "f", "", "k", b"same", T) == jobs[0]


def test_a_key_with_another_payload_is_a_conflict(store: SqliteStore) -> None:
    first = job()
    done(store.add, submission(first, b"", "k", b"1"))
    for write in (store.add, submission(job(), b"", "k", b"2")), (store.find_key, "f", "", "k", b"2", T):
        with pytest.raises(Conflict, match="used with another request"):
            done(*write)
    assert done(store.find_key, "f", "", "k", b"1", T) == first


def test_keys_are_scoped_to_flow_and_token(store: SqliteStore) -> None:
    scopes = [("f", ""), ("g", ""), ("f", "ada")]
    jobs = [job(flow, token=token) for flow, token in scopes]
    for new in jobs:
        assert done(store.add, submission(new, b"", "k", new.flow.encode())) == new
    found = [done(store.find_key, flow, token, "k", flow.encode(), T) for flow, token in scopes]
    assert found == jobs
    assert done(store.find_key, "g", "ada", "k", b"g", T) is None


def test_an_expired_jobs_key_is_free_before_the_purge(store: SqliteStore) -> None:
    old = job()
    done(store.add, submission(old, b"", "k", b"1"))
    done(store.finish, finish(old, expires=T + 100))
    assert done(store.add, submission(job(created=T + 99), b"", "k", b"1")).key == old.key
    assert done(store.find_key, "f", "", "k", b"2", T + 100) is None
    new = job(created=T + 100)
    assert done(store.add, submission(new, b"", "k", b"2")) == new
    assert done(store.find_key, "f", "", "k", b"2", T + 100) == new


# ---- Callbacks -------------------------------------------------------------------------------------------------------


def test_a_callback_is_owed_with_the_end_of_its_job(store: SqliteStore) -> None:
    new = owing(store)
    [(found, delivery)] = due(store, T + 10, 10)
    assert (found.key, found.status) == (new.key, Status.COMPLETED)
    assert delivery == Delivery("http://r:80/x", "pending", 0, None, T + 10, "the body", receiver="r:80")
    assert due(store, T + 9, 10) == []
    assert store.next_delivery(T + 9) == T + 10
    assert store.next_delivery(T + 10) is None


def test_every_attempt_is_kept(store: SqliteStore) -> None:
    new = owing(store)
    tries = [Attempt(T, 5, 500), Attempt(T + 5000, 15000, None, "timed out"), Attempt(T + 9000, 7, 204)]
    states = [("pending", T + 5000), ("pending", T + 9000), ("delivered", None)]
    seen: int | None = T + 10
    for attempt, (state, next_at) in zip(tries, states, strict=True):
        done(store.record_delivery, new.key, attempt, seen, state, next_at)
        seen = next_at
        found = store.get(new.key)
        assert found is not None and found.callback is not None
        assert (found.callback.state, found.callback.next_at) == (state, next_at)
        assert found.callback.last_status == attempt.status
    assert store.attempts(new.key) == tries
    assert found.callback.attempts == 3
    assert due(store, T + 10**9, 10) == []


def test_deliveries_to_busy_receivers_and_those_under_way_are_left_out(store: SqliteStore) -> None:
    jobs = [owing(store, receiver=f"r{n}:80") for n in range(6)]
    found = due(store, T + 10, 3, held=[jobs[1].key], busy=["r0:80", "r4:80"])
    assert [each.key for each, _ in found] == [jobs[n].key for n in (2, 3, 5)]
    assert len(due(store, T + 10, 2)) == 2
    for n, status in ((2, None), (3, 500)):
        done(store.record_delivery, jobs[n].key, Attempt(T, 1, status), T + 10, "pending", T + 9 + n)

    def claimed(limit: int = 9, likely: bool = False) -> list[int]:
        found = due(store, T + 12, limit, held=[jobs[1].key], busy=["r0:80", "r4:80"], likely=likely)
        return [[other.key for other in jobs].index(each.key) for each, _ in found]

    assert (claimed(), claimed(2), claimed(likely=True)) == ([5, 2, 3], [5, 2], [5, 3])


@pytest.mark.parametrize("state", sorted(MOVES["callback"]))
@pytest.mark.parametrize("to", sorted(MOVES["callback"]))
def test_a_callback_makes_the_moves_of_the_table_and_no_other(store: SqliteStore, state: str, to: str) -> None:
    new = owing(store)
    if state != "pending":
        done(store.record_delivery, new.key, Attempt(T, 1, 200), T + 10, state, None)
    if to == "pending":
        assert done(store.resend, new.key, T + 77) is True
    else:
        done(store.record_delivery, new.key, Attempt(T, 1, 200), T + 10, to, None)
    found = store.get(new.key)
    allowed = to == state or to in MOVES["callback"][state]
    assert found is not None and found.callback is not None
    assert found.callback.state == (to if allowed else state)


def test_a_callback_asked_for_again_during_a_delivery_is_sent_again(store: SqliteStore) -> None:
    new = owing(store)
    assert done(store.resend, new.key, T + 77) is True
    done(store.record_delivery, new.key, Attempt(T, 1, 204), T + 10, "delivered", None)
    [(found, delivery)] = due(store, T + 77, 10)
    assert (found.key, delivery.attempts, delivery.last_status) == (new.key, 1, 204)
    assert store.attempts(new.key) == [Attempt(T, 1, 204)]


def test_an_attempt_for_a_job_that_is_gone_is_dropped(store: SqliteStore, path: str) -> None:
    new = owing(store, expires=T + 20)
    assert done(store.purge, T + 20, 10) == 1
    done(store.record_delivery, new.key, Attempt(T, 1, 204), T + 10, "delivered", None)
    assert look(path, "SELECT count(*) FROM attempts") == [(0,)]
    assert due(store, T + 10**9, 10) == []


# ---- Purge -----------------------------------------------------------------------------------------------------------


def test_expired_jobs_are_purged_in_batches_oldest_first(store: SqliteStore, path: str) -> None:
    running = added(store)
    jobs = [owing(store, expires=T + n) for n in range(5)]
    kept = owing(store, expires=T + 11)
    assert done(store.purge, T - 1, 3) == 0
    assert done(store.purge, T + 10, 3) == 3
    assert [store.get(each.key) is None for each in jobs] == [True] * 3 + [False] * 2
    assert done(store.purge, T + 10, 3) == 2
    assert done(store.purge, T + 10, 3) == 0
    assert store.get(running.key) is not None and store.get(kept.key) is not None
    assert look(path, "SELECT count(*) FROM callbacks") == [(1,)]


@sqlite
def test_a_purge_does_not_write_what_it_deletes(path: str) -> None:
    """Some SQLites, that of Debian among them, fill deleted pages with zeros: it wears out a card."""
    with closing(SqliteStore(path)) as store:
        for _ in range(8):
            done(store.finish, finish(added(store), b"x" * (4 * PIECE)))
    with closing(SqliteStore(path)) as store:
        assert done(store.purge, T + 1000, 100) == 8
        assert os.path.getsize(f"{path}-wal") < PIECE


@sqlite
def test_the_file_shrinks_after_a_purge(store: SqliteStore, path: str) -> None:
    for _ in range(8):
        new = added(store)
        done(store.finish, finish(new, os.urandom(PIECE * 2), expires=T))
    store.close()
    full = os.stat(path).st_size
    assert full > 16 * PIECE
    with closing(SqliteStore(path)) as again:
        for _ in range(20):  # a little each time, so that the writes behind it do not wait
            done(again.purge, T, 200)
    assert os.stat(path).st_size < full / 8


def texts(path: str) -> set[int]:
    return {version for (version,) in look(path, "SELECT version FROM flows")}


def many(path: str, count: int) -> None:
    """Finished jobs of three flows and two tokens; in one of a thousand something is rare."""
    columns = "seq, salt, flow, version, status, created, base, token, attempt, started, finished, expires, code, size"
    rows = [
        ((T + n) << 12, 1, f"f{n % 3}", 7 if n < 5000 else 8, "Completed" if n % 1000 else "Error", T, "http://x")
        + ("ada" if n < 5 else "bob" if n % 2 else "", 1, T, T, T + 10**9, 200, 1)
        for n in range(count)
    ]
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN")
        db.execute("INSERT INTO flows VALUES (7, 'f0', '{}'), (8, 'f0', '{}'), (9, 'f0', '{}')")
        marks = ", ".join("?" * 14)
        db.executemany(f"INSERT INTO jobs ({columns}, headers, request) VALUES ({marks}, '[]', '{{}}')", rows)
        db.execute("COMMIT")


def work(store: SqliteStore, look: Callable[[], Any]) -> int:
    """The steps, in hundreds, that SQLite takes to answer."""
    store.last_seq()  # the connection that it takes next
    steps = itertools.count()
    store._idle[-1].set_progress_handler(lambda: next(steps) * 0, 100)
    look()
    store._idle[-1].set_progress_handler(None, 0)
    return next(steps)


@pytest.mark.parametrize("size", [0, 5000, 300_000, 3_000_000])
def test_the_beginning_of_a_large_request_is_had_without_the_whole(store: SqliteStore, size: int) -> None:
    body = os.urandom(size)
    new = job()
    sent = StoredRequest("POST", "/x", "a=1", {"x-a": "b"}, body)
    done(store.add, submission(new)._replace(request=sent))
    assert store.request(new.key, 4200) == (sent._replace(body=body[:4200]), size)
    assert store.request(new.key) == (sent, size)
    assert store.request(new.key._replace(salt=0), 4200) is None
    tracemalloc.start()
    store.request(new.key, 4200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000 + (size > 4200) * PIECE


@sqlite
def test_a_list_of_few_among_many_jobs_does_not_look_at_all_of_them(store: SqliteStore, path: str) -> None:
    many(path, 20_000)
    for flow, status, token in itertools.product(
        (None, "f1", "none"), (None, *map(Status, ("Running", "Completed", "Error"))), (None, "ada", "bob", "none")
    ):
        if flow and token and status not in ("Running", "Error"):
            continue  # there is no index of both: the server has a thread do it
        spent = work(store, partial(store.page, T, 50, None, flow, status, token))
        assert spent < 100, (flow, status, token)


@sqlite
def test_flows_that_many_jobs_have_are_not_looked_for_among_all_of_them(store: SqliteStore, path: str) -> None:
    many(path, 20_000)
    assert work(store, store.forget_flows) < 500  # steps of 100; of the version that no job has 6,667 jobs' worth
    done(store.find_key, "", "", "", b"", 0)
    assert texts(path) == {7, 8}  # 9 has no job; 7 has only old ones


@sqlite
def test_texts_of_flows_that_no_job_refers_to_are_forgotten_and_written_again(store: SqliteStore, path: str) -> None:
    old, new = added(store), job(version=8)
    assert done(store.add, submission(new)) == new
    store.forget_flows()
    done(store.find_key, "", "", "", b"", 0)
    assert texts(path) == {7, 8}
    done(store.finish, finish(old))
    done(store.purge, T + 2000, 10)
    store.forget_flows()
    done(store.find_key, "", "", "", b"", 0)
    assert texts(path) == {8}
    added(store)  # of the version that was forgotten
    assert texts(path) == {7, 8}


def test_a_text_that_a_job_came_for_meanwhile_is_kept(store: SqliteStore, path: str) -> None:
    done(store.finish, finish(added(store)))
    done(store.purge, T + 2000, 10)
    with held(store):  # the job is written between the look and the deletion
        late = Written(store.add, submission(job()))
        store.forget_flows()
    late.get()
    done(store.find_key, "", "", "", b"", 0)
    assert texts(path) == {7}


# ---- Writes together -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["beyond 64 bits", "lone surrogate", "key taken"])
def test_a_row_that_cannot_be_written_does_not_fail_its_neighbours(store: SqliteStore, bad: str) -> None:
    jobs = [job() for _ in range(9)]
    spoiled = {
        "beyond 64 bits": submission(job()._replace(created=1 << 70)),
        "lone surrogate": submission(job()._replace(base="\ud800")),
        "key taken": submission(jobs[0]._replace(flow="other")),
    }[bad]
    with held(store):
        before = [Written(store.add, submission(new)) for new in jobs[:4]]
        wrong = Written(store.add, spoiled)
        after = [Written(store.add, submission(new)) for new in jobs[4:]]
        ends = [Written(store.finish, finish(new)) for new in jobs]
    assert [write.get() for write in before + after] == jobs
    assert [write.get() for write in ends] == [True] * 9
    with pytest.raises((StoreError, Busy)):  # Busy: the number of a server that another has by now
        wrong.get()
    assert store.fault is None
    assert [store.get(new.key).status for new in jobs] == [Status.COMPLETED] * 9  # type: ignore[union-attr]


def test_a_listener_that_fails_does_not_end_the_writer(store: SqliteStore) -> None:
    def fail(result: Any, error: Exception | None) -> None:
        raise RuntimeError("a listener's fault")

    store.add(submission(job()), fail)
    added(store)


def test_reads_do_not_wait_for_writes(store: SqliteStore) -> None:
    new = added(store)
    with held(store):
        Written(store.finish, finish(new))
        found = store.get(new.key)
        assert found is not None and found.status is Status.RUNNING


def test_what_was_queued_is_written_when_the_store_is_closed(path: str) -> None:
    jobs = [job() for _ in range(2000)]
    with closing(opened(path)) as first:
        writes = [Written(first.add, submission(new)) for new in jobs]
    assert [write.get() for write in writes] == jobs
    with closing(opened(path)) as again:
        assert [claimed.seq for claimed in again.claim((), 5000, {"f": None})] == [new.key.seq for new in jobs]
    assert not os.path.exists(path + "-wal")


def test_a_write_to_a_closed_store_is_refused_not_forgotten(path: str) -> None:
    store = opened(path)
    store.close()
    late = Written(store.add, submission(job()))
    with pytest.raises(StoreError):
        late.get(timeout=2)


# ---- Disk full, locked -----------------------------------------------------------------------------------------------


@sqlite
def test_a_full_disk_refuses_new_jobs_keeps_ends_and_mends(store: SqliteStore) -> None:
    first, second = added(store), added(store)
    store._db.execute("PRAGMA max_page_count = 1").fetchone()  # SQLite takes the present size: the disk is full
    large = os.urandom(200_000)
    end = Written(store.finish, finish(first, large))
    with pytest.raises(StoreError, match="the disk is full"):
        done(store.add, submission(job(), large))
    with pytest.raises(queue.Empty):
        end.get(timeout=0.01)
    assert store.fault == "the disk is full: make room"
    found = store.get(second.key)
    assert found is not None and found.status is Status.RUNNING  # what is there can still be read
    another = Written(store.finish, finish(second, large))
    with store._lock:  # two threads at once on a connection would hide errors from each other
        store._db.execute("PRAGMA max_page_count = 1000000").fetchone()
    assert (end.get(), another.get()) == (True, True)
    assert store.fault is None
    result = store.result(first.key)
    assert result is not None and result.answer.body == large
    added(store)


def no_room_but_for(store: SqliteStore, size: int) -> None:
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + size // 4096}").fetchone()


@sqlite
def test_a_large_request_that_was_refused_leaves_no_pieces(
    store: SqliteStore, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    added(store)
    monkeypatch.setattr(astera_lite, "_BATCH", 1)  # its first pieces are on disk when there is no more room
    no_room_but_for(store, 3 * PIECE)
    with pytest.raises(StoreError, match="the disk is full"):
        done(store.add, submission(job(), os.urandom(8 * PIECE)))
    done(store.find_key, "", "", "", b"", 0)
    assert look(path, "SELECT count(*) FROM pieces WHERE job > 0") == [(0,)]


@sqlite
def test_a_commit_that_changes_nothing_does_not_pass_for_room_on_the_disk(store: SqliteStore) -> None:
    no_room_but_for(store, 0)
    with pytest.raises(StoreError, match="the disk is full"):
        done(store.add, submission(job(), os.urandom(200_000)))
    done(store.find_key, "", "", "", b"", 0)
    done(store.purge, T, 10)
    assert store.fault == "the disk is full: make room"
    with store._lock:
        store._db.execute("PRAGMA max_page_count = 1000000").fetchone()
    until(lambda: store.fault is None)  # by itself, without another write


@contextmanager
def store_that_finds(damage: Exception) -> Iterator[None]:
    """A connection that reads meets this error."""

    class Damaged:
        def execute(self, *values: Any) -> Any:
            raise damage

        def close(self) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(astera_lite, "open_to_read", lambda path: Damaged())
        yield


@sqlite
def test_damage_that_is_found_as_another_fault_passes_stays_known(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorname = "SQLITE_CORRUPT"  # type: ignore[misc]

    def find(words: str) -> None:
        with pytest.raises(StoreError), store_that_finds(damage):
            store.last_seq()

    monkeypatch.setattr(astera_lite.log, "info", find)
    store.fault = "the disk is full: make room"
    added(store)
    assert store.fault == "the database is damaged: restore a backup"


@sqlite
def test_nothing_is_written_to_a_damaged_database_to_find_out_whether_it_is_well(store: SqliteStore) -> None:
    damage = sqlite3.DatabaseError("malformed")
    damage.sqlite_errorname = "SQLITE_CORRUPT"  # type: ignore[misc]
    with pytest.raises(StoreError, match="damaged: restore a backup"), store_that_finds(damage):
        store.last_seq()
    before = store._db.total_changes
    for _ in range(3):
        done(store.purge, T, 10)
    assert (store._db.total_changes, store.fault) == (before, "the database is damaged: restore a backup")
    with pytest.raises(StoreError, match="damaged: restore a backup"):
        done(store.add, submission(job()))


@sqlite
def test_what_was_stopped_with_the_server_does_not_count_although_the_database_is_locked(path: str) -> None:
    with closing(SqliteStore(path)) as store:
        new = added(store)
        done(store.start, new.key, 1, T)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            store.requeue(new.key, 1)
            until(lambda: store.fault is not None)
            other.execute("COMMIT")
    with closing(SqliteStore(path)) as store:
        found = store.get(new.key)
        assert found is not None and found.attempt == 0


@sqlite
def test_a_locked_database_refuses_new_jobs_keeps_ends_and_mends(store: SqliteStore, path: str) -> None:
    new = added(store)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        end = Written(store.finish, finish(new))
        with pytest.raises(StoreError, match="locked by another process"):
            done(store.add, submission(job()))
        assert store.fault is not None and path not in store.fault
        other.execute("COMMIT")
    assert end.get() is True
    assert store.fault is None


# ---- Owning and opening ----------------------------------------------------------------------------------------------


@sqlite
def test_a_second_owner_is_refused_and_touches_nothing(store: SqliteStore, path: str, tmp_path: Path) -> None:
    new = added(store)
    before = {file: os.stat(path + file) for file in ("", "-wal", "-shm")}
    (tmp_path / "link.db").symlink_to(path)
    for name in (path, str(tmp_path / "link.db"), f"{tmp_path}/../{tmp_path.name}/jobs.db"):
        with pytest.raises(StoreError, match=r"another server uses .*jobs\.db: stop it, or set `database`"):
            SqliteStore(name)
    after = {file: os.stat(path + file) for file in before}
    assert {f: (s.st_size, s.st_mtime_ns) for f, s in after.items()} == {
        f: (s.st_size, s.st_mtime_ns) for f, s in before.items()
    }
    done(store.finish, finish(new))
    with closing(SqliteReader(path)) as reader:
        found = reader.get(new.key)
        assert found is not None and found.status is Status.COMPLETED


@sqlite
def test_the_lock_is_free_when_its_owner_is_killed(path: str) -> None:
    code = (
        "import astera_lite, sys; s = astera_lite.SqliteStore(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == b"open\n"
        with pytest.raises(StoreError, match="another server"):
            SqliteStore(path)
        owner.kill()
        owner.wait(10)
    with closing(SqliteStore(path)) as store:
        added(store)


@sqlite
def test_the_lock_is_free_when_its_owner_closes_or_cannot_open(path: str) -> None:
    for _ in range(2):
        SqliteStore(path).close()
    look(path, "PRAGMA user_version = 99")
    for _ in range(2):
        with pytest.raises(StoreError, match="newer"):
            SqliteStore(path)


def foreign(path: str) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (a)")


def newer(path: str) -> None:
    SqliteStore(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")


@sqlite
@pytest.mark.parametrize("kind", [SqliteStore, SqliteReader])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (foreign, "jobs.db is a database of another program: set `database` to another path"),
        (newer, r"jobs.db was made by a newer version \(99\): use that one; nothing was changed"),
        (lambda path: Path(path).write_bytes(b"no database, just text\n" * 99), "jobs.db: the file is not a database"),
    ],
    ids=["foreign", "newer", "text"],
)
def test_a_file_that_is_not_ours_is_refused_unchanged(
    path: str, make: Callable[[str], None], message: str, kind: type[SqliteReader]
) -> None:
    make(path)
    before = Path(path).read_bytes()
    with pytest.raises(StoreError, match=message):
        kind(path)
    assert Path(path).read_bytes() == before
    assert kind is SqliteReader or not os.path.exists(path + "-wal")  # a reader makes one, empty, and may not remove it


@sqlite
def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no folder .*nowhere: create it, or set `database`"):
        SqliteStore(str(tmp_path / "nowhere" / "jobs.db"))
    assert list(tmp_path.iterdir()) == []


@sqlite
def test_a_folder_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "jobs.db").mkdir()
    with pytest.raises(StoreError, match="is not a regular file"):
        SqliteStore(str(tmp_path / "jobs.db"))


@sqlite
def test_a_read_only_look_makes_no_database(path: str) -> None:
    with pytest.raises(StoreError, match=r"there is no database .*: a server makes it when it starts"):
        SqliteReader(path)
    assert not os.path.exists(path)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder with a database, of a user for whom modes count: they do not for root, who becomes nobody meanwhile.

    The database is made before, for nobody may be unable to read schema.sql where this is checked out.
    """
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    was_root = os.geteuid() == 0
    SqliteStore(str(folder / "jobs.db")).close()
    if was_root:
        for each in (folder, *folder.iterdir()):
            os.chown(each, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o777)
        shutil.rmtree(folder)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="file modes are another matter there")
def test_a_read_only_file_or_folder_is_refused_unchanged(unprivileged: Path) -> None:
    path = unprivileged / "jobs.db"
    before = path.read_bytes()
    path.chmod(0o444)
    with pytest.raises(StoreError, match="the database is read-only"):
        SqliteStore(str(path))
    path.chmod(0o644)
    (unprivileged / "jobs.db.lock").unlink()
    unprivileged.chmod(0o555)
    with pytest.raises(
        StoreError, match="lock: the database cannot be opened: let this user read and write it and its folder"
    ):
        SqliteStore(str(path))
    assert path.read_bytes() == before


@sqlite
@pytest.mark.parametrize(("durability", "level"), [("full", 2), ("normal", 1)])
def test_the_journal_is_ahead_and_synced_as_told(path: str, durability: str, level: int) -> None:
    with closing(SqliteStore(path, durability)) as store:
        assert store._db.execute("PRAGMA synchronous").fetchone() == (level,)
        assert look(path, "PRAGMA journal_mode") == [("wal",)]
        assert look(path, "PRAGMA auto_vacuum") == [(2,)]  # incremental
        assert store.size() == os.stat(path).st_size + os.stat(path + "-wal").st_size


@sqlite
def test_the_size_of_pages_is_that_of_the_setting_when_the_database_was_made(tmp_path: Path) -> None:
    path = str(tmp_path / "jobs.db")
    for size, wanted in (("1KiB", 1024), ("16KiB", 1024)):
        with AsteraLite(database=path, page_size=size) as app:
            store: Any = app.store
            assert store._db.execute("PRAGMA page_size").fetchone() == (wanted,)
            assert store._db.execute("PRAGMA wal_autocheckpoint").fetchone() == ((128 << 20) // wanted,)
            assert store._db.execute("PRAGMA auto_vacuum").fetchone() == (2,)


@sqlite
def test_full_durability_is_the_default(store: SqliteStore, tmp_path: Path) -> None:
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    with AsteraLite(database=str(tmp_path / "other.db")) as app:
        assert app.store._db.execute("PRAGMA synchronous").fetchone() == (2,)  # type: ignore[attr-defined]


@sqlite
def test_the_trial_of_a_full_disk_is_gone_after_a_start(path: str) -> None:
    SqliteStore(path).close()
    with closing(sqlite3.connect(path)) as other:
        other.execute(astera_lite._PROBE, (PIECE,))
        other.commit()
    SqliteStore(path).close()
    assert look(path, "SELECT count(*) FROM pieces") == [(0,)]


# ---- Schema ----------------------------------------------------------------------------------------------------------


@sqlite
def test_an_older_database_is_upgraded_step_by_step(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(SqliteStore(path)) as old:
        new = added(old)
    now = astera_lite.SCHEMA_VERSION
    scripts = {
        now: "ALTER TABLE jobs ADD COLUMN colour TEXT; UPDATE jobs SET colour = 'red';",
        now + 1: "ALTER TABLE jobs ADD COLUMN shape TEXT; UPDATE jobs SET shape = colour || ' square';",
    }
    monkeypatch.setattr(astera_lite, "SCHEMA_VERSION", now + 2)
    monkeypatch.setattr(astera_lite_database, "UPGRADES", scripts)
    for _ in range(2):
        with closing(SqliteStore(path)) as store:
            assert store.get(new.key) == new
            assert look(path, "PRAGMA user_version") == [(now + 2,)]
            assert look(path, "SELECT shape FROM jobs") == [("red square",)]
    monkeypatch.undo()
    with pytest.raises(StoreError, match=rf"newer version \({now + 2}\)"):
        SqliteStore(path)


@sqlite
def test_a_database_of_version_1_0_opens_and_goes_on(path: str, sink: Sink) -> None:
    text = (ROOT / "tests" / "version-1.0.sql").read_text("utf-8")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(text.replace("127.0.0.1:9470", sink.url.removeprefix("http://")))
        age = round(time.time() * 1000) - db.execute("SELECT max(created) FROM jobs").fetchone()[0]
        for statement in astera_lite._MOVE_TIMES:  # as if it had been written just now: else its jobs are overdue
            db.execute(statement, {"by": age})
        db.commit()
    with AsteraLite(database=path, callback_allow="127.0.0.1") as app:
        found = {job.flow: job for job in app.store.page(0, 100, None, None, None, None)}
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
        assert [token.name for token in app.store.tokens()] == ["ada"]
        with pytest.raises(Conflict):  # the key is taken
            done(app.store.find_key, "done", "", "k1", b"", 0)
    SqliteStore(f"{path}-new").close()
    old, new = (
        look(file, "SELECT name, sql FROM sqlite_schema WHERE type = 'index' ORDER BY name")
        for file in (path, f"{path}-new")
    )
    assert old == new


@sqlite
def test_an_upgrade_deletes_pieces_that_version_1_0_left_behind(path: str) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.executescript((ROOT / "tests" / "version-1.0.sql").read_text("utf-8"))
        before = db.execute("SELECT * FROM pieces").fetchall()
        [(running, attempt)] = db.execute("SELECT seq, attempt FROM jobs WHERE flow = 'busy' LIMIT 1")
        [(ended, last)] = db.execute("SELECT seq, attempt FROM jobs WHERE flow = 'big' AND status = 'Completed'")
        left = [(1, "request_body", 0), (running, "result", attempt), (ended, "result", last + 1)]
        db.executemany("INSERT INTO pieces VALUES (?, ?, ?, 0, x'00')", left)
        db.execute("INSERT INTO pieces VALUES (?, 'request_body', 0, 0, x'00')", (running,))
        db.commit()
    SqliteStore(path).close()
    assert sorted(look(path, "SELECT * FROM pieces")) == sorted([*before, (running, "request_body", 0, 0, b"\0")])


@sqlite
def test_an_upgrade_that_fails_changes_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(SqliteStore(path)) as old:
        new = added(old)
    columns = look(path, "PRAGMA table_info(jobs)")
    with monkeypatch.context() as patched:
        now = astera_lite.SCHEMA_VERSION
        patched.setattr(astera_lite, "SCHEMA_VERSION", now + 1)
        patched.setattr(astera_lite_database, "UPGRADES", {now: "ALTER TABLE jobs ADD COLUMN a; DROP TABLE nowhere;"})
        with pytest.raises(StoreError):
            SqliteStore(path)
    with closing(SqliteStore(path)) as store:
        assert store.get(new.key) == new
        assert look(path, "PRAGMA table_info(jobs)") == columns


@sqlite
def test_every_table_index_and_column_has_a_comment(store: SqliteStore, path: str) -> None:
    lines = (ROOT / "schema.sql").read_text("utf-8").splitlines()
    for n, line in enumerate(lines):
        if line.startswith("CREATE"):
            assert re.match("-- [A-Z].*[.]$", lines[n - 1]), line
    tables = [name for (name,) in look(path, "SELECT name FROM sqlite_schema WHERE type = 'table'")]
    assert sorted(tables) == ["attempts", "callbacks", "clock", "flows", "jobs", "pieces", "steps", "tokens"]
    for table in tables:
        begin = lines.index(f"CREATE TABLE {table} (")
        end = next(n for n in range(begin, len(lines)) if lines[n].startswith(")"))
        for _, column, *_ in look(path, f"PRAGMA table_info({table})"):
            [line] = [text for text in lines[begin:end] if text.split()[:1] == [column]]
            assert re.search("-- .{5,}", line), line


@sqlite
def test_the_schema_says_which_version_it_is(store: SqliteStore, path: str) -> None:
    text = (ROOT / "schema.sql").read_text("utf-8")
    assert f"version {astera_lite.SCHEMA_VERSION} of the schema" in text
    assert look(path, "PRAGMA user_version") == [(astera_lite.SCHEMA_VERSION,)]
    assert look(path, "PRAGMA application_id") == [(astera_lite.APPLICATION_ID,)]


@sqlite
def test_a_write_that_cannot_be_rolled_back_does_not_end_the_writer(store: SqliteStore) -> None:
    class Stubborn:
        """A connection whose next ROLLBACK fails."""

        def __init__(self, connection: Any) -> None:
            self.connection, self.failed = connection, False

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

        def execute(self, sql: str, *values: Any) -> Any:
            if sql == "ROLLBACK" and not self.failed:
                self.failed = True
                raise sqlite3.OperationalError("injected")
            return self.connection.execute(sql, *values)

    store._db = Stubborn(store._db)  # type: ignore[assignment]
    store._run(lambda execute: execute("SELECT * FROM nowhere", ()), lambda *told: None)
    new = added(store)
    assert store.get(new.key) == new


# --- commits by the thread that answers ---


def add(store: SqliteStore, new: Job, size: int = 0) -> list[tuple[Any, Exception | None, int]]:
    """What was told of a job that is not flushed yet, and on which thread."""
    told: list[tuple[Any, Exception | None, int]] = []
    store.add(submission(new, b"x" * size), lambda result, error: told.append((result, error, threading.get_ident())))
    return told


@pytest.fixture
def quick(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> SqliteStore:
    """A store whose disk is quick."""
    monkeypatch.setattr(astera_lite, "_QUICK_S", 60.0)
    store._slow_until = 0.0
    return store


@sqlite
def test_a_flush_commits_on_the_calling_thread(quick: SqliteStore, path: str) -> None:
    jobs = [job() for _ in range(50)]
    told = [add(quick, new) for new in jobs]
    assert not any(told), "nothing is told before it is committed"
    quick.flush()
    assert [found[0] for found in told] == [(new, None, threading.get_ident()) for new in jobs]
    assert look(path, "SELECT count(*) FROM jobs") == [(50,)]


@sqlite
def test_after_a_slow_commit_the_thread_commits_for_a_while(
    quick: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(astera_lite, "_QUICK_S", 0.0)
    monkeypatch.setattr(astera_lite.time, "monotonic", lambda: next(clock) / 1000)
    first = add(quick, job())
    quick.flush()
    assert first, "the disk was quick"
    second = add(quick, job())
    quick.flush()
    until(lambda: second)
    assert second[0][1] is None and second[0][2] != threading.get_ident()


@sqlite
def test_a_disk_is_slow_when_all_of_the_last_commits_were(quick: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now, took = [1000.0], [0.001]

    def add_time(sql: str) -> None:
        now[0] += took[0] if sql == "COMMIT" else 0

    def is_committed_here() -> bool:
        told = add(quick, job())
        quick.flush()
        until(lambda: told)
        return told[0][2] == threading.get_ident()

    monkeypatch.setattr(astera_lite, "_QUICK_S", 0.003)
    monkeypatch.setattr(astera_lite.time, "monotonic", lambda: now[0])
    quick._db.set_trace_callback(add_time)
    assert all(is_committed_here() for _ in range(8))
    took[0] = 0.5
    assert [is_committed_here() for _ in range(9)] == [True] * 8 + [False]
    took[0] = 0.001  # as told by the thread, which may have waited for the interpreter
    assert not is_committed_here()
    now[0] += 100
    assert is_committed_here()


@sqlite
def test_what_the_thread_commits_is_told_by_one_message(quick: SqliteStore) -> None:
    quick._slow_until = time.monotonic() + 600
    posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    told = [add(quick, job()) for _ in range(3)]
    quick.flush(posted.put)
    posted.get(timeout=10)()
    assert [found[0][1:] for found in told] == [(None, threading.get_ident())] * 3


@sqlite
def test_a_lock_of_another_process_holds_up_no_flush(quick: SqliteStore, path: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        told = add(quick, job())
        quick.flush()  # comes back, although the lock is held
        assert not told
        other.execute("ROLLBACK")
    until(lambda: told)
    assert told[0][1] is None


@sqlite
def test_a_bad_row_in_a_flush_fails_alone(quick: SqliteStore) -> None:
    good, bad = job(), job()._replace(created=1 << 70)
    told = [add(quick, new) for new in (good, bad, job())]
    quick.flush()
    until(lambda: all(told))
    assert [type(found[0][1]) for found in told] == [type(None), StoreError, type(None)]
    assert quick.get(good.key) == good


@sqlite
def test_large_jobs_are_left_to_the_thread(quick: SqliteStore) -> None:
    news = [job() for _ in range(8)]
    told = [add(quick, new, 200_000) for new in news]
    quick.flush()
    until(lambda: all(told))
    assert threading.get_ident() not in [found[0][2] for found in told]
    assert all(quick.get(new.key) == new for new in news)


@sqlite
def test_who_is_told_by_the_thread_holds_up_no_flush(quick: SqliteStore) -> None:
    with held(quick):
        told = add(quick, job())
        quick.flush()
        assert told and told[0][1] is None


@sqlite
def test_what_was_added_and_not_flushed_is_stored_when_the_store_is_closed(quick: SqliteStore) -> None:
    told = add(quick, job())
    quick.close()
    assert told and told[0][1] is None
    late = add(quick, job())
    quick.flush()
    assert isinstance(late[0][1], StoreError)


@sqlite
@pytest.mark.parametrize("here", [True, False])
def test_the_log_begins_anew_under_a_steady_load(
    quick: SqliteStore, path: str, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(astera_lite, "_FOLD_AFTER", 400)
    quick._slow_until = 0.0 if here else time.monotonic() + 600

    def is_folded() -> bool:  # by its thread, which a busy machine may start late; then the next write begins anew
        quick.put(None)
        return quick._unfolded < 400 and not (quick._folder and quick._folder.is_alive())

    for _ in range(12):
        told = [add(quick, job(), 10_000) for _ in range(200)]
        quick.flush()
        until(lambda told=told: all(told) and is_folded())
    assert os.stat(f"{path}-wal").st_size < 15 << 20  # of 30 MB


_COLOURED = """
import sys
from contextlib import closing
from test_store import T, done, finish, job, opened, submission

with closing(opened(sys.argv[1])) as store:
    new = job(colour="blue")
    done(store.add, submission(new))
    assert store.get(new.key) == new
    assert done(store.finish, finish(new)) is True
    assert (store.get(new.key).colour, store.page(T, 9, None, None, None, None)[0].colour) == ("blue", "blue")
with closing(opened(sys.argv[1])) as store:
    assert store.get(new.key).colour == "blue"
"""


def test_a_column_is_a_field_a_row_and_a_line_of_the_schema(path: str, tmp_path: Path) -> None:
    """What CONTRIBUTING.md says of a new column is all: statements and records follow."""
    changes = {
        "astera_lite.py": [
            ('    token: str = ""  # name of the client', '    colour: str = ""\n'),
            ('        "base": job.base,\n', '        "colour": job.colour,\n'),
        ],
        "schema.sql": [("    base            TEXT", "    colour TEXT NOT NULL,\n")],
        "schema_postgres.sql": [("    base            text", "    colour text NOT NULL,\n")],
    }
    for file in (*ROOT.glob("astera_lite*.py"), *ROOT.glob("*.sql")):
        text = file.read_text("utf-8")
        for before, line in changes.get(file.name, ()):
            assert text.count(before) == 1
            text = text.replace(before, line + before)
        (tmp_path / file.name).write_text(text, "utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT)])}
    program = [sys.executable, "-c", _COLOURED, path]
    process = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
