"""The commands of Astera Lite for authors and operators: check, try, test, new, jobs, job, token, backup, zipapp.

A wing of astera_lite, which loads this file when one of these commands is given, or a flow is deployed over HTTP. A
command is a function of the parsed arguments and the settings that returns the exit code; its row stands in COMMANDS.
"""

from __future__ import annotations

import codecs
import contextlib
import datetime
import json
import json.encoder
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from astera_lite import (
    ADMIN_TOKEN,
    CONNECTIONS_FILE,
    FLOW_NAME,
    JSON_TYPE,
    NO_STORE,
    PHRASES,
    SHIPPED,
    STEP_KINDS,
    WINGS,
    AccessError,
    AsteraLite,
    Attempt,
    Clock,
    ConfigError,
    Conflict,
    Deployer,
    Exchange,
    Fault,
    FlowError,
    InputError,
    Job,
    JobKey,
    MeasuringJournal,
    NotFound,
    Outcome,
    Reply,
    Run,
    Settings,
    SqliteReader,
    Status,
    StoredResult,
    Token,
    attempt_documents,
    check_coding,
    check_conditions,
    check_exposure,
    command_name,
    deployment_document,
    edit_tokens,
    failure_of,
    failure_text,
    from_json,
    is_flow_file,
    is_json_type,
    json_body,
    log,
    nearest_line,
    one_line,
    parse_flow_text,
    path_values,
    pointer_lines,
    read_bytes,
    read_text,
    reason_of,
    request_for,
    resource,
    run_flow,
    run_test,
    set_up_logging,
    shown,
    status_document,
    suggest,
    timestamp,
    token_digest,
    whole_body,
)

if TYPE_CHECKING:
    import argparse

_STARTER = """\
{
  "description": "What NAME is for, in a sentence",
  "request": {
    "method": "GET",
    "resource": "/NAME/{id}",
    "processing": ["synchronous", "asynchronous"],
    "parameters": {
      "id": {"in": "path", "type": "integer", "example": 7},
      "note": {"in": "query", "type": "string", "maxLength": 100}
    }
  },
  "steps": [
    {"name": "double", "set": "${params.id * 2}"}
  ],
  "response": [
    {"when": "${params.id < 0}", "status": 404, "body": {"error": "there is no ${params.id}"}},
    {"status": 200, "body": {"id": "${params.id}", "double": "${double}", "note": "${params.note}"}}
  ]
}
"""


def starter_flow(name: str) -> str:
    """The text of a first flow."""
    return _STARTER.replace("NAME", name)


def check(args: argparse.Namespace, settings: Settings) -> int:
    """check: validate flows and settings, a line for each fault."""
    app = AsteraLite(settings)  # its faults are ConfigErrors
    check_exposure(settings, settings.host, any(token.digest for token in _tokens_of(settings.database)))
    wanted = {os.path.realpath(name): name for name in args.file}
    folders = sorted({os.path.dirname(path) for path in wanted}) or [settings.flows]
    faults, well = [], 0
    for name in args.file:
        if not os.path.lexists(name):
            faults.append(Fault(name, "", "there is no such file"))
        elif os.path.isdir(name):
            faults.append(Fault(name, "", f"is a folder: name its files, or check all of it with --flows {name}"))
        elif not name.endswith((".json", ".toml")):
            faults.append(Fault(name, "", "is no flow file: they end in .json or .toml"))
    named = {fault.where for fault in faults}
    for folder in folders:
        found = AsteraLite(app.settings._replace(flows=folder)).deployer.read()
        for fault in found.faults:
            path = os.path.realpath(os.path.join(folder, fault.where))
            if not wanted or (path in wanted and wanted[path] not in named):
                faults.append(_openable(fault, folder, wanted.get(path)))
        sources = [os.path.realpath(os.path.join(folder, flow.source)) for flow in found.by_name.values()]
        well += sum(1 for source in sources if not wanted or source in wanted)
    for fault in faults:
        print(fault)
    flows, errors = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((well, "flow"), (len(faults), "error")))
    print(f"{flows} OK, {errors}", file=sys.stderr)
    return 1 if faults else 0


def _openable(fault: Fault, folder: str, path: str | None = None) -> Fault:
    """A fault of a flow file as a terminal or an editor can open it: `flows/a.json:12: …`, `flows/a.json:1:30: …`."""
    path = path or (folder if fault.where == folder else os.path.join(folder, fault.where))
    grammar = re.fullmatch(r"line ([0-9]+), column ([0-9]+)", fault.place)
    if grammar:
        return Fault(f"{path}:{grammar[1]}:{grammar[2]}", "", fault.message)
    return fault._replace(where=path + line_of(path, fault.place))


def _tokens_of(path: str) -> list[Token]:
    """The tokens in a database; none where it is not there yet."""
    if not os.path.exists(path):
        return []
    with contextlib.closing(SqliteReader(path)) as store:
        return store.tokens()


def line_of(path: str, place: str) -> str:
    """`:12` if a JSON Pointer leads to line 12 of a JSON file, else an empty string."""
    try:
        text = read_text(path) if path.endswith(".json") and place.startswith("/") else ""
        from_json(text)
    except (OSError, ValueError):
        return ""
    line = nearest_line(pointer_lines(text), place)
    return f":{line}" if line else ""


def try_flow(args: argparse.Namespace, settings: Settings) -> int:
    """try: run one flow here, with a trace of its steps."""
    set_up_logging(settings._replace(log_level="warning"))
    app = AsteraLite(settings)
    log.addFilter(app.outside.masked.log_record)
    app.deployer.reload()
    flow = app.deployments.by_name.get(args.name)
    if flow is None and args.name in {os.path.splitext(fault.where)[0] for fault in app.deployments.faults}:
        print(f'the flow "{args.name}" has faults, which stand above', file=sys.stderr)
        return 1
    if flow is None:
        print(f'there is no flow "{args.name}"{suggest(args.name, app.deployments.by_name)}', file=sys.stderr)
        return 1
    repeated: dict[str, list[str]] = {}
    body: Any = None
    for pair in args.values:
        name, equals, value = pair.partition("=")
        if not equals:
            print(f"{shown(pair)} is not of the form name=value", file=sys.stderr)
            return 2
        if name == "body":
            try:
                body = read_bytes(value[1:]) if value.startswith("@") else value.encode()
            except OSError as error:
                print(f"{value[1:]}: cannot be read: {reason_of(error)}", file=sys.stderr)
                return 1
        else:
            repeated.setdefault(name, []).append(value)
    params = {name: values if len(values) > 1 else values[0] for name, values in repeated.items()}
    try:
        request = request_for(flow, params, body)
        given = flow.bind(request, path_values(flow, request.path), "try")
    except InputError as error:
        for item in error.errors:
            print(f"{item['in']} {item['name']}: {item['message']}", file=sys.stderr)
        return 1
    trace: list[dict[str, Any]] = []
    limit = flow.timeout or settings.job_timeout
    outcome = run_flow(Run(flow, given, app.outside, app.clock.monotonic() + limit, MeasuringJournal(), trace))
    assert isinstance(outcome, Outcome)
    app.outside.close()
    _print_trace(trace)
    if outcome.reason:
        print(f"reason: {one_line(outcome.reason)}", file=sys.stderr)
    answer = outcome.answer
    print(f"{outcome.status.value} {answer.code} {PHRASES.get(answer.code, '')}", file=sys.stderr)
    for name, value in answer.headers:
        print(f"{name}: {value}", file=sys.stderr)
    sys.stderr.flush()
    _write_body([answer.body])
    return 0 if outcome.error is None else 1


def _print_trace(trace: list[dict[str, Any]]) -> None:
    for step in trace:
        for path, kind, state, *_, told in _retry_rows(step):
            print(f"{path:<20} {kind:<8} {state:<9} {'':>8}  {one_line(told)}", file=sys.stderr)
        began, ended = (datetime.datetime.fromisoformat(step[name]) for name in ("startedAt", "finishedAt"))
        took = f"{(ended - began).total_seconds() * 1000:.0f} ms"
        about = [str(step["status"])] if "status" in step else []
        about += [f"{step['size']} bytes"] if step["size"] is not None else []
        line = f"{step['path']:<20} {step['kind']:<8} {step['state']:<9} {took:>8}  {one_line(_told_of(step))}"
        print(f"{line}  ({', '.join(about)})" if about else line, file=sys.stderr)


def test(args: argparse.Namespace, settings: Settings) -> int:
    """test: run the tests that flow files carry."""
    set_up_logging(settings._replace(log="off"))
    app = AsteraLite(settings)
    faults = app.deployer.reload()
    for fault in faults:
        print(_openable(fault, settings.flows))
    flows = app.deployments.by_name
    unknown = [name for name in args.names if name not in flows]
    for name in unknown:
        print(f'there is no flow "{name}"{suggest(name, flows)}')
    chosen = [flow for flow in flows.values() if not args.names or flow.name in args.names]
    passed = failed = 0
    total, tell = sum(len(flow.tests) for flow in chosen), _progress("testing")
    for flow in sorted(chosen, key=lambda flow: flow.name):
        for each in flow.tests:
            tell(passed + failed, total)
            differences, canned = run_test(flow, each, app.outside)
            tell(total, total)  # the line is free for what follows
            passed, failed = passed + (not differences), failed + bool(differences)
            print(f"{'FAILED' if differences else 'ok':<6} {flow.name}: {each.name} ({canned} canned)")
            for line in differences:
                print(f"         {app.outside.masked(line)}")
    app.outside.close()
    without = sum(1 for flow in chosen if not flow.tests)
    print(f"tests passed: {passed}, failed: {failed}; flows without tests: {without}", file=sys.stderr)
    return 1 if failed or faults or unknown else 0


def schema(make: Callable[..., Any], args: argparse.Namespace, settings: Settings) -> int:
    """schema: print a JSON Schema of the flow file."""
    _print_json(make(STEP_KINDS))
    return 0


def print_document(make: Callable[..., Any], args: argparse.Namespace, settings: Settings) -> int:
    """openapi, postman: print a document of the flows; exit 1 if some are faulty and so not in it."""
    app = AsteraLite(settings)
    found = app.deployer.read()
    for fault in found.faults:
        print(_openable(fault, settings.flows), file=sys.stderr)
    secured = settings.token is not None or bool(_tokens_of(settings.database))
    _print_json(make(found, app.base, secured))
    return 1 if found.faults else 0


def new(args: argparse.Namespace, settings: Settings) -> int:
    """new: write a starter flow."""
    if not FLOW_NAME.fullmatch(args.name):
        print(f"{shown(args.name)} must consist of letters, digits, - and _", file=sys.stderr)
        return 1
    if args.name + ".json" == CONNECTIONS_FILE:
        print(f"{CONNECTIONS_FILE} keeps the connections: choose another name", file=sys.stderr)
        return 1
    path = os.path.join(settings.flows, f"{args.name}.json")
    try:
        os.makedirs(settings.flows or ".", exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(starter_flow(args.name))
    except FileExistsError:
        print(f"{path} is there already: choose another name", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{path}: {reason_of(error)}", file=sys.stderr)
        return 1
    print(f"wrote {path}; run it with: {command_name()} try {args.name} id=7", file=sys.stderr)
    return 0


def _printable(text: str) -> str:
    """A text of several lines, or JSON, in which what commands a terminal is escaped as JSON has it."""
    return re.sub(r"[^\t\n -~]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


def _print_json(document: Any, stream: TextIO | None = None) -> None:
    stream = stream or sys.stdout
    escaped = not stream.encoding.lower().startswith("utf")
    print(_printable(json.dumps(document, indent=2, ensure_ascii=escaped)), file=stream)


def _write_body(pieces: Iterable[bytes]) -> None:
    """Write a response's body to stdout: as it is, or what a terminal may be given of it."""
    if sys.stdout.isatty():
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        for piece in (*pieces, b""):
            sys.stdout.write(_printable(decoder.decode(piece, final=not piece)))
    else:
        sys.stdout.buffer.writelines(pieces)
    sys.stdout.flush()


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes."""
    import unicodedata  # noqa: PLC0415 (a server has no use for it)

    narrow = (0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
    return len(text) if text.isascii() else sum(narrow)


def _cut(text: str, room: int) -> str:
    """The text, or as much of it as there is room for."""
    if _columns(text) <= room:
        return text
    while text and _columns(text) >= room:
        text = text[:-1]
    return text + "…" * (room > 0)


_COLOURS = {"Completed": 32, "delivered": 32, "Running": 33, "pending": 33, "Error": 31, "failed": 31, "gone": 31}
_LEAST_CELLS = 8  # of the column that gives way


class _Sheet:
    """What people read: on a terminal in its width and with a little colour, elsewhere plain and complete."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.terminal = stream, stream.isatty()
        self._width = shutil.get_terminal_size().columns if self.terminal else sys.maxsize
        self._colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def _painted(self, text: str, colour: int | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour is not None and self._colour else text

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *give_way: int) -> None:
        """Rows under a head. What is too wide shortens the columns `give_way`, then the last ones are left out."""
        lines = [[one_line(text) for text in row] for row in (head, *rows)]
        widths = [max(map(_columns, column)) for column in zip(*lines, strict=True)]
        for at in give_way:
            excess = sum(widths) + 2 * (len(widths) - 1) - self._width
            widths[at] = max(widths[at] - max(excess, 0), min(widths[at], _LEAST_CELLS))
        while len(widths) > 1 and sum(widths) + 2 * (len(widths) - 1) > self._width:
            widths.pop()
        for n, line in enumerate(lines):
            cells = [_cut(text, width) for text, width in zip(line, widths, strict=False)]
            padded = [text + " " * (width - _columns(text)) for text, width in zip(cells, widths, strict=True)]
            padded[-1] = cells[-1]
            colours = [_COLOURS.get(text.partition(" ")[0]) if n else 2 for text in cells]
            print("  ".join(map(self._painted, padded, colours)).rstrip(), file=self.stream)

    def fields(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Names and values; those without a value are left out."""
        width = max(len(name) for name, _ in pairs)
        for name, text in pairs:
            if text:
                shown_text = self._painted(one_line(text), _COLOURS.get(text.partition(" ")[0]))
                print(f"{self._painted(name.ljust(width), 2)}  {shown_text}", file=self.stream)

    def moment(self, ms: int | None, now: int, offset: int, with_date: bool = False) -> str:
        """A time: on a terminal as far as it is from now, and by the clock on the wall; elsewhere in UTC."""
        if ms is None or not self.terminal:
            return timestamp(ms, offset) or ""
        words = f"in {_span(ms - now)}" if ms > now else f"{_span(now - ms)} ago"
        local = datetime.datetime.fromtimestamp((ms + offset) / 1000)
        return f"{local:%Y-%m-%d %H:%M:%S} ({words})" if with_date else words


def _span(ms: int) -> str:
    """A time that passed, for people."""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000)):
        if ms >= 2 * size:
            return f"{ms // size} {unit}"
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms} ms"


def _took(job: Job) -> str:
    return _span(job.finished - job.started) if job.finished is not None and job.started is not None else ""


def _status_words(job: Job) -> str:
    detail = job.error["code"] if job.error else "waiting" if job.due else ""
    return f"{job.status.value} ({detail})" if detail else job.status.value


def jobs(args: argparse.Namespace, settings: Settings) -> int:
    """jobs: list the jobs in the database, newest first."""
    with contextlib.closing(SqliteReader(settings.database)) as store:
        status = Status(args.status) if args.status else None
        offset = store.clock_offset()
        now = Clock().now() - offset
        found = store.page(now, args.limit, None, args.flow, status, None)
        failures = {job.key: failure_of(job, store.trace(job.key)) for job in found if job.error}
    if args.json:
        documents = [
            status_document(job, job.base, offset=offset) | {"failure": failures.get(job.key)} for job in found
        ]
        _print_json({"jobs": documents})
        return 0
    sheet = _Sheet(sys.stdout)
    rows = []
    for job in found:
        failure = failures.get(job.key)
        reason = failure_text(failure) if failure else (job.error or {}).get("detail", "")
        callback = f"{job.callback.state} ({job.callback.attempts})" if job.callback else ""
        created = sheet.moment(job.created, now, offset)
        if sheet.terminal:  # what matters most comes first: the last columns may find no room
            rows.append((job.id, _status_words(job), job.flow, created, _took(job), callback, reason))
        else:
            finished = timestamp(job.finished, offset) or ("waiting" if job.due else "")
            rows.append((job.id, job.flow, job.status.value, created, finished, callback, reason))
    first = "status flow created took" if sheet.terminal else "flow status created finished"
    sheet.table(f"id {first} callback reason".split(), rows, 6, 2)
    if not found:
        print("none", file=sys.stderr)
    return 0


def show_job(args: argparse.Namespace, settings: Settings) -> int:
    """job: one job, its steps, its callback attempts and its result."""
    with contextlib.closing(SqliteReader(settings.database)) as store:
        key = JobKey.parse(args.id)
        job = store.get(key) if key else None
        if job is None:
            print(f"there is no job {shown(args.id)}", file=sys.stderr)
            return 1
        steps, attempts, stored = store.trace(job.key), store.attempts(job.key), store.result(job.key)
        offset = store.clock_offset()
        stream = sys.stderr if args.result else sys.stdout
        if args.json:
            document = status_document(job, job.base, offset=offset)
            document |= {"failure": failure_of(job, steps), "steps": steps}
            if job.callback is not None:
                document["callback"]["history"] = attempt_documents(attempts, offset)
            _print_json(document, stream)
        else:
            _print_job(_Sheet(stream), job, stored, steps, attempts, offset)
        if args.result and stored is not None:
            pieces: Iterable[bytes] = [stored.body or b""]
            if stored.body is None:
                pieces = whole_body(store.result_pieces(job.key, stored.attempt), stored.size)
            _write_body(pieces)
    return 0


def _print_job(
    sheet: _Sheet,
    job: Job,
    stored: StoredResult | None,
    steps: Sequence[Mapping[str, Any]],
    attempts: Sequence[Attempt],
    offset: int,
) -> None:
    now = Clock().now() - offset
    moments = [(name, getattr(job, name)) for name in ("created", "started", "finished", "expires")]
    callback = job.callback
    again = callback and sheet.moment(callback.next_at, now, offset, True)
    failure = failure_of(job, steps)
    sheet.fields(
        [
            ("id", job.id),
            ("flow", job.flow),
            ("status", _status_words(job)),
            ("error", job.error["detail"] if job.error else ""),
            ("reason", failure_text(failure) if failure else ""),
            *((name, sheet.moment(ms, now, offset, True)) for name, ms in moments),
            ("took", _took(job)),
            ("attempt", str(job.attempt) if job.attempt > 1 else ""),
            ("result", f"{stored.code}, {stored.size:,} bytes" if stored else ""),
            ("callback", f"{callback.state} ({callback.attempts}) {callback.url}" if callback else ""),
            ("next try", again or ""),
        ]
    )
    if steps:
        print(file=sheet.stream)
        rows = [row for step in steps for row in (*_retry_rows(step), _step_row(step))]
        sheet.table(("step", "kind", "state", "took", "bytes", "output"), rows, 5)
    if attempts:
        rows = [
            (sheet.moment(one.at, now, offset), str(one.status or ""), _span(one.duration_ms), one.error or "")
            for one in attempts
        ]
        print(file=sheet.stream)
        sheet.table(("callback", "status", "took", "error"), rows, 3)


def _step_row(step: Mapping[str, Any]) -> tuple[str, ...]:
    began, ended = (datetime.datetime.fromisoformat(step[name]) for name in ("startedAt", "finishedAt"))
    took = _span(round((ended - began).total_seconds() * 1000))
    size = "" if step["size"] is None else f"{step['size']:,}"
    state = f"{step['state']} ({step['status']})" if "status" in step else step["state"]
    return step["path"], step["kind"], state, took, size, _told_of(step)


def _retry_rows(step: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The attempts of a step that came before its last one."""
    return [(step["path"], step["kind"], "retried", "", "", failure_text(each)) for each in step.get("retries", ())]


def _told_of(step: Mapping[str, Any]) -> str:
    """What a step gave, or why it failed."""
    return failure_text(step["error"]) if "error" in step else step["preview"] or ""


def _progress(words: str) -> Callable[[int, int], None]:
    """What says on stderr, where that is a terminal, how much is done of how much."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    told = -math.inf

    def tell(done: int, total: int) -> None:
        nonlocal told
        if done < total and time.monotonic() - told < 0.1:
            return
        told = time.monotonic()
        line = f"{words} {100 * done // total} %" if done < total else ""
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    return tell


def token(args: argparse.Namespace, settings: Settings) -> int:
    """token: make a token, list them, or revoke one."""
    import secrets  # noqa: PLC0415 (no other command needs it)

    path, name = settings.database, args.name
    unused = [word for word, given in (("--flows", args.flows), ("--role", args.role)) if given is not None]
    if unused and (name is None or args.revoke):
        print(f"{unused[0]} goes with a new NAME", file=sys.stderr)
        return 2
    if args.revoke and name is None:
        print("--revoke needs the NAME of a token: without one, `token` lists them", file=sys.stderr)
        return 2
    role = args.role or "user"
    if name is None:
        _print_tokens(_tokens_of(path))
        return 0
    if args.revoke:
        edit_tokens(path, revoke=name)
        print(f"revoked {name}; a running server lets it in no more after a second", file=sys.stderr)
        if not any(each.digest for each in _tokens_of(path)):
            print("that was the last one: nobody is let in any more but by the token of the settings", file=sys.stderr)
        return 0
    flows = None if args.flows is None else frozenset(word.strip() for word in args.flows.split(",") if word.strip())
    faults = [
        f"{shown(word)} must consist of letters, digits, - and _"
        for word in [name, *sorted(flows or ())]
        if not FLOW_NAME.fullmatch(word)
    ]
    if name == ADMIN_TOKEN:
        faults.append(f"{name} is the name of the token in the settings: choose another one")
    if flows is not None and (role == "admin" or not flows):
        faults.append("--flows names flows, and not for --role admin, which may call and deploy all of them")
    if not faults and flows and os.path.isdir(settings.flows):  # elsewhere a program publishes them
        known = {os.path.splitext(file)[0] for file in os.listdir(settings.flows) if is_flow_file(file)}
        unknown = sorted(flows - known)
        faults += [f'there is no flow "{word}" in {settings.flows}{suggest(word, known)}' for word in unknown]
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        return 2
    text = "astera_" + secrets.token_urlsafe(32)
    if settings.token is None and not _tokens_of(path):
        print("it is the first token: from now on the server lets nobody in without one", file=sys.stderr)
    edit_tokens(path, add=Token(name, token_digest(text), role, flows, Clock().wall()))
    print("send it as `Authorization: Bearer TOKEN`; it is not shown again:", file=sys.stderr)
    print(text)
    return 0


def _print_tokens(tokens: Sequence[Token]) -> None:
    print(f"{'name':<24}  {'role':<7}  {'created':<24}  flows")
    for each in tokens:
        flows = "all" if each.flows is None else ",".join(sorted(each.flows))
        print(f"{each.name:<24}  {each.role if each.digest else 'revoked':<7}  {timestamp(each.created)}  {flows}")


_ZIPPED_MAIN = b"""\
import sys

if sys.version_info < (3, 11):
    this = "this is %d.%d.%d (%s)" % (sys.version_info[:3] + (sys.executable,))
    sys.exit("Astera Lite needs Python 3.11 or later; " + this)

import astera_lite

sys.exit(astera_lite.main())
"""


def pack(args: argparse.Namespace, settings: Settings) -> int:
    """zipapp: the server as one file."""
    import py_compile  # noqa: PLC0415 (as below: for this command only)
    import tempfile  # noqa: PLC0415
    import zipfile  # noqa: PLC0415

    modules, files = ("astera_lite.py", *WINGS), {"__main__.py": _ZIPPED_MAIN}
    for name in (*modules, *SHIPPED):
        try:
            files[name] = resource(name)
        except ConfigError:
            if name in ("astera_lite.py", "schema.sql"):
                raise
            print(f"{name} is missing, so it is left out", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        # Another version of Python passes over bytecode that is not its own, and takes the source.
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH  # times in a zip depend on the time zone
        for name in [name for name in modules if name in files]:
            source = os.path.join(folder, name)
            with open(source, "wb") as file:
                file.write(files[name])
            compiled = py_compile.compile(
                source, f"{source}c", name, doraise=True, optimize=0, invalidation_mode=unchecked
            )
            files[f"{name}c"] = read_bytes(str(compiled))
    try:
        with open(args.file, "wb") as file:
            file.write(b"#!/usr/bin/env python3\n")
            with zipfile.ZipFile(file, "w") as archive:
                for name, data in files.items():
                    archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)  # all of 1980: ever the same
            mode = os.fstat(file.fileno()).st_mode
        os.chmod(args.file, mode | (mode & 0o444) >> 2)  # who may read it may run it
    except OSError as error:
        print(f"{args.file}: {reason_of(error)}", file=sys.stderr)
        return 1
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"wrote {args.file}: for Python 3.11 or later, {version} starts it quickest", file=sys.stderr)
    return 0


def backup(args: argparse.Namespace, settings: Settings) -> int:
    """backup: a consistent copy of the database, also while the server runs."""
    if os.path.exists(args.copy):
        print(f"{args.copy} is there already: name another file", file=sys.stderr)
        return 1
    store = SqliteReader(settings.database)
    try:
        store.backup(args.copy, _progress("copying"))
    finally:
        store.close()
    print(f"wrote {args.copy}, {os.path.getsize(args.copy):,} bytes", file=sys.stderr)
    return 0


# --- deploying over HTTP ---


def check_may_deploy(x: Exchange) -> None:
    """Raise AccessError for all but a token of role admin: a flow can run programs."""
    if x.caller.admin and x.caller.name:
        return
    if x.caller.name:
        raise AccessError(403, "Deploying needs a token of role admin.", "insufficient_scope")
    detail = "Deploying needs a token of role admin, and this server has no tokens: set `token`, and send it."
    raise AccessError(403, detail)


def _file_of(deployer: Deployer, name: str) -> str:
    """The path of a deployment's file; raises NotFound, Conflict."""
    if not FLOW_NAME.fullmatch(name):
        raise NotFound(f"{shown(name)} is no name of a deployment: letters, digits, - and _.")
    if name + ".json" == CONNECTIONS_FILE:
        raise Conflict(f"{CONNECTIONS_FILE} holds the connections: choose another name.")
    if deployer.folder is None or name in deployer.own:
        raise Conflict("It is published by the program that embeds this server, not by a file.")
    if os.path.exists(os.path.join(deployer.folder, f"{name}.toml")):
        raise Conflict(f"It is kept in {name}.toml: change that file.")
    return os.path.join(deployer.folder, f"{name}.json")


def _write_atomically(path: str, text: str) -> None:
    """Write a file so that a reader, and a start after a crash, find the old text or the new one, whole."""
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.part")
    os.makedirs(folder, exist_ok=True)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def deploy(x: Exchange) -> Reply:
    """PUT /api/deployments/{name}: check the flow in the body, write its file, publish it."""
    check_coding(x)
    name, media = x.values["name"], x.head.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not is_json_type(media):
        message = "must be application/json: a flow"
        raise InputError([{"in": "header", "name": "Content-Type", "message": message}], status=415)
    deployer = x.app.deployer
    with deployer.changing:
        path = _file_of(deployer, name)
        file, known = os.path.basename(path), deployer.deployments.by_name.get(name)
        check_conditions(x, known is not None or os.path.exists(path), known)
        try:
            tree = parse_flow_text(x.body.decode(), file)
            flow = deployer.build(tree, name, file)
            deployments = deployer.replaced(name, flow)
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is not valid UTF-8"
            raise InputError([{"in": "body", "name": "", "message": message}], "The flow has faults.") from None
        except FlowError as error:
            faults = [{"in": "body", "name": fault.place, "message": fault.message} for fault in error.faults]
            raise InputError(faults, "The flow has faults.") from None
        _write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
        deployer.deployments = deployments
    log.info("deployed %s", name)
    headers = [JSON_TYPE, NO_STORE] + [("Location", f"{x.base}/api/deployments/{name}")] * (known is None)
    return Reply(201 if known is None else 200, headers, json_body(deployment_document(flow, x.base)))


def undeploy(x: Exchange) -> Reply:
    """DELETE /api/deployments/{name}: take a flow out of service, and delete its file."""
    name, deployer = x.values["name"], x.app.deployer
    with deployer.changing:
        path = _file_of(deployer, name)
        flows = deployer.deployments.by_name
        if name not in flows and not os.path.exists(path):
            raise NotFound(f"There is no deployment {shown(name)}.")
        check_conditions(x, True, flows.get(name))
        callers = [flow.name for flow in flows.values() if name in [called for called, _ in flow.calls]]
        if callers:
            raise Conflict(f"It is called by {', '.join(callers)}.")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        deployer.deployments = deployer.replaced(name)
    log.info("deleted the deployment %s", name)
    return Reply(204, [NO_STORE])
