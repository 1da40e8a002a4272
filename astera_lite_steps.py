"""The steps choose, each, call and sql; `until` of a wait; tests and TOML of flows; some functions of expressions.

A wing of astera_lite, which loads this file when one of them is first wanted.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import itertools
import math
import operator
import os
import re
import sqlite3
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from astera_lite import (
    FLOW_NAME,
    INT64,
    LENIENT_DECODER,
    MAX_JSON_DEPTH,
    MAX_WORK,
    VALUE_TYPES,
    Answer,
    Answered,
    Build,
    Cancel,
    Cancelled,
    Condition,
    Either,
    ExpressionError,
    Flag,
    Flow,
    FlowFailure,
    InputError,
    ListOf,
    MapOf,
    Member,
    Number,
    Outcome,
    Progress,
    Run,
    Runner,
    Scope,
    Step,
    StepError,
    StepKind,
    StepName,
    Steps,
    Surroundings,
    Table,
    Template,
    Text,
    Value,
    as_text,
    check_whens,
    encode_query,
    equal,
    evaluated,
    from_json,
    header_lines,
    joined_headers,
    journal_key,
    json_body,
    kind_of,
    pointer,
    read_answer,
    response_of,
    run_flow,
    run_steps,
    shown,
    suggest,
    unexpected_answer,
    wing,
)

_BRANCH = {"steps": Steps(required=True), "result": Value()}


def _part_of(run: Run, **changes: Any) -> Run:
    """A part of a run, with the same deadlines; `changes` are attributes that differ."""
    part = copy.copy(run)
    vars(part).update(changes)
    return part


def _steps_runner(given: Mapping[str, Any]) -> Callable[[Run, Scope, str], Any]:
    """What runs the `steps` of a step, and computes their `result`; it takes the prefix of their paths."""
    steps, result = given["steps"], given.get("result")

    def inside(run: Run, scope: Scope, prefix: str) -> Any:
        value = run_steps(steps, run, scope, prefix)
        return result(scope) if result else value

    return inside


def _make_choose(build: Build, branches: list[dict[str, Any]], place: str) -> Runner:
    whens = [branch.get("when") for branch in branches]
    check_whens(build, whens, place)
    ways = list(zip(whens, map(_steps_runner, branches), strict=True))

    def choose(run: Run, scope: Scope, path: str) -> Any:
        for position, (when, inside) in enumerate(ways):
            if when is None or run.evaluated_once(when, scope, journal_key(f"{path}/{position}", "when")):
                return inside(run, dict(scope), f"{path}/{position}/")
        return None

    return choose


CHOOSE = StepKind(
    ListOf(Table({"when": Condition(), **_BRANCH}), least=1),
    _make_choose,
    "runs the steps of the first branch whose `when` is true",
    light=True,
    nests=True,
)


class _ItemName(StepName):
    """The name of the items of `each`; those of a part of the body are known by their schema."""

    def read(self, build: Build, value: Any, place: str) -> str:
        name = super().read(build, value, place)
        build.add_name(name, build.schema and build.schema.items)  # the last template is that of `of`
        return name


def _make_each(build: Build, given: dict[str, Any], place: str) -> Runner:
    of, name, width, inside = given["of"], given["as"], given["concurrency"], _steps_runner(given)

    def each(run: Run, scope: Scope, path: str) -> list[Any]:
        items = run.evaluated_once(of, scope, journal_key(path, "items"))
        if type(items) not in (list, tuple):
            raise ExpressionError(f"{place}/of: {kind_of(items)} is not a list")
        done = itertools.count(1)

        def one(part: Run, at: int) -> Any:
            part.left()
            value = inside(part, {**scope, name: items[at]}, f"{path}/{at}/")
            if "/" not in path:
                run.progress = Progress(path, next(done), len(items))
            return value

        if width == 1 or len(items) < 2:
            return [one(run, at) for at in range(len(items))]
        return _concurrently(run, one, len(items), width)

    return each


_EACH = {
    "of": Value(
        Member(holds=lambda value: isinstance(value, list), word="a list", json={"type": "array"}), required=True
    ),
    "as": _ItemName("a name that expressions can use", default="item"),
    "concurrency": Number(1, 64, default=1),
    **_BRANCH,
}
EACH = StepKind(Table(_EACH), _make_each, "runs steps for every item of a list", nests=True)


_helpers = threading.Semaphore(64)  # threads in all that help with items


def _concurrently(run: Run, one: Callable[[Run, int], Any], count: int, width: int) -> list[Any]:
    """The values of `one` for 0, 1, 2 …, in this order; the first error stops the rest.

    The caller's thread does its share, and helpers do as far as there are any: nobody waits for a thread.
    """
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    turns, stop = itertools.count(), Cancel()

    def work() -> None:
        part = _part_of(run, cancel=stop, held=True)
        while not stop.is_set and (at := next(turns)) < count:
            try:
                results[at] = one(part, at)
            except BaseException as error:  # it is raised by the thread that runs the flow
                errors.append(error)
                stop.set()

    def help_out() -> None:
        try:
            work()
        finally:
            _helpers.release()

    helpers: list[threading.Thread] = []
    with run.cancel.calling(stop.set):
        while len(helpers) < min(width, count) - 1 and _helpers.acquire(blocking=False):
            helper = threading.Thread(target=help_out, name="astera-helper", daemon=True)
            try:
                helper.start()
            except RuntimeError:  # no thread can be had
                _helpers.release()
                break
            helpers.append(helper)
        work()
        for helper in helpers:
            helper.join()
    if errors:
        raise errors[0]
    run.check()
    return results


def _make_call(build: Build, given: dict[str, Any], place: str) -> Runner:
    name, params, body, volatile = given["flow"], given["params"], given.get("body"), build.volatile
    build.calls.append((name, f"{place}/flow"))
    request_for = wing("astera_lite_embedding:request_for")

    def call(run: Run, scope: Scope, path: str) -> dict[str, Any]:
        flow = run.outside.flow_named(name)
        if flow is None:
            raise StepError(500, "the flow that it calls is not deployed", f'"{name}" is not deployed', {"missing"})
        key, saved = journal_key(path, "input"), run.journal.saved
        values, sent = saved.get(key) or (evaluated(params, scope), body(scope) if body else None)
        if volatile and key not in saved:  # the steps of the other flow that are finished had this input
            run.journal.record(key, (values, sent))
        try:
            request = request_for(flow, values, sent)
            bound = flow.bind(request, str(run.input.request["id"]))
        except InputError as error:
            raise StepError(500, "the flow that it calls refused its input", f'"{name}": {error}', {"input"}) from None
        part, inside = _part_of(run, flow=flow, input=bound), f"{path}/"
        with part.within(flow.timeout, journal_key(inside, "deadline")) if flow.timeout else contextlib.nullcontext():
            answer = answer_of(flow, part, inside)
        run.progress = part.progress
        return {"status": answer.code, "headers": joined_headers(answer.headers), "body": read_answer(answer)}

    return call


def answer_of(flow: Flow, run: Run, prefix: str) -> Answer:
    """What a called flow answers; its `fail` is a failure of the step that calls it."""
    scope = run.scope()
    try:
        return response_of(flow, run, scope, run_steps(flow.steps, run, scope, prefix), prefix)
    except Answered as answered:
        return answered.answer
    except FlowFailure as failed:
        answer = Answer(failed.status, failed.headers)
        error = StepError(failed.status, failed.detail, str(failed), {"fail"}, answer)
        error.headers, error.failure = failed.headers, failed.failure
        raise error from None


_CALL = {
    "flow": Text("the name of a flow", FLOW_NAME.pattern, required=True),
    "params": MapOf(Value(), default={}),
    "body": Value(),
}
CALL = StepKind(Table(_CALL, short="flow"), _make_call, "runs another flow", answers=True, nests=True)


def faulty_calls(flows: Mapping[str, Flow]) -> Iterator[tuple[Flow, str, str]]:
    """Flows whose calls lead nowhere or never end: the flow, the place in it, and the fault."""
    for flow in flows.values():
        for name, place in flow.calls:
            if name not in flows:
                others = flows.keys() - {flow.name}
                yield flow, place, f'there is no flow "{name}" in service{suggest(name, others)}'
            elif way := _way(flows, name, flow.name):
                circle = " calls ".join(f'"{each}"' for each in [flow.name, *way])
                yield flow, place, f"it would never end: {circle}"


def _way(flows: Mapping[str, Flow], start: str, end: str) -> list[str]:
    """The names by which `start` comes to call `end`, both included; empty if it does not."""
    ways, seen = [[start]], {start}
    while ways:
        way = ways.pop()
        if way[-1] == end:
            return way
        called = {name for name, _ in flows[way[-1]].calls if name in flows} - seen
        seen |= called
        ways += [[*way, name] for name in sorted(called)]
    return []


def _parse_time(value: Any) -> int:
    """Milliseconds since the epoch from an RFC 3339 text or a number of seconds."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e10:
        return round(value * 1000)
    if VALUE_TYPES["date-time"].holds(value):
        return round(datetime.datetime.fromisoformat(value.upper()).timestamp() * 1000)
    raise ValueError(f"{shown(value)} is not a time such as 2026-11-23T20:31:05Z")


def _make_until(build: Build, given: dict[str, Any], place: str) -> Runner:
    until: Template = given["until"]

    def wait(run: Run, scope: Scope, path: str) -> None:
        try:  # computed again after a suspension, because the system's clock may have jumped
            end = _parse_time(run.evaluated_once(until, scope, journal_key(path, "time"))) - run.outside.clock.offset
        except ValueError as error:
            raise ExpressionError(f"{place}: {error}") from None
        run.wait_until(end, path)

    return wait


_TIME = Member(parse=_parse_time, word="a time such as 2026-11-23T20:31:05Z", json={"type": ["number", "string"]})
UNTIL = Table({"until": Value(_TIME, required=True)}, _make_until)


# A statement's parts in which a mark is no parameter, and the marks of parameters (SQLite, "lang_expr").
_SQL_TOKEN = re.compile(
    r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/|(?P<mark>\?[0-9]*|[:@$][A-Za-z_]\w*)""",
    re.DOTALL,
)
_SQL_READING = frozenset(
    "table_info table_xinfo table_list index_list index_info foreign_key_list user_version data_version".split()
)  # pragmas that change nothing; FTS5 asks for the last one
_SQL_LOCKED_S = 5.0


class _Statement(NamedTuple):
    query: str
    params: Callable[[Scope], Any]  # by name
    place: str


def _make_statement(build: Build, given: dict[str, Any], place: str) -> _Statement:
    query, params = given["query"], given["params"]
    marks = [match["mark"] for match in _SQL_TOKEN.finditer(query) if match["mark"]]
    if any(mark.startswith("?") for mark in marks):
        build.fault(f"{place}/query", "has a ? parameter: write :name and give it by params")
    if isinstance(params, Template):  # an object that is computed
        if params.constant:
            build.fault(f"{place}/params", "must be an object of the parameters by name")
        return _Statement(query, params, place)
    wanted = {mark[1:] for mark in marks if mark[0] != "?"}
    for name in sorted(wanted - params.keys()):
        build.fault(f"{place}/params", f"lacks {shown(name)}, which the query uses{suggest(name, params)}")
    for name in sorted(params.keys() - wanted):
        cure = suggest(name, wanted) or " outside quotes"
        build.fault(f"{place}/params/{pointer(name)}", f"is not used by the query: it has no :{name}{cure}")
    return _Statement(query, partial(evaluated, params), place)


_QUERY = partial(Text, "plain SQL, in which :name stands for a value of params", r"(?s:(?!.*\$\{).*)")
_STATEMENT: dict[str, Member] = {
    "query": _QUERY(required=True),
    "params": Either(Value(), MapOf(Value()), default={}),
}


_SQL_CURES = {
    "write a readonly database": ': a step that writes needs "write": true',
    "one statement at a time": ': list them in "statements"',
    "unable to open database file": ": its folder must exist, and the server must be allowed to write there",
}


def _make_sql(build: Build, given: dict[str, Any], place: str) -> Runner:
    listed, database, write, one = given.get("statements"), given["database"], given["write"], given["one"]
    if listed is not None and given["params"]:
        build.fault(f"{place}/params", "belongs to each of the statements")
    statements = listed or [_make_statement(build, given, place)]

    def sql(run: Run, scope: Scope, path: str) -> Any:
        name = as_text(database(scope))
        params = [_sql_params(statement, scope) for statement in statements]
        try:
            with contextlib.closing(_sql_connect(run, name, write)) as db:
                results = _transaction(run, db, statements, params, write, one)
        except sqlite3.Error as error:
            run.check()
            run.left()
            locked = getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            kind = "locked" if locked else "sql"
            said = str(error).rstrip(".")
            said += next((cure for fault, cure in _SQL_CURES.items() if fault in said), "")
            raise StepError(500, "its database failed", f"{name}: {said}", {kind}, safe=locked) from None
        return results if listed is not None else results[0]

    return sql


_SQL = {
    "database": Value(required=True),
    "query": _QUERY(),
    "params": _STATEMENT["params"],
    "statements": ListOf(Table(_STATEMENT, _make_statement), least=1),
    "one": Flag(default=False),
    "write": Flag(default=False),
}
SQL = StepKind(
    Table(_SQL, choice=("query", "statements")),
    _make_sql,
    "reads or writes a SQLite database in the data folder",
    effect=True,
)


def _sql_params(statement: _Statement, scope: Scope) -> dict[str, Any]:
    values = statement.params(scope)
    if type(values) is not dict:
        raise ExpressionError(f"{statement.place}/params: {kind_of(values)} is not an object")
    for name, value in values.items():
        if type(value) in (dict, list, tuple):
            cure = f"give json(…), which the query reads by IN (SELECT value FROM json_each(:{name})), or stores"  # noqa: S608
            raise ExpressionError(f"{statement.place}/params/{name}: is {kind_of(value)}: {cure}")
        if type(value) is int and value not in INT64:
            raise ExpressionError(f"{statement.place}/params/{name}: the number has more than 64 bits")
    return values


def _sql_connect(run: Run, name: str, write: bool) -> sqlite3.Connection:
    """A connection that reaches this one file of the data folder, and ends with the step's time."""
    outside = run.outside
    root = os.path.realpath(outside.data)
    file = root if "\0" in name else os.path.realpath(os.path.join(root, name))
    inside = os.path.commonpath([root, file]) == root and file != root
    own = [outside.own_database + suffix for suffix in ("", "-wal", "-shm", ".lock")]
    if not inside or file in own:
        raise StepError(500, "its database cannot be used", f"{shown(name)} is not in the data folder", {"sql"})
    if write:
        os.makedirs(root, exist_ok=True)
    elif not os.path.isfile(file):
        reason = f'there is no {shown(name)} in the data folder: a step with "write": true makes it'
        raise StepError(500, "its database is missing", reason, {"missing"})
    from pathlib import Path  # noqa: PLC0415 (0.2 MB that flows without SQL do without)

    uri = f"{Path(file).as_uri()}?mode={'rwc' if write else 'ro'}"
    patience = min(_SQL_LOCKED_S, run.left() + 0.01)  # SQLite counts whole milliseconds; the step's own end comes first
    db = sqlite3.connect(uri, timeout=patience, isolation_level=None, uri=True)
    db.execute(f"PRAGMA query_only = {'OFF' if write else 'ON'}")
    db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, outside.max_step_response)
    db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    db.set_authorizer(_sql_authorizer)
    db.set_progress_handler(lambda: run.cancel.is_set or outside.clock.monotonic() >= run.step_deadline, 10_000)
    return db


def _sql_authorizer(action: int, first: str | None, second: str | None, *more: str | None) -> int:
    """Other files, and settings of the connection, are out of reach."""
    if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH):
        return sqlite3.SQLITE_DENY
    if action == sqlite3.SQLITE_PRAGMA and (
        str(first).lower() not in _SQL_READING or (second and first == "user_version")
    ):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


def _transaction(
    run: Run,
    db: sqlite3.Connection,
    statements: Sequence[_Statement],
    params: Sequence[Mapping[str, Any]],
    write: bool,
    one: bool,
) -> list[Any]:
    left = run.outside.max_step_response
    results: list[Any] = []
    db.execute("BEGIN IMMEDIATE" if write else "BEGIN")
    for statement, values in zip(statements, params, strict=True):
        cursor = db.execute(statement.query, values)
        if cursor.description is None:
            results.append({"rowcount": cursor.rowcount, "lastrowid": cursor.lastrowid})
            continue
        rows, left = _fetch(cursor, statement, left)
        results.append((rows[0] if rows else None) if one else rows)
    db.execute("COMMIT")  # left out after an error: closing the connection takes back what was done
    return results


def _fetch(cursor: sqlite3.Cursor, statement: _Statement, left: int) -> tuple[list[dict[str, Any]], int]:
    names = [column[0] for column in cursor.description]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ExpressionError(f"{statement.place}/query: two columns are called {shown(twice)}: name them with AS")
    rows = []
    for row in cursor:
        left -= sum(len(value) if type(value) in (str, bytes) else 16 for value in row)
        if left < 0:
            raise StepError(500, "its database returned too much", "more than max_step_response", {"too_large"})
        rows.append(dict(zip(names, row, strict=True)))
    return rows, left


_TEST_S = 30.0


class _Canned:
    """Stands in for the steps of a flow under test; counts the outputs that were `used`."""

    def __init__(self, test: Mapping[str, Any]) -> None:
        self._test = test
        self.used, self.missing = 0, ""  # path of a step that would act on the world

    def output(self, step: Step, path: str) -> tuple[bool, Any]:
        """Whether a step does not run, and what it then gives."""
        steps, fails = self._test["steps"], self._test["fails"]
        name = path if path in steps or path in fails else step.name
        if isinstance(failure := fails.get(name), dict):
            body = json_body(failure["body"]) if "body" in failure else b""
            raise unexpected_answer("GET", Answer(failure["status"], (("Content-Type", "application/json"),), body))
        if failure is not None:
            raise StepError(failure, "it fails in this test", "fails", {"timeout" if failure == 504 else "transport"})
        if name in steps:
            self.used += 1
            value = copy.deepcopy(steps[name])
            if step.kind.answers and isinstance(value, dict) and "body" in value:
                value = {"status": 200, "headers": {}} | value
            return True, value
        if step.kind.effect:
            self.missing = path
            raise Cancelled
        return step.kind_name == "wait", None


def run_test(flow: Flow, test: Mapping[str, Any], outside: Surroundings) -> tuple[list[str], int]:
    """Run one test of a flow; what is not as expected, a line each, and how many outputs were canned."""
    canned = _Canned(test)
    try:
        sent = test["request"]
        request = wing("astera_lite_embedding:request_for")(flow, sent["params"], sent.get("body"))
        given = flow.bind(request, "test")
        run = Run(flow, given, outside, outside.clock.monotonic() + _TEST_S)
        run.canned = canned
        outcome = run_flow(run)
        assert isinstance(outcome, Outcome)
    except InputError as error:
        outcome = Outcome.failed("failed", error.status, str(error))
    if name := canned.missing:
        return [f'the step "{name}" has side effects: add its output, "steps": {{"{name}": …}}'], canned.used
    return _differences(outcome, test["response"]), canned.used


def _differences(outcome: Outcome, expected: Mapping[str, Any]) -> list[str]:
    answer, lines = outcome.answer, []
    if answer.code != expected["status"]:
        reason = outcome.reason or (outcome.error or {}).get("detail", "")
        lines.append(f"status: expected {expected['status']}, got {answer.code} {reason}".rstrip())
        if "requestId" in (outcome.error or {}):  # the body is a document for clients, which does not give the reason
            return lines
    headers = joined_headers(answer.headers)
    for name, value in expected["headers"].items():
        found = headers.get(name.lower())
        if joined_headers(header_lines(name, value)).get(name.lower()) != found:
            lines.append(f"header {name}: expected {shown(value)}, got {shown(found)}")
    if "body" in expected:
        lines += _unlike(expected["body"], read_answer(answer), "body")
    return lines


_NOTHING = object()


def _unlike(expected: Any, found: Any, place: str) -> list[str]:
    """A line for each place where two values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = dict.fromkeys([*expected, *found])
        pairs: list[Any] = [(name, expected.get(name, _NOTHING), found.get(name, _NOTHING)) for name in names]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = list(zip(itertools.count(), expected, found))
    elif equal(expected, found):
        return []
    else:
        want, got = ("nothing" if side is _NOTHING else shown(side, 200) for side in (expected, found))
        return [f"{place}: expected {want}, got {got}"]
    return [line for name, want, got in pairs for line in _unlike(want, got, f"{place}/{pointer(str(name))}")]


def from_toml(text: str) -> Any:
    """The value of a TOML text as JSON, with dates as text; the message of a ValueError ends with the place."""
    import tomllib  # noqa: PLC0415 (most flows are JSON)

    try:
        return _as_json(tomllib.loads(text), "")
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_JSON_DEPTH} levels") from None
    except ValueError as error:
        message = str(error).replace("Invalid value", "Invalid value: text stands in quotes there")
        raise ValueError(f"is not TOML: {message}") from None


def _as_json(value: Any, place: str) -> Any:
    if place.count("/") > MAX_JSON_DEPTH:
        raise RecursionError
    if isinstance(value, dict):
        return {name: _as_json(item, f"{place}/{pointer(name)}") for name, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item, f"{place}/{at}") for at, item in enumerate(value)]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value} is not a JSON number")
    return value


# --- functions of expressions ---


def _field_of(rows: Any, name: Any) -> list[Any]:
    if type(rows) is not list:
        raise ExpressionError(f"{kind_of(rows)} is not a list of rows")
    if type(name) is not str:
        raise ExpressionError(f"{kind_of(name)} is not the name of a field")
    try:
        return [row[name] for row in rows]
    except (KeyError, TypeError):
        at = next(at for at, row in enumerate(rows) if type(row) is not dict or name not in row)
        raise ExpressionError(f'row {at} has no field "{name}"') from None


def sort_by(rows: Any, *fields: Any) -> list[Any]:
    """The rows sorted by these fields, descending after a leading "-"; rows whose field is null come last."""
    for field in reversed(fields):
        descending = type(field) is str and field.startswith("-")
        name = field[1:] if descending else field
        nulls = [row for row, value in zip(rows, _field_of(rows, name), strict=True) if value is None]
        rows = [row for row in rows if row[name] is not None]
        try:
            rows.sort(key=operator.itemgetter(name), reverse=descending)
        except TypeError:
            raise ExpressionError(f'the field "{name}" has values that cannot be compared') from None
        rows += nulls
    return list(rows)


def _groups_of(rows: Any, name: Any) -> list[Any]:
    """The value of a field in each row; of values that are one name in JSON, such as 1 and "1", the first."""
    first: dict[str, Any] = {}
    values = _field_of(rows, name)
    return values if {*map(type, values)} <= {str} else [first.setdefault(as_text(value), value) for value in values]


def group_by(rows: Any, name: Any) -> dict[Any, list[Any]]:
    """An object of lists: the rows by the value of a field."""
    groups: dict[Any, list[Any]] = {}
    for value, row in zip(_groups_of(rows, name), rows, strict=True):
        groups.setdefault(value, []).append(row)
    return groups


def index_by(rows: Any, name: Any) -> dict[Any, Any]:
    """An object of rows by the value of a field; of rows with the same value, the last one."""
    return dict(zip(_groups_of(rows, name), rows, strict=True))


def field_values(rows: Any, *names: Any, **named: Any) -> list[Any]:
    """The values of the fields by which rows are sorted, grouped or indexed."""
    if type(rows) not in (list, tuple):
        return []
    names = tuple(name.removeprefix("-") for name in (*names, *named.values()) if type(name) is str)
    return [row.get(name) for row in rows if type(row) is dict for name in names]


def numbers(start: int, stop: int | None = None, step: int = 1) -> list[int]:
    """The numbers of Python's range()."""
    found = range(0, start, step) if stop is None else range(start, stop, step)
    if len(found) > MAX_WORK // 10:
        raise ExpressionError(f"the range has more than {MAX_WORK // 10:,} numbers")
    return list(found)


def unique(values: Any) -> list[Any]:
    """The values without those that were there before."""
    first: dict[Any, Any] = {}
    for value in values:
        first.setdefault(_hashable(value), value)
    return list(first.values())


def _hashable(value: Any) -> Any:
    """What is equal for equal values, and can be the name of a member."""
    if type(value) is dict:
        return frozenset((name, _hashable(item)) for name, item in value.items())
    return tuple(map(_hashable, value)) if type(value) in (list, tuple) else value


def merge(*objects: dict[str, Any]) -> dict[str, Any]:
    """One object with the members of all; of members with the same name, the last one."""
    return {name: value for each in objects for name, value in dict(each).items()}


def parse_json(text: Any) -> Any:
    """The value of a text in JSON."""
    if not isinstance(text, str | bytes):
        raise ExpressionError(f"{kind_of(text)} is not text")
    return from_json(text, LENIENT_DECODER)


def urlencode(value: Any) -> str:
    """An object as a query; other values percent-encoded."""
    return encode_query(value) if type(value) is dict else urllib.parse.quote(as_text(value), safe="")
