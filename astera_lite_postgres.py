"""A store on PostgreSQL, which several servers may share.

A wing of astera_lite, which loads this file, and with it the driver psycopg 3, if `database` is the address of a
PostgreSQL database. astera_lite.SqliteStore describes what a store does; the docstrings here describe the differences.

Each start of a server has a row in `nodes`, with a lease that a thread renews. A job that a server has taken names this
row as its owner. When the lease has run out, any server deletes the row, and the foreign key frees the jobs in the same
transaction. A run changes its job only while the row is still the owner.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Container, Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from astera_lite import (
    END_COLUMNS,
    FROM_JOBS,
    JOB_COLUMNS,
    LIKELY,
    NEW_COLUMNS,
    OF_KEY,
    PIECE,
    AsteraError,
    Busy,
    Claimed,
    ConfigError,
    Delivery,
    Done,
    Execute,
    Fault,
    Finish,
    Flow,
    Job,
    JobKey,
    Progress,
    StoreError,
    StoreReader,
    Submission,
    Writer,
    end_columns,
    find_key,
    ignore_result,
    log,
    new_columns,
    piece_rows,
    purge_jobs,
    read_deliveries,
    resource,
    timestamp,
    to_json,
)

psycopg: Any = None  # loaded with this file; None where it is not installed
with contextlib.suppress(ImportError):
    psycopg = importlib.import_module("psycopg")
logging.getLogger("psycopg").addHandler(logging.NullHandler())  # `fault` reports its warnings

SCHEMA_VERSION = 1
#: Scripts that upgrade the schema by one version, by the version before.
UPGRADES: dict[int, str] = {}
_OLDEST = 14  # version of PostgreSQL; 13 cannot take the largest batches of writes
NODES = 64  # maximum number of servers
CHANNEL = "astera_lite"  # of NOTIFY; a message is words for `news`, separated by spaces

_LOCK = 0x41535431  # advisory lock of the server that creates or upgrades the tables, or takes a number
_LIMIT_LOCK = 0x41535432  # with the hash of a flow's name: lock of the server that counts its runs and adds one
#: A larger batch is sent statement by statement: psycopg's pipeline waits forever for data that does not fit into the
#: buffer of the socket.
_PIPELINE_BYTES = 8 << 10
_PATIENCE_S = 10.0  # minimum wait for an answer of the database; a wait for a lost peer does not always end by itself
_WORDS = ("jobs", "ends", "cancel", "flows", "tokens")  # what there is news about
_RETRY_S = 0.5  # pause between attempts to reach the database
_READERS = 8  # maximum number of connections that read
_TRIES = 4  # attempts to commit a transaction that conflicts with others
_LOOK_S = 1.0  # pause between looks for changes whose notification may be lost
_STRANGE_S = 3600.0  # after this time a job is taken although no server has its flow
_ORPHAN_S = 30.0  # pause between looks for jobs that this server owns but does not know
_FREE_S = 10.0  # pause between looks for free jobs older than the free jobs found last
_LATE = 5000 << 12  # in `seq`: a job may be stored this much later than a job with a younger id
_USED_S = 600.0  # pause between marks that the text of a flow is in use

_NOW = "(extract(epoch FROM now()) * 1000)::bigint"
_FREE = "status = 'Running' AND owner IS NULL AND due IS"
#: Runs of a flow: jobs that servers own, and synchronous calls. Waiting calls count, too, so jobs start after them.
_RUNS = (
    "(SELECT count(*) FROM nodes JOIN jobs ON owner = start WHERE flow = %s)"
    " + (SELECT count(*) FROM calls WHERE flow = %s)"
)
_UNFINISHED = (
    f"{_RUNS} + (SELECT count(*) FROM jobs WHERE {_FREE} NULL AND flow = %s)"
    f" + (SELECT count(*) FROM jobs WHERE {_FREE} NOT NULL AND flow = %s)"
)
#: Calls of a server that may begin: the first ones of each flow, up to the limit minus the jobs that servers own.
_MAY_RUN = (
    "SELECT number FROM unnest(%s::text[], %s::int[]) AS f (name, most), LATERAL"
    " (SELECT owner, number FROM calls WHERE flow = f.name ORDER BY place LIMIT greatest(0, most -"
    " (SELECT count(*) FROM nodes JOIN jobs ON owner = start WHERE flow = f.name))) AS first WHERE owner = %s"
)
#: Takes free jobs, those first whose wait is over.
_CLAIM = (
    f"WITH waited AS (SELECT seq FROM jobs WHERE {_FREE} NOT NULL AND due <= {_NOW} AND flow = ANY(%s)"
    " ORDER BY due LIMIT %s FOR UPDATE SKIP LOCKED),"
    f" fresh AS (SELECT seq FROM jobs WHERE {_FREE} NULL AND flow = ANY(%s) AND seq >= %s ORDER BY seq LIMIT %s"
    " FOR UPDATE SKIP LOCKED)"
    " UPDATE jobs SET owner = %s WHERE seq IN (SELECT seq FROM waited UNION ALL SELECT seq FROM fresh LIMIT %s)"
    " RETURNING seq, due, flow"
)
#: Condition for a server that is gone. If the database itself was away, all leases have run out, and servers that still
#: run get one lease to come back.
_GONE = "lease_until < now() AND pg_postmaster_start_time() < now() - %s * interval '1 second'"

#: Leaves the planner only the primary key to find these rows. Free to choose, it makes a plan for a table with few
#: jobs, and keeps that plan when the table is large.
_HELD = "j.seq = ANY(%s) AND j.seq = v.seq AND j.owner + 0 = v.owner AND j.status || '' = 'Running'"
_FENCE = f"{_HELD} AND j.attempt IN (v.attempt - 1, v.attempt)"  # of an attempt, recorded or about to be
_ROWS = "FROM json_populate_recordset(NULL::jobs, %s) v"
_RUN = "seq bigint, owner bigint, attempt int"


def _end(fence: str) -> str:
    values = ", ".join(f"{column} = v.{column}" for column in END_COLUMNS)
    return (
        f"WITH v AS MATERIALIZED (SELECT * {_ROWS}),"
        f" ended AS (UPDATE jobs j SET {values}, due = NULL, owner = NULL, cancel = false FROM v WHERE {fence}"
        " RETURNING j.seq), gone AS (DELETE FROM steps USING ended WHERE job = seq)"
        " SELECT seq FROM ended UNION ALL SELECT j.seq FROM v JOIN jobs j ON j.seq = v.seq AND j.attempt = v.attempt"
        " AND j.finished = v.finished WHERE j.seq = ANY(%s) AND j.status <> 'Running'"
    )


#: One statement makes all writes of a kind in a batch. Their rows `v` are sent as JSON; all other ways cost the driver
#: four times as much. A statement that changes jobs gets their `seq` as well, and returns the `seq` of changed jobs.
#: The end of a job also gets the `seq` of the writes that may have been committed before.
_STATEMENTS = {
    "add": f"INSERT INTO jobs ({', '.join(NEW_COLUMNS)}, owner) SELECT {', '.join(NEW_COLUMNS)}, owner {_ROWS}"
    " ON CONFLICT (flow, token, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING RETURNING seq",
    "start": "UPDATE jobs j SET attempt = v.attempt, started = v.started, due = NULL"
    f" {_ROWS} WHERE {_FENCE} RETURNING j.seq",
    "save": "INSERT INTO steps (job, path, output) SELECT v.seq, path, output"
    f" FROM json_to_recordset(%s) v ({_RUN}, path text, output text) JOIN jobs j ON {_HELD}"
    " AND j.attempt = v.attempt FOR SHARE OF j"
    " ON CONFLICT (job, path) DO UPDATE SET until = NULL, output = excluded.output RETURNING job",
    "suspend": "WITH waiting AS (UPDATE jobs j SET attempt = v.attempt, started = v.started, due = v.due,"
    " trace = v.trace, owner = CASE WHEN NOT free OR j.cancel THEN v.owner END FROM json_to_recordset(%s) v"
    f" ({_RUN}, started bigint, due bigint, trace text, free bool, path text, until bigint) WHERE {_FENCE}"
    " RETURNING j.seq, path, until) INSERT INTO steps (job, path, until) SELECT seq, path, until FROM waiting"
    " ON CONFLICT (job, path) DO UPDATE SET until = excluded.until, output = NULL RETURNING job",
    "requeue": f"UPDATE jobs j SET attempt = v.attempt - 1, owner = NULL {_ROWS} WHERE {_FENCE} RETURNING j.seq",
    "finish": _end(_FENCE),
    "end": _end(_HELD),  # of a job that no thread runs
    "text": "INSERT INTO flows (version, name, text) SELECT version, name, text"
    " FROM json_populate_recordset(NULL::flows, %s) ON CONFLICT (version) DO UPDATE SET used = now()",
    "owe": "INSERT INTO callbacks (job, receiver, state, next, body) SELECT job, receiver, 'pending', next, body"
    " FROM json_populate_recordset(NULL::callbacks, %s) ON CONFLICT (job) DO NOTHING",
}
_PIECE = "INSERT INTO pieces VALUES (%s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
#: Faults that may pass, by the beginning of SQLSTATE: the write itself is correct and is tried again.
_PASSING = {
    "23503": "this server did not renew its lease in time: it goes on as a new server",  # its row is gone
    "25006": "the database is read-only: it may be a standby; name the primary, or all hosts",
    "42501": "the user of the database may not do what is needed: make it the owner of the tables",
    "40": "other transactions get in the way",
    "53100": "the disk of the database is full: make room",
    "53300": "the database has as many connections as it takes: raise its max_connections",
    "53": "the database is short of memory or of another resource: look at its log",
    "55": "the database is not ready, or a lock is held: look at its log",
    "57014": "the database takes too long: look for a lock, or raise statement_timeout",
    "57": "the database shuts down or starts",
    "58": "the system of the database fails: look at its log",
    "08": "the database cannot be reached",
}
_UNREACHABLE = "the database cannot be reached: start it, or mend the way to it"
_SILENT = "the database does not answer: look at its disk, its standby and the way to it"
_ROW = tuple[Any, ...]


def _passing(error: Exception) -> str | None:
    """The fault in words, if the same write may succeed later; otherwise None."""
    if not isinstance(error, psycopg.Error):
        return "there is not enough memory" if isinstance(error, MemoryError) else None
    code = error.sqlstate
    if code is None:  # not of the database, but of the connection
        lost = _SILENT if str(error) == _SILENT else _UNREACHABLE
        return lost if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError) else None
    return next((words for start, words in _PASSING.items() if code.startswith(start)), None)


def _store_error(error: Exception) -> StoreError:
    """The error with its remedy, in words that reveal neither the statement nor the address."""
    if isinstance(error, StoreError):
        return error
    name = getattr(error, "sqlstate", None) or type(error).__name__
    if name == "42P01":
        return StoreError("the database has no tables yet: a server makes them when it starts")
    return StoreError(_passing(error) or f"the database failed ({name})")


def _parameters(url: str) -> dict[str, Any]:
    """The parameters in an address. Raises ConfigError without the address, which may contain a password."""
    if psycopg is None or tuple(map(int, psycopg.__version__.split(".")[:2])) < (3, 2):
        need = f"PostgreSQL needs psycopg 3.2 or newer, which is not installed for {sys.executable}"
        raise ConfigError([Fault("database", "", f'{need}: pip install "psycopg[binary]"')])
    with contextlib.suppress(psycopg.Error):
        given = dict(psycopg.conninfo.conninfo_to_dict(url))
        # what has an @ is a part of a password; only the name of a socket may begin with one
        if not any("@" in str(given.get(name, ""))[1:] for name in ("host", "port", "dbname")):
            return given
    cure = "write postgresql://USER:PASSWORD@HOST:PORT/NAME, with %40 for an @ in the password, and %2F for a /"
    raise ConfigError([Fault("database", "", f"is no address of a PostgreSQL database: {cure}")])


def _place(parameters: Mapping[str, Any]) -> str:
    """The part of an address that people may see: host and name of the database."""
    return f"PostgreSQL {parameters.get('host') or 'here'}/{parameters.get('dbname') or parameters.get('user') or ''}"


def _format(db: Any, place: str) -> int:
    """The version of the schema, 0 without tables. Raises StoreError if the tables are not ours, or too new."""
    sql = "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = current_schema()::regnamespace"
    tables = {name for (name,) in db.execute(sql)}
    if db.info.server_version < _OLDEST * 10_000:
        raise StoreError(f"{place} is PostgreSQL {db.info.server_version // 10_000}: {_OLDEST} or newer is needed")
    if (encoding := db.info.parameter_status("server_encoding")) != "UTF8":
        cure = "make one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        raise StoreError(f"{place} has the encoding {encoding}, and not UTF8: {cure}")
    if tables and "astera_lite" not in tables:
        raise StoreError(f"{place} is a database of another program: set `database` to another one")
    version: int = db.execute("SELECT version FROM astera_lite").fetchone()[0] if tables else 0
    if version > SCHEMA_VERSION:
        raise StoreError(f"{place} was made by a newer version ({version}): use that one; nothing was changed")
    return version


class _LostConnection(StoreError):
    """An open connection was lost."""


def _wait(db: Any, wait: Callable[..., Any], seconds: float, answer: Any, *more: Any, **named: Any) -> Any:
    """Wait at most this long for an answer of the database; then close the connection, as if it were lost."""

    def within() -> Generator[Any, Any, Any]:
        end = time.monotonic() + seconds
        try:
            wanted = next(answer)
            while (came := (yield wanted)) or time.monotonic() < end:
                wanted = answer.send(came)
        except StopIteration as stop:
            return stop.value
        db.close()
        raise psycopg.OperationalError(_SILENT)

    return wait(within(), *more, **named)


class _Address:
    """The address of the database, and the settings of connections to it."""

    def __init__(self, url: str, lease: float = 15.0, durability: str = "full", writes: bool = True) -> None:
        given = _parameters(url)
        self.place = _place(given)
        self._patience = max(lease, _PATIENCE_S)
        idle = max(1, int(lease / 3))  # a dead peer is noticed within a lease
        usual = {
            "application_name": "astera-lite",
            "connect_timeout": max(2, int(lease / 3)),
            "keepalives_idle": idle,
            "keepalives_interval": max(1, idle // 3),
            "keepalives_count": 3,
            "tcp_user_timeout": int(lease * 1000),
        } | ({"target_session_attrs": "read-write"} if writes else {})
        self._url, self._more = url, {name: value for name, value in usual.items() if name not in given}
        self._more["client_encoding"] = "UTF8"
        sync = "off" if durability != "full" else "on"
        self._set = (
            "SET idle_in_transaction_session_timeout = '10s';"
            # all rows are found by indexes: a plan made for a small table must not scan the table once it is large
            " SET enable_seqscan = off; SET enable_mergejoin = off; SET jit = off;"
            f" SELECT set_config('synchronous_commit', '{sync}', false)"
            f" WHERE '{sync}' = 'off' OR current_setting('synchronous_commit') IN ('off', 'local')"
        )

    def connect(self, autocommit: bool = True) -> Any:
        """A new connection; raises psycopg.Error."""
        db = psycopg.connect(self._url, autocommit=True, **self._more)
        db.wait = partial(_wait, db, db.wait, self._patience)
        try:
            db.execute(self._set)
            db.autocommit = autocommit
        except BaseException:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def first(self) -> Iterator[Any]:
        """The first connection of a program. Errors name the database."""
        try:
            with contextlib.closing(self.connect()) as db:
                yield db
        except psycopg.Error as error:
            words = " ".join(str(error).partition("\nLINE ")[0].split())  # without the statement
            raise StoreError(f"{self.place}: {words or _UNREACHABLE}") from None


def _prepare(db: Any, place: str) -> None:
    """Create the tables, or upgrade them to the present version of the schema."""
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
        version = _format(db, place)
        scripts = [UPGRADES[old] for old in range(version, SCHEMA_VERSION)] if version else []
        if not version:
            scripts = [resource("schema_postgres.sql").decode(), "INSERT INTO astera_lite VALUES (0)"]
        for script in scripts:
            db.execute(script)
            for table, columns in re.findall(r"CREATE TABLE (\w+) \((.*?)\n\)", script, re.DOTALL):
                for column, words in re.findall("^ +([a-z_]+) .*? -- (.+)", columns, re.MULTILINE):
                    text = words.replace("'", "''")
                    db.execute(f"COMMENT ON COLUMN {table}.{column} IS '{text}'")
        if scripts:
            db.execute("UPDATE astera_lite SET version = %s", (SCHEMA_VERSION,))


@contextlib.contextmanager
def transaction(url: str, locked: Collection[str], news: str = "") -> Iterator[Any]:
    """A connection with a transaction in which the `locked` tables change only here. Creates missing tables.

    Servers that run hear the `news`. Raises StoreError, ConfigError.
    """
    address = _Address(url)
    with address.first() as db:
        _prepare(db, address.place)
        with db.transaction():
            db.execute(f"LOCK TABLE {', '.join(locked)} IN SHARE ROW EXCLUSIVE MODE")
            del db.wait  # what follows takes as long as it takes, and a person can end it
            yield db
            db.execute("SELECT pg_notify(%s, %s)", (CHANNEL, news))


class PostgresReader(StoreReader):
    """Reads from a database."""

    _to_cancel = "cancel"
    _whole_result = (
        "coalesce(result, (SELECT string_agg(data, '' ORDER BY n) FROM pieces WHERE job = seq AND part = 'result'))"
    )

    def __init__(self, url: str) -> None:
        self._address = _Address(url, writes=False)
        self._begin()
        with self._address.first() as db:
            self._has_tokens = _format(db, self._address.place) > 0

    def _begin(self) -> None:
        StoreReader.__init__(self)
        self._room = threading.BoundedSemaphore(_READERS)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        """Borrow a connection."""
        with self._room:
            db = None
            try:
                with contextlib.suppress(IndexError):  # another thread may have taken the last one
                    db = self._idle.pop()
                db = db or self._address.connect()
                yield db
            except psycopg.Error as error:
                if db is not None and error.sqlstate == "25006":  # the primary is another host by now
                    db.close()
                if db is None or not db.closed:
                    raise _store_error(error) from None
                StoreReader.close(self)  # the idle connections are of no use either
                raise _LostConnection(str(_store_error(error))) from None
            finally:
                if db is not None and not db.closed:
                    self._idle.append(db)

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a statement, which is sent again if an idle connection turns out to be lost."""
        while True:
            was_idle = bool(self._idle)
            try:
                with self._reading() as db:
                    rows: list[Any] = db.execute(sql.replace("?", "%s"), values, binary=True).fetchall()
                    return rows
            except _LostConnection:
                if not was_idle:
                    raise

    def result_pieces(self, key: JobKey, start: int, stop: int) -> Iterator[bytes]:
        """Raises StoreError: `result` has the whole body, unless the database has lost it."""
        raise StoreError("a part of the result is missing")

    def clock_offset(self) -> int:
        """0: all times come from the database."""
        return 0

    def size(self) -> int:
        """Size of the database in bytes."""
        return int(self._first("SELECT pg_database_size(current_database())")[0])


class _Write(NamedTuple):
    """A write of a kind in _STATEMENTS that belongs to a job, or a function to `run` by itself."""

    kind: str = ""
    seq: int = 0
    values: Mapping[str, Any] = {}  # by column; `owner` is added
    new: Any = None  # the Submission of an "add"
    pieces: Sequence[_ROW] = ()  # of bodies that are too large for their columns
    owed: tuple[str, str] | None = None  # receiver and body of the callback that is owed once the write is made
    run: Callable[[Execute], Any] | None = None
    done: Done = ignore_result
    keep: bool = False  # tried again when the database cannot be reached, instead of failed
    word: str = ""  # news for other servers
    limited: str = ""  # the flow whose limit it counts for
    is_again: bool = False  # it may have been committed before

    @property
    def size(self) -> int:
        """Approximate number of bytes that are sent."""
        texts = [value for value in self.values.values() if isinstance(value, str | bytes)]
        return sum(map(len, texts)) + len(self.pieces) * PIECE + 300


def _grouped(batch: Iterable[_Write]) -> list[list[_Write]]:
    """Groups of writes of one kind, one statement each, in which the writes of each job keep their order."""
    groups: list[list[_Write]] = []
    free_from = 0  # the first group that a write may join: the one after the last `run`
    last: dict[int, int] = {}
    for write in batch:
        if write.run is not None:
            groups.append([write])
            free_from = len(groups)
            continue
        at = max(free_from, last.get(write.seq, -1) + 1)
        while at < len(groups) and groups[at][0].kind != write.kind:
            at += 1
        if at == len(groups):
            groups.append([])
        groups[at].append(write)
        last[write.seq] = at
    return groups


def _execute(db: Any, sql: str, values: Sequence[Any] = ()) -> Any:
    """Execute a statement of astera_lite, in which `?` stands for a value."""
    return db.execute(sql.replace("?", "%s"), values)


def _ids(seqs: Iterable[Any]) -> str:
    return f"{{{','.join(map(str, seqs))}}}"


def _many(db: Any, kind: str, rows: Sequence[Mapping[str, Any]], again: Iterable[int] = ()) -> Any:
    """Execute the statement of a kind with these rows; `again`: those that may have been committed before."""
    values = [
        {
            column: value if value.__class__ is not bytes else f"\\x{value.hex()}"
            for column, value in row.items()
            if value is not None
        }
        for row in rows
    ]
    sql = _STATEMENTS[kind]
    return db.execute(sql, [to_json(values), _ids(row.get("seq") for row in rows), _ids(again)][: sql.count("%s")])


def _changed(group: list[_Write], stored: Iterable[tuple[int]]) -> list[bool]:
    """For each write of a group, whether it changed its job."""
    seqs = {seq for (seq,) in stored}
    return [write.seq in seqs for write in group]


def _insert(db: Any, writes: Sequence[_Write], owner: int) -> Any:
    owners = [owner if write.new.owned and write.new.ended is None else None for write in writes]
    rows = [{**write.values, "owner": owner} for write, owner in zip(writes, owners, strict=True)]
    return _many(db, "add", rows)


def _store_belongings(db: Any, writes: Sequence[_Write]) -> None:
    """Store the pieces of large bodies and the callbacks that are owed, of writes that have changed their jobs."""
    for write in writes:
        for piece in write.pieces:
            db.execute(_PIECE, piece)
    owed = [
        {"job": write.seq, "receiver": write.owed[0], "next": write.values["finished"], "body": write.owed[1]}
        for write in writes
        if write.owed
    ]
    if owed:
        _many(db, "owe", owed)


def _full(execute: Execute, flow: str, limit: int) -> Busy | None:
    """The refusal of a flow of which as many jobs and calls are unfinished, on all servers together."""
    if execute(f"SELECT {_UNFINISHED}", (flow,) * 4).fetchone()[0] < limit:
        return None
    return Busy(f"The flow has reached its limit of concurrent runs ({limit}). Try again later.", 1, 429)


def _add_one(db: Any, write: _Write, owner: int) -> Job | AsteraError:
    """Add a job whose key may belong to another one, or whose flow may have as many jobs as its limit allows."""
    new, execute = write.new, partial(_execute, db)
    of_key = (new.job.flow, new.job.token, new.idempotency_key)
    for _ in range(_TRIES):
        if new.idempotency_key is not None:
            known = find_key(*of_key, new.fingerprint, new.job.created, execute)
            if known is not None:
                return known
            expired = "UPDATE jobs SET idempotency_key = NULL WHERE (flow, token, idempotency_key) = (%s, %s, %s)"
            db.execute(f"{expired} AND expires <= %s", (*of_key, new.job.created))
        if write.limited and (full := _full(execute, new.job.flow, new.limit)):
            return full
        if _insert(db, [write], owner).fetchall():
            _store_belongings(db, [write])
            return new.job  # type: ignore[no-any-return]
    raise StoreError("other requests with that Idempotency-Key get in the way")


class PostgresStore(PostgresReader, Writer):
    """The store of a server that may be one of several. `lease` is in seconds; people see `name`.

    One thread commits all waiting writes together. A second thread renews the lease, listens to the other servers, and
    frees the jobs of servers that are gone.
    """

    shared = True
    nodes = NODES
    _locked, _freed = " FOR UPDATE", ", owner = NULL"

    def __init__(self, url: str, *, durability: str = "full", lease: float = 15.0, name: str = "") -> None:
        self._address = _Address(url, lease, durability)
        self._lease, self._name = lease, name
        self._begin()
        Writer.__init__(self)
        self.queued = 0  # free jobs that do not wait, as of the last second, and those that this server added since
        self.node = self._start = 0
        self._news: Callable[[str], None] = lambda word: None
        self._words: set[str] = set()  # news that this server may have missed
        self._progress: Callable[[], Mapping[int, Progress]] = dict
        self._flows: Collection[str] = ()  # names of those in service
        self._used: dict[int, float] = {}  # by version of a flow: when its text was marked as used, monotonic
        self._strange: dict[int, float] = {}  # by `seq` of a free job of an unknown flow: when it was found, monotonic
        self._orphans: set[int] = set()  # jobs that this server owned but did not know at the last look
        self._orphans_at = 0.0  # time of the next such look, monotonic
        self._mine: dict[int, int] = {}  # by `seq` of a job in hand: the start of this server that took the job
        self.calls: dict[int, tuple[Flow, float, Callable[[Any], None]]] = {}  # that wait, by number: see `enter_call`
        self._free_from = 0  # no job with a smaller `seq` is free
        self._free_at = 0.0  # time until which `_free_from` is valid, monotonic
        self._renew_at = 0.0  # time of the next renewal of the lease, monotonic
        self._bury_at = 0.0  # time until which live servers may seem gone, because this one was cut off, too; monotonic
        self._offset = 0.0  # milliseconds from the monotonic clock to the clock of the database
        with self._address.first() as db:
            _prepare(db, self._address.place)
            self._take_number(db)
        self._db: Any = None  # the connection that writes
        self._pid = 0  # of the backend of that connection
        self._end = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="astera-lease", daemon=True)
        self._thread.start()
        self._follower.start()

    def open(self, news: Callable[[str], None], progress: Callable[[], Mapping[int, Progress]]) -> None:
        """Listen to other servers: a thread of the store calls `news(word)`. `progress` gives that of the runs."""
        self._news, self._progress = news, progress
        self._words = set(_WORDS)  # behind `_news`, for the thread may have told some to nobody

    def close(self, timeout_s: float = 10.0) -> None:
        """Make all queued writes, leave the jobs in hand to other servers, and close the connections."""
        self._end.set()
        if self.end(timeout_s) and self._db is not None:
            self._db.close()
        self._follower.join(timeout_s)
        with contextlib.suppress(StoreError), self._reading() as db:
            db.execute("DELETE FROM nodes WHERE start = %s", (self._start,))
            db.execute("SELECT pg_notify(%s, 'freed jobs')", (CHANNEL,))
        super().close()

    # --- the server as one of several ---

    def _take_number(self, db: Any) -> None:
        """Join the servers, with the smallest free number."""
        began = time.monotonic()
        with db.transaction():
            db.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            if began >= self._bury_at and db.execute(f"DELETE FROM nodes WHERE {_GONE}", (self._lease,)).rowcount:
                db.execute("SELECT pg_notify(%s, 'freed jobs')", (CHANNEL,))
            row = db.execute(
                "INSERT INTO nodes (number, name, lease_until) SELECT min(n), %s, now() + %s * interval '1 second'"
                " FROM generate_series(0, %s) n WHERE n NOT IN (SELECT number FROM nodes) HAVING min(n) IS NOT NULL"
                " RETURNING start, number",
                (self._name, self._lease, NODES - 1),
            ).fetchone()
        if row is None:
            raise StoreError(f"{NODES} servers use this database, which is as many as can: stop one")
        self._mine, lost = {}, list(self.calls)
        self._start, self.node = row
        self._leased_until = began + self._lease
        self._news("lost")  # at once: the next statements may fail
        for number in lost:  # which no server counts any more
            self.answer_call(number, StoreError(_PASSING["23503"]))
        self._keep_time(db)

    def _keep_time(self, db: Any) -> None:
        before = time.monotonic()
        (now,) = db.execute(f"SELECT {_NOW}").fetchone()
        self._offset = now - (before + time.monotonic()) * 500

    def leased(self) -> bool:
        """Whether the lease is valid, so that no other server can have the jobs of this one."""
        return time.monotonic() < self._leased_until

    def _is_late(self) -> bool:
        """Whether the last renewal began longer ago than half a lease; renewals are a third of a lease apart."""
        return time.monotonic() > self._leased_until - self._lease / 2

    def owns(self, seq: int) -> bool:
        """Whether a job in hand was taken under the present lease, and so is not lost."""
        return self._mine.get(seq) == self._start

    def now(self) -> int:
        """Milliseconds since the epoch by the clock of the database, as of the last renewal of the lease."""
        return int(time.monotonic() * 1000 + self._offset)

    def _follow(self) -> None:
        """The thread that renews the lease and hears of other servers."""
        db, look_at, was_cut = None, 0.0, False
        while not self._end.is_set():
            if self.calls:  # something may have ended, or the database is away
                self.put(None)
            try:
                if db is None or db.closed:
                    db = self._address.connect()
                    # a lock on jobs must not cost the lease
                    db.execute(f"SET lock_timeout = {int(self._lease * 200)}; LISTEN {CHANNEL}")
                    self._words = set(_WORDS)
                    self._renew_at = 0.0
                now = time.monotonic()
                if now >= self._renew_at:
                    if was_cut:
                        self._bury_at, was_cut = now + self._lease, False
                    self._renew_at = now + self._lease / 3
                    self._renew(db)
                if now >= look_at:
                    look_at = now + _LOOK_S
                    self._bury(db)
                while self._words:
                    word = self._words.pop()
                    self._news(word)
                wait = max(0.0, min(self._renew_at, look_at) - time.monotonic())
                for told in db.notifies(timeout=min(wait, 0.2), stop_after=1):
                    if told.pid != self._pid:
                        for word in told.payload.split():
                            if word == "freed":
                                self._free_from, self._free_at = 0, 0.0
                            else:
                                self._news(word)
            except psycopg.errors.LockNotAvailable:
                self._renew_at = 0.0
            except Exception as error:  # the lease depends on this thread
                if db is not None:
                    db.close()
                was_cut = True
                level = log.debug if isinstance(error, psycopg.Error) else log.exception
                level("the lease: %s", error)
                self._end.wait(_RETRY_S)
        if db is not None:
            db.close()

    def _renew(self, db: Any) -> None:
        """Renew the lease, and store the progress of the runs."""
        progress = to_json({str(seq): list(far) for seq, far in self._progress().items()})
        sql = "UPDATE nodes SET lease_until = now() + %s * interval '1s', progress = %s, flows = %s WHERE start = %s"
        began = time.monotonic()
        is_there = db.execute(sql, (self._lease, progress, to_json(sorted(self._flows)), self._start)).rowcount
        if self._is_late():  # the others may have been held up as long, and are to have a lease to come back
            self._bury_at = time.monotonic() + self._lease
        if is_there:
            self._leased_until = began + self._lease
            self._keep_time(db)
        else:
            self._take_number(db)

    def _bury(self, db: Any) -> None:
        """Free the jobs of servers whose lease has run out, and count jobs."""
        began = time.monotonic()
        if began >= self._free_at:
            self._free_from = 0
        sql = f"SELECT count(*), min(seq), (SELECT max(seq) FROM jobs) FROM jobs WHERE {_FREE} NULL AND seq >= %s"
        self.queued, first, last = db.execute(sql, (self._free_from,)).fetchone()
        if not self._free_from:
            sql = "UPDATE nodes SET jobs = (SELECT count(*) FROM jobs WHERE owner = start) WHERE start = %s"
            db.execute(sql, (self._start,))
            self._free_at = began + max(_FREE_S, 20 * (time.monotonic() - began))
        self._free_from = max(0, (first or last or 0) - _LATE)
        if began < self._bury_at or self._is_late():
            return
        sql = (
            f"DELETE FROM nodes WHERE start IN (SELECT start FROM nodes WHERE {_GONE} AND start <> %s"
            " FOR UPDATE SKIP LOCKED) RETURNING name"
        )
        gone = db.execute(sql, (self._lease, self._start)).fetchall()
        for (name,) in gone:
            log.warning("the server %s is not heard of any more: its jobs are free", name)
        if gone:  # this server hears the notification, too
            db.execute("SELECT pg_notify(%s, 'freed jobs')", (CHANNEL,))

    def members(self) -> list[dict[str, Any]]:
        """The servers that use the database, as people see them; their numbers of jobs are some seconds old."""
        rows = self._all(
            "SELECT name, number, (extract(epoch FROM since) * 1000)::bigint,"
            " (extract(epoch FROM lease_until - clock_timestamp()) * 1000)::bigint,"
            " jobs, start = %s FROM nodes ORDER BY number",
            (self._start,),
        )
        members = ("name", "number", "since", "leaseLeftMs", "jobs", "self")
        return [dict(zip(members, (*row[:2], timestamp(row[2]), *row[3:]), strict=True)) for row in rows]

    def progress(self, key: JobKey) -> Progress | None:
        """The progress of a job on any server, as of the last renewal of that server's lease."""
        sql = f"SELECT progress::jsonb ->> seq::text FROM jobs JOIN nodes ON start = owner{OF_KEY}"
        row = self._first(sql, key)
        return Progress(*json.loads(row[0])) if row and row[0] else None

    # --- writing ---

    def _run(self, run: Callable[[Execute], Any], done: Done, keep: bool = False, word: str = "") -> None:
        self.put(_Write(run=run, done=done, keep=keep, word=word))

    def _do(
        self, sql: str, values: Sequence[Any], done: Done = ignore_result, keep: bool = False, word: str = ""
    ) -> None:  # in a pipeline only returned rows tell whether anything changed
        self._run(lambda execute: bool(execute(f"{sql} RETURNING 1", values).fetchall()), done, keep, word)

    def _probe(self, execute: Execute) -> None:
        """Fail like a write without an owner if another server has deleted the row of this one."""
        if not execute("UPDATE nodes SET name = name WHERE start = ? RETURNING 1", (self._start,)).fetchall():
            raise psycopg.errors.ForeignKeyViolation("its lease has run out")

    def _with_probe(self, batch: list[Any]) -> list[Any]:
        probes = [_Write(run=self._probe)] if self.fault else []
        if self.calls:  # last, for what ends with the batch leaves room
            probes.append(_Write(run=self._may_run, done=self._let_in))
        return [*batch, *probes]

    def _note(self, error: Exception, batch: list[Any]) -> tuple[AsteraError, bool]:
        code, words = getattr(error, "sqlstate", None), _passing(error)
        if code == "23505" and batch[0].kind == "add":  # this server lost its lease, and another one has its number
            return Busy("The server did not renew its lease in time and starts anew: try again.", 1), False
        if code == "23503":
            self._renew_at = 0.0
        if words is not None:
            if self.fault is None:
                log.error("PostgreSQL: %s", str(error).strip())
            self.fault = words
            batch[:] = [write._replace(is_again=True) for write in batch]
            if self._db is not None:  # another host may be the one to write to by now
                self._db.close()
        return error if isinstance(error, AsteraError) else _store_error(error), words is not None

    def _write(self, batch: list[Any]) -> list[Any]:
        for _ in range(_TRIES - 1):
            try:
                return self._transact(batch)
            except psycopg.Error as error:
                if not (error.sqlstate or "").startswith("40"):
                    raise
        return self._transact(batch)

    def _transact(self, batch: list[_Write]) -> list[Any]:
        """Make all writes of a batch in one transaction: the result of each."""
        if self._db is None or self._db.closed:
            self._db = self._address.connect(autocommit=False)
            self._pid = self._db.info.backend_pid
        db, made = self._db, list[tuple[list[_Write], Callable[[], list[Any]]]]()
        try:
            small = sum(write.size for write in batch) < _PIPELINE_BYTES
            with db.pipeline() if small else contextlib.nullcontext():  # all is sent before the first answer is read
                # in one order, or two servers would wait for each other
                for flow in sorted({write.limited for write in batch if write.limited}):
                    db.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (_LIMIT_LOCK, flow))
                for group in _grouped(batch):
                    made.append((group, self._make(db, group)))
                words = {write.word for write in batch if write.word}
                if words:
                    db.execute("SELECT pg_notify(%s, %s)", (CHANNEL, " ".join(words)))
                db.commit()
        except BaseException:
            with contextlib.suppress(psycopg.Error):
                db.rollback()
            raise
        if self.fault:
            log.info("the database can be written again")
            self.fault = None
        results = {id(write): result for group, read in made for write, result in zip(group, read(), strict=True)}
        return [results[id(write)] for write in batch]

    def _make(self, db: Any, group: list[_Write]) -> Callable[[], list[Any]]:
        """Send the writes of a group. The returned function reads the result of each, after the commit."""
        first = group[0]
        if first.run is not None:
            result = first.run(partial(_execute, db))
            return lambda: [result]
        if first.kind == "add":
            return self._make_add(db, group)
        rows = [{"seq": write.seq, "owner": self._start, **write.values} for write in group]
        stored = _many(db, first.kind, rows, [write.seq for write in group if write.is_again])
        if any(write.pieces or write.owed for write in group):  # these wait for the answer: only what changed a job
            stored = stored.fetchall()
            changed = {seq for (seq,) in stored}
            _store_belongings(db, [write for write in group if write.seq in changed])
        return partial(_changed, group, stored)

    def _make_add(self, db: Any, group: list[_Write]) -> Callable[[], list[Any]]:
        now, owner = time.monotonic(), self._start
        texts = {
            new.job.version: {"version": new.job.version, "name": new.job.flow, "text": new.flow_text}
            for new in (write.new for write in group)
            if self._used.get(new.job.version, -math.inf) < now - _USED_S
        }
        if texts:
            _many(db, "text", [texts[version] for version in sorted(texts)])
        plain = [write for write in group if not write.limited]
        single = [write for write in group if write.limited]
        if plain:
            cursor = _insert(db, plain, owner)
            if any(write.new.idempotency_key is not None for write in plain):
                stored = {seq for (seq,) in cursor}
                single += [write for write in plain if write.seq not in stored]
                plain = [write for write in plain if write.seq in stored]
            _store_belongings(db, plain)
        answers = {write.seq: _add_one(db, write, owner) for write in single}

        def read() -> list[Any]:
            self._used.update(dict.fromkeys(texts, now))
            results = [answers.get(write.seq) or write.new.job for write in group]
            for write, result in zip(group, results, strict=True):
                if result is write.new.job and not write.new.ended:
                    if write.new.owned:
                        self._mine[write.seq] = owner
                    else:
                        self.queued += 1
            return results

        return read

    # --- jobs ---

    def add(self, submission: Submission, done: Done) -> None:
        """Queue a new job for `flush`; `done` gets the job, or the earlier one that has its key, Conflict or Busy."""
        job, ended = submission.job, submission.ended
        pieces = piece_rows(job.key, "request_body", 0, submission.request.body)
        if ended:
            pieces += piece_rows(job.key, "result", ended.job.attempt, ended.outcome.answer.body)
        word = "" if submission.owned or ended else "jobs"
        limited = "" if submission.limit is None else job.flow
        values, owed = new_columns(submission), ended and ended.callback
        self.new.append(
            _Write("add", job.key.seq, values, submission, pieces, owed, done=done, word=word, limited=limited)
        )

    # --- runs ---

    def claim(self, held: Container[int], limit: int, flows: Mapping[str, int | None] = {}) -> list[Claimed]:
        """Take at most `limit` free jobs of these flows, the oldest first.

        The limit of a flow counts on all servers together. Also returns jobs that this server owns but that were not in
        `held` at two looks, and jobs whose flow no server has had for an hour.
        """
        self._flows = flows
        found, start = list[_ROW](), self._start
        try:
            with self._reading() as db:

                def take(flows: list[str], most: int) -> list[_ROW]:
                    values = (flows, max(0, most), flows, self._free_from, max(0, most), start, max(0, most))
                    return list(db.execute(_CLAIM, values))

                limited = sorted(flow for flow, most in flows.items() if most is not None)
                sql = f"SELECT DISTINCT flow FROM jobs WHERE {_FREE} NULL AND flow = ANY(%s) AND seq >= %s"
                sql += f" UNION SELECT flow FROM jobs WHERE {_FREE} NOT NULL AND due <= {_NOW} AND flow = ANY(%s)"
                for (flow,) in db.execute(sql, (limited, self._free_from, limited)).fetchall() if limited else ():
                    with db.transaction():
                        db.execute("SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (_LIMIT_LOCK, flow))
                        room = (flows[flow] or 0) - db.execute(f"SELECT {_RUNS}", (flow,) * 2).fetchone()[0]
                        taken = take([flow], min(room, limit - len(found)))
                    found += taken
                found += take([flow for flow in flows if flow not in limited], limit - len(found))
                now = time.monotonic()
                if now >= self._orphans_at and not self.fault:
                    self._orphans_at = now + _ORPHAN_S
                    found += self._look_for_lost(db, held, now, list(flows))
        except StoreError:  # the jobs taken so far must run
            if not found:
                raise
        self._mine |= {row[0]: start for row in found if row[0] not in held}
        return [Claimed(*row) for row in sorted(found)]

    def _look_for_lost(self, db: Any, held: Container[int], now: float, flows: list[str]) -> list[_ROW]:
        """Jobs that this server owns but does not know, and free jobs whose flow no server has."""
        sql = "SELECT seq, due, flow FROM jobs WHERE owner = %s"
        mine = [row for row in db.execute(sql, (self._start,)).fetchall() if row[0] not in held]
        found = [row for row in mine if row[0] in self._orphans]
        self._orphans = {row[0] for row in mine}
        sql = "SELECT json_array_elements_text(flows::json) FROM nodes WHERE lease_until > now() AND start <> %s"
        flows = [*flows, *(flow for (flow,) in db.execute(sql, (self._start,)))]
        sql = (
            f"(SELECT seq FROM jobs WHERE {_FREE} NULL AND flow <> ALL(%s) ORDER BY seq LIMIT 1000) UNION ALL"
            f" (SELECT seq FROM jobs WHERE {_FREE} NOT NULL AND due <= {_NOW} AND flow <> ALL(%s) LIMIT 1000)"
        )
        self._strange = {seq: self._strange.get(seq, now) for (seq,) in db.execute(sql, (flows, flows))}
        old = [seq for seq, since in self._strange.items() if since <= now - _STRANGE_S]
        sql = "UPDATE jobs SET owner = %s WHERE seq = ANY(%s) AND status = 'Running' AND owner IS NULL"
        return [*found, *db.execute(f"{sql} RETURNING seq, due, flow", (self._start, old))]

    def enter_call(self, number: int, flow: Flow, deadline: float, tell: Callable[[Any], None]) -> None:
        """Count a call of a flow with a limit on all servers; `tell` gets None once it may run, Busy, or StoreError."""
        owner = self._start
        self.calls[number] = flow, deadline, tell

        def run(execute: Execute) -> Busy | None:
            full = _full(execute, flow.name, flow.limit or 0) if flow.when_full == "refuse" else None
            if full is None and number in self.calls:  # else it was refused meanwhile
                execute("INSERT INTO calls (owner, number, flow) VALUES (?, ?, ?)", (owner, number, flow.name))
            return full

        def entered(_: Any, error: AsteraError | None) -> None:
            if error:
                self.answer_call(number, error)

        self.put(_Write(run=run, done=entered, limited=flow.name))

    def _may_run(self, execute: Execute) -> set[int]:
        limits = {flow.name: flow.limit for flow, _, _ in list(self.calls.values())}
        rows = execute(_MAY_RUN, (list(limits), list(limits.values()), self._start)).fetchall()
        return {number for (number,) in rows}

    def _let_in(self, may_run: Any, error: AsteraError | None) -> None:
        """Tell the calls that may run, or all that wait why they cannot."""
        for number in list(self.calls) if error else may_run:
            self.answer_call(number, error)

    def answer_call(self, number: int, refusal: Any) -> None:
        """Tell a call, if it still waits, that it may run (None), or why not. Any thread may call."""
        call = self.calls.pop(number, None)
        if call is not None:
            call[2](refusal)

    def leave_call(self, number: int, done: Done = ignore_result) -> None:
        """Count a call no longer; `done` is called once that is stored, or at once if the database is away."""
        self.calls.pop(number, None)

        def run(execute: Execute) -> None:
            execute("DELETE FROM calls WHERE owner = ? AND number = ?", (self._start, number))

        def left(_: Any, error: AsteraError | None) -> None:
            if error is not None:
                self._run(run, ignore_result, keep=True, word="ends")
            elif self.queued:  # a job may begin
                self._news("jobs")
            done(None, None)

        if self.fault:
            left(None, StoreError(self.fault))
        else:
            self._run(run, left, word="ends")

    def start(self, key: JobKey, attempt: int, started: int, done: Done = ignore_result) -> None:
        """Record that a run began; `done` gets whether the job is this server's, at this attempt or the one before."""
        self.put(_Write("start", key.seq, {"attempt": attempt, "started": started}, done=done, keep=True))

    def save_step(self, key: JobKey, attempt: int, path: str, output: str, done: Done = ignore_result) -> None:
        """Save the output (JSON) of a finished step; `done` gets whether the job is this server's, at this attempt."""
        values = {"attempt": attempt, "path": path, "output": output}
        self.put(_Write("save", key.seq, values, done=done, keep=True))

    def suspend(self, job: Job, path: str, until: int, trace: str, is_free: bool, done: Done) -> None:
        """Record that a job waits until it is `due`. If `is_free`, no server owns the job while it waits."""
        if is_free:
            self._mine.pop(job.key.seq, None)
        of_job = {"attempt": job.attempt, "started": job.started, "due": job.due, "trace": trace, "free": is_free}
        values = of_job | {"path": path, "until": until}
        self.put(_Write("suspend", job.key.seq, values, done=done, keep=True, word="ends" if is_free else ""))

    def requeue(self, key: JobKey, attempt: int) -> None:
        """Record that an orderly stop ended a run, and leave the job to any server."""
        self.put(_Write("requeue", key.seq, {"attempt": attempt}, keep=True, word="freed jobs"))

    def release(self, seqs: list[int]) -> None:
        """Leave jobs of this server that no thread runs to any server."""
        sql = "UPDATE jobs SET owner = NULL WHERE seq = ANY(%s) AND owner = %s AND status = 'Running'"
        self._do(sql, (seqs, self._start), keep=True, word="freed jobs")

    def finish(self, finish: Finish, done: Done) -> None:
        """End a job of this server; `done` gets whether it was Running, at this attempt if it is fenced."""
        key = finish.job.key
        self._mine.pop(key.seq, None)
        pieces = piece_rows(key, "result", finish.job.attempt, finish.outcome.answer.body)
        kind, values, owed = "finish" if finish.fenced else "end", end_columns(finish), finish.callback
        self.put(_Write(kind, key.seq, values, None, pieces, owed, done=done, keep=True, word="ends"))

    def ask_cancel(self, key: JobKey, done: Done = ignore_result) -> None:
        """Ask the owner of a Running job, or this server if it has none, to cancel it; `done` gets whether it runs."""
        sql = f"UPDATE jobs SET cancel = true, owner = coalesce(owner, %s){OF_KEY} AND status = 'Running'"
        self._do(sql, (self._start, *key), done, word="cancel")

    def cancelled(self) -> list[Job]:
        """Jobs of this server that are to be cancelled; jobs without an owner become jobs of this server."""
        sql = "UPDATE jobs SET owner = %s WHERE owner IS NULL AND cancel AND status = 'Running' RETURNING seq"
        self._all(sql, (self._start,))
        return self._jobs(" WHERE jobs.owner = ? AND cancel AND status = 'Running' ORDER BY seq", (self._start,))

    # --- callbacks ---

    def claim_deliveries(
        self, now: int, limit: int, *, held: Collection[JobKey], busy: Collection[str], likely: bool
    ) -> list[tuple[Job, Delivery]]:
        """Take callbacks that are due, except those in `held` and those for busy receivers.

        They belong to this server until it records the outcome, or its lease runs out.
        """
        sql = (
            "WITH due AS (SELECT job FROM callbacks c JOIN jobs ON seq = job WHERE state = 'pending' AND next <= %s"
            " AND expires > %s AND receiver <> ALL(%s) AND job <> ALL(%s) AND (c.owner IS NULL OR c.owner = %s)"
            f"{LIKELY if likely else ''} ORDER BY next LIMIT %s FOR UPDATE OF c SKIP LOCKED)"
            " UPDATE callbacks SET owner = %s WHERE job IN (SELECT job FROM due) RETURNING job"
        )
        values = (now, now, list(busy), [key.seq for key in held], self._start, limit, self._start)
        with self._reading() as db:
            ids = db.execute(sql, values).fetchall()
        if not ids:
            return []
        sql = f"SELECT {JOB_COLUMNS}, receiver, request{FROM_JOBS} WHERE seq = ANY(?) ORDER BY c.next"
        return read_deliveries(self._all(sql, ([seq for (seq,) in ids],)))

    # --- what is due for all ---

    def purge(self, now: int, limit: int, done: Done) -> None:
        """Delete at most `limit` expired jobs that no other server deletes now; `done` gets how many."""
        lock = " FOR UPDATE SKIP LOCKED"
        self._run(lambda execute: len(purge_jobs(execute, now, limit, lock=lock)), done)

    def forget_flows(self) -> None:
        """Delete the texts of flows that no job refers to and that no server has used for a while."""
        sql = (
            "DELETE FROM flows WHERE used < now() - %s * interval '1 second' AND NOT EXISTS"
            " (SELECT 1 FROM jobs WHERE flow = flows.name AND jobs.version = flows.version)"
        )
        with self._reading() as db:  # so that no write waits for this one
            db.execute(sql, (3 * _USED_S,))

    def last_seen(self) -> int:
        """0: the time comes from the database."""
        return 0

    def keep_clock_offset(self, offset: int) -> None:
        """Does nothing: the time comes from the database."""

    # --- what servers share ---

    def deployed(self) -> list[tuple[str, str]]:
        """Name and text of the flows that are deployed on all servers."""
        return self._all("SELECT name, text FROM deployments ORDER BY name")

    def deploy(self, name: str, text: str | None, done: Done) -> None:
        """Deploy a flow on all servers, or remove it if `text` is None; `done` gets whether anything changed."""
        put = "INSERT INTO deployments VALUES (%s, %s) ON CONFLICT (name) DO UPDATE SET text = excluded.text"
        put = f"{put}, changed = excluded.changed"
        sql, values = (put, (name, text)) if text is not None else ("DELETE FROM deployments WHERE name = %s", (name,))
        self._do(sql, values, done, word="flows")
