"""The command line of Astera Lite, but for a plain `serve`: all commands, their arguments, --help.

A wing of astera_lite, which loads this file when it cannot read a command line by itself. To add a command: a function
of the parsed arguments and the settings that returns the exit code, and a row in COMMANDS. Errors that a function
raises (AsteraError) are printed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import datetime
import itertools
import json
import math
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from astera_lite import (
    ADMIN_TOKEN,
    CONNECTIONS_FILE,
    FLOW_NAME,
    PHRASES,
    SETTING_FIELDS,
    SETTING_KINDS,
    STEP_KINDS,
    Application,
    Attempt,
    Clock,
    Conflict,
    Fault,
    Job,
    JobKey,
    MeasuringJournal,
    NotFound,
    Outcome,
    Run,
    Settings,
    SqliteReader,
    Status,
    StoredResult,
    Token,
    __version__,
    check_exposure,
    failure_text,
    is_flow_file,
    is_postgres,
    late,
    leave,
    load_settings,
    log,
    one_line,
    optional,
    reason_of,
    run_flow,
    serve,
    set_up_logging,
    shown,
    status_document,
    suggest,
    timestamp,
    token_digest,
    wing,
)

attempt_documents = late("astera_lite_admin:attempt_documents")
failure_of = late("astera_lite_admin:failure_of")

_SCRIPT = "python astera_lite.py"


def command_name() -> str:
    """The words that start this program: the command of an installation, a zipapp, a module, or the script."""
    name = os.path.basename(sys.argv[0])
    if name == "astera-lite":
        return name
    if name.endswith(".pyz"):
        return f"python {name}"
    return "python -m astera_lite" if "-m" in sys.orig_argv[: -len(sys.argv)] else _SCRIPT


def _printable(text: str) -> str:
    """A text of several lines, or JSON, with control characters for terminals escaped as in JSON."""
    return re.sub(r"[^\t\n -~]", lambda match: match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1], text)


def _print_json(document: Any, stream: TextIO | None = None) -> None:
    stream = stream or sys.stdout
    escaped = not stream.encoding.lower().startswith("utf")
    print(_printable(json.dumps(document, indent=2, ensure_ascii=escaped)), file=stream)


def _write_body(pieces: Iterable[bytes]) -> None:
    """Write a response's body to stdout; for a terminal, control characters are escaped."""
    if sys.stdout.isatty():
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        for piece in (*pieces, b""):
            sys.stdout.write(_printable(decoder.decode(piece, final=not piece)))
    else:
        sys.stdout.buffer.writelines(pieces)
    sys.stdout.flush()


_COLOURS = {"Completed": 32, "delivered": 32, "Running": 33, "pending": 33, "Error": 31, "failed": 31, "gone": 31}
_DIM = 2


def _span(ms: int) -> str:
    """A length of time, for people."""
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000)):
        if ms >= 2 * size:
            return f"{ms // size} {unit}"
    return f"{ms / 1000:.1f} s" if ms >= 1000 else f"{ms} ms"


class _Sheet:
    """Output for people: on a terminal with colours and relative times, elsewhere plain and in UTC."""

    def __init__(self, stream: TextIO, offset: int = 0) -> None:
        self.stream, self._terminal, self._offset = stream, stream.isatty(), offset
        self._now = Clock().now() - offset
        self._colour = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def _painted(self, text: str, colour: int | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour is not None and self._colour else text

    def table(self, head: str, rows: Sequence[Sequence[str]]) -> None:
        """Print rows under a head; `head` has a word for each column."""
        lines = [[one_line(text) for text in row] for row in (head.split(), *rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for n, line in enumerate(lines):
            colours = [_COLOURS.get(text.partition(" ")[0]) if n else _DIM for text in line]
            padded = [text.ljust(width) for text, width in zip(line, [*widths[:-1], 0], strict=True)]
            print("  ".join(map(self._painted, padded, colours)).rstrip(), file=self.stream)

    def fields(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print a line for each name that has a value."""
        width = max(len(name) for name, _ in pairs)
        for name, text in pairs:
            if text:
                value = self._painted(one_line(text), _COLOURS.get(text.partition(" ")[0]))
                print(f"{self._painted(name.ljust(width), _DIM)}  {value}", file=self.stream)

    def steps(self, trace: Iterable[Mapping[str, Any]]) -> None:
        """Print the steps of a run; earlier attempts of a step have separate rows."""
        rows = []
        for step in trace:
            retries = step.get("retries", ())
            rows += [(step["path"], step["kind"], "retried", "", "", failure_text(each)) for each in retries]
            began, ended = (datetime.datetime.fromisoformat(step[name]) for name in ("startedAt", "finishedAt"))
            state = f"{step['state']} ({step['status']})" if "status" in step else step["state"]
            size = "" if step["size"] is None else f"{step['size']:,}"
            output = failure_text(step["error"]) if "error" in step else step["preview"] or ""
            took = _span(round((ended - began).total_seconds() * 1000))
            rows.append((step["path"], step["kind"], state, took, size, output))
        self.table("step kind state took bytes output", rows)

    def moment(self, ms: int | None, with_date: bool = False) -> str:
        """A time; empty for None."""
        if ms is None or not self._terminal:
            return timestamp(ms, self._offset) or ""
        relative = f"in {_span(ms - self._now)}" if ms > self._now else f"{_span(self._now - ms)} ago"
        local = datetime.datetime.fromtimestamp((ms + self._offset) / 1000)
        return f"{local:%Y-%m-%d %H:%M:%S} ({relative})" if with_date else relative


def _progress(what: str) -> Callable[[int, int], None]:
    """A function that shows progress on stderr if it is a terminal: the amount done, and the total."""
    if not sys.stderr.isatty():
        return lambda done, total: None
    shown_at = -math.inf

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if done < total and time.monotonic() - shown_at < 0.1:
            return
        shown_at = time.monotonic()
        line = f"{what} {100 * done // total} %" if done < total else ""
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    return show


# --- for authors ---


def check(args: argparse.Namespace, settings: Settings) -> int:
    """check: validate flows and settings, a line for each fault."""
    app = Application(settings)  # its faults are ConfigErrors
    if not check_exposure(settings, settings.host, True) and settings.token is None:  # else no token need be there
        check_exposure(settings, settings.host, any(token.digest for token in _tokens_of(settings.database)))
    wanted = {os.path.realpath(name): name for name in args.file}
    folders = sorted({os.path.dirname(path) for path in wanted}) or [settings.flows]
    faults, good = [], 0
    for name in args.file:
        if not os.path.lexists(name):
            faults.append(Fault(name, "", "there is no such file"))
        elif os.path.isdir(name):
            faults.append(Fault(name, "", f"is a folder: name its files, or check all of it with --flows {name}"))
        elif not name.endswith((".json", ".toml")):
            faults.append(Fault(name, "", "is not a flow file: flow files end in .json or .toml"))
    named = {fault.where for fault in faults}
    for folder in folders:
        found = Application(app.settings._replace(flows=folder)).deployer.read()
        for fault in found.faults:
            path = os.path.realpath(os.path.join(folder, fault.where))
            if not wanted or (path in wanted and wanted[path] not in named):
                faults.append(_openable(fault, folder, wanted.get(path)))
        sources = [os.path.realpath(os.path.join(folder, flow.source)) for flow in found.by_name.values()]
        good += sum(1 for source in sources if not wanted or source in wanted)
    for fault in faults:
        print(one_line(str(fault)))
    flows, errors = (f"{n} {word}{'s' * (n != 1)}" for n, word in ((good, "flow"), (len(faults), "error")))
    print(f"{flows} OK, {errors}", file=sys.stderr)
    return 1 if faults else 0


def _openable(fault: Fault, folder: str, path: str | None = None) -> Fault:
    """A fault in a form that terminals and editors can open: `flows/a.json:12: …`, `flows/a.json:1:30: …`."""
    path = path or (folder if fault.where == folder else os.path.join(folder, fault.where))
    grammar = re.fullmatch(r"line ([0-9]+), column ([0-9]+)", fault.place)
    if grammar:
        return Fault(f"{path}:{grammar[1]}:{grammar[2]}", "", fault.message)
    line = fault.place and optional("astera_lite_advice:line_of", path, fault.place)  # else it may be no file
    return fault._replace(where=f"{path}:{line}" if line else path)


def _reader(database: str) -> SqliteReader:
    """A database, opened for reading."""
    return wing("astera_lite_postgres:PostgresReader")(database) if is_postgres(database) else SqliteReader(database)


def _tokens_of(database: str) -> list[Token]:
    """The tokens in a database; empty if there is no database yet."""
    if not is_postgres(database) and not os.path.exists(database):
        return []
    with contextlib.closing(_reader(database)) as store:
        return store.tokens()


def try_flow(args: argparse.Namespace, settings: Settings) -> int:
    """try: run one flow in the terminal, and show its steps."""
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) == signal.SIG_DFL:  # else nohup has it ignored
            signal.signal(number, lambda number, frame: leave(128 + number))  # like shells
    set_up_logging(settings._replace(log_level="warning"))
    app = Application(settings)
    log.addFilter(app.outside.masked.log_record)
    app.deployer.reload()
    flow = app.deployments.by_name.get(args.name)
    if flow is None and args.name in {os.path.splitext(fault.where)[0] for fault in app.deployments.faults}:
        raise NotFound(f'the flow "{args.name}" has the faults listed above')
    if flow is None:
        raise NotFound(f'there is no flow "{args.name}"{suggest(args.name, app.deployments.by_name)}')
    repeated: dict[str, list[str]] = {}
    body: Any = None
    for name, value in args.values:
        if name != "body":
            repeated.setdefault(name, []).append(value)
            continue
        try:
            body = Path(value[1:]).read_bytes() if value.startswith("@") else value.encode()
        except OSError as error:
            raise NotFound(f"{value[1:]}: cannot be read: {reason_of(error)}") from None
    params = {name: values if len(values) > 1 else values[0] for name, values in repeated.items()}
    request = wing("astera_lite_embedding:request_for")(flow, params, body)
    given = flow.bind(request, "try")
    trace: list[dict[str, Any]] = []
    limit = flow.timeout or settings.job_timeout
    outcome = run_flow(Run(flow, given, app.outside, app.clock.monotonic() + limit, MeasuringJournal(), trace))
    assert isinstance(outcome, Outcome)
    app.outside.close()
    _Sheet(sys.stderr).steps(trace)
    if outcome.reason:
        print(f"reason: {one_line(outcome.reason)}", file=sys.stderr)
    if "requestId" in (outcome.error or {}):  # the body is a document for clients, which does not give the reason
        outcome = Outcome.failed("failed", 500, outcome.reason)
    answer = outcome.answer
    print(f"{outcome.status.value} {answer.code} {PHRASES.get(answer.code, '')}", file=sys.stderr)
    for name, value in answer.headers:
        print(f"{name}: {value}", file=sys.stderr)
    _write_body([answer.body])
    return 0 if outcome.error is None else 1


def test(args: argparse.Namespace, settings: Settings) -> int:
    """test: run the tests in flow files."""
    set_up_logging(settings._replace(log="off"))
    app = Application(settings)
    faults = app.deployer.reload()
    for fault in faults:
        print(one_line(str(_openable(fault, settings.flows))))
    flows = app.deployments.by_name
    unknown = [name for name in args.names if name not in flows]
    for name in unknown:
        print(f'there is no flow "{name}"{suggest(name, flows)}')
    chosen = [flow for flow in flows.values() if not args.names or flow.name in args.names]
    passed = failed = 0
    total, show = sum(len(flow.tests) for flow in chosen), _progress("testing")
    for flow in sorted(chosen, key=lambda flow: flow.name):
        for each in flow.tests:
            show(passed + failed, total)
            differences, canned = wing("astera_lite_steps:run_test")(flow, each, app.outside)
            show(total, total)  # clears the line for the output that follows
            passed, failed = passed + (not differences), failed + bool(differences)
            print(f"{'FAILED' if differences else 'ok':<6} {flow.name}: {each['name']} (steps replaced: {canned})")
            for line in differences:
                print(f"         {app.outside.masked(line)}")
    app.outside.close()
    without = sum(1 for flow in chosen if not flow.tests)
    print(f"tests passed: {passed}, failed: {failed}; flows without tests: {without}", file=sys.stderr)
    return 1 if failed or faults or unknown else 0


def print_document(args: argparse.Namespace, settings: Settings) -> int:
    """schema, openapi, postman: print a document; exit code 1 if it lacks flows because they are faulty."""
    if args.command == "schema":
        _print_json(wing("astera_lite_documents:flow_schema")(STEP_KINDS))
        return 0
    app = Application(settings)
    found = app.deployer.read()
    for fault in found.faults:
        print(one_line(str(_openable(fault, settings.flows))), file=sys.stderr)
    secured = settings.token is not None or bool(_tokens_of(settings.database))
    _print_json(wing(f"astera_lite_documents:{args.command}_document")(found, app.base, secured))
    return 1 if found.faults else 0


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


def new(args: argparse.Namespace, settings: Settings) -> int:
    """new: write a starter flow."""
    if not FLOW_NAME.fullmatch(args.name):
        raise Conflict(f"{shown(args.name)} must consist of letters, digits, - and _")
    if args.name + ".json" == CONNECTIONS_FILE:
        raise Conflict(f"{CONNECTIONS_FILE} holds the connections: choose another name")
    path = os.path.join(settings.flows, f"{args.name}.json")
    try:
        os.makedirs(settings.flows or ".", exist_ok=True)
        with open(path, "x", encoding="utf-8") as file:
            file.write(starter_flow(args.name))
    except FileExistsError:
        raise Conflict(f"{path} exists already: choose another name") from None
    except OSError as error:
        raise Conflict(f"{path}: {reason_of(error)}") from None
    print(f"wrote {path}; run it with: {command_name()} try {args.name} id=7", file=sys.stderr)
    return 0


# --- for operators ---


def _status_text(job: Job) -> str:
    detail = job.error["code"] if job.error else "waiting" if job.due else ""
    return f"{job.status.value} ({detail})" if detail else job.status.value


def jobs(args: argparse.Namespace, settings: Settings) -> int:
    """jobs: list the jobs in the database, newest first."""
    with contextlib.closing(_reader(settings.database)) as store:
        status = Status(args.status) if args.status else None
        offset = store.clock_offset()
        found = store.page(Clock().now() - offset, args.limit, None, args.flow, status, None)
        failures = {job.key: failure_of(job, store.trace(job.key)) for job in found if job.error}
    if args.json:
        documents = [
            status_document(job, job.base, offset=offset) | {"failure": failures.get(job.key)} for job in found
        ]
        _print_json({"jobs": documents})
        return 0
    sheet = _Sheet(sys.stdout, offset)
    rows = []
    for job in found:
        failure = failures.get(job.key)
        reason = failure_text(failure) if failure else (job.error or {}).get("detail", "")
        callback = f"{job.callback.state} ({job.callback.attempts})" if job.callback else ""
        times = (sheet.moment(job.created), sheet.moment(job.finished))
        rows.append((job.id, job.flow, _status_text(job), *times, callback, reason))
    sheet.table("id flow status created finished callback reason", rows)
    if not found:
        print("none", file=sys.stderr)
    return 0


def show_job(args: argparse.Namespace, settings: Settings) -> int:
    """job: one job, its steps, its callback attempts and its result."""
    with contextlib.closing(_reader(settings.database)) as store:
        key = JobKey.parse(args.id)
        job = store.get(key) if key else None
        if job is None:
            raise NotFound(f"there is no job {shown(args.id)}")
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
            _print_job(_Sheet(stream, offset), job, stored, steps, attempts)
        if args.result and stored is not None:
            in_pieces = stored.in_pieces
            _write_body(store.result_pieces(job.key, 0, stored.size) if in_pieces else iter([stored.answer.body]))
    return 0


def _print_job(
    sheet: _Sheet,
    job: Job,
    stored: StoredResult | None,
    steps: Sequence[Mapping[str, Any]],
    attempts: Sequence[Attempt],
) -> None:
    times = [(name, sheet.moment(getattr(job, name), True)) for name in ("created", "started", "finished", "expires")]
    callback, failure = job.callback, failure_of(job, steps)
    pairs = [
        ("id", job.id),
        ("flow", job.flow),
        ("status", _status_text(job)),
        ("error", job.error["detail"] if job.error else ""),
        ("reason", failure_text(failure) if failure else ""),
        *times,
        ("took", _span(job.finished - job.started) if job.finished is not None and job.started is not None else ""),
        ("attempt", str(job.attempt) if job.attempt > 1 else ""),
        ("result", f"{stored.answer.code}, {stored.size:,} bytes" if stored else ""),
    ]
    if callback:
        pairs.append(("callback", f"{callback.state} ({callback.attempts}) {callback.url}"))
        pairs.append(("next try", sheet.moment(callback.next_at, True)))
    sheet.fields(pairs)
    if steps:
        print(file=sheet.stream)
        sheet.steps(steps)
    if attempts:
        print(file=sheet.stream)
        rows = [(sheet.moment(a.at), str(a.status or ""), _span(a.duration_ms), a.error or "") for a in attempts]
        sheet.table("callback status took error", rows)


def token(args: argparse.Namespace, settings: Settings) -> int:
    """token: make a token, list all tokens, or revoke one."""
    path, name, role = settings.database, args.name, args.role or "user"
    edit = wing("astera_lite_database:edit_tokens")
    unused = [flag for flag, given in (("--flows", args.flows), ("--role", args.role)) if given is not None]
    if unused and (name is None or args.revoke):
        print(f"{unused[0]} goes with a new NAME", file=sys.stderr)
        return 2
    if args.revoke and name is None:
        print("--revoke needs the NAME of a token: without one, `token` lists them", file=sys.stderr)
        return 2
    if name is None:
        rows = []
        for one in _tokens_of(path):
            may_call = "all" if one.flows is None else ",".join(sorted(one.flows))
            rows.append((one.name, one.role if one.digest else "revoked", timestamp(one.created) or "", may_call))
        _Sheet(sys.stdout).table("name role created flows", rows)
        return 0
    if args.revoke:
        edit(path, name)
        print(f"revoked {name}; a running server refuses it within a second", file=sys.stderr)
        if not any(one.digest for one in _tokens_of(path)):
            print("that was the last token: only the token of the settings is accepted from now on", file=sys.stderr)
        return 0
    flows = None if args.flows is None else frozenset(word.strip() for word in args.flows.split(",") if word.strip())
    if faults := list(_token_faults(name, role, flows, settings.flows)):
        print(*faults, sep="\n", file=sys.stderr)
        return 2
    text = "astera_" + secrets.token_urlsafe(32)
    is_first = settings.token is None and not _tokens_of(path)
    edit(path, name, Token(name, token_digest(text), role, flows, Clock().wall()))
    if is_first:
        print("this is the first token: from now on the server refuses requests without a token", file=sys.stderr)
    print("send it as `Authorization: Bearer TOKEN`; it is not shown again:", file=sys.stderr)
    print(text)
    return 0


def _token_faults(name: str, role: str, flows: frozenset[str] | None, folder: str) -> Iterator[str]:
    for word in [name, *sorted(flows or ())]:
        if not FLOW_NAME.fullmatch(word):
            yield f"{shown(word)} must consist of letters, digits, - and _"
    if name == ADMIN_TOKEN:
        yield f"{name} is the name of the token in the settings: choose another one"
    if flows is not None and (role == "admin" or not flows):
        yield "--flows names flows, and not for --role admin, which may call and deploy all of them"
    if flows and os.path.isdir(folder):  # elsewhere a program publishes them
        known = {os.path.splitext(file)[0] for file in os.listdir(folder) if is_flow_file(file)}
        for word in sorted(flows - known):
            yield f'there is no flow "{word}" in {folder}{suggest(word, known)}'


def backup(args: argparse.Namespace, settings: Settings) -> int:
    """backup: a consistent copy of the database, also while the server runs."""
    if os.path.exists(args.copy):
        raise Conflict(f"{args.copy} exists already: name another file")
    wing("astera_lite_database:backup")(settings.database, args.copy, _progress("copying"))
    print(f"wrote {args.copy}, {os.path.getsize(args.copy):,} bytes", file=sys.stderr)
    return 0


# --- the command line ---


class Command(NamedTuple):
    """A command. `run` takes the parsed arguments and the settings, and returns the exit code."""

    run: Callable[[Any, Settings], int]
    help: str
    arguments: Sequence[tuple[str, dict[str, Any]]] = ()  # of argparse
    settings: Collection[str] = ()  # the settings that its help shows; it accepts all


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number of 1 or more")
    return int(text)


def _flow_name(text: str) -> str:
    if not FLOW_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{shown(text)} must consist of letters, digits, - and _")
    return text


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not of the form name=value")
    return name, value


def _word(name: str, placeholder: str, text: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return name, {"metavar": placeholder, "help": text, **more}


def _switch(name: str, text: str) -> tuple[str, dict[str, Any]]:
    return name, {"action": "store_true", "help": text}


_FOR_RUNS = ("flows", "data", "env_allow", "secrets", "callback_allow", "max_step_response", "max_result")
_FOR_DOCUMENTS = ("flows", "host", "port", "public_url", "env_allow", "secrets")
_JSON = _switch("--json", "print JSON, for programs")
COMMANDS = {
    "serve": Command(lambda args, settings: serve(settings), "serve the flows (the default)", (), SETTING_FIELDS),
    "check": Command(
        check,
        "validate flows and settings",
        [_word("file", "[FILE …]", "flow files; all if left out", nargs="*")],
        SETTING_FIELDS,
    ),
    "try": Command(
        try_flow,
        "run one flow in the terminal, and show its steps",
        [
            _word("name", "NAME", "name of the flow"),
            _word("values", "[key=value …]", "parameters; body=TEXT or body=@FILE", nargs="*", type=_pair, default=[]),
        ],
        (*_FOR_RUNS, "job_timeout"),
    ),
    "test": Command(
        test,
        "run the tests in flow files",
        [_word("names", "[NAME …]", "names of flows; all if left out", nargs="*")],
        ("flows", "env_allow", "secrets", "max_result"),
    ),
    "schema": Command(print_document, "print a JSON Schema of the flow file, for editors"),
    "openapi": Command(print_document, "print the OpenAPI document of the flows", (), _FOR_DOCUMENTS),
    "postman": Command(print_document, "print a Postman collection of the flows, also for newman", (), _FOR_DOCUMENTS),
    "new": Command(new, "write a starter flow", [_word("name", "NAME", "name of the flow")], ("flows",)),
    "jobs": Command(
        jobs,
        "list the jobs in the database",
        [
            _word("--flow", "NAME", "only jobs of this flow", type=_flow_name),
            ("--status", {"choices": ["Running", "Completed", "Error"], "help": "only jobs with this status"}),
            _word("--limit", "N", "the latest N jobs (default: 50)", type=_positive, default=50),
            _JSON,
        ],
        ("database",),
    ),
    "job": Command(
        show_job,
        "show one job, its steps and its callback attempts",
        [
            _word("id", "ID", "id of the job"),
            _switch("--result", "print the job's result to stdout, all else to stderr"),
            _JSON,
        ],
        ("database",),
    ),
    "token": Command(
        token,
        "make a token, list all tokens, or revoke one",
        [
            _word("name", "[NAME]", "name of the owner; without a name, all tokens are listed", nargs="?"),
            _word("--flows", "a,b", "flows that the token may call; all if left out"),
            ("--role", {"choices": ["user", "admin"], "help": "admin: sees and deploys everything (default: user)"}),
            _switch("--revoke", "make the token invalid"),
        ],
        ("database",),
    ),
    "backup": Command(
        backup,
        "copy the database, also while the server runs",
        [_word("copy", "FILE", "path of the copy; the file must not exist yet")],
        ("database",),
    ),
    "import": Command(
        late("astera_lite_database:import_command"),
        "copy a SQLite database into an empty PostgreSQL database",
        [_word("file", "FILE", "a backup, or the database of a server that was stopped")],
        ("database",),
    ),
    "zipapp": Command(
        late("astera_lite_zipapp:pack"),
        "write the server as one file, which `python FILE` runs",
        [_word("file", "[FILE]", "(default: astera_lite.pyz)", nargs="?", default="astera_lite.pyz")],
    ),
}

_EPILOG = """\
Every setting has one name in four spellings, the later wins: a key of the TOML file given by --config (astera_lite.toml
if there is one), the environment variable ASTERA_LITE_<NAME>, the flag, the keyword of the embedding constructor.
TIME is 250ms, 30s, 5m, 24h; SIZE is 64KiB, 10MiB.

examples:
  python astera_lite.py                             serve ./flows on http://127.0.0.1:9261
  python astera_lite.py --port 8080 --retention 1h  serve on another port, keep results for an hour
  python astera_lite.py new lookup                  write flows/lookup.json, to begin with
  python astera_lite.py check                       list the faults of the flows
  python astera_lite.py try lookup id=7             run a flow here and show its steps

exit codes: 0 stopped; 1 a fault in settings or in what was checked; 2 usage; 3 cannot listen; 4 database unusable;
            5 a fault of the server's own
"""


def command_parser() -> argparse.ArgumentParser:
    """The parser of the command line; settings are in its result as `set_NAME`."""
    started_as = command_name()
    parser = argparse.ArgumentParser(
        prog="astera_lite",
        usage=f"{started_as} [COMMAND] [settings]",
        description="Serve flows as an HTTP API: call them synchronously, or submit jobs, and poll or be called back.",
        epilog=_EPILOG.replace(_SCRIPT, started_as),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"Astera Lite {__version__}")
    commands = parser.add_subparsers(title="commands (`COMMAND --help` says more)", metavar="COMMAND", dest="command")
    _add_settings(parser, SETTING_FIELDS)
    for name, row in COMMANDS.items():
        words = [key if key[0] == "-" else options["metavar"] for key, options in row.arguments]
        command = commands.add_parser(
            name,
            prog=f"{started_as} {name}",
            help=row.help,
            description=f"{row.help[0].upper()}{row.help[1:]}.",
            usage=" ".join([started_as, name, *(f"[{w}]" if w[0] == "-" else w for w in words), "[settings]"]),
            allow_abbrev=False,
        )
        for key, options in row.arguments:
            command.add_argument(key, **options)
        _add_settings(command, row.settings, [key for key, _ in row.arguments])
    return parser


def settings_table() -> list[tuple[str, str, str]]:
    """Rows of name, default and explanation, for --help and docs/settings.md."""
    return [
        (name, "none" if item.default is None else item.show(item.default), item.help)
        for name, item in SETTING_FIELDS.items()
    ]


def _add_settings(parser: argparse.ArgumentParser, to_show: Collection[str], taken: Collection[str] = ()) -> None:
    """Every setting as a flag, unless the command uses the name otherwise; the help shows the relevant ones."""
    group = parser.add_argument_group("settings")
    more: dict[str, Any] = {"metavar": "FILE", "dest": "set_config", "default": argparse.SUPPRESS}
    group.add_argument("--config", help="TOML file of settings", **more)
    for name, default, text in settings_table():
        item, flag = SETTING_FIELDS[name], "--" + name.replace("_", "-")
        if item.secret or flag in taken:
            continue
        more = {"metavar": SETTING_KINDS[item.kind].metavar, "dest": f"set_{name}"}
        more["help"] = f"{text.replace('%', '%%')} (default: {default})" if name in to_show else argparse.SUPPRESS
        more |= {"nargs": "?", "const": "true"} if item.kind == "bool" else {}
        group.add_argument(flag, default=argparse.SUPPRESS, **more)
    if "token" in to_show:
        names = ", ".join(f"ASTERA_LITE_{name.upper()}" for name, item in SETTING_FIELDS.items() if item.secret)
        group.description = f"Without a flag, which `ps` would show: {names}."


def _check_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse an unknown flag: the parser would mistake its value for the command."""
    flags = {"--" + name.replace("_", "-"): name for name in SETTING_FIELDS}
    secret = {flag: f"ASTERA_LITE_{name.upper()}" for flag, name in flags.items() if SETTING_FIELDS[name].secret}
    known = {*flags, "-h", "--help", "--version", "--config"} - secret.keys()
    own = {key for row in COMMANDS.values() for key, _ in row.arguments if key[0] == "-"}
    for at, word in enumerate(itertools.takewhile(lambda word: word != "--", words)):
        flag = word.partition("=")[0]
        has_command = not COMMANDS.keys().isdisjoint(words[:at])
        if not re.match("-[^0-9]", word) or flag in known or (has_command and flag in own):
            continue
        if flag in secret:
            parser.error(f"{flag} would show in `ps`: set {secret[flag]}, or write it into the --config file")
        parser.error(
            f"{flag} must follow its command" if flag in own else f"there is no {flag}{suggest(flag, known | own)}"
        )


def run_command(words: Sequence[str]) -> int:
    """Run a command line and return the exit code. Raises SystemExit for wrong usage, --help and --version."""
    parser = command_parser()
    _check_flags(parser, words)
    args = parser.parse_args(words)
    flags = {name.removeprefix("set_"): value for name, value in vars(args).items() if name.startswith("set_")}
    return COMMANDS[args.command or "serve"].run(args, load_settings(flags))
