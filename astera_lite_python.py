"""Code of a flow's author: Python functions (the step python, @app.flow, @app.step) and programs (the step run).

Also futures of jobs, for programs that embed the server.

A wing of astera_lite, which loads this file when one of them is first wanted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, TypeVar

from astera_lite import (
    CHILDREN,
    LENIENT_DECODER,
    STEP_KINDS,
    STEP_NAME,
    STEP_OPTIONS,
    Application,
    Build,
    ConfigError,
    Context,
    ExpressionError,
    Fault,
    Flag,
    FlowError,
    Job,
    JobKey,
    ListOf,
    MapOf,
    NotFound,
    Number,
    OneOf,
    Progress,
    Run,
    Runner,
    Scope,
    Size,
    Status,
    StepError,
    StepKind,
    StoreError,
    Surroundings,
    Table,
    Template,
    Text,
    Value,
    as_bytes,
    as_text,
    evaluated,
    from_json,
    from_saved,
    kind_of,
    log,
    log_message,
    named,
    optional,
    show_size,
    shown,
    suggest,
    to_json,
    to_saved,
)

#: Modules of flow folders, by path and time of change.
_modules: dict[tuple[str, int], types.ModuleType] = {}


def load_function(folder: str | None, name: str) -> Callable[..., Any]:
    """The function `module:function` of the folder or of an installed module; ValueError says what is missing."""
    module_name, _, function_name = name.partition(":")
    try:
        module = _module(folder, module_name)
    except ModuleNotFoundError as error:
        cure = f"put {error.name}.py into the flows folder, or install it"
        raise ValueError(f'there is no module "{error.name}": {cure}') from None
    except (Exception, SystemExit) as error:
        raise ValueError(f'the module "{module_name}" cannot be loaded: {named(error)}') from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = suggest(function_name, [n for n, v in vars(module).items() if callable(v)])
        raise ValueError(f'the module "{module_name}" has no function "{function_name}"{near}')
    return function  # type: ignore[no-any-return]


def _module(folder: str | None, name: str) -> types.ModuleType:
    path = os.path.join(folder, f"{name}.py") if folder and "." not in name else ""
    if not os.path.isfile(path):
        return importlib.import_module(name)
    key = (path, os.stat(path).st_mtime_ns)
    if key not in _modules:  # by path, so that a changed file is loaded again, and two servers keep their modules apart
        spec = importlib.util.spec_from_file_location(f"astera_flow_{name}_{len(_modules)}", path)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(name=name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _modules[key] = module
    return _modules[key]


def as_json(value: Any, name: str) -> Any:
    """The value of a function as it will be read back later: tuples are lists, names of members are text."""
    if isinstance(value, bytes):
        return value
    try:
        return json.loads(to_json(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}() did not return JSON: {error}") from None


class _FunctionName(Text):
    """The function of a `python` step: its name, or in an embedding program the function; compiles to both."""

    def read(self, build: Build, value: Any, place: str) -> tuple[str, Callable[..., Any] | None]:
        try:
            name = "" if callable(value) else self.parse(value)
            function = load_function(build.folder, name) if name else value
        except ValueError as error:
            build.fault(place, str(error))
            return "", None
        _refuse_async(build, function, place)
        return name, function


def _refuse_async(build: Build, function: Any, place: str) -> None:
    if inspect.iscoroutinefunction(function):
        build.fault(place, "is an async function, and steps run on threads: write def, and asyncio.run(…) inside it")


def _make_python(build: Build, given: dict[str, Any], place: str) -> Runner:
    """The runner that calls a function, in a separate process if it is to be isolated."""
    (name, function), args = given["call"], given["args"]
    if not given["isolate"]:
        return partial(_call, function, args)
    if not name:
        cure = 'needs the function by name, "module:function": a separate process imports it'
        build.fault(f"{place}/isolate", cure)
    return partial(_call_isolated, name, args)


_PYTHON = {
    "call": _FunctionName('a function such as "module:function"', r"(?a:[A-Za-z_][\w.]*:[A-Za-z_]\w*)", required=True),
    "args": MapOf(Value(), default={}),
    "isolate": Flag(default=False),
}
PYTHON = StepKind(Table(_PYTHON, short="call"), _make_python, "calls a Python function", effect=True, code=True)


def _call(function: Callable[..., Any], args: Mapping[str, Template], run: Run, scope: Scope, path: str) -> Any:
    value = function(Context(run, scope, path), **evaluated(args, scope))
    run.check()
    run.left()
    return as_json(value, getattr(function, "__name__", "the function"))


def _call_isolated(name: str, args: Mapping[str, Template], run: Run, scope: Scope, path: str) -> Any:
    kept, folder = run.outside.kept, run.outside.folder
    processes = kept.get("isolated") or kept.setdefault("isolated", Isolated(folder))
    return processes.call(run, name, Context(run, scope, path), evaluated(args, scope), path)


def _own_kind(function: Callable[..., Any]) -> StepKind:
    """The kind of step that an embedding program adds: its members are the arguments of the function."""
    arguments = list(inspect.signature(function).parameters.values())[1:]  # after the context
    named = {it.name: Value(required=it.default is it.empty) for it in arguments if it.kind != it.VAR_KEYWORD}
    members = Table(named, more=None if len(named) == len(arguments) else Value())

    def make(build: Build, given: dict[str, Any], place: str) -> Runner:
        _refuse_async(build, function, place)
        return partial(_call, function, given)

    return StepKind(members, make, " ".join((function.__doc__ or "").split()), effect=True, code=True)


class Isolated:
    """Warm child processes for `python` steps with `isolate`, as many as there are cores."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._turns = threading.Semaphore(os.cpu_count() or 1)
        self._idle: list[Child] = []
        self._closed = False

    def call(self, run: Run, function: str, context: Context, args: Mapping[str, Any], path: str) -> Any:
        """The function's value; raises StepError if the function raised, or its process ended."""
        task = {"function": function, "folder": self._folder, "args": args, "params": context.params}
        task |= {"request": context.request, "steps": context.steps, "secrets": context.secrets}
        while not self._turns.acquire(timeout=min(run.left(), 0.1)):
            run.check()
        try:
            child = self._child(run.outside)
            try:
                message = self._talk(run, child, to_saved(task).encode() + b"\n", path)
            except BaseException:
                child.close()
                raise
            if self._closed:
                child.close()
            else:
                self._idle.append(child)
        finally:
            self._turns.release()
        if "error" in message:
            failed = StepError(500, "it failed", str(message["error"]), {"error"})
            failed.source = message["source"]
            raise failed
        return message["value"]

    def _child(self, outside: Surroundings) -> Child:
        """A warm process, or a new one."""
        while self._idle:
            child = self._idle.pop()
            if child.process.poll() is None:
                return child
            child.close()
        root = os.path.dirname(os.path.abspath(__file__))
        code = (
            f"import sys; sys.path.insert(0, {root!r}); import astera_lite_python; astera_lite_python.isolated_main()"
        )
        return Child([sys.executable, "-c", code], child_environment(outside), own_stderr=False)

    def _talk(self, run: Run, child: Child, task: bytes, path: str) -> dict[str, Any]:
        """Send a task to a process; return the message that ends the task, with its value or error."""
        process, answers = child.process, queue.SimpleQueue[bytes]()
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def talk() -> None:
            with contextlib.suppress(OSError, ValueError):  # killed meanwhile
                stdin.write(task)
                stdin.flush()
                while line := stdout.readline():
                    answers.put(line)
                    if line.startswith(b'{"value"') or line.startswith(b'{"error"'):
                        return
            answers.put(b"")

        thread = threading.Thread(target=talk, name="astera-child", daemon=True)
        thread.start()
        with run.cancel.calling(lambda: answers.put(b"cancelled")):
            while True:
                try:
                    line = answers.get(timeout=run.left())
                except queue.Empty:
                    continue
                run.check()
                if not line:
                    code = process.wait()
                    raise StepError(500, "its process ended", f"its process ended with code {code}", {"error"})
                message: dict[str, Any] = from_saved(line.decode())
                if "progress" in message:
                    run.progress = Progress(path, *message["progress"])
                elif "log" in message:
                    level, text = message["log"]
                    log.log(level, "flow %s: step %s: %s", run.flow.name, path, text, extra=run.about | {"step": path})
                else:
                    return message

    def close(self) -> None:
        """End idle processes; busy ones end with their step."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()


class _IsolatedContext:
    """The context of a function in a separate process; it reports over the pipe."""

    cancelled = False  # its process is killed instead

    def __init__(self, task: Mapping[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
        self.params, self.request, self.steps = task["params"], task["request"], task["steps"]
        self.secrets = task["secrets"]
        self.log = logging.getLogger("astera_lite.step")
        self._say = say

    def progress(self, done: int, total: int) -> None:
        self._say({"progress": [done, total]})

    sleep = staticmethod(time.sleep)


def isolated_main() -> None:
    """The main loop of a child process: one task for each line of its standard input, until the input is closed."""
    if hasattr(os, "nice"):
        os.nice(10)  # the server's own threads have priority
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # output of a function must not get between the lines of the protocol

    def say(message: dict[str, Any]) -> None:
        pipe.write(to_saved(message).encode() + b"\n")
        pipe.flush()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            say({"log": [record.levelno, log_message(record)]})

    logging.basicConfig(level=logging.DEBUG, handlers=[Handler()])
    logging.captureWarnings(True)
    for line in sys.stdin.buffer:
        task = from_saved(line.decode())
        try:
            function = load_function(task["folder"], task["function"])
            value = function(_IsolatedContext(task, say), **task["args"])
            say({"value": as_json(value, task["function"])})
        except (Exception, SystemExit) as error:
            source = optional("astera_lite_advice:source_of", error)
            say({"error": named(error), "source": source})


_ARGUMENT_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}
_NO_CONTEXT = (*_ARGUMENT_TYPES, *(kind.__name__ for kind in _ARGUMENT_TYPES))  # types of a first argument
_ANNOTATIONS = "str, int, float, bool, a list of one of these, or one of them | None"


def _annotated(function: Callable[..., Any], annotation: Any) -> tuple[Any, bool]:
    """The type of an annotation without `| None`, and whether it had `| None`."""

    def alone() -> None:
        """Holds one annotation: the others of the function may be undefined at run time."""

    alone.__annotations__ = {"it": annotation}
    hint = typing.get_type_hints(alone, getattr(inspect.unwrap(function), "__globals__", {}))["it"]
    inside = [part for part in typing.get_args(hint) if part is not type(None)]
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType) and len(inside) == 1
    return (inside[0] if optional else hint), optional


def _schema_of(hint: Any, in_body: bool) -> dict[str, Any] | None:
    """The schema of the values that a type allows, in a JSON body or as a parameter; None for any other type."""
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return {} if in_body else {"type": "string"}
    if kind is list and inside:
        items = _schema_of(inside[0], in_body)
        fits = items is not None and (in_body or items["type"] != "array")
        return {"type": "array", "items": items} if fits else None
    if in_body and (kind in (dict, Mapping) or typing.is_typeddict(hint)):
        return {"type": "object"}
    return {"type": _ARGUMENT_TYPES[hint]} if isinstance(hint, type) and hint in _ARGUMENT_TYPES else None


def _argument_spec(
    function: Callable[..., Any], item: inspect.Parameter, where: str, described: Mapping[str, Any]
) -> dict[str, Any]:
    """The declaration of an argument in path, query or body; raises ValueError if no request can provide it."""
    if item.kind not in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY):
        raise ValueError("cannot be given by name, as each argument is: write the arguments one by one")
    annotation = Any if item.annotation is item.empty else item.annotation
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    schema, optional, in_body = None, False, where == "body"
    try:
        hint, optional = _annotated(function, annotation)
        schema = _schema_of(hint, in_body)
        cure = f"dict, Any, {_ANNOTATIONS}, or give app.flow a schema, body={{…}}"
        if not in_body:
            cure = f'{_ANNOTATIONS}; for a date str, and parameters={{"{item.name}": {{"type": "date"}}}}'
        fault = f"cannot be {text}: write {cure}"
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        fault = f"has an annotation that cannot be read where the function is defined, {text}: {error}"
    if schema is None and "type" not in described:
        raise ValueError(fault)
    has_default = item.default is not item.empty
    default = {"default": item.default} if has_default and item.default is not None else {}
    if in_body and default:
        raise ValueError("can have only the default None, for a body that is left out")
    if in_body:
        return (schema or {}) | ({"required": False} if optional or has_default else {})
    needed = {} if has_default or optional or where == "path" else {"required": True}
    return {"in": where, **(schema or {}), **default, **needed, **described}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def flow_decorator(
    app: Application, route: str, name: str, processing: Sequence[str], options: Mapping[str, Any]
) -> Callable[[_Function], _Function]:
    """The decorator that `AsteraLite.flow` returns; raises FlowError."""
    if not isinstance(route, str):
        fault = 'has @app.flow without arguments: write the method and the resource, @app.flow("GET /name")'
        raise FlowError([Fault(getattr(route, "__name__", "flow"), "", fault)])
    modes = [processing] if isinstance(processing, str) else list(processing)

    def publish(function: _Function) -> _Function:
        tree = _function_flow(function, route, modes, options)
        app.deployer.deploy(name or function.__name__.replace("_", "-"), tree)
        return function

    return publish


def step_decorator(app: Application, name: str) -> Callable[[_Function], _Function]:
    """The decorator that `AsteraLite.step` returns; raises ConfigError."""
    if name in STEP_KINDS or name in STEP_OPTIONS or not STEP_NAME.fullmatch(name):
        raise ConfigError([Fault("step", name, "is not a new word of letters, digits and _: choose another name")])

    def add(function: _Function) -> _Function:
        app.deployer.kinds[name] = _own_kind(function)
        if app.is_open:
            app.deployer.reload()  # a file may have waited for it
        return function

    return add


def future_of(app: Application, key: JobKey | None, find: Callable[[], Job]) -> Future[Job]:
    """What `AsteraLite.future` returns. `find` raises NotFound if there is no such job, as for the key None."""
    future = Future[Job]()

    def look() -> None:
        if key is not None and not future.done():
            app.watchers.add(key, changed)  # before the look: or a job that ends in between would not be seen
        with contextlib.suppress(InvalidStateError):  # cancelled, or another thread has just seen the end, too
            try:
                job = find()
            except (StoreError, NotFound) as error:
                future.set_exception(error)
            else:
                if job.status is not Status.RUNNING:
                    future.set_result(job)

    def changed() -> None:
        thread = threading.Thread(target=look, name="astera-future", daemon=True)
        try:
            thread.start()
            app.threads.add(thread)
        except RuntimeError:  # no thread can be had
            if key is not None and app.is_open:
                app.watchers.add(key, changed)  # the housekeeper tells again
            else:
                look()

    look()
    if key is not None:
        future.add_done_callback(lambda _: app.watchers.remove(key, changed))
    return future


def _function_flow(
    function: Callable[..., Any], route: str, processing: list[str], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The tree of a flow that calls one Python function; its parameters follow from the signature.

    `options` are other members of a flow file, with `parameters` and `body` of its request. Raises FlowError for what
    the signature has and a request cannot give.
    """
    method, _, resource = route.partition(" ")
    described, body = dict(options.get("parameters", {})), options.get("body")
    parameters: dict[str, Any] = {}
    args: dict[str, str] = {}
    faults: list[Fault] = []

    def refuse(name: str, message: str) -> None:
        faults.append(Fault(getattr(function, "__name__", "function"), name, message))

    items = list(inspect.signature(function).parameters.values())
    first = items[0] if items else None
    if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        refuse("", "has no argument for its Context: begin with `context: Context`")
    elif first.name in ("self", "cls"):
        refuse(first.name, "makes it a method: publish the bound method, app.flow(…)(object.method)")
    elif f"{{{first.name}}}" in resource or first.annotation in _NO_CONTEXT:
        refuse(first.name, "is the first argument, which gets the Context: put `context: Context` before it")
    for item in items[1:]:
        where = "path" if f"{{{item.name}}}" in resource else "query"
        if item.name == "body" and where == "query" and (body is not None or method != "GET"):
            where = "body"
        args[item.name] = "${request.body}" if where == "body" else f"${{params.{item.name}}}"
        try:
            if where != "body":
                parameters[item.name] = _argument_spec(function, item, where, described.pop(item.name, {}))
            elif "body" not in options:
                body = _argument_spec(function, item, where, {})
        except ValueError as error:
            refuse(item.name, str(error))
    if faults:
        raise FlowError(faults)
    request: dict[str, Any] = {"method": method, "resource": resource.strip(), "processing": processing}
    request |= {"parameters": parameters | described, **({} if body is None else {"body": body})}
    others = {name: value for name, value in options.items() if name not in ("parameters", "body")}
    description = " ".join((function.__doc__ or "").split())
    step = {"name": "result", "python": {"call": function, "args": args}}
    return {"description": description, **others, "request": request, "steps": [step]}


_PIPE_BYTES = 1 << 16
_LAST_WORDS_S = 0.5  # time in which the last output of an ended program arrives
_STDERR_BYTES = 64 << 10


class Child:
    """A child process in a group of its own, whose output arrives in `events`: (stream's name, bytes), b"" at its end.

    `kill` ends it with all its children.
    """

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str | None = None, own_stderr: bool = True
    ) -> None:
        import subprocess  # noqa: PLC0415 (flows without programs do without it)

        pipe, group = subprocess.PIPE, 0x200 if os.name == "nt" else 0  # CREATE_NEW_PROCESS_GROUP
        streams: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": pipe if own_stderr else None}
        self.process = subprocess.Popen(  # noqa: S603 (the flow's author chooses the program)
            command, **streams, env=env, cwd=cwd, creationflags=group, start_new_session=os.name != "nt"
        )
        self.events: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._killed = False
        CHILDREN.add(self)

    def follow(self, given: bytes) -> None:
        """Write the input of the program, and put its output and its end into `events`."""
        assert self.process.stdout is not None and self.process.stderr is not None
        for target, *args in (
            (self._feed, given),
            (self._read, "stdout", self.process.stdout),
            (self._read, "stderr", self.process.stderr),
            (self._wait,),
        ):
            self._threads.append(threading.Thread(target=target, args=args, name="astera-child", daemon=True))
            self._threads[-1].start()

    def _feed(self, given: bytes) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError), self.process.stdin as pipe:  # the program need not read all input
            pipe.write(given)

    def _read(self, name: str, pipe: Any) -> None:
        with pipe:
            while data := os.read(pipe.fileno(), _PIPE_BYTES):
                self.events.put((name, data))
        self.events.put((name, b""))

    def _wait(self) -> None:
        self.process.wait()
        self.events.put(("exit", b""))

    def left_others(self) -> bool:
        """Whether children of the ended program still run; unknown on Windows."""
        try:
            os.killpg(self.process.pid, 0)
        except (AttributeError, OSError):
            return False
        return True

    def kill(self) -> None:
        """Kill the program and its children, including those that it left behind."""
        if self._killed:  # another group may have its number by now
            return
        self._killed = True
        CHILDREN.discard(self)
        if os.name == "nt":
            import subprocess  # noqa: PLC0415

            tree = ["taskkill", "/F", "/T", "/PID", str(self.process.pid)]
            subprocess.run(tree, capture_output=True, check=False)  # noqa: S603
        else:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """Kill the remaining processes, and wait for the threads that read their output."""
        self.kill()
        for thread in self._threads:
            thread.join(_LAST_WORDS_S)
        if any(thread.is_alive() for thread in self._threads):
            return  # a process outside the group has the pipes; the thread that reads them closes them
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # input that was not written
                    pipe.close()


def child_environment(outside: Surroundings) -> dict[str, str]:
    """The server's environment without its own settings and without the secrets."""
    hidden = outside.secrets.keys()
    return {
        name: text for name, text in os.environ.items() if not name.startswith("ASTERA_LITE_") and name not in hidden
    }


def _make_run(build: Build, given: dict[str, Any], place: str) -> Runner:
    words, stdin, output, limit = given["command"], given.get("input"), given["output"], given.get("maxOutput")
    if not words[0].constant:
        build.fault(f"{place}/command/0", "must be plain text: the program to run is never computed")

    def program(run: Run, scope: Scope, path: str) -> dict[str, Any]:
        arguments = [_argument(word(scope), f"{place}/command/{at}") for at, word in enumerate(words)]
        value = stdin(scope) if stdin else None
        code, out, err = _run_program(run, arguments, b"" if value is None else as_bytes(value), limit)
        if code not in given["expect"]:
            tail = err.decode(errors="replace")[-2000:]
            detail = f"the program ended with code {code}"
            raise StepError(500, detail, f"{arguments[0]}: {detail}: {tail}", {"exit"})
        return {"code": code, "stdout": _read_output(out, output, place), "stderr": err.decode(errors="replace")}

    return program


_PROGRAM = {
    "command": ListOf(Value(), required=True, least=1),
    "input": Value(),
    "output": OneOf("text", "json", "lines", default="text"),
    "maxOutput": Size(),
    "expect": ListOf(Number(-255, 255, "an exit code"), default=[0], least=1, lone=True),
}
PROGRAM = StepKind(Table(_PROGRAM, short="command"), _make_run, "runs a program", effect=True)


def _argument(value: Any, place: str) -> str:
    if value is None or type(value) is bytes:
        raise ExpressionError(f"{place}: {kind_of(value)} cannot be an argument")
    text = as_text(value)
    if "\0" in text:
        raise ExpressionError(f"{place}: an argument cannot hold NUL")
    return text


def _run_program(run: Run, arguments: list[str], given: bytes, limit: int | None) -> tuple[int, bytes, bytes]:
    """Exit code, standard output, and the end of standard error."""
    limit = min(limit or run.outside.max_step_response, run.outside.max_step_response)
    try:
        child = Child(arguments, child_environment(run.outside), run.outside.folder)
    except (OSError, ValueError) as error:
        reason = f"{arguments[0]} cannot be started: {error}"
        raise StepError(500, "its program cannot be started", reason, {"missing"}) from None
    out, err, open_streams = bytearray(), bytearray(), {"stdout", "stderr", "exit"}
    try:
        child.follow(given)
        with run.cancel.calling(lambda: child.events.put(("cancel", b""))):
            while open_streams:
                ended = "exit" not in open_streams
                try:
                    name, data = child.events.get(timeout=min(run.left(), _LAST_WORDS_S) if ended else run.left())
                except queue.Empty:
                    if ended:  # a child that left the group keeps the pipes open: do not wait for it
                        break
                    continue  # `left` says what that means
                run.check()
                if not data:
                    open_streams.discard(name)
                    if name == "exit":
                        if child.left_others():
                            words = "flow %s: %s ended and left processes behind, which are killed"
                            log.warning(words, run.flow.name, shown(arguments[0], 200), extra=run.about)
                        child.kill()  # processes that it left behind would keep the pipes open
                elif name == "stdout":
                    out += data
                else:
                    err = (err + data)[-_STDERR_BYTES:]
                if len(out) > limit:
                    raise StepError(500, "its program wrote too much", f"more than {show_size(limit)}", {"too_large"})
        return child.process.returncode, bytes(out), bytes(err)
    finally:
        child.close()


def _read_output(data: bytes, output: str, place: str) -> Any:
    text = data.decode(errors="replace")
    if output != "json":
        return text.splitlines() if output == "lines" else text
    try:
        return from_json(data, LENIENT_DECODER)
    except ValueError as error:
        raise StepError(500, "its program did not write JSON", f"{place}: {error}", {"body"}) from None
