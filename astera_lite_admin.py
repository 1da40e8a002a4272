"""Routes for operators and clients, except submit, poll and fetch.

The other routes of jobs (list, details, cancel, rerun, delete, callback again), deployments, metrics, the page of the
console; preconditions, the part of a result, OPTIONS and CORS; the setting `cors_origins`. A wing of astera_lite, which
loads this file when one of them is first needed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from astera_lite import (
    ANYBODY,
    CANCEL_ELSEWHERE_S,
    CONNECTIONS_FILE,
    ENTITY_TAG,
    FLOW_NAME,
    HTTP_METHODS,
    JSON_TYPE,
    MODES,
    NO_STORE,
    PREFIXES,
    PROBLEM_TYPE,
    READING,
    REVALIDATED,
    RUN_TIMES,
    TOKEN_TEXT,
    AccessError,
    Application,
    AsteraError,
    Attempt,
    Busy,
    ConfigError,
    Conflict,
    Exchange,
    Fault,
    Flow,
    FlowError,
    Head,
    InputError,
    InputErrors,
    Job,
    NotFound,
    Prepared,
    Reply,
    Seen,
    Status,
    StoredResult,
    Token,
    UnknownJob,
    __version__,
    allowed_methods,
    answer_submitted,
    answer_when_finished,
    check_coding,
    check_may_call,
    check_unfinished,
    error_response,
    find_job,
    find_routes,
    health_document,
    http_date,
    is_loopback,
    json_body,
    late,
    log,
    one_line_each,
    optional,
    parse_flow_text,
    parse_query,
    problem,
    read_media_type,
    reason_of,
    resource,
    shown,
    status_document,
    status_response,
    suggest,
    timestamp,
    with_head,
)

example_request = late("astera_lite_notices:example_request")
selecting_text = late("astera_lite_notices:selecting_text")

# --- deployments ---


def deployment_document(flow: Flow, base: str) -> dict[str, Any]:
    """A published flow, as /api/deployments shows it."""
    urls = {mode: f"{base}{PREFIXES[mode]}{flow.resource}" for mode in MODES if mode in flow.modes}
    request = flow.tree["request"]
    specs = request.get("parameters", {})
    parameters = {item.name: specs.get(item.name) or {"in": item.where} for item in flow.parameters}
    selecting = {name: {"in": "query", "description": selecting_text(name)} for name in flow.selecting}
    return {
        "name": flow.name,
        "description": flow.description,
        "method": flow.method,
        "resource": flow.resource,
        "processing": list(urls),
        "urls": urls,
        "parameters": parameters | selecting,
        "body": request.get("body"),
        "contentTypes": list(flow.content_types),
        "example": example_request(flow),
        "source": flow.source,
    }


def deployment_tag(flow: Flow) -> str:
    """The ETag of a deployment."""
    return f'"{flow.version:x}"'


def deployment_list(x: Exchange) -> Reply:
    """GET /api/deployments"""
    deployments = x.app.deployments
    flows = [flow for flow in deployments.by_name.values() if x.caller.may_call(flow.name)]
    document = {
        "deployments": [deployment_document(flow, x.base) for flow in flows],
        "faults": [{"file": file, "place": place, "message": message} for file, place, message in deployments.faults],
    }
    return Reply(200, [JSON_TYPE, NO_STORE], json_body(document))


def deployment_one(x: Exchange) -> Reply:
    """GET /api/deployments/{name}"""
    name = x.values["name"]
    flow = x.app.deployments.by_name.get(name)
    if flow is None:
        known = suggest(name, filter(x.caller.may_call, x.app.deployments.by_name))
        raise NotFound(f"There is no deployment {shown(name)}{known or '.'}")
    check_may_call(x, flow.name)
    headers = [JSON_TYPE, REVALIDATED, ("ETag", deployment_tag(flow))]
    return Reply(200, headers, json_body(deployment_document(flow, x.base)))


def check_may_deploy(x: Exchange) -> None:
    """Raise AccessError for all but a token of role admin: a flow can run programs."""
    if x.caller.admin and x.caller.name:
        return
    if x.caller.name:
        raise AccessError(403, "Deploying needs a token of role admin.", "insufficient_scope")
    detail = "Deploying needs a token of role admin, and this server has no tokens: set `token`, and send it."
    raise AccessError(403, detail)


def _file_of(app: Application, name: str) -> str:
    """The path of a deployment's file, or only its name where servers share the text; raises NotFound, Conflict."""
    deployer = app.deployer
    if not FLOW_NAME.fullmatch(name):
        raise NotFound(f"{shown(name)} is not a name of a deployment: use up to 64 letters, digits, - and _.")
    if name + ".json" == CONNECTIONS_FILE:
        raise Conflict(f"{CONNECTIONS_FILE} holds the connections: choose another name.")
    if name in deployer.own or (deployer.folder is None and app.node is None):
        raise Conflict("It is published by the program that embeds this server, not by a file.")
    if app.node is not None or deployer.folder is None:
        return f"{name}.json"
    if os.path.exists(os.path.join(deployer.folder, f"{name}.toml")):
        raise Conflict(f"It is kept in {name}.toml: change that file.")
    return os.path.join(deployer.folder, f"{name}.json")


def _write_atomically(path: str, text: str) -> None:
    """Write a file so that a reader, also after a crash, finds the complete old text or the complete new one."""
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".{name}.part")
    os.makedirs(folder, exist_ok=True)
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


@contextlib.contextmanager
def _changing(path: str) -> Iterator[None]:
    """Have a fault of the disk answered with 503, like one of the database."""
    try:
        yield
    except OSError as error:
        raise Busy(f"The file {os.path.basename(path)} cannot be changed: {reason_of(error)}.", 5) from error


def deploy(x: Exchange) -> Reply:
    """PUT /api/deployments/{name}: check the flow in the body, write its file, publish it."""
    check_coding(x)
    name, deployer = x.values["name"], x.app.deployer
    _, refusal = read_media_type(x.head.headers.get("content-type", ""), (JSON_TYPE[1],))
    if refusal:
        raise InputError([{"in": "header", "name": "Content-Type", "message": refusal}], status=415)
    with deployer.changing:
        path = _file_of(x.app, name)
        file, known = os.path.basename(path), deployer.deployments.by_name.get(name)
        check_conditions(x, known is not None or (x.app.node is None and os.path.exists(path)), known)
        try:
            tree = parse_flow_text(x.body.decode(), file)
            flow = deployer.build(tree, name, file)
            deployments = deployer.replaced(name, flow)
        except UnicodeDecodeError as error:
            message = f"byte {error.start} is not valid UTF-8"
            raise InputError([{"in": "body", "name": "", "message": message}], "The flow has faults.") from None
        except FlowError as error:
            faults = [
                {"in": "body", "name": place, "message": message}
                if place[:1] in ("", "/")
                else {"in": "body", "name": "", "message": f"{place}: {message}"}  # a line
                for _, place, message in error.faults
            ]
            raise InputError(faults, "The flow has faults.") from None
        text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
        if x.app.node is not None:
            x.app.node.deploy(name, text)
        else:
            with _changing(path):
                _write_atomically(path, text)
            deployer.deployments = deployments
    log.info("deployed %s", name)
    headers = [JSON_TYPE, NO_STORE] + [("Location", f"{x.base}/api/deployments/{name}")] * (known is None)
    return Reply(201 if known is None else 200, headers, json_body(deployment_document(flow, x.base)))


def undeploy(x: Exchange) -> Reply:
    """DELETE /api/deployments/{name}: take a flow out of service, and delete its file."""
    name, deployer = x.values["name"], x.app.deployer
    with deployer.changing:
        path, node = _file_of(x.app, name), x.app.node
        flows, kept = deployer.deployments.by_name, os.path.exists(path) if node is None else name in node.rows
        if name not in flows and not kept:
            raise NotFound(f"There is no deployment {shown(name)}.")
        if node is not None and not kept:
            cure = f"delete {flows[name].source} there, on each server that has it"
            raise Conflict(f"It is a file in the folder of flows of this server, which others may not have: {cure}.")
        check_conditions(x, True, flows.get(name))
        callers = [flow.name for flow in flows.values() if name in [called for called, _ in flow.calls]]
        if callers:
            raise Conflict(f"Other flows call it: change or delete {', '.join(callers)} first.")
        if node is not None:
            node.deploy(name, None)
        else:
            with _changing(path), contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            deployer.deployments = deployer.replaced(name)
    log.info("deleted the deployment %s", name)
    return Reply(204, [NO_STORE])


# --- preconditions, and the part of a result ---

_ABOUT_A_BODY = ("content-type", "content-disposition", "content-encoding", "content-language", "content-range")


def _precondition(head: Head, exists: bool, tag: str, modified: str | None = None) -> int:
    """The status that a request's preconditions give (RFC 9110, section 13.2.2): 304, 412, or 0 if they are met.

    `tag` and `modified` are the ETag and Last-Modified of what there is.
    """
    sent, reads = head.headers, head.method in READING
    if "if-match" in sent:
        if not (exists and _listed(sent["if-match"], tag, weak=False)):
            return 412
    elif http_date(modified) > http_date(sent.get("if-unmodified-since")):
        return 412
    if "if-none-match" in sent:
        if exists and _listed(sent["if-none-match"], tag, weak=True):
            return 304 if reads else 412
    elif reads and http_date(modified) <= http_date(sent.get("if-modified-since")):
        return 304
    return 0


def _listed(sent: str, tag: str, weak: bool) -> bool:
    """Whether a list of entity tags contains this one, by weak or strong comparison (RFC 9110, section 8.8.3.2)."""
    tags = ENTITY_TAG.findall(sent)
    if weak:
        tags, tag = [each.removeprefix("W/") for each in tags], tag.removeprefix("W/")
    return sent == "*" or (tag[:1] == '"' and tag in tags)


def _precondition_failed() -> Conflict:
    return Conflict("A precondition of the request (If-Match or the like) does not hold.", status=412)


def conditional(x: Exchange, reply: Reply) -> Reply:
    """The reply to a read request with preconditions; `reply` is the reply without them."""
    if not 200 <= reply.status < 300 or reply.status == 202:
        return reply
    own = {name.lower(): value for name, value in reply.headers}
    status = _precondition(x.head, True, own.get("etag", ""), own.get("last-modified"))
    if status == 304:
        return Reply(304, [pair for pair in reply.headers if pair[0].lower() not in _ABOUT_A_BODY])
    if status:
        x.job_status = own.get("job-status", "")
        return error_response(x, _precondition_failed())
    return reply


_RANGE = re.compile("bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))", re.IGNORECASE)


def with_ranges(x: Exchange, job: Job, stored: StoredResult, whole: Reply) -> Reply:
    """A large result, or the part of it that is requested (RFC 9110, section 14). Of several parts, the whole."""
    whole = whole._replace(headers=[*whole.headers, ("Accept-Ranges", "bytes")])
    own, sent, size = {name.lower(): value for name, value in whole.headers}, x.head.headers, stored.size
    wanted, tag = _RANGE.fullmatch(sent.get("range", "")), own.get("etag", "")
    changed = "if-range" in sent and (sent["if-range"] != tag or tag[:1] != '"')
    if wanted is None or changed or x.head.method != "GET" or conditional(x, whole) is not whole:
        return whole
    first = int(wanted[1]) if wanted[1] else max(size - int(wanted[3]), 0)
    last = min(int(wanted[2] or size), size - 1)
    if wanted[2] and int(wanted[2]) < first:  # malformed
        return whole
    if first >= size:
        headers = [PROBLEM_TYPE, NO_STORE, ("Content-Range", f"bytes */{size}"), ("Job-Status", own["job-status"])]
        return Reply(416, headers, json_body(problem(416, f"The result has {size} bytes.")))
    part = Reply(206, [*whole.headers, ("Content-Range", f"bytes {first}-{last}/{size}")])
    if not stored.in_pieces:
        return part._replace(body=stored.answer.body[first : last + 1])
    pieces = x.app.store.result_pieces(job.key, first, last + 1)
    return part._replace(stream=pieces, length=last + 1 - first)


def check_conditions(x: Exchange, exists: bool = True, flow: Flow | None = None) -> None:
    """Raise Conflict if a precondition forbids the request; `flow` is the deployment that it would change."""
    if _precondition(x.head, exists, deployment_tag(flow) if flow else ""):
        raise _precondition_failed()


# --- the setting cors_origins ---

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?/?")


def parse_origins(text: str) -> set[str]:
    """The origins of web pages in a list, in the form that browsers send (RFC 6454); raises ConfigError."""
    origins, faults = set(), []
    for item in filter(None, map(str.strip, text.split(","))):
        match = _ORIGIN.fullmatch(item.lower())
        if match is None:
            cure = "is not an origin (scheme, host, and port if there is one): write https://app.example"
            faults.append(Fault("cors_origins", "", f"{shown(item)} {cure}"))
        else:
            usual = {"http": ":80", "https": ":443"}.get(match[1])
            origins.add(f"{match[1]}://{match[2]}{match[3] if match[3] and match[3] != usual else ''}")
    if faults:
        raise ConfigError(faults)
    return origins


# --- OPTIONS, and pages of other origins (CORS) ---

_EXPOSED = (
    "Location, Retry-After, Job-Status, X-Request-Id, Preference-Applied, Content-Location, Idempotency-Replayed, ETag,"
    " Accept-Ranges, Content-Range"
)


def _named_origin(x: Exchange) -> str | None:
    """The origin of the calling page if `cors_origins` names it."""
    origin = x.head.headers.get("origin")
    return origin if origin in x.app.origins else None


def options(x: Exchange) -> Reply:
    """OPTIONS: which methods a path takes."""
    path = x.head.path
    names: set[str] = {"OPTIONS"}
    patched: list[str] = []  # the content types of PATCH
    for mode, prefix in PREFIXES.items():
        if path.startswith(prefix + "/"):
            matches = x.app.deployments.match(path[len(prefix) :])
            names |= allowed_methods(matches, mode)
            patched += [media for methods in matches if "PATCH" in methods for media in methods["PATCH"].content_types]
    if path == "*":
        names |= set(HTTP_METHODS)
    elif len(names) == 1:
        names |= with_head(find_routes(path)[0]) - {"*"}
    headers = [("Allow", ", ".join(sorted(names))), NO_STORE]
    if patched and "PATCH" in names:
        headers.append(("Accept-Patch", ", ".join(dict.fromkeys(patched))))
    if _named_origin(x) is not None:
        asked = x.head.headers.get("access-control-request-headers", "").split(",")
        wanted = ", ".join(name for each in asked if TOKEN_TEXT.fullmatch(name := each.strip(" \t")))
        headers += [("Access-Control-Allow-Methods", headers[0][1]), ("Access-Control-Max-Age", "600")]
        headers += [("Access-Control-Allow-Headers", wanted)] if wanted else []
    return Reply(204, headers)


def with_cors(x: Exchange, reply: Reply) -> Reply:
    """The reply with its CORS headers. It varies by origin even if the request has no origin."""
    cors, origin = [("Vary", "Origin")], _named_origin(x)
    if origin is not None:
        cors += [("Access-Control-Allow-Origin", origin), ("Access-Control-Expose-Headers", _EXPOSED)]
    return reply._replace(headers=one_line_each([*reply.headers, *cors]))


# --- jobs ---

DEFAULT_LIST, MAX_LIST = 50, 1000  # jobs on a page


def page_of_jobs(
    app: Application, caller: Token, flow: str | None, status: Status | None, limit: int, before: int | None
) -> tuple[list[Job], int | None]:
    """Jobs that the caller may see, newest first, and the `before` of the next page."""
    token = None if caller.admin else caller.name
    jobs = app.store.page(app.clock.now(), limit + 1, before, flow, status, token)
    live = [app.engine.peek(job.key)[0] or job for job in jobs[:limit]]
    if status is not None:  # a job that is just ending is Running for all until its end is published
        live = [job for job in live if job.status is status]
    return live, jobs[limit - 1].key.seq if len(jobs) > limit else None


def job_list(x: Exchange) -> Reply:
    """GET /api/jobs"""
    errors = InputErrors()
    given = parse_query(x.head.query, errors)
    query = {name: values[0] for name, values in given.items()}
    limit, cursor = query.get("limit", str(DEFAULT_LIST)), query.get("cursor")
    words = [status.value for status in Status if status is not Status.UNKNOWN]
    is_limit = re.fullmatch("[0-9]{1,9}", limit) and 1 <= int(limit) <= MAX_LIST
    is_cursor = cursor is None or re.fullmatch("[0-9a-f]{15}", cursor)
    rules = [
        ("limit", is_limit, f"must be an integer from 1 to {MAX_LIST}"),
        ("status", query.get("status", "Running") in words, "must be one of " + ", ".join(words)),
        ("cursor", is_cursor, "was not given by this server: leave it out"),
        ("flow", True, ""),
    ]
    for name, holds, message in rules:
        if len(given.get(name, ())) > 1:
            errors.add("query", name, "must be given once")
        elif not holds:
            errors.add("query", name, message)
    errors.check()
    status = Status(query["status"]) if "status" in query else None
    before = int(cursor, 16) if cursor is not None else None
    jobs, following = page_of_jobs(x.app, x.caller, query.get("flow"), status, int(limit), before)
    document = {
        "jobs": [status_document(job, x.base, offset=x.app.clock.offset) for job in jobs],
        "next": None if following is None else f"{following:015x}",
    }
    return Reply(200, [JSON_TYPE, NO_STORE], json_body(document))


def _find_to_change(x: Exchange) -> Seen:
    """The job that the path names; raises UnknownJob, and Conflict by a precondition."""
    seen = find_job(x, x.values["id"])
    check_conditions(x)
    return seen


def _find_finished(x: Exchange) -> Job:
    job = _find_to_change(x)[0]
    if job.status is Status.RUNNING:
        raise Conflict("The job is still running.")
    return job


def job_cancel(x: Exchange) -> Reply | None:
    """POST /api/jobs/{id}/cancel"""
    seen = _find_to_change(x)
    job = seen[0]
    check_unfinished(job)
    if not x.app.ask_cancel(job):
        return status_response(x, seen, code=202)

    def answer(seen: Seen) -> Reply:
        x.job_status = seen[0].status
        check_unfinished(seen[0], but="cancelled")
        return status_response(x, seen, code=202 if seen[0].status is Status.RUNNING else 200)

    answer_when_finished(x, job, CANCEL_ELSEWHERE_S if x.app.node else 30, answer)
    return None


def job_rerun(x: Exchange) -> None:
    """POST /api/jobs/{id}/rerun: submit a finished job's input again, to the flow as it is now."""
    app, job = x.app, _find_finished(x)
    check_may_call(x, job.flow)
    found, deployments = app.store.request(job.key), app.deployments
    flow = deployments.by_name.get(job.flow)
    if found is None or flow is None:
        raise Conflict(f'The flow "{job.flow}" is not deployed any more.')
    request = found[0]._replace(trace=optional("astera_lite_notices:parse_trace", x.head.headers) or None)
    if flow not in [match.get(request.method) for match in deployments.match(request.path)]:
        raise Conflict(f'The flow "{job.flow}" has another method or resource now.')
    if "asynchronous" not in flow.modes:
        raise Conflict(f'The flow "{job.flow}" is published synchronously only now.')
    new = app.new_job(flow, x.base, x.caller.name, job.callback.url if job.callback else None)
    given = flow.bind(request, new.id)
    done = partial(x.post, answer_submitted, x, new.key, None, ())
    # on the loop's thread, which commits what it stores
    x.post(app.accept, Prepared(new, flow, given), request, None, done)


def job_callback(x: Exchange) -> None:
    """POST /api/jobs/{id}/callback"""
    job = _find_to_change(x)[0]
    if job.callback is None:
        raise Conflict("The job was submitted without a callbackUrl.")
    _find_finished(x)

    def answer(result: Any, error: AsteraError | None) -> None:
        if error is not None:
            raise error
        x.app.housekeeper.wake()
        x.read(lambda: status_response(x, find_job(x, job.id), code=202))

    x.app.store.resend(job.key, x.app.clock.now(), partial(x.post, answer))


def job_delete(x: Exchange) -> None:
    """DELETE /api/jobs/{id}"""
    job = _find_to_change(x)[0]

    def answer(result: Any, error: AsteraError | None) -> Reply:
        if error is not None or result == "absent":
            raise error or UnknownJob(job.id, False)
        if result != "deleted":
            owed = "Its callback is pending." if result == "owed" else "The job is still running: cancel it first."
            raise Conflict(owed)
        x.app.engine.forget(job.key)
        return Reply(204, [NO_STORE])

    x.app.store.delete(job.key, partial(x.post, answer))


def failure_of(job: Job, steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Why a job failed, from the trace of its steps; None if no step failed."""
    if job.error is None or job.error["code"] not in ("failed", "timeout"):
        return None
    return next((step.get("error") for step in reversed(steps) if "/" not in step["path"]), None)


def attempt_documents(attempts: Sequence[Attempt], offset: int) -> list[dict[str, Any]]:
    """The attempts of a callback for the document of a job; `offset` is that of the clock in milliseconds."""
    return [
        {"at": timestamp(one.at, offset), "status": one.status, "error": one.error, "durationMs": one.duration_ms}
        for one in attempts
    ]


def job_details(x: Exchange) -> Reply:
    """GET /api/jobs/{id}: the status document, the request, the steps and the attempts of the callback."""
    job, progress = find_job(x, x.values["id"])
    app, offset = x.app, x.app.clock.offset
    document = status_document(job, x.base, progress, offset=offset) | {"request": _request_document(app, job)}
    entry = app.engine.queue.entries.get(job.key.seq)
    run = entry.run if entry else None
    steps = list(run.trace) if run and run.trace else app.store.trace(job.key)
    is_local = is_loopback(app.settings.host) and app.settings.public_url is None
    if x.caller.admin and (x.caller is not ANYBODY or is_local):
        document["failure"] = failure_of(job, steps)
    else:
        steps = [{name: step[name] for name in step if name not in ("error", "retries")} for step in steps]
    document["steps"] = steps
    if document["callback"] is not None:
        document["callback"]["history"] = attempt_documents(app.store.attempts(job.key), offset)
    return Reply(200, [JSON_TYPE, ("Job-Status", job.status), NO_STORE], json_body(document))


def _request_document(app: Application, job: Job) -> dict[str, Any] | None:
    """The stored request with secrets masked; of a long body only the beginning."""
    masked = app.outside.masked
    request, size = app.store.request(job.key, 4096 + masked.longest) or (None, 0)
    if request is None:
        return None
    return {
        **{name: masked(getattr(request, name)) for name in ("method", "path", "query")},
        "headers": {name: masked(value) for name, value in request.headers.items()},
        "body": masked(request.body.decode(errors="replace"))[:4096] or None,  # masked before it is cut
        "bodySize": size,
    }


# --- metrics ---


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: The outcome of an attempt, by the state of the callback after it.
_FOLLOWS = {"delivered": "delivered", "pending": "retried", "failed": "failed", "gone": "gone"}
_IN_LABEL = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
#: One value, or several with their labels as text.
_Samples = float | Iterable[tuple[str, float]]


def _labels(**labels: Any) -> str:
    """Labels as text: {flow="weather"}."""
    return "{" + ",".join(f'{name}="{str(value).translate(_IN_LABEL)}"' for name, value in labels.items()) + "}"


def _run_times(app: Application) -> Iterator[tuple[str, float]]:
    for flow in sorted(app.deployments.by_name):
        counts = list(app.metrics.runs.get(flow, [0] * (len(RUN_TIMES) + 1)))
        for bound, count in zip([*RUN_TIMES, "+Inf"], itertools.accumulate(counts), strict=True):
            yield "_bucket" + _labels(flow=flow, le=bound), count
        yield "_sum" + _labels(flow=flow), app.metrics.run_seconds.get(flow, 0.0)
        yield "_count" + _labels(flow=flow), sum(counts)


def _resident_bytes(app: Application) -> _Samples:
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError):  # not on Linux
        return []


_ENDS = ("completed", "failed", "timeout", "cancelled", "interrupted")  # Outcome.end


#: The metrics: name, type, help, and a function that gives the samples. Only flows that are deployed now have samples.
_METRICS: list[tuple[str, str, str, Callable[[Application], _Samples]]] = [
    (
        "astera_jobs_accepted_total", "counter", "Jobs that were accepted.",
        lambda app: [(_labels(flow=f), app.metrics.accepted.get(f, 0)) for f in sorted(app.deployments.by_name)],
    ),
    (
        "astera_jobs_finished_total", "counter", "Jobs that ended, by outcome.",
        lambda app: [
            (_labels(flow=f, outcome=end), app.metrics.ended.get((f, end), 0))
            for f in sorted(app.deployments.by_name) for end in _ENDS
        ],
    ),
    (
        "astera_run_duration_seconds", "histogram",
        "Durations of runs, of jobs and of synchronous calls.", _run_times,
    ),
    ("astera_jobs_queued", "gauge", "Jobs that wait for a thread.", lambda app: app.engine.queue.counts()["queued"]),
    ("astera_jobs_running", "gauge", "Jobs that have a thread.", lambda app: app.engine.queue.counts()["running"]),
    (
        "astera_jobs_waiting", "gauge", "Jobs that wait for a time, and have no thread.",
        lambda app: app.engine.queue.counts()["waiting"],
    ),
    (
        "astera_workers", "gauge", "Threads for jobs and synchronous flows.",
        lambda app: app.engine.queue.threads,
    ),
    ("astera_workers_busy", "gauge", "Threads that run a job or a call.", lambda app: app.engine.queue.working),
    (
        "astera_callback_attempts_total", "counter", "Attempts to deliver a callback, by outcome.",
        lambda app: [
            (_labels(outcome=word), app.metrics.callbacks.get(state, 0)) for state, word in _FOLLOWS.items()
        ],
    ),
    (
        "astera_callbacks_under_way", "gauge", "Callbacks that are being delivered.",
        lambda app: len(app.courier.under_way()),
    ),
    (
        "astera_http_requests_total", "counter", "Requests that were answered.",
        lambda app: [
            (_labels(method=method, route=path, code=code), count)
            for (method, path, code), count in sorted(app.metrics.requests.items())
        ],
    ),
    ("astera_connections", "gauge", "Open connections.", lambda app: sum(map(len, app.metrics.connections))),
    (
        "astera_database_bytes", "gauge", "The database with its write-ahead log.",
        lambda app: int(health_document(app)["database"]["bytes"]),
    ),
    (
        "astera_healthy", "gauge", "1 if the server is healthy, otherwise 0: /health has the reason.",
        lambda app: float(health_document(app)["status"] == "ok"),
    ),
    ("astera_flows", "gauge", "Published flows.", lambda app: len(app.deployments.by_name)),
    (
        "astera_flow_faults", "gauge", "Faults of files that are not published, or not in their present version.",
        lambda app: len(app.deployments.faults),
    ),
    (
        "astera_build_info", "gauge", "Always 1; the labels are the versions.",
        lambda app: [(_labels(version=__version__, python=".".join(map(str, sys.version_info[:3]))), 1)],
    ),
    (
        "astera_node_info", "gauge", "Always 1, if servers share a database; the label is the name of this server.",
        lambda app: [(_labels(node=app.node_name), 1)] if app.node else [],
    ),
    (
        "astera_nodes", "gauge", "Servers on the shared database whose lease has not run out.",
        lambda app: len(app.node.members) if app.node else 1,
    ),
    ("astera_start_time_seconds", "gauge", "Time of the start (Unix time).", lambda app: app.started_at / 1000),
    ("process_cpu_seconds_total", "counter", "Processor time used.", lambda app: time.process_time()),
    ("process_resident_memory_bytes", "gauge", "Memory in use.", _resident_bytes),
]  # fmt: skip


def metrics_text(app: Application) -> str:
    """The text format of Prometheus, version 0.0.4."""
    lines = []
    for name, kind, words, samples in _METRICS:
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        found = samples(app)
        pairs = [("", found)] if isinstance(found, int | float) else found
        lines += [f"{name}{labels} {value!r}" for labels, value in pairs]
    return "\n".join([*lines, ""])


def check_may_measure(x: Exchange) -> None:
    """Raise AccessError for a token of role user: the metrics count everybody's jobs."""
    if not x.caller.admin:
        detail = f"The token {x.caller.name} is of role user: the metrics count everybody's jobs."
        raise AccessError(403, detail, "insufficient_scope")


def metrics(x: Exchange) -> Reply:
    """GET /metrics"""
    return Reply(200, [("Content-Type", METRICS_TYPE), NO_STORE], metrics_text(x.app).encode())


# --- the console ---


@lru_cache(1)
def _console_page() -> Reply:
    """The console's page. Its policy allows only its own script and style, and nothing from a flow's response."""
    page = resource("console.html").replace(b"\r\n", b"\n")  # browsers normalise line ends before they hash

    def digest(part: bytes) -> str:
        return base64.b64encode(hashlib.sha256(part).digest()).decode()

    def source(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join([f"{tag}-src", *(f"'sha256-{digest(part)}'" for part in found)])

    policy = (
        f"default-src 'none'; {source('script')}; {source('style')}; img-src data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "ETag": f'"{digest(page)}"',
        "Cache-Control": "no-cache",
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }
    return Reply(200, tuple(headers.items()), page)


def console(x: Exchange) -> Reply:
    """GET /"""
    try:
        return _console_page()
    except ConfigError:
        cure = "copy console.html beside astera_lite.py. The endpoints are listed at /api/deployments."
        raise NotFound(f"The console's page is missing: {cure}") from None
