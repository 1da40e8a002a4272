"""What a Python program that embeds the server calls: publish functions, submit jobs, wait for them, run flows.

A wing of astera_lite, which loads this file when a program asks for `astera_lite.AsteraLite`.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any, Self, TypeVar, cast

from astera_lite import (
    ANYBODY,
    CANCEL_ELSEWHERE_S,
    MODES,
    STEP_KINDS,
    STEP_NAME,
    STEP_OPTIONS,
    Answer,
    Application,
    Clock,
    ConfigError,
    Conflict,
    Done,
    Fault,
    Flow,
    InputError,
    Job,
    JobKey,
    NotFound,
    Prepared,
    Settings,
    Status,
    StoredRequest,
    StoreError,
    already_finished,
    await_write,
    check_callback,
    check_cancelled,
    path_values,
    request_for,
    shown,
    suggest,
    whole_body,
    wing,
)

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
        if settings is None:
            settings = Settings.load(**{"flows": "", **keywords})
        elif keywords:
            settings = Settings.load(**settings._asdict() | keywords)
        super().__init__(settings, clock, environ)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    # --- flows ---

    def deploy(self, name: str, tree: dict[str, Any]) -> Flow:
        """Deploy the content of a flow file; it replaces a flow of the same name. Raises FlowError."""
        return self.deployer.deploy(name, tree)

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
        decorate = wing("astera_lite_python:flow_decorator")
        return cast(Callable[[_Function], _Function], decorate(self, route, name, processing, options))

    def step(self, name: str) -> Callable[[_Function], _Function]:
        """Add a kind of step: `@app.step("greet")` above `def greet(context, name: str, times: int = 1)`.

        Flows then write `{"greet": {"name": "${params.name}"}}`: the function gets a Context and these arguments, each
        of which may be an expression, and returns a JSON value. Raises ConfigError for a name that is taken.
        """
        if name in STEP_KINDS or name in STEP_OPTIONS or not STEP_NAME.fullmatch(name):
            raise ConfigError([Fault("step", name, "is not a new word of letters, digits and _: choose another name")])

        def add(function: _Function) -> _Function:
            self.deployer.kinds[name] = wing("astera_lite_python:own_kind")(function)
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
        target, request, values = self._request(flow, params, body)
        if callback_url is not None:
            check_callback(callback_url, self.policy)
        if idempotency_key is not None and re.search("[\0\ud800-\udfff]", idempotency_key):
            message = "must not have a NUL or half of a surrogate pair"
            raise InputError([{"in": "argument", "name": "idempotency_key", "message": message}])
        job = self.jobs.new(target, base or self.base, ANYBODY.name, callback_url)
        ready = Prepared(job, target, target.bind(request, values, job.id))

        def write(done: Done) -> None:
            self.jobs.accept(ready, request, idempotency_key, done)
            self.store.flush()

        result = await_write(write)
        if isinstance(result, Conflict):
            raise result
        return result.job  # type: ignore[no-any-return]

    def run(self, flow: str, params: Mapping[str, Any] | None = None, body: Any = None) -> Result:
        """Run a flow on the calling thread and return its response; an error of the flow is a response, too.

        Raises NotFound, InputError, Busy, StoreError.
        """
        target, request, values = self._request(flow, params, body)
        given = target.bind(request, values, str(self.jobs.keys.new(self.clock.now())))
        return Result(self.runner(target).run_here(self.new_run(target, given)).answer)

    def status(self, job_id: str | Job) -> Job | None:
        """The present state of a job; None if the job is unknown or expired."""
        self.check_open()
        key = _key_of(job_id)
        found = self.jobs.find(key, ANYBODY) if key else None
        return found and found[0]

    def wait(self, job_id: str | Job, timeout: float | None = None) -> Job:
        """Wait until a job is finished, at most `timeout` seconds; return its state, which may still be Running.

        Raises NotFound, and StoreError if the application stops meanwhile.
        """
        future = self._future(job_id, lambda look: look())
        with contextlib.suppress(TimeoutError):
            return future.result(timeout)
        future.cancel()  # it watches no more
        return self._job(job_id)

    def future(self, job_id: str | Job) -> Future[Job]:
        """A future that gets the job when it is finished, or the error that `wait` raises; it holds no thread.

        In a coroutine: `job = await asyncio.wrap_future(app.future(job.id))`. The future is completed on a thread of
        its own, so what is added by add_done_callback may use the application.
        """

        def on_a_thread(look: Callable[[], None]) -> None:
            threading.Thread(target=look, name="astera-future", daemon=True).start()

        return self._future(job_id, on_a_thread)

    def _future(self, job_id: str | Job, call: Callable[[Callable[[], None]], None]) -> Future[Job]:
        """A future; when the job changes, on a thread of the store, `call` gets the function that completes it."""
        key, future = _key_of(job_id), Future[Job]()

        def look() -> None:
            if key is not None and not future.done():
                self.watchers.add(key, changed)  # before the look: or a job that ends in between would not be seen
            with contextlib.suppress(InvalidStateError):  # cancelled, or another thread has just seen the end, too
                try:
                    job = self._job(job_id)
                except (StoreError, NotFound) as error:
                    future.set_exception(error)
                else:
                    if job.status is not Status.RUNNING:
                        future.set_result(job)

        def changed() -> None:
            try:
                call(look)
            except RuntimeError:  # no thread can be had
                if self.is_open:
                    self.watchers.add(cast(JobKey, key), changed)  # the housekeeper tells again
                else:
                    look()

        look()
        if key is not None:
            future.add_done_callback(lambda _: self.watchers.remove(key, changed))
        return future

    def result(self, job_id: str | Job) -> Result:
        """The response of a finished job. Raises NotFound, and Conflict while it runs."""
        job = self._job(job_id)
        stored = self.store.result(job.key)
        if stored is None:
            raise Conflict("The job is not finished.")
        body = stored.body
        if body is None:
            body = b"".join(whole_body(self.store.result_pieces(job.key, stored.attempt), stored.size))
        return Result(Answer(stored.code, tuple(stored.headers), body))

    def cancel(self, job_id: str | Job) -> bool:
        """Cancel a job; True if it ends now, False if it stops at its next step. Raises NotFound, Conflict."""
        job = self._job(job_id)
        if job.status is not Status.RUNNING:
            raise already_finished(job)
        if not self.ask_cancel(job):
            return False
        after = self.wait(job_id, self.node and CANCEL_ELSEWHERE_S)
        if after.status is not Status.RUNNING:
            check_cancelled(after)
        return after.status is not Status.RUNNING

    def _job(self, job_id: str | Job) -> Job:
        job = self.status(job_id)
        if job is None:
            raise NotFound(f"there is no job {shown(job_id.id if isinstance(job_id, Job) else job_id)}")
        return job

    def _request(
        self, name: str, params: Mapping[str, Any] | None, body: Any
    ) -> tuple[Flow, StoredRequest, dict[str, str]]:
        self.check_open()
        flow = self.deployments.by_name.get(name)
        if flow is None:
            raise NotFound(f'there is no flow "{name}"{suggest(str(name), self.deployments.by_name)}')
        given = {name: value for name, value in (params or {}).items() if value is not None}
        request = request_for(flow, given, body)
        return flow, request, path_values(flow, request.path)
