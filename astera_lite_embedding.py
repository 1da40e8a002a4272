"""For programs that embed the server: `AsteraLite`, flows and steps made of Python functions, futures of jobs.

Also what the step `python` shares with them: `Context`, and the call of a function. And the request of a call that does
not come over HTTP, for the step `call`, flow tests, `try` and the Postman collection.

A wing of astera_lite, which loads this file when one of them is first wanted.
"""

import contextlib
import inspect
import json
import logging
import math
import os
import re
import threading
import time
import types
import typing
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any, Self, TypeVar, cast

from astera_lite import (
    ANYBODY,
    BASE_NAMES,
    CANCEL_ELSEWHERE_S,
    CONTENT_TYPES,
    MAX_NAME,
    MODES,
    STEP_KINDS,
    STEP_NAME,
    Answer,
    Application,
    Build,
    Clock,
    ConfigError,
    Conflict,
    Done,
    Elsewhere,
    Fault,
    Flag,
    Flow,
    FlowError,
    InputError,
    InputErrors,
    Job,
    JobKey,
    MapOf,
    Member,
    NotFound,
    Prepared,
    Progress,
    Run,
    Runner,
    Scope,
    Settings,
    Status,
    StepKind,
    StoredRequest,
    StoreError,
    Table,
    Template,
    Value,
    as_text,
    await_write,
    check_callback,
    check_unfinished,
    encode_query,
    evaluated,
    is_json_type,
    log,
    pointer,
    shown,
    step_table,
    suggest,
    to_json,
)


class Context:
    """The first argument of a step's function: data of the run, and methods that report progress and wait."""

    def __init__(self, run: Run, scope: Scope, path: str) -> None:
        self._run, self._path = run, path
        self.params: dict[str, Any] = scope["params"]
        self.request: dict[str, Any] = scope["request"]
        hidden = {*BASE_NAMES, "error"} if scope["error"] is None else {*BASE_NAMES}
        self.steps: dict[str, Any] = {name: value for name, value in scope.items() if name not in hidden}
        self.secrets: dict[str, str] = dict(run.outside.secrets)
        self.log = logging.LoggerAdapter(log, run.about | {"step": path})

    @property
    def cancelled(self) -> bool:
        """Whether the run should stop; a long function should check this from time to time."""
        return self._run.cancel.is_set or self._run.outside.clock.monotonic() >= self._run.step_deadline

    def progress(self, done: int, total: int) -> None:
        """Show the progress of the step in the status document."""
        self._run.progress = Progress(self._path, int(done), int(total))

    def sleep(self, seconds: float) -> None:
        """Wait so many seconds; raises an exception when the run is cancelled or exceeds its time limit."""
        self._run.sleep(seconds)


def as_json(value: Any, name: str) -> Any:
    """The value of a function as it will be read back later: tuples are lists, names of members are text."""
    if isinstance(value, bytes):
        return value
    try:
        return json.loads(to_json(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}() did not return JSON: {error}") from None


def function_name(value: Any) -> str:
    """The text of a function, or of another value that is not JSON, in the JSON of a flow."""
    return f"{getattr(value, '__module__', '?')}:{getattr(value, '__qualname__', repr(type(value)))}"


def runner_of(build: Build, function: Callable[..., Any], args: Mapping[str, Template], place: str) -> Runner:
    """The runner of a step that calls a function with these arguments."""
    if inspect.iscoroutinefunction(function):
        cure = "write def, and asyncio.run(…) inside it"
        build.fault(place, f"is an async function, and steps run on threads: {cure}")
    return partial(_call, function, args)


def _call(function: Callable[..., Any], args: Mapping[str, Template], run: Run, scope: Scope, path: str) -> Any:
    value = function(Context(run, scope, path), **evaluated(args, scope))
    run.check()
    run.left()
    return as_json(value, getattr(function, "__name__", "the function"))


def _make_python(build: Build, given: dict[str, Any], place: str) -> Runner:
    if given["isolate"]:
        cure = 'needs the function by name, "module:function": a separate process imports it'
        build.fault(f"{place}/isolate", cure)
    return runner_of(build, given["call"], given["args"], f"{place}/call")


_PYTHON = {"call": Member(), "args": MapOf(Value(), default={}), "isolate": Flag(default=False)}
_FUNCTION = StepKind(Table(_PYTHON, short="call"), _make_python, "calls a Python function", effect=True, code=True)


class _PythonStep(Elsewhere):
    """The step `python` in a program, which may give the function itself instead of its name."""

    def read(self, build: Build, value: Any, place: str) -> Any:
        function = value.get("call") if isinstance(value, dict) else value
        return _FUNCTION.read(build, value, place) if callable(function) else super().read(build, value, place)


def _own_kind(function: Callable[..., Any]) -> StepKind:
    """The kind of step that an embedding program adds: its members are the arguments of the function."""
    arguments = list(inspect.signature(function).parameters.values())[1:]  # after the context
    named = {it.name: Value(required=it.default is it.empty) for it in arguments if it.kind != it.VAR_KEYWORD}
    members = Table(named, more=None if len(named) == len(arguments) else Value())

    def make(build: Build, given: dict[str, Any], place: str) -> Runner:
        return runner_of(build, function, given, place)

    return StepKind(members, make, " ".join((function.__doc__ or "").split()), effect=True, code=True)


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
        except (TypeError, ValueError) as error:  # also of a description that is no object
            refuse(item.name, str(error))
    if faults:
        raise FlowError(faults)
    request: dict[str, Any] = {"method": method, "resource": resource.strip(), "processing": processing}
    request |= {"parameters": parameters | described, **({} if body is None else {"body": body})}
    others = {name: value for name, value in options.items() if name not in ("parameters", "body")}
    description = " ".join((function.__doc__ or "").split())
    step = {"name": "result", "python": {"call": function, "args": args}}
    return {"description": description, **others, "request": request, "steps": [step]}


def request_for(flow: Flow, params: Mapping[str, Any], body: Any = None) -> StoredRequest:
    """The request of a client that calls a flow with these parameters; InputError if no request can express them."""
    params = {name: value for name, value in params.items() if value is not None}  # null counts as missing
    known = {item.name: item for item in flow.parameters}
    errors = InputErrors()
    path, query, headers = flow.resource, [], {}
    for name, value in params.items():
        if name not in known and name not in flow.selecting:
            errors.add("query", str(name), "is no parameter" + suggest(str(name), known))
            continue
        where, array = (known[name].where, known[name].array) if name in known else ("query", False)
        many = isinstance(value, list | tuple)
        texts = [_sent(item, where, name, as_text) for item in (value if many else [value])]
        if many and array and "" in texts:
            errors.add(where, name, "has an empty item")
        elif many and array and where != "query" and "," in "".join(texts):
            errors.add(where, name, "has an item with a comma, which divides items there")
        elif many and not array and where != "query":
            errors.add(where, name, "must be given once")
        elif where == "query":
            query += [(name, text) for text in texts]
            if many and array and (not texts or (len(texts) == 1 and "," in texts[0])):
                query.append((name, ""))  # see Parameter
        elif where == "path":
            path = path.replace(f"{{{name}}}", urllib.parse.quote(",".join(texts), safe=""))
        else:
            headers[name.lower()] = ",".join(texts)
    for name in [item.name for item in flow.parameters if item.where == "path" and item.name not in params]:
        errors.add("path", name, "is missing")
    errors.check()
    data = b""
    if body is not None:
        accepts, binary = flow.content_types, CONTENT_TYPES["binary"]
        as_it_is = isinstance(body, bytes) and binary in accepts
        media = binary if as_it_is else accepts[0] if accepts else CONTENT_TYPES["json"]
        data = body if isinstance(body, bytes) else _sent(body, "body", "", partial(_written, media=media)).encode()
        headers["content-type"] = media
    return StoredRequest(flow.method, path, urllib.parse.urlencode(query), headers, data)


def _written(body: Any, media: str) -> str:
    if is_json_type(media):
        return to_json(body)
    return encode_query(body) if media == CONTENT_TYPES["form"] and isinstance(body, dict) else as_text(body)


def _sent(value: Any, where: str, name: str, write: Callable[[Any], str]) -> str:
    """A value as in a request; raises InputError with the member that JSON or UTF-8 cannot express."""
    try:
        text = write(value)
        text.encode()
        return text
    except (TypeError, ValueError) as error:
        if len(name) < MAX_NAME and isinstance(value, dict | list | tuple):
            for key, member in value.items() if isinstance(value, dict) else enumerate(value):
                _sent(member, where, f"{name}/{pointer(str(key))}", to_json)
        raise InputError([{"in": where, "name": name, "message": str(error)}]) from None


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _key_of(job: str | Job) -> JobKey | None:
    return job.key if isinstance(job, Job) else JobKey.parse(str(job))


class Result:
    """A flow's response, for an embedding program."""

    status_code: int  #: 200 to 599
    headers: dict[str, str]  #: those that the flow gives, and Content-Type
    content: bytes  #: the body

    def __init__(self, answer: Answer) -> None:
        self.status_code = answer.code
        self.headers = dict(answer.headers)
        self.content = answer.body

    @property
    def text(self) -> str:
        """The body as text."""
        return self.content.decode(errors="replace")

    def json(self) -> Any:
        """The body as a JSON value. Raises ValueError if it is none."""
        return json.loads(self.content)


def _future_of(app: Application, key: JobKey | None, find: Callable[[], Job]) -> Future[Job]:
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
            app.future_threads.add(thread)
        except RuntimeError:  # no thread can be had
            if key is not None and app.is_open:
                app.watchers.add(key, changed)  # the housekeeper tells again
            else:
                look()

    look()
    if key is not None:
        future.add_done_callback(lambda _: app.watchers.remove(key, changed))
    return future


class AsteraLite(Application):
    """The application for a program: flows, jobs, results, callbacks. `Server(app)` puts it on a socket.

    A context manager; nothing starts before it is entered (or `start` is called), and all of it ends with it. Keywords
    are settings, by their names in `Settings`: AsteraLite(workers=4, retention="1h"); flow files are read only where
    `flows` names a folder. Raises ConfigError at once, StoreError on entering.

        with AsteraLite(database="jobs.db") as app:
            job = app.submit("hello", {"name": "Ada"})
            print(app.wait(job.id).status, app.result(job.id).json())

    `flow`, `step` and `deploy` publish; `run` calls; `submit`, `status`, `wait`, `future`, `result` and `cancel` deal
    with jobs; all of them from any thread, and several applications may live in one process, each with its own
    database. docs/embedding.md has examples.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        clock: Clock | None = None,
        environ: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> None:
        if not isinstance(settings, Settings | None):
            raise ConfigError([Fault("settings", "", 'are given by name: AsteraLite(database="…")')])
        settings = Settings.load(**({"flows": ""} if settings is None else settings._asdict()) | keywords)
        at = {name: os.path.abspath(way) for name in ("flows", "data") if os.path.isdir(way := getattr(settings, name))}
        super().__init__(settings._replace(**at), clock, environ)  # a program may change its working folder
        self.deployer.kinds["python"] = _PythonStep("astera_lite_python:PYTHON")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # --- flows ---

    def deploy(self, name: str, tree: dict[str, Any]) -> Flow:
        """Deploy the content of a flow file; it replaces a flow of the same name. Raises FlowError."""
        deployer = self.deployer
        with deployer.changing:
            flow = deployer.build(tree, name)
            deployer.deployments = deployer.replaced(name, flow)
            deployer.own[name] = flow
        return flow

    def flow(
        self, route: str, *, name: str = "", processing: Sequence[str] = MODES, **options: Any
    ) -> Callable[[_Function], _Function]:
        """Publish a Python function as a flow: `@app.flow("GET /greet/{name}")`.

        The function gets a Context and, by name, the parameters of its signature: those named in the resource from the
        path, the rest from the query, typed by their annotation (str, int, float, bool, a list of these), optional if
        they have a default or may be None. But for GET, an argument `body` gets the JSON body. It returns a JSON value.
        `options` are members of a flow file: description, timeout, response, `parameters` to describe parameters
        further, `body` for a schema of the body. The flow's name is `name`, or the function's with - for _. Raises
        FlowError, also for an argument that no request could give.
        """
        if not isinstance(route, str):
            fault = 'has @app.flow without arguments: write the method and the resource, @app.flow("GET /name")'
            raise FlowError([Fault(getattr(route, "__name__", "flow"), "", fault)])
        modes = [processing] if isinstance(processing, str) else list(processing)

        def publish(function: _Function) -> _Function:
            tree = _function_flow(function, route, modes, options)
            self.deploy(name or getattr(function, "__name__", "").replace("_", "-"), tree)
            return function

        return publish

    def step(self, name: str) -> Callable[[_Function], _Function]:
        """Add a kind of step: `@app.step("greet")` above `def greet(context, name: str, times: int = 1)`.

        Flows then write `{"greet": {"name": "${params.name}"}}`: the function gets a Context and these arguments, each
        of which may be an expression, and returns a JSON value. Raises ConfigError for a name that is taken.
        """
        if not isinstance(name, str) or name in step_table(STEP_KINDS).members or not STEP_NAME.fullmatch(name):
            raise ConfigError([Fault("step", name, "is not a new word of letters, digits and _: choose another name")])

        def add(function: _Function) -> _Function:
            self.deployer.kinds[name] = _own_kind(function)
            if self.is_open:
                self.deployer.reload()  # a file may have waited for it
            return function

        return add

    def submit(
        self,
        flow: str,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
        *,
        callback_url: str | None = None,
        idempotency_key: str | None = None,
        base: str = "",
    ) -> Job:
        """Submit a job and return once it is on disk.

        `flow` is the name of a flow, `params` its parameters by name, `body` a JSON value (or bytes, as they are). The
        same `idempotency_key` again brings the same job. `base` begins the URLs in callbacks; the server's if left out.
        Raises NotFound, InputError, Conflict (the key had another input), Busy (the queue is full), StoreError.
        """
        target, request = self._request(flow, params, body)
        errors = InputErrors()
        for name, text in {"callback_url": callback_url, "idempotency_key": idempotency_key, "base": base}.items():
            if text is not None and not (isinstance(text, str) and re.fullmatch("[^\0\ud800-\udfff]*", text)):
                errors.add("argument", name, "must be text, without a NUL or half of a surrogate pair")
        errors.check()
        if callback_url is not None:
            check_callback(callback_url, self.policy, errors)
        job = self.new_job(target, base or self.base, ANYBODY.name, callback_url)
        ready = Prepared(job, target, target.bind(request, job.id, errors))

        def write(done: Done) -> None:
            self.accept(ready, request, idempotency_key, done)
            self.store.flush()

        return cast(Job, await_write(write))

    def run(self, flow: str, params: Mapping[str, Any] | None = None, body: Any = None) -> Result:
        """Run a flow on the calling thread and return its response; an error of the flow is a response, too.

        Raises NotFound, InputError, Busy, StoreError.
        """
        target, request = self._request(flow, params, body)
        given = target.bind(request, str(self.keys.new(self.clock.now())))
        return Result(self.runner(target).run_here(self.new_run(target, given)).answer)

    def status(self, job_id: str | Job) -> Job | None:
        """The present state of a job; None if the job is unknown or expired."""
        self.check_open()
        key = _key_of(job_id)
        found = self.find(key, ANYBODY) if key else None
        return found and found[0]

    def wait(self, job_id: str | Job, timeout: float | None = None) -> Job:
        """Wait until a job is finished, at most `timeout` seconds; return its state, which may still be Running.

        Raises NotFound, and StoreError if the application stops meanwhile.
        """
        key = _key_of(job_id) or self._job(job_id).key  # which raises NotFound
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            changed = threading.Event()
            self.watchers.add(key, changed.set)  # before the look: or a job that ends in between would not be seen
            try:
                job, left = self._job(job_id), deadline - time.monotonic()
                if job.status is not Status.RUNNING or not left > 0:
                    return job
                changed.wait(min(left, threading.TIMEOUT_MAX))
            finally:
                self.watchers.remove(key, changed.set)

    def future(self, job_id: str | Job) -> Future[Job]:
        """A future that gets the job when it is finished, or the error that `wait` raises; it holds no thread.

        In a coroutine: `job = await asyncio.wrap_future(app.future(job.id))`. The future is completed on a thread of
        its own, so what is added by add_done_callback may use the application.
        """
        return _future_of(self, _key_of(job_id), partial(self._job, job_id))

    def result(self, job_id: str | Job) -> Result:
        """The response of a finished job. Raises NotFound, and Conflict while it runs."""
        job = self._job(job_id)
        stored = self.engine.result(job.key)
        if stored is None:
            raise Conflict("The job is not finished.")
        answer = stored.answer
        if stored.in_pieces:
            answer = answer._replace(body=b"".join(self.store.result_pieces(job.key, 0, stored.size)))
        return Result(answer)

    def cancel(self, job_id: str | Job) -> bool:
        """Cancel a job; True if it ends now, False if it stops at its next step. Raises NotFound, Conflict."""
        job = self._job(job_id)
        check_unfinished(job)
        if not self.ask_cancel(job):
            return False
        after = self.wait(job_id, self.node and CANCEL_ELSEWHERE_S)
        check_unfinished(after, but="cancelled")
        return after.status is not Status.RUNNING

    def _job(self, job_id: str | Job) -> Job:
        job = self.status(job_id)
        if job is None:
            raise NotFound(f"there is no job {shown(job_id.id if isinstance(job_id, Job) else job_id)}")
        return job

    def _request(self, name: str, params: Mapping[str, Any] | None, body: Any) -> tuple[Flow, StoredRequest]:
        self.check_open()
        flow = self.deployments.by_name.get(name) if isinstance(name, str) else None
        if flow is None:
            raise NotFound(f"there is no flow {shown(name)}{suggest(str(name), self.deployments.by_name)}")
        if not isinstance(params, Mapping | None):
            raise InputError([{"in": "argument", "name": "params", "message": 'are given by name, as in {"n": 1}'}])
        return flow, request_for(flow, params or {}, body)
