"""Code of a flow's author: Python functions in files (the step `python`) and programs (the step `run`).

A wing of astera_lite, which loads this file when one of them is first wanted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import queue
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from astera_lite import (
    LENIENT_DECODER,
    Build,
    ExpressionError,
    Flag,
    ListOf,
    MapOf,
    Number,
    OneOf,
    Progress,
    Run,
    Runner,
    Scope,
    Size,
    StepError,
    StepKind,
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
    to_saved,
    wing,
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


class _FunctionName(Text):
    """The name of the function of a `python` step; compiles to the name and the function."""

    def read(self, build: Build, value: Any, place: str) -> tuple[str, Callable[..., Any]] | None:
        try:
            name = self.parse(value)
            return name, load_function(build.folder, name)
        except ValueError as error:
            build.fault(place, str(error))
            return None


def _misfit(name: str, function: Callable[..., Any], args: Mapping[str, Any]) -> str:
    """Why a function does not take a context and these arguments; "" if it does."""
    import inspect  # noqa: PLC0415 (not for the child processes, which start more often)

    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a decorator may add arguments
        signature.bind(None, **args)
    except ValueError:  # a function in C, which does not tell its arguments
        return ""
    except TypeError as error:
        call = ", ".join(["context", *(f"{arg}=…" for arg in args)])
        return f"the function {name}{signature} is called as {name}({call}): {error}"
    return ""


def _make_python(build: Build, given: dict[str, Any], place: str) -> Runner:
    """The runner that calls a function, in a separate process if it is to be isolated."""
    (name, function), args = given["call"], given["args"]
    if fault := _misfit(name.partition(":")[2], function, args):
        build.fault(f"{place}/call", fault)
    here: Runner = wing("astera_lite_embedding:runner_of")(build, function, args, f"{place}/call")
    return partial(_call_isolated, name, args) if given["isolate"] else here


_PYTHON = {
    "call": _FunctionName('a function such as "module:function"', r"(?a:[A-Za-z_][\w.]*:[A-Za-z_]\w*)", required=True),
    "args": MapOf(Value(), default={}),
    "isolate": Flag(default=False),
}
PYTHON = StepKind(Table(_PYTHON, short="call"), _make_python, "calls a Python function", effect=True, code=True)


def _call_isolated(name: str, args: Mapping[str, Template], run: Run, scope: Scope, path: str) -> Any:
    kept, folder = run.outside.kept, run.outside.folder
    processes = kept.get("isolated") or kept.setdefault("isolated", Isolated())
    context = wing("astera_lite_embedding:Context")(run, scope, path)
    task = {"function": name, "folder": folder, "args": evaluated(args, scope), "params": context.params}
    task |= {"request": context.request, "steps": context.steps, "secrets": context.secrets}
    return processes.call(run, task, path)


class Isolated:
    """Warm child processes for `python` steps with `isolate`, as many as there are cores."""

    def __init__(self) -> None:
        self._turns = threading.Semaphore(os.cpu_count() or 1)
        self._idle: list[Child] = []
        self._closed = False

    def call(self, run: Run, task: Mapping[str, Any], path: str) -> Any:
        """The value of a task's function; raises StepError if the function raised, or its process ended."""
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
        self._say({"progress": [int(done), int(total)]})

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
    as_json = wing("astera_lite_embedding:as_json")
    for line in sys.stdin.buffer:
        task = from_saved(line.decode())
        try:
            function = load_function(task["folder"], task["function"])
            value = function(_IsolatedContext(task, say), **task["args"])
            say({"value": as_json(value, task["function"])})
        except (Exception, SystemExit) as error:
            source = optional("astera_lite_advice:source_of", error)
            say({"error": named(error), "source": source})


_PIPE_BYTES = 1 << 16
_LAST_WORDS_S = 0.5  # time in which the last output of an ended program arrives
_STDERR_BYTES = 64 << 10


_children: set[Child] = set()  # those that may still run


def kill_children() -> None:
    """Kill every child process: the server ends without the threads that would do so."""
    for child in list(_children):
        child.kill()


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
        _children.add(self)

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
        _children.discard(self)
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
            tail = err.decode(errors="replace")[-2000:].strip()
            detail = f"the program ended with code {code}"
            raise StepError(500, detail, f"{arguments[0]}: {detail}{tail and f': {tail}'}", {"exit"})
        return {"code": code, "stdout": _read_output(out, output), "stderr": err.decode(errors="replace")}

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


def _read_output(data: bytes, output: str) -> Any:
    text = data.decode(errors="replace")
    if output != "json":
        return text.splitlines() if output == "lines" else text
    try:
        return from_json(data, LENIENT_DECODER)
    except ValueError as error:
        raise StepError(500, "its program did not write JSON", f"the output is not JSON: {error}", {"body"}) from None
