"""What a server tells people and other programs: calls, examples of requests, its state, traces, the log as JSON.

A wing of astera_lite, which loads this file when a server starts; without the file, the start prints the address only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from astera_lite import (
    CONTENT_TYPES,
    MODES,
    PREFIXES,
    Application,
    ConfigError,
    Deployments,
    Exchange,
    Flow,
    Handler,
    JobKey,
    Reply,
    Server,
    Settings,
    Trace,
    as_text,
    is_json_type,
    log,
    log_message,
    resource,
    shown,
    timestamp,
)

# --- examples ---

_SELECTING = {
    "cursor": "the next page, as the last answer gave it",
    "sort_by": "fields to sort by, comma-separated, - for descending",
}


def selecting_text(name: str) -> str:
    """What a parameter of this name means to a flow that selects rows (`page`, `filter`, `sort`)."""
    return _SELECTING.get(name, "only rows whose field of this name has this value")


_SAMPLES = {"boolean": True, "null": None, "date": "2026-01-31", "date-time": "2026-01-31T12:00:00Z"}


def as_texts(value: Any) -> list[str]:
    """The value of a parameter as texts: one for each item of a list, otherwise one."""
    return [as_text(item) for item in value] if isinstance(value, list) else [as_text(value)]


def sample_value(spec: Mapping[str, Any], name: str) -> Any:
    """A value for a schema of a flow file: the example, the default, or an invented one, which a pattern may refuse."""
    for given in ("example", "default"):
        if given in spec:
            return spec[given]
    if spec.get("enum"):
        return spec["enum"][0]
    kinds = spec.get("type") or ("object" if "properties" in spec else "string")
    kind = kinds[0] if isinstance(kinds, list) else kinds
    least = max(spec.get("minLength", 0), spec.get("minItems", 0))
    if kind in ("integer", "number"):
        low = spec.get("minimum", min(1, spec.get("maximum", 1)))
        return math.ceil(low) if kind == "integer" else low
    if kind == "array":
        return [sample_value(spec.get("items", {}), name)] * max(least, 1)
    if kind == "object":
        known, required = spec.get("properties", {}), spec.get("required")
        needed = required if isinstance(required, list) else []
        members = dict.fromkeys([*needed, *(member for member, item in known.items() if "example" in item)]) or known
        return {member: sample_value(known.get(member, {}), member) for member in members}
    return name.ljust(least, "x")[: spec.get("maxLength", len(name) + least)] if kind == "string" else _SAMPLES[kind]


def example_request(flow: Flow) -> dict[str, Any]:
    """An example of a request: the path with its query, the required headers, the body as a JSON value."""
    request = flow.tree["request"]
    texts: dict[str, dict[str, list[str]]] = {"path": {}, "query": {}, "header": {}}
    for item in flow.parameters:
        if item.required or item.where == "path":
            value = sample_value(request.get("parameters", {}).get(item.name, {}), item.name)
            texts[item.where][item.name] = as_texts(value)

    def quoted(words: Iterable[str]) -> str:
        return ",".join(urllib.parse.quote(word, safe="") for word in words)

    parts = [quoted(texts["path"][part[1:-1]]) if part[0] == "{" else part for part in flow.segments]
    query = "&".join(f"{quoted([name])}={quoted(words)}" for name, words in texts["query"].items())
    return {
        "path": "/" + "/".join(parts) + ("?" + query if query else ""),
        "headers": {name: ",".join(words) for name, words in texts["header"].items()},
        "body": sample_value(request.get("body") or {}, "text") if flow.content_types else None,
    }


def endpoint_lines(deployments: Deployments, base: str) -> list[str]:
    """A line for each published endpoint: the flow, the mode, and arguments for curl."""

    def word(text: str) -> str:
        """A word of a shell, always in quotes."""
        return "'" + text.replace("'", r"'\''") + "'"

    rows = []
    for flow in sorted(deployments.by_name.values(), key=lambda flow: flow.name):
        example = example_request(flow)
        more = [f" -H {word(f'{name}: {value}')}" for name, value in example["headers"].items()]
        if flow.body_required:
            media, body = flow.content_types[0], example["body"]
            if media == CONTENT_TYPES["form"] and isinstance(body, dict):
                text = urllib.parse.urlencode([(name, text) for name, item in body.items() for text in as_texts(item)])
            else:
                text = json.dumps(body, ensure_ascii=False) if is_json_type(media) else as_text(body)
            more.append(f" -H {word(f'Content-Type: {media}')} --data-raw {word(text)}")
        method = "" if flow.method == "GET" else f"-X {flow.method} "
        for mode in (mode for mode in MODES if mode in flow.modes):
            rows.append((flow.name, mode, method + word(base + PREFIXES[mode] + example["path"]) + "".join(more)))
    width = max((len(name) for name, _, _ in rows), default=0)
    return [f"  {name:<{width}}  {mode:<12}  {line}" for name, mode, line in rows]


# --- the start and the stop ---


def fitted(settings: Settings, files: int) -> Settings:
    """The settings with as many connections as there may be if so many files may be open; a warning says so."""
    most = max(files - 256, files // 2)
    words = "only %d files may be open (ulimit -Hn): at most %d connections, not the %d of max_connections"
    log.warning(words, files, most, settings.max_connections)
    return settings._replace(max_connections=most)


def announcement(server: Server) -> str:
    """The lines about the endpoints and the console; with `log = json`, they go to the log instead."""
    base = server.base or server.url
    published = endpoint_lines(server.app.deployments, base)
    console_line = [f"console: {base}/"]
    try:
        for name in ("console.html", "astera_lite_admin.py"):
            resource(name)
    except ConfigError:  # they were not copied
        console_line = []
    if server.settings.log == "json":
        for line in [*(f"published: {' '.join(line.split())}" for line in published), *console_line]:
            log.info("%s", line)
        return ""
    head = "published:" if published else "published: no flow; `new NAME` writes a first flow"
    return "\n".join([head, *published, *console_line, ""])


def on_stopping(app: Application, again: str) -> str:
    """What the server waits for when it stops, and how long; `again` stops it at once."""
    running = app.engine.queue.running()
    jobs = sum(entry.number >= 0 for entry in running)
    counts = [(jobs, "job"), (len(running) - jobs, "request"), (len(app.courier.under_way()), "callback")]
    what = " and ".join(f"{count} {noun}{'s' * (count > 1)}" for count, noun in counts if count)
    if not what:
        return ""
    if running:
        what += f" ({shown(', '.join(sorted({entry.flow for entry in running})), 200)[1:-1]})"
    where = "on another server" if app.node else "at the next start"
    rest = f"; unfinished jobs run again {where}" if jobs else ""
    return f": waiting up to {app.settings.shutdown_timeout:g} s for {what}; {again} stops at once{rest}"


def on_reload(found: Deployments) -> str:
    """How many flows and faults there are now, and the faulty files whose previous version stays in service."""
    kept = {flow.source for flow in found.by_name.values()} & {fault.where for fault in found.faults}
    stays = f"; the version before stays in service: {', '.join(sorted(kept))}" if kept else ""
    return f": {len(found.by_name)} published, {len(found.faults)} fault{'s' * (len(found.faults) != 1)}{stays}"


def send_state(state: str) -> None:
    """Send a state to the service manager, at the address in NOTIFY_SOCKET (sd_notify(3))."""
    name = os.environ["NOTIFY_SOCKET"]
    if not name.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1.0)
        sock.sendto(state.encode(), name if name[0] == "/" else "\0" + name[1:])


# --- the log ---


_TRACEPARENT = r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?"
_STATE = r"([a-z0-9][a-z0-9_\-*/@]{0,255})=[ -+\--<>-~]{0,255}[!-+\--<>-~]"


def parse_trace(headers: Mapping[str, str]) -> Trace | None:
    """The trace that a request belongs to; None without a `traceparent`, or with a malformed one.

    A malformed `tracestate` is dropped. Members beyond 32, and beyond 512 characters in all, are dropped from its end.
    """
    match = re.fullmatch(_TRACEPARENT, headers.get("traceparent", ""))
    if match is None or (match[1] == "00" and match[4]):  # only a later version may have more parts
        return None
    states = [text for part in headers.get("tracestate", "").split(",") if (text := part.strip(" \t"))]
    keys = {state[1] for text in states if (state := re.fullmatch(_STATE, text))}
    kept = states[:32] if len(keys) == len(states) else []
    while len(",".join(kept)) > 512:
        kept.pop()
    return Trace(match[2], int(match[3], 16) & 3, ",".join(kept))


def about(x: Exchange) -> dict[str, Any]:
    """What a line of the log says about a request."""
    trace = parse_trace(x.head.headers)
    job = JobKey.parse(x.values.get("id", ""))
    this = {"request": x.request_id, "method": x.head.method, "path": x.head.path}
    more = {"flow": x.flow and x.flow.name, "job": job and str(job), "trace": trace and trace.id}
    return this | {name: value for name, value in more.items() if value}


def log_access(handler: Handler, x: Exchange, reply: Reply) -> None:
    """Log a request, without its query, which may contain secrets."""
    ms = round((time.monotonic() - x.began) * 1000, 1)
    client = str(handler.client_address[0])
    extra = about(x) | {"status": reply.status, "ms": ms, "client": client, "token": x.caller.name or None}
    caller = f"{client} {x.caller.name or '-'}"
    arguments = (x.request_id, x.head.method, x.head.path, reply.status, ms, caller)
    log.log(handler.server.access_level, "%s %s %s %d %s ms, %s", *arguments, extra=extra)


class JsonLines(logging.Formatter):
    """One JSON object on each line; further members come from `about`, here and in the core."""

    _MEMBERS = ("request", "method", "path", "status", "ms", "client", "token", "job", "flow", "step", "trace")

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {"time": timestamp(int(record.created * 1000)), "level": record.levelname.lower()}
        entry["message"] = log_message(record)
        given = {name: value for name in self._MEMBERS if (value := getattr(record, name, None)) is not None}
        entry |= {name: it if isinstance(it, str | int | float) else shown(it) for name, it in given.items()}
        if record.exc_info:
            entry["exception"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(entry)  # in ASCII: other characters may break or reverse a line
