"""The documents of Astera Lite: OpenAPI, Postman collection, JSON Schema of flow files.

A wing of astera_lite, which loads this file when one of its documents is first wanted. Pure functions.
"""

from __future__ import annotations

import itertools
import json
import json.encoder
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from astera_lite import (
    CONTENT_TYPES,
    FLOW,
    INT64,
    JSON_TYPE,
    MODES,
    PREFIXES,
    REVALIDATED,
    SCHEMA_RULES,
    VALUE_SCHEMA,
    ConfigError,
    Deployments,
    Either,
    Elsewhere,
    Exchange,
    Flow,
    InputError,
    ListOf,
    MapOf,
    Member,
    MissingFile,
    Reply,
    StepKind,
    Table,
    Value,
    __version__,
    as_text,
    entity_tag,
    is_json_type,
    json_body,
    late,
    resource,
    split_template,
    step_table,
    to_json,
    wing,
)

as_texts = late("astera_lite_notices:as_texts")
sample_value = late("astera_lite_notices:sample_value")
selecting_text = late("astera_lite_notices:selecting_text")

_TEXT: dict[str, Any] = {"type": "string"}


def flow_schema(kinds: Mapping[str, Member]) -> dict[str, Any]:
    """A JSON Schema (2020-12) of flow files, for editors; `check` finds more faults."""
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A flow of Astera Lite"}
    definitions = {"step": _table_schema(step_table(kinds)), "value": _table_schema(VALUE_SCHEMA)}
    return about | _member_schema(FLOW) | {"$defs": definitions}


def _member_schema(member: Member) -> dict[str, Any]:
    """The JSON Schema of the values that this member of a flow file accepts."""
    match member:
        case Elsewhere():
            return _member_schema(wing(member.name))
        case StepKind():
            return _member_schema(member.members) | {"description": member.word}
        case Value() if plain := _member_schema(member.plain):
            return {"anyOf": [plain, {"type": "string", "pattern": r"\$\{"}]}
        case Either():
            return {"anyOf": [_member_schema(member.plain), _member_schema(member.structured)]}
        case MapOf():
            return {"type": "object", "additionalProperties": _member_schema(member.item)}
        case ListOf():
            item = _member_schema(member.item)
            listed = {"type": "array", "items": item} | ({"minItems": member.least} if member.least else {})
            return {"anyOf": [item, listed]} if member.lone else listed
        case Table():
            return {"$ref": f"#/$defs/{member.name}"} if member.name else _table_schema(member)
    return dict(member.json)


def _table_schema(table: Table) -> dict[str, Any]:
    """The JSON Schema of an object; the schema of a named table is a definition."""
    schema: dict[str, Any] = {"type": "object", "additionalProperties": table.more is not None}
    schema["properties"] = {
        name: _member_schema(member) | ({} if member.default is None else {"default": member.default})
        for name, member in table.members.items()
    }
    schema["required"] = [name for name, member in table.members.items() if member.required]
    if table.choice:
        schema["oneOf"] = [{"required": [name]} for name in table.choice]
    return {"anyOf": [_member_schema(table.members[table.short]), schema]} if table.short else schema


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}


_REQUEST_ID = {"X-Request-Id": _ref("headers", "X-Request-Id")}  # a header of every response


@cache
def _template() -> Any:
    """The part of the OpenAPI document that does not depend on flows. Callers must not change it."""
    try:
        template = json.loads(resource("openapi.json"))
    except ConfigError:
        raise MissingFile("openapi.json") from None
    for response in template["components"]["responses"].values():
        response["headers"] = _REQUEST_ID | response.get("headers", {})
    return template


def _shared(kind: str, name: str) -> Any:
    """A component of the template: a response, a parameter, a header."""
    return _template()["components"][kind][name]


#: Names of the problem responses in openapi.json, by status.
_PROBLEMS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict",
    412: "PreconditionFailed", 413: "ContentTooLarge", 414: "UriTooLong", 415: "UnsupportedMediaType",
    421: "Misdirected", 422: "KeyReused", 429: "TooManyRequests", 431: "HeadersTooLarge", 500: "ServerError",
    502: "BadGateway", 503: "Unavailable", 504: "GatewayTimeout",
}  # fmt: skip
_ALWAYS = (400, 403, 414, 421, 431, 500, 503)  # possible with every operation


class _Responses:
    """The responses of an operation. A status may have several meanings, which are merged at the end."""

    def __init__(self, known: Mapping[str, dict[str, Any]] | None = None) -> None:
        self.found: dict[str, list[dict[str, Any]]] = {status: [one] for status, one in (known or {}).items()}

    def add(self, status: int | str, response: dict[str, Any]) -> None:
        """Add a meaning of a status."""
        self.found.setdefault(str(status), []).append(response)

    def add_problems(self, *statuses: int) -> None:
        """Add problem documents from the template."""
        for status in statuses:
            self.add(status, _ref("responses", _PROBLEMS[status]))

    def merged(self) -> dict[str, dict[str, Any]]:
        """One response for each status."""
        merged = {status: _merged(found) for status, found in sorted(self.found.items())}
        return {
            status: one if "$ref" in one else one | {"headers": _REQUEST_ID | one.get("headers", {})}
            for status, one in merged.items()
        }


def _merged(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first, *more = (one for place, one in enumerate(found) if one not in found[:place])
    if not more:
        return first
    parts = [_shared("responses", one["$ref"].rpartition("/")[2]) if "$ref" in one else one for one in (first, *more)]
    headers: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part.get("headers", ())):
        given = [part.get("headers", {}).get(name) for part in parts]
        header = next(one for one in given if one)
        whole = _shared("headers", name) if "$ref" in header else header
        headers[name] = header if all(given) or not whole.get("required") else {**whole, "required": False}
    schemas: dict[str, list[Any]] = {}
    for part in parts:
        for media, content in part.get("content", {}).items():
            if content["schema"] not in schemas.setdefault(media, []):
                schemas[media].append(content["schema"])
    merged: dict[str, Any] = {"description": " Or: ".join(dict.fromkeys(part["description"] for part in parts))}
    if headers:
        merged["headers"] = headers
    if schemas:
        merged["content"] = {
            media: {"schema": each[0] if len(each) == 1 else {"anyOf": each} if all(each) else {}}
            for media, each in schemas.items()
        }
    return merged


def _record(properties: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """An object whose members are all required."""
    return {"type": "object", "required": list(properties), "properties": dict(properties), **more}


def _content(schema: Mapping[str, Any], media: str) -> dict[str, Any]:
    return {media: {"schema": schema}}


def _parameter(name: str, where: str, description: str, schema: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": name, "in": where, "description": description, "required": where == "path", "schema": schema} | more


_INT64_SCHEMA = {"type": "integer", "format": "int64", "minimum": INT64.start, "maximum": INT64.stop - 1}


def _unknown_words(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": schema["description"]} if isinstance(schema.get("description"), str) else {}


#: JSON Schema of each type of a flow file.
_TYPE_SCHEMAS: dict[str, dict[str, Any]] = {
    name: {"type": name} for name in ("string", "number", "boolean", "array", "object", "null")
} | {
    "integer": _INT64_SCHEMA,
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
}
#: Limits of flow files, which hold for texts and lists alike, by their names in JSON Schema; and the narrower of two.
_SIZES: list[tuple[str, str, Callable[[list[int]], int]]] = [
    ("minLength", "minItems", max),
    ("maxLength", "maxItems", min),
]


def _json_schema(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A flow file's schema of a value as JSON Schema 2020-12."""
    kinds = spec.get("type", [])
    kinds = kinds if isinstance(kinds, list) else [kinds]
    schema: dict[str, Any] = {}
    if len(kinds) == 1:
        schema = dict(_TYPE_SCHEMAS[kinds[0]])
    elif kinds:
        schema = {"anyOf": [_TYPE_SCHEMAS[kind] for kind in kinds]}
    schema |= {name: spec[name] for name in SCHEMA_RULES if name in spec}
    for length, items, narrower in _SIZES:
        if limits := [schema.pop(name) for name in (length, items) if name in schema]:
            names = [length] * (kinds != ["array"]) + [items] * (not kinds or "array" in kinds)
            schema |= dict.fromkeys(names, narrower(limits))
    if kinds == ["integer"]:  # the narrower limit of the two
        schema["minimum"] = max(schema["minimum"], INT64.start)
        schema["maximum"] = min(schema["maximum"], INT64.stop - 1)
    if "items" in spec:
        schema["items"] = _json_schema(spec["items"])
    if spec.get("properties"):
        schema["properties"] = {name: _json_schema(item) for name, item in spec["properties"].items()}
    if isinstance(spec.get("required"), list) and spec["required"]:
        schema["required"] = spec["required"]
    additional = spec.get("additionalProperties", True)
    if additional is not True:
        schema["additionalProperties"] = False if additional is False else _json_schema(additional)
    if "default" in spec:
        schema["default"] = spec["default"]
    if "example" in spec:
        schema["examples"] = [spec["example"]]
    return schema | _unknown_words(spec)


def _parameter_schema(spec: Mapping[str, Any]) -> dict[str, Any]:
    schema = _json_schema({"type": "string", **{name: spec[name] for name in spec if name not in ("in", "required")}})
    schema.pop("description", None)
    if schema.get("type") == "array":
        items = schema.setdefault("items", {"type": "string"})
        if items.get("type") == "string" and "format" not in items:  # a comma separates items, and none is empty
            items["minLength"] = max(items.get("minLength", 1), 1)
            items.setdefault("pattern", "^[^,]*$")
        if spec.get("required"):
            schema["minItems"] = max(schema.get("minItems", 1), 1)
    elif spec["in"] == "path" and schema.get("type") == "string" and "format" not in schema:
        schema["minLength"] = max(schema.get("minLength", 1), 1)  # an empty segment is no resource
    return schema


def _flow_parameters(flow: Flow, renamed: Mapping[str, str]) -> list[dict[str, Any]]:
    """The parameters of a flow; path parameters have the names in the path of the document."""
    found = []
    for item in flow.parameters:
        if item.where == "header" and item.name.lower() in ("accept", "content-type", "authorization"):
            continue  # OpenAPI has other places for them
        spec = flow.tree["request"].get("parameters", {}).get(item.name) or {"in": "path"}
        schema = _parameter_schema(spec)
        name = renamed.get(item.name, item.name) if item.where == "path" else item.name
        words = str(spec.get("description") or f"The parameter {item.name}.")
        found.append(_parameter(name, item.where, words, schema, required=item.required))
        if item.where == "query" and item.array:
            found[-1] |= {"style": "form", "explode": True}
    fields = sorted(flow.selection.sort) if flow.selection and isinstance(flow.selection.sort, frozenset) else []
    for name in flow.selecting:
        words, schema = selecting_text(name).capitalize() + ".", dict(_TEXT)
        more: dict[str, Any] = {}
        if name == "sort_by" and flow.selection.sort:
            known = {"enum": [sign + each for each in fields for sign in ("", "-")]} if fields else _TEXT
            schema, more = {"type": "array", "items": known}, {"style": "form", "explode": False}
            schema |= {} if fields else {"maxItems": wing("astera_lite_requests:MAX_SORTED")}
        elif name in flow.selection.filters:
            schema, more = {"type": "array", "items": _TEXT}, {"style": "form", "explode": True}
        found.append(_parameter(name, "query", words, schema, **more))
    return found


def _body_of(flow: Flow) -> dict[str, Any]:
    spec = flow.tree["request"].get("body")
    if not flow.content_types:
        return {}
    rest = {name: spec[name] for name in spec if name != "required" or isinstance(spec[name], list)} if spec else {}
    schema = _json_schema(rest)
    content = {}
    for media in flow.content_types:
        if is_json_type(media):
            content[media] = {"schema": schema}
        elif media == CONTENT_TYPES["form"]:
            content[media] = {"schema": {"type": "object", "minProperties": int(flow.body_required)} | schema}
        elif media.startswith("text/"):
            least = max(schema.get("minLength", 0), int(flow.body_required))
            content[media] = {"schema": schema | {"type": "string", "minLength": least}}
        else:
            content[media] = {"schema": _unknown_words(rest) | {"minLength": int(flow.body_required)}}
    return {"requestBody": {"required": flow.body_required, "content": content}}


def _shape(value: Any) -> dict[str, Any]:
    """The part of a template's value that is known without a run."""
    if isinstance(value, str) and "${" in value:
        parts = list(split_template(value))
        return {} if len(parts) == 1 and parts[0][0] else {"type": "string"}
    if isinstance(value, dict):
        return _record({name: _shape(item) for name, item in value.items()}, additionalProperties=False)
    if isinstance(value, list):
        shapes = [_shape(item) for item in value]
        same = shapes[0] if shapes and all(shape == shapes[0] for shape in shapes) else {}
        return {"type": "array", "minItems": len(shapes), "maxItems": len(shapes), "items": same}
    return {"type": {str: "string", bool: "boolean", int: "integer", float: "number"}.get(type(value), "null")}


def _steps_in(steps: Any) -> Iterator[dict[str, Any]]:
    """Every step of a flow, including steps inside steps."""
    for step in steps:
        yield step
        branches = [step["each"]] if "each" in step else step.get("choose", [])
        for branch in branches:
            yield from _steps_in(branch["steps"])


def _flow_answer(spec: Mapping[str, Any], may_be_bytes: bool) -> dict[str, Any]:
    """One response of a flow, as far as its headers and body are known."""
    given = {name: value for name, value in spec.get("headers", {}).items() if value is not None}
    headers = {
        name: {"schema": _TEXT, "required": "${" not in str(value)}
        for name, value in given.items()
        if name.lower() != "content-type"
    }
    answer: dict[str, Any] = {"description": "The response of the flow.", "headers": headers}
    if spec.get("status") in (204, 304) or not ("body" in spec or "page" in spec):
        return answer
    body = spec.get("body")
    schema = _shape(body)
    if "page" in spec:
        cursor = {"cursor": {"type": ["string", "null"]}}
        if "body" not in spec:
            schema = _record({"items": {"type": "array", "items": {}}, **cursor})
        elif isinstance(body, dict) and "cursor" not in body:
            schema = _record({**schema["properties"], **cursor})
    elif spec.get("filter") or spec.get("sort"):
        schema = {"type": "array", "items": {"type": "object"}}
    media = next((str(value) for name, value in given.items() if name.lower() == "content-type"), "")
    if "${" in media:
        return answer | {"content": _content({}, "*/*")}
    kind = (media or "application/json").partition(";")[0].strip().lower()
    answer["content"] = _content(schema if is_json_type(kind) else {}, kind)
    if may_be_bytes and not media and isinstance(body, str) and not schema:
        answer["content"] |= _content({}, "application/octet-stream")
    return answer


_WITH_JSON_VALUES = {"set", "each", "choose", "wait", "respond", "fail"}  # kinds of steps; others may give bytes


def _own_responses(flow: Flow) -> _Responses:
    """The responses that a flow declares, by status; `default` if the status is computed."""
    steps = list(_steps_in(flow.tree.get("steps", [])))
    may_be_bytes = any(not is_json_type(media) for media in flow.content_types) or any(
        not step.keys() & _WITH_JSON_VALUES for step in steps
    )
    specs = flow.tree.get("response") or [{"body": "${the last step's value}" if steps else None}]
    specs = specs if isinstance(specs, list) else [specs]
    responses = _Responses()
    for spec in [*specs, *(step["respond"] for step in steps if "respond" in step)]:
        answer = _flow_answer(spec, may_be_bytes)
        responses.add(_declared(spec.get("status", 200)), answer)
    for step in steps:
        if "fail" in step:
            message = step["fail"]["message"]
            words = f": {message}" if isinstance(message, str) and "${" not in message else "."
            problem = _shared("responses", "ServerError") | {"description": "The flow fails" + words}
            responses.add(_declared(step["fail"].get("status", 500)), problem)
    return responses


def _declared(status: Any) -> str:
    """The status of a flow's response in the notation of OpenAPI."""
    return "default" if isinstance(status, str) else str(status)


def _failures_of(flow: Flow) -> list[int]:
    """The statuses with which a flow may fail."""
    calls_out = any(kind in step for step in _steps_in(flow.tree.get("steps", [])) for kind in ("http", "call"))
    return [500, 504] + [502] * calls_out


def _add_results(result: _Responses, flows: Iterable[_Responses]) -> None:
    """Add the responses of all flows to those of the result route, which returns one of them."""
    known = {"2XX": {"application/json"}, "default": {"application/json", "application/problem+json"}}
    for code, answer in (item for responses in flows for item in responses.merged().items()):
        one = code if code in result.found else "2XX" if code[0] == "2" else "default"
        for status in [*result.found, *known] if code == "default" else [one]:
            known.setdefault(status, set()).update(answer.get("content", ()))
    for status, media in known.items():
        kinds = sorted(media, key=lambda kind: (kind != "application/json", kind))  # generators take the first
        schemas = {"application/problem+json": _ref("schemas", "Problem")}
        if kinds:
            content = {kind: {"schema": schemas.get(kind, {})} for kind in kinds}
            result.add(status, _shared("responses", "OwnResult") | {"content": content})


def _flow_operation(flow: Flow, mode: str, renamed: Mapping[str, str]) -> tuple[dict[str, Any], _Responses]:
    """How a flow is called in one mode, and the responses."""
    asynchronous = mode == "asynchronous"
    parameters = _flow_parameters(flow, renamed)
    own = {item["name"].lower() for item in parameters if item["in"] == "header"}
    shared = ["CallbackUrl", "Wait", "IdempotencyKey"] if asynchronous else []
    names = [name for name in shared if _shared("parameters", name)["name"].lower() not in own]
    responses = _own_responses(flow)
    words = flow.description or f"The flow {flow.name}."
    if flow.strict:
        words += "\n\nOther query parameters are refused."
    if asynchronous:
        headers = {name: _ref("headers", name) for name in ("Job-Status", "Content-Location", "Preference-Applied")}
        for answer in itertools.chain(*responses.found.values()):
            answer["headers"] = answer.get("headers", {}) | headers
        responses.add(202, _ref("responses", "Accepted"))
        responses.add_problems(422)
        words += "\n\nAnswers 202 once the job is stored, or the result if the job finishes within `Prefer: wait=N`."
    elif len(flow.modes) == 2:
        words += f"\n\n`Prefer: respond-async` (RFC 7240) makes the request a job, as `{flow.name}.submit` does."
    refuses = flow.when_full == "refuse" and bool(flow.limit)
    responses.add_problems(*_failures_of(flow), 404, *[413, 415] * bool(flow.content_types), *[429] * refuses)
    operation = {
        "operationId": f"{flow.name}.{'submit' if asynchronous else 'run'}",
        "tags": [flow.name],
        "summary": f"Submit {flow.name} as a job" if asynchronous else f"Run {flow.name}",
        "description": words,
        "parameters": parameters + [_ref("parameters", name) for name in names],
        **_body_of(flow),
    }
    if asynchronous:  # each operation contains the callback: some generators refuse a reference
        operation["callbacks"] = {"finished": _shared("callbacks", "finished")}
    return operation, responses


def openapi_document(
    deployments: Deployments, base: str, secured: bool, only: Collection[str] | None = None
) -> dict[str, Any]:
    """OpenAPI 3.1 of the published flows and of the jobs API.

    `secured`: the server requires a token; `only`: the names of the flows that the caller may call, None for all.
    Raises MissingFile if openapi.json is not there.
    """
    template = _template()
    operations: list[tuple[str, str, dict[str, Any], _Responses]] = []  # path, method, operation, responses
    first_of: dict[str, Flow] = {}  # the first flow of each path, by the path without parameter names
    flows = [flow for name, flow in sorted(deployments.by_name.items()) if only is None or name in only]
    for flow in flows:
        first = first_of.setdefault(re.sub(r"\{[^}]*\}", "{}", flow.resource), flow)
        pairs = zip(flow.segments, first.segments, strict=True)
        renamed = {own[1:-1]: name[1:-1] for own, name in pairs if own[0] == "{"}
        for mode in (mode for mode in MODES if mode in flow.modes):
            path = PREFIXES[mode] + first.resource
            operations.append((path, flow.method.lower(), *_flow_operation(flow, mode, renamed)))
    operations.sort(key=lambda row: row[0])
    answers = [responses for _, _, _, responses in operations]
    for path, methods in template["paths"].items():
        operations += [(path, method, one, _Responses(one["responses"])) for method, one in methods.items()]
    paths: dict[str, dict[str, Any]] = {}
    for path, method, operation, responses in operations:
        responses.add_problems(*_ALWAYS, *[401] * (secured and operation.get("security") != []))
        if operation["operationId"] == "getJobResult":
            _add_results(responses, answers)
        paths.setdefault(path, {})[method] = operation | {"responses": responses.merged()}
    tags = [{"name": flow.name, "description": flow.description or f"The flow {flow.name}."} for flow in flows]
    document: dict[str, Any] = template | {
        "info": template["info"] | {"version": __version__},
        "servers": [{"url": base}],
        "security": [{"token": []}] if secured else [],
        "tags": tags + template["tags"],
        "paths": paths,
    }
    components = _referenced(paths, template["components"])
    schemes = {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return document | {"components": components | (schemes if secured else {})}


def _referenced(document: Any, shared: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The shared parts that a document uses."""
    used: set[tuple[str, str]] = set()
    left = [document]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part.values()
            target = part.get("$ref")
            if isinstance(target, str) and target.startswith("#/components/"):
                kind, name = target.split("/")[2:]
                if (kind, name) not in used:
                    used.add((kind, name))
                    left.append(shared[kind][name])
    return {
        kind: {name: part for name, part in parts.items() if (kind, name) in used}
        for kind, parts in shared.items()
        if any(kind == used_kind for used_kind, _ in used)
    }


#: The variables that the scripts of a chain pass from one request to the next.
_CHAIN = {"statusUrl": "", "resultUrl": "", "polls": "0"}
_COLLECTION_ID = "df816507-1066-5ba7-bd21-be63fe063aba"  # always the same: a new import replaces the old one
_MOST_POLLS = 100  # for each job, with pauses as in Retry-After, at most 5 seconds
_ALL_TESTS = """\
pm.test("The answer names its request", () => pm.response.to.have.header("X-Request-Id"));"""
_PROBLEM_TEST = """\
const isProblem = (pm.response.headers.get("Content-Type") || "").startsWith("application/problem+json");
if (isProblem) pm.test("An error says why", () => {
    const problem = pm.response.json();
    pm.expect(problem.status).to.equal(pm.response.code);
    pm.expect(problem.detail).to.be.a("string").that.is.not.empty;
});"""
_OWN_STATUS_TEST = """\
pm.test("The status is one that this flow gives: " + STATUSES.join(", "), () => {
    pm.expect(pm.response.code).to.be.oneOf(STATUSES);
});"""
_ANY_STATUS_TEST = """\
pm.test("The server is not at fault", () => pm.expect(pm.response.code).to.not.equal(500));"""
_JSON_TEST = """\
const media = (pm.response.headers.get("Content-Type") || "").split(";")[0].trim();
if (/[/+]json$/i.test(media) && pm.response.text()) {
    pm.test("The body is JSON", () => pm.response.json());
}"""
_FORGET_CHAIN = """\
Object.entries(CHAIN).forEach(([name, value]) => pm.collectionVariables.set(name, value));"""
_SUBMIT_TEST = """\
const refused = REFUSED.includes(pm.response.code);  // the example values do not suffice
if (!refused) pm.test("The job is accepted", () => {
    pm.response.to.have.status(202);
    pm.response.to.have.header("Retry-After");
    const job = pm.response.json();
    pm.expect(job.id).to.match(/^[0-9a-f-]{36}$/);
    pm.expect(job.flow).to.equal(FLOW);
    pm.expect(job.status).to.be.oneOf(["Running", "Completed", "Error"]);
    pm.expect(pm.response.headers.get("Job-Status")).to.equal(job.status);
    pm.expect(pm.response.headers.get("Location")).to.equal(job.statusUrl);
    pm.collectionVariables.set("statusUrl", pm.response.headers.get("Location"));
});"""
_SKIP_TEST = """\
if (!pm.collectionVariables.get(NAME)) pm.execution.skipRequest();  // send the request before this one first"""
_POLL_TEST = """\
pm.test("The status is told", () => {
    pm.response.to.have.status(200);
    const job = pm.response.json();
    pm.expect(pm.response.headers.get("Job-Status")).to.equal(job.status);
    const polls = Number(pm.collectionVariables.get("polls")) + 1;
    pm.collectionVariables.set("polls", polls);
    if (job.status === "Running" && polls < MOST) {
        const seconds = Math.min(Number(pm.response.headers.get("Retry-After")) || 1, 5);
        setTimeout(() => {}, seconds * 1000);  // the next request waits for it
        pm.execution.setNextRequest(pm.info.requestId);
        return;
    }
    pm.expect(job.status, "after " + polls + " polls").to.be.oneOf(["Completed", "Error"]);
    pm.expect(pm.response.headers.get("Location")).to.equal(job.resultUrl);
    pm.collectionVariables.set("resultUrl", pm.response.headers.get("Location"));
});"""
_FETCH_TEST = """\
pm.test("The job is finished", () => {
    pm.expect(pm.response.headers.get("Job-Status")).to.be.oneOf(["Completed", "Error"]);
});"""
_HEALTH_TEST = """\
pm.test("The server is well", () => {
    pm.response.to.have.status(200);
    pm.expect(pm.response.json().status).to.equal("ok");
});"""
_LIST_TEST = """\
pm.test("Jobs are listed, newest first", () => {
    pm.response.to.have.status(200);
    const page = pm.response.json();
    pm.expect(page).to.have.property("next");
    const times = page.jobs.map((job) => job.createdAt);
    pm.expect(times).to.deep.equal([...times].sort().reverse());
});"""


def _script(listen: str, *parts: str, **values: Any) -> dict[str, Any]:
    """An event of a collection: parts of JavaScript, in which NAME stands for the value of `name`."""
    text = "\n".join(parts)
    for name, value in values.items():
        text = re.sub(rf"\b{name.upper()}\b", lambda match, value=value: to_json(value), text)  # type: ignore[misc]
    return {"listen": listen, "script": {"type": "text/javascript", "exec": text.split("\n")}}


def _item(name: str, request: Mapping[str, Any], *events: dict[str, Any]) -> dict[str, Any]:
    item = {"name": name, "event": list(events), "request": request, "response": []}
    return item | {"protocolProfileBehavior": {"followRedirects": False}}  # a flow's 302 is its response


def _field(name: str, value: str, words: str, disabled: bool = False) -> dict[str, Any]:
    return {"key": name, "value": value, "description": words} | ({"disabled": True} if disabled else {})


def _ask(url: str, words: str, *query: dict[str, Any], **more: Any) -> dict[str, Any]:
    parts = {"raw": url, "host": [url.partition("/")[0]], "path": url.split("/")[1:], "query": list(query)}
    return {"method": "GET", "url": {name: part for name, part in parts.items() if part}, "description": words} | more


def _no_variables(text: str, brace: str = "{ ") -> str:
    """
    A text in which Postman finds no `{{variable}}`, such as the caller's token, to replace. It knows no escape:
    where the text's own form has none for a `brace` either, the braces are parted.
    """
    return re.sub(r"\{(?=\{)", lambda match: brace, text)


def _sample_body(flow: Flow) -> tuple[dict[str, Any], bytes] | None:
    """The body of an example request, in the form of Postman and as it is sent."""
    if not flow.content_types:
        return None
    media, spec = flow.content_types[0], flow.tree["request"].get("body") or {}
    value = sample_value(spec, "text")
    if media == CONTENT_TYPES["form"] and isinstance(value, dict):
        pairs = [(name, text) for name, item in value.items() for text in as_texts(item)]
        pairs = [(_no_variables(name), _no_variables(text)) for name, text in pairs]
        fields = [{"key": name, "value": text, "type": "text"} for name, text in pairs]
        return {"mode": "urlencoded", "urlencoded": fields}, urllib.parse.urlencode(pairs).encode()
    if is_json_type(media):
        text = _no_variables(json.dumps(value, indent=2, ensure_ascii=False), "\\u007b")  # {{ is in strings only
    else:
        text = _no_variables(as_text(value))
    options_ = {"options": {"raw": {"language": "json"}}} if is_json_type(media) else {}
    return {"mode": "raw", "raw": text, **options_}, text.encode()


#: Escapes names and values for Postman, by their place: Postman itself escapes blanks, but no reserved characters.
_IN_POSTMAN: dict[str, Callable[[str], str]] = {
    "path": partial(urllib.parse.quote, safe=""),
    "query": partial(urllib.parse.quote, safe="/:@, "),
    "header": _no_variables,
}


def _sample_request(flow: Flow, mode: str) -> tuple[dict[str, Any], list[int]]:
    """An example request of a flow in the form of Postman, and the status of its refusal if the values are invalid."""
    specs = flow.tree["request"].get("parameters", {})
    params: dict[str, Any] = {}
    fields: dict[str, list[dict[str, Any]]] = {"path": [], "query": [], "header": []}
    for item in flow.parameters:
        spec = specs.get(item.name, {})
        value, note = sample_value(spec, item.name), str(spec.get("description", ""))
        sent = item.required or "example" in spec or "default" in spec
        if sent:
            params[item.name] = value
        write = _IN_POSTMAN[item.where]
        texts = [write(text) for text in as_texts(value)]
        for text in texts if item.where == "query" else [",".join(texts)]:
            fields[item.where].append(_field(write(item.name), text, note, not sent))
    for name in flow.selecting:
        fields["query"].append(_field(_IN_POSTMAN["query"](name), "", selecting_text(name), True))
    if mode == "asynchronous":
        fields["query"].append(_field("callbackUrl", "", _shared("parameters", "CallbackUrl")["description"], True))
        for name, value in (("Wait", "wait=10"), ("IdempotencyKey", "{{$guid}}")):
            about = _shared("parameters", name)
            fields["header"].append(_field(about["name"], value, about["description"], True))
    body = _sample_body(flow)
    refused, words = [], flow.description
    try:
        request = wing("astera_lite_embedding:request_for")(flow, params, body and body[1])
        flow.bind(request)
    except InputError as error:
        refused = [error.status]
        words += "\n\nGive it other values than these, which are made up: " + "; ".join(
            f"{fault['name'] or fault['in']} {fault['message']}" for fault in error.errors
        )
    if body is not None:
        fields["header"].append(_field("Content-Type", flow.content_types[0], ""))
    path = [f":{part[1:-1]}" if part[0] == "{" else part for part in flow.segments]
    url = "/".join(["{{baseUrl}}" + PREFIXES[mode], *path])
    asked = _ask(url, words, *fields["query"], method=flow.method, header=fields["header"])
    query = "&".join(f"{one['key']}={one['value']}" for one in fields["query"] if "disabled" not in one)
    asked["url"] |= {"raw": f"{url}?{query}" if query else url} | (
        {"variable": fields["path"]} if fields["path"] else {}
    )
    return asked | ({"body": body[0]} if body else {}), refused


def _flow_folder(flow: Flow) -> dict[str, Any]:
    """The requests of a flow: the synchronous one, and the chain of submit, poll and fetch."""
    own = _own_responses(flow).found
    given = [int(code) for code in own if code.isdigit()] + [code for code in _failures_of(flow) if code != 500]
    items = []
    for mode in (mode for mode in MODES if mode in flow.modes):
        asked, refused = _sample_request(flow, mode)
        statuses = sorted({*given, *refused})
        status_test = _ANY_STATUS_TEST if "default" in own else _OWN_STATUS_TEST
        result = (status_test, _PROBLEM_TEST, _JSON_TEST)
        if mode == "synchronous":
            items.append(_item(f"{flow.name}: run", asked, _script("test", *result, statuses=statuses)))
            continue
        poll = _ask("{{statusUrl}}", "Asks until the job is finished; the pauses are what Retry-After says.")
        fetch = _ask("{{resultUrl}}", "The flow's own response, as often as asked until it expires.")
        items += [
            _item(
                f"{flow.name}: submit", asked, _script("prerequest", _FORGET_CHAIN, chain=_CHAIN),
                _script("test", _SUBMIT_TEST, _PROBLEM_TEST, refused=refused, flow=flow.name),
            ),
            _item(
                f"{flow.name}: poll", poll, _script("prerequest", _SKIP_TEST, name="statusUrl"),
                _script("test", _POLL_TEST, most=_MOST_POLLS),
            ),
            _item(
                f"{flow.name}: fetch", fetch, _script("prerequest", _SKIP_TEST, name="resultUrl"),
                _script("test", _FETCH_TEST, *result, statuses=statuses),
            ),
        ]  # fmt: skip
    return {"name": flow.name, "description": flow.description, "item": items}


def postman_document(
    deployments: Deployments, base: str, secured: bool, only: Collection[str] | None = None
) -> dict[str, Any]:
    """A Postman collection (format 2.1.0) of the published flows, which runs as it is; arguments as of OpenAPI's."""
    flows = [flow for name, flow in sorted(deployments.by_name.items()) if only is None or name in only]
    health = _ask("{{baseUrl}}/health", "Needs no token.", auth={"type": "noauth"})
    limit = _field("limit", "20", "How many at the most.")
    jobs = _ask("{{baseUrl}}/api/jobs?limit=20", "Jobs that the caller may see, newest first.", limit)
    jobs["url"]["path"] = ["api", "jobs"]
    server = [
        _item("health", health, _script("test", _HEALTH_TEST)),
        _item("jobs", jobs, _script("test", _LIST_TEST)),
    ]
    variables = {"baseUrl": base, "token": "", **_CHAIN}
    bearer = [{"key": "token", "value": "{{token}}", "type": "string"}]
    return {
        "info": {
            "_postman_id": _COLLECTION_ID,
            "name": "Astera Lite",
            "description": "Every published flow: run it, or submit, poll and fetch it. Run the collection as it is; "
            + ("put a token of the server into the variable `token` first." if secured else "it needs no token."),
            "schema": "https://schema.getpostman.com/json/collection/v2.1.0/collection.json",
        },
        "item": [*map(_flow_folder, flows), {"name": "Server", "item": server}],
        "auth": {"type": "bearer", "bearer": bearer} if secured else {"type": "noauth"},
        "event": [_script("test", _ALL_TESTS)],
        "variable": [{"key": name, "value": value, "type": "string"} for name, value in variables.items()],
    }


def _flow_document(make: Callable[..., Any], x: Exchange) -> Reply:
    """A document of the flows, cached with them: for many flows it takes long to make."""
    kept, arguments = x.app.deployments.documents, (x.base, x.caller.name != "", x.caller.flows)
    body = kept.get((make, *arguments))
    if body is None:
        if len(kept) >= 16:  # clients may use many different bases
            kept.clear()
        body = kept[make, *arguments] = json_body(make(x.app.deployments, *arguments))
    return Reply(200, [JSON_TYPE, REVALIDATED, ("ETag", entity_tag(body))], body)


def openapi(x: Exchange) -> Reply:
    """GET /openapi.json"""
    return _flow_document(openapi_document, x)


def postman(x: Exchange) -> Reply:
    """GET /postman.json"""
    return _flow_document(postman_document, x)
