"""Flows: every fault of a file with its place and cure, the typing of input, steps, responses."""

from __future__ import annotations

import copy
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import pytest
from support import ROOT, Client, FakeClock, Running, get_flow, running

import astera_lite
from astera_lite import (
    AddressPolicy,
    AsteraLite,
    Deployments,
    Flow,
    FlowError,
    InputError,
    Journal,
    Mask,
    Outcome,
    Run,
    Server,
    StoredRequest,
    Surroundings,
    build_flow,
    load_flows,
    parse_flow_text,
    run_flow,
)
from astera_lite_steps import run_test


def surroundings(**more: Any) -> Surroundings:
    values: dict[str, Any] = {
        "clock": FakeClock(), "policy": AddressPolicy("none"), "env": {}, "secrets": {},
        "max_result": 1 << 20, "max_step_response": 1 << 20, "kept": {},
        "connections": {}, "masked": Mask(more.get("secrets", {}).values()),
        "flow_named": lambda name: None, "data": "data", "own_database": "jobs.db", "folder": None,
    }  # fmt: skip
    return Surroundings(**values | more)


def run_tree(
    tree: dict[str, Any], query: str = "", *, journal: Journal | None = None, seconds: float = 60, **more: Any
) -> Any:
    flow = build_flow(tree, "t")
    outside = surroundings(**more)
    given = flow.bind(StoredRequest("GET", flow.resource, query), "id-1")
    return run_flow(Run(flow, given, outside, outside.clock.monotonic() + seconds, journal))


def run_steps(*steps: Any, response: Any = None, **more: Any) -> Outcome:
    outcome = run_tree(get_flow("/x", steps=list(steps), response=response), **more)
    assert isinstance(outcome, Outcome)
    return outcome


def step_value(kind: str, spec: Any, **more: Any) -> Any:
    outcome = run_steps({"name": "s", kind: spec}, **more)
    assert outcome.error is None, outcome
    return json.loads(outcome.answer.body)


# --- broken files ---

REQUEST = {"method": "GET", "resource": "/x"}


def step(**members: Any) -> dict[str, Any]:
    return {"request": REQUEST, "steps": [{"name": "a", **members}]}


def parameter(**spec: Any) -> dict[str, Any]:
    return {"request": {**REQUEST, "parameters": {"p": {"in": "query", **spec}}}}


def body(spec: Any, **more: Any) -> dict[str, Any]:
    return {"request": {"method": "POST", "resource": "/x", "body": spec, **more}}


def response(spec: Any) -> dict[str, Any]:
    return {"request": REQUEST, "response": spec}


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", 'needs a member "request"'),
    ({"request": REQUEST, "step": []}, "/step", 'did you mean "steps"?'),
    ({"request": {"resource": "/x"}}, "/request", 'needs a member "method"'),
    ({"request": {"method": "GET"}}, "/request", 'needs a member "resource"'),
    ({"request": {"method": "get", "resource": "/x"}}, "/request/method", "is not one of GET"),
    ({"request": {"method": "GET", "resource": "x"}}, "/request/resource", "must begin with /"),
    ({"request": {"method": "GET", "resource": "/"}}, "/request/resource", "must begin with / and name something"),
    ({"request": {"method": "GET", "resource": "/x/"}}, "/request/resource", "empty segment"),
    ({"request": {"method": "GET", "resource": "//x"}}, "/request/resource", "empty segment"),
    ({"request": {"method": "GET", "resource": "/a b"}}, "/request/resource", "percent-encode"),
    ({"request": {"method": "GET", "resource": "/a/../b"}}, "/request/resource", "must not have . or .."),
    ({"request": {"method": "GET", "resource": "/a?b=1"}}, "/request/resource", "query parameters stand"),
    ({"request": {"method": "GET", "resource": "/x/{id"}}, "/request/resource", "neither a plain path segment"),
    ({"request": {"method": "GET", "resource": "/x/{id}.json"}}, "/request/resource", "neither a plain path segment"),
    ({"request": {"method": "GET", "resource": "/{a}/{a}"}}, "/request/resource", "has {a} twice"),
    ({"request": {**REQUEST, "processing": ["asynchronos"]}}, "/request/processing", 'did you mean "asynchronous"?'),
    ({"request": {**REQUEST, "processing": []}}, "/request/processing", "must be a list"),
    ({"request": {**REQUEST, "strict": "yes"}}, "/request/strict", "true or false"),
    ({"request": REQUEST, "timeout": "5 minutes"}, "/timeout", "is not a duration"),
    ({"request": REQUEST, "restart": "resum"}, "/restart", 'did you mean "resume"?'),
    ({"request": REQUEST, "description": 5}, "/description", "5 is not text"),
    (parameter(type="int"), "/request/parameters/p/type", 'did you mean "integer"?'),
    (parameter(type=["integer", "null"]), "/request/parameters/p/type", "is not one of"),
    (parameter(type="integer", default="3"), "/request/parameters/p/default", "must be an integer"),
    (parameter(type="integer", default=True), "/request/parameters/p/default", "must be an integer"),
    (parameter(type="integer", default=0, minimum=1), "/request/parameters/p/default", "must be at least 1"),
    (parameter(type="date", default="tomorrow"), "/request/parameters/p/default", "must be a date"),
    (parameter(type="array", items={"type": "integer"}, default=["a"]), "/request/parameters/p/default/0", "integer"),
    (parameter(required=True, default="a"), "/request/parameters/p/default", "leave out"),
    (parameter(required="yes"), "/request/parameters/p/required", "true or false"),
    (parameter(minimum="1"), "/request/parameters/p/minimum", "must be a number"),
    (parameter(minLength=-1), "/request/parameters/p/minLength", "must be 0 or more, not -1"),
    (parameter(pattern="("), "/request/parameters/p/pattern", "not a regular expression"),
    (parameter(enum="a"), "/request/parameters/p/enum", "must be a list"),
    (parameter(max=5), "/request/parameters/p/max", "is not known here"),
    ({"request": {**REQUEST, "parameters": {"p": {}}}}, "/request/parameters/p", 'needs a member "in": one of path'),
    ({"request": {**REQUEST, "parameters": {"p": {"in": "body"}}}}, "/request/parameters/p/in", "one of path"),
    ({"request": {**REQUEST, "parameters": {"p": {"in": "path"}}}}, "/request/parameters/p", "has no {p}"),
    ({"request": {**REQUEST, "parameters": []}}, "/request/parameters", "must be an object"),
    ({"request": {**REQUEST, "parameters": {"a b": {"in": "header"}}}}, "/request/parameters/a b", "not the name of a"),
    ({"request": {**REQUEST, "parameters": {"callbackUrl": {"in": "query"}}}}, "/request/parameters/callbackUrl", "rename it"),  # noqa: E501
    (
        {"request": {"method": "GET", "resource": "/x/{p}", "parameters": {"p": {"in": "query"}}}},
        "/request/parameters/p", '"in": "path"',
    ),
    (body({"type": "objekt"}), "/request/body/type", 'did you mean "object"?'),
    (body({"type": [["object"]]}), "/request/body/type", "is not one of"),
    (body({"type": "object", "required": ["nmae"], "properties": {"name": {}}}), "/request/body/required", '"name"?'),
    (body({"properties": {"a/b": {"type": "x"}}}), "/request/body/properties/a~1b/type", "is not one of"),
    (body("json"), "/request/body", "must be an object"),
    (
        body({"properties": {"name": {}}, "additionalProperties": False}) | {"response": {"body": "${request.body.nam}"}},  # noqa: E501
        "/response/body", 'there is no "request.body.nam"; did you mean "name"?',
    ),
    (body({}, contentTypes=["jsn"]), "/request/contentTypes", 'did you mean "json"?'),
    (body({}, contentTypes="json"), "/request/contentTypes", "must be a list"),
    ({"request": {**REQUEST, "body": {}}}, "/request/body", "a GET request has no body"),
    ({"request": REQUEST, "steps": {}}, "/steps", "must be a list, not an object"),
    ({"request": REQUEST, "steps": ["x"]}, "/steps/0", "must be an object"),
    ({"request": REQUEST, "steps": [{"set": 1}]}, "/steps/0", 'needs a member "name"'),
    ({"request": REQUEST, "steps": [{"name": ["a"], "set": 1}]}, "/steps/0/name", "must be a word"),
    (step(), "/steps/0", "needs exactly one of http, "),
    (step(set=1, wait=1), "/steps/0", "respond, fail, not set and wait"),
    (step(sett=1), "/steps/0/sett", 'did you mean "set"?'),
    (step(set="${b}"), "/steps/0/set", 'nothing named "b"'),
    (step(set={"x": ["${nope}"]}), "/steps/0/set/x/0", 'nothing named "nope"'),
    (step(set="${params.q}"), "/steps/0/set", 'there is no "params.q" (known: none)'),
    (step(set="${params['q']}"), "/steps/0/set", 'there is no "params.q"'),
    (step(set="${request['methd']}"), "/steps/0/set", 'there is no "request.methd"; did you mean "method"?'),
    (step(set="${request.headers['user-agent']}"), "/steps/0/set", 'there is no "request.headers.user-agent"'),
    (step(set="${request.boddy}"), "/steps/0/set", 'did you mean "body"?'),
    (step(set="${"), "/steps/0/set", "never closed"),
    (step(set=1, when="${1 +}"), "/steps/0/when", "invalid syntax"),
    (step(set=1, onError="${zz}"), "/steps/0/onError", 'nothing named "zz"'),
    (step(set=1, timeout="soon"), "/steps/0/timeout", "is not a duration"),
    (step(set=1, retry="3"), "/steps/0/retry/attempts", "from 1 to 100: write it without quotes"),
    (step(set=1, retry={"attempts": 0}), "/steps/0/retry/attempts", "from 1 to 100"),
    (step(set=1, retry={"attempts": 2, "on": ["never"]}), "/steps/0/retry/on/0", '"never" is not a status such as 503'),
    (step(set=1, retry={"attempts": 2, "backoff": 0.1}), "/steps/0/retry/backoff", "from 1 to 10"),
    (step(http={}), "/steps/0/http", "needs exactly one of url, connection"),
    (step(http="example.com"), "/steps/0/http/url", "must begin with http"),
    (step(http="ftp://example.com"), "/steps/0/http/url", "must begin with http"),
    (step(http="http://u:p@example.com/"), "/steps/0/http/url", "user name or password"),
    (step(http={"url": 5}), "/steps/0/http/url", "5 is not an http or https URL"),
    (step(http={"url": "http://h/", "method": "FETCH"}), "/steps/0/http/method", "is not one of"),
    (step(http={"url": "http://h/", "json": 1, "form": {}}), "/steps/0/http", "has json and form"),
    (step(http={"url": "http://h/", "form": "a=1"}), "/steps/0/http/form", '"a=1" is not an object'),
    (step(each={"of": "abc", "steps": [{"name": "b", "set": 1}]}), "/steps/0/each/of", '"abc" is not a list'),
    (response({"body": [], "sort": ["${params.x}"]}), "/response/sort/0", "is not the name of a field"),
    (step(http={"url": "http://h/", "expect": "ok"}), "/steps/0/http/expect", "is not a status such as"),
    (step(http={"url": "http://h/", "header": {}}), "/steps/0/http/header", 'did you mean "headers"?'),
    (step(http={"url": "http://h/", "query": "a=1"}), "/steps/0/http/query", "must be an object"),
    (step(python="json"), "/steps/0/python", 'is not a function such as "module:function"'),
    (step(python="no_such_module_x:f"), "/steps/0/python", "flows folder"),
    (step(python="json:dump_all"), "/steps/0/python", "has no function"),
    (
        step(python={"call": "shlex:quote", "args": {"text": 1}}), "/steps/0/python/call",
        "the function quote(s) is called as quote(context, text=…): got an unexpected keyword argument 'text'",
    ),
    (step(wait="soon"), "/steps/0/wait", "is not a duration"),
    (step(fail={"status": 200, "message": "x"}), "/steps/0/fail/status", "from 400 to 599"),
    (step(fail={}), "/steps/0/fail", 'needs a member "message"'),
    (step(respond={"status": 99}), "/steps/0/respond/status", "from 200 to 599"),
    (response({"status": "200"}), "/response/status", "is not a status"),
    (response({"status": 204, "body": {}}), "/response/body", "has no body"),
    (response({"headers": {"Content-Length": "5"}}), "/response/headers/Content-Length", "set by the server"),
    (response({"headers": {"transfer-encoding": "x"}}), "/response/headers/transfer-encoding", "set by the server"),
    (response({"headers": {"Job-Status": "Completed"}}), "/response/headers/Job-Status", "set by the server"),
    (response({"headers": {"a b": "x"}}), "/response/headers", "is not the name of a header"),
    (response({"headers": []}), "/response/headers", "must be an object"),
    (response([{"body": 1}, {"when": "${1}"}]), "/response/0", "put it last"),
    (response({"stauts": 200}), "/response/stauts", 'did you mean "status"?'),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "place", "message"), BROKEN)
def test_a_broken_flow_is_refused_with_place_and_cure(tree: dict[str, Any], place: str, message: str) -> None:
    with pytest.raises(FlowError) as caught:
        build_flow(tree, "shop", source="shop.json")
    assert {fault.where for fault in caught.value.faults} == {"shop.json"}
    found = [(fault.place, fault.message) for fault in caught.value.faults]
    assert any(at.startswith(place) and message in text for at, text in found), found


@pytest.mark.parametrize(
    ("name", "text", "place", "message"),
    [
        ("a.json", '{"a": 1,\n "b": 2,}', "line 2", "comma"),
        ("a.json", '{"a": 1\n "b": 2}', "line 2, column 2", "a comma"),
        ("a.json", "{'a': 1}", "line 1, column 2", '"double" quotes'),
        ("a.json", '{\n// note\n"a": 1}', "line 2, column 1", "no comments"),
        ("a.json", "", "line 1, column 1", "is not JSON"),
        ("a.json", '{"a": 1, "a": 2}', "line 1, column 10", 'the member "a" occurs twice'),
        ("a.json", '{"a": NaN}', "", "NaN is not JSON"),
        ("a.json", "[]", "", "must be an object"),
        ("a.json", "[" * 200 + "]" * 200, "", "nested deeper"),
        ("a.toml", "a = \n", "line 1, column 5", "is not TOML"),
        ("a.toml", "a = 1\na = 2\n", "", "overwrite"),
        ("a.toml", "a = " + "[" * 3000, "", "nest"),
    ],
)
def test_a_slip_of_grammar_is_found_by_line_and_column(name: str, text: str, place: str, message: str) -> None:
    with pytest.raises(FlowError) as caught:
        build_flow(parse_flow_text(text, name), "a", source=name)
    (fault,) = caught.value.faults
    assert fault.where == name
    assert fault.place.startswith(place)
    assert message in fault.message


def test_all_faults_are_reported_at_once() -> None:
    tree = {"request": {"method": "G", "resource": "x"}, "steps": [{"name": "a", "set": "${b}"}, {"name": "b", "x": 1}]}
    with pytest.raises(FlowError) as caught:
        build_flow(tree, "bad name!")
    places = [fault.place for fault in caught.value.faults]
    assert places == ["", "/request/method", "/request/resource", "/steps/0/set", "/steps/1/x"]
    assert 'step "b" comes later: move it up' in str(caught.value)


@pytest.mark.parametrize("name", ["params", "request", "env", "secrets", "len", "null", "class", "a b", "_a", "ä", ""])
def test_step_names_that_expressions_could_not_use(name: str) -> None:
    with pytest.raises(FlowError, match="/steps/0/name"):
        build_flow(step(set=1) | {"steps": [{"name": name, "set": 1}]}, "t")


WHOLE: dict[str, Any] = {
    "description": "d", "timeout": "5s", "restart": "resume",
    "request": {
        "method": "POST", "resource": "/x/{id}", "processing": ["synchronous"], "strict": True, "contentTypes": ["json"],  # noqa: E501
        "parameters": {
            "id": {"in": "path", "type": "integer", "minimum": 1},
            "q": {"in": "query", "type": "array", "items": {"type": "integer"}, "default": [1], "minItems": 1},
            "p": {"in": "header", "pattern": "a", "required": False},
        },
        "body": {"type": "object", "required": ["a"], "properties": {"a": {"type": ["string", "null"], "enum": ["x"]}},
                 "additionalProperties": {"type": "integer"}},
    },
    "steps": [
        {"name": "h", "http": {"method": "POST", "url": "http://h/${params.id}", "query": {"a": 1}, "headers": {"b": "c"},  # noqa: E501
         "json": {"x": 1}, "timeout": "1s", "expect": [200, "2xx"], "follow": True}, "when": "${1}", "timeout": "3s",
         "retry": {"attempts": 2, "delay": "1s", "backoff": 2, "maxDelay": "3s", "on": [429]}, "onError": "continue"},
        {"name": "p", "python": {"call": "json:dumps", "args": {"a": 1}}},
        {"name": "w", "wait": {"until": "${now()}"}},
        {"name": "r", "respond": {"status": 200, "headers": {"a": "b"}, "body": "x"}},
        {"name": "f", "fail": {"status": 422, "message": "m"}},
    ],
    "response": [{"when": "${1}", "status": 200, "headers": {"A": "b"}, "body": {"a": "${h}"}}, {"body": 1}],
}  # fmt: skip


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


@pytest.mark.parametrize(
    "odd", [None, True, -1, 1.5, 10**30, "", "x", "${", "${nope}", [], [[]], [None], [{}], {}, {"a": {}}, {"name": []},
            {"type": {}}, {"type": [[]]}, {"in": []}, "/" * 9, float("nan"), "\ud800"], ids=repr,
)  # fmt: skip
def test_whatever_stands_anywhere_in_a_file_is_a_fault_and_never_a_crash(odd: Any) -> None:
    for path in _places(WHOLE):
        tree = copy.deepcopy(WHOLE)
        at = tree
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = odd
        try:
            build_flow(tree, "t")
        except FlowError as error:
            assert error.faults
        except Exception as error:
            pytest.fail(f"{odd!r} at {path}: {type(error).__name__}: {error}")


# --- input ---


def bind(tree: dict[str, Any], query: str = "", path: str = "", headers: Any = None, data: bytes = b"") -> Any:
    flow = build_flow(tree, "t")
    path = path or flow.resource
    return flow.bind(StoredRequest(flow.method, path, query, headers or {}, data))


OK: dict[str, list[tuple[str, Any]]] = {
    "integer": [("0", 0), ("-12", -12), ("007", 7), (str(2**63 - 1), 2**63 - 1), (str(-(2**63)), -(2**63))],
    "number": [("1", 1), ("2.5", 2.5), ("-1e3", -1000.0), ("0.1", 0.1), ("1e-400", None)],
    "boolean": [("true", True), ("false", False)],
    "date": [("2024-02-29", "2024-02-29")],
    "date-time": [("2026-11-23T20:31:05Z", "2026-11-23T20:31:05Z"), ("2026-11-23t20:31:05.5+01:00", "2026-11-23t20:31:05.5+01:00")],  # noqa: E501
    "string": [("", ""), ("a,b", "a,b"), ("٣", "٣")],
}  # fmt: skip
BAD: dict[str, list[str]] = {
    "integer": ["", "+5", "1_0", "٣", "²", "9" * 5000, str(2**63), str(-(2**63) - 1), "1.0", "1e3", "0x1", " 1", "1\n", "--1", "-"],  # noqa: E501
    "number": ["", "+5", "1_0", "٣", "nan", "inf", "-Infinity", "1e999", "9" * 5000, ".5", "1.", "0x1", " 1", "1e", "1,5"],  # noqa: E501
    "boolean": ["", "True", "1", "yes", "TRUE", " true"],
    "date": ["", "2026-02-30", "2026-1-1", "20260101", "2026-11-23T00:00:00Z", "٢٠٢٦-01-01", "0000-01-01"],
    "date-time": ["", "2026-11-23", "2026-11-23T20:31:05", "2026-11-23T25:00:00Z", "2026-11-23 20:31:05Z", "2026-11-23T20310512Z", "2026-13-01T00:00:00Z"],  # noqa: E501
}  # fmt: skip
LOCATIONS = ("query", "path", "header")


def given(kind: str, where: str, text: str, **rules: Any) -> Any:
    resource = "/x/{p}" if where == "path" else "/x"
    tree = {
        "request": {"method": "GET", "resource": resource, "parameters": {"p": {"in": where, "type": kind, **rules}}}
    }
    coded = quote(text, safe="")
    if where == "path":
        return bind(tree, path=f"/x/{coded}").params["p"]
    if where == "header":
        return bind(tree, headers={"p": text}).params["p"]
    return bind(tree, f"p={coded}").params["p"]


@pytest.mark.parametrize("where", LOCATIONS)
@pytest.mark.parametrize(("kind", "text", "value"), [(k, *row) for k, rows in OK.items() for row in rows])
def test_a_parameter_becomes_its_type(where: str, kind: str, text: str, value: Any) -> None:
    found = given(kind, where, text)
    if value is not None:
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("where", LOCATIONS)
@pytest.mark.parametrize(("kind", "text"), [(k, text) for k, rows in BAD.items() for text in rows])
def test_a_parameter_of_a_wrong_type_is_refused_and_named(where: str, kind: str, text: str) -> None:
    with pytest.raises(InputError) as caught:
        given(kind, where, text)
    (error,) = caught.value.errors
    assert (error["in"], error["name"]) == (where, "p")
    assert "must" in error["message"]


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"type": "integer", "minimum": 1}, "0"), ({"type": "integer", "maximum": 3}, "4"),
        ({"type": "string", "minLength": 2}, "a"), ({"type": "string", "maxLength": 2}, "abc"),
        ({"type": "string", "pattern": "^a+$"}, "ab"), ({"type": "string", "enum": ["a", "b"]}, "c"),
        ({"type": "integer", "enum": [1, 2]}, "3"), ({"type": "boolean", "enum": [True]}, "false"),
    ],
)  # fmt: skip
def test_rules_of_a_parameter(rules: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match="must"):
        given(rules.pop("type"), "query", text, **rules)


@pytest.mark.parametrize(("text", "ok"), [("1", True), ("1.0", True), ("2.5", True), ("2", False)])
def test_numbers_of_an_enum_are_compared_by_value(text: str, ok: bool) -> None:
    if ok:
        assert given("number", "query", text, enum=[1, 2.5]) == float(text)
    else:
        with pytest.raises(InputError):
            given("number", "query", text, enum=[1, 2.5])


def test_arrays_repeated_or_separated_by_commas() -> None:
    tree = parameter(type="array", items={"type": "integer"}, maxItems=3)
    assert bind(tree, "p=1&p=2").params["p"] == [1, 2]
    assert bind(tree, "p=1,2,3").params["p"] == [1, 2, 3]
    assert bind(tree, "").params["p"] is None
    assert bind(tree, "p=").params["p"] == []
    names = parameter(type="array")
    assert bind(names, "p=Doe%2C+John&p=x").params["p"] == ["Doe, John", "x"]
    assert bind(names, "p=Doe%2C+John&p=").params["p"] == ["Doe, John"]
    for query in ("p=1,,2", "p=1,x", "p=1&p=2&p=3,4"):
        with pytest.raises(InputError):
            bind(tree, query)


def test_optional_default_required_and_repeated() -> None:
    assert bind(parameter()).params["p"] is None
    assert bind(parameter(type="integer", default=3)).params["p"] == 3
    for tree, query, message in (
        (parameter(required=True), "", "is missing"),
        (parameter(), "p=1&p=1", "must be given once"),
    ):
        with pytest.raises(InputError, match=message):
            bind(tree, query)


def test_undeclared_parameters_are_ignored_unless_strict() -> None:
    tree = parameter()
    assert bind(tree, "q=1").params == {"p": None}
    tree["request"]["strict"] = True
    with pytest.raises(InputError, match="q: is not declared"):
        bind(tree, "q=1")


def test_text_is_decoded_once() -> None:
    assert given("string", "path", "%41/é") == "%41/é"
    assert bind(parameter(), "p=a+b%2Bc%2541").params["p"] == "a b+c%41"
    tree = {"request": {"method": "GET", "resource": "/x/{p}"}}
    assert bind(tree, path="/x/a+b").params["p"] == "a+b"
    for path in ("/x/%", "/x/%zz", "/x/%ff", "/x/%00"):
        with pytest.raises(InputError):
            bind(tree, path=path)


SCHEMA = {
    "type": "object", "required": ["name", "n"], "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 1}, "n": {"type": "integer", "maximum": 9},
        "a/b~": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
        "kind": {"enum": ["a", None, 1], "default": "a"}, "opt": {"type": ["integer", "null"]},
        "when": {"type": "date"}, "sub": {"type": "object", "properties": {"d": {"default": [1]}}},
    },
}  # fmt: skip
JSON_TYPE = {"content-type": "application/json"}


def bind_json(value: Any, schema: Any = SCHEMA) -> Any:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return bind(body(schema), headers=JSON_TYPE, data=data).request["body"]


def test_a_body_is_checked_and_defaults_filled_in() -> None:
    found = bind_json({"name": "A", "n": 1.0, "sub": {}, "opt": None})
    assert found == {"name": "A", "n": 1, "sub": {"d": [1]}, "opt": None, "kind": "a"}
    assert type(found["n"]) is int


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ({"name": "A", "n": True}, "/n"), ({"name": "A", "n": "1"}, "/n"), ({"name": "A", "n": 1.5}, "/n"),
        ({"name": "A", "n": 2**63}, "/n"), ({"name": "A", "n": None}, "/n"), ({"name": "A", "n": 10}, "/n"),
        ({"name": "", "n": 1}, "/name"), ({"n": 1}, "/name"), ({"name": "A", "n": 1, "zz": 1}, "/zz"),
        ({"name": "A", "n": 1, "a/b~": [{"x": True}, {"x": 1}]}, "/a~1b~0/1/x"),
        ({"name": "A", "n": 1, "kind": True}, "/kind"), ({"name": "A", "n": 1, "opt": False}, "/opt"),
        ({"name": "A", "n": 1, "when": "x"}, "/when"), ([], ""), (None, ""), (b"{", ""), (b'{"name": NaN}', ""),
        (b'{"n": 1, "n": 2}', ""), (b"[" * 100000, ""), (b"\xff", ""), (b'"\\ud800"', ""), (b"1" * 5000, ""),
        (b"1e999", ""), (b"", ""),
    ],
)  # fmt: skip
def test_a_faulty_body_is_named_by_a_json_pointer(value: Any, name: str) -> None:
    with pytest.raises(InputError) as caught:
        bind_json(value)
    (error,) = caught.value.errors
    assert (error["in"], error["name"]) == ("body", name)


def test_an_integer_beyond_64_bits_is_valid_json_that_is_refused() -> None:
    with pytest.raises(InputError) as caught:
        bind_json({"name": "A", "n": 1, "a/b~": [{"x": 2**63}]})
    message = 'the number "9223372036854775808" is beyond 64 bits: write it as text'
    assert caught.value.errors == [{"in": "body", "name": "/a~1b~0/0/x", "message": message}]


def test_a_declared_member_that_was_not_sent_is_null(tmp_path: Path) -> None:
    row = {"type": "object", "properties": {"note": {}, "code": {}}, "required": ["code"]}
    body = {"type": "object", "properties": {"note": {}, "row": row, "rows": {"type": "array", "items": row}}}
    steps = [
        {"name": "top", "set": "${[request.body.note, request.body['note'], request.body.row.note]}"},
        {"name": "each_row", "each": {"of": "${request.body.rows}", "steps": [{"name": "n", "set": "${item.note}"}]}},
        {"name": "some", "set": "${[row.note for row in request.body.rows if row.note is None]}"},
        {"name": "text", "set": "a note: ${request.body.rows[0].note}"},
    ]
    flow = {"request": {"method": "POST", "resource": "/f", "body": body}, "steps": steps}
    flow["response"] = {"body": "${[top, each_row, some, text, request.body]}"}
    sent = {"row": {"code": 1}, "rows": [{"code": 1}, {"code": 2, "note": "x"}]}
    with running(tmp_path, {"f": flow}) as (_, _, client):
        answer = client.post("/api/publishing/f", json=sent).json()
    assert answer == [[None, None, None], [None, "x"], [None], "a note: null", sent]


def test_the_headers_of_a_request_are_the_declared_ones(tmp_path: Path) -> None:
    parameters = {"X-Who": {"in": "header"}, "X-None": {"in": "header"}}
    body = {"all": "${request.headers}", "one": "${[request.headers['x-who'], request.headers['x-none']]}"}
    flow = get_flow("/h", request={"parameters": parameters}, response={"body": body})
    with running(tmp_path, {"h": flow}) as (_, _, client):
        found = client.get("/api/publishing/h", headers={"X-Who": "me", "X-Other": "a"}).json()
    assert found == {"all": {"x-who": "me"}, "one": ["me", None]}


@pytest.mark.parametrize("source", ["request.body.other", "request.body.row.code", "request.query.note", "data.note"])
def test_another_member_that_is_missing_is_an_error_with_the_way_round(source: str) -> None:
    body = {"properties": {"row": {"properties": {"code": {}}, "required": ["code"]}}}
    flow = {"request": {"method": "POST", "resource": "/f", "body": body}}
    flow["steps"] = [{"name": "data", "set": {"a": 1}}, {"name": "b", "set": f"${{{source}}}"}]
    built = build_flow(flow, "f")
    scope = {"request": {"body": {"row": {}}, "query": {}}, "data": {"a": 1}}
    name = source.rpartition(".")[2]
    with pytest.raises(
        Exception, match=rf'there is no member "{name}".*; if it may be missing, write \.get\("{name}"\)$'
    ):
        built.steps[1].run(None, scope, "")  # type: ignore[arg-type]


def test_all_faults_of_a_request_at_once() -> None:
    tree = body(SCHEMA, parameters={"p": {"in": "query", "type": "integer"}, "h": {"in": "header", "required": True}})
    with pytest.raises(InputError) as caught:
        bind(tree, "p=x", headers=JSON_TYPE, data=b'{"n": true, "zz": 1}')
    names = [(error["in"], error["name"]) for error in caught.value.errors]
    assert names == [("query", "p"), ("header", "h"), ("body", "/n"), ("body", "/zz"), ("body", "/name")]


@pytest.mark.parametrize(
    ("types", "sent", "ok"),
    [
        (None, "application/json; charset=utf-8", True), (None, "application/problem+json", True),
        (None, "APPLICATION/JSON", True), (None, "text/plain", False), (None, "", False), (["form"], "application/json", False),  # noqa: E501
        (["application/xml", "json"], "application/xml", True), (["binary"], "application/octet-stream", True),
    ],
)  # fmt: skip
def test_content_types(types: Any, sent: str, ok: bool) -> None:
    tree = body({}, **({"contentTypes": types} if types else {}))
    if ok:
        assert bind(tree, headers={"content-type": sent}, data=b"{}").request["body"] in ({}, b"{}")
        return
    with pytest.raises(InputError) as caught:
        bind(tree, headers={"content-type": sent}, data=b"{}")
    assert caught.value.status == 415


def test_a_body_without_a_type_is_binary_where_that_is_taken(tmp_path: Path) -> None:
    def flow(*types: str) -> dict[str, Any]:
        request = {"method": "POST", "resource": f"/{'-'.join(types)}", "body": {}, "contentTypes": [*types]}
        return {"request": request, "response": {"body": "${request.body}"}}

    flows = {"-".join(types): flow(*types) for types in (("binary",), ("json", "binary"), ("json",))}
    with running(tmp_path, flows) as (app, _, client):
        for path, status in (("binary", 200), ("json-binary", 200), ("json", 415)):
            answer = client.post(f"/api/publishing/{path}", data=b"\xff1")
            assert "Content-Type" not in answer.request.headers
            assert (answer.status_code, answer.content == b"\xff1") == (status, status == 200)
        assert app.run("json-binary", body=b"\xff1").content == b"\xff1"
        assert app.run("json-binary", body={"a": 1}).json() == {"a": 1}


def test_bodies_of_other_kinds() -> None:
    for name, data, value in (
        ("form", b"a=1&b=x+y&b=2", {"a": "1", "b": ["x y", "2"]}), ("form", "ü=“%E2%82%AC+ö".encode(), {"ü": "“€ ö"}), ("text", "é".encode(), "é"), ("binary", b"\0\xff", b"\0\xff"),  # noqa: E501
    ):  # fmt: skip
        media = {
            "form": "application/x-www-form-urlencoded",
            "text": "text/plain",
            "binary": "application/octet-stream",
        }
        found = bind(body({}, contentTypes=[name]), headers={"content-type": media[name]}, data=data)
        assert found.request["body"] == value


def test_the_fields_of_a_form_have_the_types_of_the_body(tmp_path: Path) -> None:
    properties = {
        "name": {"type": "string"}, "age": {"type": "integer", "maximum": 99}, "size": {"type": ["null", "number"]},
        "ok": {"type": "boolean"}, "day": {"type": "date"}, "tags": {"type": "array", "items": {"type": "string"}},
        "numbers": {"type": "array", "items": {"type": "integer"}}, "any": {},
    }  # fmt: skip
    schema = {"type": "object", "required": ["name", "age"], "properties": properties, "additionalProperties": False}
    request = {"method": "POST", "resource": "/join", "contentTypes": ["form"], "body": schema}
    with running(tmp_path, {"join": {"request": request, "response": {"body": "${request.body}"}}}) as (app, _, client):
        example = client.get("/api/deployments/join").json()["example"]
        answer = client.post("/api/publishing/join", data=example["body"], headers=example["headers"])
        assert (answer.status_code, answer.json()["name"], answer.json()["age"]) == (200, "name", 1)
        fields = {"name": "7", "age": "7", "size": "1.5", "ok": "false", "day": "2026-11-23", "tags": "a,b", "any": "1"}
        answer = client.post("/api/publishing/join", data={**fields, "numbers": ["1", "2"]})
        assert answer.json() == {
            "name": "7", "age": 7, "size": 1.5, "ok": False, "day": "2026-11-23", "tags": ["a,b"], "any": "1",
            "numbers": [1, 2],
        }  # fmt: skip
        assert app.run("join", body={"name": "n", "age": 3, "tags": ["a"]}).json()["age"] == 3
        wrong = {"name": ["a", "b"], "age": "100", "size": "", "ok": "yes", "day": "x", "numbers": "1,2", "more": "1"}
        faults = client.post("/api/publishing/join", data=wrong).json()["errors"]
    assert [fault["name"] for fault in faults] == [
        "/name", "/age", "/size", "/ok", "/day", "/numbers/0", "/more"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("media", "sent", "heard"),
    [
        ("text", "a b", "a b"), ("text", {"a": 1}, '{"a":1}'), ("form", {"a": 1, "b": ["x&", "y"]}, {"a": "1", "b": ["x&", "y"]}),  # noqa: E501
        ("form", "a=1&b=x+y", {"a": "1", "b": "x y"}), ("json", "a b", "a b"), ("application/x+json", "a b", "a b"),
        ("text/xml", "<a/>", "<a/>"), ("text", "é", "é"),
    ],
)  # fmt: skip
def test_a_call_of_a_flow_sends_the_body_in_the_first_type_that_the_flow_accepts(
    tmp_path: Path, media: str, sent: Any, heard: Any
) -> None:
    request = {"method": "POST", "resource": "/one", "contentTypes": [media, "binary"]}
    test = {"name": "t", "request": {"body": sent}, "response": {"body": heard}}
    one = {"request": request, "response": {"body": "${request.body}"}, "tests": [test]}
    step = {"name": "said", "call": {"flow": "one", "body": sent}}
    with running(tmp_path, {"one": one, "other": get_flow("/other", steps=[step])}) as (app, _, _):
        assert app.run("one", body=sent).json() == app.run("other").json()["body"] == heard
        flow = app.deployments.by_name["one"]
        assert run_test(flow, flow.tests[0], app.outside) == ([], 0)


def test_a_failure_has_the_header_that_its_status_requires_also_behind_a_call(tmp_path: Path) -> None:
    fail = {"status": 416, "message": "${request.path}", "headers": {"Content-Range": "bytes */5"}}
    tests = [{"name": str(status), "fails": {"got": status}, "response": {"status": status}} for status in (416, 426)]
    outer = get_flow("/outer", steps=[{"name": "got", "call": "inner"}]) | {"tests": tests}
    with running(tmp_path, {"inner": get_flow("/inner", steps=[{"name": "no", "fail": fail}]), "outer": outer}) as run:
        app, _, client = run
        for name in ("inner", "outer"):
            answer = client.get(f"/api/publishing/{name}", timeout=5)
            assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */5")
        answer = client.get("/api/publishingAsync/outer", headers={"Prefer": "wait=5"})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, "bytes */5")
        flow = app.deployments.by_name["outer"]
        assert [run_test(flow, test, app.outside) for test in flow.tests] == [([], 0), ([], 0)]


def test_an_enum_tells_true_from_1_and_is_not_walked_for_each_item(monkeypatch: pytest.MonkeyPatch) -> None:
    for allowed in ([True, 0], [0, True]):
        for value, ok in ((True, True), (0, True), (0.0, True), (1, False), (False, False)):
            with nullcontext() if ok else pytest.raises(InputError):
                bind_json([value], {"items": {"enum": allowed}})
    for allowed in ([True, 1], [1, True]):
        assert bind_json([True, 1], {"items": {"enum": allowed}}) == [True, 1]
    compared, real = Counter[int](), astera_lite.equal
    monkeypatch.setattr(astera_lite, "equal", lambda *pair: compared.update([0]) or real(*pair))
    bind_json(["z"] * 1000, {"items": {"enum": [*map(str, range(1000)), "z"]}})
    assert compared[0] <= 1000


def test_the_first_faults_of_a_request_alone_are_searched_for_what_was_meant() -> None:
    """To look for similar names takes milliseconds, and a small request may have a hundred faults."""
    of_body = body({"properties": {"city_name": {}}, "additionalProperties": False})["request"]
    strict = {"request": of_body | {"strict": True, "parameters": {"days": {"in": "query"}}}}
    names = [f"city_nam{n}" for n in range(9)]
    for query, data in (("", json.dumps(dict.fromkeys(names))), ("&".join(f"day{n}=1" for n in range(9)), "{}")):
        with pytest.raises(InputError) as caught:
            bind(strict, query, headers={"content-type": "application/json"}, data=data.encode())
        assert ["did you mean" in error["message"] for error in caught.value.errors] == [True] * 3 + [False] * 6


@pytest.mark.parametrize("data", [b"a=%zz", b"a=%ff", b"\xff=1"])
def test_a_malformed_form_is_a_fault_of_the_body(data: bytes) -> None:
    with pytest.raises(InputError) as caught:
        bind(body({}, contentTypes=["form"]), headers={"content-type": "application/x-www-form-urlencoded"}, data=data)
    assert [error["in"] for error in caught.value.errors] == ["body"]


# --- routing ---


def names(deployments: Deployments, path: str, method: str = "GET") -> str | None:
    return next((methods[method].name for methods in deployments.match(path) if method in methods), None)


def test_routing() -> None:
    table = {
        "lit": "/a/new",
        "par": "/a/{id}",
        "two": "/a/{id}/b",
        "three": "/{x}/new/b",
        "root": "/a",
        "enc": "/a%20b",
    }
    routes = Deployments([build_flow(get_flow(path), name) for name, path in table.items()])
    for path, name in {
        "/a/new": "lit", "/a/old": "par", "/a/new/b": "two", "/z/new/b": "three", "/a": "root", "/a/": None, "/a//b": None,  # noqa: E501
        "//a": None, "/A": None, "/a/%6eew": "par", "/a%20b": "enc", "/a/x/": None, "/a/x/b/": None, "/": None, "": None,  # noqa: E501
        "/a/..": "par",
    }.items():  # fmt: skip
        assert names(routes, path) == name, path
    assert names(routes, "/a/x", "POST") is None


def test_two_flows_on_one_resource_are_a_fault_that_names_both() -> None:
    first, second = build_flow(get_flow("/a/{x}"), "one"), build_flow(get_flow("/a/{y}"), "two", source="two.json")
    routes = Deployments([first, second])
    assert list(routes.by_name) == ["one"]
    (fault,) = routes.faults
    assert (fault.where, fault.place) == ("two.json", "/request/resource")
    assert '"one"' in fault.message
    post = build_flow(get_flow("/a/{y}", request={"method": "POST"}), "post")
    assert names(Deployments([first, post]), "/a/1", "POST") == "post"


def build(tree: dict[str, Any], name: str, source: str) -> Flow:
    return build_flow(tree, name, source=source)


def test_a_faulty_file_keeps_the_flow_deployed_before(tmp_path: Path) -> None:
    def load(previous: Deployments | None) -> Deployments:
        return Deployments(*load_flows(tmp_path, build, previous.by_name if previous else {}))

    (tmp_path / "a.json").write_text(json.dumps(get_flow("/a")))
    (tmp_path / "b.toml").write_text('[request]\nmethod = "GET"\nresource = "/b"\n')
    (tmp_path / "notes.txt").write_text("not a flow")
    first = load(None)
    assert sorted(first.by_name) == ["a", "b"]
    assert not first.faults
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.toml").write_text("x = " + "[" * 5000)
    (tmp_path / "c.json").write_bytes(b"\xff")
    (tmp_path / "d.json").mkdir()
    second = load(first)
    assert second.by_name == first.by_name
    assert sorted(fault.where for fault in second.faults) == ["a.json", "b.toml", "c.json", "d.json"]
    (tmp_path / "a.json").unlink()
    assert sorted(load(second).by_name) == ["b"]


def test_one_name_in_json_and_toml_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(get_flow("/a")))
    (tmp_path / "a.toml").write_text('[request]\nmethod = "GET"\nresource = "/b"\n')
    flows, faults = load_flows(tmp_path, build, {})
    assert [flow.resource for flow in flows] == ["/a"]
    assert "deployed from a.json already" in faults[0].message


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(get_flow("/a")), "utf-8")  # as Windows editors write it
    flows, faults = load_flows(tmp_path, build, {})
    assert (len(flows), faults) == (1, [])


def test_the_flows_of_a_folder_that_cannot_be_read_stay_in_service(tmp_path: Path) -> None:
    folder = tmp_path / "flows"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(get_flow("/a")))
    own = build(get_flow("/own"), "own", "")
    before, _ = load_flows(folder, build, {"own": own})
    folder.rename(tmp_path / "aside")
    folder.write_text("a file")
    after, faults = load_flows(folder, build, {"own": own, "a": before[0]})
    assert after == before
    assert str(faults[0]) == f"{folder}: cannot be read: Not a directory"


# --- steps ---


def test_set_sees_the_steps_before_and_a_skipped_one_is_null() -> None:
    steps = [
        {"name": "a", "set": {"v": 1}},
        {"name": "b", "when": "${false}", "set": 5},
        {"name": "c", "set": ["${a.v + 1}", "${b}"]},
    ]
    assert json.loads(run_steps(*steps).answer.body) == [2, None]


def test_respond_ends_the_run() -> None:
    outcome = run_steps(
        {"name": "r", "respond": {"status": 404, "body": "x"}}, {"name": "f", "fail": {"message": "no"}}
    )
    assert (outcome.status, outcome.answer.code, outcome.answer.body) == ("Completed", 404, b'"x"\n')


def test_fail_is_an_error_with_its_own_status() -> None:
    outcome = run_steps({"name": "f", "fail": {"status": 422, "message": "no ${request.id}"}})
    assert outcome.status == "Error"
    assert outcome.error is not None
    assert (outcome.error["status"], outcome.error["code"], outcome.error["detail"]) == (422, "failed", "no id-1")
    silent = run_steps({"name": "f", "fail": {"status": 404, "message": ""}})
    assert silent.error is not None
    assert (silent.error["status"], silent.error["detail"]) == (404, "Not Found")


def test_a_fault_tells_the_client_nothing_and_the_log_everything() -> None:
    outcome = run_steps({"name": "a", "set": "${1 / 0}"}, secrets={"k": "s3cret"})
    assert outcome.error is not None
    assert (outcome.error["status"], outcome.error["requestId"]) == (500, "id-1")
    assert "zero" not in outcome.answer.body.decode()
    assert outcome.reason == "t: /steps/0/set: step a: 1 / 0: division by zero"
    leak = run_steps({"name": "a", "set": "${int(secrets.k)}"}, secrets={"k": "s3cret"})
    assert "s3cret" not in leak.reason + leak.answer.body.decode()


def test_on_error_goes_on_with_null_or_a_value() -> None:
    steps = [
        {"name": "a", "set": "${1 / 0}", "onError": "continue"},
        {"name": "b", "set": "${1 / 0}", "onError": ["${a}"]},
    ]
    assert json.loads(run_steps(*steps).answer.body) == [None]
    assert run_steps({"name": "f", "fail": {"message": "x"}, "onError": "continue"}).error is not None


def test_no_response_that_holds_is_a_500_and_the_first_that_holds_answers() -> None:
    none = [{"when": "${false}", "body": 1}]
    assert run_steps(response=none).answer.code == 500
    assert run_steps(response=[*none, {"when": "${1}", "status": 201, "body": 2}, {"body": 3}]).answer.code == 201


@pytest.mark.parametrize(
    ("spec", "code", "media", "data"),
    [
        ({"body": {"ü": 1}}, 200, "application/json", '{"ü":1}\n'.encode()),
        ({"body": None}, 200, "application/json", b"null\n"),
        ({}, 200, None, b""),
        ({"status": 204}, 204, None, b""),
        ({"status": "${100 * 3 + 4}", "body": 1}, 304, None, b""),
        ({"headers": {"Content-Type": "text/plain"}, "body": "é"}, 200, "text/plain; charset=utf-8", "é".encode()),
        ({"headers": {"content-type": "text/csv"}, "body": "a"}, 200, "text/csv; charset=utf-8", b"a"),
        ({"headers": {"Content-Type": "application/hal+json"}, "body": "a"}, 200, "application/hal+json", b'"a"\n'),
        ({"headers": {"Content-Type": "text/csv; charset=latin-1"}, "body": "é"}, 200, "text/csv; charset=utf-8", "é".encode()),  # noqa: E501
        ({"headers": {"Content-Type": 'a/xml;charset="UTF-16" ;b=c'}, "body": "é"}, 200, "a/xml; charset=utf-8;b=c", "é".encode()),  # noqa: E501
        ({"headers": {"Content-Type": "application/json; charset=latin-1"}, "body": "é"}, 200, "application/json; charset=utf-8", '"é"\n'.encode()),  # noqa: E501
        ({"headers": {"Content-Type": "text/csv; charset=UTF-8"}, "body": "é"}, 200, "text/csv; charset=UTF-8", "é".encode()),  # noqa: E501
        ({"headers": {"Content-Type": "text/csv; charset=US-ASCII"}, "body": "é"}, 200, "text/csv; charset=utf-8", "é".encode()),  # noqa: E501
        ({"headers": {"Content-Type": "text/csv; header=present"}, "body": "é"}, 200, "text/csv; header=present; charset=utf-8", "é".encode()),  # noqa: E501
    ],
)  # fmt: skip
def test_response_bodies(spec: Any, code: int, media: str | None, data: bytes) -> None:
    answer = run_steps(response=spec).answer
    headers = {name.lower(): value for name, value in answer.headers}
    assert (answer.code, headers.get("content-type"), answer.body) == (code, media, data)


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("a\r\nX: y", "a%0D%0AX: y"),
        ("a\nb", "a%0Ab"),
        ("a\0", "a%00"),
        (" a", "a"),
        ("a\t", "a"),
        ("€", "%E2%82%AC"),
        ("\x7f", "%7F"),
    ],
)
def test_a_header_cannot_be_injected(text: str, sent: str) -> None:
    outcome = run_steps({"name": "v", "set": text}, response={"headers": {"X-A": "${v}"}})
    assert (outcome.answer.code, dict(outcome.answer.headers)["X-A"]) == (200, sent)


@pytest.mark.parametrize("kind", ["respond", "fail"])
def test_a_list_is_a_line_for_each_cookie_and_one_line_of_any_other_header(kind: str, tmp_path: Path) -> None:
    headers = {
        "Set-Cookie": ["a=1, 2", "b=${1 + 1}", None],
        "X-List": "${['x', 1, null]}",
        "X-None": [],
        "Vary": ["A", "B"],
    }
    step = {"name": "s", kind: {"headers": headers} | ({"status": 409, "message": "m"} if kind == "fail" else {})}
    with running(tmp_path, {"f": get_flow("/f", steps=[step])}) as run:
        answer = run.client.get("/api/publishing/f")
    assert answer.status_code == (409 if kind == "fail" else 200)
    assert answer.raw.headers.getlist("set-cookie") == ["a=1, 2", "b=2"]
    assert (answer.headers["X-List"], answer.headers["Vary"], "X-None" in answer.headers) == (
        "x, 1",
        "A, B, Prefer",
        False,
    )


def test_cookies_of_a_called_flow_are_passed_on_and_tested(tmp_path: Path) -> None:
    login = get_flow("/login", response={"headers": {"Set-Cookie": ["a=1", "b=2"]}})
    tests = [
        {
            "name": "t",
            "steps": {"in": {"headers": {"set-cookie": cookies}, "body": None}},
            "response": {"headers": headers},
        }
        for cookies, headers in ((["a", "b"], {"set-cookie": ["a", "b"]}), (["a"], {"set-cookie": "a"}))
    ]
    passing = {"headers": {"Set-Cookie": "${login.headers['set-cookie']}"}}
    tree = get_flow("/f", steps=[{"name": "login", "call": "login"}], response=passing, tests=tests)
    for test in tests:
        test["steps"] = {"login": test["steps"]["in"]}
    with running(tmp_path, {"login": login, "f": tree}) as run:
        answer = run.client.get("/api/publishing/f")
        assert answer.raw.headers.getlist("set-cookie") == ["a=1", "b=2"]
        flow = run.app.deployments.by_name["f"]
        assert [run_test(flow, test, run.app.outside)[0] for test in flow.tests] == [[], []]


@pytest.mark.parametrize(
    "spec", [{"status": "${99}"}, {"status": "${'200'}"}, {"status": "${true}"}, {"body": "${1e308 * 10}"}]
)
def test_a_response_that_is_none_is_a_500(spec: Any) -> None:
    assert run_steps(response={"body": 1, **spec}).answer.code == 500


def test_large_integers_are_compared_and_kept_to_the_last_digit(tmp_path: Path) -> None:
    rows = [{"k": 2**53}, {"k": 2**53 + 1}, {"k": 2.5}, {"k": 10**30 + 1}]
    request = {"parameters": {"n": {"in": "query", "type": "number", "maximum": 2**60}}}
    response = {"body": "${rows}", "filter": ["k"], "sort": ["k"]}
    flow = get_flow("/rows", request=request, steps=[{"name": "rows", "set": rows}], response=response)
    number = get_flow("/number", request=request, response={"body": "${params.n}"})
    with running(tmp_path, {"rows": flow, "number": number}) as (_, _, client):

        def found(path: str) -> Any:
            return client.get(f"/api/publishing/{path}").json()

        assert found(f"rows?k={2**53 + 1}") == rows[1:2]
        assert found("rows?k=2.5") == rows[2:3]
        assert found(f"rows?k=1{'0' * 29}1") == rows[3:]
        assert found("rows?sort_by=-k") == [rows[3], rows[1], rows[0], rows[2]]
        assert found(f"number?n={2**53 + 1}") == 2**53 + 1
        assert found(f"number?n={2**60 + 1}")["status"] == found(f"number?n={2**64 + 1}")["status"] == 400


def test_rows_that_would_take_for_ever_to_sort_or_filter_are_a_500(tmp_path: Path) -> None:
    steps = [{"name": name, "set": [1]} for name in ("a0", "b0")]
    steps += [{"name": f"{n}{i + 1}", "set": f"${{[{n}{i}, {n}{i}]}}"} for n in ("a", "b") for i in range(40)]
    body = [{"k": "${a40}"}, {"k": "${b40}"}]
    steps.append({"name": "rows", "set": body})
    flow = get_flow("/rows", steps=steps, response={"body": "${rows}", "sort": True, "filter": ["k"]})
    with running(tmp_path, {"rows": flow}) as (_, _, client):
        for query in ("sort_by=k", "k=x"):
            answer = client.get(f"/api/publishing/rows?{query}")
            assert answer.status_code == 500 and "Look up `requestId`" in answer.json()["detail"]


def test_what_a_client_selects_costs_no_more_than_the_rows(tmp_path: Path) -> None:
    rows = "${[{'a': i % 7, 'b': 'x' + str(i)} for i in range(20000)]}"
    flows = {
        name: get_flow(
            f"/{name}",
            steps=[{"name": "rows", "set": rows}],
            response={"body": "${rows}", "sort": sort, "filter": ["b"]},
        )
        for name, sort in (("any", True), ("some", ["a", "b"]))
    }
    with running(tmp_path, flows) as (_, _, client):
        first = client.get("/api/publishing/some?sort_by=-a,b").json()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in flows:
            answer = client.get(f"/api/publishing/{name}?sort_by=-a,b,{'a,-b,' * 2500}")  # a field counts once
            assert answer.json() == first
        many = client.get("/api/publishing/any?sort_by=" + ",".join(f"f{n}" for n in range(2500)))
        assert (many.status_code, many.json()["errors"][0]["message"]) == (400, "has more than 8 fields")
        unknown = client.get("/api/publishing/some?sort_by=" + ",".join(f"f{n}" for n in range(2500)))
        assert unknown.status_code == 400
        spent = []
        for count in (1, 1800):
            began = time.process_time()
            assert len(client.get("/api/publishing/some?" + "&".join(f"b=x{n}" for n in range(count))).json()) == count
            spent.append(time.process_time() - began)
        assert spent[1] < 3 * spent[0]
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < 150  # MB


def test_a_result_over_the_limit_is_a_500() -> None:
    assert run_steps(response={"body": "${'x' * 5000}"}, max_result=4096).answer.code == 500


@pytest.mark.parametrize("spec", [-1, "x", {"until": "soon"}, "${-1}", "${'soon'}", "${true}", "${null}"])
def test_a_wait_that_is_none(spec: Any) -> None:
    try:
        outcome = run_steps({"name": "w", "wait": spec})
    except FlowError as error:
        assert error.faults[0].place.startswith("/steps/0/wait")
    else:
        assert "${" in str(spec), "what is constant is checked at deployment"
        assert outcome.answer.code == 500


def test_wait_for_no_time_and_until_the_past() -> None:
    assert step_value("wait", 0) is None
    assert step_value("wait", {"until": "2020-01-01T00:00:00Z"}) is None


class Kept(Journal):
    suspendable = True

    def __init__(self) -> None:
        super().__init__()
        self.saved, self.waits = {}, {}  # type: ignore[assignment]

    def record(self, path: str, value: Any) -> int:
        self.saved[path] = value  # type: ignore[index]
        return 1


def test_what_a_flow_puts_in_the_place_of_an_api_is_no_status_of_an_api() -> None:
    step = {"name": "got", "http": "http://127.0.0.1:1/", "onError": {"status": "s3same", "headers": {}, "body": 1}}
    flow, outside = build_flow(get_flow("/x", steps=[step]), "t"), surroundings(secrets={"key": "s3same"})
    journal, trace = Journal(), list[dict[str, Any]]()
    journal.saved["got"] = {"status": "s3same", "headers": {}, "body": 1}  # as before a crash
    run_flow(Run(flow, flow.bind(StoredRequest("GET", "/x"), "id-1"), outside, 2000.0, journal, trace))
    assert (trace[0]["state"], "status" in trace[0], "s3same" in json.dumps(trace)) == ("resumed", False, False)


def test_a_long_wait_suspends_and_a_resumed_run_repeats_nothing(tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text("calls = []\ndef f(context):\n    calls.append(1)\n    return len(calls)\n")
    steps = [{"name": "a", "python": "mod:f"}, {"name": "id", "set": "${uuid()}"}, {"name": "w", "wait": "1h"},
             {"name": "b", "python": "mod:f"}, {"name": "c", "set": ["${a}", "${id}", "${b}"]}]  # fmt: skip
    flow = build_flow(get_flow("/x", steps=steps), "t", folder=str(tmp_path))
    journal, clock = Kept(), FakeClock()
    outside = surroundings(clock=clock)

    def go() -> Any:
        bound = flow.bind(StoredRequest("GET", "/x"), "id")
        outcome = run_flow(Run(flow, bound, outside, clock.monotonic() + 7200, journal))
        journal.waits = dict([journal.waiting])
        return outcome

    suspended = go()
    assert suspended == clock.now() + 3_600_000
    assert list(journal.saved) == ["a", "id"]
    assert go() == suspended, "woken too early it waits on, for the same time"
    clock.tick(3600)
    first, identity, second = json.loads(go().answer.body)
    assert (first, second) == (1, 2)
    assert identity == journal.saved["id"]


def test_python_steps(tmp_path: Path) -> None:
    (tmp_path / "mod.py").write_text(
        "def f(context, a, b=2):\n    return [a, b, context.params['p'], context.steps['s']]\n"
        "def odd(context):\n    return {1: (1, 2)}\ndef bad(context):\n    return {1, 2}\ndef boom(context):\n    raise ValueError('inner')\n"  # noqa: E501
    )

    def go(*steps: Any) -> Outcome:
        flow = build_flow(
            get_flow("/x", steps=list(steps), request={"parameters": {"p": {"in": "query"}}}), "t", folder=str(tmp_path)
        )
        out = run_flow(Run(flow, flow.bind(StoredRequest("GET", "/x", "p=q")), surroundings(), 1e9))
        assert isinstance(out, Outcome)
        return out

    call = {"call": "mod:f", "args": {"a": "${s + 1}"}}
    assert json.loads(go({"name": "s", "set": 1}, {"name": "c", "python": call}).answer.body) == [2, 2, "q", 1]
    assert json.loads(go({"name": "c", "python": "mod:odd"}).answer.body) == {"1": [1, 2]}
    for name in ("bad", "boom"):
        outcome = go({"name": "c", "python": f"mod:{name}"})
        assert outcome.answer.code == 500
        assert b"inner" not in outcome.answer.body


def test_what_a_python_step_changes_is_changed_for_its_own_run_alone(tmp_path: Path) -> None:
    def grow(context: Any, env: Any, secrets: Any, here: Any) -> Any:
        values = [context.params["tags"], context.request["body"]["list"], here["list"]]
        values += [context.steps["literal"]["list"], context.steps["failed"]["list"]]
        for value in values:
            value.append(1)
        for names in (env, secrets, context.secrets, context.request["headers"]):
            names["X-MORE"] = "x"
        return values

    request = {"method": "POST", "parameters": {"tags": {"in": "query", "type": "array", "default": []}}}
    request["body"] = {"properties": {"list": {"default": [[0]]}}}
    values = {"list": []}
    flow = get_flow(
        "/grow",
        request=request,
        steps=[
            {"name": "literal", "set": values},
            {"name": "failed", "set": "${1 / 0}", "onError": values},
            {
                "name": "grown",
                "python": {"call": grow, "args": {"env": "${env}", "secrets": "${secrets}", "here": values}},
            },
        ],
    )
    with running(tmp_path, {"grow": flow}) as (app, _, client):
        for _ in range(2):
            assert client.post("/api/publishing/grow", json={}).json() == [[1], [[0], 1], [1], [1], [1]]
        assert "X-MORE" not in [*app.outside.env, *app.outside.secrets]


# --- http steps ---


class Api:
    """A third-party API: answers by path, keeps what came."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {name.lower(): text for name, text in self.headers.items()}
                api.got.append((self.command, self.path, headers, data))
                path = self.path.partition("?")[0]
                if path == "/hang":
                    api.release.wait(5)
                if path in ("/hang", "/drop"):
                    self.close_connection = True
                    return
                queue = api.answers.get(path, [])
                default: tuple[int, dict[str, str], bytes] = (
                    200,
                    {"Content-Type": "application/json"},
                    b'{"ok": true}',
                )
                code, more, content = (queue.pop(0) if len(queue) > 1 else queue[0]) if queue else default
                self.send_response(code)
                for name, text in {"Content-Length": str(len(content)), **more}.items():
                    self.send_header(name, text)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = answer

            def log_message(self, *args: object) -> None:
                pass

        self.release = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(5)


@pytest.fixture
def api() -> Iterator[Api]:
    found = Api()
    yield found
    found.close()


def call(api: Api, spec: dict[str, Any], query: str = "", **more: Any) -> Outcome:
    options = {name: more.pop(name) for name in ("retry", "onError", "timeout") if name in more}
    request = {"parameters": {"p": {"in": "query"}}}
    tree = get_flow("/x", steps=[{"name": "h", "http": spec, **options}], request=request)
    outside = {"env": {"API": api.url, "PORT": api.url.rpartition(":")[2]}, **more}
    outcome = run_tree(tree, query, **outside)
    assert isinstance(outcome, Outcome)
    return outcome


def test_an_http_step_sends_what_it_says(api: Api) -> None:
    spec = {
        "url": api.url + "/a?z=1",
        "query": {"q": "ü &", "l": [1, 2], "n": None},
        "headers": {"X-Key": "${1}", "X-No": None},
    }
    found = json.loads(call(api, {**spec, "json": {"a": "${params.p}"}}, "p=v").answer.body)
    assert (found["status"], found["body"]) == (200, {"ok": True})
    assert found["headers"]["content-type"] == "application/json"
    method, path, headers, data = api.got[0]
    assert (method, path, json.loads(data)) == ("POST", "/a?z=1&q=%C3%BC%20%26&l=1&l=2", {"a": "v"})
    assert (headers["content-type"], headers["x-key"]) == ("application/json", "1")
    assert "x-no" not in headers
    call(api, {"url": api.url + "/f", "form": {"a": "b c", "d": ["e", "f"]}, "method": "PUT"})
    assert (api.got[1][0], api.got[1][3]) == ("PUT", b"a=b+c&d=e&d=f")
    call(api, {"url": api.url + "/t", "body": "é", "headers": {"content-type": "text/x"}})
    assert (api.got[2][2]["content-type"], api.got[2][3]) == ("text/x", "é".encode())
    call(api, {"url": api.url + "/t", "body": "é", "headers": {"content-type": "text/x; charset=latin-1"}})
    assert (api.got[3][2]["content-type"], api.got[3][3]) == ("text/x; charset=utf-8", "é".encode())


def test_bytes_are_passed_on_with_the_charset_that_their_source_names(api: Api) -> None:
    media = "application/vnd.x; charset=latin-1"
    api.answers["/b"] = [(200, {"Content-Type": "application/octet-stream"}, b"\xe9")]
    get = {"name": "got", "http": {"url": api.url + "/b"}}
    put = {"name": "put", "http": {"url": api.url + "/c", "body": "${got.body}", "headers": {"Content-Type": media}}}
    found = run_steps(get, put, response={"headers": {"Content-Type": media}, "body": "${got.body}"}).answer
    assert (api.got[1][2]["content-type"], api.got[1][3]) == (media, b"\xe9")
    assert (dict(found.headers)["Content-Type"], found.body) == (media, b"\xe9")


@pytest.mark.parametrize(
    ("spec", "code", "ok"),
    [({}, 200, True), ({}, 204, True), ({}, 404, False), ({}, 500, False), ({"expect": [200, 404]}, 404, True),
     ({"expect": "4xx"}, 404, True), ({"expect": 404}, 200, False), ({"follow": False, "expect": 302}, 302, True)],
)  # fmt: skip
def test_expected_statuses(api: Api, spec: dict[str, Any], code: int, ok: bool) -> None:
    api.answers["/s"] = [(code, {"Location": "/other"} if code == 302 else {}, b"")]
    assert call(api, {"url": api.url + "/s", **spec}).answer.code == (200 if ok else 502)


@pytest.mark.parametrize(
    ("media", "data", "value"),
    [("application/json", b"[1]", [1]), ("application/x+json; charset=utf-8", b"{}", {}), ("text/html", "é".encode(), "é"),  # noqa: E501
     ("text/plain; charset=latin-1", b"\xe9", "é"), ("text/plain; charset=nope", b"\xe9", "é"), ("text/xml", b"<a/>", "<a/>"),  # noqa: E501
     ("text/plain; charset=undefined", b"\xe9", "é"), ("text/csv", b"\xef\xbb\xbfa,b", "a,b"),
     ("application/json", b'\xef\xbb\xbf{"a": 1}', {"a": 1}), ("application/json; charset=latin-1", b'"\xe9"', "é"),
     ("application/json; charset=utf-16", '["é"]'.encode("utf-16"), ["é"]),
     ("application/json; charset=nope", '"é"'.encode(), "é"),
     ("application/json", b'{"a": "\\ud83d!", "b": "\\ud83d\\ude00", "\\udc00": 1}', {"a": "\ufffd!", "b": "😀", "\ufffd": 1})],  # noqa: E501
)  # fmt: skip
def test_bodies_are_read_by_their_content_type(api: Api, media: str, data: bytes, value: Any) -> None:
    api.answers["/b"] = [(200, {"Content-Type": media}, data)]
    assert json.loads(call(api, {"url": api.url + "/b"}).answer.body)["body"] == value


@pytest.mark.parametrize("data", [b"{", b"NaN", b"[" * 100000, b"\xff", b"1" * 5000, b"[" + b"{}," * 500_001 + b"1]"])
def test_invalid_json_is_502(api: Api, data: bytes) -> None:
    api.answers["/b"] = [(200, {"Content-Type": "application/json"}, data)]
    assert call(api, {"url": api.url + "/b"}).answer.code == 502


def test_transport_failures_are_502_timeouts_504_and_on_error_goes_on(api: Api) -> None:
    assert call(api, {"url": api.url + "/drop"}).answer.code == 502
    assert call(api, {"url": "http://127.0.0.1:9/"}).answer.code == 502
    slow = call(api, {"url": api.url + "/hang", "timeout": "50ms"})
    assert slow.error is not None
    assert (slow.answer.code, slow.error["code"]) == (504, "timeout")
    assert call(api, {"url": api.url + "/drop"}, onError={"body": None}).answer.code == 200


def test_a_response_over_the_limit_or_cut_short_is_502(api: Api) -> None:
    api.answers["/b"] = [(200, {"Content-Type": "text/plain"}, b"x" * 5000)]
    assert call(api, {"url": api.url + "/b"}, max_step_response=4096).answer.code == 502
    api.answers["/b"] = [(200, {"Content-Type": "text/plain", "Content-Length": "9999"}, b"x" * 5)]
    assert call(api, {"url": api.url + "/b"}).answer.code == 502


@pytest.mark.parametrize(
    ("method", "code", "on", "calls"),
    [("GET", 503, None, 3), ("GET", 429, None, 3), ("GET", 404, None, 1), ("GET", 501, None, 1), ("PUT", 503, None, 3),
     ("DELETE", 500, None, 3), ("POST", 503, None, 1), ("PATCH", 503, None, 1), ("POST", 503, [503], 3), ("POST", 503, ["5xx"], 3),  # noqa: E501
     ("GET", 404, ["4xx"], 3), ("GET", 404, [404], 3), ("GET", 503, ["4xx"], 1), ("GET", 503, ["transport"], 1)],
)  # fmt: skip
def test_only_what_is_safe_is_repeated_unless_told(api: Api, method: str, code: int, on: Any, calls: int) -> None:
    api.answers["/r"] = [(code, {}, b"")]
    retry = {"attempts": 3, "delay": 0} | ({"on": on} if on else {})
    assert call(api, {"url": api.url + "/r", "method": method}, retry=retry).answer.code == 502
    assert len(api.got) == calls


def test_a_repeated_call_may_succeed(api: Api) -> None:
    api.answers["/r"] = [(503, {}, b""), (200, {}, b"")]
    assert call(api, {"url": api.url + "/r"}, retry={"attempts": 2, "delay": 0}).answer.code == 200


def test_a_post_that_was_redirected_is_not_sent_twice(api: Api) -> None:
    api.answers["/p"] = [(303, {"Location": "/drop"}, b"")]
    spec = {"url": api.url + "/p", "json": {}, "follow": True}
    assert call(api, spec, retry={"attempts": 3, "delay": 0}).answer.code == 502
    assert [method for method, path, *_ in api.got if path == "/p"] == ["POST"]


def test_redirects(api: Api) -> None:
    api.answers["/1"] = [(302, {"Location": "2?x=1"}, b"")]
    assert call(api, {"url": api.url + "/1", "headers": {"Authorization": "t"}}).answer.code == 200
    assert api.got[-1][1] == "/2?x=1"
    assert api.got[-1][2]["authorization"] == "t"
    api.answers["/loop"] = [(302, {"Location": "/loop"}, b"")]
    assert call(api, {"url": api.url + "/loop"}).answer.code == 502
    api.answers["/frag"] = [(302, {"Location": "/2#part"}, b"")]
    assert call(api, {"url": api.url + "/frag"}).answer.code == 200
    for location in (
        "http://169.254.169.254/",
        api.url.replace("127.0.0.1", "localhost"),
        "file:///etc/passwd",
        "//[::1]:1/",
    ):
        api.answers["/away"] = [(302, {"Location": location}, b"")]
        assert call(api, {"url": api.url + "/away"}).answer.code == 502, location


@pytest.mark.parametrize(
    "value", ["a/b", "a?b=c", "a#b", "a&b=c", "a%2Fb", "..%2F", "é", "a b", "\r\nX: y", "@h", ":80"]
)
def test_a_value_in_a_url_cannot_leave_its_place(api: Api, value: str) -> None:
    call(api, {"url": "${env.API}/x/${params.p}/y?k=${params.p}&z=1"}, urlencode({"p": value}))
    coded = quote(value, safe="")
    assert [path for _, path, *_ in api.got] == [f"/x/{coded}/y?k={coded}&z=1"]


@pytest.mark.parametrize("value", ["..", "."])
def test_a_value_cannot_be_a_dot_segment(api: Api, value: str) -> None:
    assert call(api, {"url": "${env.API}/users/${params.p}/private"}, f"p={value}").answer.code >= 400
    assert api.got == [], "a server would take it for another path"


def test_an_object_in_a_url_cannot_add_parameters(api: Api) -> None:
    steps = [{"name": "o", "set": {"a": "1", "admin": "true"}}, {"name": "h", "http": api.url + "/x?filter=${o}"}]
    run_steps(*steps)
    assert [path.count("&") + path.count("=") for _, path, *_ in api.got] in ([1], [])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "127.1", "0x7f.1", "2130706433", "[::1]", "0", "169.254.169.254"]
)
def test_a_host_from_the_request_is_judged(api: Api, host: str) -> None:
    outcome = call(api, {"url": "http://${params.p}:${env.PORT}/x"}, f"p={host}")
    assert outcome.answer.code == 502
    assert api.got == []
    assert call(api, {"url": "http://127.0.0.1:${env.PORT}/x"}).answer.code == 200


AUTHORITIES = [
    "${params.p}", "http://${params.p}/", "http://${params.p}:${env.PORT}/", "${env.SCHEME}://${params.p}:${env.PORT}/",
    "${env.SCHEME}://${params.p}/x", "${'http:'}//${params.p}/x", "${env.BROKEN}/${params.p}/x", "http://${set}/",
    "http://${[env for env in [params.p]][0]}/", "http://${secrets.get('none', params.p)}/", "http://127.0.0.${last}/",
    "http://127.0.0.1:${port}/", "${got.headers.location}", "${request.headers.get('x', 'http://' + set)}/",
]  # fmt: skip


@pytest.mark.parametrize("url", AUTHORITIES)
def test_an_authority_with_data_from_outside_is_judged(api: Api, url: str) -> None:
    api.answers["/first"] = [(200, {"Location": api.url + "/second"}, b"")]
    steps = [
        {"name": "got", "http": api.url + "/first"},
        {"name": "set", "set": "${params.p}"},
        {"name": "port", "set": "${got.headers.location[17:].split('/')[0]}"},
        {"name": "last", "each": {"of": [1], "as": "n", "steps": [{"name": "i", "set": "${n}"}], "result": "${i}"}},
        {"name": "last2", "set": "${last[0]}"},
        {"name": "h", "http": url.replace("${last}", "${last2}")},
    ]
    tree = get_flow("/x", steps=steps, request={"parameters": {"p": {"in": "query"}}})
    env = {"API": api.url, "PORT": api.url.rpartition(":")[2], "SCHEME": "http", "BROKEN": "http:/"}
    outcome = run_tree(tree, "p=" + quote(api.url if url.startswith("${params") else "127.0.0.1"), env=env)
    assert isinstance(outcome, Outcome)
    assert outcome.answer.code == 502
    assert "refused" in outcome.answer.body.decode()
    assert [path for _, path, *_ in api.got] == ["/first"]


def test_the_author_s_own_authority_is_not_judged(api: Api) -> None:
    for url in (
        "${env.API}/${params.p}",
        "http://127.0.0.1:${env.PORT}?${params.p}",
        "${env.S}://127.0.0.1:${env.PORT}/",
    ):
        outcome = call(api, {"url": url}, "p=1", env={"API": api.url, "PORT": api.url.rpartition(":")[2], "S": "http"})
        assert outcome.answer.code == 200, url


@pytest.mark.parametrize(
    "location", ["http://[::1", "//[x]/", "http://a:99999/", "http://u:p@h/", "file:///x", "\\\\h\\x"]
)
def test_a_redirect_to_no_address_is_the_api_s_fault(api: Api, location: str) -> None:
    api.answers["/away"] = [(302, {"Location": location}, b"")]
    assert call(api, {"url": api.url + "/away"}).answer.code == 502


@pytest.mark.parametrize(("status", "method"), [(301, "GET"), (302, "GET"), (303, "GET"), (307, "POST"), (308, "POST")])
def test_a_redirected_post_keeps_its_body_or_becomes_a_get(api: Api, status: int, method: str) -> None:
    api.answers["/p"] = [(status, {"Location": "/q"}, b"")]
    assert call(api, {"url": api.url + "/p", "json": {"a": 1}, "follow": True}).answer.code == 200
    asked, path, headers, body = api.got[-1]
    assert (asked, path) == (method, "/q")
    assert (body, "content-type" in headers) == ((b'{"a":1}', True) if method == "POST" else (b"", False))


@pytest.mark.parametrize("status", [307, 308])
def test_a_body_does_not_go_to_another_server(api: Api, status: int) -> None:
    other = api.url.replace("127.0.0.1", "localhost")
    api.answers["/p"] = [(status, {"Location": other + "/q"}, b"")]
    policy = AddressPolicy("127.0.0.0/8,::1")
    outcome = call(api, {"url": api.url + "/p", "json": {"key": "k"}, "follow": True}, policy=policy)
    assert outcome.answer.code == 502
    assert "must not get the body" in outcome.answer.body.decode()
    assert [path for _, path, *_ in api.got] == ["/p"]
    api.answers["/p"] = [(303, {"Location": other + "/q"}, b"")]  # no body goes along
    spec = {"url": api.url + "/p", "json": {"key": "k"}, "headers": {"Cookie": "c", "X-Api-Key": "k"}, "follow": True}
    assert call(api, spec, policy=policy).answer.code == 200
    assert not {"cookie", "x-api-key", "content-type"} & api.got[-1][2].keys()


def test_redirects_are_counted(api: Api) -> None:
    for number in range(20):
        api.answers[f"/{number}"] = [(302, {"Location": f"/{number + 1}"}, b"")]
    assert call(api, {"url": api.url + "/0"}).answer.code == 502
    assert len(api.got) == 6


def test_an_answer_cannot_cost_time_with_the_square_of_its_size(api: Api) -> None:
    began = time.monotonic()
    api.answers["/link"] = [(200, {"Link": "<" * 60_000, "Content-Type": "application/json"}, b"[]")]
    assert call(api, {"url": api.url + "/link", "pages": {"link": True}}).answer.code == 200
    body = b"ab" * 200_000 + b"-" + b"a9" * 200_000
    for charset in ("punycode", "idna", "raw_unicode_escape", "undefined", "zip"):
        api.answers["/text"] = [(200, {"Content-Type": f"text/plain; charset={charset}"}, body)]
        assert call(api, {"url": api.url + "/text"}).answer.code == 200
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("host", ["u@127.0.0.1", "127.0.0.1#", "127.0.0.1/x?", "a b", "\r\n", "127.0.0.1\\@x"])
def test_a_host_that_is_none_goes_nowhere(api: Api, host: str) -> None:
    assert call(api, {"url": "http://${params.p}:${env.PORT}/x"}, urlencode({"p": host})).answer.code == 502
    assert api.got == []


def test_header_values_of_a_request_cannot_inject(api: Api) -> None:
    outcome = call(api, {"url": api.url + "/x", "headers": {"X-A": "${params.p}"}}, "p=a%0d%0aX-B:%20y")
    assert outcome.answer.code >= 500
    assert api.got == []
    assert "not HTTP" not in outcome.answer.body.decode(), "it is not the API that failed"


# --- the embedding program ---


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("flows")) as found:
        yield found


def test_a_function_is_a_flow(app: Running) -> None:
    @app.app.flow("GET /greet/{name}", processing=["synchronous"])
    def greet_all(context: Any, name: str, times: int = 1, loud: bool = False, note: str | None = None) -> Any:
        """Greets."""
        return [name.upper() if loud else name] * times

    answer = app.client.get("/api/publishing/greet/a%2Fb?times=2&loud=true")
    assert (answer.status_code, answer.json()) == (200, ["A/B", "A/B"])
    assert app.app.run("greet-all", {"name": "x", "times": 2}).json() == ["x", "x"]
    assert app.client.get("/api/publishing/greet/x?times=a").json()["errors"][0]["name"] == "times"
    with pytest.raises(InputError, match='did you mean "times"'):
        app.app.run("greet-all", {"name": "x", "time": 2})


def test_faults_reach_the_client_as_problems(app: Running) -> None:
    app.app.deploy("typed", {"request": {"method": "POST", "resource": "/typed", "body": SCHEMA}})
    answer = app.client.post("/api/publishing/typed", json={"n": True})
    assert (answer.status_code, answer.headers["Content-Type"]) == (400, "application/problem+json")
    assert [error["name"] for error in answer.json()["errors"]] == ["/n", "/name"]
    assert app.client.post("/api/publishing/typed", data="x", headers={"Content-Type": "text/plain"}).status_code == 415


# --- the flows of the checkout ---

FLOWS = sorted(path.name for path in (ROOT / "flows").glob("*.json"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("shop")
    shutil.copytree(ROOT / "flows", folder / "flows")
    with _served(folder) as found:
        yield found


@contextmanager
def _served(folder: Path) -> Iterator[Running]:
    nowhere = {"ASTERA_FLOW_GEOCODING_URL": "http://127.0.0.1:9", "ASTERA_FLOW_WEATHER_URL": "http://127.0.0.1:9"}
    application = AsteraLite(
        flows=str(folder / "flows"), database=str(folder / "jobs.db"), environ=nowhere, shutdown_timeout=5
    )
    with application, Server(application, port=0) as server:
        client = Client(server)
        yield Running(application, server, client)
        client.session.close()


def test_every_flow_of_the_checkout_deploys(shop: Running) -> None:
    assert shop.app.deployments.faults == []
    assert sorted(f"{name}.json" for name in shop.app.deployments.by_name) == FLOWS


def test_hello(shop: Running) -> None:
    assert shop.client.get("/api/publishing/hello").json() == {"greeting": "Hello, world!"}
    assert shop.client.get("/api/publishing/hello?name=Ada").json() == {"greeting": "Hello, Ada!"}
    assert shop.client.get("/api/publishing/hello?name=" + "x" * 81).status_code == 400


def test_slow(shop: Running) -> None:
    assert shop.client.get("/api/publishing/slow").status_code == 404
    document = shop.client.finished(shop.client.get("/api/publishingAsync/slow?seconds=0.3"))
    assert document["status"] == "Completed"
    assert shop.client.get(document["resultUrl"]).json()["waited"] == 0.3


def test_order(shop: Running) -> None:
    def order(sku: str, quantity: Any, query: str = "") -> Any:
        items = [{"sku": sku, "quantity": quantity}]
        return shop.client.post(f"/api/publishing/orders{query}", json={"customer": "Ada", "items": items})

    placed = order("apple", 3)
    assert (placed.status_code, placed.json()["total"], placed.headers["X-Order-Total"]) == (201, 1.5, "1.5")
    assert order("pear", 2, "?dryRun=true").json() == {"customer": "Ada", "wouldCost": 1.5}
    short = order("plum", 1)
    assert (short.status_code, short.json()["detail"]) == (409, "not enough in stock: plum")
    assert [error["name"] for error in order("kiwi", 0).json()["errors"]] == ["/items/0/sku", "/items/0/quantity"]


def test_weather_without_the_outside_is_502(shop: Running) -> None:
    assert shop.client.get("/api/publishing/weather/Berlin").status_code == 502


def test_weather_against_the_stand_in() -> None:
    command = [sys.executable, str(ROOT / "examples" / "slow_api.py"), "--port", "0", "--delay", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        try:
            assert started.stdout is not None
            line = started.stdout.readline()
            url = next(word for word in line.split() if word.startswith("http://")).rstrip("/")
            env = {"ASTERA_FLOW_GEOCODING_URL": url, "ASTERA_FLOW_WEATHER_URL": url}
            flow: Flow = build_flow(json.loads((ROOT / "flows" / "weather.json").read_text("utf-8")), "weather")

            def weather(city: str, query: str = "") -> Any:
                path = f"/weather/{city}"
                bound = flow.bind(StoredRequest("GET", path, query))
                outside = surroundings(env=env)
                outcome = run_flow(Run(flow, bound, outside, outside.clock.monotonic() + 20))
                assert isinstance(outcome, Outcome)
                return outcome.answer.code, json.loads(outcome.answer.body)

            code, found = weather("Berlin", "days=5&warm=-90")
            assert (code, found["city"], found["country"], found["of"]) == (200, "Berlin", "Germany", 5)
            assert len(found["warmDays"]) == 5
            assert weather("Berlin", "warm=90")[1]["warmDays"] == []
            assert weather("S%C3%A3o%20Paulo")[1]["country"] == "Brazil"
            assert weather("Nowhere") == (404, {"error": "no place is called Nowhere"})
        finally:
            started.kill()
            started.wait(5)
