"""Astera Lite: publish small API flows over HTTP, synchronously or as jobs that are polled or called back.

The server is one module, with the standard library and SQLite. Run it (`python astera_lite.py --help`) or embed it:

    with AsteraLite(database="jobs.db") as app, Server(app) as server:
        print(server.url)

The rooms of the module, bottom up; each uses only what stands above it:

     1 Errors and tools    one root error, files shipped with the module, ids, times, JSON
     2 Settings            one named tuple: flags, environment, TOML keys and help follow from it
     3 Records             Job, Delivery, Answer, Outcome and the status document
     4 Expressions         `${...}` compiled to code objects that cannot reach Python's own objects
     5 Outbound            the one HTTP client: resolve, judge, connect to the judged address, deadline
     6 Flows               validation with places, STEP_KINDS, run_flow
     7 Store               the columns of a job, reads, shared commits; SqliteStore, whose methods are the contract
     8 Engine              the thread pool that runs jobs and synchronous flows
     9 Courier             one callback delivery: signature, outcome, next try
    10 Housekeeper         the background thread: purge, callbacks due, jobs due, changed flow files
    11 Service             Application: the server without HTTP; Deployer, the flows in service
    12 Access              tokens, Host and Origin rules
    13 Wire                bytes <-> requests and responses, strict, without sockets
    14 Routes              the ROUTES table and its functions
    15 Loop                Handler and Server: every socket, every deadline of a connection
    16 Command line        serve, signals, logging, main(); the arguments of a plain serve

Parts that a server needs only for some features are in wings, files beside this one. This file names a wing only as
text (`"astera_lite_tools:run_command"`) and loads it on first use. Without wings, this file and `schema.sql` are a
whole server. The docstring of each wing says what it holds.
"""

import sys

if sys.version_info < (needed := (3, 11)):  # Astera Lite needs Python 3.11 or later. 3.7 and older show this line
    this = f"this is {'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    raise (SystemExit if __name__ == "__main__" else ImportError)(f"Astera Lite needs Python 3.11 or later; {this}")

if __name__ == "__main__":
    import os

    sys.excepthook = lambda *error: None if error[0] is KeyboardInterrupt else sys.__excepthook__(*error)  # Ctrl-C
    __name__ = "astera_lite"  # plugins and wings import it by this name, and get this copy
    sys.modules[__name__] = sys.modules["__main__"]
    flags = sys.orig_argv[1 : -len(sys.argv)]  # of the interpreter
    if __file__.startswith("/proc/self/fd/"):  # the new interpreter, which the code below starts
        import gc

        gc.disable()  # objects of the start stay: `serve` enables it again
        os.close(int(__file__.rpartition("/")[2]))
        del sys.argv[0]
        __file__ = os.path.realpath(sys.argv[0])
        if not sys.flags.safe_path:
            sys.path[0] = os.path.dirname(__file__)
    elif (
        (sys.argv[1:] or ["serve"])[0].startswith(("serve", "-"))
        and hasattr(os, "memfd_create")
        and None not in (sys.stdin, sys.stdout, sys.stderr)  # the file would get the descriptor of a closed one
        and set("".join(flags)) <= set("-BEIPsSu")
    ):
        # Python keeps the syntax tree of a script (30 MB) until the script ends. So a server continues in a new
        # interpreter in the same process, which gets the compiled code of this file from a file in memory.
        import importlib.util
        import marshal

        try:
            path = f"/proc/self/fd/{os.memfd_create('astera_lite', 0)}"
            with open(path, "wb") as file:
                file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(sys._getframe().f_code))
            os.execv(sys.executable, [sys.executable, *flags, path, *sys.argv])  # noqa: S606 (as we were started)
        except OSError:
            pass  # this interpreter continues, and keeps the tree

import ast
import base64
import bisect
import codecs
import contextlib
import copy
import datetime
import errno
import gc
import hashlib
import heapq
import http.client
import io
import ipaddress
import itertools
import json
import keyword
import logging
import math
import operator
import os
import queue
import random
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import threading
import time
import types
import urllib.parse
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import formatdate
from enum import IntEnum, StrEnum, auto
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from http.server import ThreadingHTTPServer
from socketserver import BaseRequestHandler, TCPServer
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Self, TextIO, cast

if TYPE_CHECKING:
    import ssl
    import urllib.request

    from astera_lite_embedding import AsteraLite, Context, Result

__all__ = [
    "AsteraError",
    "AsteraLite",
    "Busy",
    "ConfigError",
    "Conflict",
    "Context",
    "Fault",
    "FlowError",
    "InputError",
    "Job",
    "NotFound",
    "Result",
    "Server",
    "Settings",
    "Status",
    "StoreError",
    "main",
]
__version__ = "1.1.0.dev0"

log = logging.getLogger("astera_lite")
_warnings_log = logging.getLogger("py.warnings")  # of logging.captureWarnings

# ======================================================================================================================
# 1 Errors and tools
# To add an error: a subclass with its HTTP status.
# ======================================================================================================================


Pairs = tuple[tuple[str, str], ...]  # headers


class Fault(NamedTuple):
    """One thing wrong with a setting, a flow file or a request."""

    where: str  # a file or a setting
    place: str  # a JSON Pointer or a line in that file; may be empty
    message: str  # the fault and the remedy

    def __str__(self) -> str:
        return ": ".join(part for part in self if part)


class AsteraError(Exception):
    """Root of every error that this module raises on purpose.

    Its response over HTTP has `status`, further `headers`, and further `members` of the problem document.
    """

    status: int = 500
    headers: Pairs = ()
    members: Mapping[str, Any] = types.MappingProxyType({})

    def __reduce__(self) -> Any:  # for worker processes: pickle would call the class with the message alone
        return partial(Exception.__new__, type(self)), self.args, vars(self)


class _FaultyError(AsteraError):
    """An error that lists every fault at once."""

    status = 400

    def __init__(self, faults: Sequence[Fault]) -> None:
        # file names and messages of other libraries may have characters that UTF-8 cannot encode
        self.faults = [Fault(*(str(part).encode(errors="replace").decode() for part in fault)) for fault in faults]
        super().__init__("\n".join(map(str, self.faults)))


class ConfigError(_FaultyError):
    """A setting cannot be used."""


class FlowError(_FaultyError):
    """A flow file cannot be deployed."""


class InputError(AsteraError):
    """A request's input was refused; `errors` are `{"in", "name", "message"}` objects, `status` is a 4xx code."""

    def __init__(self, errors: Sequence[dict[str, str]], detail: str = "", status: int = 400) -> None:
        self.errors, self.status = list(errors), status
        self.members = {"errors": self.errors}
        super().__init__(detail or "; ".join(f"{e['in']} {e['name']}".strip() + f": {e['message']}" for e in errors))


_MAX_ERRORS = 100  # in one response
MAX_NAME = 300  # characters of the name in an error


class InputErrors(list[dict[str, str]]):
    """The faults of a request so far, as in an InputError and in its problem document."""

    status = 400  # of the response

    def add(self, where: str, name: str, message: str, status: int = 400) -> None:
        """Add a fault; raises InputError with those so far if there are too many."""
        if len(self) == _MAX_ERRORS:
            message = "has more faults than are listed"
        name = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "…"
        self.append({"in": where, "name": name, "message": message})
        self.status = max(self.status, status)
        if len(self) > _MAX_ERRORS:
            self.check()

    def check(self) -> None:
        """Raise InputError if there are faults."""
        if self:
            raise InputError(self, status=self.status)


class NotFound(AsteraError):
    """No such resource, job or deployment."""

    status = 404


class Conflict(AsteraError):
    """The state does not allow this; `status` is 409, 412 for a precondition, 422 for a reused idempotency key."""

    def __init__(self, detail: str, status: int = 409) -> None:
        super().__init__(detail)
        self.status = status


class Busy(AsteraError):
    """The request is valid, but the server cannot accept it now; `retry_after` is in whole seconds."""

    def __init__(self, detail: str, retry_after: int, status: int = 503) -> None:
        super().__init__(detail)
        self.retry_after, self.status = retry_after, status
        self.headers = (("Retry-After", str(retry_after)),)


class StoreError(AsteraError):
    """The database cannot be used: it is locked by another server, full, read-only, damaged, or of a newer version."""

    status = 503
    headers = (("Retry-After", "5"),)


class DatabaseInUse(StoreError):
    """Another server has the database."""


class MissingFile(ConfigError):
    """A file that belongs beside the module is missing, cannot be read, or is of another version."""

    status = 501

    def __init__(self, file: str, what: str = "is missing: copy it beside astera_lite.py") -> None:
        super().__init__([Fault("", "", f"{file} {what}")])


_JUMP_MS = 2000  # a larger step of the system's clock is a jump, a smaller one a correction


class Clock:
    """Where time comes from; a test passes its own. Times are milliseconds since the epoch.

    Ages and deadlines use `now`, which counts elapsed time and ignores a jump of the system's clock: a Pi without a
    battery starts with a time in the past, and jumps years ahead once it has a network. People and other machines see
    `wall`, which is `now` plus `offset`.
    """

    offset = 0  # milliseconds from `now` to the system's clock, the sum of its jumps

    def __init__(self) -> None:
        self._zero_ns = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        """The server's own time."""
        return (time.monotonic_ns() + self._zero_ns) // 1_000_000

    def wall(self) -> int:
        """The system's time."""
        return time.time_ns() // 1_000_000

    monotonic = staticmethod(time.monotonic)  #: seconds of a clock that never goes back; for deadlines

    def forward(self, ms: int) -> None:
        """Move `now` ahead by so many milliseconds."""
        self._zero_ns += ms * 1_000_000

    def begin(self, seen: int) -> None:
        """Start at the system's time, or at `seen`, the last recorded moment, if the system's time is earlier."""
        behind = seen - self.wall()
        self.offset = -behind if behind > _JUMP_MS else 0
        self.forward(self.wall() - self.offset - self.now())

    def look(self) -> int:
        """Compare with the system's clock; return the milliseconds of its jump, 0 if it did not jump.

        A smaller step is a correction, and moves `now` as well.
        """
        step = self.wall() - self.now() - self.offset
        if abs(step) > _JUMP_MS:
            self.offset += step
            return step
        if abs(step) > 100:  # less is rounding
            self.forward(step)
        return 0


def read_text(path: str) -> str:
    """A file's text, without a byte order mark. Raises OSError, UnicodeDecodeError."""
    with open(path, encoding="utf-8-sig") as file:
        return file.read()


def named(error: BaseException) -> str:
    """The type and the text of an exception of somebody else's code, which need not have a text that can be sent."""
    try:
        text = f": {error}"
    except Exception:
        text = ""
    return type(error).__name__ + text.encode(errors="replace").decode()


def reason_of(error: Exception) -> str:
    """The system's reason, without the path, which the caller names anyway."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


SHIPPED = ("console.html", "openapi.json", "schema.sql", "schema_postgres.sql")  # files that the module needs beside it
_WINGS = (
    "admin advice database documents embedding nodes notices postgres python requests secrets steps tls tools zipapp"
)
#: The wings: files of the module that a server loads on first use.
WINGS = tuple(f"astera_lite_{name}.py" for name in _WINGS.split())
_names = (__file__, os.path.abspath(__file__), os.path.realpath(__file__))
#: The folder of this file, whatever the working folder: as given, since a zipapp knows its files so, or with links.
_HOME = [os.path.dirname(name) for name in _names if os.path.isabs(name)]
_loading = threading.RLock()  # held while a wing is loaded, so that no other thread finds it half loaded


def resource(name: str) -> bytes:
    """The bytes of a file of SHIPPED: beside the module, or in `astera_lite/` of a wheel. Raises ConfigError."""
    loader: Any = globals().get("__loader__")  # of a file or of a zipapp
    if loader is None:  # a profiler or a debugger has started the file
        import importlib.machinery  # noqa: PLC0415

        loader = importlib.machinery.SourceFileLoader(__name__, __file__)
    for path in (os.path.join(home, folder, name) for home in _HOME for folder in ("", "astera_lite")):
        try:
            return bytes(loader.get_data(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno:  # the error for a file that a zip does not have has none
                raise ConfigError([Fault(path, "", f"cannot be read: {reason_of(error)}")]) from None
    raise MissingFile(name)


def wing(name: str) -> Any:
    """The object that `module:name` names in a wing, loaded on first use from beside this file; raises MissingFile."""
    module, _, attribute = name.partition(":")
    with _loading:
        if module not in sys.modules:
            import importlib.util  # noqa: PLC0415 (only for wings)
            from importlib.machinery import PathFinder  # noqa: PLC0415

            spec = PathFinder.find_spec(module, _HOME)  # the import path need not have the folder (`python -I`, a link)
            if spec is None or spec.loader is None:
                raise MissingFile(f"{module}.py")
            made = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(made)
            except ImportError as error:  # the files were replaced while this one runs
                log.debug("%s", module, exc_info=True)
                raise MissingFile(f"{module}.py", "has another version: restart the server") from error
            except OSError as error:
                raise MissingFile(f"{module}.py", f"cannot be read: {reason_of(error)}") from error
            sys.modules[module] = made
        return getattr(sys.modules[module], attribute)


def optional(name: str, *arguments: Any) -> Any:
    """The result of a wing's function, or "" if the file of the wing is missing: for parts that can be left out."""
    try:
        return wing(name)(*arguments)
    except MissingFile:
        return ""


def late(name: str) -> Callable[..., Any]:
    """A function of a wing, for a table: the wing is loaded when the function is first called."""
    return lambda *arguments, **keywords: wing(name)(*arguments, **keywords)


if not TYPE_CHECKING:  # type checkers have the import at the top; from this they would conclude that every name exists
    #: What this module has for programs that embed the server, and the wing that has it.
    _EMBEDDING = dict.fromkeys(("AsteraLite", "Context", "Result"), "astera_lite_embedding")

    def __getattr__(name: str) -> Any:
        if name not in _EMBEDDING:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = wing(f"{_EMBEDDING[name]}:{name}")
        return globals()[name]

    def __dir__() -> Collection[str]:
        return globals().keys() | _EMBEDDING


def is_postgres(database: str) -> bool:
    """Whether the setting `database` is the address of a PostgreSQL database, not the path of a SQLite file."""
    return database.startswith(("postgresql://", "postgres://"))


def suggest(word: str, known: Iterable[str], faults: Collection[Any] = ()) -> str:
    """`; did you mean "x"?` if a known word is similar, else an empty string.

    To find one takes milliseconds: a request with many `faults` so far gets no more, or it would hold up the others.
    """
    words = list(known) if len(word) <= 100 and len(faults) < 3 else []  # a longer one is not a misspelling
    near = [each for each in words if each.lower() == word.lower()]
    if words and not near:
        import difflib  # noqa: PLC0415 (only for misspellings)

        near = difflib.get_close_matches(word, words, 1)
    return f'; did you mean "{near[0]}"?' if near else ""


_ID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


class JobKey(NamedTuple):
    """A job's id as the two integers that the store keeps (RFC 9562, version 7).

    `seq` is the 48 bits of time and the 12 bits that follow, used as a counter; `salt` is the 62 random bits.
    """

    seq: int
    salt: int

    @lru_cache(maxsize=1024)  # noqa: B019 (keys are small) a response about a job has its id several times
    def __str__(self) -> str:
        head, tail = f"{self.seq:015x}", f"{self.salt | 1 << 63:016x}"
        return f"{head[:8]}-{head[8:12]}-7{head[12:]}-{tail[:4]}-{tail[4:]}"

    @classmethod
    def parse(cls, text: str) -> "JobKey | None":
        """The key of a well-formed UUIDv7 in either case, else None."""
        if not _ID.fullmatch(text.lower()):
            return None
        digits = text.replace("-", "")
        return cls(int(digits[:12] + digits[13:16], 16), int(digits[16:], 16) & (1 << 62) - 1)


class JobKeys:
    """Makes keys that grow even when the clock does not; `last` is the greatest `seq` already stored.

    `seq % nodes` is `node`, so that two servers never make the same key. `nodes` is a power of 2 up to 64.
    """

    def __init__(self, last: int = 0, node: int = 0, nodes: int = 1) -> None:
        self.last, self._node, self._nodes = last - last % nodes + node, node, nodes
        self._salts: list[int] = []
        self._lock = threading.Lock()

    def new(self, now_ms: int) -> JobKey:
        """A key for a job created at `now_ms`."""
        with self._lock:
            if not self._salts:  # in advance: a system call for each key takes longer than all else here
                self._salts = [number >> 2 for number in memoryview(os.urandom(1024)).cast("Q")]
            self.last = max(self.last + self._nodes, (now_ms << 12) + self._node)
            return JobKey(self.last, self._salts.pop())


#: Upper bounds of the histogram of run times, in seconds.
RUN_TIMES = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0, 1800.0)


class Metrics:
    """Counts since the start; any thread may count.

    There is no lock: CPython does not switch threads within `counts[key] += 1`. On a build without the global lock, two
    simultaneous counts may be counted as one.
    """

    def __init__(self) -> None:
        self.accepted: dict[str, int] = defaultdict(int)  # jobs by flow
        self.ended: dict[tuple[str, str], int] = defaultdict(int)  # jobs by flow and end
        #: By flow: runs in each class of RUN_TIMES, then longer ones.
        self.runs: dict[str, list[int]] = defaultdict(lambda: [0] * (len(RUN_TIMES) + 1))
        self.run_seconds: dict[str, float] = defaultdict(float)  # by flow
        self.callbacks: dict[str, int] = defaultdict(int)  # attempts by outcome
        self.requests: dict[tuple[str, str, int], int] = defaultdict(int)  # by method, path of the route, and status
        self.connections: list[Collection[Any]] = []  # the open ones of each server

    def ran(self, flow: str, seconds: float) -> None:
        """Count a run, synchronous or of a job."""
        self.runs[flow][bisect.bisect_left(RUN_TIMES, seconds)] += 1
        self.run_seconds[flow] += seconds


@lru_cache(maxsize=64)  # a status document has four times, mostly within the same seconds
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def timestamp(ms: int | None, offset: int = 0) -> str | None:
    """A time plus a clock's offset (both in ms) as RFC 3339 in UTC with milliseconds; None for None."""
    if ms is None:
        return None
    seconds, rest = divmod(ms + offset, 1000)
    return f"{_second(seconds)}.{rest:03d}Z"


_SHOWN = json.JSONEncoder(ensure_ascii=False, default=lambda odd: f"<{type(odd).__name__}>")


def shown(value: Any, limit: int = 60) -> str:
    """A value as one short line of JSON for a message; control characters are escaped."""
    try:
        text = _SHOWN.encode(value)[: limit + 1]
    except (TypeError, ValueError, RecursionError):
        text = f"<{type(value).__name__}>"
    if not text.isprintable():
        text = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
    return text if len(text) <= limit else text[:limit] + "…"


_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, None: 1.0}
_BYTES = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "B": 1, None: 1}
_DURATION = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)(ms|s|m|h|d)?")


def parse_duration(value: Any) -> float:
    """Seconds from `250ms`, `30s`, `5m`, `24h`, `7d` or a number of seconds; ValueError says what to write."""
    seconds: float = value if isinstance(value, int | float) and not isinstance(value, bool) else -1.0
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        seconds = float(match[1]) * _SECONDS[match[2]]
    if not 0 <= seconds < 1e10:
        cure = "write 250ms, 30s, 5m, 24h or a number of seconds, at most 300 years"
        raise ValueError(f"{shown(value)} is not a duration: {cure}")
    return float(seconds)


def parse_size(value: Any) -> int:
    """Bytes from `64KiB`, `10MiB`, `1GiB` or a number of bytes; ValueError says what to write."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,15})(B|KiB|MiB|GiB)?", value)):
        return int(match[1]) * _BYTES[match[2]]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(f"{shown(value)} is not a size: write 64KiB, 10MiB, 1GiB or a number of bytes")


def show_duration(seconds: float) -> str:
    """A short spelling that `parse_duration` reads back."""
    unit = next((unit for unit in "hms" if seconds and seconds % _SECONDS[unit] == 0), "ms")
    return f"{seconds / _SECONDS[unit]:.10g}{unit}"


def show_size(size: int) -> str:
    """A short spelling that `parse_size` reads back."""
    unit = next((unit for unit in ("GiB", "MiB", "KiB") if size and size % _BYTES[unit] == 0), "")
    return f"{size // _BYTES[unit or None]}{unit}"


def log_message(record: logging.LogRecord) -> str:
    """The message of a log record; if the arguments do not fit the text, the text and the arguments."""
    try:
        return record.getMessage()
    except Exception:
        return f"cannot be formatted: {shown([record.msg, record.args], 500)}"


class Mask:
    """Replaces secrets by *** in all text that leaves the server (failures, traces, job details, the log).

    It lets text through until there is a secret: `astera_lite_secrets` then knows them, and does the work.
    """

    def __init__(self, secrets: Collection[str] = ()) -> None:
        self.known: Any = wing("astera_lite_secrets:Known")(secrets) if secrets else None

    @property
    def longest(self) -> int:
        """Bytes of the longest form of a secret: text is cut only after so much more of it was masked."""
        return self.known.longest if self.known else 0

    def __call__(self, text: str) -> str:
        """The text with every secret replaced."""
        return self.known.masked(text) if self.known else text

    def log_record(self, record: logging.LogRecord) -> bool:
        """Mask a record of the log, as its filter."""
        if self.known:
            self.known.mask_record(record)
        return True


def _not_json(value: Any) -> NoReturn:
    if isinstance(value, bytes):
        raise TypeError("bytes cannot be written as JSON: base64(…) makes text of them")
    raise TypeError(f"a value of type {type(value).__name__} cannot be written as JSON")


_encoder = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), check_circular=False, default=_not_json
)
#: JSONEncoder.encode makes this object for each value: to keep it saves a fifteenth of an accept.
_c_encoder: Any = (getattr(json.encoder, "c_make_encoder", None) or (lambda *given: None))(
    None, _not_json, json.encoder.encode_basestring, None, ":", ",", False, False, False
)
_TOO_DEEP_TO_WRITE = "the value is nested too deeply to be written as JSON"


def to_json(value: Any) -> str:
    """Compact JSON; ValueError or TypeError for what JSON cannot express (NaN, bytes, endless nesting)."""
    try:
        return "".join(_c_encoder(value, 0)) if _c_encoder else _encoder.encode(value)
    except RecursionError:
        raise ValueError(_TOO_DEEP_TO_WRITE) from None


def json_body(value: Any) -> bytes:
    """JSON as the bytes of a body, with a line feed at the end, so that a terminal's prompt is on its own line."""
    return to_json(value).encode() + b"\n"


MAX_WRITTEN = 256 << 20  # bytes of a flow's value as JSON


def _least_size(part: Any, sizes: dict[int, int]) -> int:
    """The least number of bytes of a list or an object as JSON; `sizes` keeps them by id, for parts that are shared."""
    if (total := sizes.get(id(part), 0)) == 0:
        total = 1
        for item in (*part, *part.values()) if type(part) is dict else part:
            kind = type(item)
            if kind is str or kind is bytes:
                total += len(item) + 3
            elif kind is dict or kind is list or kind is tuple:
                total += _least_size(item, sizes) + 1
            else:
                total += 2
        sizes[id(part)] = total
    return total


def check_written(value: Any, limit: int = MAX_WRITTEN) -> None:
    """Raise ValueError for a value that takes more than so many bytes as JSON.

    A value of a flow may hold one part many times: a few steps of `[x, x]` make a text that no memory can hold.
    """
    try:
        total = _least_size([value], {}) - 2  # without this list
    except RecursionError:
        raise ValueError(_TOO_DEEP_TO_WRITE) from None
    if total > limit:
        raise ValueError(f"the value is larger than {show_size(limit)}")


MAX_JSON_DEPTH = 100
MAX_JSON_CONTAINERS = 500_000  # lists and objects: each takes 30 times the memory of its two characters
_TOO_DEEP = f"it is nested deeper than {MAX_JSON_DEPTH} levels"
_SURROGATE = "[\ud800-\udfff]"  # compiled when it is used: few texts need it


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the member {shown(twice)} occurs twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {shown(text, 20)} is too large")
    return number


def _bounded_int(text: str) -> int:
    if len(text) > 400:
        raise ValueError("a number has more than 400 digits")
    return int(text)


INT64 = range(-(1 << 63), 1 << 63)


def _int64(text: str) -> int:
    """An integer that other programs (also SQLite) can hold."""
    if len(text) <= 20 and (number := int(text)) in INT64:
        return number
    raise ValueError(f"the number {shown(text)} is beyond 64 bits: write it as text")


_decoder = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_int64
)
LENIENT_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded_int)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, the names of members too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(name) if isinstance(name, str) else name: _mapped(item, change) for name, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, list | tuple) else value


def _check_depth(text: str, most: int) -> None:
    """Raise ValueError for too many lists and objects, or too many levels. The decoder finds what is malformed."""
    brackets = re.sub(r'"(?:[^"\\]|\\.)*+"|[^\[\]{}"]++', "", text).replace("{", "[").replace("}", "]")
    if brackets.count("[") > most:
        raise ValueError(f"it has more than {most:,} lists and objects")
    for _ in range(MAX_JSON_DEPTH):  # remove the innermost level: a loop over millions of brackets takes seconds
        outer = brackets.replace("[]", "")
        if len(outer) == len(brackets):
            return
        brackets = outer
    if "[]" in brackets:
        raise ValueError(_TOO_DEEP)


def pointer(name: str) -> str:
    """A member's name as a token of a JSON Pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def from_json(text: str | bytes, decoder: json.JSONDecoder = _decoder) -> Any:
    """The value of a JSON text (RFC 8259).

    ValueError (json.JSONDecodeError, with line and column, for the grammar) for invalid UTF-8, NaN, integers beyond 64
    bits, numbers beyond a double, nesting deeper than MAX_JSON_DEPTH, more than MAX_JSON_CONTAINERS, duplicate members
    and lone surrogates. With `LENIENT_DECODER`, for output of APIs and programs, integers may have 400 digits, the last
    of duplicate members counts, half a surrogate pair becomes U+FFFD, and a long text may have one container for each
    20 bytes.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"byte {error.start} is not valid UTF-8") from None
    text = text.removeprefix("\ufeff")  # RFC 8259, section 8.1
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH:
        _check_depth(text, MAX_JSON_CONTAINERS if decoder is _decoder else max(MAX_JSON_CONTAINERS, len(text) // 20))
    try:
        value = decoder.decode(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if ("\\ud" in text or "\\uD" in text) and re.search(_SURROGATE, json.dumps(value, ensure_ascii=False)):
        if decoder is _decoder:
            raise ValueError("a string has half of a surrogate pair")
        return _mapped(value, lambda text: re.sub(_SURROGATE, "\ufffd", text))
    return value


#: Reason phrases by status, from RFC 9110: older Python versions have older phrases for some.
PHRASES: dict[int, str] = dict(http.client.responses) | {
    413: "Content Too Large", 414: "URI Too Long", 416: "Range Not Satisfiable", 422: "Unprocessable Content",
}  # fmt: skip


def problem(status: int, detail: str = "", **members: Any) -> dict[str, Any]:
    """A problem document (RFC 9457) with `type`, `title`, `status`, `detail` and further members."""
    title = PHRASES.get(status, "Error")
    return {"type": "about:blank", "title": title, "status": status, "detail": detail or title} | members


# ======================================================================================================================
# 2 Settings
# To add a setting: a field of Settings, from which flag, environment variable, TOML key and --help follow; and a row in
# docs/settings.md and examples/settings.toml.
# ======================================================================================================================


def _parse_text(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"{shown(value)} is not text without NUL")
    return text


def _parse_host(value: Any) -> str:
    text = _parse_text(value)
    if not re.fullmatch(r"[0-9A-Za-z:%._-]{1,253}", text):
        raise ValueError(f"{shown(text)} is not a host name or an address: write 127.0.0.1, ::1, or 0.0.0.0 for all")
    return text


def _parse_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value):
        return int(value)
    raise ValueError(f"{shown(value)} is not a whole number")


_WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def _parse_bool(value: Any) -> bool:
    found = value if isinstance(value, bool) else _WORDS.get(value.lower()) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{shown(value)} is neither true nor false")
    return found


def _parse_durations(value: Any) -> tuple[float, ...]:
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError(f"{shown(value)} is not a list of durations: write 5s,5m,2h")
    return tuple(parse_duration(item.strip() if isinstance(item, str) else item) for item in items if item != "")


class _SettingKind(NamedTuple):
    metavar: str
    parse: Callable[[Any], Any] = _parse_text
    show: Callable[[Any], str] = str


def _one_of(*choices: str) -> _SettingKind:
    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{shown(value)} is not one of {', '.join(choices)}")
        return str(value)

    return _SettingKind("|".join(choices), parse)


SETTING_KINDS = {
    "bool": _SettingKind("true|false", _parse_bool, lambda value: "true" if value else "false"),
    "durability": _one_of("full", "normal"),
    "duration": _SettingKind("TIME", parse_duration, show_duration),
    "durations": _SettingKind("TIME,…", _parse_durations, lambda value: ",".join(map(show_duration, value))),
    "file": _SettingKind("FILE"),
    "folder": _SettingKind("FOLDER"),
    "host": _SettingKind("HOST", _parse_host),
    "int": _SettingKind("N", _parse_int),
    "list": _SettingKind("ITEM,…"),
    "log": _one_of("text", "json", "off"),
    "log_level": _one_of("debug", "info", "warning", "error"),
    "page_size": _one_of("1KiB", "4KiB", "16KiB"),
    "size": _SettingKind("SIZE", parse_size, show_size),
    "text": _SettingKind("TEXT"),
    "url": _SettingKind("URL"),
}


class _Setting(NamedTuple):
    """A field of Settings: its allowed values and its help text."""

    kind: str
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    secret: bool = False  # no flag: it would show in `ps`

    def show(self, value: Any) -> str:
        """A value as people write it."""
        return SETTING_KINDS[self.kind].show(value)

    def parse(self, value: Any) -> Any:
        """The value of a text or an object; ValueError says what is allowed."""
        if value is None and self.default is None:
            return None
        parsed = SETTING_KINDS[self.kind].parse(value)
        if self.secret and (not parsed or parsed != parsed.strip()):
            raise ValueError("is empty, or has blanks around it")
        if self.low is not None and parsed < self.low:
            raise ValueError(f"must be at least {self.show(self.low)}")
        if self.high is not None and parsed > self.high:
            raise ValueError(f"must be at most {self.show(self.high)}")
        return parsed


_setting: Any = _Setting  # Any, because the field of a setting has the type of the setting
_PREFIX = "ASTERA_LITE_"


def read_toml(path: str, faults: list[Fault]) -> dict[str, Any]:
    """The content of a TOML file; if it cannot be read, `faults` gets the fault, and the result is empty."""
    import tomllib  # noqa: PLC0415 (half of all starts have no TOML to read)

    try:
        return tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        faults.append(Fault(path, "", f"cannot be read: {reason_of(error)}"))
    except (ValueError, RecursionError) as error:  # also of a number that is too long, of lists that are too deep
        faults.append(Fault(path, "", f"is not TOML: {error}"))
    return {}


def _from_environment(environ: Mapping[str, str], known: Collection[str]) -> dict[str, str]:
    """The settings in the environment, without variables that container platforms set for a service of this name."""
    found = {}
    for key, text in environ.items():
        name = key.removeprefix(_PREFIX).lower()
        if not key.startswith(_PREFIX):
            continue
        if text.startswith("tcp://") or (name not in known and not suggest(name, known)):
            log.warning("%s is ignored: it is not a setting, or a container platform has set it", key)
        else:
            found[name] = text
    return found


class Settings(NamedTuple):
    """Every setting, by its one name. Durations are seconds, sizes are bytes, None means not set.

    The constructor takes parsed values; `Settings.load` reads a file, the environment, flags and spellings like "24h".
    """

    host: str = _setting("host", "127.0.0.1", "address to listen on")
    port: int = _setting("int", 9261, "port to listen on; 0 picks a free one", 0, 65535)
    flows: str = _setting("folder", "flows", "folder of flow files")
    database: str = _setting("file", "astera_lite.db", "path of the SQLite database, or postgresql://USER@HOST/NAME")
    node: str | None = _setting("text", None, "name of this server among those of one database, if not its host name")
    lease: float = _setting("duration", 15.0, "time until others take over a silent server's jobs, on PostgreSQL", 2)
    data: str = _setting("folder", "data", "folder that sql steps may reach")
    workers: int = _setting("int", 32, "threads that run jobs", 1, 1024)
    retention: float = _setting("duration", 86400.0, "how long a result is kept", 1)
    job_timeout: float = _setting("duration", 3600.0, "longest run of a job whose flow has no timeout", 0.001)
    sync_timeout: float = _setting("duration", 60.0, "longest synchronous run", 0.001)
    max_wait: float = _setting("duration", 60.0, "longest wait that a client may ask for (Prefer: wait=N)")
    max_queue: int = _setting("int", 100_000, "accepted jobs not yet started; a further job is refused (503)", 1)
    max_connections: int = _setting("int", 1000, "open connections; a further one replaces an idle one, or gets 503", 1)
    max_header: int = _setting("size", 64 << 10, "longest header block of a request (431)", 1024)
    max_url: int = _setting("size", 16 << 10, "longest URL of a request (414)", 256)
    max_body: int = _setting("size", 10 << 20, "longest body of a request (413)")
    max_result: int = _setting("size", 50 << 20, "longest body of a flow's response", 1024)
    max_step_response: int = _setting(
        "size", 50 << 20, "longest response that an http step reads; JSON takes up to twelve times the memory", 1024
    )
    request_timeout: float = _setting(
        "duration", 30.0, "time to send a request (408), and in which a response is read at 64 KiB/s or more", 0.1
    )
    idle_timeout: float = _setting("duration", 60.0, "time that an idle connection is kept open", 0.1)
    shutdown_timeout: float = _setting("duration", 30.0, "time that running jobs have to end when the server stops")
    callback_secret: str | None = _setting("text", None, "key that signs callbacks (whsec_…)", secret=True)
    callback_allow: str = _setting(
        "list",
        "auto",
        "private hosts and networks that callbacks may reach, or none, or auto: loopback, if the server listens on"
        " loopback only",
    )
    callback_timeout: float = _setting("duration", 15.0, "longest attempt to deliver a callback", 0.1)
    callback_retries: tuple[float, ...] = _setting(
        "durations", (5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0), "pauses between the attempts of a callback"
    )
    public_url: str | None = _setting("url", None, "base of all URLs in responses, for a server behind a proxy")
    insecure_open: bool = _setting("bool", False, "allow listening beyond loopback, or a public_url, without a token")
    cors_origins: str | None = _setting("list", None, "origins of web pages that may call")
    env_allow: str = _setting("list", "ASTERA_FLOW_*", "environment variables that flows may read")
    secrets: str | None = _setting("text", None, "secrets for flows: environment variables, or a TOML file of mode 600")
    token: str | None = _setting("text", None, "an admin token, for a small set-up", secret=True)
    tls_cert: str | None = _setting("file", None, "certificate chain (PEM) to serve https with")
    tls_key: str | None = _setting("file", None, "private key (PEM) of tls_cert, unless it is in the same file")
    durability: str = _setting("durability", "full", "full: accepted jobs survive a power cut; normal: only a crash")
    page_size: str = _setting(
        "page_size", "4KiB", "page size of a new database: 1KiB, 4KiB or 16KiB; 1KiB halves what small jobs write"
    )
    max_database: int | None = _setting("size", None, "database size at which new jobs are refused (503)", 1 << 20)
    log: str = _setting("log", "text", "form of the log on stderr: text, json, or off for none")
    log_level: str = _setting("log_level", "info", "lowest level logged: debug, info, warning or error")
    access_log: bool = _setting("bool", False, "log each request at level info instead of debug")

    @classmethod
    def load(
        cls,
        config: str | None = None,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, str] | None = None,
        **keywords: Any,
    ) -> "Settings":
        """Settings from a TOML file, the environment, flags and keywords; the later source wins.

        A value may be text ("24h") or parsed (86400). Raises ConfigError with every fault.
        """
        known: dict[str, _Setting] = cls._field_defaults
        values: dict[str, Any] = {}
        faults: list[Fault] = []
        sources: list[tuple[Mapping[str, Any], Callable[[str], tuple[str, str]]]] = [
            (read_toml(config, faults) if config is not None else {}, lambda name: (str(config), name)),
            (_from_environment(environ or {}, known), lambda name: (_PREFIX + name.upper(), "")),
            (flags or {}, lambda name: ("--" + name.replace("_", "-"), "")),
            (keywords, lambda name: (name, "")),
        ]
        for given, place_of in sources:
            for name, value in given.items():
                try:
                    if name not in known:
                        raise ValueError(f"is not a setting{suggest(name, known)}")
                    values[name] = known[name].parse(value)
                except ValueError as error:
                    faults.append(Fault(*place_of(name), str(error)))
        if faults:
            raise ConfigError(faults)
        return cls(**values)


SETTING_FIELDS: dict[str, _Setting] = Settings._field_defaults
Settings.__new__.__defaults__ = tuple(item.default for item in SETTING_FIELDS.values())


# ======================================================================================================================
# 3 Records
# To add a field of a job: a field of Job, and the column of that name (room 7).
# ======================================================================================================================


class Status(StrEnum):
    """The status of a job, as the status document has it."""

    RUNNING = "Running"
    COMPLETED = "Completed"
    ERROR = "Error"
    UNKNOWN = "Unknown"


class Token(NamedTuple):
    """A bearer token: `digest` is its SHA-256, empty once the token is revoked; `flows` are its flows, None for all.

    A revoked token stays on record: a server does not open when its last token is revoked, and no new token of the same
    name gets the jobs of the revoked one.
    """

    name: str
    digest: bytes
    role: str = "user"  # or admin: sees every job, and may deploy; a user sees the jobs of this token
    flows: frozenset[str] | None = None
    created: int = 0  # milliseconds since the epoch, by the system's clock

    @property
    def admin(self) -> bool:
        return self.role == "admin"

    def may_call(self, flow: str) -> bool:
        return self.flows is None or flow in self.flows


ANYBODY = Token("", b"", "admin")  # every caller of a server without tokens
NOBODY = Token("", b"", flows=frozenset())  # a caller without a token, on a route that needs none


class Answer(NamedTuple):
    """An HTTP response, from a flow or to an outgoing request: status code, pairs of headers in their order, body."""

    code: int
    headers: Pairs = ()
    body: bytes = b""


#: The header that a status requires (RFC 9110, section 15), and its default; None if a flow must give the value.
_OWED: dict[int, tuple[str, str | None]] = {
    401: ("WWW-Authenticate", "Bearer"),
    405: ("Allow", ""),  # RFC 9110, section 10.2.1: empty if no method is allowed
    407: ("Proxy-Authenticate", None),
    426: ("Upgrade", None),
    **dict.fromkeys((206, 416), ("Content-Range", None)),
    **dict.fromkeys((301, 302, 303, 307, 308), ("Location", None)),
}


def with_owed(status: int, headers: Pairs, method: str = "GET") -> Pairs:
    """The headers and the one that the status requires; ValueError if it is missing and has no default."""
    if status == 304 and method not in ("GET", "HEAD"):
        raise ValueError("status 304 is only for GET and HEAD")
    name, value = _OWED.get(status, ("", ""))
    if not name or any(name.lower() == given.lower() for given, _ in headers):
        return headers
    if value is None:
        cure = ", which flows cannot set: choose another status" if status in (407, 426) else ""
        raise ValueError(f"status {status} needs the header {name}{cure}")
    return (*headers, (name, value))


class Outcome(NamedTuple):
    """How a run ended. `error` is a problem document with a `code`; None if the flow gave a response."""

    answer: Answer
    error: dict[str, Any] | None = None
    reason: str = ""  # for the log only; clients do not see it

    @property
    def status(self) -> Status:
        return Status.COMPLETED if self.error is None else Status.ERROR

    @property
    def end(self) -> str:
        """`completed`, or the code of the error."""
        return "completed" if self.error is None else str(self.error["code"])

    @classmethod
    def failed(
        cls, code: str, status: int, detail: str, reason: str = "", headers: Pairs = (), **members: Any
    ) -> "Outcome":
        """An Error whose response is a problem document with this status and detail."""
        error = problem(status, detail, code=code, **members)
        headers = (("Content-Type", "application/problem+json"), *headers)
        with contextlib.suppress(ValueError):  # the `fails` of a flow's test have no headers
            headers = with_owed(status, headers)
        return cls(Answer(status, headers, json_body(error)), error, reason)


class Delivery(NamedTuple):
    """The callback of a job. Times are milliseconds since the epoch."""

    url: str
    state: str = "pending"
    attempts: int = 0
    last_status: int | None = None
    next_at: int | None = None
    body: str = ""
    tries: int = 0  # attempts since the last resend, which determine the next pause
    receiver: str = ""  # host:port; set when the callback is due, as is the next one
    trace: "Trace | None" = None


class Attempt(NamedTuple):
    """One attempt to deliver a callback; `status` is the receiver's, or None with an `error`."""

    at: int
    duration_ms: int
    status: int | None = None
    error: str | None = None


class Trace(NamedTuple):
    """The trace that a request is part of (W3C Trace Context)."""

    id: str  # 32 hexadecimal digits
    flags: int  # 1: the caller records the trace; 2: its id is random (Level 2); others are reserved, and not sent
    state: str = ""  # the header `tracestate`

    def headers(self) -> dict[str, str]:
        """Headers for a request that the server sends on behalf of this one: the same trace, and a new parent id."""
        parent = f"00-{self.id}-{os.urandom(8).hex()}-0{self.flags:d}"
        return {"traceparent": parent} | ({"tracestate": self.state} if self.state else {})


def about(what: str, its_id: str, flow: str, trace: Trace | None) -> dict[str, str]:
    """The `extra` of a log record about a job or a request."""
    return {what: its_id, "flow": flow} | ({"trace": trace.id} if trace else {})


class StoredRequest(NamedTuple):
    """A client's request as a job keeps it: all that is needed to bind it to the flow again."""

    method: str
    path: str  # raw, after the prefix: "/weather/Berlin"
    query: str = ""  # raw, without callbackUrl
    headers: dict[str, str] = {}  # noqa: RUF012 (never changed) declared headers and content type, in lower case
    body: bytes = b""
    trace: Trace | None = None


class Job(NamedTuple):
    """One asynchronous call. Times are milliseconds since the epoch."""

    key: JobKey
    flow: str
    version: int  # hash of the deployed flow, a key of the table `flows`
    status: Status
    created: int
    base: str  # base of the job's URLs, as the client addressed the server
    token: str = ""  # name of the client's token
    attempt: int = 0  # number of runs that have begun
    due: int | None = None  # the job waits until then
    started: int | None = None
    finished: int | None = None
    expires: int | None = None
    error: dict[str, Any] | None = None
    callback: Delivery | None = None

    @property
    def id(self) -> str:
        """The UUID that clients see."""
        return str(self.key)


class Progress(NamedTuple):
    """The progress of a run: its current step, steps done and steps in all."""

    step: str | None
    done: int
    total: int


def status_document(job: Job, base: str, progress: Progress | None = None, *, offset: int = 0) -> dict[str, Any]:
    """The status document of http-api.md; `base` is the base of its URLs, `offset` the clock's, in milliseconds."""
    url = f"{base}/api/jobs/{job.id}"
    finished = job.status is not Status.RUNNING
    callback = job.callback and {
        "url": job.callback.url,
        "state": job.callback.state,
        "attempts": job.callback.attempts,
        "lastStatus": job.callback.last_status,
        "nextAttemptAt": timestamp(job.callback.next_at, offset),
    }
    return {
        "id": job.id,
        "status": job.status,
        "flow": job.flow,
        "createdAt": timestamp(job.created, offset),
        "startedAt": timestamp(job.started, offset),
        "finishedAt": timestamp(job.finished, offset),
        "expiresAt": timestamp(job.expires, offset),
        "attempt": job.attempt,
        "progress": progress and {"step": progress.step, "done": progress.done, "total": progress.total},
        "statusUrl": f"{url}/status",
        "resultUrl": f"{url}/result" if finished else None,
        "error": job.error,
        "callback": callback,
    }


_SAMPLE = JobKey(0, int.from_bytes(os.urandom(8), "big") >> 2)  # random, so that no text of a client contains it


@lru_cache(maxsize=64)
def _accepted_template(flow: str, base: str) -> str:
    """The status document of an accepted job as JSON, with %s for its id, its time of creation, and its id again."""
    text = to_json(status_document(Job(_SAMPLE, flow, 0, Status.RUNNING, 0, base), base)) + "\n"
    return text.replace("%", "%%").replace(str(_SAMPLE), "%s").replace("1970-01-01T00:00:00.000Z", "%s", 1)


def status_body(job: Job, base: str, progress: Progress | None, offset: int) -> bytes:
    """The status document as JSON. That of an accepted job fills in a template: it saves a twentieth of an accept."""
    if job.status is Status.RUNNING and not (progress or job.started or job.callback or job.attempt):
        its_id = job.id
        return (_accepted_template(job.flow, base) % (its_id, timestamp(job.created, offset), its_id)).encode()
    return json_body(status_document(job, base, progress, offset=offset))


# ======================================================================================================================
# 4 Expressions
# To add a function: a row in FUNCTIONS. To add a method: a name in METHODS. Neither may mutate, call back or escape.
#
# Python's own parser reads an expression. Each node must belong to the language, and is rewritten so that no attribute
# is ever read: `a.b` becomes `a["b"]`, `a.f(x)` a call of a function of the table, a name an item of the scope. The
# result is plain bytecode over JSON values. A budget pays for loops, calls, comparisons and growth.
# ======================================================================================================================

MAX_EXPRESSION = 4000  # characters
MAX_NESTING = 60  # levels of syntax in one template
MAX_WORK = 10_000_000  # units for one evaluation: an item of a loop costs 1, four new characters 1, a call 8
MAX_INT_BITS = 4096
EXPRESSION_FILE = "<flow expression>"  # what tracebacks call it
_KINDS = {type(None): "null", bool: "a boolean", int: "an integer", float: "a number", str: "text", list: "a list"}
_KINDS |= {dict: "an object", tuple: "a list", bytes: "bytes"}


class ExpressionError(AsteraError):
    """An expression cannot be evaluated. The message names the place and the part of the expression."""


class BudgetExceeded(BaseException):
    """A run has spent the budget for the whole run. No flow can handle this, because the flow has not failed."""


def kind_of(value: Any) -> str:
    """The type of a value in the words of messages, such as "a list" or "an integer"."""
    return _KINDS.get(type(value), "a value")


def as_text(value: Any) -> str:
    """A value inside a text: text as it is, other values as JSON. Raises ValueError, TypeError."""
    if type(value) is str:
        return value
    if type(value) in (list, tuple, dict):
        check_written(value)
    return to_json(value)


def as_bytes(value: Any) -> bytes:
    """Bytes as they are, other values as their text in UTF-8."""
    return value if type(value) is bytes else as_text(value).encode()


BUDGET = ""  # the name of the budget for a whole run in a scope; no step can have this name


class Budget:
    """The units that may still be spent, and the operations that cost some; compiled expressions call the methods.

    Each evaluation has a budget; when nothing is left, an ExpressionError is raised. A run that must be short has one
    budget for all its evaluations (`whole_run`), and its end raises BudgetExceeded.
    """

    __slots__ = ("left", "units", "whole_run")

    def __init__(self, units: int, whole_run: bool = False) -> None:
        self.left, self.units, self.whole_run = units, units, whole_run

    def spend(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            if self.whole_run:
                raise BudgetExceeded
            raise ExpressionError(f"it does too much work (more than {MAX_WORK:,} units)")

    def flat(self, value: Any, units: int = 0) -> Any:
        """Pay for the size of a value, without its members, and `units` more; return the value."""
        if type(value) in (list, tuple, dict):
            units += len(value)
        elif type(value) in (str, bytes):
            units += len(value) >> 2
        elif type(value) is int and value.bit_length() > MAX_INT_BITS:
            raise ExpressionError("the number grows too large")
        self.spend(units)
        return value

    def deep(self, value: Any) -> Any:
        """Pay for a value and all that is in it, each part as often as it occurs; return the value."""
        todo, texts = [value], 0
        while todo:
            part = todo.pop()
            kind = type(part)
            if kind is str:
                texts += len(part) >> 4
            elif kind is list or kind is tuple or kind is dict:
                self.spend(8 * len(part))
                todo += part.values() if kind is dict else part
        self.spend(texts)
        return value

    def search(self, item: Any, values: Any) -> None:
        """Pay for the search for an item in a list, or for a text in a text: the latter is not always linear."""
        if type(item) is str:
            self.spend(len(item) * len(values) >> 6)
        elif type(item) in (list, tuple, dict):
            self.deep(values)

    def each(self, values: Any, price: int, pairs: bool) -> Any:
        """Pay for a loop; `pairs`: it binds several variables. Return the values."""
        if pairs and type(values) is dict:  # whose names might have as many letters as there are variables
            raise ExpressionError("an object is looped over by its names: write .items() for name and value")
        if type(values) not in (list, dict, tuple, str):
            raise ExpressionError(f"{kind_of(values)} cannot be looped over")
        self.spend(len(values) * price)
        return values

    def optional(self, values: Any, name: str) -> Any:
        """A member that the flow declares and that a request may omit: null if it is absent."""
        return values.get(name) if type(values) is dict else values[name]

    def slice(self, values: Any, low: Any, high: Any, step: Any) -> Any:
        if type(values) not in (list, tuple, str, bytes):
            raise ExpressionError(f"{kind_of(values)} cannot be sliced")
        return self.flat(values[low:high:step])

    def contains(self, item: Any, values: Any) -> bool:
        if type(values) is dict:
            return self.deep(item) in values
        if type(values) not in (list, tuple, str):
            raise ExpressionError(f"{kind_of(values)} has no items")
        self.spend(len(values))
        self.search(item, values)
        return item in values

    def join(self, parts: tuple[Any, ...]) -> str:
        self.deep(parts)
        text = "".join(map(as_text, parts))
        self.spend(8 + (len(text) >> 2))
        return text

    def add(self, a: Any, b: Any) -> Any:
        self.spend(2)
        return self.flat(a + b)

    def multiply(self, a: Any, b: Any) -> Any:
        self.spend(4)
        for sized, times in ((a, b), (b, a)):
            if type(sized) in (str, list, tuple, bytes) and type(times) is int:
                self.spend(len(sized) * max(times, 0))
                return a * b
        return self.flat(a * b)

    def power(self, a: Any, b: Any) -> Any:
        self.spend(8)
        if type(a) is int and type(b) is int and a.bit_length() * abs(b) > MAX_INT_BITS:
            raise ExpressionError("the number grows too large")
        result = a**b
        if type(result) is complex:
            raise ExpressionError("the root of a negative number is not a number")
        return result

    def modulo(self, a: Any, b: Any) -> Any:
        if type(a) in (str, bytes):
            raise ExpressionError("% does not format text: write ${…} inside the text")
        self.spend(2)
        return a % b


def _number(kind: Callable[[Any], Any], spelling: str, words: str, value: Any) -> Any:
    if type(value) not in (int, float, bool, str):
        raise ExpressionError(f"{kind_of(value)} is not a number")
    if type(value) is str and not re.fullmatch(spelling, value, re.ASCII):
        raise ExpressionError(f"{shown(value)} is not {words}")
    return kind(value)


def _round(value: Any, digits: int = 0) -> Any:
    if not -400 < digits < 400:
        raise ExpressionError("round() takes fewer than 400 digits")
    return round(value, digits) if digits else round(value)


def _sum(values: Any, start: int | float = 0) -> Any:
    return math.fsum(values) + start if any(type(v) is float for v in values) else sum(values, start + 0)


def _extreme(choose: Callable[..., Any], *values: Any, default: Any = None) -> Any:
    return choose(values[0] if len(values) == 1 else values, default=default)


def encode_query(values: Any, quote: Callable[..., str] = urllib.parse.quote_plus) -> str:
    """An object as a query or a form: lists repeat the name, null is left out. Raises ExpressionError."""
    if type(values) is not dict:
        raise ExpressionError("query and form are objects")
    pairs = []
    for name, value in values.items():
        items = value if type(value) in (list, tuple) else [value]
        pairs += [(name, as_text(item)) for item in items if item is not None]
    return urllib.parse.urlencode(pairs, quote_via=quote)


def _now() -> str:
    return str(timestamp(time.time_ns() // 1_000_000))


def _whole(*args: Any, **named: Any) -> Iterable[Any]:
    return (*args, *named.values())


class Function(NamedTuple):
    """A function of the language."""

    signature: str  # Python syntax: Python binds the arguments; messages and docs/flows.md show it
    call: Callable[..., Any] | str  # or its name in a wing, which an expression with the function loads
    #: What it reads in depth; None: a call is free.
    reads: Callable[..., Iterable[Any]] | str | None = lambda *_, **__: ()


_DIGITS, _DECIMALS = r"\s*-?[0-9]{1,400}", r"(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,3})?\s*"
FUNCTIONS = {
    row.signature.partition("(")[0]: row
    for row in (
        Function("len(value, /)", len, None),
        Function("abs(value, /)", abs, None),
        Function("round(value, digits=0)", _round, None),
        Function("bool(value=null, /)", bool, None),
        Function("now()", _now, None),
        Function("today()", lambda: _now()[:10], None),
        Function("uuid()", lambda: str(JobKeys().new(time.time_ns() // 1_000_000)), None),
        Function("int(value)", partial(_number, int, _DIGITS + r"\s*", "a whole number")),
        Function("float(value)", partial(_number, float, _DIGITS + _DECIMALS, "a number")),
        Function("min(*values, default=null)", partial(_extreme, min), _whole),
        Function("max(*values, default=null)", partial(_extreme, max), _whole),
        Function("sum(values, start=0)", _sum),
        Function(
            "sorted(values, reverse=false)", lambda values, reverse=False: sorted(values, reverse=reverse), _whole
        ),
        Function("reversed(values)", lambda values: list(values)[::-1]),
        Function("any(values, /)", any),
        Function("all(values, /)", all),
        Function("zip(*lists)", lambda *lists: list(map(list, zip(*lists, strict=False)))),
        Function("enumerate(values, start=0)", lambda values, start=0: list(map(list, enumerate(values, start)))),
        Function("range(start, stop=null, step=1)", "astera_lite_steps:numbers"),
        Function("str(value)", as_text, _whole),
        Function("list(values=[])", lambda values=(): list(values)),
        Function("json(value)", to_json, _whole),
        Function("parse_json(text)", "astera_lite_steps:parse_json"),
        Function("base64(value)", lambda value: base64.b64encode(as_bytes(value)).decode(), _whole),
        Function("sha256(value)", lambda value: hashlib.sha256(as_bytes(value)).hexdigest(), _whole),
        Function("urlencode(value)", "astera_lite_steps:urlencode", _whole),
        Function("sort_by(rows, *fields)", "astera_lite_steps:sort_by", "astera_lite_steps:field_values"),
        Function("group_by(rows, name)", "astera_lite_steps:group_by", "astera_lite_steps:field_values"),
        Function("index_by(rows, name)", "astera_lite_steps:index_by", "astera_lite_steps:field_values"),
        Function("unique(values)", "astera_lite_steps:unique", _whole),
        Function("merge(*objects)", "astera_lite_steps:merge", lambda *objects: map(list, objects)),
    )
}
#: Functions whose results differ each time. Results are saved with the job, so that a resumed run sees the same.
VOLATILE = frozenset({"now", "today", "uuid"})


def _check_length(length: int) -> None:
    if length > MAX_WORK:
        raise ExpressionError("the text grows too long")


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    times = text.count(old) if count < 0 else min(count, text.count(old))
    _check_length(times * len(new))
    return text.replace(old, new, count)


def _join(text: str, values: Any) -> str:
    for at, value in enumerate(values):
        if type(value) is not str:
            raise ExpressionError(f"item {at} is {kind_of(value)}, not text: join([str(x) for x in …])")
    _check_length(sum(map(len, values)) + len(text) * len(values))
    return text.join(values)


_TEXT_METHODS = (
    "upper lower title capitalize casefold strip lstrip rstrip split rsplit splitlines partition rpartition startswith "
    "endswith find rfind index count removeprefix removesuffix isdigit isalpha isalnum isspace islower isupper "
    "ljust rjust center"
)
#: Methods of the language, by the type of their value and by name.
METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {name: getattr(str, name) for name in _TEXT_METHODS.split()} | {"join": _join, "replace": _replace},
    list: {"index": list.index, "count": list.count},
    dict: {
        "get": dict.get,
        "keys": list,
        "values": lambda value: list(value.values()),
        "items": lambda value: list(map(list, value.items())),
    },
}
_METHOD_NAMES = frozenset(name for methods in METHODS.values() for name in methods)


def _paid_function(function: Function) -> Callable[..., Any]:
    call: Any = wing(function.call) if isinstance(function.call, str) else function.call
    reads: Any = wing(function.reads) if isinstance(function.reads, str) else function.reads
    if reads is None:
        return lambda budget, *args, **named: call(*args, **named)

    def paid(budget: Budget, *args: Any, **named: Any) -> Any:
        budget.spend(8)
        for value in (*args, *named.values()):
            budget.flat(value)
        budget.deep([*reads(*args, **named)])
        return budget.flat(call(*args, **named))

    return paid


def _paid_method(name: str) -> Callable[..., Any]:
    by_type = {kind: methods[name] for kind, methods in METHODS.items() if name in methods}
    linear = name in ("join", "startswith", "endswith", "removeprefix", "removesuffix")
    wide = name in ("ljust", "rjust", "center")

    def paid(budget: Budget, value: Any, *args: Any, **named: Any) -> Any:
        method = by_type.get(type(value))
        if method is None:
            raise ExpressionError(f"{kind_of(value)} has no .{name}()")
        if name == "get":
            budget.deep(args[0] if args else None)
            return method(value, *args, **named)
        budget.flat(value, 8)
        for part in (*args, *named.values()):
            budget.flat(part, max(part, 0) >> 2 if wide and type(part) is int else 0)
        for item in () if linear else (*args[:1], *named.values()):
            budget.search(item, value)
        result = method(value, *args, **named)
        return budget.flat(list(result) if type(result) is tuple else result)

    return paid


#: What the code of expressions can name: the functions and methods that some expression calls.
_GLOBALS: dict[str, Any] = {"__builtins__": {}}
_JSON_NAMES = {"true": True, "false": False, "null": None}
_SAME = {ast.Is: ast.Eq(), ast.IsNot: ast.NotEq()}  # equal numbers may be different objects
_PAID_OPERATORS = {ast.Add: "add", ast.Mult: "multiply", ast.Mod: "modulo", ast.Pow: "power"}
#: Nodes that stay as they are, except for the nodes inside them.
_PLAIN_NODES = frozenset("Load List Tuple IfExp BoolOp And Or UnaryOp Not UAdd USub".split())
QUOTED = r"""'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+\""""
_MARK = re.compile(r"\$\$\{|\$\{")
_OTHER_MARK = re.compile(r"(?<!\$)(?:\{\{?|\$\(|#\{|<%=?)\s*+(([A-Za-z]\w*+)[.\[])")  # of other languages
_BRACKET = re.compile(QUOTED + r"|[\[({]|[\])}]")


def _closing_brace(text: str, at: int) -> int:
    depth = 0
    for token in _BRACKET.finditer(text, at):
        if token[0] == "}" and depth == 0:
            return token.start()
        depth += (token[0] in "[({") - (token[0] in "])}")
        if depth < 0:
            break
    raise ValueError("the ${ is never closed by a } (a literal ${ is written $${)")


def split_template(text: str) -> list[tuple[bool, str]]:
    """The parts of a text: (False, literal) or (True, source of an expression). ValueError if a `${` is not closed."""
    parts: list[tuple[bool, str]] = []
    literal, at = "", 0
    while match := _MARK.search(text, at):
        literal += text[at : match.start()]
        if match[0] == "$${":
            literal, at = literal + "${", match.end()
            continue
        end = _closing_brace(text, match.end())
        parts += [(False, literal), (True, re.sub("[\r\n]", " ", text[match.end() : end]))]
        literal, at = "", end + 1
    parts.append((False, literal + text[at:]))
    return [part for part in parts if part[1] or part[0]]


def _check_arguments(name: str, count: int, words: list[str]) -> None:
    signature = FUNCTIONS[name].signature
    try:  # Python itself binds the arguments, to a function that does nothing
        nothing = eval(f"lambda {signature[len(name) + 1 : -1]}: None", dict(_JSON_NAMES))  # noqa: S307
        nothing(*[None] * count, **dict.fromkeys(words))
    except TypeError:
        raise ValueError(f"{name}() is called as {signature.replace(', /', '')}") from None


class Compiler(ast.NodeTransformer):
    """Compiles a JSON tree to one syntax tree. The line number of a node is the number of its expression.

    `names` are the names of the scope, each with its schema, or None if its value is not declared. Optional members of
    a declared value are null if they are absent. `hints` are messages for names that are not in the scope.
    `fault(place, message)` gets each fault, and the tree has null in its place.
    """

    def __init__(self, names: Mapping[str, Any], hints: Mapping[str, str], fault: Callable[[str, str], None]) -> None:
        self.names, self.hints, self.fault = names, hints, fault
        self.bound: dict[str, Any] = {}  # the variables of the comprehensions around, with their schemas
        self.depth = 0
        self.sources: list[tuple[str, str]] = []  # (place, expression) by line
        self.used: set[str] = set()
        self.volatile = False
        self.schema: Any = None  # of the last expression

    def tree(self, value: Any, place: str, depth: int = 0) -> ast.expr:
        if depth > MAX_NESTING:
            self.fault(place, f"is nested deeper than {MAX_NESTING} levels")
            return ast.Constant(None)
        if isinstance(value, str):
            return self.text(value, place)
        if isinstance(value, dict):
            items = [self.tree(item, f"{place}/{pointer(key)}", depth + 1) for key, item in value.items()]
            return ast.Dict([ast.Constant(key) for key in value], items)
        if isinstance(value, list):
            items = [self.tree(item, f"{place}/{at}", depth + 1) for at, item in enumerate(value)]
            return ast.List(items, ast.Load())
        return ast.Constant(value)

    def text(self, text: str, place: str) -> ast.expr:
        try:
            parts = split_template(text) if "${" in text else [(False, text)]
            for match in itertools.chain(*(_OTHER_MARK.finditer(part) for is_code, part in parts if not is_code)):
                if match[2] in self.names:
                    cure = f"write ${{{match[1]}…}}, or ${{'{match[0][0]}'}} for the mark itself"
                    raise ValueError(f"{match[0]}… stays as it is: {cure}")
        except ValueError as error:
            self.fault(place, str(error))
            return ast.Constant(None)
        nodes = [self.expression(part.strip(), place) if is_code else ast.Constant(part) for is_code, part in parts]
        return nodes[0] if len(nodes) == 1 else self.paid("join", ast.Tuple(nodes, ast.Load()))

    def expression(self, source: str, place: str) -> ast.expr:
        self.sources.append((place, source))
        self.bound, self.depth = {}, 0
        try:
            if not source:
                raise ValueError("there is nothing inside ${}")
            if len(source) > MAX_EXPRESSION:
                raise ValueError(f"it is longer than {MAX_EXPRESSION} characters: split it over several steps")
            node = ast.parse(f"({source})", mode="eval").body
            self.schema = self.declared(node)
            checked: ast.expr = self.visit(node)
            return checked
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            message = str(error) or "it is nested too deeply"
            if isinstance(error, SyntaxError):
                message = optional("astera_lite_advice:on_syntax", source) or error.msg
            self.fault(place, f"${{{source[:120]}}}: {message}")
            return ast.Constant(None)

    def visit(self, node: ast.AST) -> Any:
        name = type(node).__name__
        if name not in _PLAIN_NODES and not hasattr(self, f"visit_{name}"):
            words = optional("astera_lite_advice:on_word", name)
            raise ValueError(words or f"{name} is not part of the language")
        levels = 3 if hasattr(node, "generators") else 1  # Python 3.12 crashes at 21 comprehensions inside one another
        self.depth += levels
        if self.depth > MAX_NESTING:
            raise ValueError(f"it is nested deeper than {MAX_NESTING} levels: split it over several steps")
        if isinstance(node, ast.expr):
            node.lineno = node.end_lineno = len(self.sources)
        result = ast.copy_location(super().visit(node), node)
        self.depth -= levels
        return result

    def paid(self, operation: str, *args: ast.expr) -> ast.expr:
        return ast.Call(ast.Attribute(ast.Name("_b", ast.Load()), operation, ast.Load()), list(args), [])

    def key(self, node: ast.expr) -> ast.expr:
        key: ast.expr = self.visit(node)
        return key if isinstance(key, ast.Constant) else self.paid("deep", key)

    def declared(self, node: ast.expr) -> Any:
        """The schema of the value that an expression reads, or None if the flow declares none."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id, self.names.get(node.id))
        if not isinstance(node, ast.Attribute | ast.Subscript) or (schema := self.declared(node.value)) is None:
            return None
        name = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", None)
        return schema.properties.get(name) if isinstance(name, str) else schema.items

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        if node.value is not None and type(node.value) not in (bool, int, float, str):
            raise ValueError(f"a literal of type {type(node.value).__name__} is not part of the language")
        if type(node.value) is int and node.value.bit_length() > MAX_INT_BITS:
            raise ValueError("the number is too large")
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if name in self.bound:
            return node
        if name in self.names:
            self.used.add(name)
            return ast.Subscript(ast.Name("_s", ast.Load()), ast.Constant(name), ast.Load())
        if name in _JSON_NAMES:
            return ast.Constant(_JSON_NAMES[name])
        if name in self.hints:
            raise ValueError(self.hints[name])
        words = optional("astera_lite_advice:on_name", name, self.names)
        if name in FUNCTIONS:
            raise ValueError(f"{name} is a function: write {name}(…){words}")
        words = words or suggest(name, [*self.names, *FUNCTIONS, *self.bound])
        raise ValueError(f'there is nothing named "{name}"{words}')

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        return self.visit_Subscript(ast.Subscript(node.value, ast.Constant(node.attr), ast.Load()))

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        schema, name = self.declared(node.value), getattr(node.slice, "value", None)  # of a constant
        if isinstance(name, str) and schema and schema.additional is False and name not in schema.properties:
            cure = suggest(name, schema.properties) or f" (known: {', '.join(schema.properties) or 'none'})"
            raise ValueError(f'there is no "{ast.unparse(node.value)}.{name}"{cure}')
        value = self.visit(node.value)
        if isinstance(node.slice, ast.Slice):
            ends = (node.slice.lower, node.slice.upper, node.slice.step)
            return self.paid("slice", value, *(self.visit(end) if end else ast.Constant(None) for end in ends))
        index = self.key(node.slice)
        if isinstance(name, str) and schema and name in schema.properties and name not in schema.required:
            return self.paid("optional", value, index)
        return ast.Subscript(value, index, ast.Load())

    def visit_Call(self, node: ast.Call) -> ast.expr:
        table: Collection[str]
        args = [self.visit(arg) for arg in node.args]
        for word in node.keywords:
            if word.arg is None or word.arg.startswith("_"):
                raise ValueError("an argument is either a value or name=value")
            word.value = self.visit(word.value)
        if isinstance(node.func, ast.Attribute):
            name, target, table = node.func.attr, f"_m_{node.func.attr}", _METHOD_NAMES
            shape = f"method .{name}()"
            args.insert(0, self.visit(node.func.value))
        elif isinstance(node.func, ast.Name):
            name, target, table = node.func.id, f"_f_{node.func.id}", FUNCTIONS.keys() - {*self.bound, *self.names}
            shape = f"function {name}()"
        else:
            raise ValueError("only functions and methods can be called, by their names")
        if name not in table:
            words = optional("astera_lite_advice:on_word", name)
            raise ValueError(f"there is no {shape}" + (f": write {words}" if words else suggest(name, table)))
        if table is _METHOD_NAMES:
            _GLOBALS.setdefault(target, _paid_method(name))
        else:
            self.volatile = self.volatile or name in VOLATILE
            _check_arguments(name, len(args), [word.arg or "" for word in node.keywords])
            _GLOBALS.setdefault(target, _paid_function(FUNCTIONS[name]))
        return ast.Call(ast.Name(target, ast.Load()), [ast.Name("_b", ast.Load()), *args], node.keywords)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        paid = _PAID_OPERATORS.get(type(node.op))
        if paid is None and not isinstance(node.op, ast.Sub | ast.Div | ast.FloorDiv):
            self.visit(node.op)  # raises ValueError
        constants = [type(side.value) for side in (left, right) if isinstance(side, ast.Constant)]
        if paid is None or (paid == "add" and (int in constants or float in constants)):  # a few more bits at most
            return ast.BinOp(left, node.op, right)
        return self.paid(paid, left, right)

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        left, *others = [self.visit(side) for side in (node.left, *node.comparators)]
        if any(isinstance(operation, ast.In | ast.NotIn) for operation in node.ops):
            if len(node.ops) > 1:
                raise ValueError("`in` cannot be chained with another comparison: join them with `and`")
            inside = self.paid("contains", left, others[0])
            return inside if isinstance(node.ops[0], ast.In) else ast.UnaryOp(ast.Not(), inside)
        if len(others) > 1 or not any(isinstance(side, ast.Constant) for side in (left, *others)):
            left, *others = [self.paid("deep", side) for side in (left, *others)]
        return ast.Compare(left, [_SAME.get(type(operation), operation) for operation in node.ops], others)

    def visit_Dict(self, node: ast.Dict) -> ast.expr:
        if None in node.keys:
            raise ValueError("there is no `**`: use merge(a, b)")
        return ast.Dict([self.key(key) for key in node.keys if key], [self.visit(value) for value in node.values])

    def visit_ListComp(self, node: ast.ListComp | ast.GeneratorExp | ast.DictComp) -> ast.expr:
        """A comprehension; its innermost loop pays for the lists and objects that each turn makes."""
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        made = [type(part) for each in parts for part in ast.walk(each)]
        price = 1 + 10 * (len(parts) - 1) + 8 * made.count(ast.List) + 16 * made.count(ast.Dict)
        outer = self.bound
        for loop in node.generators:
            self.loop(loop, price if loop is node.generators[-1] else 1)
        if isinstance(node, ast.DictComp):
            result: ast.expr = ast.DictComp(self.key(node.key), self.visit(node.value), node.generators)
        else:  # also for a generator, which would keep a frame
            result = ast.ListComp(self.visit(node.elt), node.generators)
        self.bound = outer
        return result

    visit_GeneratorExp = visit_DictComp = visit_ListComp  # noqa: N815

    def loop(self, loop: ast.comprehension, price: int) -> None:
        """Check a `for … in … if …`, and bind its variables."""
        if loop.is_async:
            raise ValueError("there is no async")
        pairs = isinstance(loop.target, ast.Tuple)
        targets = loop.target.elts if isinstance(loop.target, ast.Tuple) else [loop.target]
        for part in (loop.target, *targets):
            part.lineno = part.end_lineno = len(self.sources)
        names = [part.id for part in targets if isinstance(part, ast.Name) and not part.id.startswith("_")]
        if len(names) < len(targets):
            raise ValueError("a loop binds plain names that do not begin with an underscore")
        schema = None if pairs else self.declared(loop.iter)
        values = self.paid("each", self.visit(loop.iter), ast.Constant(price), ast.Constant(pairs))
        loop.iter = ast.copy_location(values, loop.iter)
        self.bound = self.bound | dict.fromkeys(names, schema and schema.items)
        loop.ifs = [self.visit(condition) for condition in loop.ifs]


class Template:
    """A compiled JSON tree with `${…}` in its strings. A call with a scope returns the value.

    `constant`: without expressions. `volatile`: the value may differ each time. `names`: those that it reads in a
    scope. `schema`: of the value, or None if the flow declares none.
    """

    __slots__ = ("_run", "_sources", "constant", "names", "schema", "volatile")

    def __init__(self, value: Any, place: str, compiler: Compiler) -> None:
        body = compiler.tree(value, place)
        arguments = ast.arguments([], [ast.arg("_s"), ast.arg("_b")], None, [], [], None, [])
        tree = ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, body)))
        with warnings.catch_warnings():  # such as "perhaps you missed a comma": the evaluation reports it
            warnings.simplefilter("ignore")
            code = compile(tree, EXPRESSION_FILE, "eval")
        self._run = eval(code, _GLOBALS)  # noqa: S307 (a checked tree, no builtins)
        self._sources, self.constant = compiler.sources, not compiler.sources
        self.names, self.volatile = frozenset(compiler.used), compiler.volatile
        self.schema = compiler.schema if isinstance(value, str) else None

    def __call__(self, scope: Mapping[str, Any]) -> Any:
        """The value; the message of an ExpressionError names the place and the part that failed."""
        try:
            return self._run(scope, scope.get(BUDGET) or Budget(MAX_WORK))
        except Exception as error:
            words = optional("astera_lite_advice:on_failure", error, self._sources)
            plain = f"there is no member {error}" if isinstance(error, KeyError) else str(error) or named(error)
            raise ExpressionError(words or plain) from None


# ======================================================================================================================
# 5 Outbound: the one HTTP client of callbacks and http steps
# To refuse a network: add it to _NOT_PUBLIC, with its entry in the registries of special-purpose addresses (IANA).
# ======================================================================================================================

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def _networks(text: str) -> list[IPNetwork]:
    return [ipaddress.ip_network(word) for word in text.split()]


# A list of our own, because `ipaddress.is_global` is true for multicast, NAT64 and 6to4 addresses. AS112 and AMT
# (192.31.196, 192.52.193, 192.175.48, 2620:4f:8000) can be reached, but the nearest router responds there.
_NOT_PUBLIC = _networks(
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
    "192.31.196.0/24 192.52.193.0/24 192.88.99.0/24 192.168.0.0/16 192.175.48.0/24 198.18.0.0/15 198.51.100.0/24 "
    "203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 ::/127 2001::/23 2001:db8::/32 2620:4f:8000::/48 3fff::/20"
)
#: All of IPv4, the global unicast of IPv6, and three forms of IPv6 that are public if their IPv4 address is public.
_PUBLIC = _networks("0.0.0.0/0 2000::/3 ::ffff:0:0/96 ::/96 64:ff9b::/96")
#: IPv6 networks that embed an IPv4 address: mapped, compatible, translated (SIIT), NAT64 and NAT64 of a local network
#: in the last 32 bits, 6to4 after the first 16, Teredo in the last 32 with every bit inverted.
_CARRIERS = [(net, 0, 0) for net in _networks("::ffff:0:0/96 ::/96 ::ffff:0:0:0/96 64:ff9b::/96 64:ff9b:1::/48")]
_CARRIERS += [(ipaddress.ip_network("2002::/16"), 80, 0), (ipaddress.ip_network("2001::/32"), 0, 0xFFFFFFFF)]
_ISATAP = 0x5EFE  # bits 64 to 95 of an address in any network, without two flags (RFC 5214)
_METADATA = _networks(
    "169.254.169.254 169.254.170.2 169.254.170.23 169.254.42.42 169.254.0.23 100.100.100.200 192.0.0.192 "
    "168.63.129.16 fd00:ec2::254 fd00:ec2::23 fd20:ce::254 fd00:c1::a9fe:a9fe fd00:42::42 fe80::a9fe:a9fe"
)


class OutboundError(AsteraError):
    """A request got no usable response; `kind` is transport, timeout, too_large, or address: it was not sent."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class AddressRefused(OutboundError):
    """The address policy forbids a request to this address."""


TOKEN_TEXT = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_NUMBERED = r"(?:.*\.)?[0-9]+\.?"  # 10.0.0.256: no name ends in a number, so this is a wrong address
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.[A-Za-z0-9_-]{1,63})*\.?")
_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^#?\s]*)?(?P<query>\?[^#\s]*)?",
    re.ASCII | re.IGNORECASE,
)


def _carried_addresses(address: IPAddress) -> list[IPAddress]:
    """The IPv4 addresses embedded in an IPv6 address, by every convention that applies."""
    number = int(address)
    if isinstance(address, ipaddress.IPv4Address) or number <= 1:  # :: and ::1 embed nothing
        return []
    found = [number >> shift ^ inverted for network, shift, inverted in _CARRIERS if address in network]
    if number >> 32 & 0xFCFFFFFF == _ISATAP:
        found.append(number)
    return [ipaddress.IPv4Address(each & 0xFFFFFFFF) for each in found]


def _in_any(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(address in network for network in networks)


class AddressPolicy:
    """Which addresses an outgoing request may reach: public addresses, and those that `allow` names.

    `allow` is `none`, `auto`, or hosts and networks, comma-separated; `auto` allows loopback if `loopback` is true. A
    host stands for every address that its name resolves to; only its exact address allows a cloud's metadata service.
    Raises ConfigError for a word that is neither a host name nor a network.
    """

    def __init__(self, allow: str = "none", loopback: bool = False) -> None:
        self.hosts: set[str] = set()
        self.networks: list[IPNetwork] = []
        words = [word.strip().lower() for word in allow.split(",") if word.strip()]
        if words in (["none"], ["auto"]):
            words = ["localhost", "127.0.0.0/8", "::1/128"] if words == ["auto"] and loopback else []
        for word in words:
            try:
                self.networks.append(ipaddress.ip_network(word.strip("[]"), strict=False))
            except ValueError:
                fault = f"{shown(word)} is neither a host name nor a network such as 10.0.0.0/8"
                if word in ("auto", "none"):
                    fault = f"{shown(word)} must be the only word: write localhost, 127.0.0.0/8, ::1/128 for loopback"
                if word in ("auto", "none") or not _HOST_NAME.fullmatch(word) or re.fullmatch(_NUMBERED, word):
                    raise ConfigError([Fault("callback_allow", "", fault)]) from None
                self.hosts.add(word.rstrip("."))

    def refusal(self, host: str, address: IPAddress) -> str | None:
        """The reason why a connection to `address`, an address of `host`, is refused; None if it is allowed."""
        carried = _carried_addresses(address)
        exact = [network for network in self.networks if network.num_addresses == 1]
        named = _in_any(address, exact)
        if any(_in_any(form, _METADATA) and not named and not _in_any(form, exact) for form in (address, *carried)):
            return f"{address} is a cloud metadata address"
        if host.lower().rstrip(".") in self.hosts or _in_any(address, self.networks):
            return None
        # Each form needs its own permission: 64:ff9b::a00:1 is public, but the 10.0.0.1 in it must be allowed.
        public = [form for form in (address, *carried) if _in_any(form, _PUBLIC) and not _in_any(form, _NOT_PUBLIC)]
        if address in public and all(form in public or _in_any(form, self.networks) for form in carried):
            return None
        return f"{address} is not a public address"


class Target(NamedTuple):
    """The parts of a URL, as `parse_target` returns them."""

    scheme: str
    host: str  # without brackets
    port: int
    path: str  # with the query, as sent

    @property
    def receiver(self) -> str:
        """`host:port`, which identifies a receiver of callbacks."""
        return f"{self.host}:{self.port}"


def parse_target(url: str) -> Target:
    """Split an absolute http or https URL; ValueError says what is wrong with it.

    Strict on purpose: ASCII only (RFC 3986), no user name, no fragment, no blanks, no control characters.
    """
    authority = url.partition("//")[2].partition("/")[0]
    host = authority.partition(":")[0]
    if not host.isascii():
        with contextlib.suppress(UnicodeError):
            if "xn--" in (name := host.encode("idna").decode()):  # not for letters that IDNA maps to ASCII
                raise ValueError(f"has letters outside ASCII in its host: write {name}")
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError("has characters that a URL cannot have: percent-encode them")
    match = _URL.fullmatch(url)
    if match is None and "@" in authority:
        raise ValueError("must not have a user name or password")
    if match is None:
        raise ValueError("must not have a fragment" if "#" in url else "must be one absolute http or https URL")
    scheme, host = match["scheme"].lower(), match["host"].lower()
    port = int(match["port"] or {"http": 80, "https": 443}[scheme])
    if not 0 < port < 65536:
        raise ValueError("has a port that does not exist")
    if host.startswith("["):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("has a malformed IPv6 address") from None
    elif len(host) > 253 or not _HOST_NAME.fullmatch(host):
        raise ValueError("has a malformed host name")
    return Target(scheme, host, port, (match["path"] or "/") + (match["query"] or ""))


def _addresses(answer: Iterable[Any]) -> list[IPAddress]:
    return list(dict.fromkeys(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in answer))


def literal_addresses(host: str) -> list[IPAddress]:
    """The addresses of a host without a look-up: localhost, and numeric addresses in all forms of the system."""
    if host.rstrip(".") == "localhost" or host.rstrip(".").endswith(".localhost"):
        return [ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")]
    try:
        numeric = host.encode("ascii")  # bytes, because text loads the tables of international names (0.4 MB)
        return _addresses(socket.getaddrinfo(numeric, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST))
    except (OSError, UnicodeError):
        return []


def _seconds_left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


_MAX_LOOKUPS = 512  # threads that resolve names, including those whose request has timed out
_MAX_TRIED = 16  # addresses of one name to which a request tries to connect
_lookups: dict[str, Future[Any]] = {}  # under way, by host
_lookups_lock = threading.Lock()


def _look_up(host: str, lookup: Future[Any]) -> None:
    try:
        lookup.set_result(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM))
    except BaseException as error:  # or requests for this name would wait for this look-up, for ever
        lookup.set_exception(error)
    with _lookups_lock:
        del _lookups[host]


def resolve(host: str, deadline: float) -> list[IPAddress]:
    """The addresses of a host, in the system's order; OutboundError if there are none by `deadline` (monotonic).

    The system's look-up cannot be interrupted: it runs on a separate thread, which is abandoned at the deadline. All
    requests for one name share a thread.
    """
    if not host.rstrip(".").endswith("localhost") and (literal := literal_addresses(host)):
        return literal
    with _lookups_lock:
        lookup = _lookups.get(host)
        if lookup is None:
            if len(_lookups) >= _MAX_LOOKUPS:
                raise OutboundError("transport", "too many host names are being resolved")
            lookup = Future()
            threading.Thread(target=_look_up, args=(host, lookup), name="astera-resolve", daemon=True).start()
            _lookups[host] = lookup
    try:
        return _addresses(lookup.result(_seconds_left(deadline)))
    except TimeoutError:
        raise OutboundError("timeout", "the host name could not be resolved in time") from None
    except (OSError, UnicodeError):
        raise OutboundError("transport", "the host name cannot be resolved") from None


def _connect(target: Target, policy: AddressPolicy | None, deadline: float) -> socket.socket:
    """A connection to an address that the policy allows. The name is resolved once: the checked addresses are used."""
    addresses = resolve(target.host, deadline)
    for address in addresses:  # if one address is refused, the name is refused
        if policy is not None and (refusal := policy.refusal(target.host, address)):
            raise AddressRefused("address", f"its address is refused: {refusal}")
    failure: OSError = OSError("the name has no address")
    tried = addresses[:_MAX_TRIED]
    for position, address in enumerate(tried):
        share = _seconds_left(deadline) / (len(tried) - position)
        try:
            sock = socket.create_connection((str(address), target.port), timeout=share)
        except OSError as error:
            failure = error
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock
    raise failure


def answer_too_large(max_bytes: int) -> OutboundError:
    """The error for a response that exceeds `max_bytes`."""
    return OutboundError("too_large", f"the answer is larger than {show_size(max_bytes)}")


class _BoundedStream(io.RawIOBase):
    """The methods of a socket that http.client uses, with one deadline and one limit for all received bytes.

    A socket's own timeout applies to each call, so a server that sends slowly could hold a request for ever.
    """

    def __init__(self, sock: socket.socket, deadline: float, max_bytes: int) -> None:
        self._sock, self._deadline, self._max_bytes = sock, deadline, max_bytes
        self._left = max_bytes + (256 << 10)  # for the head
        self._refused = False  # the server reads no more of the request
        self.ended = False  # the server has sent everything

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_seconds_left(self._deadline))
        count = self._sock.recv_into(buffer)
        self.ended = count == 0
        self._left -= count
        if self._left < 0:
            raise answer_too_large(self._max_bytes)
        return count

    def sendall(self, data: Any) -> None:
        """Send within the deadline: sendall of an SSLSocket may apply its timeout to each piece.

        A server that has closed may have responded before (RFC 9112, section 9.5): the rest of the request is dropped.
        """
        rest = memoryview(data)
        while rest and not self._refused:
            self._sock.settimeout(_seconds_left(self._deadline))
            try:
                rest = rest[self._sock.send(rest) :]
            except ConnectionError:
                self._refused = True

    def close(self) -> None:
        """Does nothing: http.client closes before the response is read; the owner of the socket closes it later."""


class _FinalAnswer(http.client.HTTPResponse):
    """Skips interim responses such as 103 before the final one; http.client skips only 100."""

    def begin(self) -> None:
        super().begin()
        while 101 < self.status < 200:  # RFC 9110, section 15.2; after 101 there is no more HTTP
            self.headers = None  # type: ignore[assignment]  # begin() returns at once while it has headers
            super().begin()


@lru_cache(maxsize=1)
def _opener() -> "urllib.request.OpenerDirector":
    """The opener of all requests, with one handler: no proxies, redirects, cookies or other schemes.

    Every request has the stream of an open connection in its attribute `stream`.
    """
    import urllib.request  # noqa: PLC0415 (1 MB that a server without outgoing requests never needs)

    class Handler(urllib.request.AbstractHTTPHandler):
        def http_open(self, request: Any) -> http.client.HTTPResponse:
            connection = http.client.HTTPConnection(request.host)
            connection.response_class, connection.sock = _FinalAnswer, request.stream
            return self.do_open(lambda *_, **__: connection, request)

        https_open = http_open
        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    opener = urllib.request.OpenerDirector()
    opener.addheaders = []
    opener.add_handler(Handler())
    return opener


def _is_coded(headers: Pairs) -> bool:
    return any(name.lower() == "content-encoding" and value.lower() not in ("", "identity") for name, value in headers)


def _read_answer_whole(response: http.client.HTTPResponse, stream: _BoundedStream, max_bytes: int) -> Answer:
    cut_short = stream.ended  # in the head: for http.client the end of input is the end of the headers
    data = response.read(max_bytes + 1) if max_bytes and not cut_short else b""
    if len(data) > max_bytes:
        raise answer_too_large(max_bytes)
    if cut_short or (max_bytes and response.length):
        raise OutboundError("transport", "the answer was cut short")
    headers = tuple(response.getheaders())
    if data and _is_coded(headers):  # rare: the request did not ask for a coding
        data = wing("astera_lite_requests:decoded")(data, headers, max_bytes)
    return Answer(response.status, headers, data)


def _outbound_error(error: Exception, timeout: float) -> OutboundError:
    cause = getattr(error, "reason", None)  # of urllib's URLError
    cause = cause if isinstance(cause, Exception) else error
    if isinstance(cause, TimeoutError):
        return OutboundError("timeout", f"no answer within {show_duration(round(timeout, 3))}")
    if isinstance(cause, http.client.IncompleteRead):
        return OutboundError("transport", "the answer was cut short")
    if isinstance(cause, OSError):  # RemoteDisconnected and SSLCertVerificationError are OSErrors, too
        return OutboundError("transport", f"the connection failed: {reason_of(cause)}")
    return OutboundError("transport", f"the answer is not HTTP ({type(cause).__name__})")


@lru_cache(maxsize=1)
def _tls_context() -> "ssl.SSLContext":
    import ssl  # noqa: PLC0415 (not every Python has it)

    return ssl.create_default_context()


def _secured(sock: socket.socket, target: Target, deadline: float) -> socket.socket:
    if target.scheme == "http":
        return sock
    sock.settimeout(_seconds_left(deadline))
    return _tls_context().wrap_socket(sock, server_hostname=target.host.rstrip("."))


def fetch(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None,
    timeout: float,
    max_bytes: int,
    policy: AddressPolicy | None = None,
) -> Answer:
    """Send one request on a connection of its own; return its response, whatever the status, redirects too.

    `timeout` (seconds) covers everything from the look-up of the name to the last byte. `max_bytes` limits the
    body; 0 leaves it unread. Without a `policy` every address is allowed. Raises OutboundError.
    """
    try:
        target = parse_target(url)
    except ValueError as error:
        raise OutboundError("address", f"the URL {error}") from None
    for name, value in headers.items():
        if not TOKEN_TEXT.fullmatch(name) or not _FIELD_VALUE.fullmatch(value):
            raise OutboundError("address", f"the header {shown(name)} has characters that no header may have")
    deadline, opener = time.monotonic() + timeout, _opener()
    try:
        with _connect(target, policy, deadline) as plain, _secured(plain, target, deadline) as sock:
            request: Any = urllib.request.Request(url, body, dict(headers), method=method)  # noqa: S310
            request.stream = _BoundedStream(sock, deadline, max_bytes)
            with opener.open(request) as response:
                return _read_answer_whole(response, request.stream, max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _outbound_error(error, timeout) from None


def header_value(headers: Iterable[tuple[str, str]], name: str) -> str | None:
    """The first value of a header; `name` is in lower case."""
    return next((value for key, value in headers if key.lower() == name), None)


def joined_headers(headers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Headers by their names in lower case; repeated ones are joined by commas (RFC 9110, section 5.3).

    Set-Cookie, whose values contain commas, is a list.
    """
    result: dict[str, Any] = {}
    for name, value in headers:
        key = name.lower()
        if key == "set-cookie":
            result.setdefault(key, []).append(value)
        else:
            result[key] = f"{result[key]}, {value}" if key in result else value
    return result


def http_date(text: str | None) -> float:
    """Seconds since the epoch from a date in a header (RFC 9110, section 5.6.7), or NaN (every comparison is false)."""
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 (few clients send a date)

    try:
        date = parsedate_to_datetime(text or "")
        if date.tzinfo is None:  # the format of asctime has no zone and means UTC
            date = date.replace(tzinfo=datetime.UTC)
        return date.timestamp()
    except (ValueError, OverflowError):
        return math.nan


def parse_retry_after(value: str | None, now: int) -> float:
    """Seconds from a Retry-After header, a number or a date (RFC 9110, section 10.2.3); 0 without one.

    `now` is in milliseconds since the epoch.
    """
    if re.fullmatch("[0-9]{1,9}", (value or "0").strip()):
        return float(value or 0)
    return max(0.0, http_date(value) - now / 1000)  # in this order NaN gives 0


# ======================================================================================================================
# 6 Flows
# To add a step kind: a table of members, a function that makes the runner, and a row in STEP_KINDS.
# To add a type of parameters and bodies: a row in VALUE_TYPES.
# ======================================================================================================================


# --- values -----------------------------------------------------------------------------------------------------------

Scope = dict[str, Any]
Runner = Callable[["Run", Scope, str], Any]  # (run, scope, path of the step) -> the step's value

_INTEGER = re.compile("-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,308})(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,3})?")
_DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")
_DATE_TIME = re.compile(_DATE.pattern + r"[Tt]([0-9]{2}:){2}[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})")


def _read_integer(text: str) -> int | None:
    return int(text) if _INTEGER.fullmatch(text) else None


def read_number(text: str) -> int | float | None:
    """The number in a text, or None. A whole number becomes an integer, because a float has only 53 bits."""
    match = _NUMBER.fullmatch(text)
    return None if match is None else float(text) if match[1] or match[2] else int(text)


def _is_integer(value: Any) -> bool:
    return (type(value) is int or (type(value) is float and value.is_integer())) and int(value) in INT64


def _is_number(value: Any) -> bool:
    return math.isfinite(value) if type(value) is float else type(value) is int and value in INT64


def _is_moment(value: Any, form: re.Pattern[str]) -> bool:
    """Whether a value is text in this form for a date (with a time) that exists."""
    if type(value) is not str or not form.fullmatch(value):
        return False
    try:
        datetime.datetime.fromisoformat(value.upper())
    except ValueError:
        return False
    return True


class ValueType(NamedTuple):
    """A type of parameters and bodies."""

    words: str  # what a value must be
    holds: Callable[[Any], bool]  # whether a JSON value has this type (`true` is no integer, `1.0` is one)
    read: Callable[[str], Any] | None = None  # the value of a parameter's text, or None

    def parse(self, text: str) -> Any:
        """The value of a parameter's text, for `holds`; the message of a ValueError says what the text must be."""
        value = self.read(text) if self.read else None
        if value is None:
            raise ValueError(f"must be {self.words}")
        return value


VALUE_TYPES = {
    "string": ValueType("text", lambda value: type(value) is str, str),
    "integer": ValueType("an integer such as 3 or -12, within 64 bits", _is_integer, _read_integer),
    "number": ValueType("a number such as 2.5 or -1e3, within 64 bits", _is_number, read_number),
    "boolean": ValueType("true or false", lambda value: type(value) is bool, {"true": True, "false": False}.get),
    "date": ValueType("a date such as 2026-11-23", partial(_is_moment, form=_DATE), str),
    "date-time": ValueType(
        "a date and time with a zone such as 2026-11-23T20:31:05Z", partial(_is_moment, form=_DATE_TIME), str
    ),
    "array": ValueType("a list", lambda value: type(value) is list),
    "object": ValueType("an object", lambda value: type(value) is dict),
    "null": ValueType("null", lambda value: value is None),
}
PARAMETER_TYPES = [name for name, kind in VALUE_TYPES.items() if kind.read]


def equal(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same: for Python `True == 1`."""
    return bool(one == other) and (type(one) is bool) == (type(other) is bool)


class Schema(NamedTuple):
    """A compiled schema of a parameter or a body: a subset of JSON Schema."""

    types: Sequence[str] = ()  # empty: any
    rules: Sequence[tuple["Rule", Any]] = ()  # each with its limit
    items: "Schema | None" = None
    properties: Mapping[str, "Schema"] = {}
    required: Sequence[str] = ()
    additional: "bool | Schema" = True
    has_default: bool = False
    default: Any = None

    def check(self, value: Any, place: str, errors: InputErrors, where: str = "body") -> Any:
        """The value with defaults filled in. Faults are added to `errors`; `place` is the JSON Pointer of the value."""
        for name in self.types:
            if VALUE_TYPES[name].holds(value):
                break
        else:
            if self.types:
                errors.add(where, place, "must be " + " or ".join(VALUE_TYPES[name].words for name in self.types))
                return value
        if type(value) is float and self.types == ("integer",):
            value = int(value)
        for rule, limit in self.rules:
            if fault := rule.fault(value, limit):
                errors.add(where, place, fault)
        if type(value) is list and self.items is not None:
            return [self.items.check(item, f"{place}/{at}", errors, where) for at, item in enumerate(value)]
        if type(value) is dict and (self.properties or self.required or self.additional is not True):
            return self._check_members(value, place, errors, where)
        return value

    def _check_members(self, value: dict[str, Any], place: str, errors: InputErrors, where: str) -> dict[str, Any]:
        result = dict(value)
        for name, item in value.items():
            schema = self.properties.get(name, self.additional)
            if schema is True:  # there may be hundreds of thousands: the pointers would take time for nothing
                continue
            at = f"{place}/{pointer(name)}"
            if schema is False:
                errors.add(where, at, "is not a member of this object" + suggest(name, self.properties, errors))
            else:
                result[name] = schema.check(item, at, errors, where)
        for name in self.required:
            if name not in value:
                errors.add(where, f"{place}/{pointer(name)}", "is missing")
        for name, schema in self.properties.items():
            if schema.has_default and name not in value:
                result[name] = copy.deepcopy(schema.default)  # a Python step may change it
        return result


# --- requests ---------------------------------------------------------------------------------------------------------

#: Short names of content types in a flow file.
CONTENT_TYPES = {
    "json": "application/json",
    "form": "application/x-www-form-urlencoded",
    "text": "text/plain",
    "binary": "application/octet-stream",
}
_CHARSET = re.compile(r';[ \t]*charset[ \t]*=[ \t]*+"?+(?!utf-?8[ \t]*"?[ \t]*(?:;|$))[^;]*', re.I)
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*+\\u0000")
_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")
_upper_escapes = partial(re.compile("%[0-9a-f]{2}", re.I).sub, lambda match: match[0].upper())  # RFC 3986, 6.2.2.1


def is_json_type(media: str) -> bool:
    """Whether a media type (without parameters, in lower case) is JSON: RFC 6839 has the suffix."""
    return media == "application/json" or media.endswith("+json")


def unquote(text: str, plus: bool = False) -> str:
    """Percent-decode a text once; `plus` also turns + into a blank. ValueError for a stray %, invalid UTF-8, NUL."""
    if plus:
        text = text.replace("+", " ")
    if "%" not in text:
        return text
    if _PERCENT.search(text):
        raise ValueError("a % is not followed by two hexadecimal digits")
    try:
        text = urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise ValueError("its percent-encoded bytes are not UTF-8") from None
    if "\0" in text:
        raise ValueError("it has a NUL character")
    return text


def parse_query(query: str, errors: InputErrors) -> dict[str, list[str]]:
    """The values of a query by their names; those that cannot be decoded are added to `errors`."""
    result: dict[str, list[str]] = {}
    for pair in query.split("&"):
        if pair:
            name, _, value = pair.partition("=")
            try:
                name, value = unquote(name, plus=True), unquote(value, plus=True)
            except ValueError as error:
                errors.add("query", name, str(error))
            result.setdefault(name, []).append(value)
    return result


@lru_cache(maxsize=16)
def read_media_type(content_type: str, accepts: tuple[str, ...]) -> tuple[str, str]:
    """The media type of a request's body, and why the flow does not accept it, or ""."""
    media = content_type.partition(";")[0].strip().lower()
    if not media and CONTENT_TYPES["binary"] in accepts:  # RFC 9110, section 8.3
        media = CONTENT_TYPES["binary"]
    is_json = is_json_type(media)
    is_text = is_json or media.startswith("text/") or media == CONTENT_TYPES["form"]
    message = ""
    if accepts and media not in accepts and not (is_json and CONTENT_TYPES["json"] in accepts):
        message = f"must be {' or '.join(accepts)}, and the Content-Type must say so"
    elif is_text and _CHARSET.search(re.sub("us-ascii", "utf-8", content_type, flags=re.I)):  # a part of UTF-8
        message = "the charset must be utf-8"
    return media, message


def _read_body(body: bytes, media: str, schema: Schema | None) -> Any:
    """The value of a body; the message of a ValueError says what is wrong."""
    if is_json_type(media):
        value = from_json(body)
        if b"\\u0000" in body and _ESCAPED_NUL.search(body.decode()):
            raise ValueError("a string has a NUL character")
        return value
    if media != CONTENT_TYPES["form"] and not media.startswith("text/"):
        return body
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not valid UTF-8") from None
    if "\0" in text:
        raise ValueError("it has a NUL character")
    return text if media.startswith("text/") else wing("astera_lite_requests:read_form")(text, schema)


def _bind_body(flow: "Flow", request: StoredRequest, errors: InputErrors) -> Any:
    """The value of a request's body; faults are added to `errors`."""
    if not request.body:
        if flow.body_required:
            errors.add("body", "", "is missing: send " + flow.content_types[0])
        return None
    media, refusal = read_media_type(request.headers.get("content-type", ""), flow.content_types)
    if refusal:
        errors.add("header", "Content-Type", refusal, status=415)
        return None
    try:
        value = _read_body(request.body, media, flow.body)
    except ValueError as error:
        place, cure = (is_json_type(media) and optional("astera_lite_advice:on_body", request.body, error)) or ("", "")
        errors.add("body", place, str(error) if place else f"is not valid {media or 'JSON'}: {error}{cure}")
        return None
    return flow.body.check(value, "", errors) if flow.body else value


class Parameter(NamedTuple):
    """A declared parameter. `parse` reads one text, which for an array is one item."""

    name: str
    where: str  # path, query or header
    parse: Callable[[str], Any]  # raises ValueError
    array: bool
    required: bool
    schema: Schema

    def read(self, given: Sequence[str], errors: InputErrors) -> Any:
        """The value of the texts in a request (raw in a path); faults are added to `errors`."""
        if not given:
            if self.required:
                errors.add(self.where, self.name, "is missing")
            return copy.deepcopy(self.schema.default)
        before = len(errors)
        try:
            texts = [unquote(given[0])] if self.where == "path" else given
            value = self.schema.check(self._parsed(texts), self.name, errors, self.where)
        except ValueError as error:
            errors.add(self.where, self.name, str(error))
            value = None
        if len(errors) > before and self.where == "query" and (spaced := [text for text in given if " " in text]):
            errors[-1]["message"] += f"; {shown(spaced[0])} came: a + in a query is a space, write %2B"
        return value

    def _parsed(self, given: Sequence[str]) -> Any:
        if not self.array:
            if len(given) > 1:
                raise ValueError("must be given once")
            return self.parse(given[0])
        # One text is a comma-separated list. Of several texts, each is an item, and empty ones are left out.
        texts = given[0].split(",") if len(given) == 1 and given[0] else [text for text in given if text]
        texts = [text.strip(" \t") for text in texts] if self.where == "header" else texts
        if "" in texts:
            raise ValueError("has an empty item")
        return [self.parse(text) for text in texts]


class Input(NamedTuple):
    """The checked input of a request: `params` and `request` of expressions."""

    params: dict[str, Any]
    request: dict[str, Any]
    selected: Any = None  # a Selected of astera_lite_requests, where the flow has a selection
    size: int = 0  # bytes of body and query as received
    trace: Trace | None = None


# --- members ----------------------------------------------------------------------------------------------------------
# A table of members describes an object in a flow file. One pass over the table checks what the author wrote, fills in
# defaults, compiles expressions, and names the place of each fault. The same table gives the JSON Schema of flow files,
# the members that messages list, and the tables of docs/flows.md.

#: Names that every expression of a flow may use.
BASE_NAMES = ("params", "request", "env", "secrets")


def _object_schema(members: Mapping[str, Schema]) -> Schema:
    """The schema of an object that has these members and no others."""
    return Schema(properties=members, required=tuple(members), additional=False)


_REQUEST_SCHEMA = _object_schema(dict.fromkeys(("method", "path", "query", "headers", "body", "id"), Schema()))
#: The schema of `error` in expressions, after a step that failed while the flow went on.
_ERROR_SCHEMA = _object_schema(dict.fromkeys(("status", "headers", "body", "message", "kind"), Schema()))
#: The schema of the value of a step that `answers`; the last three members are those of `pages`.
_ANSWER_SCHEMA = _object_schema(dict.fromkeys(("status", "headers", "body", "items", "pages", "more"), Schema()))
MODES = ("synchronous", "asynchronous")
FLOW_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
FLOW_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
STEP_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


class Build:
    """The state of the compilation of a flow: faults so far, and the names that expressions may use."""

    def __init__(
        self, where: str, step: "Member", folder: str | None = None, connections: Collection[str] = ()
    ) -> None:
        self.where, self.folder, self.connections = where, folder, connections
        self.step = step  # compiles a step
        self.faults: list[Fault] = []
        self.names: Mapping[str, Schema | None] = {}
        self.hints: dict[str, str] = {}  # messages for unknown names
        self.schema: Schema | None = None  # of the last template
        self.volatile = False  # whether a template of the step in progress is
        self.calls: list[tuple[str, str]] = []  # the called flows, and the places of the calls
        self.step_names: set[str] = set()  # of all steps, also those inside other steps
        self.method = "GET"  # of the flow
        self.light = True  # whether all steps so far only compute

    def fault(self, place: str, message: str) -> None:
        """Add a fault; the message also names the cure."""
        self.faults.append(Fault(self.where, place, message))

    def template(self, value: Any, place: str) -> Template:
        """Compile a value that may have expressions."""
        template = Template(value, place, Compiler(self.names, self.hints, self.fault))
        self.schema, self.volatile = template.schema, self.volatile or template.volatile
        return template

    def add_name(self, name: str, schema: Schema | None = None) -> None:
        """Add a name for the expressions that are compiled from here to the end of the block."""
        self.names = {**self.names, name: schema}

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        """Compile a part of the flow; the names that it adds are unknown after it."""
        outer = self.names
        yield
        for name in self.names.keys() - outer.keys():
            self.hints[name] = f'"{name}" is known only inside the step that it belongs to'
        self.names = outer


class Member:
    """What an author may write as the value of a name in a flow file, and what it compiles to; here any JSON, as it is.

    `traits` are attributes. `default` is what an author would write for the same effect; without a default, the values
    of an object lack an absent member. `word` is for messages and documentation, `json` is a JSON Schema.
    """

    default: Any = None
    required = False
    word = "any value"
    json: Mapping[str, Any] = {}
    holds: Callable[[Any], Any] = staticmethod(lambda value: True)  # whether a value is allowed
    cure: Callable[[Any], str] = staticmethod(lambda value: "")  # for a value that is not allowed

    def __init__(self, **traits: Any) -> None:
        vars(self).update(traits)

    def parse(self, value: Any) -> Any:
        """Check and compile a value; the message of a ValueError names the fault and the cure."""
        if self.holds(value):
            return value
        raise ValueError(f"{shown(value)} is not {self.word}{self.cure(value)}")

    def read(self, build: Build, value: Any, place: str) -> Any:
        """Check and compile the value at a place; `build` collects the faults."""
        try:
            return self.parse(value)
        except ValueError as error:
            build.fault(place, str(error))
            return None


class Text(Member):
    """Text that matches a pattern, without expressions."""

    def __init__(self, word: str = "text", pattern: str = "(?s:.*)", **traits: Any) -> None:
        super().__init__(**{"word": word, "json": {"type": "string"}} | traits)
        self.holds = lambda value: isinstance(value, str) and re.fullmatch(pattern, value)
        self.cure = lambda value: ": expressions are not evaluated here" if "${" in str(value) else ""


class Number(Member):
    """A number within bounds, by default an integer."""

    types: Sequence[type] = (int,)

    def __init__(self, least: int, most: int | None = None, what: str = "a number", **traits: Any) -> None:
        word = f"{what} from {least} to {most}" if most else f"{what}, {least} or more"
        super().__init__(word=word, **traits)
        self.json = {"type": "number" if float in self.types else "integer", "minimum": least}
        self.json |= {"maximum": most} if most else {}
        self.holds = lambda value: type(value) in self.types and least <= value <= (most or math.inf)
        self.cure = lambda value: ": write it without quotes" if str(value).isdigit() and type(value) is str else ""


class OneOf(Member):
    """One of several words."""

    def __init__(self, *words: str, **traits: Any) -> None:
        super().__init__(word=f"one of {', '.join(words)}", json={"enum": list(words)}, **traits)
        self.holds = lambda value: value in words
        self.cure = lambda value: suggest(str(value), words)


def _is_status_word(value: Any) -> bool:
    return type(value) in (int, str) and re.fullmatch("[1-5]([0-9]{2}|xx)", str(value)) is not None


_JSON_NUMBER_OR_TEXT = {"type": ["number", "string"]}
_ANYTHING = Member()
Flag = partial(Member, holds=lambda value: type(value) is bool, word="true or false", json={"type": "boolean"})
Duration = partial(Member, parse=parse_duration, word="a duration such as 250ms, 30s, 5m", json=_JSON_NUMBER_OR_TEXT)
Size = partial(Member, parse=parse_size, word="a size such as 64KiB, 10MiB", json=_JSON_NUMBER_OR_TEXT)
_STATUS_WORD = Member(holds=_is_status_word, word='a status such as 200 or "2xx"', json=_JSON_NUMBER_OR_TEXT)


class Value(Member):
    """JSON with expressions in its text, which may also use `names`; compiles to a Template.

    `plain` judges a value that is no expression; that of an expression is checked where it is used.
    """

    plain: Member
    names: Sequence[str] = ()

    def __init__(self, plain: Member = _ANYTHING, **traits: Any) -> None:
        word = plain.word if plain is _ANYTHING else f"{plain.word}, or an expression"
        super().__init__(**{"plain": plain, "word": word} | traits)

    def read(self, build: Build, value: Any, place: str) -> Template:
        if not (isinstance(value, str) and "${" in value):
            self.plain.read(build, value, place)
        with build.block():
            for name in self.names:
                build.add_name(name)
            return build.template(value, place)


def _parse_condition(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"{shown(value)} is text, which is always true: write ${{…}} around the condition")
    return value


Condition = partial(Value, Member(parse=_parse_condition), word="a condition, `${…}`")


def _of_items(words: str, item: Member) -> str:
    return words.partition(";")[0] if item.word == Member.word else f"{words} {item.word}"


class ListOf(Member):
    """A list with at least `least` items; with `lone`, a single item may stand for a list."""

    item: Member
    least = 0
    lone = False

    def __init__(self, item: Member, **traits: Any) -> None:
        word = f"{item.word}, or a list of these" if traits.get("lone") else _of_items("a list; each item is", item)
        super().__init__(**{"item": item, "word": word} | traits)

    def read(self, build: Build, value: Any, place: str) -> list[Any]:
        if self.lone and not isinstance(value, list):
            return [self.item.read(build, value, place)]
        if not isinstance(value, list) or len(value) < self.least:
            found = "" if isinstance(value, list) else f", not {kind_of(value)}"
            build.fault(place, f"must be a list{' with at least one item' * bool(self.least)}{found}")
            return []
        return [self.item.read(build, item, f"{place}/{at}") for at, item in enumerate(value)]


class MapOf(Member):
    """An object whose author chooses the names; `check(build, name, names)` returns what is wrong with one."""

    item: Member
    check: Callable[[Build, str, Collection[str]], str] = staticmethod(lambda build, name, names: "")

    def __init__(self, item: Member, **traits: Any) -> None:
        super().__init__(item=item, word=_of_items("an object; each value is", item), **traits)

    def read(self, build: Build, value: Any, place: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            build.fault(place, f"must be an object, not {kind_of(value)}")
            return {}
        for name in value:
            if fault := self.check(build, name, value):
                build.fault(f"{place}/{pointer(name)}", fault)
        return {name: self.item.read(build, item, f"{place}/{pointer(name)}") for name, item in value.items()}


class Either(Member):
    """`structured` for lists and objects, `plain` for other values."""

    plain: Member
    structured: Member

    def __init__(self, plain: Member, structured: Member, **traits: Any) -> None:
        super().__init__(plain=plain, structured=structured, word=f"{plain.word}, or {structured.word}", **traits)

    def read(self, build: Build, value: Any, place: str) -> Any:
        return (self.structured if isinstance(value, dict | list) else self.plain).read(build, value, place)


class Elsewhere(Member):
    """A member of a wing, such as `astera_lite_steps:SQL`; the wing is loaded on first use."""

    name: str

    def __init__(self, name: str) -> None:
        super().__init__(name=name)

    def read(self, build: Build, value: Any, place: str) -> Any:
        return wing(self.name).read(build, value, place)


class Table(Member):
    """An object with these members and no others, compiled in the order of the table.

    It compiles to a dict of the members that are present or have a default. If there are no faults and there is a
    function `make(build, values, place)`, it compiles to the result of this function. A value that is no object is
    taken as the member `short`. Exactly one of the members `choice` must be present. `more` is for members of other
    names, which are faults without it. `name` is the name of the definition in the JSON Schema.
    """

    members: Mapping[str, Member]
    make: Callable[[Build, dict[str, Any], str], Any] | None
    short = ""
    choice: Collection[str] = ()
    more: Member | None = None
    name = ""
    word = "an object"

    def __init__(self, members: Mapping[str, Member], make: Any = None, **traits: Any) -> None:
        super().__init__(members=members, make=make, **traits)
        if self.short:
            self.word = f"{members[self.short].word}, or an object"

    def read(self, build: Build, value: Any, place: str) -> Any:
        if self.short and not isinstance(value, dict):
            value = {self.short: value}
        if not isinstance(value, dict):
            build.fault(place, f"must be an object with {', '.join(self.members)}, not {kind_of(value)}")
            return None
        before, members, values = len(build.faults), self.members, {}
        if self.more is not None:
            members = dict.fromkeys(value, self.more) | dict(members)
        with build.block():
            self._check_names(build, value, place, members)
            for name, member in members.items():
                if name in value or member.default is not None:
                    at = f"{place}/{pointer(name)}"
                    values[name] = member.read(build, value.get(name, member.default), at)
        if len(build.faults) > before:
            return None
        return self.make(build, values, place) if self.make else values

    def _check_names(self, build: Build, value: dict[str, Any], place: str, members: Mapping[str, Member]) -> None:
        unknown = [name for name in value if name not in members]
        for name in unknown:
            cure = optional("astera_lite_advice:on_member", name) or suggest(name, members)
            build.fault(f"{place}/{pointer(name)}", f"is not known here (known: {', '.join(members)}){cure}")
        for name, member in members.items():
            if member.required and name not in value:
                build.fault(place, f'needs a member "{name}": {member.word}')
        used = [name for name in self.choice if name in value]
        if self.choice and len(used) != 1 and not (unknown and not used):  # probably the unknown one is misspelled
            found = f", not {' and '.join(used)}" if used else ""
            build.fault(place, f"needs exactly one of {', '.join(self.choice)}{found}")


class Steps(ListOf):
    """A list of steps; expressions of a step may use the names of the steps before it."""

    def __init__(self, **traits: Any) -> None:
        super().__init__(Member(json={"$ref": "#/$defs/step"}), **{"least": 1, "word": "a list of steps"} | traits)

    def read(self, build: Build, value: Any, place: str) -> list[Any]:
        names = [str(spec.get("name")) for spec in value if isinstance(spec, dict)] if isinstance(value, list) else []
        build.hints |= {name: f'step "{name}" comes later: move it up' for name in names if name not in build.names}
        volatile, steps = build.volatile, []
        for position, spec in enumerate(super().read(build, value, place)):
            steps.append(step := build.step.read(build, spec, f"{place}/{position}"))
            if isinstance(spec, dict) and isinstance(name := spec.get("name"), str):
                answers = step is not None and step.kind.answers and step.on_error is None
                build.add_name(name, _ANSWER_SCHEMA if answers else None)
                build.step_names.add(name)
        build.volatile = volatile  # each step counts for itself
        return steps


class StepKind(Member):
    """A kind of step, as a member of steps: compiles to itself, its runner, and whether its value is saved.

    If there are no faults, `make(build, values, place)` makes the runner of the values that `members` compile to.
    """

    members: Member
    make: Callable[[Build, Any, str], Runner]
    effect = False  # it may act on the world outside
    light = False  # it only computes, and takes no longer than its expressions
    answers = False  # its value is the response of an API or a flow
    nests = False  # it runs the steps inside it
    code = False  # it runs Python code of the flow's author

    def __init__(self, members: Member, make: Any, word: str, **traits: Any) -> None:
        super().__init__(members=members, make=make, word=word, **traits)

    def read(self, build: Build, value: Any, place: str) -> "tuple[StepKind, Any, bool]":
        before, volatile, build.volatile = len(build.faults), build.volatile, False
        given = self.members.read(build, value, place)
        run = self.make(build, given, place) if len(build.faults) == before else None
        save, build.volatile = self.effect or build.volatile, volatile
        return self, run, save


# --- flows ------------------------------------------------------------------------------------------------------------


class Retry(NamedTuple):
    """How often and when a failed step is repeated. Times are in seconds."""

    attempts: int = 1
    delay: float = 1.0
    backoff: float = 2.0
    max_delay: float = 30.0
    on: frozenset[str] | None = None  # kinds of failures; None: all that are safe to repeat

    def pause(self, failed: int) -> float:
        """Seconds to wait after the n-th failure (from 1): they grow exponentially, with jitter."""
        longest = min(self.delay * self.backoff ** (failed - 1), self.max_delay)
        return longest * (0.5 + random.random() / 2)  # noqa: S311 (spreads load, guards nothing)


class Step(NamedTuple):
    """A compiled step. `save`: its output is saved with the job."""

    name: str
    kind_name: str
    kind: StepKind
    run: Runner
    save: bool
    when: Template | None = None
    timeout: float | None = None  # seconds
    retry: Retry = Retry()
    on_error: Template | None = None
    place: str = ""  # in the flow file


class Response(NamedTuple):
    """One of the responses of a flow: the first one whose `when` is true is sent."""

    when: Template | None
    status: Template
    headers: Mapping[str, Template]
    body: Template | None
    selection: Any = None  # a Selection of astera_lite_requests: what a caller may request of the rows


_Bound = tuple[dict[str, Any], dict[str, list[str]]]  # parameters, and the values of the query by name
_MAX_BOUND = 128  # queries whose values a flow keeps, and characters of each query


class Flow(NamedTuple):
    """A compiled flow. `tree` is what the author wrote; `version` is its hash, by which a job keeps its version."""

    name: str
    description: str
    method: str
    resource: str
    modes: frozenset[str]  # synchronous, asynchronous
    strict: bool
    parameters: tuple[Parameter, ...]
    body: Schema | None
    content_types: tuple[str, ...]
    body_required: bool
    steps: tuple[Step, ...]
    responses: tuple[Response, ...]
    selection: Any  # of all responses together
    timeout: float | None  # seconds
    restart: str  # resume, rerun or fail
    limit: int | None  # simultaneous runs
    when_full: str  # queue or refuse
    calls: tuple[tuple[str, str], ...]  # the called flows, and the places of the calls
    tests: Sequence[dict[str, Any]]  # with the members of the table _TEST
    tree: dict[str, Any]
    text: str
    version: int
    source: str  # the name of the file, for messages
    bound: dict[str, _Bound]  # by query, for the next time: saves a tenth of a synchronous call
    header_names: tuple[str, ...] = ()  # of the request headers that matter to the flow, in lower case
    light: bool = False  # only computes, and is short: may run on a thread that must not be held for long

    @property
    def segments(self) -> list[str]:
        """The raw segments of the resource."""
        return self.resource.split("/")[1:]

    @property
    def selecting(self) -> list[str]:
        """The query parameters that select rows of responses."""
        return self.selection.names if self.selection else []

    def bind(self, request: StoredRequest, request_id: str = "", errors: InputErrors | None = None) -> Input:
        """The checked input of a request; raises InputError with all faults, also those in `errors`."""
        errors, selected = InputErrors() if errors is None else errors, None
        params, query = self.bound.get(request.query) or self._bind_parameters(request, errors)
        if self.selection:
            selected = wing("astera_lite_requests:read_selection")(self.selection, request.path, query, errors)
        seen = {
            "method": request.method,
            "path": request.path,
            "query": {name: values[:] if len(values) > 1 else values[0] for name, values in query.items()},
            "headers": request.headers,
            "body": _bind_body(self, request, errors),
            "id": request_id,
        }
        errors.check()
        return Input(params.copy(), seen, selected, len(request.body) + len(request.query), request.trace)

    def _bind_parameters(self, request: StoredRequest, errors: InputErrors) -> _Bound:
        """The parameters, and the values of the query; kept for the next request if they depend on the query alone.

        ValueError if the path is not one of the resource: an old job may have been accepted with another resource.
        """
        query, params = parse_query(request.query, errors), {}
        for item in self.parameters:
            if item.where == "query":
                given: Sequence[str] = query.get(item.name, ())
            elif item.where == "path":
                segments = dict(zip(self.segments, request.path.split("/")[1:], strict=True))
                given = (segments[f"{{{item.name}}}"],)
            else:
                given = [value for name, value in request.headers.items() if name == item.name.lower()]
            params[item.name] = item.read(given, errors)
        if self.strict:
            known = [item.name for item in self.parameters if item.where == "query"] + self.selecting
            for name in query:
                if name not in known:
                    errors.add("query", name, "is not declared" + suggest(name, known, errors))
        of_query = all(item.where == "query" and not item.array for item in self.parameters)
        if of_query and not errors and len(request.query) <= _MAX_BOUND:
            if len(self.bound) >= _MAX_BOUND:
                self.bound.clear()
            self.bound[request.query] = params, query
        return params, query


# --- answers ----------------------------------------------------------------------------------------------------------

_UNSENDABLE = re.compile(r"[^\t\x20-\x7e\x80-\xff]+")
_NO_URL = re.compile(r"[^\t\x20-\x7e]+")
ENTITY_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_WITHOUT_BODY = (204, 205, 304)
_NO_BODY = object()  # instead of the value of a body


def header_lines(name: str, given: Any) -> list[tuple[str, str]]:
    """The lines of a header with a flow's value: none for null; a list is joined by commas, but each cookie has a line.

    Characters that no header may have (RFC 9110, section 5.5) are percent-encoded: the text may come from a client, and
    must neither split the response nor turn it into a 5xx.
    """
    key, items = name.lower(), given if type(given) in (list, tuple) else [given]
    unsendable = _NO_URL if key in ("location", "content-location") else _UNSENDABLE
    encoded = partial(unsendable.sub, lambda match: urllib.parse.quote(match[0], safe="", errors="replace"))
    texts = [encoded(as_text(item)).strip(" \t") for item in items if item is not None]
    if key == "etag":
        texts = [text if ENTITY_TAG.fullmatch(text) else f'"{urllib.parse.quote(text)}"' for text in texts]
    return [(name, text) for text in (texts if key == "set-cookie" else [", ".join(texts)] * bool(texts))]


def make_answer(
    status: Any, headers: Mapping[str, Any], body: Any, max_bytes: int, method: str = "GET", shares: bool = True
) -> Answer:
    """The response to a method with a flow's values; raises ExpressionError or ValueError if they make none.

    `shares`: a step or an expression, which pays for that, may have put one part into the body many times.
    """
    if type(status) is not int or not 200 <= status <= 599:
        raise ExpressionError(f"/response/status: {shown(status)} is not a status from 200 to 599")
    pairs: Pairs = ()
    if headers:  # most flows set none: that saves some 3 % of a synchronous call
        pairs = tuple(line for name, given in headers.items() for line in header_lines(name, given))
    try:
        pairs = with_owed(status, pairs, method)
    except ValueError as error:
        raise ExpressionError(f"/response/status: {error}") from None
    if body is _NO_BODY or status in _WITHOUT_BODY:
        return Answer(status, pairs)
    content_type = (pairs and header_value(pairs, "content-type")) or ""
    media = content_type and content_type.partition(";")[0].strip().lower()
    if content_type and type(body) is not bytes:  # text is written in UTF-8, whatever the charset of its source
        content_type = _CHARSET.sub("; charset=utf-8", content_type)
    if type(body) is bytes:
        data, default = body, CONTENT_TYPES["binary"]
    elif media and not is_json_type(media):
        data, default = as_text(body).encode(), ""
        if media.startswith("text/") and "charset" not in content_type.lower():
            content_type += "; charset=utf-8"
    else:
        if shares:
            check_written(body, max_bytes)
        data, default = json_body(body), CONTENT_TYPES["json"]
    if len(data) > max_bytes:
        raise ExpressionError(f"/response/body: it is larger than max_result ({show_size(max_bytes)})")
    others = [pair for pair in pairs if pair[0].lower() != "content-type"] if pairs else ()
    return Answer(status, (*others, ("Content-Type", content_type if media else default)), data)


# Encodings of Python that are no charsets of texts; the time for punycode grows with the square of the size.
_NO_CHARSETS = frozenset({"punycode", "idna", "unicode-escape", "raw-unicode-escape", "undefined"})


def read_answer(answer: Answer) -> Any:
    """The value of a response's body by its content type: JSON, text or bytes; None if empty. Raises ValueError."""
    if not answer.body:
        return None
    if _is_coded(answer.headers):
        wing("astera_lite_requests:check_codings")(answer.headers)
    content_type = (header_value(answer.headers, "content-type") or "").lower()
    media = content_type.partition(";")[0].strip()
    named = re.search(r"charset=\"?([\w-]+)", content_type)
    is_json = is_json_type(media)
    if not (is_json or named or media.startswith("text/") or media.endswith(("+xml", "/xml"))):
        return answer.body
    try:
        charset = codecs.lookup(named[1] if named else "utf-8").name.replace("_", "-")
        if charset in _NO_CHARSETS:
            raise LookupError
        text = answer.body.decode(charset).removeprefix("\ufeff")
    except LookupError:
        text = answer.body.decode("utf-8" if is_json else "latin-1", "replace")
    except UnicodeDecodeError as error:
        if is_json:
            raise ValueError(f"with invalid JSON: byte {error.start} is not valid {charset.upper()}") from None
        text = answer.body.decode("latin-1")
    if not is_json:
        return text
    try:
        return from_json(text, LENIENT_DECODER)
    except ValueError as error:
        raise ValueError(f"with invalid JSON: {error}") from None


# --- running ----------------------------------------------------------------------------------------------------------


class _Signal(Exception):
    """Ends a run: `retry` and `onError` do not apply."""


class Answered(_Signal):
    """A `respond` step responds with `answer`."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer


class _Suspend(_Signal):
    def __init__(self, until: int) -> None:
        self.until = until  # milliseconds since the epoch


class Cancelled(_Signal):
    """The run must stop: its job was cancelled."""


class StepError(AsteraError):
    """A step has failed. The client may see `detail`; `status` is that of the response; `kinds` are words for `retry`.

    If `detail` is None, the client only sees that the flow failed. `reason` is for the flow's author. `answer` is the
    response of the API, or of the called flow, if there is one. `safe`: the step may be repeated even if `retry` does
    not name the kind.
    """

    source: dict[str, Any] | None = None  # file and line of the exception, if it came from another process
    failure: Mapping[str, Any] = {}  # what the flow's author is told, once it is known

    def __init__(
        self,
        status: int,
        detail: str | None,
        reason: str,
        kinds: Collection[str],
        answer: Answer | None = None,
        safe: bool = True,
    ) -> None:
        super().__init__(reason)
        self.status, self.detail, self.kinds, self.answer, self.safe = status, detail, frozenset(kinds), answer, safe

    @property
    def kind(self) -> str:
        """The kind of the failure, in one word."""
        word = max(self.kinds)
        return "status" if word[0].isdigit() else "size" if word == "too_large" else word


class _TimedOut(StepError, _Signal):
    """The run has exceeded its time limit."""

    def __init__(self, reason: str = "the flow exceeded its time limit") -> None:
        super().__init__(504, "The flow exceeded its time limit.", reason, {"timeout"})


class FlowFailure(StepError, _Signal):
    """A `fail` step has ended the run."""

    def __init__(self, status: int, detail: str, headers: Pairs = ()) -> None:
        super().__init__(status, detail, detail, {"fail"})
        self.headers = headers


def _as_step_error(error: BaseException) -> StepError:
    """The failure of a step that raised this; if it is no StepError, the client sees nothing of it."""
    if isinstance(error, StepError):
        return error
    is_expression = isinstance(error, ExpressionError)
    reason, kinds = (str(error), {"error", "expression"}) if is_expression else (named(error), {"error"})
    failed = StepError(500, None, reason, kinds)
    failed.__cause__ = error
    return failed


def _error_value(error: StepError, masked: Mask) -> dict[str, Any]:
    """The value of `error` in expressions; a body that cannot be read is text."""
    answer, status, headers, body = error.answer, None, {}, None
    if answer is not None:
        status, headers = answer.code, joined_headers(answer.headers)
        try:
            body = read_answer(answer)
        except ValueError:
            body = answer.body.decode("utf-8", "replace")
    return dict(zip(_ERROR_SCHEMA.properties, (status, headers, body, masked(str(error)), error.kind), strict=True))


class Cancel:
    """A request to stop a run; any thread may set it."""

    __slots__ = ("_listeners", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._listeners: list[Callable[[], None]] = []

    def set(self) -> None:
        self.is_set = True
        for listener in list(self._listeners):
            listener()

    @contextlib.contextmanager
    def calling(self, listener: Callable[[], None]) -> Iterator[None]:
        """Have `listener` called (perhaps twice) by the thread that sets this, or at once if this is set already."""
        self._listeners.append(listener)
        try:
            if self.is_set:
                listener()
            yield
        finally:
            self._listeners.remove(listener)

    def wait(self, seconds: float) -> bool:
        """Sleep so many seconds, or until this is set; return whether it is set."""
        changed = threading.Event()
        with self.calling(changed.set):
            changed.wait(seconds)
        return self.is_set


class Journal:
    """What a run saves to be resumed: outputs and begun waits, by the path of the step. This class saves nothing."""

    suspendable = False

    def __init__(self) -> None:
        self.saved: dict[str, Any] = {}  # also by the keys of `journal_key`
        self.waits: dict[str, int] = {}
        self.waiting: tuple[str, int] = ("", 0)  # the step that suspended the run, and until when (ms) it waits

    def record(self, path: str, value: Any) -> int | None:
        """Save the output of a finished step; return its size in bytes."""
        return None

    def forget(self, prefix: str) -> None:
        """Drop what is saved under paths that begin with this: these steps run again."""

    def barrier(self) -> None:
        """Return when everything recorded is committed; called before each side effect."""


#: What a journal saves of a step beside its output, so that a resumed run does not compute it again, with the suffix of
#: its key (the key of the output is the step's path). Databases in use have these keys.
_JOURNAL_SUFFIXES = {
    "when": "?",  # the value of the condition
    "error": "!",  # the value of `error`, if the step failed and the flow went on
    "began": "<",  # the begin of the first attempt, in milliseconds since the epoch
    "failed": "#",  # the number of attempts that failed, of a step with steps inside
    "deadline": "@",  # of the suspended attempt, or of the flow that a `call` runs, in milliseconds since the epoch
    "time": "=",  # the end of a `wait`
    "items": "/of",  # of an `each`
    "input": "/>",  # of a `call`
}


def journal_key(path: str, what: str) -> str:
    """The key in a journal for something of a step (a name of _JOURNAL_SUFFIXES)."""
    return path + _JOURNAL_SUFFIXES[what]


class Surroundings(NamedTuple):
    """What all runs need from outside."""

    clock: Clock
    policy: AddressPolicy
    env: dict[str, str]
    secrets: dict[str, str]
    max_result: int  # bytes
    max_step_response: int  # bytes
    connections: dict[str, Any]  # a reload replaces them
    masked: Mask  # of secrets and credentials
    kept: dict[str, Any]  # objects that kinds of steps keep between runs, by name; each has a method `close`
    flow_named: Callable[[str], Flow | None]  # for `call`
    data: str  # the folder that sql steps may reach
    own_database: str  # the file that sql steps may not reach
    folder: str | None  # of the flows; programs run in it

    def close(self) -> None:
        """Close the objects that are kept between runs."""
        while self.kept:
            self.kept.popitem()[1].close()


_UNBOUND = contextlib.nullcontext()
_WORTH_SUSPENDING_MS = 250  # a shorter wait costs less than two commits


class Run:
    """One run of a flow: its input, its state and its deadlines."""

    def __init__(
        self,
        flow: Flow,
        given: Input,
        outside: Surroundings,
        deadline: float,
        journal: Journal | None = None,
        trace: list[dict[str, Any]] | None = None,
        cancel: Cancel | None = None,
    ) -> None:
        self.flow, self.input, self.outside = flow, given, outside
        self.deadline = self.step_deadline = deadline  # on the monotonic clock, seconds
        self.journal = journal or Journal()
        self.trace = trace
        self.cancel = cancel or Cancel()
        self.progress = Progress(None, 0, len(flow.steps))
        self.canned: Any = None  # in a test: its method `output(step, path)` stands in for steps
        self.held = False  # waits keep the thread, because other threads share the run
        self.budget: Budget | None = None  # for all evaluations together
        self.reached: dict[str, Any] = {}  # how far steps have come, by path, for their next attempts

    def scope(self) -> Scope:
        """The names of expressions before the first step."""
        given, outside = self.input, self.outside
        env, secrets = dict(outside.env), dict(outside.secrets)  # which a Python step may change
        names: Scope = {"params": given.params, "request": given.request, "env": env, "secrets": secrets, "error": None}
        return names if self.budget is None else {**names, BUDGET: self.budget}

    @property
    def about(self) -> dict[str, str]:
        """The members of log records about this run."""
        its_id = str(self.input.request["id"])
        return about("job" if JobKey.parse(its_id) else "request", its_id, self.flow.name, self.input.trace)

    def evaluated_once(self, template: Template, scope: Scope, key: str) -> Any:
        """The value of a template; if it may differ the next time, it is saved for a resumed run."""
        if template.volatile and key in self.journal.saved:
            return self.journal.saved[key]
        value = template(scope)
        if template.volatile:
            self.journal.record(key, value)
        return value

    def check(self) -> None:
        """Raise Cancelled or _TimedOut if the run must end."""
        if self.cancel.is_set:
            raise Cancelled
        if self.outside.clock.monotonic() >= self.deadline:
            raise _TimedOut

    def left(self) -> float:
        """Seconds until the step or the run must end; raises StepError, _TimedOut or Cancelled if it must end now."""
        left = self.step_deadline - self.outside.clock.monotonic()
        if left <= 0:
            self.check()
            raise StepError(504, "a step exceeded its timeout", "it exceeded its timeout", {"timeout"})
        return left

    def sleep(self, seconds: float) -> None:
        """Wait so many seconds on this thread; raises an exception at the deadline or on cancel."""
        left = self.left()
        if self.cancel.wait(min(seconds, left)):
            raise Cancelled
        if seconds > left:
            self.left()

    def wait_until(self, until: int, path: str) -> None:
        """Wait until a time (milliseconds since the epoch), without a thread if the run can be suspended."""
        clock = self.outside.clock
        wait_ms = until - clock.now()
        if wait_ms <= 0:
            return
        if wait_ms <= _WORTH_SUSPENDING_MS or self.held or not self.journal.suspendable:
            self.sleep(wait_ms / 1000)
            return
        self.journal.waiting = path, min(until, INT64.stop - 1)  # what the database can keep
        raise _Suspend(min(until, clock.now() + math.ceil(self.left() * 1000)))

    @contextlib.contextmanager
    def within(self, timeout: float, key: str) -> Iterator[None]:
        """Limit the block to so many seconds. A suspension saves the deadline, for the next block of this key."""
        clock, outer = self.outside.clock, self.step_deadline
        until = self.journal.saved.pop(key, None)
        seconds = timeout if until is None else (until - clock.now()) / 1000
        self.step_deadline = min(outer, clock.monotonic() + seconds)
        try:
            yield
        except _Suspend:
            self.journal.record(key, clock.now() + round((self.step_deadline - clock.monotonic()) * 1000))
            raise
        finally:
            self.step_deadline = outer


def evaluated(values: Mapping[str, Template], scope: Scope) -> dict[str, Any]:
    """The values of templates, by name."""
    return {name: template(scope) for name, template in values.items()}


def evaluate_response(response: Response, run: Run, scope: Scope) -> Answer:
    """The response with the values of its templates in a scope."""
    selection, body = response.selection, response.body
    scope = selection.scope(run.input.selected, scope) if selection else scope
    status, headers = response.status(scope), response.headers and evaluated(response.headers, scope)
    value = selection.body(body, run.input.selected, scope) if selection else body(scope) if body else _NO_BODY
    shares = bool(run.flow.steps) or run.budget is None or run.budget.left < run.budget.units
    return make_answer(status, headers, value, run.outside.max_result, run.flow.method, shares)


def failure_text(failure: Mapping[str, Any]) -> str:
    """A failure in one line."""
    source, body = failure.get("source"), failure.get("body")
    at = f"{failure['file']}:{failure['line']}" if failure["line"] else f"{failure['file']}: {failure['pointer']}"
    text = f"{at}: step {failure['step']}: {failure['message']}"
    text += f" ({source['file']}:{source['line']})" if source else ""
    text += f": {body.strip()}" if body else ""
    return text + (f" (attempt {failure['attempt']} of {failure['attempts']})" if failure["attempts"] > 1 else "")


_MAX_FAILURE_MESSAGE = 2000  # characters
_MAX_TRACE = 500  # lines; after these, steps inside steps are left out
_MAX_DETAILED_TRACE = 100  # lines; after these, failures of steps inside steps are shortened
_MAX_TRACED_RETRIES = 10  # failed attempts of a step, except the last one


def _beginning(value: Any, masked: Callable[[str], str], depth: int = 3) -> Any:
    """The beginning of a value, so that previews of large values are cheap; secrets are masked before the cut."""
    if isinstance(value, str):
        return masked(value[:8192])[:200]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        beginning = itertools.islice(value.items(), 8)
        return {masked(key): _beginning(item, masked, depth - 1) if depth else "…" for key, item in beginning}
    if isinstance(value, list | tuple):
        return [_beginning(item, masked, depth - 1) if depth else "…" for item in value[:5]]
    return value


class _StepRun:
    """One step of a run: its attempts, their failures, and its line in the trace."""

    def __init__(self, run: Run, step: Step, path: str) -> None:
        self.run, self.step, self.path = run, step, path
        #: Milliseconds since the epoch; before a suspension, if there was one.
        self.began: int = run.journal.saved.get(journal_key(path, "began")) or run.outside.clock.wall()
        self.failures: list[Mapping[str, Any]] = []  # of each attempt

    def value(self, scope: Scope) -> Any:
        """Run the step, and add its end to the trace; return its value."""
        run, step = self.run, self.step
        try:
            canned, value = run.canned.output(step, self.path) if run.canned is not None else (False, None)
            if not canned:
                value = self._attempts(scope)
        except _Suspend:
            if run.trace is not None:
                run.journal.record(journal_key(self.path, "began"), self.began)
            raise
        except (Answered, Cancelled) as signal:
            self.add_line("answered" if isinstance(signal, Answered) else "cancelled")
            raise
        except StepError as error:
            final = isinstance(error, _Signal)
            if final or not self.failures:
                self._add_failure(error, len(self.failures) + 1)
            try:
                if step.on_error is not None and not final:
                    return self._value_instead(step.on_error, error, scope)
                if error.detail is not None and not final:
                    error.detail, error.args = f'step "{step.name}": {error.detail}', (f"step {self.path}: {error}",)
                raise
            finally:
                self.add_line("failed")
        self.add_line("finished", run.journal.record(self.path, value) if step.save else None, value)
        return value

    def _attempts(self, scope: Scope) -> Any:
        """The value of the first attempt that succeeds. An attempt that comes further than those before counts as 1."""
        run, step, path, retry = self.run, self.step, self.path, self.step.retry
        run.reached.pop(path, None)  # of an earlier attempt of a step around this one
        attempt, before = run.journal.saved.get(journal_key(path, "failed"), 0), None
        while True:
            attempt += 1
            try:
                with run.within(step.timeout, journal_key(path, "deadline")) if step.timeout else _UNBOUND:
                    if step.kind.effect:
                        run.journal.barrier()
                    return step.run(run, scope, path)
            except _Signal:
                raise
            except (Exception, SystemExit) as caught:
                error = _as_step_error(caught)
                if run.reached.get(path) is not before:
                    attempt, before = 1, run.reached[path]
                self._add_failure(error, attempt)
                again = attempt < retry.attempts and bool(error.safe if retry.on is None else retry.on & error.kinds)
                if again:
                    run.check()
                    asked = header_value(error.answer.headers, "retry-after") if error.answer else None
                    pause = max(retry.pause(attempt), parse_retry_after(asked, run.outside.clock.wall()))
                if not again or pause > run.left():  # the failure now says more than a timeout later
                    raise error from error.__cause__
            if step.kind.nests:
                run.journal.barrier()
                run.journal.forget(f"{path}/")
                run.journal.record(journal_key(path, "failed"), attempt)
            run.sleep(pause)

    def _value_instead(self, on_error: Template, error: StepError, scope: Scope) -> Any:
        """The value instead of that of a failed step. It is saved: a resumed run must not act and fail again."""
        run = self.run
        words = "flow %s: continues after a failure: %s"
        log.info(words, run.flow.name, failure_text(self.failures[-1]), extra=run.about)
        scope["error"] = _error_value(error, run.outside.masked)
        try:
            value = on_error(scope)
        except ExpressionError as caught:
            second = _as_step_error(caught)
            self._add_failure(second, len(self.failures))
            raise second from caught
        run.journal.record(journal_key(self.path, "error"), scope["error"])
        run.journal.record(self.path, value)
        return value

    def fail(self, caught: BaseException) -> StepError:
        """Add a failure outside attempts to the trace, and return it."""
        error = _as_step_error(caught)
        self._add_failure(error, 1)
        self.add_line("failed")
        return error

    def _add_failure(self, error: StepError, attempt: int) -> None:
        """Add an attempt's failure, for the flow's author: what failed, where, in which attempt.

        The failure of a step inside this one is also the failure of this one.
        """
        run, step = self.run, self.step
        if not error.failure:
            error.failure = {
                "message": run.outside.masked(str(error))[:_MAX_FAILURE_MESSAGE],
                "kind": error.kind,
                "step": self.path,
                "file": run.flow.source,
                "pointer": step.place,
                "line": None,
                "attempt": attempt,
                "attempts": step.retry.attempts,
            }
            optional("astera_lite_advice:explain", error.failure, error.__cause__ or error, run, step)
        self.failures.append(error.failure)

    def add_line(self, state: str, size: int | None = None, value: Any = None) -> None:
        """Add a line to the trace, which people see as the steps of a job."""
        run, step, trace, inside = self.run, self.step, self.run.trace, "/" in self.path
        if trace is None or (inside and len(trace) >= _MAX_TRACE):
            return
        if (run.journal.saved or run.journal.waits) and any(line["path"] == self.path for line in trace):
            return  # added before the run was suspended
        masked = run.outside.masked
        # Headers would fill the preview. A value from `onError` may be anything.
        answers = step.kind.answers and isinstance(value, dict) and "body" in value and type(value.get("status")) is int
        preview = value.get("items", value["body"]) if answers else value
        line: dict[str, Any] = {
            "path": self.path,
            "name": step.name,
            "kind": step.kind_name,
            "state": state,
            "startedAt": timestamp(self.began),
            "finishedAt": timestamp(run.outside.clock.wall()),
            "size": size,
            "preview": None if preview is None else masked(shown(_beginning(preview, masked), 200)),
        }
        if answers:
            line["status"] = value["status"]
        brief, retries = inside and len(trace) >= _MAX_DETAILED_TRACE, self.failures
        if state == "failed":
            *retries, last = self.failures
            short = {name: last[name] for name in last if name != "body"} | {"message": last["message"][:200]}
            line["error"] = short if brief else last
        if retries and not brief:
            line["retries"] = retries[-_MAX_TRACED_RETRIES:]
        trace.append(line)


def run_steps(steps: Sequence[Step], run: Run, scope: Scope, prefix: str) -> Any:
    """Run steps in order, and put their values into the scope; return the value of the last one that ran."""
    value, saved = None, run.journal.saved
    for position, step in enumerate(steps):
        path = prefix + step.name
        if not prefix:
            run.progress = Progress(step.name, position, len(steps))
        this = _StepRun(run, step, path)
        if path in saved:
            value = scope[step.name] = saved[path]
            scope["error"] = saved.get(journal_key(path, "error"), scope["error"])
            this.add_line("resumed", value=value)
            continue
        run.check()
        try:
            skipped = step.when is not None and not run.evaluated_once(step.when, scope, journal_key(path, "when"))
        except ExpressionError as caught:
            raise this.fail(caught) from caught
        if skipped:
            scope[step.name] = None
            this.add_line("skipped")
        else:
            value = scope[step.name] = this.value(scope)
    return value


#: What stands in a trace for the making of the response.
_RESPONDING = Step(
    "response", "response", StepKind(Value(), None, ""), lambda run, scope, path: None, False, place="/response"
)


def response_of(flow: Flow, run: Run, scope: Scope, value: Any, prefix: str) -> Answer:
    """The first response whose `when` is true; a flow without responses responds with `value`."""
    try:
        if not flow.responses:
            return make_answer(200, {}, value, run.outside.max_result)
        for response in flow.responses:
            if response.when is None or response.when(scope):
                return evaluate_response(response, run, scope)
        raise ExpressionError("/response: no `when` was true: add a last response without `when`")
    except Exception as caught:
        error = _StepRun(run, _RESPONDING, f"{prefix}response").fail(caught)
        raise error from error.__cause__


def failed_run(run: Run, caught: BaseException) -> Outcome:
    """The outcome of a failed run: what the client may see, and the reason for the log.

    A failure between steps is in the trace as that of the step that was about to begin.
    """
    error = _as_step_error(caught)
    if not error.failure:
        name = (run.progress.step or "").partition("/")[0]
        step = next((step for step in run.flow.steps if step.name == name), _RESPONDING)
        _StepRun(run, step, step.name).fail(error)
    reason = failure_text(error.failure)
    if error.detail is not None:
        code = "timeout" if error.status == 504 and not isinstance(error, FlowFailure) else "failed"
        return Outcome.failed(code, error.status, run.outside.masked(error.detail), reason, error.headers)
    if not isinstance(error.__cause__, AsteraError):
        log.debug("flow %s", run.flow.name, exc_info=error.__cause__, extra=run.about)
    detail = "The flow failed. Look up `requestId` in the server's log for the reason."
    return Outcome.failed("failed", 500, detail, reason, requestId=run.input.request["id"])


_CANCELLED = Outcome.failed("cancelled", 409, "The job was cancelled.")


def run_flow(run: Run) -> Outcome | int:
    """Run a flow to its outcome, or until it waits: the time until which it does, in milliseconds since the epoch.

    All failures are caught here, but for BudgetExceeded if the run has a budget, and KeyboardInterrupt on the main
    thread.
    """
    flow = run.flow
    scope = run.scope()
    try:
        value = run_steps(flow.steps, run, scope, "")
        if flow.steps:
            run.progress = Progress(None, len(flow.steps), len(flow.steps))
        return Outcome(response_of(flow, run, scope, value, ""))
    except Answered as answered:
        return Outcome(answered.answer)
    except _Suspend as suspend:
        return suspend.until
    except Cancelled:
        return _CANCELLED
    except BudgetExceeded:
        raise
    except BaseException as error:  # sys.exit() in a step, or a cancelled future, must not end a thread of the pool
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return failed_run(run, error)


# --- step kinds -------------------------------------------------------------------------------------------------------


def check_whens(build: Build, whens: Sequence[Template | None], place: str) -> None:
    """Report a fault for each of several alternatives, except the last one, that has no condition."""
    for position, when in enumerate(whens[:-1]):
        if when is None:
            build.fault(f"{place}/{position}", "has no `when`, so nothing after it is ever reached: put it last")


def _check_header(reserved: Mapping[str, str], build: Build, name: str, names: Collection[str]) -> str:
    """What is wrong with the name of a header that a flow sets, or "" if nothing is; `reserved` ones have reasons."""
    first = next(each for each in names if each.lower() == name.lower())
    if not TOKEN_TEXT.fullmatch(name):
        return "is not the name of a header"
    if reason := reserved.get(name.lower()):
        return f"{reason}: leave it out"
    return f"is the same header as {first}: leave one of them out" if first != name else ""


def _headers(reserved: Mapping[str, str]) -> MapOf:
    return MapOf(Value(), default={}, check=partial(_check_header, reserved))


#: Headers of responses that only the server sets: framing (RFC 9112), hop-by-hop headers, and our own.
_SET_BY_SERVER = dict.fromkeys(
    (
        "connection content-length date keep-alive proxy-authenticate te trailer transfer-encoding "
        "upgrade job-status x-request-id content-security-policy x-content-type-options"
    ).split(),
    "is set by the server",
)


def _check_required_headers(build: Build, given: Mapping[str, Any], place: str) -> None:
    """Report a fault if a constant status lacks a header that it requires."""
    if given["status"].constant:
        try:
            with_owed(given["status"]({}), tuple((name, "") for name in given["headers"]), build.method)
        except ValueError as error:
            build.fault(f"{place}/status", str(error))


def _make_response(build: Build, given: dict[str, Any], place: str) -> Response:
    status, body = given["status"], given.get("body")
    _check_required_headers(build, given, place)
    bodiless = status.constant and status({}) in _WITHOUT_BODY
    if bodiless and body is not None and not (body.constant and body({}) is None):
        build.fault(f"{place}/body", f"a response of status {status({})} has no body: leave it out")
    selects = any(given.get(name) for name in ("page", "filter", "sort"))
    selection = wing("astera_lite_requests:make_selection")(build, given, place) if selects else None
    return Response(given.get("when"), status, given["headers"], body, selection)


_STATUS = partial(Number, 200, 599, "a status")
_FIELD = Text("the name of a field", r"(?!.*\$\{)(?s:.+)")
_ANSWER: dict[str, Member] = {
    "status": Value(_STATUS(), default=200),
    "headers": _headers(_SET_BY_SERVER),
    "body": Value(),
}
_RESPONSE = Table(
    {
        "when": Condition(),
        "page": Elsewhere("astera_lite_requests:PAGE"),
        "filter": ListOf(_FIELD),
        "sort": Either(Flag(), ListOf(_FIELD)),
        **_ANSWER,
    },
    _make_response,
)


def _make_set(build: Build, template: Template, place: str) -> Runner:
    return lambda run, scope, path: template(scope)


def _make_respond(build: Build, response: Response, place: str) -> Runner:
    def respond(run: Run, scope: Scope, path: str) -> NoReturn:
        raise Answered(evaluate_response(response, run, scope))

    return respond


_FAIL_STATUS = Number(400, 599, "a status")
_FAIL = {
    "status": Value(_FAIL_STATUS, default=500),
    "message": Value(required=True),
    "headers": _headers(_SET_BY_SERVER | {"content-type": "is application/problem+json here"}),
}


def _make_fail(build: Build, given: dict[str, Any], place: str) -> Runner:
    _check_required_headers(build, given, place)

    def fail(run: Run, scope: Scope, path: str) -> NoReturn:
        text = as_text(given["message"](scope)).encode("utf-8", "replace").decode()  # a lone surrogate cannot be sent
        headers = _mapped(evaluated(given["headers"], scope), run.outside.masked)
        try:
            status = _FAIL_STATUS.parse(given["status"](scope))
            answer = make_answer(status, headers, _NO_BODY, 0)
        except ValueError as error:
            raise ExpressionError(f"{place}/status: {error}") from None
        raise FlowFailure(status, text, answer.headers)

    return fail


def _make_wait(build: Build, given: Any, place: str) -> Runner:
    if not isinstance(given, Template):  # the runner of `until`
        return cast(Runner, given)

    def wait(run: Run, scope: Scope, path: str) -> None:
        end = run.journal.waits.get(path)
        try:
            if end is None:
                end = run.outside.clock.now() + round(parse_duration(given(scope)) * 1000)
        except ValueError as error:
            raise ExpressionError(f"{place}: {error}") from None
        run.wait_until(end, path)

    return wait


HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_IDEMPOTENT = frozenset({"GET", "HEAD", "PUT", "DELETE", "OPTIONS"})  # RFC 9110, section 9.2.2
_WORTH_RETRYING = frozenset({"transport", "timeout", "408", "429", "500", "502", "503", "504"})
_TRUSTED = frozenset({"env", "secrets"})  # names whose values the operator chooses
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_REDIRECTS = 5
_AUTHORITY = re.compile(r"https?://[^/?#]+[/?#]", re.IGNORECASE)
#: The beginning of a URL up to a character after its host. NUL stands for an expression; the first may be a scheme.
_AFTER_HOST = re.compile(r"(?:https?://|\0://)[^/?#]+[/?#]|\0(?!://)[^/?#]*[/?#]", re.IGNORECASE)

_IN_URLS = "".join(map(chr, range(0x21, 0x7F)))


def with_query(url: str, values: Any) -> str:
    """The URL with an object added to its query."""
    query = encode_query(values, urllib.parse.quote)  # %20 for a blank: some servers take + for a plus
    return f"{url}{'&' if '?' in url else '?'}{query}" if query else url


def _encoded_address(text: str) -> str:
    """An address, in which characters that no URL may have are percent-encoded, as by browsers.

    If it comes from a header, it was read as Latin-1, although most servers send UTF-8.
    """
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode()
    return urllib.parse.quote(text.strip(), safe=_IN_URLS, errors="replace")


class OutgoingRequest:
    """A request of an `http` step. `fixed`: the flow's author chose its address, to which no policy applies."""

    def __init__(self, method: str, url: str, fixed: bool) -> None:
        self.method, self.url, self.fixed = method, url, fixed
        self.headers: dict[str, str] = {}  # the names are in title case, as urllib sends them
        self.body: bytes | None = None

    def add_headers(self, values: Mapping[str, Any]) -> None:
        """Set headers, which replace those of the same name. Null leaves a header out."""
        self.headers |= {name.title(): as_text(value) for name, value in values.items() if value is not None}

    def set_body(self, kind: str, value: Any) -> None:
        """Set the body and its Content-Type; `kind` is the member `json`, `form` or `body` of the step."""
        if kind == "json":
            check_written(value)
            self.body, media = to_json(value).encode(), CONTENT_TYPES["json"]
        elif kind == "form":
            self.body, media = encode_query(value).encode(), CONTENT_TYPES["form"]
        else:
            self.body = as_bytes(value)
            media = CONTENT_TYPES["binary"] if type(value) is bytes else "text/plain; charset=utf-8"
        self.headers["Content-Type"] = media


def http_failure(
    method: str, status: int, detail: str, *kinds: str, answer: Answer | None = None, more: str = ""
) -> StepError:
    """A failure of an `http` step; `more` is only for the flow's author. `method` is that before any redirect."""
    found = {*kinds, *(f"{kind[0]}xx" for kind in kinds if kind.isdigit())}
    safe = method in _IDEMPOTENT and bool(found & _WORTH_RETRYING)
    return StepError(status, detail, detail + more, found, answer, safe)


def unexpected_answer(method: str, answer: Answer) -> StepError:
    """The failure of an `http` step whose API responds with an unexpected status."""
    return http_failure(method, 502, f"the API it calls answered {answer.code}", str(answer.code), answer=answer)


#: A compiled URL: gives the URL, and whether the flow's author chose its scheme, host and port.
Address = Callable[[Scope], tuple[str, bool]]


def _address(parts: Sequence[tuple[str | Template, bool]], scope: Scope) -> tuple[str, bool]:
    """The value of an Address. Each part comes with whether its value is percent-encoded."""
    url, fixed = "", True
    for part, encoded in parts:
        if isinstance(part, str):
            url += part
            continue
        fixed = fixed and (part.names <= _TRUSTED or _AUTHORITY.match(url) is not None)
        value = as_text(part(scope))
        url += urllib.parse.quote(value, safe="") if encoded else value
    return url, fixed


class Url(Text):
    """A URL; values after the host are percent-encoded, so that they cannot change other parts of it."""

    before = ""  # what stands before the text, as in _AFTER_HOST

    def read(self, build: Build, value: Any, place: str) -> Address:
        parts: list[tuple[str | Template, bool]] = []
        before = self.before
        try:
            for is_code, text in self.split(self.parse(value)):
                part = build.template(f"${{{text}}}", place) if is_code else text
                parts.append((part, _AFTER_HOST.match(before) is not None))
                before += "\0" if is_code else text
        except ValueError as error:
            build.fault(place, str(error))
        return partial(_address, parts)

    def split(self, url: str) -> list[tuple[bool, str]]:
        """The parts of the text, as of `split_template`; raises ValueError if they cannot be a URL."""
        parts = split_template(url)
        if parts and not parts[0][0] and not re.match("https?://", url, re.IGNORECASE):
            raise ValueError(f"{shown(url)} must begin with http:// or https://")
        if not any(is_code for is_code, _ in parts):
            try:
                parse_target(url)
            except ValueError as error:
                raise ValueError(f"the URL {error}") from None
        return parts


class HttpCall:
    """A compiled `http` step, which makes requests and reads responses."""

    def __init__(self, build: Build, given: Mapping[str, Any], place: str) -> None:
        self.given, self.place = given, place
        bodies = [name for name in ("json", "form", "body") if name in given]
        if len(bodies) > 1:
            build.fault(place, f"has {' and '.join(bodies)}: a step has one of json, form, body")
        self._body = bodies[0] if bodies else ""
        self.method = given.get("method", "POST" if self._body else "GET")
        self._follow = given.get("follow", self.method in ("GET", "HEAD"))

    def __call__(self, run: Run, scope: Scope, path: str) -> dict[str, Any]:
        return self.send(run, self.request(run, scope), self.limit(run))[0]

    def limit(self, run: Run) -> int:
        """The greatest number of bytes of all responses together."""
        most = run.outside.max_step_response
        return min(self.given.get("maxResponse") or most, most)

    def begin(self, run: Run, scope: Scope) -> OutgoingRequest:
        """A request to the address of the step, with the headers that every request has."""
        request = OutgoingRequest(self.method, *self.given["url"](scope))
        request.headers = {"User-Agent": f"astera-lite/{__version__}", "Accept": "application/json, */*;q=0.5"}
        return request

    def request(self, run: Run, scope: Scope) -> OutgoingRequest:
        """The request of the step in a scope."""
        request = self.begin(run, scope)
        request.url = with_query(_encoded_address(request.url), evaluated(self.given["query"], scope))
        value = self.given[self._body](scope) if self._body else b""
        if self._body:
            request.set_body(self._body, value)
        request.add_headers(evaluated(self.given["headers"], scope))
        if type(value) is not bytes:
            request.headers["Content-Type"] = _CHARSET.sub("; charset=utf-8", request.headers["Content-Type"])
        if run.input.trace is not None and "Traceparent" not in request.headers:
            request.add_headers(run.input.trace.headers() | request.headers)
        if {".", ".."} & set(request.url.partition("?")[0].split("/")):
            message = "a value makes a segment . or .., which servers take for another path"
            raise ExpressionError(f"{self.place}/url: {message}")
        return request

    def send(self, run: Run, request: OutgoingRequest, max_bytes: int) -> tuple[dict[str, Any], int]:
        """Call the API; return an object of status, headers and body, and the size of the body in bytes."""
        timeout = self.given.get("timeout")
        with run.within(timeout, "") if timeout else _UNBOUND:
            answer = self._fetch(run, request, max_bytes)
        if not {str(answer.code), f"{answer.code // 100}xx"} & set(map(str, self.given["expect"])):
            raise unexpected_answer(self.method, answer)
        try:
            body = read_answer(answer)
        except ValueError as error:
            raise http_failure(self.method, 502, f"the API it calls answered {error}", "body", answer=answer) from None
        return {"status": answer.code, "headers": joined_headers(answer.headers), "body": body}, len(answer.body)

    def _fetch(self, run: Run, request: OutgoingRequest, max_bytes: int) -> Answer:
        """The response behind all redirects."""
        for _ in range(_MAX_REDIRECTS + 1):
            answer = self.exchange(run, request, max_bytes)
            location = header_value(answer.headers, "location")
            if not self._follow or answer.code not in _REDIRECTS or not location:
                return answer
            to_get = request.method != "HEAD" if answer.code == 303 else request.method == "POST"
            if to_get and answer.code in (301, 302, 303):
                request.method, request.body = "GET", None
                request.headers = {name: text for name, text in request.headers.items() if name != "Content-Type"}
            self.go_to_next(request, location)
        raise http_failure(self.method, 502, "the API it calls redirects without end", "address")

    def go_to_next(self, request: OutgoingRequest, url: str) -> None:
        """Turn a request to the address that the API names, which may be relative. Raises StepError.

        Credentials do not go to another origin. A body, which may hold some, goes there only from http to https.
        """
        try:
            url = urllib.parse.urldefrag(urllib.parse.urljoin(request.url, _encoded_address(url))).url
            here, there = urllib.parse.urlsplit(request.url), urllib.parse.urlsplit(url)
            other_origin = here[:2] != there[:2]
            if other_origin and request.body is not None and (here.hostname, "https") != (there.hostname, there.scheme):
                raise ValueError("another server must not get the body")
        except ValueError as error:
            detail = f"the address that the API names next is refused: {error}"
            raise http_failure(self.method, 502, detail, "address") from None
        if other_origin:
            request.fixed = False
            kept = ("Accept", "User-Agent", "Content-Type")
            request.headers = {name: text for name, text in request.headers.items() if name in kept}
        request.url = url

    def exchange(self, run: Run, request: OutgoingRequest, max_bytes: int) -> Answer:
        """The response to one request; raises StepError if there is none."""
        policy = None if request.fixed else run.outside.policy
        try:
            return fetch(request.method, request.url, request.headers, request.body, run.left(), max_bytes, policy)
        except OutboundError as error:
            run.check()
            status = 504 if error.kind == "timeout" else 502
            said, colon, more = str(error).partition(": ")  # more may name hosts of the inner network
            detail = f"the API it calls gave no answer: {said}"
            raise http_failure(self.method, status, detail, error.kind, more=colon + more) from None


_HTTP = {
    "method": OneOf(*HTTP_METHODS),
    "url": Url("an http or https URL"),
    "connection": Elsewhere("astera_lite_requests:CONNECTION"),
    "path": Elsewhere("astera_lite_requests:PATH"),
    "query": MapOf(Value(), default={}),
    "headers": _headers(dict.fromkeys(("connection", "content-length", "transfer-encoding"), "follows from the body")),
    "json": Value(),
    "form": Value(Member(holds=lambda value: isinstance(value, dict), word="an object", json={"type": "object"})),
    "body": Value(),
    "timeout": Duration(),
    "expect": ListOf(_STATUS_WORD, default=["2xx"], least=1, lone=True),
    "follow": Flag(),
    "maxResponse": Size(),
    "pages": Elsewhere("astera_lite_requests:PAGES"),
    "until": Condition(names=("answer",)),
    "every": Duration(),
}


def _make_http(build: Build, given: dict[str, Any], place: str) -> Runner:
    rare = given.keys() & {"connection", "path", "pages", "until", "every"}
    call: Runner = (wing("astera_lite_requests:make_http") if rare else HttpCall)(build, given, place)
    return call


class StepName(Text):
    """A name that later expressions use."""

    def read(self, build: Build, value: Any, place: str) -> str:
        if isinstance(value, str) and len(value) > 64:
            build.fault(place, f"{shown(value)} has {len(value)} characters: at most 64")
        elif not isinstance(value, str) or not STEP_NAME.fullmatch(value) or keyword.iskeyword(value):
            build.fault(place, f"{shown(value)} must be a word of letters, digits and _ that expressions can use")
        elif value in BASE_NAMES or value in FUNCTIONS or value in _JSON_NAMES:
            build.fault(place, f'"{value}" has a meaning in expressions already: choose another name')
        elif value in build.names and build.names[value] is not _ERROR_SCHEMA:  # a flow may have a step "error"
            what = "there is another step" if value in build.step_names else "something here has the name already,"
            build.fault(place, f'{what} "{value}": names are unique')
        return str(value)


#: All kinds of steps: each a StepKind, or the name of one in a wing.
STEP_KINDS: dict[str, Member] = {
    "http": StepKind(
        Table(_HTTP, short="url", choice=("url", "connection")), _make_http, "calls an API", effect=True, answers=True
    ),
    "python": Elsewhere("astera_lite_python:PYTHON"),
    "sql": Elsewhere("astera_lite_steps:SQL"),
    "run": Elsewhere("astera_lite_python:PROGRAM"),
    "set": StepKind(Value(), _make_set, "computes a value", light=True),
    "each": Elsewhere("astera_lite_steps:EACH"),
    "choose": Elsewhere("astera_lite_steps:CHOOSE"),
    "call": Elsewhere("astera_lite_steps:CALL"),
    "wait": StepKind(
        Either(Value(Duration()), Elsewhere("astera_lite_steps:UNTIL")),
        _make_wait,
        "waits for a duration, or until a time",
    ),
    "respond": StepKind(
        Table(_ANSWER, _make_response), _make_respond, "responds at once; the steps after it do not run", light=True
    ),
    "fail": StepKind(Table(_FAIL), _make_fail, "ends the flow with an error", light=True),
}


# --- flow files -------------------------------------------------------------------------------------------------------

_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+")
_SIZED = (str, list)  # types of values that have a length
_PARAMETER_SEGMENT = re.compile(r"\{([A-Za-z][A-Za-z0-9_-]*)\}")


class Rule(Member):
    """A rule of a schema, which limits values; as a member of a flow file, the limit."""

    kind: ValueType  # of the limit
    applies: Collection[type]  # types of the values that it limits; empty: all
    allows: Callable[[Any, Any], bool]  # (value, limit)
    refusal: str
    make: Callable[[Any], Any] | None  # compiles the limit

    def __init__(self, kind: str, applies: Collection[type], allows: Any, refusal: str, make: Any = None) -> None:
        super().__init__(kind=VALUE_TYPES[kind], applies=applies, allows=allows, refusal=refusal, make=make)
        self.word, self.json = self.kind.words.partition(" such")[0], {"type": kind}

    def parse(self, value: Any) -> Any:
        if not self.kind.holds(value):
            raise ValueError(f"must be {self.kind.words}, not {shown(value)}")
        if self.applies is _SIZED and value < 0:
            raise ValueError(f"must be 0 or more, not {shown(value)}")
        return self.make(value) if self.make else value

    def fault(self, value: Any, limit: Any) -> str | None:
        """What is wrong with a value, or None."""
        if (self.applies and type(value) not in self.applies) or self.allows(value, limit):
            return None
        return self.refusal.format(", ".join(map(shown, limit)) if type(limit) is list else limit)


def _is_one_of(value: Any, allowed: list[Any]) -> bool:
    """Whether a value is in an enum. The list itself finds a text: a body may have thousands."""
    return value in allowed and (type(value) is str or any(equal(value, one) for one in allowed))


_PATTERN = late("astera_lite_requests:Pattern")
SCHEMA_RULES: dict[str, Rule] = {
    "enum": Rule("array", (), _is_one_of, "must be one of {}"),
    "pattern": Rule("string", (str,), lambda text, limit: limit.search(text), "must match the pattern {}", _PATTERN),
    "minimum": Rule("number", (int, float), operator.ge, "must be at least {}"),
    "maximum": Rule("number", (int, float), operator.le, "must be at most {}"),
    "minLength": Rule("integer", _SIZED, lambda value, limit: len(value) >= limit, "must have at least {} characters"),
    "maxLength": Rule("integer", _SIZED, lambda value, limit: len(value) <= limit, "must have at most {} characters"),
    "minItems": Rule("integer", _SIZED, lambda value, limit: len(value) >= limit, "must have at least {} items"),
    "maxItems": Rule("integer", _SIZED, lambda value, limit: len(value) <= limit, "must have at most {} items"),
}
#: Members that a schema and a parameter have in common.
_OF_VALUES: dict[str, Member] = {"default": Member(), **SCHEMA_RULES, "description": Text(), "example": Member()}


def _make_schema(build: Build, given: dict[str, Any], place: str) -> Schema:
    rules = [(SCHEMA_RULES[name], given[name]) for name in given if name in SCHEMA_RULES]
    if "pattern" in given:
        rules.insert(0, (SCHEMA_RULES["maxLength"], given["pattern"].longest))
    properties, required = given.get("properties", {}), given.get("required", ())
    for name in set(required) - set(properties) if properties else ():
        near = suggest(name, properties)
        build.fault(f"{place}/required", f"names {shown(name)}, which properties lacks{near}")
    additional, kinds = given.get("additionalProperties", True), tuple(given.get("type", ()))
    schema = Schema(kinds, rules, given.get("items"), properties, required, additional)
    if "default" not in given:
        return schema
    errors, default = InputErrors(), None
    with contextlib.suppress(InputError):  # there are too many
        default = schema.check(given["default"], "", errors)
    for found in errors:
        build.fault(f"{place}/default{found['name']}", f"{found['message']}, not {shown(given['default'])}")
    return schema._replace(has_default=True, default=default)


VALUE_SCHEMA = Table({}, _make_schema, word="a schema", name="value")
_SCHEMA: dict[str, Member] = {
    "type": ListOf(OneOf(*VALUE_TYPES), lone=True),
    "items": VALUE_SCHEMA,
    "properties": MapOf(VALUE_SCHEMA),
    "required": ListOf(Text("the name of a member")),
    "additionalProperties": Either(Flag(), VALUE_SCHEMA),
    **_OF_VALUES,
}
VALUE_SCHEMA.members = _SCHEMA  # which refers to VALUE_SCHEMA


def _make_body(build: Build, given: dict[str, Any], place: str) -> tuple[Schema, bool]:
    """The schema of a request's body, and whether a request must have one; `required` may also list members."""
    required = given.pop("required", True)
    schema = _make_schema(build, given | ({"required": required} if isinstance(required, list) else {}), place)
    return schema, bool(required)


_BODY = _SCHEMA | {"required": Either(Flag(), _SCHEMA["required"])}
_PARAMETER: dict[str, Member] = {
    "in": OneOf("path", "query", "header", required=True),
    "required": Flag(),
    "type": OneOf(*PARAMETER_TYPES, "array", default="string"),
    "items": VALUE_SCHEMA,
    **_OF_VALUES,
}


def _make_parameter(build: Build, given: dict[str, Any], place: str) -> Parameter:
    kind, where = given["type"], given["in"]
    items = given.get("items", Schema(("string",)))
    schema = _make_schema(build, given | {"type": [kind], "items": items, "required": ()}, place)
    item_kind = (items.types or ("string",))[0] if kind == "array" else kind
    if item_kind not in PARAMETER_TYPES:
        build.fault(f"{place}/items/type", f"{shown(item_kind)} is not one of {', '.join(PARAMETER_TYPES)}")
    required = given.get("required", where == "path")
    if required and schema.has_default:
        cure = 'leave out "required" or "default"'
        build.fault(f"{place}/default", f"a required parameter has no use for a default: {cure}")
    if where == "path" and not required:
        build.fault(f"{place}/required", "a path parameter is always there: leave it out")
    return Parameter("", where, VALUE_TYPES[item_kind].parse, kind == "array", required, schema)


_PARAMETER_TABLE = Table(_PARAMETER, _make_parameter)


def _parse_resource(path: Any) -> str:
    if not isinstance(path, str) or not path.startswith("/") or path == "/":
        raise ValueError(f"{shown(path)} must begin with / and name something, such as /weather/{{city}}")
    for segment in path.split("/")[1:]:
        if not segment:
            raise ValueError("has an empty segment: write it without // and without a / at the end")
        if segment in (".", ".."):
            raise ValueError("must not have . or .. as a segment: clients remove them")
        if not (_SEGMENT.fullmatch(segment) or _PARAMETER_SEGMENT.fullmatch(segment)):
            cure = optional("astera_lite_advice:on_segment", segment)
            raise ValueError(f"{shown(segment)} is neither a plain path segment nor a {{parameter}}{cure}")
    return path


def _parse_media(value: Any) -> str:
    media = CONTENT_TYPES.get(value, value.lower()) if isinstance(value, str) else ""
    if "/" not in media:
        raise ValueError(f"{shown(value)} is not a media type{suggest(str(value), CONTENT_TYPES)}")
    return media


_PATH_JSON = {"type": "string", "pattern": "^/."}
_REQUEST = {
    "method": OneOf(*FLOW_METHODS, required=True),
    "resource": Text("a path such as /weather/{city}", json=_PATH_JSON, parse=_parse_resource, required=True),
    "processing": ListOf(OneOf(*MODES), default=["synchronous"], least=1, lone=True),
    "parameters": MapOf(_PARAMETER_TABLE, default={}),
    "strict": Flag(default=False),
    "body": Table(_BODY, _make_body),
    "contentTypes": ListOf(Text(f"{', '.join(CONTENT_TYPES)} or a media type", parse=_parse_media), least=1),
}


def _make_request(build: Build, given: dict[str, Any], place: str) -> dict[str, Any]:
    resource, body = given["resource"], given.get("body")
    in_path = [match[1] for segment in resource.split("/") if (match := _PARAMETER_SEGMENT.fullmatch(segment))]
    for name in {name for name in in_path if in_path.count(name) > 1}:
        build.fault(f"{place}/resource", f"has {{{name}}} twice")
    undescribed = [name for name in in_path if name not in given["parameters"]]
    items = {name: _PARAMETER_TABLE.read(build, {"in": "path"}, place) for name in undescribed} | given["parameters"]
    for name, item in items.items():
        at = f"{place}/parameters/{pointer(name)}"
        if item.where == "path" and name not in in_path:
            build.fault(at, f'is in "path", but the resource has no {{{name}}}{suggest(name, in_path)}')
        elif item.where != "path" and name in in_path:
            build.fault(at, f'stands in the resource as {{{name}}}: write "in": "path"')
        elif item.where == "header" and not TOKEN_TEXT.fullmatch(name):
            build.fault(at, "is not the name of a header")
        elif item.where == "query" and name == "callbackUrl":
            build.fault(at, "is a parameter of every asynchronous request and does not reach the flow: rename it")
    if body is not None and given["method"] == "GET":
        build.fault(f"{place}/body", "a GET request has no body: use parameters, or another method")
    build.method = given["method"]
    build.add_name("params", _object_schema({name: item.schema for name, item in items.items()}))
    headers = (*(name.lower() for name, item in items.items() if item.where == "header"), "content-type")
    known = Schema(properties=dict.fromkeys(headers, Schema()), additional=False)
    seen = {"headers": known, "body": body[0] if body else Schema()}
    build.add_name("request", _object_schema({**_REQUEST_SCHEMA.properties, **seen}))
    return {  # members of Flow
        "method": given["method"],
        "resource": resource,
        "modes": frozenset(given["processing"]),
        "strict": given["strict"],
        "parameters": tuple(item._replace(name=name) for name, item in items.items()),
        "content_types": tuple(given.get("contentTypes", [CONTENT_TYPES["json"]] if body else [])),
        "body": body and body[0],
        "body_required": bool(body and body[1]),
        "header_names": headers,
    }


_FAILURES = ("transport", "timeout", "too_large", "body", "error", "locked", "sql", "exit")  # of all kinds of steps
_RETRY_ON = Member(
    holds=lambda value: value in _FAILURES or _is_status_word(value),
    word=f'a status such as 503 or "5xx", or one of {", ".join(_FAILURES)}',
    json=_JSON_NUMBER_OR_TEXT,
)


def _make_retry(build: Build, given: dict[str, Any], place: str) -> Retry:
    on = frozenset(map(str, given["on"])) if "on" in given else None
    return Retry(given["attempts"], given["delay"], given["backoff"], given["maxDelay"], on)


_RETRY = {
    "attempts": Number(1, 100, "a number of attempts", required=True),
    "delay": Duration(default="1s"),
    "backoff": Number(1, 10, "a factor", types=(int, float), default=2),
    "maxDelay": Duration(default="30s"),
    "on": ListOf(_RETRY_ON, least=1),
}
_OPTIONS: dict[str, Member] = {
    "name": StepName("a name that expressions can use", required=True),
    "when": Condition(),
    "timeout": Duration(),
    "retry": Table(_RETRY, _make_retry, short="attempts"),
    "onError": Value(word='"continue", or a value to use instead'),
    "description": Text(),
}


def _make_step(build: Build, given: dict[str, Any], place: str) -> Step:
    [(name, (kind, run, save))] = [item for item in given.items() if item[0] not in _OPTIONS]
    build.light = build.light and kind.light and not given.keys() & {"timeout", "retry"}
    on_error = given.get("onError")
    if on_error is not None and on_error.constant and on_error({}) == "continue":
        on_error = build.template(None, place)
    others = {option: given[option] for option in ("when", "timeout", "retry") if option in given}
    return Step(given["name"], name, kind, run, save, on_error=on_error, place=f"{place}/{name}", **others)


def step_table(kinds: Mapping[str, Member]) -> Table:
    """The table of a step of one of these kinds."""
    return Table(_OPTIONS | dict(kinds), _make_step, choice=kinds, name="step")


def _step_of_flow(build: Build, name: str, names: Collection[str]) -> str:
    known = build.step_names
    return "" if name.rpartition("/")[2] in known else f"there is no step {shown(name)}{suggest(name, known)}"


_REQUESTED = {"params": MapOf(Member(), default={}), "body": Member()}
_FAILED = {"status": _STATUS(required=True), "body": Member()}
_EXPECTED = {"status": _STATUS(default=200), "headers": MapOf(Member(), default={}), "body": Member()}
_TEST = {
    "name": Text(required=True),
    "request": Table(_REQUESTED, default={}),
    "steps": MapOf(Member(), default={}, check=_step_of_flow),
    "fails": MapOf(Either(_STATUS(), Table(_FAILED)), default={}, check=_step_of_flow),
    "response": Table(_EXPECTED, required=True),
}
_CONCURRENCY = {
    "limit": Number(1, what="a number of runs", required=True),
    "whenFull": OneOf("queue", "refuse", default="queue"),
}
FLOW = Table(
    {
        "description": Text(default=""),
        "request": Table(_REQUEST, _make_request, required=True),
        "steps": Steps(default=[], least=0),
        "response": ListOf(_RESPONSE, default=[], lone=True),
        "timeout": Duration(),
        "restart": OneOf("resume", "rerun", "fail", default="resume"),
        "concurrency": Table(_CONCURRENCY, short="limit"),
        "tests": ListOf(Table(_TEST), default=[]),
    }
)
_LIGHT_TEXT = 16 << 10  # the most characters of a light flow, with the constants in its responses
_LIGHT_STEPS = 32
_FUNCTION_NAME = late("astera_lite_embedding:function_name")  # in a flow of a program, which has the function itself


def build_flow(
    tree: Any,
    name: str,
    *,
    source: str = "",
    kinds: Mapping[str, Member] = STEP_KINDS,
    folder: str | None = None,
    connections: Collection[str] = (),
) -> Flow:
    """Check and compile the tree of a flow; raises FlowError with all faults, their places and cures.

    `source` is the name of the file, for messages. Python functions are searched for in `folder` first.
    """
    where = source or name
    build = Build(where, step_table(kinds), folder, connections)
    if not FLOW_NAME.fullmatch(name):
        cure = ", 64 at most" if len(name) > 64 else ", and begin with neither - nor _" if name[:1] in "-_" else ""
        build.fault("", f"the name {shown(name)} must consist of letters, digits, - and _{cure}")
    build.names = dict.fromkeys(BASE_NAMES) | {"request": _REQUEST_SCHEMA, "error": _ERROR_SCHEMA}
    given = FLOW.read(build, tree, "")
    if build.faults:
        raise FlowError(build.faults)
    request, responses = given["request"], given["response"]
    check_whens(build, [response.when for response in responses], "/response")
    selections = [response.selection for response in responses if response.selection]
    selection = selections and wing("astera_lite_requests:join_selections")(build, selections, request["parameters"])
    try:
        text = json.dumps(tree, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_FUNCTION_NAME)
        if re.search(_SURROGATE, text):
            build.fault("", "a string has half of a surrogate pair")
    except ValueError as error:  # in a flow of an embedding program
        build.fault("", f"is not JSON: {error}")
    if build.faults:
        raise FlowError(build.faults)
    limit = given.get("concurrency", {"limit": None, "whenFull": "queue"})
    few = len(build.step_names) <= _LIGHT_STEPS and len(text) <= _LIGHT_TEXT
    return Flow(
        name=name,
        description=given["description"],
        **request,
        steps=tuple(given["steps"]),
        responses=tuple(responses),
        selection=selection or None,
        timeout=given.get("timeout"),
        restart=given["restart"],
        limit=limit["limit"],
        when_full=limit["whenFull"],
        calls=tuple(build.calls),
        tests=given["tests"],
        tree=tree,
        text=text,
        version=int.from_bytes(hashlib.sha256(f"{name}\n{text}".encode()).digest()[:8]) >> 1,
        source=where,
        bound={},
        light=build.light and few and limit["limit"] is None,
    )


# --- deployments ------------------------------------------------------------------------------------------------------


def _route(flow: Flow) -> list[str]:
    """The segments of a flow's resource, with "" for each parameter."""
    return ["" if segment[0] == "{" else _upper_escapes(segment) for segment in flow.segments]


def _conflicts(flows: Mapping[str, Flow]) -> Iterator[tuple[Flow, str, str]]:
    """Flows that cannot be in service with the others: the flow, the place in it, and the fault."""
    claims: dict[tuple[str, ...], Flow] = {}
    for flow in flows.values():
        other = claims.setdefault((flow.method, *_route(flow)), flow)
        if other is not flow:
            claim = f'{flow.method} {flow.resource} is claimed by "{other.name}" ({other.source}) too: change one'
            yield flow, "/request/resource", claim
    if any(flow.calls for flow in flows.values()):
        yield from wing("astera_lite_steps:faulty_calls")(flows)


class Deployments:
    """The flows in service, an immutable set that is replaced as a whole, with their routes."""

    def __init__(
        self, flows: Iterable[Flow] = (), faults: Sequence[Fault] = (), previous: Mapping[str, Flow] | None = None
    ) -> None:
        """`previous` are the flows in service so far: one of them stays if its new version cannot replace it."""
        self.faults = FlowError(faults).faults  # whose texts can be sent
        self.documents: dict[Any, bytes] = {}  # made of these flows
        before, named = dict(previous or {}), {flow.name: flow for flow in flows}
        unchanged_first = sorted(named.values(), key=lambda flow: before.get(flow.name) is not flow)
        self.by_name = {flow.name: flow for flow in unchanged_first}
        while found := next(_conflicts(self.by_name), None):
            flow, place, message = found
            self.faults.append(Fault(flow.source, place, message))
            self.by_name[flow.name] = before.pop(flow.name, flow)
            if self.by_name[flow.name] is flow:
                del self.by_name[flow.name]
        self.by_version = {flow.version: flow for flow in self.by_name.values()}
        self._routes: dict[str | None, Any] = {}  # a tree by raw segments; the value of None are the flows by method
        for flow in self.by_name.values():
            node = self._routes
            for segment in _route(flow):
                node = node.setdefault(segment, {})
            node.setdefault(None, {})[flow.method] = flow

    def match(self, path: str) -> list[dict[str, Flow]]:
        """The flows by method of each resource that a raw path matches; from the left, literals before parameters."""
        nodes = [self._routes]
        for part in (_upper_escapes(path) if "%" in path else path).split("/")[1:]:
            nodes = [node[key] for node in nodes for key in ((part, "") if part else ()) if key in node]
        return [node[None] for node in nodes if node.get(None)]


CONNECTIONS_FILE = "connections.json"


def is_flow_file(name: str) -> bool:
    """Whether a file of this name is a flow; names with a leading dot belong to editors and the system."""
    return name.endswith((".json", ".toml")) and name[0] != "." and name != CONNECTIONS_FILE


def parse_flow_text(text: str, file_name: str) -> Any:
    """The tree of a flow file, JSON or TOML by its name; FlowError names line and column of an error in the syntax."""
    try:
        return wing("astera_lite_steps:from_toml")(text) if file_name.endswith(".toml") else from_json(text)
    except json.JSONDecodeError as error:
        place, message = f"line {error.lineno}, column {error.colno}", f"is not JSON: {error.msg}"
        message += optional("astera_lite_advice:on_json", error)
    except ValueError as error:
        message, _, place = str(error).removesuffix(")").partition(" (at ")
        place = place or optional("astera_lite_advice:on_twice", text, message)
    raise FlowError([Fault(file_name, place, message)])


@contextlib.contextmanager
def _faults_of(where: str) -> Iterator[None]:
    """Turn every exception into a fault of a file, so that the other files are still read."""
    try:
        yield
    except FlowError:
        raise
    except Exception as error:
        log.debug("%s", where, exc_info=True)
        reason = str(error) if isinstance(error, MissingFile) else named(error)
        raise FlowError([Fault(where, "", f"cannot be deployed: {reason}")]) from error


def _made_of_file(folder: str | os.PathLike[str], name: str, make: Callable[..., Any], *more: str) -> Any:
    """What `make(tree, *more)` makes of the tree in a file; None if the file is not there. Raises FlowError."""
    path = os.path.join(folder, name)
    try:
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # a pipe would be waited for
            raise OSError("it is not a regular file")
        text = read_text(path)
    except FileNotFoundError:
        if not os.path.islink(path):
            return None
        message = "is a link to a file that does not exist"
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 (byte {error.start}): save it with that encoding"
    except OSError as error:
        message = f"cannot be read: {reason_of(error)}"
    else:
        with _faults_of(name):
            return make(parse_flow_text(text, name), *more)
    raise FlowError([Fault(name, "", message)])


def load_connections(folder: str | os.PathLike[str], previous: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The connections of a folder's connections.json; if the file is faulty, `previous` stay in service."""
    try:
        return _made_of_file(folder, CONNECTIONS_FILE, late("astera_lite_requests:read_connections")) or {}, []
    except FlowError as error:
        return previous, error.faults


def load_flows(
    folder: str | os.PathLike[str], build: Callable[[dict[str, Any], str, str], Flow], previous: Mapping[str, Flow]
) -> tuple[list[Flow], list[Fault]]:
    """The flows of a folder, and the faults of its files; instead of a faulty file, a `previous` flow stays in service.

    `build(tree, name, file)` compiles a flow.
    """
    flows: dict[str, Flow] = {}
    faults: list[Fault] = []
    try:
        files = sorted(os.listdir(folder))
    except OSError as error:
        kept = [flow for flow in previous.values() if "." in flow.source]
        return kept, [Fault(os.fspath(folder), "", f"cannot be read: {reason_of(error)}")]
    for file in files:
        if not is_flow_file(file):
            usual = file.endswith((CONNECTIONS_FILE, ".py", "__pycache__"))
            if not usual and (reason := optional("astera_lite_advice:on_stray", folder, file)):
                faults.append(Fault(file, "", reason))
            continue
        name = os.path.splitext(file)[0]
        if name in flows:
            faults.append(Fault(file, "", f'"{name}" is deployed from {flows[name].source} already: rename one'))
            continue
        try:
            flow = _made_of_file(folder, file, build, name, file)
        except FlowError as error:
            faults += error.faults
            flow = previous.get(name)
        if flow is not None:
            flows[name] = flow
    return list(flows.values()), faults


# ======================================================================================================================
# 7 Store
# To add a column of a job: a row in new_columns() or end_columns(), and in TIMES if it is a time; the column in both
# schemas, and a script in UPGRADES of astera_lite_database and astera_lite_postgres. A field of Job is read from the
# column of its name. All SQL is in this room and in these two wings. Rows do not leave them; records do.
# ======================================================================================================================

PIECE = 256 << 10  # bytes; larger values are stored in pieces of this size
SCHEMA_VERSION = 3
APPLICATION_ID = 0x41535431  # marks the file as ours (PRAGMA application_id)

Done = Callable[[Any, AsteraError | None], None]  # (result, error)
Execute = Callable[[str, Sequence[Any]], Any]  # executes a statement, in which `?` stands for a value: the cursor
Post = Callable[[Callable[[], None]], None]  # has a function called by a certain thread


def ignore_result(result: Any, error: AsteraError | None) -> None:
    """The `done` of a write whose result nobody needs."""


class Loaded(NamedTuple):
    """A stored job with all that its run needs."""

    job: Job
    request: StoredRequest
    saved: dict[str, str]  # outputs of finished steps by path, as `to_saved` wrote them
    waits: dict[str, int]  # begun waits by path: until when
    trace: list[dict[str, Any]]  # the steps before the job was suspended
    cancelled: bool  # it is not to run again


class Claimed(NamedTuple):
    """A Running job that nobody holds. `due` is set while it waits."""

    seq: int
    due: int | None
    flow: str


class StoredResult(NamedTuple):
    """The response of a finished job."""

    answer: Answer  # without its body if that is stored in pieces
    size: int  # of the whole body

    @property
    def in_pieces(self) -> bool:
        """Whether the body is to be had from `result_pieces`."""
        return len(self.answer.body) < self.size


class Finish(NamedTuple):
    """The end of a run. `job` is the finished job; `callback` is the receiver and the body of a callback owed.

    `fenced`: nothing changes if another attempt is on record. The end of a job that no thread runs is not fenced.
    """

    job: Job
    outcome: Outcome
    trace: str | None = None
    callback: tuple[str, str] | None = None
    fenced: bool = True


class Submission(NamedTuple):
    """A new job and what is stored with it.

    If servers share a database: `owned` if the server that accepts the job also runs it; `limit` is the number of jobs
    of the flow that may be Running, if one more is refused (429).
    """

    job: Job
    request: StoredRequest
    flow_text: str
    idempotency_key: str | None = None
    fingerprint: bytes = b""
    ended: Finish | None = None  # of a job that was run before it was stored
    owned: bool = True
    limit: int | None = None


def piece_rows(key: JobKey, part: str, attempt: int, value: bytes) -> list[tuple[Any, ...]]:
    """The rows of the table `pieces` for a value; none if the value fits into its own column."""
    starts = range(0, len(value), PIECE) if len(value) > PIECE else ()
    return [(key.seq, part, attempt, n, value[at : at + PIECE]) for n, at in enumerate(starts)]


_ONLY_JSON = (("Content-Type", CONTENT_TYPES["json"]),)  # the headers of most results
_ONLY_JSON_TEXT = to_json(_ONLY_JSON)


def end_columns(end: Finish) -> dict[str, Any]:
    """The columns of the table `jobs` that are written at the end of a job."""
    job, answer = end.job, end.outcome.answer
    return {
        "status": str(job.status),
        "attempt": job.attempt,
        "started": job.started,
        "finished": job.finished,
        "expires": job.expires,
        "code": answer.code,
        "size": len(answer.body),
        "headers": _ONLY_JSON_TEXT if answer.headers == _ONLY_JSON else to_json(answer.headers),
        "error": job.error and to_json(job.error),
        "trace": end.trace,
        "result": None if len(answer.body) > PIECE else answer.body,
    }


_SAMPLE_END = Finish(Job(JobKey(0, 0), "", 0, Status.COMPLETED, 0, ""), Outcome(Answer(200)))
END_COLUMNS = tuple(end_columns(_SAMPLE_END))
_NOT_ENDED = dict.fromkeys(END_COLUMNS) | {"status": "Running", "attempt": 0}


def new_columns(new: Submission) -> dict[str, Any]:
    """The columns of the table `jobs` that are written with a new job."""
    job, (method, path, query, headers, body, trace) = new.job, new.request
    sent = {"method": method, "path": path, "query": query, "headers": headers} | ({"trace": trace} if trace else {})
    return {
        "seq": job.key.seq,
        "salt": job.key.salt,
        "flow": job.flow,
        "version": job.version,
        "created": job.created,
        "token": job.token,
        "base": job.base,
        "callback_url": job.callback and job.callback.url,
        "idempotency_key": new.idempotency_key,
        "fingerprint": new.fingerprint,
        "request": to_json(sent),
        "request_body": None if len(body) > PIECE else body,
        **(end_columns(new.ended) if new.ended else _NOT_ENDED),
    }


NEW_COLUMNS = tuple(new_columns(Submission(_SAMPLE_END.job, StoredRequest("", ""), "")))
TIMES = ("created", "started", "due", "finished", "expires")
_OF_JOB = ("salt", *Job._fields[1:-1], "callback_url")  # for the fields of Job, one for each
_AT_STATUS, _AT_ERROR, _AT_CALLBACK = Job._fields.index("status"), Job._fields.index("error"), len(_OF_JOB)
#: The columns that `read_job` takes: `seq`, those above, and those of Delivery.
JOB_COLUMNS = (
    f"seq, {', '.join(_OF_JOB)}, coalesce(c.state, 'pending'), (SELECT coalesce(max(n), 0) FROM attempts"
    " WHERE job = c.job), c.last_status, c.next, coalesce(c.body, ''), coalesce(c.attempts, 0)"
)
FROM_JOBS = " FROM jobs LEFT JOIN callbacks c ON c.job = seq"
OF_KEY = " WHERE seq = ? AND salt = ?"
_FENCE = " WHERE seq = ? AND status = 'Running' AND attempt IN (?, ?)"  # of an attempt, recorded or about to be
_SAVE_STEP = f"INSERT OR REPLACE INTO steps (job, path, until, output) SELECT ?, ?, ?, ? FROM jobs{_FENCE}"
_INSERT_JOB = f"INSERT INTO jobs ({', '.join(NEW_COLUMNS)}) VALUES "
_JOB_MARKS = f"({','.join('?' * len(NEW_COLUMNS))})"
_END_JOB = (
    f"UPDATE jobs SET {', '.join(f'{column} = ?' for column in END_COLUMNS)}, due = NULL"
    " WHERE seq = ? AND status = 'Running' AND (? OR attempt IN (?, ?))"
)
LIKELY = " AND (c.attempts = 0 OR c.last_status IS NOT NULL)"  # condition of `claim_deliveries`
INSERT_PIECE = "INSERT INTO pieces VALUES (?, ?, ?, ?, ?)"
_PROBE = "INSERT OR REPLACE INTO pieces VALUES (0, 'result', 0, 0, zeroblob(?))"  # tells whether there is room again
_UNPROBE = "DELETE FROM pieces WHERE job = 0"
_MOVE_TIMES = [  # OR FAIL, because the transaction undoes them: to undo one alone, SQLite would copy the table
    f"UPDATE OR FAIL jobs SET {', '.join(f'{column} = {column} + :by' for column in TIMES)}",
    "UPDATE OR FAIL steps SET until = until + :by WHERE until NOT NULL",
    "UPDATE OR FAIL steps SET output = CAST(output + :by AS TEXT) WHERE path LIKE '%@' AND output <> ''",  # deadlines
    "UPDATE OR FAIL callbacks SET next = next + :by WHERE next NOT NULL",
    "UPDATE OR FAIL attempts SET at = at + :by",
]
_BATCH = 512  # maximum of writes committed together; with more, the first would wait long
_RETRY_S = 0.5  # pause between attempts to write while the database cannot be written
_BUSY_MS = 1000  # wait of a write for the lock of another process
_SMALL = 16 << 10  # maximum bytes, request and result, of a job that the thread that answers requests writes itself
_QUICK_S = 0.003  # that commits may take; if they take longer, the thread commits for a hundred times as long
_FOLD_AFTER = 6000  # writes, some 5 MB of the log, after which the thread folds it into the file
_COMMIT_COSTS = 16  # writes that the log could hold instead of the pages that each commit writes again
_LOG_BYTES = 128 << 20  # of the log, at which a commit folds it, for the thread did not come to it
_PURGE_BYTES = 16 << 20  # of results deleted in one transaction; the last one may exceed this
_RESERVE = 4 << 20  # bytes of a disk (of a small one: a quarter) that are left for folding the log and for purges
_GIVE_BACK = 512  # maximum of pages that a purge returns to the system, so that no write waits long
_MINUTE_OF_SEQ = 60_000 << 12  # difference in `seq` of two jobs that were created a minute apart
#: Faults that may pass, by the beginning of SQLite's name for them: the write itself is correct and is tried again.
_PASSING = {
    "SQLITE_FULL": "the disk is full: make room",
    "SQLITE_IOERR_WRITE": "the disk is full, or a file may not grow: make room, or raise the limit",
    "SQLITE_IOERR_SHMSIZE": "the disk is full: make room",
    "SQLITE_IOERR": "the disk fails: look at the system's log",
    "SQLITE_BUSY": "the database is locked by another process: end that process",
    "SQLITE_READONLY": "the database is read-only: let this user write it and its folder",
    "SQLITE_CANTOPEN": "the database cannot be opened: let this user read and write it and its folder",
}
DAMAGED = "the database is damaged: restore a backup"
_DAMAGE = {
    "SQLITE_CORRUPT": DAMAGED,
    "SQLITE_NOTADB": "the file is not a database: restore a backup, or set `database` to another path",
}


def _words(error: Exception, table: Mapping[str, str]) -> str | None:
    """The entry of a table for an error of SQLite."""
    name = getattr(error, "sqlite_errorname", "")
    return next((words for code, words in table.items() if name.startswith(code)), None)


def store_error(error: Exception) -> StoreError:
    """An error of SQLite with its remedy, in words that reveal neither the statement nor the path."""
    if isinstance(error, StoreError):
        return error
    name = getattr(error, "sqlite_errorname", type(error).__name__)
    return StoreError(_words(error, _PASSING | _DAMAGE) or f"the database failed ({name})")


@contextlib.contextmanager
def errors_of_database(path: str) -> Iterator[None]:
    """Raise errors of SQLite as StoreError with the path."""
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {store_error(error)}") from None


def _size_of(path: str) -> int:
    with contextlib.suppress(OSError):
        return os.stat(path).st_size
    return 0


def _identity(path: str) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):  # by name only: closing an opened file would drop SQLite's locks on it
        about = os.stat(path)
        return about.st_dev, about.st_ino
    return None


class _Write(NamedTuple):
    run: Callable[[Execute], Any]
    done: Done = ignore_result
    keep: bool = False  # tried again when the disk is full or the database locked, instead of failed
    row: Collection[Any] | None = None  # of a new job; all rows of a batch are inserted together, before any `run`
    size: int | None = None  # bytes that the write adds, for which there must be room; None: few, or it makes room


def _insert_jobs(execute: Execute, rows: Sequence[Collection[Any]]) -> None:
    """Insert rows, many by one statement: for each, a thread gives the interpreter away and waits to have it back."""
    at = 0
    while at < len(rows):  # in powers of 2, which are few statements to keep; SQLite may take no more than 999 values
        some = rows[at : at + min(32, 1 << (len(rows) - at).bit_length() - 1)]
        execute(_INSERT_JOB + ", ".join([_JOB_MARKS] * len(some)), list(itertools.chain.from_iterable(some)))
        at += len(some)


def _execute(sql: str, values: Sequence[Any], execute: Execute) -> bool:
    """Whether a statement changed anything."""
    return bool(execute(sql, values).rowcount > 0)


def read_job(row: Sequence[Any]) -> Job:
    """A row that begins with JOB_COLUMNS as a record."""
    values = list(row[1 : _AT_CALLBACK + 1])
    values[0] = JobKey(*row[:2])
    values[_AT_STATUS] = Status(values[_AT_STATUS])
    values[_AT_ERROR] = values[_AT_ERROR] and json.loads(values[_AT_ERROR])
    if values[-1] is not None:
        values[-1] = Delivery(*row[_AT_CALLBACK : _AT_CALLBACK + 7])
    return Job._make(values)


def _read_request(text: str, body: bytes) -> StoredRequest:
    """The columns `request` and `request_body` as a record."""
    sent = json.loads(text)
    trace = sent.pop("trace", None)
    return StoredRequest(**sent, body=body, trace=trace and Trace(*trace))


def read_deliveries(rows: Iterable[Sequence[Any]]) -> list[tuple[Job, Delivery]]:
    """Rows of JOB_COLUMNS, `receiver` and `request` as callbacks that are owed."""
    more = [(read_job(row), row[-2], _read_request(row[-1], b"").trace) for row in rows]
    return [(job, job.callback._replace(receiver=host, trace=trace)) for job, host, trace in more if job.callback]


def find_key(flow: str, token: str, key: str, fingerprint: bytes, now: int, execute: Execute) -> Job | Conflict | None:
    """The job that has an idempotency key, or Conflict if its request was another one; None if the key is free."""
    row = execute(
        f"SELECT {JOB_COLUMNS}, fingerprint{FROM_JOBS}"
        " WHERE flow = ? AND token = ? AND idempotency_key = ? AND (expires IS NULL OR expires > ?)",
        (flow, token, key, now),
    ).fetchone()
    if row is not None and row[-1] != fingerprint:
        return Conflict("This Idempotency-Key was used with another request: use a new key for a new request.", 422)
    return row and read_job(row)


def _forget(execute: Execute, seqs: Collection[int]) -> None:
    for key in ("pieces.job", "steps.job", "callbacks.job", "attempts.job", "jobs.seq"):
        execute(f"DELETE FROM {key.partition('.')[0]} WHERE {key} IN ({','.join(map(str, seqs))})", ())


def purge_jobs(execute: Execute, now: int, limit: int, spared: Collection[int] = (), lock: str = "") -> list[JobKey]:
    """Delete at most `limit` expired jobs, about _PURGE_BYTES of results, but none of `spared`. Returns their keys."""
    others = f" AND seq NOT IN ({','.join(map(str, spared))})" if spared else ""
    expired, total = [], 0
    sql = f"SELECT seq, salt, size FROM jobs WHERE expires <= ?{others} ORDER BY expires LIMIT ?{lock}"
    for seq, salt, size in execute(sql, (now, limit)).fetchall():
        expired.append(JobKey(seq, salt))
        total += size or 0
        if total > _PURGE_BYTES:
            break
    if expired:
        _forget(execute, [key.seq for key in expired])
    return expired


class Writer:
    """A thread that writes for a store, and the writes that are the same on both databases.

    All waiting writes are committed together, in one transaction. A write has `done`, which gets its result, and
    `keep`: whether the write is tried again, instead of failing, while the database cannot be written. A write that is
    refused returns the error, which `done` gets as such; it must not raise it, or the others would not be committed.
    New jobs wait in `new` for `flush`. A subclass provides the functions declared here.
    """

    fault: str | None = None  # why nothing can be written
    _locked = ""  # clause that locks the rows that a statement reads
    _freed = ""  # assignment that leaves a callback to any server
    _run: Callable[..., None]  # (run, done, keep=False): queues a write; `done` gets what `run` returns
    _do: Callable[..., None]  # (sql, values, done, keep=False): queues a statement; `done` gets if it changed anything
    _write: Callable[[list[Any]], list[Any]]  # commits a batch: the result of each write
    _note: Callable[[Exception, list[Any]], tuple[AsteraError, bool]]  # error for the writes, and whether it may pass
    _with_probe: Callable[[list[Any]], list[Any]]  # adds a write that shows whether a fault has passed

    def __init__(self) -> None:
        self.new: deque[Any] = deque()  # new jobs, until `flush`
        self._lock = threading.Lock()  # held while what waits is taken
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()  # None: look at the rest
        self._kept: list[Any] = []  # writes to try again
        self._give_up_at = math.inf  # time at which a closing store stops trying, monotonic
        self._stopping = self._closed = False
        self._post: Post = operator.call
        self._thread = threading.Thread(target=self._serve, name="astera-store", daemon=True)

    def put(self, write: Any) -> None:
        """Queue a write. None wakes the thread, which looks for new jobs."""
        self._queue.put(write)
        if self._closed:
            self._refuse()

    def flush(self, post: Post = operator.call) -> None:
        """Have the thread store the jobs added so far, and tell their results through `post`."""
        if self.new:
            self._post = post
            self.put(None)

    def end(self, timeout_s: float) -> bool:
        """Commit all waiting writes and end the thread. Returns False if it did not end in time."""
        self._give_up_at, self._stopping = time.monotonic() + timeout_s * 0.8, True
        self.put(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error("the database did not take the last writes within %s", show_duration(timeout_s))
        return not self._thread.is_alive()

    def _take_new(self) -> list[Any]:
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self.new.popleft())
        return taken

    def _take(self, timeout: float | None) -> list[Any]:
        """The waiting writes, at most _BATCH; if none waits, the next one."""
        taken = []
        with contextlib.suppress(queue.Empty):
            taken.append(self._queue.get(timeout=timeout))
            while len(taken) < _BATCH:
                taken.append(self._queue.get_nowait())
        return [write for write in taken if write is not None]

    def _refuse(self) -> None:
        """Fail writes that arrive after the end; their callers would wait forever."""
        while late := self._take_new() + self._take(0):
            self._tell(late, None, StoreError("the database is closed"))

    def _serve(self) -> None:
        """The thread."""
        with contextlib.suppress(OSError), open(f"/proc/{threading.get_native_id()}/timerslack_ns", "w") as slack:
            slack.write("1000")  # or Linux adds 0.05 ms to each wait for the interpreter, of which a commit has many
        while not self._stopping or self._kept or self.new or not self._queue.empty():
            waiting = self._take(_RETRY_S if self._kept or self.fault or self._stopping else None)
            with self._lock:
                new = self._take_new()  # before the others, which may want to find them
                batch, self._kept = self._with_probe([*self._kept, *new, *waiting]), []
            try:
                self._commit(batch, len(new) == len(batch))
            except Exception:  # none is foreseen, but all writes depend on this thread
                log.exception("the store")
            if self._kept and time.monotonic() >= self._give_up_at:
                log.error("%d writes could not be made: %s", len(self._kept), self.fault)
                self._tell(self._kept, None, StoreError(self.fault or ""))
                self._kept = []
        self._closed = True
        self._refuse()

    def _commit(self, batch: list[Any], is_new: bool = False) -> None:
        """Commit a batch, and tell the results. `is_new`: the batch has only new jobs."""
        if not batch:
            return
        try:
            results = self._write(batch)
        except Exception as error:  # no write may end the thread, or fail the other writes
            was_well = self.fault is None
            failure, passing = self._note(error, batch)
            if passing:
                if was_well:
                    log.error("%s; new jobs are refused until this is repaired", failure)
                self._kept += [write for write in batch if write.keep]
            elif len(batch) > 1:  # one bad write must not fail the others
                for write in batch:
                    if write.keep and self._kept:  # after those that came before
                        self._kept.append(write)
                    else:
                        self._commit([write])
                return
            elif not isinstance(failure, Busy):
                is_strange = str(failure).startswith("the database failed")
                log.error("a write failed: %s", error, exc_info=error if is_strange else None)
            self._tell([write for write in batch if not (passing and write.keep)], None, failure)
        else:
            tell = partial(self._tell, batch, results, None)
            if is_new:  # in one message, or this thread and the one that flushes would alternate
                self._post(tell)
            else:
                tell()

    def _tell(self, batch: list[_Write], results: list[Any] | None, error: AsteraError | None) -> None:
        for write, result in zip(batch, results or [None] * len(batch), strict=True):
            try:
                if isinstance(result, AsteraError):
                    write.done(None, result)
                else:
                    write.done(result, error)
            except Exception:  # a faulty listener must not end the thread
                log.exception("after a write")

    def find_key(self, flow: str, token: str, key: str, fingerprint: bytes, now: int, done: Done) -> None:
        """Find the job that has an idempotency key, after all earlier writes; `done` gets the job, None or Conflict."""
        self._run(partial(find_key, flow, token, key, fingerprint, now), done)

    def delete(self, key: JobKey, done: Done) -> None:
        """Delete a finished job; `done` gets deleted, running, owed or absent."""

        def run(execute: Execute) -> str:
            sql = f"SELECT status, (SELECT state FROM callbacks WHERE job = seq) FROM jobs{OF_KEY}{self._locked}"
            row = execute(sql, key).fetchone()
            if row is None:
                return "absent"
            if row[0] == Status.RUNNING:
                return "running"
            if row[1] == "pending":
                return "owed"
            _forget(execute, [key.seq])
            return "deleted"

        self._run(run, done)

    def resend(self, key: JobKey, now: int, done: Done) -> None:
        """Make the callback of a finished job due, with a new schedule; `done` gets whether the job has one."""
        self._do("UPDATE callbacks SET state = 'pending', next = ?, attempts = 0 WHERE job = ?", (now, key.seq), done)

    def record_delivery(
        self, key: JobKey, attempt: Attempt, seen: int | None, state: str, next_at: int | None, done: Done
    ) -> None:
        """Store an attempt to deliver a callback, once, and the new state of the callback.

        The state does not change if the callback was requested again meanwhile, so that its `next` is not `seen`.
        """
        attempt = attempt._replace(error=attempt.error and attempt.error.replace("\0", ""))

        def run(execute: Execute) -> bool:
            sql = f"SELECT state, next FROM callbacks WHERE job = ?{self._locked}"
            found = execute(sql, (key.seq,)).fetchone()
            known = execute("SELECT at, duration, status, error FROM attempts WHERE job = ?", (key.seq,)).fetchall()
            if found is None or attempt in known:  # it may have been committed before
                return False
            execute("INSERT INTO attempts VALUES (?, ?, ?, ?, ?, ?)", (key.seq, len(known) + 1, *attempt))
            if found[0] != "pending":
                return False
            if found[1] == seen:
                execute("UPDATE callbacks SET state = ?, next = ? WHERE job = ?", (state, next_at, key.seq))
            sql = f"UPDATE callbacks SET attempts = attempts + 1, last_status = ?{self._freed} WHERE job = ?"
            execute(sql, (attempt.status, key.seq))
            return True

        self._run(run, done, keep=True)


def _store_belongings(execute: Execute, finish: Finish) -> None:
    """Store the pieces of a large result, and the callback that the job owes."""
    for piece in piece_rows(finish.job.key, "result", finish.job.attempt, finish.outcome.answer.body):
        execute(INSERT_PIECE, piece)
    if finish.callback is not None:
        values = (finish.job.key.seq, finish.callback[0], finish.job.finished, finish.callback[1])
        execute("INSERT INTO callbacks (job, receiver, state, next, body) VALUES (?, ?, 'pending', ?, ?)", values)


def _own(path: str) -> sqlite3.Connection:
    """Take the lock of a database: a lock on a file beside it."""
    owner = None
    try:
        owner = sqlite3.connect(f"{path}.lock", timeout=0, isolation_level=None, check_same_thread=False)
        owner.execute("PRAGMA locking_mode = EXCLUSIVE")
        owner.execute("PRAGMA journal_mode = MEMORY")  # a lock needs no file beside it
        owner.execute("BEGIN EXCLUSIVE")
    except sqlite3.Error as error:
        if owner is not None:
            owner.close()
        if error.sqlite_errorname == "SQLITE_BUSY":
            raise DatabaseInUse(f"another server uses {path}: stop it, or set `database` to another path") from None
        raise StoreError(f"{path}.lock: {store_error(error)}") from None
    return owner


def _format(db: sqlite3.Connection, path: str) -> int:
    """The version of the schema, 0 for a new file. Raises StoreError if the file is not ours, or too new."""
    tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
    ours = db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    version: int = db.execute("PRAGMA user_version").fetchone()[0]
    if tables and not ours:
        raise StoreError(f"{path} is a database of another program: set `database` to another path")
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path} was made by a newer version ({version}): use that one; nothing was changed")
    return version


def _scripts(version: int) -> dict[int, str]:
    """What brings the schema from a version to the present one: scripts by the version that they make."""
    if not version:
        return {SCHEMA_VERSION: f"{resource('schema.sql').decode()}\nPRAGMA application_id = {APPLICATION_ID};"}
    upgrades = wing("astera_lite_database:UPGRADES") if version < SCHEMA_VERSION else {}
    return {old + 1: upgrades[old] for old in range(version, SCHEMA_VERSION)}


def _open(path: str, durability: str, log_bytes: int, page_size: int) -> sqlite3.Connection:
    """Open a database for writing. Creates the file, or upgrades it to the present version of the schema."""
    with contextlib.ExitStack() as undone, errors_of_database(path):
        db = sqlite3.connect(path, timeout=_BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
        undone.callback(db.close)  # or the connection keeps its locks as long as the exception exists
        db.execute("PRAGMA temp_store = MEMORY")  # no other folder need be writable
        db.execute("PRAGMA secure_delete = FAST")  # or a purge may write as much as it deletes
        scripts = _scripts(_format(db, path))
        db.execute(f"PRAGMA page_size = {page_size}")  # has an effect only before the first table
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # the same
        mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise StoreError(f"{path}: write-ahead logging cannot be used here (journal mode {mode})")
        pages = log_bytes // db.execute("PRAGMA page_size").fetchone()[0]
        db.execute(f"PRAGMA wal_autocheckpoint = {max(pages, 16)}")
        db.execute(f"PRAGMA journal_size_limit = {log_bytes}")
        db.execute(f"PRAGMA synchronous = {'FULL' if durability == 'full' else 'NORMAL'}")
        for new, script in scripts.items():
            db.executescript(f"BEGIN EXCLUSIVE;\n{script}\nPRAGMA user_version = {new};\nCOMMIT;")
        db.execute("BEGIN IMMEDIATE")  # so that a database that cannot be written is found now
        for (offset,) in db.execute("SELECT offset FROM clock").fetchall():
            for statement in _MOVE_TIMES if offset > 0 else ():  # the system's clock jumped while the server ran
                db.execute(statement, {"by": offset})
        db.execute("DELETE FROM clock")
        db.execute(_UNPROBE)
        db.execute("COMMIT")
        undone.pop_all()
    return db


class StoreReader:
    """The reads that are the same on both databases. A subclass executes the statements, in which `?` is a value.

    Raises StoreError. Times are milliseconds since the epoch. All methods may be called from any thread.
    """

    _has_tokens = True  # False: the tables are older than tokens, or missing
    _to_cancel = "error IS NOT NULL"  # condition of a Running job that is not to run again
    _whole_result = "result"  # expression for the body of a result; NULL if it is stored in pieces

    def __init__(self) -> None:
        self._idle: list[Any] = []  # connections

    def close(self, timeout_s: float = 10.0) -> None:
        """Close the connections."""
        while self._idle:
            self._idle.pop().close()

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """The rows of a statement."""
        raise NotImplementedError

    def _first(self, sql: str, values: Sequence[Any] = ()) -> Any:
        return next(iter(self._all(sql, values)), None)

    def _jobs(self, rest: str, values: Sequence[Any]) -> list[Job]:
        return [read_job(row) for row in self._all(f"SELECT {JOB_COLUMNS}{FROM_JOBS}{rest}", values)]

    def get(self, key: JobKey) -> Job | None:
        """A job."""
        return next(iter(self._jobs(OF_KEY, key)), None)

    def load(self, seq: int) -> Loaded | None:
        """A Running job with all that its run needs."""
        columns = f"{JOB_COLUMNS}, trace, {self._to_cancel}"
        row = self._first(f"SELECT {columns}{FROM_JOBS} WHERE seq = ? AND status = 'Running'", (seq,))
        found = row and self.request(JobKey(*row[:2]))
        if not found:
            return None
        steps = self._all("SELECT path, until, output FROM steps WHERE job = ?", (seq,))
        saved = {path: output for path, _, output in steps if output}
        waits = {path: until for path, until, _ in steps if until is not None}
        return Loaded(read_job(row), found[0], saved, waits, json.loads(row[-2] or "[]"), bool(row[-1]))

    def request(self, key: JobKey, length: int = 1 << 30) -> tuple[StoredRequest, int] | None:
        """The request, with at most `length` bytes of its body, and the size of the whole body."""
        row = self._first(
            "SELECT request, substr(request_body, 1, ?), coalesce(length(request_body),"
            f" (SELECT sum(length(data)) FROM pieces WHERE job = seq AND part = 'request_body')) FROM jobs{OF_KEY}",
            (length, *key),
        )
        if row is None:
            return None
        text, body, size = row
        if body is None:
            sql = "SELECT data FROM pieces WHERE job = ? AND part = 'request_body' AND n <= ? ORDER BY n"
            body = b"".join(data for (data,) in self._all(sql, (key.seq, length // PIECE)))[:length]
        return _read_request(text, body), size or 0

    def result(self, key: JobKey) -> StoredResult | None:
        """The response of a finished job."""
        columns = f"size, code, headers, {self._whole_result}"
        row = self._first(f"SELECT {columns} FROM jobs{OF_KEY} AND status <> 'Running'", key)
        if row is None:
            return None
        size, code, headers, body = row
        answer = Answer(code, tuple((name, value) for name, value in json.loads(headers)), body or b"")
        return StoredResult(answer, size)

    def trace(self, key: JobKey) -> list[dict[str, Any]]:
        """The steps of a job that is finished or waits."""
        row = self._first(f"SELECT trace FROM jobs{OF_KEY}", key)
        return json.loads(row[0]) if row and row[0] else []

    def attempts(self, key: JobKey) -> list[Attempt]:
        """Every attempt to deliver a job's callback."""
        rows = self._all("SELECT at, duration, status, error FROM attempts WHERE job = ? ORDER BY n", (key.seq,))
        return [Attempt(*row) for row in rows]

    def page(
        self, now: int, limit: int, before: int | None, flow: str | None, status: Status | None, token: str | None
    ) -> list[Job]:
        """Unexpired jobs with a `seq` below `before`, newest first."""
        of_flow, of_token = "flow = ?", "token <> '' AND token = ?" if token else "token = ?"  # for the index of tokens
        if status in (Status.RUNNING, Status.ERROR):  # their own index has fewer rows than others: || rules those out
            of_flow, of_token = "flow || '' = ?", "token || '' = ?"
        wanted = [("(expires IS NULL OR expires > ?)", now), ("seq < ?", before), (of_flow, flow), (of_token, token)]
        given = {condition: value for condition, value in wanted if value is not None}
        written = [] if status is None else [f"status = '{status.value}'"]  # for the planner to see which index serves
        rest = f" WHERE {' AND '.join((*given, *written))} ORDER BY seq DESC LIMIT ?"
        return self._jobs(rest, (*given.values(), limit))

    def flow_text(self, version: int) -> tuple[str, str] | None:
        """Name and text of a version of a flow that stored jobs have."""
        return self._first("SELECT name, text FROM flows WHERE version = ?", (version,)) or None

    def tokens(self) -> list[Token]:
        """Every token, by name."""
        rows = self._all("SELECT name, hash, role, flows, created FROM tokens") if self._has_tokens else []
        return [
            Token(name, digest, role, flows and frozenset(json.loads(flows)), at)
            for name, digest, role, flows, at in sorted(rows)
        ]

    def next_delivery(self, now: int) -> int | None:
        """The time of the next callback that is not due yet."""
        sql = "SELECT min(next) FROM callbacks WHERE state = 'pending' AND next > ?"
        return self._first(sql, (now,))[0] or None

    def ended(self, keys: Collection[JobKey]) -> list[JobKey]:
        """The jobs among `keys` that are finished or deleted."""
        seqs = ",".join(str(key.seq) for key in keys) or "NULL"
        running = set(self._all(f"SELECT seq, salt FROM jobs WHERE seq IN ({seqs}) AND status = 'Running'"))
        return [key for key in keys if key not in running]

    def last_seq(self) -> int:
        """The greatest `seq` stored; 0 if there is none."""
        return self._first("SELECT max(seq) FROM jobs")[0] or 0


def open_to_read(path: str, mode: str = "ro") -> sqlite3.Connection:
    """A connection to a database that exists. With the mode `rw` it may fold the log into the file."""
    name = f"file:{urllib.parse.quote(os.fsencode(path))}?mode={mode}"
    db = sqlite3.connect(name, uri=True, timeout=1, isolation_level=None, check_same_thread=False)
    db.execute(f"PRAGMA query_only = {mode == 'ro'}")
    return db


class SqliteReader(StoreReader):
    """Reads from a database, also while a server writes to it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = os.path.realpath(path)
        self.fault: str | None = None
        self._is_damaged = False  # which does not pass: `fault` says how
        self._pinned = dict[str, Any]()  # files that must stay what they are, by path
        self._being_read: set[tuple[int, object]] = set()  # large results, which the purge spares until they are read
        if not os.path.isfile(self.path):
            raise StoreError(f"there is no database {self.path}: a server makes it when it starts")
        with errors_of_database(self.path), contextlib.closing(open_to_read(self.path)) as db:
            self._has_tokens = _format(db, self.path) > 1  # a look at an older database does not upgrade it

    def _all(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        db = None
        try:
            with contextlib.suppress(IndexError):  # another thread may take the last one
                db = self._idle.pop()
            if db is None:
                self._check_files()  # or this connection would read another database than the others
                db = open_to_read(self.path)
            return db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._failure(error) from None
        finally:
            if db is not None:
                self._idle.append(db)

    def _failure(self, error: Exception) -> StoreError:
        """The error in words. Damage is remembered: no new job is put on a damaged database."""
        failure = store_error(error)
        if _words(error, _DAMAGE) and not self._is_damaged:
            self.fault, self._is_damaged = str(failure), True
            log.error("%s; new jobs are refused until the server starts with a good database", failure)
        return failure

    def _check_files(self) -> None:
        if any(_identity(path) != identity for path, identity in self._pinned.items()):
            moved = "a file of the database was moved, deleted or replaced while the server runs"
            raise StoreError(f"{moved}: put it back, or restart the server")

    def result_pieces(self, key: JobKey, start: int, stop: int) -> Iterator[bytes]:
        """The bytes of a large result from `start` to `stop`. The purge spares it meanwhile.

        The iterator raises StoreError if some are missing, as after a deletion: a client would misread what follows.
        """
        pieces = self._read_pieces(key.seq, start, stop)
        next(pieces)  # from here on the purge spares what is read
        return pieces

    def _read_pieces(self, seq: int, start: int, stop: int) -> Iterator[bytes]:
        last = "(SELECT attempt FROM jobs WHERE seq = ?)"  # part of the primary key
        sql = f"SELECT data FROM pieces WHERE job = ? AND part = 'result' AND attempt = {last} AND n = ?"
        reading = (seq, object())
        self._being_read.add(reading)
        try:
            yield b""
            for at in range(start - start % PIECE, stop, PIECE):
                row = self._first(sql, (seq, seq, at // PIECE))
                first, end = max(start - at, 0), min(stop - at, PIECE)
                if row is None or not end <= len(row[0]) <= PIECE:
                    raise StoreError("a part of the result is missing")
                yield row[0][first:end]
        finally:  # also if nobody reads the rest
            self._being_read.discard(reading)

    def clock_offset(self) -> int:
        """The milliseconds that stored times are behind the system's clock, after a jump of the clock."""
        row = self._first("SELECT offset FROM clock") if self._has_tokens else None
        return row[0] if row else 0

    def size(self) -> int:
        """Bytes on disk, with the write-ahead log."""
        return _size_of(self.path) + _size_of(f"{self.path}-wal")


class SqliteStore(SqliteReader, Writer):
    """The store of a server. Its public methods are the contract that a store on another database must keep.

    A write returns at once. `done(result, error)` is called when the write is durable, or has failed with a StoreError:
    on a thread of the store, or by `flush` on the calling thread. The writes of one caller keep their order. The end of
    a run and the steps before are not lost by a full disk or a lock: the store tries these writes again.

    The thread that answers requests commits the new jobs of a turn itself: handing them over would cost a quarter of
    them. It does so as long as the disk is quick and nobody else is committing; otherwise the store's thread does, so
    that a slow disk never stops a poll.

    One owner holds a lock on a file beside the database. The system releases the lock when the process ends, so each
    Running row found at the start belongs to a dead run. `durability` is full or normal; `page_size` applies to
    a new file. The write-ahead log starts again at a quarter of `max_bytes`, or of the free space on the disk.
    """

    shared = False  # whether other servers may use the database; a read may then take milliseconds
    node, nodes = 0, 1  # the number of this server, and the count of numbers
    queued = 0  # in a shared store: free jobs that do not wait, as of the last second

    def __init__(
        self, path: str, durability: str = "full", max_bytes: int | None = None, page_size: int = 4 << 10
    ) -> None:
        path = os.path.realpath(path)
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise StoreError(f"there is no folder {folder}: create it, or set `database` to another path")
        if os.path.exists(path) and not os.path.isfile(path):
            raise StoreError(f"{path} is not a regular file: set `database` to the path of one")
        if os.access(path, os.R_OK) and not os.access(path, os.W_OK):  # SQLite would leave such files beside it
            raise StoreError(f"{path}: {_PASSING['SQLITE_READONLY']}")
        self._versions: set[int] = set()  # of flows whose text is stored
        self._claimed_to = 0  # the last `seq` that `claim` has looked at
        self._unfolded = 0  # writes since the log was folded into the file
        self._folder: threading.Thread | None = None
        self._took = deque[float](maxlen=8)  # seconds of commits; all but the shortest may have waited for something
        self._slow_until = 0.0  # on the monotonic clock
        self._max_bytes = room = max_bytes or sys.maxsize
        with contextlib.suppress(OSError):  # not every file system tells
            room = min(room, shutil.disk_usage(folder).free)
        self._log_bytes = min(_LOG_BYTES, max(room // 4, 1 << 18))
        with contextlib.ExitStack() as undone:
            self._owner = _own(path)
            undone.callback(self._owner.close)
            self._db = _open(path, durability, self._log_bytes, page_size)
            undone.callback(self._db.close)
            super().__init__(path)
            undone.callback(super().close)
            self._pinned = {path: _identity(path) for path in (path, f"{path}-wal", f"{path}.lock")}
            Writer.__init__(self)
            self._thread.start()
            undone.pop_all()

    def close(self, timeout_s: float = 10.0) -> None:
        """Make all queued writes, and close the database."""
        super().close()
        if self.end(timeout_s):
            if self._folder is not None and self._folder.is_alive():
                self._folder.join(timeout_s)
            self._db.close()  # the last connection to close folds the log into the file
            self._owner.close()

    # --- writing ---

    def _run(self, run: Callable[[Execute], Any], done: Done, keep: bool = False, size: int | None = None) -> None:
        self.put(_Write(run, done, keep, size=size))

    def _do(self, sql: str, values: Sequence[Any], done: Done = ignore_result, keep: bool = False) -> None:
        self._run(partial(_execute, sql, values), done, keep)

    def flush(self, post: Post = operator.call) -> None:
        """Store the jobs added so far, on the calling thread if that is quick. Call this method after `add`.

        If it takes longer, the results are told through `post`, which has a function called soon.
        """
        if not self.new:
            return
        if self.fault or time.monotonic() < self._slow_until or not self._lock.acquire(blocking=False):
            super().flush(post)
            return
        batch = self._take_new()
        try:
            results = self._transact(batch, busy_ms=0)
        except Exception:  # the thread meets the fault, too, and can wait
            for write in batch:
                self.put(write)
            return
        finally:
            self._lock.release()
        if self._unfolded >= _FOLD_AFTER:
            self.put(None)
        self._tell(batch, results, None)

    def _with_probe(self, batch: list[Any]) -> list[Any]:
        if batch or self.fault is None or self._is_damaged:
            return batch
        return [_Write(partial(_execute, _PROBE, (PIECE,)), self._probed, size=PIECE)]

    def _probed(self, result: Any, error: AsteraError | None) -> None:
        if error is None:
            self._do(_UNPROBE, (), keep=True)

    def _note(self, error: Exception, batch: list[Any]) -> tuple[AsteraError, bool]:
        failure = error if isinstance(error, AsteraError) else self._failure(error)
        alone = isinstance(error, MemoryError | StoreError) and len(batch) == 1  # others may be possible
        passing = alone or _words(error, _PASSING) is not None
        if passing:
            self._unfolded = _FOLD_AFTER  # on a full disk there is room in the log once it is folded
            if not self._is_damaged:
                self.fault = str(failure)
        return failure, passing

    def _commit(self, batch: list[Any], is_new: bool = False) -> None:
        super()._commit(batch, is_new)
        self._fold_if_due()

    def _write(self, batch: list[Any]) -> list[Any]:
        with self._lock:
            return self._transact(batch, _BUSY_MS)

    def _transact(self, batch: list[_Write], busy_ms: int) -> list[Any]:
        """Make all writes of a batch in one transaction: the result of each. The lock is held."""
        if not batch:
            return []
        db, before = self._db, self._db.total_changes
        self._check_files()
        try:
            if db.in_transaction:  # the last one could not be rolled back
                db.execute("ROLLBACK")
            if sizes := [write.size for write in batch if write.size is not None]:
                self._check_room(sum(sizes), busy_ms)
            db.execute(f"PRAGMA busy_timeout = {busy_ms}")
            db.execute("BEGIN IMMEDIATE")
            _insert_jobs(db.execute, [write.row for write in batch if write.row])
            results = [write.run(db.execute) for write in batch]
            began = time.monotonic()
            db.execute("COMMIT")
            ended = time.monotonic()
        except BaseException:
            self._versions.clear()
            with contextlib.suppress(sqlite3.Error):
                if db.in_transaction:
                    db.execute("ROLLBACK")
            raise
        self._unfolded += len(batch) + _COMMIT_COSTS
        if db.total_changes == before:  # nothing was written: this tells nothing of the disk
            return results
        self._took.append(ended - began)
        if (shortest := min(self._took)) > _QUICK_S:
            self._slow_until = ended + 100 * shortest
        if self.fault and not (self._is_damaged or self._kept):
            self.fault = None  # before another thread has its turn, which may find damage
            log.info("the database can be written again")
        return results

    def _check_room(self, size: int, busy_ms: int) -> None:
        """Leave room to fold the log and to delete jobs, or a disk that the database filled would stay full."""
        with contextlib.suppress(OSError):  # not every file system tells
            disk = shutil.disk_usage(self.path)
            log_size, reserve = _size_of(f"{self.path}-wal"), min(_RESERVE, disk.total // 4)
            if disk.total and disk.free < 2 * size + log_size + reserve:
                if not busy_ms:
                    raise StoreError(_PASSING["SQLITE_FULL"])
                self._fold_rest("TRUNCATE")
                self._check_room(size, 0)

    def _fold_if_due(self) -> None:
        """Have the log folded into the file now and then, so that it begins anew, or cut if a reader let it grow."""
        long = _size_of(f"{self.path}-wal") > self._log_bytes * 5 // 4
        if (long or self._unfolded >= _FOLD_AFTER) and (self._folder is None or not self._folder.is_alive()):
            self._unfolded = 0
            self._folder = threading.Thread(target=self._fold, args=[long], name="astera-fold", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread can be had
                self._folder.start()

    def _fold(self, long: bool) -> None:
        """On a thread of its own. Most of the log is copied while commits continue.

        Commits wait for the last part; otherwise copying would never catch up.
        """
        with contextlib.suppress(sqlite3.Error, StoreError):  # it is tried again
            self._check_files()
            with contextlib.closing(open_to_read(self.path, "rw")) as beside:
                beside.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            with self._lock:
                self._fold_rest("TRUNCATE" if long else "PASSIVE")

    def _fold_rest(self, mode: str) -> None:
        self._db.execute("PRAGMA busy_timeout = 0")
        self._db.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()

    # --- jobs ---

    def add(self, submission: Submission, done: Done) -> None:
        """Queue a new job for `flush`; `done` gets the job, or the earlier one that has its key, or Conflict."""
        if self._is_damaged:
            done(None, StoreError(self.fault or ""))
            return
        ended, row = submission.ended, new_columns(submission).values()
        size = len(submission.request.body) + (len(ended.outcome.answer.body) if ended else 0)
        if submission.idempotency_key is None and size <= _SMALL and (ended is None or ended.callback is None):
            self.new.append(_Write(partial(self._insert, submission, None), done, row=row, size=size))
        else:
            self._run(partial(self._insert, submission, row), done, size=size)

    def _insert(self, submission: Submission, row: Collection[Any] | None, execute: Execute) -> Job | Conflict:
        """Store a new job and what belongs to it, unless its key is known. Without `row`, its row is stored already."""
        job = submission.job
        if submission.idempotency_key is not None:
            of_key = (job.flow, job.token, submission.idempotency_key)
            if (known := find_key(*of_key, submission.fingerprint, job.created, execute)) is not None:
                return known
            expired = "UPDATE jobs SET idempotency_key = NULL WHERE flow = ? AND token = ? AND idempotency_key = ?"
            execute(expired, of_key)
        if job.version not in self._versions:
            execute("INSERT OR IGNORE INTO flows VALUES (?, ?, ?)", (job.version, job.flow, submission.flow_text))
            self._versions.add(job.version)
        if row is not None:
            _insert_jobs(execute, [row])
            for piece in piece_rows(job.key, "request_body", 0, submission.request.body):
                execute(INSERT_PIECE, piece)
            if submission.ended is not None:
                _store_belongings(execute, submission.ended)
        return job

    # --- runs ---

    def claim(self, held: Container[int], limit: int, flows: Mapping[str, int | None] = {}) -> list[Claimed]:
        """Take Running jobs that nobody holds; `held` are the `seq` of the caller's own.

        Each call looks at the next `limit` jobs, oldest first; a start calls until nothing is left. A shared store
        takes only jobs of `flows`: the flows in service by name, with their limits.
        """
        sql = "SELECT seq, due, flow FROM jobs WHERE status = 'Running' AND seq > ? ORDER BY seq LIMIT ?"
        rows = self._all(sql, (self._claimed_to, limit))
        self._claimed_to = rows[-1][0] if len(rows) == limit else 0
        return [Claimed(*row) for row in rows if row[0] not in held]

    def ask_cancel(self, key: JobKey, done: Done = ignore_result) -> None:
        """Record that a Running job is to be cancelled; `done` gets whether it is Running."""
        self._do(f"UPDATE jobs SET error = 'null'{OF_KEY} AND status = 'Running'", key, done, keep=True)

    def start(self, key: JobKey, attempt: int, started: int, done: Done = ignore_result) -> None:
        """Record that a run began; `done` gets whether the job is Running, at this attempt or the one before."""
        sql = f"UPDATE jobs SET attempt = ?, started = ?, due = NULL{_FENCE}"
        self._do(sql, (attempt, started, key.seq, attempt - 1, attempt), done, keep=True)

    def save_step(self, key: JobKey, attempt: int, path: str, output: str, done: Done = ignore_result) -> None:
        """Save a step's output (JSON; empty: there is none); `done` gets whether the job is Running at this attempt."""
        values = (key.seq, path, None, output, key.seq, attempt, attempt)
        self._run(partial(_execute, _SAVE_STEP, values), done, keep=True, size=len(output))

    def suspend(self, job: Job, path: str, until: int, trace: str, is_free: bool, done: Done) -> None:
        """Record that a job waits until `job.due`, for a step that waits `until` then; `trace` is its steps as JSON.

        `is_free`: any server may take the job then. `done` gets whether the job is Running at this attempt.
        """
        fence = (job.key.seq, job.attempt - 1, job.attempt)
        self._do(_SAVE_STEP, (job.key.seq, path, until, None, *fence), keep=True)
        sql = f"UPDATE jobs SET attempt = ?, started = ?, due = ?, trace = ?{_FENCE}"
        self._do(sql, (job.attempt, job.started, job.due, trace, *fence), done, keep=True)

    def requeue(self, key: JobKey, attempt: int) -> None:
        """Record that an orderly stop ended a run, which then does not count as an attempt."""
        self._do(f"UPDATE jobs SET attempt = ?{_FENCE}", (attempt - 1, key.seq, attempt, attempt), keep=True)

    def finish(self, finish: Finish, done: Done) -> None:
        """End a Running job; `done` gets whether it was Running, at this attempt if it is fenced."""
        seq, attempt = finish.job.key.seq, finish.job.attempt
        values = (*end_columns(finish).values(), seq, not finish.fenced, attempt - 1, attempt)

        def run(execute: Execute) -> bool:
            moved = _execute(_END_JOB, values, execute)
            if moved:
                execute("DELETE FROM steps WHERE job = ?", (seq,))
                _store_belongings(execute, finish)
            return moved

        self._run(run, done, keep=True, size=len(finish.outcome.answer.body) + len(finish.trace or ""))

    # --- callbacks ---

    def claim_deliveries(
        self, now: int, limit: int, *, held: Collection[JobKey], busy: Collection[str], likely: bool
    ) -> list[tuple[Job, Delivery]]:
        """Take callbacks that are due, except those in `held` and those for busy receivers.

        `likely`: only those not tried since they were last asked for, and those whose receiver answered the last time.
        """
        skip = {key.seq for key in held}
        rows = self._all(
            f"SELECT {JOB_COLUMNS}, receiver, request FROM jobs JOIN callbacks c ON c.job = seq"
            " WHERE c.state = 'pending' AND c.next <= ? AND expires > ?"
            f" AND c.receiver NOT IN ({','.join('?' * len(busy))}){LIKELY if likely else ''} ORDER BY c.next LIMIT ?",
            (now, now, *busy, limit + len(skip)),
        )
        return read_deliveries([row for row in rows if row[0] not in skip][:limit])

    # --- what is due for all ---

    def purge(self, now: int, limit: int, done: Done) -> None:
        """Delete at most `limit` expired jobs and return their space to the system; `done` gets how many."""

        def run(execute: Execute) -> int:
            expired = purge_jobs(execute, now, limit, {seq for seq, _ in tuple(self._being_read)})
            free = execute("PRAGMA freelist_count", ()).fetchone()[0]
            for _ in range(min(free, _GIVE_BACK)):  # one by one: before CPython 3.13 only the first step takes place
                execute("PRAGMA incremental_vacuum(1)", ())
            if self.size() >= self._max_bytes:  # the file shrinks once the log is folded
                self._unfolded = _FOLD_AFTER
            return len(expired)

        self._run(run, done)

    def forget_flows(self) -> None:
        """Delete the texts of flows that no job refers to."""
        newest = "SELECT version FROM jobs WHERE flow = flows.name ORDER BY seq DESC LIMIT 1"  # as most texts are
        used = "SELECT 1 FROM jobs WHERE flow = flows.name AND version = flows.version"
        unused = self._all(f"SELECT version FROM flows WHERE version IS NOT ({newest}) AND NOT EXISTS ({used})")
        young = self.last_seq() - _MINUTE_OF_SEQ

        def run(execute: Execute) -> None:
            sql = f"DELETE FROM flows WHERE version = ? AND NOT EXISTS ({used} AND seq > ?)"
            for (version,) in unused:  # unless a job came meanwhile, whose id may be a little older than its row
                if _execute(sql, (version, young), execute):
                    self._versions.discard(version)

        self._run(run, ignore_result)

    def leased(self) -> bool:
        """Whether no other server can have the jobs of this one; always true if the database is not shared."""
        return True

    def last_seen(self) -> int:
        """The latest time on record; 0 if there is none."""
        created = "SELECT created FROM jobs ORDER BY seq DESC LIMIT 1"
        finished = "SELECT finished FROM jobs WHERE expires NOT NULL ORDER BY expires DESC LIMIT 1"
        return int(self._first(f"SELECT max(ifnull(({created}), 0), ifnull(({finished}), 0))")[0])

    def keep_clock_offset(self, offset: int) -> None:
        """Store the clock's offset. The next start adds a positive offset to all times."""
        self._do("INSERT OR REPLACE INTO clock VALUES (1, ?)", (offset,), keep=True)


Store = SqliteStore  # what the other rooms know


def _save_bytes(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        _not_json(value)
    return {"\0bytes": base64.b64encode(value).decode()}


_dump_saved = partial(json.dumps, ensure_ascii=True, separators=(",", ":"), default=_save_bytes)


def to_saved(value: Any, secrets: Mapping[str, str] = types.MappingProxyType({})) -> str:
    """A step's output as it is stored: JSON in which bytes and secrets are marked.

    A mark begins with NUL, and a NUL of the value itself is doubled.
    """
    check_written(value)
    text = _dump_saved(value)
    marks = {secret: f"\0{urllib.parse.quote(name, safe='')};" for name, secret in secrets.items() if secret}
    if "\\u0000" in text or any(_dump_saved(secret)[1:-1] in text for secret in marks):
        marks["\0"] = "\0\0"
        found = re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True))))
        text = _dump_saved(_mapped(value, lambda text: found.sub(lambda match: marks[match[0]], text)))
    return text


_SAVED_MARK = re.compile("\0\0|\0([^\0;]+);")


def _bytes_from_mark(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["\0bytes"]) if value.keys() == {"\0bytes"} else value


def from_saved(text: str, secrets: Mapping[str, str] = types.MappingProxyType({})) -> Any:
    """What `to_saved` wrote; a secret that is not there any more reads as ***."""
    value = json.loads(text, object_hook=_bytes_from_mark)
    if "\\u0000" not in text:
        return value

    def unmarked(match: re.Match[str]) -> str:
        return "\0" if match[1] is None else secrets.get(urllib.parse.unquote(match[1]), "***")

    return _mapped(value, lambda text: _SAVED_MARK.sub(unmarked, text))


# ======================================================================================================================
# 8 Engine
# To add a state of a job: a member of State, and a row in _MOVES.
# ======================================================================================================================

MAX_ATTEMPTS = 3  # a job interrupted this often is given up: it may be what crashes the server
_KEEP_BYTES = 256 << 10  # bytes; a queued job's request stays in memory while its size times the queue's length is less
_MIN_KEPT = 1 << 10  # bytes that a request counts for at least
_MAX_UNWRITTEN = 32 << 20  # bytes of outcomes on their way to the disk; above that, workers wait for the disk
_MIN_UNWRITTEN = 16 << 10  # bytes that an outcome counts for at least
_LIGHT_BUDGET = 10_000  # units that a run on the calling thread may spend: a few milliseconds
_LIGHT_BODY = 16 << 10  # bytes of the largest request that runs on the calling thread
_RECENT = 1024  # finished jobs held in memory; with 16 MiB of them an accept would cost a tenth more
_RECENT_BYTES = 4 << 10  # maximum of the texts of such a job: result, headers, trace, base of its URLs


class Prepared(NamedTuple):
    """A job that is ready to run. `stored`: it was read from the store, like the jobs of a server that died."""

    job: Job
    flow: Flow
    input: Input
    saved: Mapping[str, Any] = types.MappingProxyType({})
    waits: Mapping[str, int] = types.MappingProxyType({})
    trace: Sequence[dict[str, Any]] = ()
    stored: bool = False


class State(IntEnum):
    """Where a job or a synchronous call stands in the engine."""

    NEW = auto()  # on its way to the disk; or a call that waits on its own thread
    READY = auto()  # waits for a thread, or until its flow's limit leaves room
    RUNNING = auto()  # has a thread
    WAITING = auto()  # due later; has no thread
    ENDING = auto()  # its end, or its wait, is on its way to the disk
    GONE = auto()  # ended


#: The states that may follow each state.
_MOVES = {
    State.NEW: {State.READY, State.WAITING, State.RUNNING, State.ENDING, State.GONE},
    State.READY: {State.RUNNING, State.ENDING, State.GONE},
    State.RUNNING: {State.WAITING, State.ENDING, State.GONE},
    State.WAITING: {State.READY, State.ENDING, State.GONE},
    State.ENDING: {State.WAITING, State.GONE},
    State.GONE: set[State](),
}


class Entry:
    """What the engine knows of an unfinished job, or of a synchronous call, whose number is negative."""

    __slots__ = ("cancel", "done", "due", "flow", "job", "number", "prepared", "progress", "run", "state")

    def __init__(self, number: int, flow: str) -> None:
        self.number, self.flow, self.state = number, flow, State.NEW  # a job's number is its `seq`
        self.job: Job | None = None  # as its run sees it
        self.run: Run | None = None
        self.cancel: Cancel | None = None  # of a job that has, or had, a thread
        self.prepared: Prepared | None = None  # None: read it from the store
        self.due: int | None = None  # milliseconds since the epoch
        self.progress: Progress | None = None  # of a job that waits
        self.done: Callable[[Outcome], None] | None = None  # of a call that a thread of the pool runs


class Queue:
    """The jobs and calls in hand, which of them may run next, and the threads that run them with `run`.

    At most `workers` threads run jobs; a quarter more are for calls, which slow jobs would starve otherwise.
    `flow_named` finds flows in service, whose limits count. The heaps hold numbers. If the entry of a number is in
    another state when its turn comes, the number is skipped.
    """

    def __init__(self, workers: int, flow_named: Callable[[str], Flow | None], run: Callable[[Entry], None]) -> None:
        self.changed = threading.Condition()  # guards what follows; notified when a run or its write has ended
        self.entries: dict[int, Entry] = {}
        self.workers, self.busy = workers, 0  # threads that may run jobs, and that do
        self.threads, self.working = workers + max(1, workers // 4), 0  # of the pool, and those of them at work
        self.stopping = True  # begins nothing: not started, or being stopped
        self.refused = False  # the system gave no thread when one was called last
        self.queued = 0  # jobs that were accepted and do not run yet
        self._waiting = 0  # jobs that are due later
        self._unfinished, self._running = Counter[str](), Counter[str]()  # entries, and those that run, by flow
        self._ready: list[int] = []  # calls, which come first, and jobs by age
        self._held: defaultdict[str, list[int]] = defaultdict(list)  # those that found their flow at its limit
        self._due: list[tuple[int, int]] = []  # (due, number) of those that wait
        self._flow_named, self._run = flow_named, run
        self._limits: dict[str, int | None] = {}  # of flows; they outlive the removal of a flow that still has jobs
        self._calling = False  # a thread was called and is not at work yet
        self._pool = ThreadPoolExecutor(self.threads, "astera-worker")

    def __contains__(self, seq: object) -> bool:
        """Whether the engine has a stored job in hand."""
        entry = self.entries.get(cast(int, seq))
        return entry is not None and entry.state is not State.NEW

    def counts(self) -> dict[str, int]:
        """Jobs that are queued, that have a thread, and that wait for a time."""
        return {"queued": self.queued, "running": self.busy, "waiting": self._waiting}

    def running(self) -> list[Entry]:
        """The jobs and calls that have a thread."""
        return [entry for entry in list(self.entries.values()) if entry.state is State.RUNNING]

    def refuses(self, flow: Flow) -> bool:
        """Whether a flow has reached its limit and refuses more."""
        return flow.limit is not None and flow.when_full == "refuse" and self._unfinished[flow.name] >= flow.limit

    def has_room(self, name: str) -> bool:
        """Whether the limit of a flow leaves room for a run."""
        if (flow := self._flow_named(name)) is not None:
            self._limits[name] = flow.limit
        limit = self._limits.get(name, 1)  # the first job of a flow that is not in service tells the limit
        return limit is None or self._running[name] < limit

    def learn(self, flow: Flow) -> None:
        """Note the limit of a flow that a job has, if it is not known."""
        with self.changed:
            self._limits.setdefault(flow.name, flow.limit)
            self._let_in(flow.name)

    # --- jobs and calls in hand: `enter`, `move` and `leave` need the lock ---

    def enter(self, number: int, flow: str) -> Entry:
        """The entry of a job or call; a new one if there is none."""
        entry = self.entries.get(number)
        if entry is None:
            entry = self.entries[number] = Entry(number, sys.intern(flow))
            self._unfinished[flow] += 1
            self.queued += number >= 0
        return entry

    def put(self, seq: int, flow: str, prepared: Prepared | None = None, due: int | None = None) -> None:
        """Queue a job that is on disk, to run when it is due; does nothing if the engine has it in hand."""
        with self.changed:
            entry = self.enter(seq, flow)
            if entry.state is State.NEW:
                if prepared is not None and max(prepared.input.size, _MIN_KEPT) * self.queued <= _KEEP_BYTES:
                    entry.prepared = prepared
                entry.due = due
                self.move(entry, State.READY if due is None else State.WAITING)

    def dismiss(self, number: int) -> None:
        """Forget a job or call that has ended, or was not stored."""
        with self.changed:
            if (entry := self.entries.get(number)) is not None:
                self.move(entry, State.GONE)

    def release(self, now: int) -> int | None:
        """Make the jobs ready that are due; return when the next one will be due."""
        with self.changed:
            while self._due and self._due[0][0] <= now:
                due, seq = heapq.heappop(self._due)
                entry = self.entries.get(seq)
                if entry is not None and entry.state is State.WAITING and entry.due == due:
                    self.move(entry, State.READY)
            for flow in self._held:  # whose limit may be higher by now
                self._let_in(flow)
            self._call_thread(again=self.refused)
            return self._due[0][0] if self._due else None

    def move(self, entry: Entry, state: State) -> bool:
        """Give an entry another state; False if it may not have this one now."""
        before = entry.state
        if state not in _MOVES[before]:
            return False
        entry.state = state
        if entry.number >= 0:
            self.queued += (state is State.READY) - (before <= State.READY)
            self._waiting += (state is State.WAITING) - (before is State.WAITING)
        if state is State.READY:
            heapq.heappush(self._ready, entry.number)
            self._call_thread()
        elif state is State.RUNNING:
            entry.cancel = entry.cancel or Cancel()
            self.busy += entry.number >= 0
            self._running[entry.flow] += 1
        elif state is State.WAITING:
            entry.job = entry.prepared = entry.run = None
            heapq.heappush(self._due, (entry.due or 0, entry.number))
        elif state is State.GONE:
            del self.entries[entry.number]
            self._unfinished[entry.flow] -= 1
        if before is State.READY:
            self._let_in(entry.flow)
        return True

    def leave(self, entry: Entry) -> None:
        """A run has ended, also if the thread came late and the entry has gone: a held one may begin."""
        self.busy -= entry.number >= 0
        self._running[entry.flow] -= 1
        self._let_in(entry.flow)
        self.changed.notify_all()

    def hold(self, entry: Entry) -> None:
        """Let a call that waits on its own thread run as soon as its flow has room."""
        heapq.heappush(self._held[entry.flow], entry.number)
        self._let_in(entry.flow)

    def _let_in(self, flow: str) -> None:
        """Let the oldest run that was held have its turn, if the flow has room by now."""
        held = self._held.get(flow)
        while held and not self.stopping and self.has_room(flow):
            number = heapq.heappop(held)
            entry = self.entries.get(number)
            if entry is not None and entry.state is State.NEW:
                self.move(entry, State.RUNNING)
                self.changed.notify_all()
            elif entry is not None and entry.state is State.READY:
                heapq.heappush(self._ready, number)
                self._call_thread()
                return

    # --- threads ---

    def start(self) -> None:
        """Begin to run what is queued."""
        with self.changed:
            self.stopping = False
            self._call_thread()

    def _has_work(self) -> bool:
        """Whether the first in the queue may run: a call, or a job if fewer than `workers` do."""
        return bool(self._ready) and not self.stopping and (self._ready[0] < 0 or self.busy < self.workers)

    def _call_thread(self, again: bool = False) -> None:
        """Let another thread work on the queue, if there is work for it.

        One thread is called at a time, and calls the next: threads that begin together compete for the interpreter.
        """
        if again or (not self._calling and self._has_work()):
            self._calling, self.refused = True, False
            try:
                self._pool.submit(self._work)
            except RuntimeError:  # the pool keeps the task for the next thread
                self.refused = True

    def _next(self) -> Entry | None:
        """The job or call that runs next, now in the state RUNNING; None if none may run."""
        while self._has_work():
            number = heapq.heappop(self._ready)
            entry = self.entries.get(number)
            if entry is None or entry.state is not State.READY:
                continue
            if self.has_room(entry.flow):
                self.move(entry, State.RUNNING)
                return entry
            heapq.heappush(self._held[entry.flow], number)
        return None

    def _work(self) -> None:
        """A task of the pool: run entry after entry. A task for each would cost a third of the throughput."""
        with self.changed:
            self._calling = self.refused = False
            self.working += 1
            while entry := self._next():
                self._call_thread()
                self.changed.release()
                try:
                    self._run(entry)
                except BaseException:  # the thread goes on
                    log.exception("a task of the engine")
                finally:
                    self.changed.acquire()
                    self.leave(entry)
            self.working -= 1
            self.changed.notify_all()

    def stop(self, deadline: float) -> list[Entry]:
        """Wait for what runs; return the runs that are not over in time. Jobs among them are ENDING then."""
        with self.changed:
            while self.working or self.running():
                seconds = min(deadline - time.monotonic(), 0.2)  # a signal just before a wait is handled after the wait
                if seconds <= 0:
                    break
                self.changed.wait(seconds)
            left, working = self.running(), self.working
            for entry in left:
                if entry.number >= 0:
                    self.move(entry, State.ENDING)
        self._pool.shutdown(wait=not working, cancel_futures=True)  # a thread that runs a flow may never end
        return left


class JobJournal(Journal):
    """The journal of a job's run: it saves outputs, and a run gives its thread back for a long wait."""

    suspendable = True

    def __init__(self, store: Store, outside: Surroundings, prepared: Prepared, job: Job, deadline: float) -> None:
        super().__init__()
        self._store, self._secrets, self._clock = store, outside.secrets, outside.clock
        self._job, self._deadline = job, deadline
        self._changed = threading.Condition()  # the steps of a concurrent `each` share the journal
        self._unwritten, self._begun = 0, False
        self.superseded = False  # the job has ended, or another run of it began
        self._error: AsteraError | None = None
        self.saved, self.waits = dict(prepared.saved), dict(prepared.waits)

    def record(self, path: str, value: Any) -> int:
        """Save a step's output, without waiting for the disk; return the number of bytes."""
        text = to_saved(value, self._secrets)
        with self._changed:
            self.begin()
            self._unwritten += 1
        self._store.save_step(self._job.key, self._job.attempt, path, text, self._written)
        return len(text)

    def forget(self, prefix: str) -> None:
        """Save nothing in the place of what is on disk under paths that begin with this."""
        stored = self._store.load(self._job.key.seq)
        for path in [*stored.saved, *stored.waits] if stored else ():
            if path.startswith(prefix):
                self.saved.pop(path, None)
                self.waits.pop(path, None)
                self._store.save_step(self._job.key, self._job.attempt, path, "")

    def barrier(self) -> None:
        """Wait until the beginning of this attempt, and all outputs so far, are on disk."""
        with self._changed:
            self._await()
            if not self._store.leased():  # the job may be another server's by now: ask the store again
                self._begun = False
                self._await()

    def _await(self) -> None:
        self.begin()
        if not self._changed.wait_for(lambda: not self._unwritten, self._deadline - self._clock.monotonic()):
            raise _TimedOut
        if self._error is not None:
            raise self._error
        if self.superseded:
            raise Cancelled

    def begin(self) -> None:
        """Put the attempt on record, before the first output: whoever finds the job knows that this run began."""
        with self._changed:
            if not self._begun:
                self._begun = True
                self._unwritten += 1
                self._store.start(self._job.key, self._job.attempt, self._job.started or 0, self._written)

    def _written(self, current: Any, error: AsteraError | None) -> None:
        with self._changed:
            self._unwritten -= 1
            self._error = self._error or error
            self.superseded = self.superseded or not (current or error)
            self._changed.notify_all()


class MeasuringJournal(Journal):
    """Saves nothing, and returns the sizes that a JobJournal returns."""

    def record(self, path: str, value: Any) -> int:
        """The number of bytes that would be saved."""
        return len(to_saved(value))


_MEASURING = MeasuringJournal()
STOPPED = Outcome.failed("interrupted", 503, "The server is stopping.")
NO_ROOM = Outcome.failed("timeout", 504, "The call waited too long to start.", "no thread, or its limit")
_NOT_STORED = Outcome.failed("failed", 500, "The job's end could not be stored.")


def await_write(write: Callable[[Done], None]) -> Any:
    """Make a write and wait for its result; raises its error."""
    answers: queue.SimpleQueue[tuple[Any, AsteraError | None]] = queue.SimpleQueue()
    write(lambda result, error: answers.put((result, error)))
    result, error = answers.get()
    if error is not None:
        raise error
    return result


def log_outcome(what: str, flow: Flow, given: Input, outcome: Outcome) -> None:
    """Log how a job, or a synchronous request, ended."""
    level = logging.DEBUG if outcome.error is None else logging.WARNING
    if log.isEnabledFor(level):
        its_id = str(given.request["id"])
        words = f"answered {outcome.answer.code}"
        if outcome.error is not None:
            words = f"ended as {outcome.end}: {shown(outcome.reason or outcome.error['detail'], 1000)}"
        this = about(what, its_id, flow.name, given.trace)
        log.log(level, "%s %s: flow %s %s", what, its_id, flow.name, words, extra=this)


class Engine:
    """Runs jobs and synchronous calls on the threads of its queue, and records how the jobs ended.

    `prepare(seq)` reads a stored job and makes it ready to run; None if it has ended. `job_changed(key, is_due)` is
    called on the store's thread when a job's end or wait is committed; `is_due`: the housekeeper has work. Durations
    are in seconds.
    """

    def __init__(
        self,
        store: Store,
        outside: Surroundings,
        *,
        workers: int,
        retention: float,
        job_timeout: float,
        prepare: Callable[[int], Prepared | None],
        job_changed: Callable[[JobKey, bool], None],
        metrics: Metrics,
    ) -> None:
        self._store, self._outside, self._clock, self._metrics = store, outside, outside.clock, metrics
        self._prepare, self._job_changed, self._job_timeout = prepare, job_changed, job_timeout
        self._retention_ms = round(retention * 1000)
        self.queue = Queue(workers, outside.flow_named, self._run_entry)
        self._changed = self.queue.changed  # guards what follows, too
        self._call_numbers = itertools.count(-(1 << 62))
        self._mean_s: dict[str, float] = {}  # mean time of a run, by flow
        self._costly: set[int] = set()  # versions of light flows that once exceeded the budget, or the size
        self._unwritten = 0  # bytes of outcomes on their way to the disk
        #: The latest finished jobs: polls and fetches of them need not read the database. Left out are those that may
        #: still change: jobs with a callback, and those that other servers see. None: the job was deleted, perhaps
        #: before its end was told. A dict would look for its first key past all deleted ones.
        self._recent = OrderedDict[JobKey, Finish | None]()

    def admit(self, number: int, flow: Flow) -> Entry:
        """Count in a call, or a job on its way to the disk, until `dismiss`. Busy if the flow refuses more."""
        with self._changed:
            if not self._store.shared and self.queue.refuses(flow):  # a shared store counts for all servers
                message = f"The flow has reached its limit of concurrent runs ({flow.limit}). Try again later."
                raise Busy(message, self.retry_after(flow.name), 429)
            return self.queue.enter(number, flow.name)

    def _run_entry(self, entry: Entry) -> None:
        if entry.number >= 0:
            self._run_job(entry)
        elif entry.run is not None and entry.done is not None:
            entry.done(self._run_call(entry, entry.run))

    # --- synchronous calls ---

    def run_at_once(self, flow: Flow, given: Input, trace: list[dict[str, Any]] | None = None) -> Outcome | None:
        """Run a light flow on the calling thread, for a few milliseconds at most.

        None if the flow needs a thread: it is not light, once took longer or had a large response, or has a large body.
        `trace` gets the steps of a job, whose end is logged only once it is on disk.
        """
        if not flow.light or flow.version in self._costly or given.size > _LIGHT_BODY:
            return None
        run = Run(flow, given, self._outside, self._clock.monotonic() + 1, _MEASURING, trace)
        run.budget = Budget(_LIGHT_BUDGET, whole_run=True)
        outcome: Outcome | None = None
        with contextlib.suppress(BudgetExceeded):
            outcome = self._run_whole(run)
        if outcome is None or len(outcome.answer.body) > PIECE:
            self._costly.add(flow.version)
        return outcome

    def _run_whole(self, run: Run) -> Outcome:
        """Run a flow to its end, because nothing can suspend the run."""
        began = self._clock.monotonic()
        outcome = run_flow(run)
        assert isinstance(outcome, Outcome)
        self._measure(run.flow, self._clock.monotonic() - began)
        if run.trace is None:
            log_outcome("request", run.flow, run.input, outcome)
        return outcome

    def run_sync(self, run: Run, done: Callable[[Outcome], None]) -> None:
        """Run a flow on a thread of the pool, which calls `done`; raises Busy if there is no room for it."""
        with self._changed:
            entry = self._enter_call(run)
            entry.done = done
            self.queue.move(entry, State.READY)

    def run_here(self, run: Run) -> Outcome:
        """Run a flow on the calling thread, which would wait anyway and may belong to the pool; raises Busy."""
        with self._changed:
            entry = self._enter_call(run)
            self.queue.hold(entry)
            while entry.state is State.NEW:
                if self.queue.stopping or self._clock.monotonic() >= run.deadline:
                    self.queue.move(entry, State.GONE)
                    return STOPPED if self.queue.stopping else NO_ROOM
                self._changed.wait(0.2)
        try:
            return self._run_call(entry, run)
        finally:
            with self._changed:
                self.queue.leave(entry)

    def _enter_call(self, run: Run) -> Entry:
        if self.queue.stopping:
            raise Busy("The server is stopping.", 5)
        entry = self.admit(next(self._call_numbers), run.flow)
        entry.run, entry.cancel = run, run.cancel
        return entry

    def _run_call(self, entry: Entry, run: Run) -> Outcome:
        try:
            return self._run_whole(run)
        finally:
            self.queue.dismiss(entry.number)  # first, because a client that sees the end may call the flow at once

    # --- jobs ---

    def _run_job(self, entry: Entry) -> None:
        this = JobKey(entry.number, 0)
        try:
            prepared = entry.prepared = entry.prepared or self._prepare(entry.number)
            if entry.state is State.RUNNING and prepared is not None:
                self.queue.learn(prepared.flow)
                self._run_prepared(entry, prepared)
            elif entry.state is State.RUNNING:  # it has ended
                self.queue.dismiss(entry.number)
        except AsteraError as error:  # the database failed while the job was read
            log.error("job %s could not be started: %s", this, error, extra={"job": str(this)})
            with self._changed:
                entry.due = self._clock.now() + 1000  # it is tried again
                self.queue.move(entry, State.WAITING)
        except Exception:  # a fault of this program must not end the thread
            log.exception("job %s", this, extra=entry.run.about if entry.run else {"job": str(this)})
            if entry.job is not None:
                self.end(entry.job, Outcome.failed("failed", 500, "The server failed to run the job."))
            else:
                self.queue.dismiss(entry.number)

    def _run_prepared(self, entry: Entry, prepared: Prepared) -> None:
        job, flow, now = prepared.job, prepared.flow, self._clock.now()
        interrupted = job.started is not None and job.due is None  # a server ended before the run that it began
        if interrupted and (job.attempt >= MAX_ATTEMPTS or flow.restart == "fail"):
            times = f"{job.attempt} times" if job.attempt > 1 else "once"
            detail = f"The server stopped {times} while the job ran; the job is not tried again."
            self._record_end(job, prepared, Outcome.failed("interrupted", 500, detail))
            return
        goes_on = job.due is not None and job.attempt > 0 and job.started is not None  # its wait is over
        attempt, started = (job.attempt, job.started or now) if goes_on else (job.attempt + 1, now)
        entry.job = job._replace(attempt=attempt, started=started)
        began, spent = self._clock.monotonic(), (now - started) / 1000
        deadline = began + (flow.timeout or self._job_timeout) - spent
        journal = JobJournal(self._store, self._outside, prepared, entry.job, deadline)
        if prepared.stored:  # an attempt counts even if it brings the server down before its first output
            journal.begin()
        trace = list(prepared.trace)
        if interrupted and flow.restart == "rerun":
            journal.forget("")
            trace.clear()
        entry.run = run = Run(flow, prepared.input, self._outside, deadline, journal, trace, entry.cancel)
        outcome = run_flow(run)
        with self._changed:
            if not self.queue.move(entry, State.ENDING):
                return  # the job was ended at its deadline, or is left to the next start
        if journal.superseded:
            log.warning("another server has taken job %s: this run changes nothing", job.id, extra=run.about)
            self.queue.dismiss(entry.number)
        elif isinstance(outcome, int):
            self._suspend(entry, entry.job._replace(due=outcome), run, *journal.waiting)
        else:
            self._measure(flow, self._clock.monotonic() - began, spent)
            self._record_end(entry.job, run, outcome)

    def _suspend(self, entry: Entry, job: Job, run: Run, path: str, until: int) -> None:
        flow = self._outside.flow_named(job.flow)
        # for any server that has room when the wait is over
        is_free = self._store.shared and flow is not None and flow.limit is not None

        def suspended(kept: Any, error: AsteraError | None) -> None:
            with self._changed:
                cancelled = run.cancel.is_set
                if kept and not cancelled:
                    entry.due, entry.progress = job.due, run.progress
                    self.queue.move(entry, State.GONE if is_free else State.WAITING)
            if error is not None:
                self.end(job, Outcome.failed("failed", 500, "The job's wait could not be stored."))
            elif not kept:  # it has ended
                self.queue.dismiss(entry.number)
            elif cancelled:
                self.end(job, _CANCELLED)
            else:
                self._job_changed(job.key, True)

        self._store.suspend(job, path, until, to_json(run.trace or []), is_free, suspended)

    def _measure(self, flow: Flow, seconds: float, waited: float = 0.0) -> None:
        """Count a run: how long it held its thread, and how long the job had run before (both in seconds)."""
        mean = self._mean_s.get(flow.name, seconds)
        self._mean_s[flow.name] = mean + 0.2 * (seconds - mean)
        self._metrics.ran(flow.name, waited + seconds)

    # --- ends ---

    def _record_end(self, job: Job, ran: Prepared | Run, outcome: Outcome) -> None:
        """Record the end of a job that ran; wait if too many outcomes are on their way to the disk."""
        log_outcome("job", ran.flow, ran.input, outcome)
        self._store_end(self._finish(job, outcome, list(ran.trace or ())))
        if self._unwritten > _MAX_UNWRITTEN:
            with self._changed:
                self._changed.wait_for(lambda: self._unwritten <= _MAX_UNWRITTEN)

    def end(self, job: Job, outcome: Outcome) -> None:
        """End a job that no thread runs."""
        with self._changed:
            self.queue.move(self.queue.enter(job.key.seq, job.flow), State.ENDING)
        self._store_end(self._finish(job, outcome, fenced=False))

    def ended_at_once(self, job: Job, flow: Flow, given: Input) -> Finish | None:
        """Run a job that is not stored yet, if its flow is light; how it ended, None if it is to be queued."""
        trace: list[dict[str, Any]] = []
        outcome = self.run_at_once(flow, given, trace)
        return outcome and self._finish(job._replace(attempt=1, started=job.created), outcome, trace)

    def _finish(self, job: Job, outcome: Outcome, trace: Sequence[dict[str, Any]] = (), fenced: bool = True) -> Finish:
        """The end of a job, and the callback that the server owes."""
        now, callback = self._clock.now(), None
        job = job._replace(
            status=outcome.status,
            attempt=job.attempt or (1 if job.started else 0),
            due=None,
            finished=now,
            expires=now + self._retention_ms,
            error=outcome.error,
        )
        if job.callback is not None:
            document = status_document(job, job.base, offset=self._clock.offset)
            del document["callback"]  # which tells of its delivery
            callback = parse_target(job.callback.url).receiver, to_json(document)
        return Finish(job, outcome, to_json(trace) if trace else None, callback, fenced)

    def _store_end(self, finish: Finish) -> None:
        """Give an end to the store. One that cannot be stored is replaced by a small one."""
        job, size = finish.job, len(finish.outcome.answer.body) + _MIN_UNWRITTEN

        def written(moved: Any, error: AsteraError | None) -> None:
            is_replaced = error is not None and finish.outcome is not _NOT_STORED and not self.queue.stopping
            with self._changed:
                self._unwritten -= size
                self._changed.notify_all()
                if not is_replaced:  # first, because a client that sees the end may call the flow at once
                    self.queue.dismiss(job.key.seq)
            if error is not None:
                this = about("job", job.id, job.flow, None)
                log.error("the end of job %s could not be recorded: %s", job.id, error, extra=this)
            if is_replaced:
                self._store_end(self._finish(job, _NOT_STORED, fenced=finish.fenced))
            else:
                self.announce(finish, moved)

        self._store.finish(finish, written)
        with self._changed:
            self._unwritten += size

    def announce(self, finish: Finish, moved: Any = True) -> None:
        """Count an end that is on disk, and tell the others. `moved`: the job was Running until then."""
        if moved:
            self._metrics.ended[finish.job.flow, finish.outcome.end] += 1
            self._remember(finish)
        self._job_changed(finish.job.key, finish.callback is not None)

    def _remember(self, end: Finish) -> None:
        """Hold the end of a small job in memory."""
        answer, texts = end.outcome.answer, [end.job.base, end.trace or ""]
        size = len(answer.body) + sum(map(len, texts + [text for _, text in answer.headers]))
        if end.job.callback is None and size <= _RECENT_BYTES and not self._store.shared:
            self._recent.setdefault(end.job.key, end)
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        if len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    # --- questions and orders ---

    def peek(self, key: JobKey) -> tuple[Job | None, Progress | None]:
        """A job that is in memory, and its progress; None if it is not, whatever the store has."""
        if end := self._recent.get(key):
            return end.job, None
        entry = self.queue.entries.get(key.seq)
        if entry is None or (entry.state is State.ENDING and self._store.shared):  # another server may see its end
            return None, None
        run, prepared = entry.run, entry.prepared  # which the job's thread may drop at any moment
        job = entry.job or (prepared.job if prepared else None)
        return job if job and job.key == key else None, run.progress if run else entry.progress

    def result(self, key: JobKey) -> StoredResult | None:
        """The response of a finished job."""
        if end := self._recent.get(key):
            return StoredResult(end.outcome.answer, len(end.outcome.answer.body))
        return self._store.result(key)

    def forget(self, key: JobKey) -> None:
        """Drop a job that was deleted from the store; one that has expired may stay, for nobody sees it any more."""
        self._recent[key] = None
        self._drop_oldest()

    def retry_after(self, flow: str) -> int:
        """Whole seconds, at least 1, after which a new job of this flow is likely to be finished."""
        seconds = self._mean_s.get(flow, 0.5) * (1 + (self.queue.queued + self._store.queued) / self.queue.workers)
        return 1 if seconds <= 1 else min(math.ceil(seconds), 3600)

    def cancel(self, job: Job) -> bool:
        """Cancel a Running job: True if it has no thread and ends now, False if it stops at its next step."""
        with self._changed:
            entry = self.queue.enter(job.key.seq, job.flow)
            if entry.cancel is not None and (entry.state is State.RUNNING or entry.run is not None):
                if not entry.cancel.is_set:
                    self._store.ask_cancel(job.key)  # or the job would run again if a crash broke the run off
                entry.cancel.set()
                return False
            self.end(job, _CANCELLED)
        return True

    def overdue(self) -> None:
        """End what has exceeded its time: calls without a thread, jobs whose thread does not come back."""
        now = self._clock.monotonic()
        for entry in list(self.queue.entries.values()):
            if entry.run is not None and entry.run.deadline <= now:
                if entry.number < 0:
                    self._refuse(entry, NO_ROOM)
                elif entry.run.deadline + 1 < now:
                    self._end_overdue(entry, entry.run)

    def _refuse(self, entry: Entry, outcome: Outcome) -> None:
        """Answer a call, unless it has a thread."""
        with self._changed:
            if entry.state is not State.READY or entry.done is None:
                return
            self.queue.move(entry, State.GONE)
        entry.done(outcome)

    def _end_overdue(self, entry: Entry, run: Run) -> None:
        with self._changed:
            if entry.state is not State.RUNNING or not self.queue.move(entry, State.ENDING):
                return
        job = entry.job
        assert job is not None
        run.cancel.set()
        self._measure(run.flow, (self._clock.now() - (job.started or 0)) / 1000)
        error = _TimedOut("the flow exceeded its time limit, and its thread does not end")
        self._record_end(job, run, failed_run(run, error))

    def stop(self, timeout_s: float) -> int:
        """Begin nothing more, and wait for what runs; return how many runs are left to the next start."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self.queue.stopping = True
        for call in [entry for entry in list(self.queue.entries.values()) if entry.number < 0]:
            self._refuse(call, STOPPED)
        left = self.queue.stop(deadline)
        for entry in left:
            assert entry.cancel is not None
            if entry.job is not None:
                this = about("job", entry.job.id, entry.flow, None)
                log.warning("job %s: flow %s does not end in time", entry.job.id, entry.flow, extra=this)
                if entry.cancel.is_set:  # the next start must not run it
                    self.end(entry.job, _CANCELLED)
                else:
                    self._store.requeue(entry.job.key, entry.job.attempt)
            entry.cancel.set()
        return max(len(left), self.queue.working)


# ======================================================================================================================
# 9 Courier
# ======================================================================================================================

_MAX_DELIVERIES = 256  # at one time, each on its own thread
_MAX_PER_RECEIVER = 4  # deliveries at one time to one receiver
_MAX_DOUBTFUL = 64  # deliveries at one time to all doubtful receivers (see Courier)
_MAX_DOUBTFUL_KNOWN = 4096  # receivers; each is a parameter of a query, and SQLite allows 32766
_LATE_MS = 2000  # a later response makes a receiver doubtful
_LEASE_S = 10.0  # time after the timeout of a delivery in which its outcome is to be stored


def next_try(
    attempt: Attempt, number: int, retry_after_s: float, retries: Sequence[float], now: int, expires: int
) -> tuple[str, int | None]:
    """The state of a callback after its attempt of this number (from 1), and when the next attempt is due (ms).

    No attempt is made after the result expires. `Retry-After` is advice (RFC 9110, section 10.2.3): a longer time is
    cut so that a tenth of the result's lifetime remains to fetch the result.
    """
    if attempt.status is not None and 200 <= attempt.status < 300:
        return "delivered", None
    if attempt.status == 410:
        return "gone", None
    if number > len(retries) or attempt.error == "refused":
        return "failed", None
    useful_s = (expires - now) / 1000 * 0.9
    pause_s = max(retries[number - 1] * random.uniform(0.9, 1.1), min(retry_after_s, useful_s))  # noqa: S311
    next_at = now + round(pause_s * 1000)
    return ("pending", next_at) if next_at < expires else ("failed", None)


class Courier:
    """Delivers callbacks, each on its own thread, so that a slow or dead receiver does not delay the others.

    A receiver gets a few deliveries at one time. A doubtful receiver, whose last response was late or missing, gets
    one, and all doubtful receivers together get a quarter of the threads. Durations are in seconds.
    """

    def __init__(
        self,
        store: Store,
        policy: AddressPolicy,
        clock: Clock,
        metrics: Metrics,
        *,
        sign: Callable[[str, int, bytes], str] | None = None,
        timeout: float = 15.0,
        retries: Sequence[float] = (),
    ) -> None:
        self._store, self._policy, self._clock = store, policy, clock
        self._metrics, self._sign, self._timeout, self._retries = metrics, sign, timeout, retries
        self._lease_s = timeout + _LEASE_S
        self._changed = threading.Condition()  # guards what follows
        self._leases: dict[JobKey, tuple[str, float]] = {}  # receiver, and when the lease ends (monotonic)
        self._doubtful: set[str] = set()  # receivers
        self._stopped = False

    def under_way(self) -> list[JobKey]:
        """The jobs whose callbacks are being delivered, until the outcome is stored."""
        with self._changed:
            return list(self._leases)

    def send_due(self, now: int, wake: Callable[[], None]) -> int | None:
        """Begin the deliveries that are due; return when the next one will be due. `wake` is called after each one."""
        while True:
            room, busy, full = self._room()
            if room <= 0:
                return None  # the end of a delivery wakes the housekeeper
            due = self._store.claim_deliveries(now, room, held=self.under_way(), busy=busy, likely=full)
            begun = [self._begin(job, delivery, wake) for job, delivery in due]
            if all(begun) or not any(begun):
                return self._store.next_delivery(now)  # else some receivers are busy by now: look past their callbacks

    def _room(self) -> tuple[int, set[str], bool]:
        """How many deliveries can begin, which receivers get none, and whether only `likely` callbacks are sent."""
        with self._changed:
            now = self._clock.monotonic()
            for key in [key for key, (_, end) in self._leases.items() if end <= now]:
                del self._leases[key]  # the outcome could not be stored
            counts = Counter(receiver for receiver, _ in self._leases.values())
            full = sum(count for receiver, count in counts.items() if receiver in self._doubtful) >= _MAX_DOUBTFUL
            busy = {each for each in counts if each in self._doubtful or counts[each] >= _MAX_PER_RECEIVER}
            room = 0 if self._stopped else _MAX_DELIVERIES - len(self._leases)
            return room, busy | self._doubtful if full else busy, full

    def _begin(self, job: Job, delivery: Delivery, wake: Callable[[], None]) -> bool:
        """Begin a delivery unless its receiver is busy."""
        with self._changed:
            was_silent = delivery.tries and delivery.last_status is None  # also before a restart
            if was_silent and len(self._doubtful) < _MAX_DOUBTFUL_KNOWN:
                self._doubtful.add(delivery.receiver)
            room, busy, _ = self._room()
            if room <= 0 or delivery.receiver in busy:
                return False
            self._leases[job.key] = delivery.receiver, self._clock.monotonic() + self._lease_s
        # A daemon, because a receiver that hangs must not delay the end of the process, as a thread of a pool would.
        thread = threading.Thread(target=self._send, args=(job, delivery, wake), name="astera-courier", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread can be had
            self._settle(job.key)
            return False
        return True

    def _settle(self, key: JobKey) -> None:
        with self._changed:
            self._leases.pop(key, None)
            self._changed.notify_all()

    def _send(self, job: Job, delivery: Delivery, wake: Callable[[], None]) -> None:
        attempt, retry_after_s = self.deliver(job, delivery)
        answered, receiver = attempt.status is not None, delivery.receiver
        with self._changed:
            if answered and attempt.duration_ms <= _LATE_MS:
                self._doubtful.discard(receiver)
            elif len(self._doubtful) < _MAX_DOUBTFUL_KNOWN:
                self._doubtful.add(receiver)
        now = self._clock.now()
        state, next_at = next_try(attempt, delivery.tries + 1, retry_after_s, self._retries, now, job.expires or now)
        words = f"answered {attempt.status}" if answered else f"gave no answer: {attempt.error}"
        level = logging.DEBUG if state == "delivered" else logging.WARNING
        this = about("job", job.id, job.flow, delivery.trace)
        log.log(level, "callback of job %s: %s %s; it is %s", job.id, receiver, words, state, extra=this)

        def recorded(result: Any, error: AsteraError | None) -> None:
            if error is None:  # else the lease goes on, so that the callback is not sent again and again
                self._metrics.callbacks[state] += 1
                self._settle(job.key)
                wake()

        self._store.record_delivery(job.key, attempt, delivery.next_at, state, next_at, recorded)

    def deliver(self, job: Job, delivery: Delivery) -> tuple[Attempt, float]:
        """Make one attempt now; return it, and the receiver's `Retry-After` in seconds."""
        body, began, sent_s = delivery.body.encode(), self._clock.now(), self._clock.wall() // 1000
        message_id = f"msg_{job.id}"
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"astera-lite/{__version__}",
            "Location": f"{job.base}/api/jobs/{job.id}/result",
            "webhook-id": message_id,
            "webhook-timestamp": str(sent_s),
        }
        if self._sign is not None:
            headers["webhook-signature"] = self._sign(message_id, sent_s, body)
        if delivery.trace is not None:
            headers |= delivery.trace.headers()
        this = about("job", job.id, job.flow, delivery.trace)
        status, error, retry_after_s = None, None, 0.0
        started = self._clock.monotonic()
        try:
            answer = fetch("POST", delivery.url, headers, body, timeout=self._timeout, max_bytes=0, policy=self._policy)
            status = answer.code
            retry_after_s = parse_retry_after(header_value(answer.headers, "retry-after"), self._clock.wall())
        except AddressRefused as refused:
            log.warning("callback of job %s: %s", job.id, refused, extra=this)
            error = "refused"
        except OutboundError as failed:
            error = str(failed)
        except Exception as odd:  # a fault of this program must not lose the callback
            log.exception("callback of job %s", job.id, extra=this)
            error = type(odd).__name__
        return Attempt(began, round((self._clock.monotonic() - started) * 1000), status, error), retry_after_s

    def stop(self, timeout_s: float) -> int:
        """Begin no more deliveries, and wait for those under way; return how many did not end in time.

        Their receivers may get them twice, because the next start sends them again.
        """
        deadline = time.monotonic() + min(timeout_s, self._lease_s)
        with self._changed:
            self._stopped = True
            while self._leases and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(min(left, 0.2))  # as in Engine.stop
            return len(self._leases)


# ======================================================================================================================
# 10 Housekeeper
# To add a chore: a method that does one piece of work, and a call in `tick`; if it is not due once a second, the method
# returns when it wants to be called again.
# ======================================================================================================================

_PURGE_BATCH = 128
_CHORES_EVERY_MS = 1000
_FORGET_EVERY_MS = 3_600_000


class Housekeeper:
    """The background thread. `tick(now)` does what is due; `run` is only the loop around it."""

    def __init__(
        self, store: Store, engine: Engine, courier: Courier, clock: Clock, chores: Sequence[Callable[[], object]] = ()
    ) -> None:
        self._store, self._engine, self._courier, self._clock = store, engine, courier, clock
        self.chores = [engine.overdue, *chores]  # each once a second
        self._wake = threading.Event()
        self._stopping = False
        self._next: dict[str, int] = {}  # when groups of chores are due again
        self._faults: dict[Callable[..., Any], str] = {}  # last fault of the database, by the chore that met it
        self._thread = threading.Thread(target=self.run, name="astera-housekeeper", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Something may be due now."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Stop the thread."""
        self._stopping = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def run(self) -> None:
        """Tick until stopped."""
        while not self._stopping:
            self._wake.clear()
            now = self._clock.now()
            self._wake.wait(max(self.tick(now) - now, 0) / 1000)

    def tick(self, now: int) -> int:
        """Do what is due at `now` (milliseconds since the epoch); return the latest time of the next tick."""
        self._unreachable = False
        self._try(self.look_at_clock)
        if self._is_due("chores", now):
            for chore in self.chores:
                self._try(chore)
        if self._is_due("forget", now, _FORGET_EVERY_MS):
            self._try(self._store.forget_flows)
        if self._is_due("purge", now):
            self._try(self._store.purge, now, _PURGE_BATCH, self._purged)
        moments = (self._try(self._engine.queue.release, now), self._try(self._courier.send_due, now, self.wake))
        return int(min([now + _CHORES_EVERY_MS, *filter(None, moments)]))

    def _is_due(self, chores: str, now: int, every_ms: int = _CHORES_EVERY_MS) -> bool:
        """Whether chores are due; if so, they are due again in `every_ms`."""
        if now < self._next.get(chores, 0) <= now + every_ms:  # later than that only if the database's clock went back
            return False
        self._next[chores] = now + every_ms
        return True

    def _purged(self, count: Any, error: AsteraError | None) -> None:
        if count:  # there may be more, which are purged after the writes that came meanwhile
            log.debug("purged %d jobs", count)
            self._next.pop("purge", None)
            self.wake()

    def _try(self, do: Callable[..., Any], *arguments: Any) -> Any:
        """The result of the function; None if the function fails, so that the rest of the tick goes on."""
        if self._unreachable:
            return None
        began, fault = self._clock.monotonic(), self._faults.pop(do, "")
        try:
            return do(*arguments)
        except StoreError as error:
            self._unreachable = self._clock.monotonic() >= began + 1  # each other call would take as long
            if str(error) not in (fault, *self._faults.values()):  # else the log would repeat it each second
                log.error("housekeeping: %s", error)
            self._faults[do] = str(error)
        except Exception:  # a fault in a chore must not end the thread, which has other chores
            log.exception("housekeeping")
        return None

    def look_at_clock(self) -> None:
        """Find out whether the system's clock jumped."""
        if jump := self._clock.look():
            way = "ahead" if jump > 0 else "back"
            message = "the system's clock jumped %s by %s: results and waits use the server's own time"
            log.warning(message, way, datetime.timedelta(seconds=abs(jump) // 1000))
            self._store.keep_clock_offset(self._clock.offset)
            self._engine.queue.release(sys.maxsize)  # jobs that wait for a date look at the clock again; others wait on


# ======================================================================================================================
# 11 Service
# ======================================================================================================================


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on this host."""
    addresses = literal_addresses(host)
    return bool(addresses) and all(address.is_loopback for address in addresses)


def _all_checked(**makes: Callable[[], Any]) -> dict[str, Any]:
    """The results of functions, by the names of their settings; raises ConfigError with the faults of all of them."""
    made: dict[str, Any] = {}
    faults: list[Fault] = []
    for name, make in makes.items():
        try:
            made[name] = make()
        except ConfigError as error:
            faults += error.faults
        except ValueError as error:
            faults.append(Fault(name, "", str(error)))
    if faults:
        raise ConfigError(faults)
    return made


def _check_public_url(url: str | None) -> None:
    if url is not None and "?" in parse_target(url).path:
        raise ValueError("must not have a query")


def _check_database(path: str) -> None:
    if path in ("", ":memory:") or path.startswith("file:"):
        raise ValueError(f"{shown(path)} is not the path of a file, which jobs need: use one in a temporary folder")


def _signature(folder: str | None) -> dict[str, tuple[int, int]]:
    """Time and size of every file in a folder that its flows depend on, by name."""
    found: dict[str, tuple[int, int]] = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder) if folder is not None else ():
            if is_flow_file(entry.name) or entry.name == CONNECTIONS_FILE or entry.name.endswith(".py"):
                found[entry.name] = 0, 0  # also of a dangling link
                with contextlib.suppress(OSError):
                    about = entry.stat()
                    found[entry.name] = about.st_mtime_ns, about.st_size
    return found


class Deployer:
    """Puts flows into service: those of a folder, and those that the program deploys.

    `deployments` is the set in service. A change replaces the whole set, so that readers need no lock.
    """

    def __init__(self, folder: str | None, connections: dict[str, Any]) -> None:
        """`connections` gets what the folder's connections.json has."""
        self.deployments = Deployments()
        self.kinds = dict(STEP_KINDS)
        self.folder, self._connections = folder, connections
        self.own: dict[str, Flow] = {}  # deployed by the program
        self.shared: Callable[[], tuple[list[Flow], list[Fault]]] = lambda: ([], [])  # deployed on all servers
        self._built = lru_cache(64)(lambda name, text: self.build(json.loads(text), name))  # replaced flows with jobs
        self.changing = threading.RLock()  # held while flows are read and put into service
        self._read = self._seen = _signature(None)

    def build(self, tree: Any, name: str, source: str = "") -> Flow:
        """Compile a flow; raises FlowError with every fault."""
        with _faults_of(source or name):
            return build_flow(
                tree, name, source=source, kinds=self.kinds, folder=self.folder, connections=self._connections
            )

    def reload(self) -> list[Fault]:
        """Read the flow files again, log new faults, and return all faults. Running jobs keep their flow."""
        with self.changing:
            known = set(self.deployments.faults)
            self._read = self._seen = _signature(self.folder)
            self.deployments = self.read()
        for fault in self.deployments.faults:
            if fault not in known:
                log.error("%s", fault)
        return self.deployments.faults

    def read(self) -> Deployments:
        """The flows of the program, of the files as they are now and of all servers, and the faults."""
        flows, faults = list(self.own.values()), list[Fault]()
        if self.folder is not None and os.path.isdir(self.folder):
            connections, faults = load_connections(self.folder, self._connections)
            for name in self._connections.keys() - connections:
                del self._connections[name]
            self._connections.update(connections)
            read, found = load_flows(self.folder, self.build, self.deployments.by_name)
            if faults:  # of connections.json: a flow that misses a connection in this file is no further fault
                found = [fault for fault in found if CONNECTIONS_FILE not in fault.message]
            flows, faults = flows + read, faults + found
        elif self.folder is not None:
            what = "is no folder" if os.path.exists(self.folder) else "there is no such folder"
            cure = "start where it is, or set `flows` to its path; `new NAME` makes one with a first flow"
            faults = [Fault(self.folder, "", f"{what}: {cure}")]
        shared, found = self.shared()  # they replace files of the same name
        return Deployments([*flows, *shared], [*faults, *found], self.deployments.by_name)

    def refresh(self, anyway: bool = False) -> None:
        """Read the flow files again if they have changed, but not since the last call; or `anyway`."""
        before, self._seen = self._seen, _signature(self.folder)
        if anyway or (self._seen != self._read and self._seen == before):
            self.reload()
            log.info("read the flows again%s", optional("astera_lite_notices:on_reload", self.deployments))

    def replaced(self, name: str, *flow: Flow) -> Deployments:
        """The deployments with this flow under a name, or without one; raises FlowError for the flow's faults."""
        others = {other.name: other for other in self.deployments.by_name.values() if other.name != name}
        faults = [fault for fault in self.deployments.faults if fault.where != f"{name}.json"]
        deployments = Deployments([*others.values(), *flow], faults, others)
        if len(deployments.faults) > len(faults):
            raise FlowError(deployments.faults[len(faults) :])
        return deployments

    def flow_of(self, job: Job, stored: Callable[[int], tuple[str, str] | None]) -> Flow | None:
        """The flow that a job was accepted with, else the one of that name; `stored` reads the name and text."""
        flow = self.deployments.by_version.get(job.version)
        if flow is None and (found := stored(job.version)) is not None:
            try:
                flow = self._built(*found)
            except FlowError as error:
                message = "job %s: the flow it was accepted with cannot be deployed any more: %s"
                log.warning(message, job.id, error, extra=about("job", job.id, job.flow, None))
        return flow or self.deployments.by_name.get(job.flow)


class Watchers:
    """Functions to call when a job changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards `by_job`
        self.by_job: dict[JobKey, list[Callable[[], None]]] = {}

    def add(self, key: JobKey, watcher: Callable[[], None]) -> None:
        """Call `watcher` once, on any thread, when the job changes or the application stops.

        Add the watcher first, then look at the job: a change in between would not be seen otherwise.
        """
        with self._lock:
            self.by_job.setdefault(key, []).append(watcher)

    def remove(self, key: JobKey, watcher: Callable[[], None]) -> None:
        """Forget a watcher."""
        with self._lock:
            if left := [each for each in self.by_job.get(key, ()) if each != watcher]:
                self.by_job[key] = left
            else:
                self.by_job.pop(key, None)

    def tell(self, *keys: JobKey) -> None:
        """Call the watchers of jobs."""
        for key in keys:
            if key in self.by_job:  # mostly not: who adds a watcher later looks at the job after that
                with self._lock:
                    watchers = self.by_job.pop(key, [])
                for watcher in watchers:
                    watcher()


def check_callback(url: str, policy: AddressPolicy, errors: InputErrors) -> None:
    """Add a fault if a callback may not be sent to this URL, as far as its text tells (names are not resolved)."""
    try:
        target = parse_target(url)
        for address in literal_addresses(target.host):
            if refusal := policy.refusal(target.host, address):
                raise ValueError(f"is refused: {refusal}; the setting callback_allow names those that are allowed")
    except ValueError as error:
        errors.add("query", "callbackUrl", str(error))


def _fingerprint(request: StoredRequest, callback: Delivery | None) -> bytes:
    """A hash of a request: the same for the same request under one idempotency key."""
    query = [part.partition("=")[::2] for part in request.query.split("&") if part]
    decoded = [(unquote(name, plus=True), unquote(value, plus=True)) for name, value in query]
    segments = [unquote(segment) for segment in request.path.split("/")]
    values = [request.method, segments, decoded, callback and callback.url, request.headers]
    return hashlib.sha256(to_json(values).encode() + b"\0" + request.body).digest()


CANCEL_ELSEWHERE_S = 2  # time that a cancel waits for another server, which runs the job
_MAX_CLAIMED = 2000  # Running jobs that `take_up` looks at each time, for some milliseconds


def check_unfinished(job: Job, but: str = "") -> None:
    """Raise Conflict for a job that is finished, unless its error has the code `but`."""
    if job.status is not Status.RUNNING and not (job.error and job.error["code"] == but):
        raise Conflict(f"The job is finished: {job.status.value}.")


class Application:
    """The application without HTTP: flows, jobs, results, callbacks. `Server(app)` puts it on a socket.

    Nothing starts before `start`, and `stop` ends all of it. Raises ConfigError at once, StoreError on start. Programs
    use AsteraLite, which adds the methods that they call.
    """

    def __init__(
        self, settings: Settings, clock: Clock | None = None, environ: Mapping[str, str] | None = None
    ) -> None:
        self.settings = settings
        shared = is_postgres(settings.database)
        self.clock = clock or (wing("astera_lite_nodes:DatabaseClock") if shared else Clock)()
        self.node_name = settings.node or socket.gethostname()
        self.node: Any = None  # what this server does as one of several on one database: astera_lite_nodes.Node
        environ = os.environ if environ is None else environ
        local = is_loopback(settings.host) and settings.public_url is None
        key, named, origins = settings.callback_secret, settings.secrets, settings.cors_origins
        made = _all_checked(
            callback_allow=partial(AddressPolicy, settings.callback_allow, loopback=local),
            callback_secret=partial(late("astera_lite_secrets:signer"), key) if key is not None else lambda: None,
            secrets=partial(late("astera_lite_secrets:read_secrets"), named, environ) if named else dict,
            public_url=partial(_check_public_url, settings.public_url),
            cors_origins=partial(late("astera_lite_admin:parse_origins"), origins) if origins else set,
            database=partial(_check_database, settings.database),
        )
        self.policy, self._sign, secrets = made["callback_allow"], made["callback_secret"], made["secrets"]
        self.origins: set[str] = made["cors_origins"]
        allowed = [pattern.strip() for pattern in settings.env_allow.split(",")]
        self.outside = Surroundings(
            self.clock,
            self.policy,
            {name: value for name, value in environ.items() if any(fnmatchcase(name, each) for each in allowed)},
            secrets,
            settings.max_result,
            settings.max_step_response,
            connections={},
            masked=Mask(secrets.values()),
            flow_named=lambda name: self.deployments.by_name.get(name),
            data=settings.data,
            own_database=os.path.realpath(settings.database),
            folder=os.path.abspath(settings.flows) if settings.flows else None,
            kept={},
        )
        self.base = (settings.public_url or f"http://{settings.host}:{settings.port}").rstrip("/")
        self.deployer = Deployer(settings.flows or None, self.outside.connections)
        self.watchers = Watchers()
        self.tokens: list[Token] = []
        self._process = 0  # the process in which it is open
        self.future_threads = weakref.WeakSet[threading.Thread]()
        self._coming_bytes = 0  # of requests on their way to the disk; the queue's lock guards them
        self.metrics = Metrics()
        self.started_at = 0  # milliseconds since the epoch, by the system's clock

    # --- life ---

    @property
    def is_open(self) -> bool:
        """Whether it runs, from start to the very end of stop. After a fork, only the parent has its threads."""
        return self._process == os.getpid()

    def start(self) -> None:
        """Open the database, load the flows, take up what was left, and start the threads."""
        settings = self.settings
        for logger in (log, _warnings_log):
            logger.addFilter(self.outside.masked.log_record)
        if is_postgres(settings.database):
            rules = {"durability": settings.durability, "lease": settings.lease, "name": self.node_name}
            self.store: Store = wing("astera_lite_postgres:PostgresStore")(settings.database, **rules)
        else:
            page_size = parse_size(settings.page_size)
            self.store = SqliteStore(settings.database, settings.durability, settings.max_database, page_size)
        try:
            self._start()
        except BaseException as error:
            self.store.close(1.0)  # or its lock would be held by a program that has no server
            if isinstance(error, StoreError) and not self.store.shared:
                raise StoreError(f"{os.path.realpath(settings.database)}: {error}") from None
            raise

    def _start(self) -> None:
        settings = self.settings
        self.tokens = self.store.tokens()
        if self.store.shared:
            self.node = wing("astera_lite_nodes:Node")(self)
        self.deployer.reload()
        self.engine = Engine(
            self.store,
            self.outside,
            workers=settings.workers,
            retention=settings.retention,
            job_timeout=settings.job_timeout,
            prepare=self._prepare,
            job_changed=self._job_changed,
            metrics=self.metrics,
        )
        self.courier = Courier(
            self.store,
            self.policy,
            self.clock,
            self.metrics,
            sign=self._sign,
            timeout=settings.callback_timeout,
            retries=settings.callback_retries,
        )
        chores = [self.deployer.refresh, self.read_tokens, self.take_up, self.tell_watchers]
        chores += self.node.chores if self.node else ()
        self.housekeeper = Housekeeper(self.store, self.engine, self.courier, self.clock, chores)
        self.clock.begin(self.store.last_seen())
        if self.clock.offset:
            words = "the system's clock is %s behind the last recorded moment: the server's time continues from there"
            log.warning(words, datetime.timedelta(seconds=-self.clock.offset // 1000))
            self.store.keep_clock_offset(self.clock.offset)
        self.keys = JobKeys(self.store.last_seq(), self.store.node, self.store.nodes)
        if self.node is not None:
            self.node.start()
        left = sum(iter(self.take_up, 0))  # whole before the first one runs: the database may be damaged
        if left:
            log.info("jobs resumed that were not finished when the server stopped: %d", left)
        self.housekeeper.start()  # first: if no thread can be had, no job has begun
        self.engine.queue.start()
        self.started_at = self.clock.wall()
        self._process = os.getpid()

    def stop(self) -> int:
        """Finish what runs, within `shutdown_timeout`, and close; how many jobs and calls still ran."""
        if not self.is_open or self.engine.queue.stopping:
            return 0
        try:
            return self._stop(self.settings.shutdown_timeout)
        except KeyboardInterrupt:  # a person does not want to wait; but the database is to be closed
            self._stop(0.0)
            raise

    def _stop(self, timeout_s: float) -> int:
        if self.node is not None:
            self.node.hand_over()
        deadline = time.monotonic() + timeout_s
        left = self.engine.stop(timeout_s)
        successor = "another server" if self.node else "the next start"
        if left:
            log.warning("still running after %gs: %d jobs or calls; %s resumes the jobs", timeout_s, left, successor)
        self.outside.close()
        if undelivered := self.courier.stop(deadline - time.monotonic()):
            log.warning("callbacks that were still in progress: %d; %s sends them again", undelivered, successor)
        self.housekeeper.stop(5.0)
        if self.node is not None:
            self.node.stop(5.0)
        self.housekeeper.look_at_clock()  # for the last time: the next start needs the offset of the stored times
        self.store.close(10.0)
        self._process = 0
        self.watchers.tell(*list(self.watchers.by_job))
        deadline = max(deadline, time.monotonic() + 1)
        for thread in self.future_threads - {threading.current_thread()}:  # which may run the callback of a future
            thread.join(max(deadline - time.monotonic(), 0))
        if not left:
            for logger in (log, _warnings_log):
                logger.removeFilter(self.outside.masked.log_record)
        return left

    def take_up(self) -> int:
        """Queue the Running jobs that nobody has in hand; return how many.

        They are the jobs of a server that died, those whose wake-up was lost, and those whose end could not be stored.
        `_prepare` finds out which of them were interrupted, and `Engine._run_prepared` decides whether these run again.
        """
        found = self.node.claim() if self.node else self.store.claim(self.engine.queue, _MAX_CLAIMED)
        for seq, due, flow in found:
            self.engine.queue.put(seq, flow, due=due)
        return len(found)

    def tell_watchers(self) -> None:
        """Call the watchers of finished jobs whose end they were not told."""
        elsewhere = [key for key in list(self.watchers.by_job) if key.seq not in self.engine.queue]
        self.watchers.tell(*self.store.ended(elsewhere))

    # --- flows ---

    @property
    def deployments(self) -> Deployments:
        """The flows in service."""
        return self.deployer.deployments

    def read_tokens(self) -> None:
        """Read the tokens again; while the database cannot be read, the known ones stay valid."""
        with contextlib.suppress(StoreError):
            tokens = self.store.tokens()
            if tokens != self.tokens:  # else the list stays the one that `Server.route` knows
                self.tokens = tokens
                log.info("tokens: %s", ", ".join(token.name for token in tokens) or "none")

    # --- accepting and finding jobs ---

    def new_job(self, flow: Flow, base: str, token: str, callback_url: str | None = None) -> Job:
        """A job that is not stored yet; `base` begins the URLs in its callback."""
        now = self.clock.now()
        callback = Delivery(callback_url) if callback_url else None
        return Job(self.keys.new(now), flow.name, flow.version, Status.RUNNING, now, base, token, callback=callback)

    def accept(self, ready: Prepared, request: StoredRequest, idempotency_key: str | None, done: Done) -> None:
        """Store a job, then run it. `done` gets it once it is on disk (see Store for the thread).

        If an earlier job has the idempotency key, `done` gets that one, or Conflict. Raises Busy.
        """
        job, flow = ready.job, ready.flow
        fingerprint = b"" if idempotency_key is None else _fingerprint(request, job.callback)
        try:
            self._check_room(flow)
            # A flow that only computes is run before its job is stored, so that both need one commit.
            ended = self.engine.ended_at_once(job, flow, ready.input)
            with self.engine.queue.changed:  # a second request with the key finds room, or the job that took it
                if ended is None:
                    self.engine.admit(job.key.seq, flow)
                try:
                    submission = Submission(job, request, flow.text, idempotency_key, fingerprint, ended)
                    if self.node is not None:
                        submission = self.node.placed(submission, flow)
                    self.store.add(submission, partial(self._accepted, ready, submission, done))
                except BaseException:  # out of memory: the job is not on its way, and must not count for its flow
                    self.engine.queue.dismiss(job.key.seq)
                    raise
        except Busy as full:
            if idempotency_key is None:
                raise

            def found(known: Any, error: AsteraError | None, full: Busy = full) -> None:
                done(known, error or (None if known else full))

            self.store.find_key(job.flow, job.token, idempotency_key, fingerprint, job.created, found)
            return
        self._count_coming(len(request.body))

    def _count_coming(self, size: int) -> None:
        if self.settings.max_database is not None:
            with self.engine.queue.changed:
                self._coming_bytes += size

    def _check_room(self, flow: Flow) -> None:
        """Raise Busy unless there is room for a job."""
        if self.engine.queue.queued + self.store.queued >= self.settings.max_queue:
            raise Busy("The queue of jobs is full.", self.engine.retry_after(flow.name))
        most = self.settings.max_database
        if most is not None and not self.store.shared and self.store.size() + self._coming_bytes >= most:
            raise Busy("The database has reached its maximum size: results that expire free space.", 60)

    def _accepted(
        self, ready: Prepared, submission: Submission, done: Done, result: Any, error: AsteraError | None
    ) -> None:
        """After the write: run a job that is on disk, forget one that is not."""
        self._count_coming(-len(submission.request.body))
        job, ended = ready.job, submission.ended
        added = error is None and result.key == job.key
        try:
            if added:
                self.metrics.accepted[job.flow] += 1
            if ended is None:
                if not submission.owned:
                    self.node.tell("jobs")
                elif added:
                    self.engine.queue.put(job.key.seq, job.flow, ready)
                else:
                    self.engine.queue.dismiss(job.key.seq)
            elif added:
                log_outcome("job", ready.flow, ready.input, ended.outcome)
                self.engine.announce(ended)
        finally:  # whatever fails here, the client waits for an answer
            done(result, error)

    def find(self, key: JobKey, caller: Token) -> tuple[Job, Progress | None] | None:
        """A job and its progress; None if the job is unknown or expired, or belongs to another token."""
        job, progress = self.engine.peek(key)
        job = job or self.store.get(key)
        if job is None or not (caller.admin or job.token == caller.name):
            return None
        if progress is None and self.node is not None and job.status is Status.RUNNING:
            progress = self.node.progress_of(key)
        return (job, progress) if job.expires is None or job.expires > self.clock.now() else None

    def expired(self, key: JobKey | None) -> bool:
        """Whether the id of an unknown job is so old that the result would have expired."""
        oldest = self.clock.now() - round(self.settings.retention * 1000)
        return key is not None and key.seq >> 12 <= oldest  # without its counter, `seq` is a time

    # --- running ---

    def runner(self, flow: Flow) -> Any:
        """What runs synchronous calls of a flow: the engine, or the node, which shares the flow's limit with others.

        The `done` of its `run_sync` gets the outcome, or why the run cannot begin, on any thread.
        """
        return self.node if self.node and flow.limit is not None else self.engine

    def new_run(self, flow: Flow, given: Input) -> Run:
        """A synchronous run that has not begun."""
        limit = min(flow.timeout or self.settings.sync_timeout, self.settings.sync_timeout)
        return Run(flow, given, self.outside, self.clock.monotonic() + limit)

    def _prepare(self, seq: int) -> Prepared | None:
        """A stored job, ready to run; None if it has ended, or ends here because its flow is not deployed."""
        loaded = self.store.load(seq)
        if loaded is None:
            return None
        job = loaded.job
        if loaded.cancelled:
            self.engine.end(job, _CANCELLED)
            return None
        flow = self.deployer.flow_of(job, self.store.flow_text)
        try:
            if flow is None:
                raise NotFound(f"the flow {job.flow} is not deployed any more")
            given = flow.bind(loaded.request, job.id)
        except (NotFound, InputError, ValueError) as error:
            this = about("job", job.id, job.flow, loaded.request.trace)
            log.warning("job %s cannot be run: %s", job.id, error, extra=this)
            self.engine.end(job, Outcome.failed("interrupted", 500, "The flow is not deployed any more."))
            return None
        saved = {path: from_saved(text, self.outside.secrets) for path, text in loaded.saved.items()}
        return Prepared(job, flow, given, saved, loaded.waits, loaded.trace, True)

    def _job_changed(self, key: JobKey, is_due: bool) -> None:
        self.watchers.tell(key)
        if self.node is not None:
            self.node.has_room()
        if is_due:
            self.housekeeper.wake()

    def check_open(self) -> None:
        """Raise StoreError unless the application was started, and has not stopped."""
        if not self.is_open:
            raise StoreError("The application is not running: enter it with `with app:`, or call app.start().")

    def ask_cancel(self, job: Job) -> bool:
        """Cancel a Running job on any server: True if it ends soon, False if it stops at its next step.

        Wait no longer than CANCEL_ELSEWHERE_S for the end of a job of another server.
        """
        here = self.node is None or job.key.seq in self.engine.queue
        return self.engine.cancel(job) if here else bool(self.node.cancel(job))


# ======================================================================================================================
# 12 Access
# ======================================================================================================================


class AccessError(AsteraError):
    """The caller may not do this. `status`: 401, 403 or 421; `code`: the error code of RFC 6750, or empty."""

    def __init__(self, status: int, detail: str, code: str = "") -> None:
        super().__init__(detail)
        self.status = status
        if status == 401 or code:
            more = f', error="{code}"' if code else ""
            self.headers = (("WWW-Authenticate", f'Bearer realm="astera-lite"{more}'),)


ADMIN_TOKEN = "token"  # noqa: S105 (the name of the token in the settings)


def token_digest(token: str) -> bytes:
    """The SHA-256 of a token, which is stored in its place: nobody can guess a long random token from it."""
    return hashlib.sha256(token.encode("utf-8", "replace")).digest()


def _is_followed_link(head: "Head") -> bool:
    """Whether a person follows a link to a read-only page: a navigation of a whole window (Fetch Metadata)."""
    sent = head.headers
    window = sent.get("sec-fetch-mode") == "navigate" and sent.get("sec-fetch-dest", "document") == "document"
    return head.method == "GET" and (head.path == "/" or (window and not head.path.startswith("/api/publishing")))


def check_exposure(settings: Settings, host: str, has_tokens: bool) -> bool:
    """Whether everybody may call while there is no token.

    Raises ConfigError for a server without a token that other machines can reach.
    """
    loopback = is_loopback(host)
    may_be_open = settings.insecure_open or (loopback and settings.public_url is None)
    if settings.token is None and not has_tokens and not may_be_open:
        cure = "set ASTERA_LITE_TOKEN or make one with the command `token`, or set insecure_open to let everybody in"
        name, what = "host", f"{host} can be reached from other machines"
        if loopback:
            name, what = "public_url", "makes the server public"
        raise ConfigError([Fault(name, "", f"{what}, and there is no token: {cure}")])
    return may_be_open


class Access:
    """Who may call: tokens, and the rules against pages of other sites (Host, Origin, Sec-Fetch-Site).

    `host` is the address on which the server listens. If there are no tokens, not even revoked ones, everybody may call
    an open server, and nobody another one. Raises ConfigError like `check_exposure`.
    """

    def __init__(self, app: Application, host: str) -> None:
        settings = app.settings
        token, public_url = settings.token, settings.public_url
        self._open = check_exposure(settings, host, any(token.digest for token in app.tokens))
        self._setting = [] if token is None else [Token(ADMIN_TOKEN, token_digest(token), "admin")]
        self._app, self.origins = app, app.origins
        origin = "/".join((public_url or "").lower().split("/")[:3])  # it has no path, nor the usual port
        self._own = origin.removesuffix(":443" if origin.startswith("https:") else ":80") or None
        names = [host, "localhost", "127.0.0.1", "::1", *([parse_target(public_url).host] if public_url else ())]
        hosts = {f"[{name}]" if ":" in name else name for name in names}
        self._hosts = hosts if is_loopback(host) else None  # None: any host

    def check_origin(self, head: "Head", base: str) -> None:
        """Raise AccessError for a host name that is not the server's, and for a page of another site.

        `base` is the origin by which the request addresses this server.
        """
        headers = head.headers
        host = headers.get("host", "").lower()
        if self._hosts is not None and host and re.sub(":[0-9]+$", "", host) not in self._hosts:
            cure = "call it as localhost or 127.0.0.1, or let the setting public_url name it"
            raise AccessError(421, f"This server is not {shown(host)}: {cure}.")
        origin = headers.get("origin")
        if origin in self.origins:
            return
        if origin is not None and origin not in (base, self._own):
            cure = "cors_origins names those that may"
            raise AccessError(403, f"Pages of {shown(origin)} may not call this server; {cure}.")
        if headers.get("sec-fetch-site") == "cross-site" and not _is_followed_link(head):
            raise AccessError(403, "Pages of other sites may not call this server.")

    def caller(self, authorization: str | None) -> Token:
        """The token that a request has (RFC 6750), or ANYBODY on an open server without tokens; raises AccessError."""
        tokens = [*self._setting, *self._app.tokens]
        if not tokens and self._open:
            return ANYBODY
        import hmac  # noqa: PLC0415 (only servers with tokens need it)

        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise AccessError(401, "This needs a token: send Authorization: Bearer …")
        digest = hashlib.sha256(given.strip().encode("latin-1", "replace")).digest()
        found = [token for token in tokens if hmac.compare_digest(digest, token.digest)]  # all, so that none is faster
        if not found:
            raise AccessError(401, "The token is unknown or revoked.", "invalid_token")
        return found[0]


# ======================================================================================================================
# 13 Wire
# ======================================================================================================================


class WireError(AsteraError):
    """A request is refused because of its form, and its connection is closed."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class MethodNotAllowed(WireError):
    """The resource exists, but not with this method."""

    def __init__(self, allowed: Iterable[str]) -> None:
        methods = ", ".join(sorted(allowed))
        super().__init__(405, f"The method is not allowed here; allowed: {methods}.")
        self.headers = (("Allow", methods),)


class Head(NamedTuple):
    """The head of a request (RFC 9112). `headers` have lower-case names; repeated ones are joined by commas."""

    method: str
    path: str  # raw
    query: str  # raw
    version: int  # 10 or 11
    headers: Mapping[str, str]
    length: int  # of the body; 0 if it is chunked
    chunked: bool
    expects_continue: bool
    keep_alive: bool


class Reply(NamedTuple):
    """A response to write. `stream` yields the pieces of a body that is too large for `body`."""

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""
    stream: Iterator[bytes] | None = None
    length: int = 0  # of the stream


_METHODS = frozenset(  # of IANA's registry: 405 if a path does not serve them; others are 501
    (
        "ACL BASELINE-CONTROL BIND CHECKIN CHECKOUT CONNECT COPY DELETE GET HEAD LABEL LINK LOCK MERGE MKACTIVITY"
        " MKCALENDAR MKCOL MKREDIRECTREF MKWORKSPACE MOVE OPTIONS ORDERPATCH PATCH POST PROPFIND PROPPATCH PUT QUERY"
        " REBIND REPORT SEARCH TRACE UNBIND UNCHECKOUT UNLINK UNLOCK UPDATE UPDATEREDIRECTREF VERSION-CONTROL"
    ).split()
)
_NAME = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"  # possessive, like most patterns here: a hostile line causes no backtracking
_TARGET = r'(?:(?i:https?)://([!-"$-.0->A-~]++))?+(/[!-"$->@-~]*+)?+(?:\?([!-"$-~]*+))?+(?= )|[!-~]++'
_REQUEST_LINE = re.compile(rf"({_NAME}) ({_TARGET}) HTTP/([0-9])\.([0-9])")
_FIELDS = re.compile(rf"(?:{_NAME}:[\t\x20-\x7e\x80-\xff]*+\r\n)*+".encode("latin-1"))
_STRAY = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")
_ORIGIN_LINE = re.compile(rb"(?i)\r\norigin:[ \t]*([!-~]+)[ \t]*\r\n")
_QUOTED = r'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t\x20-\x7e\x80-\xff])*+"'
_EXTENSION = rf"[ \t]*+;[ \t]*+{_NAME}(?:[ \t]*+=[ \t]*+(?:{_NAME}|{_QUOTED}))?+"
_CHUNK_SIZE = re.compile(rf"([0-9A-Fa-f]{{1,15}})(?:{_EXTENSION})*+\r\n".encode("latin-1"))
_MAX_CHUNK_LINE = 4096  # bytes
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]++|%[0-9A-Fa-f]{2})+)(?::([0-9]{1,5}))?")


def _is_host(text: str) -> bool:
    """Whether this is valid in a Host header: a name or an address, and a port up to 65535 (RFC 9110, section 7.2)."""
    match = _HOST.fullmatch(text)
    if match is None or len(text) > 261 or int(match[2] or 0) > 65535:  # 255 bytes of a name (RFC 1035), and a port
        return False
    if text[0] == "[":
        try:
            ipaddress.IPv6Address(match[1][1:-1])
        except ValueError:
            return False
    return True


def _parse_fields(block: bytes, version: int) -> tuple[dict[str, str], int, bool, bool, bool]:
    """The members of a Head from `headers` on; `block` holds the header lines, each ending with CRLF."""
    if not _FIELDS.fullmatch(block):
        raise WireError(400, "A header line is malformed.")
    headers: dict[str, str] = {}
    for line in block.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in ("host", "content-length"):
                raise WireError(400, f"The header {name} is repeated.")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    length, coding = headers.get("content-length", "0"), headers.get("transfer-encoding")
    if not (length.isascii() and length.isdigit()):
        raise WireError(400, "Content-Length is not a number.")
    if coding is not None:
        if "content-length" in headers:
            raise WireError(400, "Content-Length and Transfer-Encoding exclude each other.")
        if coding.lower() != "chunked" or version == 10:
            raise WireError(400, "The only transfer coding is chunked, once, and in HTTP/1.1.")
    if not _is_host(headers.get("host", "" if version == 11 else "none")):
        raise WireError(400, "The header host is missing or malformed.")
    expect = headers.get("expect")
    if expect is not None and expect.lower() != "100-continue":
        raise WireError(417, "The only expectation is 100-continue.")
    connection = {word.strip(" \t").lower() for word in headers.get("connection", "").split(",")}
    keep_alive = "close" not in connection and (version == 11 or "keep-alive" in connection)
    size = int(length.lstrip("0")[:19] or 0)  # 19 digits exceed every limit; int() is slow for thousands
    return headers, size, coding is not None, expect is not None and version == 11, keep_alive


# Most requests of a client have the same headers: saves a tenth of a poll.
_known_fields = lru_cache(maxsize=512)(_parse_fields)


def _request_line(line: bytes) -> Sequence[Any]:
    """Method, target, host, path and query of the target, and the two digits of the version."""
    match = _REQUEST_LINE.fullmatch(line.decode("latin-1"))
    if match is None:
        raise WireError(400, "The request line is malformed; in a URL, percent-encode blanks and letters beyond ASCII.")
    return match.groups()


def parse_head(block: bytes, max_url: int) -> Head:
    """The head of a request, without the empty line that ends it; raises WireError.

    A malformed head is 400 whatever else is wrong with it: the status must not depend on how it is cut into packets.
    """
    line, _, rest = block.partition(b"\r\n")
    method, target, host, path, query, major, minor = _request_line(line)
    version = 10 if minor == "0" else 11
    fields = (_known_fields if len(rest) <= 1024 else _parse_fields)(rest, version)
    if major != "1":
        raise WireError(505, "The protocol is HTTP/1.1.")
    if len(target) > max_url:
        raise WireError(414, f"The URL is longer than {show_size(max_url)}.")
    if method not in _METHODS:
        raise WireError(501, "The method is not known.")
    if method == "CONNECT":  # the bytes after it are not a request
        raise MethodNotAllowed(HTTP_METHODS)
    if host is not None and _is_host(host):  # replaces the header (RFC 9112, section 3.2.2)
        path, fields = path or "/", ({**fields[0], "host": host}, *fields[1:])
    elif target == "*" and method == "OPTIONS":
        path = "*"
    elif host is not None or path is None:
        raise WireError(400, "The request target is malformed.")
    return Head(method, path, query or "", version, *fields)


_known_head = lru_cache(maxsize=512)(parse_head)  # saves a quarter of a synchronous call that is repeated


class RequestParser:
    """Splits the bytes of a connection into requests, however they are cut into packets.

    Call `feed` with bytes, then `head()`, then `body()`; each of the two returns None until head or body is complete.
    After a WireError, the caller must not read from the connection any more.
    """

    def __init__(self, max_header: int, max_url: int, max_body: int) -> None:
        self._max_header, self._max_url, self._max_body = max_header, max_url, max_body
        self._longest = max_url + 128 + max_header  # bytes of a head
        self._buffer = bytearray()
        self._seen = 0  # bytes searched for the end of the head
        self._head: Head | None = None
        self._body = bytearray()  # decoded part of a chunked body
        self._trailer: int | None = None  # bytes of trailer lines so far, once the last chunk has arrived

    @property
    def buffered(self) -> int:
        """Number of bytes in the buffers."""
        return len(self._buffer) + len(self._body)

    @property
    def begun(self) -> bool:
        """Whether a part of a request has arrived."""
        return self._head is not None or len(self._buffer) > 2 * self._buffer.startswith(b"\r\n")

    def feed(self, data: bytes) -> None:
        """Add bytes of the connection."""
        self._buffer += data

    def head(self) -> Head | None:
        """The head of the next request."""
        buffer = self._buffer
        if not buffer:
            return None
        start = 2 if buffer.startswith(b"\r\n") else 0  # one empty line before a request is ignored (RFC 9112, 2.2)
        stop = start + self._longest + 4
        end = buffer.find(b"\r\n\r\n", max(self._seen - 3, 0), stop)
        if end < 0:
            line = buffer.find(b"\r\n", start, stop)
            if _STRAY.search(buffer, max(self._seen - 1, 0), stop):
                raise WireError(400, "Lines end with CR LF.")
            if line >= max(self._seen - 1, 0):  # it has just arrived; a TLS client, for instance, sends no more
                _request_line(bytes(buffer[start:line]))
            if len(buffer) >= stop:
                self._refuse_long(line - start)
            self._seen = len(buffer)
            return None
        head = (_known_head if end <= 1024 else parse_head)(bytes(buffer[start : end + 2]), self._max_url)
        if end > self._max_header and end + 2 - (line := buffer.find(b"\r\n", start)) > self._max_header:
            self._refuse_long(line - start)
        self._head = head
        if head.length > self._max_body:
            raise WireError(413, f"The body is larger than {show_size(self._max_body)}.")
        del buffer[: end + 4]
        self._seen, self._trailer = 0, None
        return head

    def _refuse_long(self, line: int) -> NoReturn:
        """Refuse a head that is too long; `line` is the length of the request line, negative if it is incomplete."""
        if 0 <= line <= self._max_url + 128:
            raise WireError(431, f"The header block is longer than {show_size(self._max_header)}.")
        raise WireError(414, f"The URL is longer than {show_size(self._max_url)}.")

    def refused_head(self) -> Head:
        """The head of a request that is refused early: its header Origin, and its method if that is HEAD."""
        match = _ORIGIN_LINE.search(self._buffer)
        method = "HEAD" if self._buffer.lstrip(b"\r\n").startswith(b"HEAD ") else ""
        return Head(method, "", "", 11, {"origin": match[1].decode()} if match else {}, 0, False, False, False)

    def body(self) -> bytes | None:
        """The complete body of the request whose head was returned last; may be empty. Call `head()` next."""
        head = self._head
        assert head is not None
        if head.chunked:
            if not self._dechunk():
                return None
            body, self._body = bytes(self._body), bytearray()
        elif len(self._buffer) < head.length:
            return None
        else:
            body = bytes(self._buffer[: head.length])
            del self._buffer[: head.length]
        self._head = None
        return body

    def _dechunk(self) -> bool:
        """Decode the complete chunks (RFC 9112, section 7.1); true once body and trailer are complete."""
        buffer, at = self._buffer, 0
        try:
            while True:
                end = buffer.find(b"\n", at, at + _MAX_CHUNK_LINE) + 1
                if not end:
                    if len(buffer) - at >= _MAX_CHUNK_LINE:
                        raise WireError(400, "A line of the chunked body is too long.")
                    return False
                line = bytes(buffer[at:end])
                if self._trailer is None:
                    size = self._chunk_size(line)
                    after = bytes(buffer[end + size : end + size + 2]) if size else b"\r\n"
                    if not b"\r\n".startswith(after):
                        raise WireError(400, "A chunk is longer than its size.")
                    if len(after) < 2:
                        return False
                    self._body += buffer[end : end + size]
                    self._trailer, at = (None, end + size + 2) if size else (0, end)
                    continue
                at = end
                if line == b"\r\n":
                    return True
                self._trailer += len(line)
                if self._trailer > self._max_header or not _FIELDS.fullmatch(line):
                    raise WireError(400, "The trailer of the chunked body is malformed or too long.")
        finally:
            del buffer[:at]

    def _chunk_size(self, line: bytes) -> int:
        match = _CHUNK_SIZE.fullmatch(line)
        if match is None:
            raise WireError(400, "The size of a chunk is malformed.")
        size = int(match[1], 16)
        if len(self._body) + size > self._max_body:
            raise WireError(413, f"The body is larger than {show_size(self._max_body)}.")
        return size


_http_date = lru_cache(maxsize=1)(partial(formatdate, usegmt=True))


def response_head(
    response: Reply, request_id: str, keep_alive: bool, version: int = 11, has_length: bool = True
) -> bytes:
    """Status line and headers of a response, with the framing of RFC 9112."""
    status = response.status
    lines = [f"HTTP/1.1 {status} {PHRASES.get(status, '')}\r\nDate: {_http_date(int(time.time()))}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in response.headers]
    if status not in (204, 304) and has_length:
        lines.append(f"Content-Length: {len(response.body) or response.length}\r\n")
    if not keep_alive:
        lines.append("Connection: close\r\n")
    elif version == 10:
        lines.append("Connection: keep-alive\r\n")
    lines.append(f"X-Request-Id: {request_id}\r\n\r\n")
    return "".join(lines).encode("latin-1")


# ======================================================================================================================
# 14 Routes
# To add a route: a function of an Exchange and a row in ROUTES.
# ======================================================================================================================

#: Where each mode of a flow is published.
PREFIXES = {"synchronous": "/api/publishing", "asynchronous": "/api/publishingAsync"}
NO_STORE = ("Cache-Control", "no-store")
REVALIDATED = ("Cache-Control", "private, no-cache")
JSON_TYPE = ("Content-Type", "application/json")
PROBLEM_TYPE = ("Content-Type", "application/problem+json")
_VARY = (("Vary", "Prefer"),)
_FLOW_HEADERS = (("X-Content-Type-Options", "nosniff"), ("Content-Security-Policy", "sandbox"))
READING = frozenset({"GET", "HEAD"})
#: The headers of preconditions, which astera_lite_admin evaluates.
_CONDITIONS = frozenset({"if-match", "if-none-match", "if-modified-since", "if-unmodified-since"})
_STATUS_PATH = "/api/jobs/{id}/status"

Seen = tuple[Job, Progress | None]  #: a job and its progress


# --- errors ---


class UnknownJob(NotFound):
    """No such job, the job of another token, or a job whose result has expired."""

    headers = (("Job-Status", Status.UNKNOWN.value),)

    def __init__(self, job_id: str, expired: bool) -> None:
        super().__init__("The job has expired." if expired else "There is no such job.")
        self.id, self.reason = job_id[:100], "expired" if expired else "not-found"
        self.members = {"id": self.id, "reason": self.reason, "jobStatus": Status.UNKNOWN.value}


def error_response(x: "Exchange", error: Exception) -> Reply:
    """The problem document (RFC 9457) for an error; an unforeseen error is a 500 that reveals nothing internal."""
    headers = [PROBLEM_TYPE, NO_STORE]
    if x.head.path.startswith(tuple(PREFIXES.values())):
        headers += _VARY
    if x.job_status and not isinstance(error, UnknownJob):
        headers.append(("Job-Status", x.job_status))
    if not isinstance(error, AsteraError):
        about = optional("astera_lite_notices:about", x) or None
        told = (x.request_id, x.head.method, shown(x.head.path, 200))
        log.error("request %s: %s %s", *told, exc_info=error, extra=about)
        detail = "The server failed. Look up `requestId` in its log for the reason."
        return Reply(500, headers, json_body(problem(500, detail, requestId=x.request_id)))
    headers += error.headers
    detail = str(error)
    if isinstance(error, UnknownJob) and x.route is not None and x.route.path == _STATUS_PATH:
        document = {"id": error.id, "status": Status.UNKNOWN.value, "reason": error.reason, "detail": detail}
        return Reply(error.status, [JSON_TYPE, *headers[1:]], json_body(document))
    if isinstance(error, StoreError):
        detail = f"The database cannot be used at this time: {detail}."
    if isinstance(error, InputError) and error.status == 415:
        types = ", ".join(x.flow.content_types if x.flow else ("application/json",))
        headers += [("Accept", types)] * bool(types)
        headers += [("Accept-Patch", types)] * bool(types and x.head.method == "PATCH")
        headers += [("Accept-Encoding", "identity")] * (error.errors[0]["name"] == "Content-Encoding")
    return Reply(error.status, headers, json_body(problem(error.status, detail, **error.members)))


# --- requests ---


class Route(NamedTuple):
    """A row of ROUTES. `{name}` in the path matches one segment, `*` at its end whatever follows."""

    method: str
    path: str
    handle: "Callable[[Exchange], Reply | None]"
    without_token: bool = False  # anybody may call it
    check: "Callable[[Exchange], None] | None" = None  # raises the error that refuses a request before its body is read
    slow: bool = False  # takes longer than a look-up, and so runs on another thread than the loop's


class Exchange:
    """One request, and the way to its response.

    A function that handles a request, such as a route, returns the reply or raises an error. Or it returns None, and
    has another such function called later, by `post`, `read` or `later`.
    """

    body = b""
    caller = ANYBODY
    route: Route | None = None
    flow: Flow | None = None
    path = ""  # raw, behind the prefix of a publishing route
    job_status = ""  # of the job that the request is about, once it is found
    answered = False
    refusal: AsteraError | None = None  # the reply, once the body has been read
    on_close: Callable[[], None] | None = None  # called if the client closes the connection before the answer

    def __init__(self, handler: "Handler", head: Head) -> None:
        self.app, self.request_id = handler.server.app, handler.server.next_request_id()
        self.head = head
        self.values: dict[str, str] = {}  # of the path's placeholders
        self.began = time.monotonic()
        self._handler, self._server = handler, handler.server

    @property
    def awaited(self) -> bool:
        """Whether the reply is still to come, and the client still there."""
        return self._handler.exchange is self

    @property
    def origin(self) -> str:
        """The server's origin, as the request names it."""
        return f"{self._server.scheme}://{self.head.headers.get('host') or self._server.url.partition('//')[2]}"

    @property
    def base(self) -> str:
        """The base of URLs in responses."""
        return self._server.base or self.origin

    def call(self, function: Callable[..., Reply | None], *arguments: Any) -> None:
        """Call a function, on any thread: what it returns or raises is the answer. Does nothing if that was given."""
        if self.answered:
            return
        try:
            if (reply := function(*arguments)) is not None:
                self._server.on_loop(self.answer, reply)
        except Exception as error:
            self._server.on_loop(self.fail, error)

    def post(self, function: Callable[..., Reply | None], *arguments: Any) -> None:
        """`call` a function on the loop's thread: at once if this is the thread, otherwise soon."""
        self._server.on_loop(self.call, function, *arguments)

    def read(self, function: Callable[[], Reply | None]) -> None:
        """`call` a function that reads the store: on the loop's thread, or on another if servers share the store."""
        if self.app.store.shared:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                self._server.pool.submit(self.call, function)
        else:
            self.post(function)

    def later(self, seconds: float, function: Callable[[], Reply | None], early: bool) -> None:
        """`call` a function on the loop's thread after so many seconds, unless the request is answered by then.

        If `early`, it is called at once when the server stops or the client has sent its last byte.
        """
        self._server.on_loop(self._handler.later, self, seconds, function, early)

    def answer(self, reply: Reply) -> None:
        """Send a reply; only on the loop's thread."""
        if not _CONDITIONS.isdisjoint(self.head.headers) and self.head.method in READING:
            reply = optional("astera_lite_admin:conditional", self, reply) or reply
        self._handler.answer(self, reply)

    def fail(self, error: Exception) -> None:
        """Send the reply to an error; only on the loop's thread."""
        self.answer(error_response(self, error))


_PREFERENCES = {"wait": '[0-9]+|"[0-9]+"', "respond-async": '(?:"")?'}  # with patterns of their values
_LIST_ITEM = re.compile(r'(?:[^",]|"(?:[^"\\]|\\.)*+"?)++')  # a comma in quotes separates nothing


def parse_prefer(value: str) -> dict[str, str]:
    """The preferences `wait` and `respond-async` (RFC 7240); the first of each counts, a malformed one does not."""
    found: dict[str, str] = {}
    for item in _LIST_ITEM.findall(value):
        name, _, given = (part.strip(" \t") for part in item.partition(";")[0].lower().partition("="))
        if name in _PREFERENCES and re.fullmatch(_PREFERENCES[name], given):
            found.setdefault(name, given.strip('"'))
    return found


def _wait_of(x: Exchange, preferences: Mapping[str, str]) -> int | None:
    """The seconds that a client wants to wait, and may."""
    text = preferences.get("wait")
    return None if text is None else int(min(float(text), x.app.settings.max_wait))


def check_may_call(x: Exchange, flow: str) -> None:
    """Raise AccessError unless the caller may call this flow."""
    if not x.caller.may_call(flow):
        raise AccessError(403, f"The token {x.caller.name} may not call the flow {flow}.", "insufficient_scope")


def check_coding(x: Exchange) -> None:
    """Raise InputError for a body that is compressed (RFC 9110, section 15.5.16)."""
    coding = x.head.headers.get("content-encoding")
    if coding and x.body and coding.lower() != "identity":
        message = "must be identity: send the body as it is"
        raise InputError([{"in": "header", "name": "Content-Encoding", "message": message}], status=415)


# --- responses ---


def entity_tag(body: bytes) -> str:
    """A strong ETag of a document: Python's own hash, which is cheap, and different after a restart."""
    return f'"{hash(body) & (1 << 64) - 1:x}"'


def one_line_each(headers: Iterable[tuple[str, str]]) -> Pairs:
    """Headers with one line for each name: the last one counts, which is the server's own; two lists join them all."""
    lines: dict[str, tuple[str, str]] = {}
    for name, value in headers:
        key = name.lower() if name.lower() != "set-cookie" else f"{name}: {value}"  # each cookie keeps its line
        if key in ("vary", "access-control-expose-headers") and key in lines:
            value = ", ".join(dict.fromkeys(re.split("[ \t]*,[ \t]*", f"{lines[key][1]},{value}")))
        lines[key] = (name, value)
    return tuple(lines.values())


def flow_response(answer: Answer, more: Pairs = _VARY) -> Reply:
    """A flow's response with further headers, and with those that protect browsers and caches from it."""
    headers = answer.headers + more
    names = {name.lower() for name, _ in headers}
    if len(names) < len(headers):
        headers = one_line_each(headers)
    if "cache-control" not in names:
        usual = REVALIDATED if "etag" in names else ("Cache-Control", "private, no-store")
        headers += (NO_STORE if headers[:1] == (PROBLEM_TYPE,) else usual,)
    return Reply(answer.code, headers + _FLOW_HEADERS, answer.body)


def status_response(x: Exchange, seen: Seen, more: Iterable[tuple[str, str]] = (), code: int = 200) -> Reply:
    """A status document. A 202 has the Location of the status; the status of a finished job, that of the result."""
    (job, progress), base = seen, x.base
    headers = [JSON_TYPE, ("Job-Status", job.status), NO_STORE]
    if code == 202:
        headers.append(("Location", f"{base}/api/jobs/{job.id}/status"))
    headers += more
    if job.status is Status.RUNNING:
        headers.append(("Retry-After", str(x.app.engine.retry_after(job.flow))))
    body = status_body(job, base, progress, x.app.clock.offset)
    if job.status is not Status.RUNNING and code == 200:
        headers.append(("Location", f"{base}/api/jobs/{job.id}/result"))
        if x.head.method in READING:
            headers[2:3] = REVALIDATED, ("ETag", entity_tag(body))
    return Reply(code, headers, body)


_RANGED = 1 << 20  # bytes; a client may request a part of a result of this size or more


def _result_response(x: Exchange, seen: Seen, more: Sequence[tuple[str, str]]) -> Reply:
    """The result of a job, with the headers of a job and `more`; a status document while it is running."""
    job = seen[0]
    if job.status is Status.RUNNING:
        return status_response(x, seen, more, 202)
    stored = x.app.engine.result(job.key)
    if stored is None:
        raise UnknownJob(job.id, x.app.expired(job.key))
    code, headers, _ = stored.answer
    names = {name.lower() for name, _ in headers}
    tag = [("ETag", f'"{job.id}"')] if code < 300 and "etag" not in names else []  # a result never changes
    response = flow_response(stored.answer, (("Job-Status", job.status.value), *tag, *more))
    if stored.in_pieces:
        response = response._replace(stream=x.app.store.result_pieces(job.key, 0, stored.size), length=stored.size)
    if stored.size >= _RANGED and code == 200 and x.flow is None and "accept-ranges" not in names:
        response = optional("astera_lite_admin:with_ranges", x, job, stored, response) or response
    return response


# --- jobs ---


def find_job(x: Exchange, job_id: str) -> Seen:
    """A job that the caller may see, by its id; raises UnknownJob."""
    key = JobKey.parse(job_id)
    seen = x.app.find(key, x.caller) if key is not None else None
    if seen is None:
        raise UnknownJob(job_id, x.app.expired(key))
    x.job_status = seen[0].status
    return seen


def answer_when_finished(x: Exchange, job: Job, seconds: float, answer: Callable[[Seen], Reply]) -> None:
    """Answer when the job is finished, or after so many seconds with its state at that time."""

    def look(final: bool = False) -> Reply | None:
        if not x.awaited:
            return None
        if not final:
            x.app.watchers.add(job.key, changed)  # before the look: a change in between is not missed
        seen = x.app.find(job.key, x.caller)
        if final or seen is None or seen[0].status is not Status.RUNNING:
            x.app.watchers.remove(job.key, changed)
            return answer(seen or find_job(x, job.id))
        return None

    changed = partial(x.read, look)
    x.on_close = partial(x.app.watchers.remove, job.key, changed)
    x.later(seconds, lambda: x.read(partial(look, True)), True)
    x.read(look)


def job_state(answer: Callable[[Exchange, Seen, Pairs], Reply], x: Exchange) -> Reply | None:
    """GET /api/jobs/{id}/status, GET /api/jobs/{id}/result: at once, or with `Prefer: wait=N` when it is finished"""
    seen = find_job(x, x.values["id"])
    wait_s = _wait_of(x, parse_prefer(x.head.headers.get("prefer", "")))
    applied = () if wait_s is None else (("Preference-Applied", f"wait={wait_s}"),)
    if not wait_s or seen[0].status is not Status.RUNNING:
        return answer(x, seen, applied)
    answer_when_finished(x, seen[0], wait_s, lambda seen: answer(x, seen, applied))
    return None


# --- publishing ---


def with_head(names: Iterable[str]) -> set[str]:
    """The methods of a path, given those of its routes."""
    return {*names, "OPTIONS"} | ({"HEAD"} if "GET" in names else set())


def allowed_methods(matches: list[dict[str, Flow]], mode: str) -> set[str]:
    """The methods of a resource in a mode."""
    names = {name for methods in matches for name, flow in methods.items() if mode in flow.modes}
    return with_head(names) if mode == "synchronous" else {*names, "OPTIONS"}


def find_flow(mode: str, x: Exchange) -> None:
    """Find the flow that is called, and the raw path behind the prefix; raises NotFound, MethodNotAllowed."""
    path = x.head.path[len(PREFIXES[mode]) :]
    matches = x.app.deployments.match(path)
    if not matches:
        raise NotFound(f"No flow publishes {shown(path, 200)}. The endpoints are listed at /api/deployments.")
    method = "GET" if x.head.method == "HEAD" and mode == "synchronous" else x.head.method
    flow = next((methods[method] for methods in matches if method in methods), None)  # the most literal is first
    if flow is None:
        raise MethodNotAllowed(allowed_methods(matches, mode))
    if mode not in flow.modes:
        (other,) = flow.modes
        raise NotFound(f"This flow is published {other}ly only: call {PREFIXES[other]}{flow.resource}")
    check_may_call(x, flow.name)
    # a flow that has one of these headers as a parameter evaluates them itself
    if method != "GET" and _CONDITIONS.isdisjoint(flow.header_names) and not _CONDITIONS.isdisjoint(x.head.headers):
        wing("astera_lite_admin:check_conditions")(x)
    x.flow, x.path = flow, path


def _stored_request(x: Exchange, flow: Flow, query: str) -> StoredRequest:
    check_coding(x)
    sent = x.head.headers
    declared = {name: sent[name] for name in flow.header_names if name in sent}
    trace = (optional("astera_lite_notices:parse_trace", sent) or None) if "traceparent" in sent else None
    return StoredRequest(flow.method, x.path, query, declared, x.body, trace)


def _take_callback(x: Exchange, flow: Flow, asynchronous: bool, errors: InputErrors) -> tuple[str | None, str]:
    """The callbackUrl of the raw query, checked without a look-up of its host, and the query without it."""
    query = x.head.query
    if "%" not in query and "callback" not in query.lower():
        return None, query
    known = [*(item.name for item in flow.parameters if item.where == "query"), *flow.selecting]
    given, rest, behind = [], [], []
    for part in query.split("&"):
        name, _, value = part.partition("=")
        with contextlib.suppress(ValueError):  # binding refuses what does not decode
            name = unquote(name, plus=True)
        if name == "callbackUrl":
            given.append(value)
            continue
        rest.append(part)
        if name not in known and re.fullmatch("callback[_-]?url", name, re.IGNORECASE):  # it would be ignored
            errors.add("query", name, "is not known here: write callbackUrl")
        elif name not in known and given:
            behind.append(part)
    if not given:
        return None, query
    url = None
    try:
        if not asynchronous:
            cure = "call /api/publishingAsync, or send Prefer: respond-async"
            cure = cure if "asynchronous" in flow.modes else "leave it out, or publish the flow asynchronously too"
            raise ValueError(f"is for asynchronous requests: {cure}")
        if len(given) > 1:
            raise ValueError("must be given once")
        url = unquote(given[0], plus=False)
        if behind and "?" in given[0]:
            whole = urllib.parse.quote("&".join([url, *behind]), safe="")
            raise ValueError(f"ends at its first &, because it is not percent-encoded: write callbackUrl={whole}")
        check_callback(url, x.app.policy, errors)
    except ValueError as error:
        errors.add("query", "callbackUrl", str(error))
    return url, "&".join(rest)


def _idempotency_key(x: Exchange, errors: InputErrors) -> str | None:
    value = x.head.headers.get("idempotency-key")
    if value is None:
        return None
    match = re.fullmatch(r'"([!-~]{1,255})"|([!#-~][!-~]{0,254})', value)
    if match is None:
        errors.add("header", "Idempotency-Key", "must be 1 to 255 visible ASCII characters, quoted or bare")
        return None
    return match[1] or match[2]


def answer_submitted(
    x: Exchange,
    new: JobKey,
    wait_s: int | None,
    headers: Sequence[tuple[str, str]],
    job: Any,
    error: AsteraError | None,
) -> Reply | None:
    """Answer once a job is on disk: 202, or the result if the client waits for it. `new` is the job that was sent."""
    if error is not None:
        raise error
    replayed = job.key != new
    if replayed:
        headers = [*headers, ("Idempotency-Replayed", "true")]

    def answer(seen: Seen) -> Reply:
        if wait_s is not None and seen[0].status is not Status.RUNNING:
            where = ("Content-Location", f"{x.base}/api/jobs/{job.id}/result")
            with contextlib.suppress(UnknownJob):  # a replayed job may expire at this moment
                return _result_response(x, seen, [where, *headers])
        return status_response(x, seen, headers, 202)

    if wait_s and job.status is Status.RUNNING:
        answer_when_finished(x, job, wait_s, answer)
    elif replayed:
        x.read(lambda: answer(x.app.find(job.key, x.caller) or (job, None)))
    else:
        return answer((job, None))
    return None


def _submit(x: Exchange, flow: Flow, preferences: Mapping[str, str], applied: list[str]) -> None:
    """Accept a job, or refuse the request with all its faults at once."""
    errors = InputErrors()
    callback_url, query = _take_callback(x, flow, True, errors)
    idempotency_key = _idempotency_key(x, errors)
    request = _stored_request(x, flow, query)
    job = x.app.new_job(flow, x.base, x.caller.name, callback_url)
    given = flow.bind(request, job.id, errors)
    if (wait_s := _wait_of(x, preferences)) is not None:
        applied = [*applied, f"wait={wait_s}"]
    headers = (*_VARY, ("Preference-Applied", ", ".join(applied))) if applied else _VARY
    done = partial(x.post, answer_submitted, x, job.key, wait_s, headers)
    x.app.accept(Prepared(job, flow, given), request, idempotency_key, done)


def _call_flow(x: Exchange, flow: Flow) -> Reply | None:
    """Run a flow synchronously."""
    errors = InputErrors()
    _, query = _take_callback(x, flow, False, errors)
    if "idempotency-key" in x.head.headers and "idempotency-key" not in flow.header_names:
        cure = "leave it out, or publish the flow asynchronously too"
        if "asynchronous" in flow.modes:
            cure = f"call {PREFIXES['asynchronous']}{flow.resource} with Prefer: wait=60"
        errors.add("header", "Idempotency-Key", f"is for asynchronous requests, which are stored: {cure}")
    given = flow.bind(_stored_request(x, flow, query), x.request_id, errors)
    outcome = x.app.engine.run_at_once(flow, given)
    if outcome is not None:
        return flow_response(outcome.answer)

    def answer(outcome: Outcome | AsteraError) -> Reply:
        if isinstance(outcome, AsteraError):
            raise outcome
        return flow_response(outcome.answer)

    run = x.app.new_run(flow, given)
    late = Outcome.failed("timeout", 504, "The flow exceeded its time limit.")
    x.later(run.deadline + 0.25 - x.app.clock.monotonic(), partial(answer, late), False)
    x.app.runner(flow).run_sync(run, partial(x.post, answer))
    return None


def publish(mode: str, x: Exchange) -> Reply | None:
    """METHOD /api/publishing{resource}, METHOD /api/publishingAsync{resource}"""
    flow, prefer = cast(Flow, x.flow), x.head.headers.get("prefer")
    preferences = parse_prefer(prefer) if prefer else {}
    prefers = "respond-async" in preferences and "asynchronous" in flow.modes and x.head.method != "HEAD"
    if mode == "synchronous" and not prefers:
        return _call_flow(x, flow)
    _submit(x, flow, preferences, ["respond-async"] if mode == "synchronous" else [])
    return None


# --- the rest ---


def health_document(app: Application) -> dict[str, Any]:
    """What /health tells anybody; `status` is ok or unavailable, and `reason` says why."""
    queue = app.engine.queue
    starved = "no thread can be had for jobs: allow this process more" if queue.refused and not queue.working else None
    reason = app.store.fault or starved or ("the server is stopping" if queue.stopping else None)
    return {
        "status": "ok" if reason is None else "unavailable",
        "reason": reason,
        "version": __version__,
        "jobs": queue.counts(),
        "database": {"bytes": app.node.size if app.node else app.store.size()},
        "deployments": {"published": len(app.deployments.by_name), "faults": len(app.deployments.faults)},
    }


def health(x: Exchange) -> Reply:
    """GET /health"""
    document, node = health_document(x.app), x.app.node
    if x.caller != NOBODY:
        finished = sum(list(x.app.metrics.ended.values()))
        document |= {"workers": x.app.settings.workers, "finished": finished}
        document |= {"node": x.app.node_name} if node else {}
    if node and x.caller.admin:
        document["nodes"] = node.members
    code, more = (200, ()) if document["reason"] is None else (503, (("Retry-After", "5"),))
    return Reply(code, [JSON_TYPE, NO_STORE, *more], json_body(document))


_MAY_DEPLOY = late("astera_lite_admin:check_may_deploy")
ROUTES = [
    *(Route("*", f"{PREFIXES[mode]}/*", partial(publish, mode), check=partial(find_flow, mode)) for mode in MODES),
    Route("GET", _STATUS_PATH, partial(job_state, status_response)),
    Route("GET", "/api/jobs/{id}/result", partial(job_state, _result_response)),
    Route("GET", "/api/jobs/{id}", late("astera_lite_admin:job_details"), slow=True),
    Route("DELETE", "/api/jobs/{id}", late("astera_lite_admin:job_delete")),
    Route("POST", "/api/jobs/{id}/cancel", late("astera_lite_admin:job_cancel")),
    Route("POST", "/api/jobs/{id}/rerun", late("astera_lite_admin:job_rerun"), slow=True),
    Route("POST", "/api/jobs/{id}/callback", late("astera_lite_admin:job_callback")),
    Route("GET", "/api/jobs", late("astera_lite_admin:job_list"), slow=True),
    Route("GET", "/api/deployments", late("astera_lite_admin:deployment_list"), slow=True),
    Route("GET", "/api/deployments/{name}", late("astera_lite_admin:deployment_one")),
    Route("PUT", "/api/deployments/{name}", late("astera_lite_admin:deploy"), check=_MAY_DEPLOY, slow=True),
    Route("DELETE", "/api/deployments/{name}", late("astera_lite_admin:undeploy"), check=_MAY_DEPLOY, slow=True),
    Route("GET", "/openapi.json", late("astera_lite_documents:openapi"), slow=True),
    Route("GET", "/postman.json", late("astera_lite_documents:postman"), slow=True),
    Route("GET", "/health", health, without_token=True),
    Route("GET", "/metrics", late("astera_lite_admin:metrics"), check=late("astera_lite_admin:check_may_measure")),
    Route("GET", "/", late("astera_lite_admin:console"), without_token=True),
]

_PREFLIGHT = Route("OPTIONS", "*", late("astera_lite_admin:options"), without_token=True)
_BY_PATH: dict[str, dict[str, Route]] = {}
for _row in ROUTES:
    _BY_PATH.setdefault(_row.path, {})[_row.method] = _row
#: What stands before a placeholder, its name, and what stands behind it.
_PATTERNS = [
    (before, name, after, methods)
    for path, methods in _BY_PATH.items()
    if "{" in path or "*" in path
    for before, name, after in [re.split("[{}]", path.replace("*", "{*}"))]
]


def find_routes(path: str) -> tuple[dict[str, Route], dict[str, str]]:
    """The routes of a raw path by method, and what its placeholders match; both are empty if there are none."""
    for before, name, after, methods in _PATTERNS:
        if path.startswith(before) and path.endswith(after):
            value = path[len(before) : len(path) - len(after)]
            if name == "*" or (value and "/" not in value):
                return methods, {name: value}
    return _BY_PATH.get(path, {}), {}


def route_request(x: Exchange, access: Access) -> None:
    """Authorise a request and find its route. Raises the error that refuses it before its body is read."""
    head = x.head
    access.check_origin(head, x.origin)
    if head.method == "OPTIONS":
        x.route = _PREFLIGHT
        return
    routes, x.values = find_routes(head.path)
    route = routes.get(head.method) or (routes.get("GET") if head.method == "HEAD" else None) or routes.get("*")
    try:
        x.caller = access.caller(head.headers.get("authorization"))
    except AccessError:
        if route is None or not route.without_token:
            raise
        x.caller = NOBODY
    if not routes:
        raise NotFound(f"There is nothing at {shown(head.path, 200)}. The endpoints are listed at /api/deployments.")
    if route is None:
        raise MethodNotAllowed(with_head(routes))
    x.route = route
    if route.check is not None:
        route.check(x)


# ======================================================================================================================
# 15 Loop
# One thread serves every socket. Other threads pass their responses to it by `Server.post`, which wakes the selector.
# ======================================================================================================================

_READ = 64 << 10  # most bytes that are read from a socket at once
_READ_CHUNKED = 16 << 10  # the same for a chunked body: so much in chunks of one byte takes the parser 3 ms
_AHEAD = 256 << 10  # bytes of further requests that are buffered while one is handled
_LINGER_S = 2.0  # for a client to read the last response: closing at once could reset the connection first
_MAX_LEAVING = 128  # connections that linger at the same time
_UNSENT = 256 << 10  # bytes that the system buffers before it sends them; more would hide how slow a client reads
# Bytes of a response that a client must read in a second, on average over each request_timeout. Half of the documented
# rate (64 KiB/s), because the system reports in steps what the client has read.
_SLOWEST_READER = 32 << 10
_MAX_BUFFERED = 256 << 20  # bytes of requests and responses, of all connections together
_LARGE_BODY = 64 << 10  # bytes; a larger body is parsed and checked on another thread
_ACCEPTS_A_TURN = 64
_GRACE_S = 0.01  # a client that connected or was answered more recently is about to send a request
_SWEEP_S = 0.02  # least time between two sweeps


class ConnectionState(StrEnum):
    """What a connection is doing -> the states that may follow."""

    RECEIVING = "receiving"  # idle, or a request is incomplete -> HANDLING, SENDING
    QUEUED = "queued"  # further bytes are buffered, and other connections go first -> RECEIVING
    HANDLING = "handling"  # a request is with its route -> SENDING
    SENDING = "sending"  # a response -> RECEIVING, QUEUED, LINGERING
    LINGERING = "lingering"  # the last response is sent, and the client may still send -> CLOSED
    CLOSED = "closed"  # may follow any state


_RECEIVING, _QUEUED, _HANDLING, _SENDING, _LINGERING, _CLOSED = ConnectionState


class Handler(BaseRequestHandler):
    """One connection: its bytes in and out, and the request that is being handled. Only the loop's thread uses it.

    The loop calls `on_events` when the selector reports the socket, `proceed` when the connection is in `Server.ready`,
    and `overdue` after `deadline`. `receive`, `take_request`, `answer` and `send` each do one thing and change `state`;
    only `proceed` calls one after the other.
    """

    server: "Server"
    request: socket.socket

    def __init__(self, request: socket.socket, client_address: Any, server: "Server") -> None:
        # without the base class's, which would serve the connection to its end
        self.request, self.client_address, self.server = request, client_address, server
        settings = server.settings
        self.state = _RECEIVING
        self.parser = RequestParser(settings.max_header, settings.max_url, settings.max_body)
        self.exchange: Exchange | None = None  # the request whose head has arrived
        self.out: deque[bytes | memoryview | Iterator[bytes]] = deque()
        self.at_end = False  # the client has sent its last byte
        self.closing = False  # after the response that is being sent
        self.taken = 0  # bytes of the response that the client has read since the deadline was set
        self.counted = 0  # bytes that this connection contributes to `Server.buffered`
        self.events = selectors.EVENT_READ  # what the selector reports
        self.wants_write = False  # whether the socket must be writable before TLS can read on
        self.since = time.monotonic()  # when the client connected, or its last response was sent
        self.deadline = self.since + settings.idle_timeout
        self.at_deadline: tuple[Callable[[], None], bool] | None = None  # see `later`
        server.handlers[self] = None
        server.selector.register(request, self.events, self)

    def on_events(self, mask: int) -> None:
        """Continue after the selector has reported the socket."""
        if mask & selectors.EVENT_READ or self.wants_write:
            self.receive()
        self.proceed()

    def proceed(self) -> None:
        """Take one request if it is complete, send what is to be sent, then wait for events."""
        if self.state is _RECEIVING or self.state is _QUEUED:
            self.state = _RECEIVING
            self.take_request()
        if self.out:
            self.send()
        if self.state is _SENDING and not self.out:
            self.answer_sent()
        if self.state is not _CLOSED:
            self.wait()

    # --- reading ---

    def read(self, size: int) -> bytes:
        """Up to so many bytes from the socket; none at the end."""
        return self.request.recv(size)

    def receive(self) -> None:
        """Read what the client has sent."""
        x = self.exchange
        self.wants_write = False
        try:
            data = self.read(_READ if x is None or not x.head.chunked else _READ_CHUNKED)
        except OSError as error:
            self.not_ready(error)
            return
        if self.state is _LINGERING:
            if not data:
                self.close()
        elif data:
            if self.state is _RECEIVING and not self.parser.begun:
                self.deadline = time.monotonic() + self.server.settings.request_timeout
            self.parser.feed(data)
        else:
            self.at_end = True
            self.call_deadline(early=True)  # the client may have gone: no long poll for it

    def not_ready(self, error: OSError) -> None:
        """Wait for the socket if it would block; close it if the connection has failed."""
        if not isinstance(error, BlockingIOError):
            self.close()

    def take_request(self) -> None:
        """Have the next request handled if it is complete; refuse what cannot become a request."""
        try:
            x = self.exchange or self.take_head()
            body = self.parser.body() if x is not None else None
        except WireError as error:
            self.refuse(error)
            return
        if x is None or body is None:
            if self.at_end and self.state is _RECEIVING:
                self.close()  # the rest will never arrive
            return
        x.body = body
        self.deadline = math.inf
        if x.refusal is not None:
            x.fail(x.refusal)
        else:
            self.server.handle(x)
        if self.state is _RECEIVING:  # the reply comes later
            self.state = _HANDLING

    def take_head(self) -> Exchange | None:
        """Begin the next request if its head has arrived; ask for its body if the client waits for 100 Continue."""
        head = self.parser.head()
        if head is None:
            return None
        x = self.exchange = Exchange(self, head)
        try:
            self.server.route(x)
        except AsteraError as error:
            x.refusal = error
        if head.expects_continue and (head.length or head.chunked) and not self.parser.buffered:
            if x.refusal is not None:  # the client does not send the body, or we do not read it
                self.refuse(x.refusal)
                return None
            self.out.append(b"HTTP/1.1 100 Continue\r\n\r\n")
        return x

    # --- answering ---

    def refuse(self, error: AsteraError) -> None:
        """Answer a request without reading the rest of it, and close."""
        self.exchange = self.exchange or Exchange(self, self.parser.refused_head())
        self.closing = True
        self.exchange.fail(error)

    def answer(self, x: Exchange, reply: Reply) -> None:
        """Count, log and queue the reply to a request, unless it has been answered. `proceed` sends it."""
        if x.answered:
            return
        server, head = self.server, x.head
        if len(reply.body) > _AHEAD and server.buffered + len(reply.body) > _MAX_BUFFERED and head.method != "HEAD":
            reply = error_response(x, Busy("The responses in memory have reached their limit.", 5))
        if server.access.origins:
            reply = wing("astera_lite_admin:with_cors")(x, reply)
        self.closing = self.closing or not head.keep_alive or server.stopping or reply.status == 405
        has_length = reply.status != 405 or head.method != "HEAD"  # it would have to be that of a GET
        data = response_head(reply, x.request_id, not self.closing, head.version, has_length)
        x.answered = True
        server.at_work.discard(x)
        server.app.metrics.requests[head.method, x.route.path if x.route else "", reply.status] += 1
        if log.isEnabledFor(server.access_level):
            optional("astera_lite_notices:log_access", self, x, reply)
        if x is not self.exchange:  # the client has gone
            return
        if head.method == "HEAD" or reply.status in (204, 304):
            self.out.append(data)
        elif reply.stream is not None:
            self.out += (data, reply.stream)
        elif len(reply.body) <= _READ:
            self.out.append(data + reply.body)
        else:
            self.out += (data, memoryview(reply.body))
        self.exchange = self.at_deadline = None
        self.deadline, self.taken = math.inf, 0
        self.state = _SENDING
        server.ready[self] = None

    def later(self, x: Exchange, seconds: float, function: Callable[[], Reply | None], early: bool) -> None:
        """See Exchange.later."""
        if x is self.exchange:  # else it is answered, or the client has gone
            self.at_deadline = (partial(x.call, function), early)
            self.deadline = time.monotonic() + (0 if early and (self.server.stopping or self.at_end) else seconds)
            self.server.sweep_by(self.deadline)

    def call_deadline(self, early: bool = False) -> None:
        """Call the function that `later` got; before its time only if it was given as `early`."""
        if self.at_deadline is not None and (self.at_deadline[1] or not early):
            function, self.at_deadline, self.deadline = self.at_deadline[0], None, math.inf
            function()

    # --- writing ---

    def send(self) -> None:
        """Send as much as the socket takes; a long body is read from the store piece by piece."""
        try:
            while self.out:
                first = self.out[0]
                if not isinstance(first, bytes | memoryview):
                    piece = next(first, None)
                    if piece is None:
                        self.out.popleft()
                    else:
                        self.out.appendleft(memoryview(piece))
                    continue
                sent = self.request.send(first[:_AHEAD])
                self.taken += sent
                if sent == len(first):
                    self.out.popleft()
                else:
                    self.out[0] = memoryview(first)[sent:]
        except OSError as error:
            self.not_ready(error)
            if self.deadline == math.inf:
                self.deadline = time.monotonic() + self.server.settings.request_timeout
        except StoreError as error:  # a piece of a result cannot be read: rather an incomplete body than a wrong one
            log.error("a result could not be read to its end: %s", error)
            self.close()

    def answer_sent(self) -> None:
        """Expect the next request, which may have arrived already; close after the last response."""
        settings, begun = self.server.settings, self.parser.begun
        if self.closing or (self.server.stopping and not begun):
            self.linger()
            return
        del self.server.handlers[self]
        self.server.handlers[self] = None
        self.since = time.monotonic()
        self.deadline = self.since + (settings.request_timeout if begun else settings.idle_timeout)
        if begun or self.at_end:
            self.state, self.server.ready[self] = _QUEUED, None
        else:
            self.state = _RECEIVING
            self.server.ready.pop(self, None)

    def wait(self) -> None:
        """Count the bytes in buffers, and tell the selector which events this connection waits for."""
        held = ahead = self.parser.buffered
        if self.exchange is not None:
            held += len(self.exchange.body)
        if self.out:
            held += sum(len(item) for item in self.out if isinstance(item, bytes | memoryview))
        if held != self.counted:
            self.server.buffered += held - self.counted
            self.counted = held
            if self.state is _RECEIVING and held > _AHEAD and self.server.buffered > _MAX_BUFFERED:
                self.refuse(Busy("The requests in memory have reached their limit.", 5))
        full = self.state is not _RECEIVING and ahead > _AHEAD
        events = 0 if self.at_end or full else selectors.EVENT_READ
        if self.out or self.wants_write:
            events |= selectors.EVENT_WRITE
        if events == self.events:
            return
        if not events:
            self.server.selector.unregister(self.request)
        elif not self.events:
            self.server.selector.register(self.request, events, self)
        else:
            self.server.selector.modify(self.request, events, self)
        self.events = events

    # --- closing ---

    def overdue(self) -> None:
        """Act after the deadline: refuse an incomplete request, close for a client that reads too slowly."""
        if self.at_deadline is not None:
            self.call_deadline()
        elif self.state is _RECEIVING and self.parser.begun:
            self.refuse(WireError(408, "The request was not complete in time."))
        elif self.state is _SENDING and self.taken >= _SLOWEST_READER * self.server.settings.request_timeout:
            self.deadline, self.taken = time.monotonic() + self.server.settings.request_timeout, 0
        else:
            self.close()

    def turn_away(self) -> None:
        """Answer that there is no room for this connection, and close."""
        self.refuse(Busy("The server has reached its limit of connections.", 5))

    def leave(self) -> None:
        """Give the place of this connection to another: it ends soon, or at once if many are leaving."""
        self.server.handlers.pop(self, None)
        self.server.leaving.add(self)
        self.deadline = time.monotonic() + _LINGER_S
        if self.at_end or len(self.server.leaving) > _MAX_LEAVING:
            self.close()

    def linger(self) -> None:
        """Close, but let a client that still sends read its response first."""
        self.state = _LINGERING
        try:
            self.request.shutdown(socket.SHUT_WR)
        except OSError:
            self.at_end = True
        self.leave()

    def close(self) -> None:
        """Close the socket; a later reply to the request is dropped."""
        if self.state is _CLOSED:
            return
        self.state = _CLOSED
        x, self.exchange = self.exchange, None
        if x is not None and x.on_close is not None:
            x.on_close()
        self.out.clear()
        self.server.buffered -= self.counted
        self.server.handlers.pop(self, None)
        self.server.leaving.discard(self)
        if self.events:
            self.server.selector.unregister(self.request)
        self.server.shutdown_request(self.request)


class Server(ThreadingHTTPServer):
    """Serves an Application over HTTP: the class and the hooks of http.server, with one selector loop.

    `with Server(app) as server:` serves on a separate thread until the block ends, like `start` and `stop`.
    `serve_forever` serves on the calling thread; inside such a block, it waits for the other. `host` and `port` replace
    those of the settings. `url` is the address, known when the constructor returns. Subclasses may override
    `verify_request`, `process_request`, `finish_request`, `handle_error` and `service_actions`, which the loop's thread
    calls. Raises OSError if it cannot listen, ConfigError if settings forbid it, StoreError if the application is not
    running.
    """

    request_queue_size = 1024
    allow_reuse_address = os.name == "posix"  # on Windows two servers could share a port

    def __init__(self, app: Application, *, host: str | None = None, port: int | None = None) -> None:
        self.app, self.settings = app, app.settings
        host = self.settings.host if host is None else host
        port = self.settings.port if port is None else Settings.load(port=port).port
        self.access = Access(app, host)
        if not is_loopback(host) and self.settings.callback_allow.strip().lower() == "auto":
            app.policy.hosts.clear()  # courier and http steps have the same policy
            app.policy.networks.clear()
        self.tls: ssl.SSLContext | None = None
        if self.settings.tls_cert or self.settings.tls_key:
            self.tls = wing("astera_lite_tls:tls_context")(self.settings)
        app.check_open()
        # connections
        self.handlers: dict[Handler, None] = {}  # in order of `since`
        self.leaving: set[Handler] = set()  # connections that linger or are turned away
        self.ready: dict[Handler, None] = {}  # connections whose turn it is, in this order
        self.buffered = 0
        # requests
        app.metrics.connections.append(self.handlers)
        self.access_level = logging.INFO if self.settings.access_log else logging.DEBUG
        if self.settings.access_log:
            wing("astera_lite_notices:log_access")  # if the file is missing, the start says so
        self._request_count = itertools.count(1)
        self._request_prefix = os.urandom(5).hex()
        # for requests that take longer than a look-up, and for reads of a shared database
        self.pool = ThreadPoolExecutor(8 if app.store.shared else 2, "astera-slow")
        self._routed: dict[int, tuple[Head, dict[str, Any]]] = {}  # by identity: heads, and what `route` found for them
        self._routed_for: tuple[Any, Any] = (None, None)  # the deployments and tokens for which it was found
        self.at_work: set[Exchange] = set()  # requests on its threads, until they are answered
        # the loop
        self.ident = 0  # of the thread that serves
        self.fault: Exception | None = None  # the exception that has ended the loop
        self.stopping = False
        self._stop_at = self._sweep_at = self._fresh_from = 0.0
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()
        self._ended.set()  # the loop has not begun
        self.selector = selectors.DefaultSelector()
        self._inbox: deque[Callable[[], None]] = deque()
        self._awake = False
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler if self.tls is None else wing("astera_lite_tls:TlsHandler"))
        self.socket.setblocking(False)
        self.scheme = "http" if self.tls is None else "https"
        self.url = f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}"
        self.base = (self.settings.public_url or "").rstrip("/") or None
        app.base = self.base or self.url  # of jobs that the embedding program submits

    def server_bind(self) -> None:
        """Bind, without the look-up of the host's name that http.server does, which can wait for DNS."""
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # inherited by connections
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    # --- start and stop ---

    def start(self) -> Self:
        """Serve on a separate thread, unless the server serves already."""
        if self.stopping:
            raise RuntimeError("This server has stopped: make a new one.")
        if self._ended.is_set():
            self._ended.clear()  # here, because a stop may come before the thread has begun
            self._thread = threading.Thread(target=self._serve, name="astera-loop", daemon=True)
            self._thread.start()
        return self

    def _serve(self) -> None:
        try:
            self.serve_forever()
        except Exception as error:
            self.fault = error
            log.critical("the server has failed and ends", exc_info=True)
            self._ended.set()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def handle_request(self) -> NoReturn:
        """Not available: one loop serves all connections."""
        raise NotImplementedError("Server cannot handle a single request: call serve_forever(), or start() and stop()")

    def request_stop(self) -> None:
        """Begin to stop: accept no connection, answer open requests. May be called by a signal handler."""
        self.post(self._stop_accepting)

    def ended(self, timeout_s: float) -> bool:
        """Whether the loop has ended; waits for it, up to `timeout_s` seconds."""
        return self._ended.wait(timeout_s)

    def shutdown(self) -> None:
        """Stop serving, and wait until the loop has ended (http.server's method)."""
        self.request_stop()
        longest = self.settings.shutdown_timeout + 5
        if self._thread is None:
            self.ended(longest)
        else:  # in the child of a fork the thread does not exist, and nothing would tell of its end
            self._thread.join(longest)

    def stop(self) -> None:
        """Stop serving, and close."""
        self.shutdown()
        self.server_close()

    def server_close(self) -> None:
        """Close the listener, the pool and the selector; http.server's hook, called also if it cannot listen."""
        super().server_close()
        self.pool.shutdown(wait=not self.at_work, cancel_futures=True)  # a disk that hangs must not delay the stop
        connections = self.app.metrics.connections
        connections[:] = [those for those in connections if those is not self.handlers]
        if self._ended.is_set():  # otherwise the loop hangs, and uses them
            self.selector.close()
            self._wake_in.close()
            self._wake_out.close()

    # --- the loop ---

    def on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on the loop's thread: at once if this is the thread, otherwise soon."""
        if threading.get_ident() == self.ident:
            function(*arguments)
        else:
            self.post(partial(function, *arguments))

    def post(self, function: Callable[[], None]) -> None:
        """Call a function on the loop's thread, soon. May be called from any thread."""
        self._inbox.append(function)
        if self.stopping and self._ended.is_set():
            self._run_posted()  # the loop does not run it any more
        elif not self._awake:
            self._awake = True
            with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
                self._wake_out.send(b"\0")

    def serve_forever(self, poll_interval: float = 1.0) -> None:
        """Serve on this thread until stopped; if another thread serves, wait until it has ended.

        `poll_interval` is the longest time in seconds between two calls of `service_actions`.
        """
        if self._thread is not None and self._thread is not threading.current_thread():
            self._ended.wait()
            return
        if self.stopping:
            raise RuntimeError("This server has stopped: make a new one.")
        self.ident = threading.get_ident()
        self._ended.clear()
        self._stop_at = math.inf
        self._listen()
        self.selector.register(self._wake_in, selectors.EVENT_READ)
        try:
            while not (self.stopping and not (self.handlers or self.leaving)) and time.monotonic() < self._stop_at:
                self._turn(poll_interval)
        finally:
            self._stop_accepting()
            for handler in [*self.handlers, *self.leaving]:
                handler.close()
            self.app.store.flush()
            self._ended.set()
            self._run_posted()

    def _turn(self, longest: float) -> None:
        """Wait for events and for posted functions, and process them."""
        flush = partial(self.app.store.flush, self.post)
        busy = self._inbox or self.ready
        events = self.selector.select(0 if busy else max(min(self._sweep_at - time.monotonic(), longest), 0))
        self._awake = True  # functions posted from here on are run below
        connections = [(key.data, mask) for key, mask in events if key.data is not None]
        connections.sort(key=lambda event: event[0].deadline)  # the longest-waiting client first: epoll has no order
        for handler, mask in connections:
            self._guarded(handler, handler.on_events, mask)
        for key, _ in events:  # newcomers last: a client that has sent a request is not closed for one
            if key.fileobj is self.socket:
                self._accept()
            elif key.fileobj is self._wake_in:
                self._wake_in.recv(4096)
        flush()
        self._awake = False
        self._run_posted()
        ready, self.ready = self.ready, {}
        for handler in ready:  # at most one request of each
            self._guarded(handler, handler.proceed)
        self.service_actions()
        if time.monotonic() >= self._sweep_at:
            self._sweep()
        flush()

    def _run_posted(self) -> None:
        for _ in range(len(self._inbox)):
            try:
                function = self._inbox.popleft()
            except IndexError:  # after the end, other threads run them, too
                return
            try:
                function()
            except Exception:
                log.exception("a function posted to the loop failed")

    def _guarded(self, handler: Handler, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function of a connection; an exception ends this connection only."""
        try:
            function(*arguments)
        except Exception:
            self.handle_error(handler.request, handler.client_address)
            handler.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log the exception that has ended a connection; http.server's hook."""
        log.exception("the connection of %s ends because of a fault in the server", client_address)

    def _sweep(self) -> None:
        """Act on deadlines that have passed: once a second, or earlier if a request needs it."""
        now = time.monotonic()
        for handler in [handler for handler in (*self.handlers, *self.leaving) if handler.deadline <= now]:
            self._guarded(handler, handler.overdue)
        waiting = [handler.deadline for handler in self.handlers if handler.at_deadline is not None]
        self._sweep_at = max(min([now + 1, *waiting]), now + _SWEEP_S)
        self._listen()

    def sweep_by(self, moment: float) -> None:
        """Sweep no later than at this time of the monotonic clock."""
        self._sweep_at = min(self._sweep_at, max(moment, time.monotonic() + _SWEEP_S))

    # --- connections ---

    def _listen(self) -> None:
        if not self.stopping and self.socket.fileno() not in self.selector.get_map():
            self.selector.register(self.socket, selectors.EVENT_READ)

    def _stop_accepting(self) -> None:
        if self.stopping:
            return
        self.stopping = True
        self._stop_at = time.monotonic() + self.settings.shutdown_timeout
        if self.socket.fileno() in self.selector.get_map():
            self.selector.unregister(self.socket)
        self.socket.close()
        for handler in list(self.handlers):
            handler.call_deadline(early=True)  # a long poll is answered with the present state
            if handler.state is _RECEIVING and not handler.parser.begun:
                handler.close()

    def _accept(self) -> None:
        if self.stopping:  # after the selector reported a newcomer
            return
        self._fresh_from = time.monotonic() - _GRACE_S  # those that come in this turn do not close each other
        for _ in range(_ACCEPTS_A_TURN):
            try:
                request, client_address = self.get_request()
            except (BlockingIOError, ConnectionError):
                return
            except OSError as error:  # out of descriptors: pause the listener
                log.error("connections cannot be accepted at the moment: %s", reason_of(error))
                self.selector.unregister(self.socket)
                self.sweep_by(time.monotonic() + 0.5)
                return
            try:
                if self.verify_request(request, client_address):
                    self.process_request(request, client_address)
                    continue
            except Exception as error:
                if not isinstance(error, OSError):  # otherwise the client has gone
                    self.handle_error(request, client_address)
            self.shutdown_request(request)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Register a new connection with the selector; http.server's hook."""
        request.setblocking(False)
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.handlers) >= self.settings.max_connections and not self._make_room():
            cast(type[Handler], self.RequestHandlerClass)(request, client_address, self).turn_away()
        else:
            self.finish_request(request, client_address)  # makes a Handler

    def _make_room(self) -> bool:
        """Close the connection that has waited longest for its client; False if none does, or all are recent."""
        for each in itertools.takewhile(lambda each: each.since < self._fresh_from, self.handlers):
            if each.state is _RECEIVING or (each.state is _HANDLING and each.at_end):
                each.close()
                return True
        return False

    # --- requests ---

    def next_request_id(self) -> str:
        """An id that no other request of this server has, and few of other servers."""
        return f"{self._request_prefix}{next(self._request_count):06x}"

    def route(self, x: Exchange) -> None:
        """Authorise a request and find its route; raises the error that refuses it before its body is read.

        A call of a flow is routed like the last one with the same head: this saves a tenth of a synchronous call. Same
        heads are one object, because `_known_head` returns the same object for the same bytes.
        """
        head, now = x.head, (self.app.deployments, self.app.tokens)
        if now != self._routed_for:
            self._routed, self._routed_for = {}, now
        if (known := self._routed.get(id(head))) is not None:
            vars(x).update(known[1])
            return
        route_request(x, self.access)
        size = len(head.path) + len(head.query) + sum(map(len, head.headers.values()))
        if x.flow is not None and size <= 1024 and _CONDITIONS.isdisjoint(head.headers):  # longer heads are parsed anew
            if len(self._routed) >= 512:
                self._routed.clear()
            found = {name: getattr(x, name) for name in ("route", "values", "caller", "flow", "path")}
            self._routed[id(head)] = head, found  # the head is kept, so no other can have its identity

    def handle(self, x: Exchange) -> None:
        """Have a request handled: on the loop's thread, or on another if it may take long."""
        assert x.route is not None
        is_read = x.flow is None and self.app.store.shared and not x.route.without_token
        if x.route.slow or is_read or (len(x.body) > _LARGE_BODY and x.flow is not None):
            self.at_work.add(x)
            try:
                self.pool.submit(x.call, x.route.handle, x)
            except RuntimeError:  # the pool keeps the task, which will find the request answered
                x.fail(Busy("The server gets no thread for this request.", 5))
        else:
            x.call(x.route.handle, x)


# ======================================================================================================================
# 16 Command line
# This room has the command `serve`. All other commands, and --help, are in astera_lite_tools.
# To add a command: a function and a row in COMMANDS there.
# ======================================================================================================================


class Stderr:
    """stderr of the process. Writing raises no errors and, after `detach`, never waits."""

    _MOST = 5000  # texts that wait; further ones are dropped

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._texts: queue.SimpleQueue[str | threading.Event] | None = None
        self._lost = 0

    def __getattr__(self, name: str) -> Any:  # isatty, encoding and the like
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text: now, or after `detach` on its thread."""
        if self._texts is None:
            self._write(text)
        elif self._texts.qsize() < self._MOST:
            self._texts.put(text)
        else:
            self._lost += 1
        return len(text)

    def flush(self) -> None:
        """Do nothing: each text is flushed when it is written."""

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr is closed, or its disk is full
            self._stream.write(text)
            self._stream.flush()

    def detach(self) -> None:
        """Write on a separate thread from now on, which alone waits for a slow disk or reader."""
        texts = queue.SimpleQueue[str | threading.Event]()
        threading.Thread(target=self._write_all, args=[texts], name="astera-stderr", daemon=True).start()
        self._texts = texts

    def _write_all(self, texts: queue.SimpleQueue[str | threading.Event]) -> None:
        while True:
            text = texts.get()
            if isinstance(text, threading.Event):
                text.set()
                continue
            self._write(text)
            if self._lost and texts.qsize() < self._MOST // 2:
                lost, self._lost = self._lost, 0
                log.warning("%d lines of the log are lost: what reads stderr was too slow", lost)

    def written(self) -> bool:
        """Wait until all texts are written, up to a second; return whether they are."""
        if self._texts is None:
            return True
        done = threading.Event()
        self._texts.put(done)
        return done.wait(1)


def one_line(text: str) -> str:
    """The text with unprintable characters escaped: it cannot begin a line or control a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class _TextLines(logging.Formatter):
    """Time, level and message. Text from outside cannot begin a new line."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{timestamp(int(record.created * 1000))} {record.levelname.lower():<7} {one_line(log_message(record))}"
        if record.exc_info:
            lines = (record.exc_text or self.formatException(record.exc_info)).split("\n")
            text += "".join(f"\n    {one_line(line)}" for line in lines)
        return text


def _log_handler(settings: Settings) -> logging.Handler:
    if settings.log == "off":
        return logging.NullHandler()
    handler = logging.StreamHandler()
    handler.setFormatter(wing("astera_lite_notices:JsonLines")() if settings.log == "json" else _TextLines())
    return handler


def set_up_logging(settings: Settings) -> None:
    """Send the log of the module to stderr, with the form and level of the settings."""
    log.addHandler(_log_handler(settings))
    log.setLevel(settings.log_level.upper())
    log.propagate = False


def load_settings(flags: Mapping[str, str]) -> Settings:
    """The settings of flags (texts by name), the environment, and the TOML file named by the flag `config`.

    Messages logged meanwhile are written in the form of the new settings. Raises ConfigError.
    """
    default = "astera_lite.toml" if os.path.exists("astera_lite.toml") else None
    flags = dict(flags)
    early: list[logging.LogRecord] = []
    keep = cast(Callable[[logging.LogRecord], bool], early.append)  # returns None, so the filter stops the record
    log.addFilter(keep)
    settings = Settings()
    try:
        settings = Settings.load(flags.pop("config", default), os.environ, flags)
    finally:
        log.removeFilter(keep)
        handler = _log_handler(settings)
        for record in early:
            handler.handle(record)
    return settings


# --- serve ---


def notify(state: str) -> None:
    """Send a state to the service manager (sd_notify(3)); do nothing without one."""
    if os.environ.get("NOTIFY_SOCKET"):
        wing("astera_lite_notices:send_state")(state)


def _set_up_process(settings: Settings) -> Settings:
    """Set up the log, the switch interval and the limit of descriptors, and fit the settings to that limit."""
    set_up_logging(settings)
    logging.captureWarnings(True)
    _warnings_log.addHandler(log.handlers[-1])
    sys.setswitchinterval(0.00005)  # with the default, a busy thread delays the loop by 5 ms at a time
    try:
        import resource as rlimits  # noqa: PLC0415 (not on Windows)
    except ImportError:
        return settings
    soft, hard = rlimits.getrlimit(rlimits.RLIMIT_NOFILE)
    wanted = settings.max_connections + 256
    if soft < wanted:
        allowed = wanted if hard == rlimits.RLIM_INFINITY else min(wanted, hard)
        rlimits.setrlimit(rlimits.RLIMIT_NOFILE, (allowed, hard))
        if allowed < wanted:
            return optional("astera_lite_notices:fitted", settings, allowed) or settings
    return settings


def _reload(app: Application) -> None:
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        app.read_tokens()
        app.deployer.refresh(anyway=True)
    finally:
        notify("READY=1")


def leave(code: int) -> NoReturn:
    """End the process without its threads; those that run programs would kill them."""
    if python := sys.modules.get("astera_lite_python"):
        python.kill_children()
    os._exit(code)


def _install_signals(app: Application, server: Server) -> Callable[[], bool]:
    """Let signals stop the server, or reload flows and tokens; return a function that tells if a stop is overdue."""
    stop_by = math.inf

    def stop(number: int, frame: object) -> None:
        nonlocal stop_by
        if stop_by < math.inf:
            leave(0)  # acknowledged jobs are on disk
        stop_by = time.monotonic() + app.settings.shutdown_timeout + 5
        again = "Ctrl-C again" if number == signal.SIGINT else "a second signal"
        server.post(lambda: log.info("stopping%s", optional("astera_lite_notices:on_stopping", app, again)))
        server.request_stop()
        notify("STOPPING=1")

    def reload() -> None:
        threading.Thread(target=_reload, args=[app], name="astera-reload", daemon=True).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda number, frame: server.post(reload))
    return lambda: time.monotonic() > stop_by


def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    stderr = cast(Stderr, sys.stderr)
    stderr.detach()
    settings = _set_up_process(settings)
    if os.environ.get("NOTIFY_SOCKET"):
        wing("astera_lite_notices:send_state")  # if the file is missing, the start says so
    signal.signal(signal.SIGINT, lambda number, frame: leave(130))  # until the server can stop
    signal.signal(signal.SIGTERM, lambda number, frame: leave(0))
    app = Application(settings)
    app.start()
    try:
        server = Server(app)
    except (ConfigError, OSError) as error:
        app.stop()
        if isinstance(error, ConfigError):
            raise
        is_host = isinstance(error, socket.gaierror) or error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        cure = "choose another --host" if is_host else "choose another --port"
        print(f"cannot listen on {settings.host}:{settings.port}: {reason_of(error)}; {cure}", file=sys.stderr)
        return 3
    overdue = _install_signals(app, server)
    stderr.write(optional("astera_lite_notices:announcement", server))
    gc.freeze()  # the objects that are loaded by now stay: the collector need not look at them
    gc.enable()
    gc.set_threshold(10_000, 20, 50)  # the default is too often: requests make many objects, but no cycles
    stderr.write(f"listening on {server.url}\n")  # one write, so that no line of the log gets into it
    notify(f"READY=1\nSTATUS=listening on {server.url}")
    if os.environ.get("WATCHDOG_USEC") and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        # by way of the housekeeper and the loop, which proves that both are alive
        app.housekeeper.chores.insert(0, partial(server.post, partial(notify, "WATCHDOG=1")))
    server.start()  # this thread handles signals
    while not server.ended(1.0) and not overdue():
        pass
    stuck = not server.ended(0)
    if not stuck:
        server.server_close()
    # not 1, which means faulty settings: after those, a service manager should not start the server again
    code = 5 if server.fault is not None else 0
    left = app.stop()
    if not code:
        log.info("stopped")
    logging.shutdown()
    if left or stuck or server.at_work:  # the interpreter would wait for their threads
        stderr.written()
        leave(code)
    return code


# --- the program ---


def serve_flags(words: Sequence[str]) -> dict[str, str] | None:
    """The settings of a command line that serves, each with a value; None for any other command line.

    So most starts do not load the parser of astera_lite_tools, which reads these lines, too: 6 ms and 0.5 MB.
    """
    names = {f"--{name.replace('_', '-')}": name for name, item in SETTING_FIELDS.items() if not item.secret}
    names["--config"] = "config"
    parts: list[str] = []
    for word in words[1:] if words[:1] == ["serve"] else words:
        parts += word.split("=", 1) if word.startswith("--") else [word]
    flags, values = parts[::2], parts[1::2]
    if len(parts) % 2 or not names.keys() >= {*flags} or any(value.startswith("-") for value in values):
        return None
    return {names[flag]: value for flag, value in zip(flags, values, strict=True)}


def _set_up_streams() -> Stderr:
    """Make the standard streams usable, however the program was started."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a database could get its descriptor, and then its output
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may be ASCII
    stderr = sys.stderr if isinstance(sys.stderr, Stderr) else Stderr(sys.stderr)
    sys.stderr = cast(TextIO, stderr)
    return stderr


def _run_line(words: Sequence[str]) -> int:
    code = 0
    try:
        flags = serve_flags(words)
        code = serve(load_settings(flags)) if flags is not None else wing("astera_lite_tools:run_command")(words)
        sys.stdout.flush()  # here, where an error is caught
    except AsteraError as error:
        print(error, file=sys.stderr)
        return 4 if isinstance(error, StoreError) else 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, like shells
    except (MemoryError, RuntimeError) as error:
        if str(error) not in ("", "can't start new thread"):
            raise
        print(f"{str(error) or 'out of memory'}: allow this process more threads and memory", file=sys.stderr)
        return 5
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` has closed the pipe
            gone = error.strerror == os.strerror(errno.ENOENT)  # of os.getcwd; tempfile has other words
            what = "the working folder was deleted: change to another" if gone else "the output cannot be written"
            print(f"{what}: {reason_of(error)}", file=sys.stderr)
            code = 1
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (the interpreter flushes it at exit)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process; return the exit code."""
    stderr = _set_up_streams()
    code = _run_line([*(sys.argv[1:] if argv is None else argv)])
    if not stderr.written():  # the interpreter would wait for its thread
        os._exit(code)
    return code


if sys.modules["__main__"] is sys.modules.get(__name__):
    sys.exit(main())
