"""Flow files as newcomers break them: each message says where, what is wrong, and what to write instead."""

# ruff: noqa: E501 (a row of the table is as long as its message)

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from astera_lite import (
    AsteraLite,
    Build,
    Deployments,
    FlowError,
    Template,
    build_flow,
    load_connections,
    parse_flow_text,
    to_json,
)
from astera_lite_documents import openapi_document, postman_document
from astera_lite_steps import run_test

KINDS = "http, python, sql, run, set, each, choose, call, wait, respond, fail"
OPTIONS = "name, when, timeout, retry, onError, description"

#: Ending of the file's name, its text, and the faults that `check` shows.
BROKEN: list[tuple[str, str, list[str]]] = [
    ('json', '{"request": {"method": "GET" "resource": "/x"}}', ["line 1, column 30: is not JSON: Expecting ',' delimiter: a comma or a closing bracket is missing before this place"]),
    ('json', '{"request": {"method": "GET", "resource": "/x",}}', ['…: there is a comma after the last item']),
    ('json', "{'request': 1}", ['line 1, column 2: is not JSON: Expecting property name enclosed in double quotes: JSON has "double" quotes']),
    ('json', '{\n// note\n"request": {}}', ['line 2, column 1: is not JSON: Expecting property name enclosed in double quotes: JSON has no comments; use a description, or write the flow as TOML']),
    ('json', '{"request": {"method": "GET", // note\n"resource": "/x"}}', ['…: JSON has no comments; use a description, or write the flow as TOML']),
    ('json', '{"request": {"method": "GET", /* note */ "resource": "/x"}}', ['…: JSON has no comments; use a description, or write the flow as TOML']),
    ('json', '{"request": {"method": "GET" # note\n, "resource": "/x"}}', ['…: JSON has no comments; use a description, or write the flow as TOML']),
    ('json', '{"request": {"method" "GET"}}', ["line 1, column 23: is not JSON: Expecting ':' delimiter: a colon is missing before this place"]),
    ('json', '{"request": {"method" = "GET"}}', ["…: a colon is missing before this place"]),
    ('json', '{"request": {"method": "GET", \'resource\': "/x"}}', ['…: JSON has "double" quotes']),
    ('json', '{"request": {"method": "GET", resource: "/x"}}', ['…: names and texts stand in "double" quotes']),
    ('json', '{"request": {method": "GET"}}', ['…: names and texts stand in "double" quotes']),
    ('json', '{"request": {"method": GET}}', ['…: names and texts stand in "double" quotes']),
    ('json', '{"request": {"method": "GET,\n"resource": "/x"}}', ['line 1, column 29: is not JSON: Invalid control character at: a quote is missing on this line (a line break in a text is written \\n)']),
    ('json', '{"request": {"method: "GET"}}', ['…: a quote is missing before this place, or one inside a text is not written \\"']),
    ('json', '{"steps": [{"name": "a", "set": "${params["p"]}"}]}', ['…: a quote is missing before this place, or one inside a text is not written \\"']),
    ('json', '{"request": {"method": "GET"}, "steps": [1,]}', ['…: there is a comma after the last item']),
    ('json', '{"request": {"strict": True}}', ['…: JSON writes true, false and null']),
    ('json', '{"request": {"method": "GET"}}}', ['…: there is a bracket too many']),
    ('json', '{"request": "x}', ['…: the text that begins here has no closing quote']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "request": {}}', ['line 1, column 50: the member "request" occurs twice']),
    ('json', '{"steps": [{"name": "a", "timeout": 1}, {\n"name": "b", "timeout": 1,\n  "timeout": 2}], "request": {', ['line 3, column 3: the member "timeout" occurs twice']),
    ('json', '', ['line 1, column 1: is not JSON: Expecting value: the file is empty; `new NAME` writes a first flow']),
    ('json', '[1]', ['must be an object with description, request, steps, response, timeout, restart, concurrency, tests, not a list']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}', ["line 1, column 48: is not JSON: Expecting ',' delimiter: the file ends too early, a } or ] or a quote is missing"]),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "htpp": {"url": "http://x/"}}]}', [f'/steps/0/htpp: is not known here (known: {OPTIONS}, {KINDS}); did you mean "http"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": 1, "wait": 1}]}', [f'/steps/0: needs exactly one of {KINDS}, not set and wait']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a"}]}', [f'/steps/0: needs exactly one of {KINDS}']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"set": 1}]}', ['/steps/0: needs a member "name": a name that expressions can use']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${b}"}, {"name": "b", "set": 1}]}', ['/steps/0/set: ${b}: step "b" comes later: move it up']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${param.p}"}]}', ['/steps/0/set: ${param.p}: there is nothing named "param"; did you mean "params"?']),
    ('json', '{"request": {"method": "POST", "resource": "/x/{city}", "parameters": {"min": {"in": "query"}}, "body": {"properties": {"rows": {}, "city": {}}}}, "steps": [{"name": "a", "set": "${city}"}]}', ['/steps/0/set: ${city}: there is nothing named "city"; did you mean "params.city" or "request.body.city"?']),
    ('json', '{"request": {"method": "POST", "resource": "/x/{city}", "parameters": {"min": {"in": "query"}}, "body": {"properties": {"rows": {}, "city": {}}}}, "steps": [{"name": "a", "set": "${rows[0].name}"}]}', ['/steps/0/set: ${rows[0].name}: there is nothing named "rows"; did you mean "request.body.rows"?']),
    ('json', '{"request": {"method": "POST", "resource": "/x/{city}", "parameters": {"min": {"in": "query"}}, "body": {"properties": {"rows": {}, "city": {}}}}, "steps": [{"name": "a", "set": "${body.rows}"}]}', ['/steps/0/set: ${body.rows}: there is nothing named "body"; did you mean "request.body"?']),
    ('json', '{"request": {"method": "POST", "resource": "/x/{city}", "parameters": {"min": {"in": "query"}}, "body": {"properties": {"rows": {}, "city": {}}}}, "steps": [{"name": "a", "set": "${API_KEY}"}]}', ['/steps/0/set: ${API_KEY}: there is nothing named "API_KEY"; did you mean "env.API_KEY" or "secrets.API_KEY"?']),
    ('json', '{"request": {"method": "POST", "resource": "/x/{city}", "parameters": {"min": {"in": "query"}}, "body": {"properties": {"rows": {}, "city": {}}}}, "steps": [{"name": "a", "set": "${steps.a.body}"}]}', ['/steps/0/set: ${steps.a.body}: there is nothing named "steps": write the name of the step without "steps."']),
    ('json', '{"request": {"method": "POST", "resource": "/x/{city}", "parameters": {"min": {"in": "query"}}, "body": {"properties": {"rows": {}, "city": {}}}}, "steps": [{"name": "a", "set": "${[min, params.min]}"}]}', ['/steps/0/set: ${[min, params.min]}: min is a function: write min(…); did you mean "params.min"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "steps": [{"name": "got", "http": "http://x/"}, {"name": "b", "set": "${got.statuscode}"}]}', ['/steps/1/set: ${got.statuscode}: there is no "got.statuscode"; did you mean "status"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "steps": [{"name": "got", "call": "f"}, {"name": "b", "set": "${got.statuscode}"}]}', ['/steps/1/set: ${got.statuscode}: there is no "got.statuscode"; did you mean "status"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "steps": [{"name": "got", "http": "http://x/"}, {"name": "b", "set": "${status}"}]}', ['/steps/1/set: ${status}: there is nothing named "status"; did you mean "got.status"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.q}"}]}', ['/steps/0/set: ${params.q}: there is no "params.q" (known: p)']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${lenght(params.p)}"}]}', ['/steps/0/set: ${lenght(params.p)}: there is no function lenght(); did you mean "len"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p"}]}', ['/steps/0/set: the ${ is never closed by a } (a literal ${ is written $${)']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p && params.p}"}]}', ['/steps/0/set: ${params.p && params.p}: there is no &&: write `and`']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p || 1}"}]}', ['/steps/0/set: ${params.p || 1}: there is no ||: write `or`']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${!params.p}"}]}', ['/steps/0/set: ${!params.p}: there is no !: write `not`']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p === 1}"}]}', ['/steps/0/set: ${params.p === 1}: there is no === or !==: write == or !=']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p ? 1 : 2}"}]}', ['/steps/0/set: ${params.p ? 1 : 2}: there is no ? : here: write `a if condition else b`']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p = 1}"}]}', ['/steps/0/set: ${params.p = 1}: = does not compare: write ==']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${round(params.p, digits=1) +}"}]}', ['/steps/0/set: ${round(params.p, digits=1) +}: invalid syntax']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${params.p.append(1)}"}]}', ['/steps/0/set: ${params.p.append(1)}: there is no method .append(): write list + [x]: nothing changes a value in place']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${f\'{params.p}\'}"}]}', ["/steps/0/set: ${f'{params.p}'}: there are no f-strings: write ${…} inside the text"]),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "when": "params.p", "set": 1}]}', ['/steps/0/when: "params.p" is text, which is always true: write ${…} around the condition']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${`x`}"}]}', ['/steps/0/set: ${`x`}: there is no `…`: text stands in quotes']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": "${[x for x in params.p}"}]}', ['/steps/0/set: the ${ is never closed by a } (a literal ${ is written $${)']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "steps": [{"name": "' + "a" * 70 + '", "set": 1}]}', [f'/steps/0/name: "{"a" * 59}… has 70 characters: at most 64']),
    ('json', '{"request": {"method": "POST", "resource": "/x", "body": {"contentTypes": ["text"]}}}', ["/request/body/contentTypes: is not known here (known: type, items, properties, required, additionalProperties, default, enum, pattern, minimum, maximum, minLength, maxLength, minItems, maxItems, description, example): it belongs to request, beside body: /request/contentTypes"]),
    ('json', '{"request": {"method": "GET", "resource": "/x/{id}"}, "response": {"body": ["a {{ params.id }}", "{$${params.id}", "{{ other.id }}", "${ {params.id: 1} }"]}}', ["/response/body/0: {{ params.… stays as it is: write ${params.…}, or ${'{'} for the mark itself"]),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "my-step", "set": 1}]}', ['/steps/0/name: "my-step" must be a word of letters, digits and _ that expressions can use']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "http": "example.com/api"}]}', ['/steps/0/http/url: "example.com/api" must begin with http:// or https://']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "http": {"url": "http://x/", "method": "get"}}]}', ['/steps/0/http/method: "get" is not one of GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS; did you mean "GET"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "http": {"url": "http://x/", "headers": {"Content-Length": "1"}}}]}', ['/steps/0/http/headers/Content-Length: follows from the body: leave it out']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "steps": [{"name": "a", "http": {"url": "http://x/", "headers": {"X-A": 1, "x-a": 2, "b c": 3}}}]}', ['/steps/0/http/headers/x-a: is the same header as X-A: leave one of them out', '/steps/0/http/headers/b c: is not the name of a header']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "set": 1, "timeout": "5 sec"}]}', ['/steps/0/timeout: "5 sec" is not a duration: write 250ms, 30s, 5m, 24h or a number of seconds, at most 300 years']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": {"a": {"set": 1}}}', ['/steps: must be a list, not an object']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "wait": "tomorrow"}]}', ['/steps/0/wait: "tomorrow" is not a duration: write 250ms, 30s, 5m, 24h or a number of seconds, at most 300 years']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query"}}}, "steps": [{"name": "a", "python": "nomodule:f"}]}', ['/steps/0/python/call: there is no module "nomodule": put nomodule.py into the flows folder, or install it']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"type": "integer", "in": "query", "default": "3"}}}}', ['/request/parameters/p/default: must be an integer such as 3 or -12, within 64 bits, not "3"']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"type": "integer"}}}}', ['/request/parameters/p: needs a member "in": one of path, query, header']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query", "type": "int"}}}}', ['/request/parameters/p/type: "int" is not one of string, integer, number, boolean, date, date-time, array; did you mean "integer"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query", "pattern": "["}}}}', ['/request/parameters/p/pattern: is not a regular expression: unterminated character set at position 0']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query", "type": "integer", "minimum": "1"}}}}', ['/request/parameters/p/minimum: must be a number such as 2.5 or -1e3, within 64 bits, not "1"']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "query", "type": "integer", "maximum": 5, "default": 9}}}}', ['/request/parameters/p/default: must be at most 5, not 9']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"p": {"in": "url"}}}}', ['/request/parameters/p/in: "url" is not one of path, query, header']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": [{"name": "p"}]}}', ['/request/parameters: must be an object, not a list']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "processing": "async"}}', ['/request/processing: "async" is not one of synchronous, asynchronous']),
    ('json', '{"request": {"method": "GET", "resource": "x"}}', ['/request/resource: "x" must begin with / and name something, such as /weather/{city}']),
    ('json', '{"request": {"method": "GET", "resource": "/x/{city}", "parameters": {"city": {"in": "query"}}}}', ['/request/parameters/city: stands in the resource as {city}: write "in": "path"']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"city": {"in": "path"}}}}', ['/request/parameters/city: is in "path", but the resource has no {city}']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "body": {"type": "object"}}}', ['/request/body: a GET request has no body: use parameters, or another method']),
    ('json', '{"request": {"method": "GET", "resource": "/x/{id"}}', ['/request/resource: "{id" is neither a plain path segment nor a {parameter}: a parameter is a whole segment in braces, such as /x/{id}']),
    ('json', '{"request": {"method": "GET", "resource": "/x?y=1"}}', ['/request/resource: "x?y=1" is neither a plain path segment nor a {parameter}: query parameters stand under parameters, not in the path']),
    ('json', '{"request": {"method": "GET", "resource": "/x/"}}', ['/request/resource: has an empty segment: write it without // and without a / at the end']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "respose": {}}', ['/respose: is not known here (known: description, request, steps, response, timeout, restart, concurrency, tests); did you mean "response"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "response": {"status": "200"}}', ['/response/status: "200" is not a status from 200 to 599: write it without quotes']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "response": {"headers": {"Content-Length": "5"}}}', ['/response/headers/Content-Length: is set by the server: leave it out']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "response": [{"body": 1}, {"body": 2}]}', ['/response/0: has no `when`, so nothing after it is ever reached: put it last']),
    ('json', '{"steps": []}', ['needs a member "request": an object']),
    ('json', '{"request": {"method": "get", "resource": "/x"}}', ['/request/method: "get" is not one of GET, POST, PUT, PATCH, DELETE; did you mean "GET"?']),
    ('json', '{"request": {"method": "GET", "resource": "/x"}, "response": "${x}"}', ['/response: must be an object with when, page, filter, sort, status, headers, body, not text']),
    ('json', '{"request": {"method": "GET", "resource": "/x", "parameters": {"callbackUrl": {"in": "query"}}}}', ['/request/parameters/callbackUrl: is a parameter of every asynchronous request and does not reach the flow: rename it']),
    ('toml', '[request]\nmethod = GET\n', ['line 2, column 10: is not TOML: Invalid value: text stands in quotes there']),
    ('toml', "[request]\nmethod = 'GET'\nresource = '/x'\n[steps]\nname='a'\nset=1\n", ['/steps: must be a list, not an object']),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "faults"), BROKEN)
def test_a_broken_file_is_told_where_what_and_how(kind: str, text: str, faults: list[str]) -> None:
    with pytest.raises(FlowError) as caught:
        build_flow(parse_flow_text(text, f"f.{kind}"), "f")
    found = [": ".join(part for part in fault[1:] if part) for fault in caught.value.faults]
    if faults[0].startswith("…"):  # the rest is the library's, and differs between its versions
        found[0] = "…: " + found[0].rpartition(": ")[2]
    assert found == faults


@pytest.mark.parametrize(
    ("step", "member"),
    [
        ({"http": "http://x/"}, "status + got.headers.x + got.body.y"),
        ({"http": {"url": "http://x/", "pages": {"link": True}}}, "items + [got.pages, got.more]"),
        ({"http": "http://x/", "onError": {"mine": 1}}, "mine"),
        ({"http": "http://x/", "onError": "continue"}, "mine"),
        ({"call": "g"}, "body[0].mine"),
        ({"set": {"mine": 1}}, "mine"),
        ({"http": "http://x/"}, "get('mine')"),
    ],
)
def test_what_the_value_of_a_step_may_have_is_not_refused(step: dict[str, Any], member: str) -> None:
    steps = [{"name": "got", **step}, {"name": "b", "set": f"${{got.{member}}}"}]
    build_flow({"request": {"method": "GET", "resource": "/x"}, "steps": steps}, "f")


def test_odd_files_in_the_folder(tmp_path: Path) -> None:
    flow = '{"request": {"method": "GET", "resource": "/x"}}'
    (tmp_path / "my flow.json").write_text(flow)
    (tmp_path / "wide.json").write_bytes(flow.encode("utf-16"))
    (tmp_path / "one.json").write_text(flow)
    (tmp_path / "two.json").write_text(flow)
    for name in ("notes.md", "one.json.bak", "one.json~", ".#one.json", "code.py", ".one.toml"):
        (tmp_path / name).write_text("not a flow")
    for name in ("a.yaml", "b.JSON", "c.jsonc", "d.json.txt", "below/one.json", "package/data.json", "package/f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(flow)
    for name in (".#a.json", "gone.json", "connections.json"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    app = AsteraLite(flows=str(tmp_path))
    unread = "is not read: write it as JSON or TOML, in a file that ends in .json or .toml, not"
    assert [str(fault) for fault in app.deployer.reload()] == [
        "connections.json: is a link to a file that does not exist",
        f"a.yaml: {unread} .yaml",
        f"b.JSON: {unread} .JSON",
        "below: flows in a folder inside are not read: move them one up",
        f"c.jsonc: {unread} .jsonc",
        f"d.json.txt: {unread} .json.txt",
        "gone.json: is a link to a file that does not exist",
        'my flow.json: the name "my flow" must consist of letters, digits, - and _',
        "wide.json: is not UTF-8 (byte 0): save it with that encoding",
        'two.json: /request/resource: GET /x is claimed by "one" (one.json) too: change one',
    ]
    assert sorted(app.deployments.by_name) == ["one"]


def test_a_field_of_text_is_explained_when_it_is_read() -> None:
    app = AsteraLite()
    app.deploy(
        "f", {"request": {"method": "GET", "resource": "/f"}, "steps": [{"name": "a", "set": "${'abc'.length}"}]}
    )
    flow = app.deployments.by_name["f"]
    with pytest.raises(Exception, match=r"has no members: len\(…\) is the length"):
        flow.steps[0].run(None, {}, "")  # type: ignore[arg-type]


ODD: list[Any] = [
    None, True, False, 0, -1, 10**30, 1.5, float("1e308"), "", " ", "${", "${x}", "${1/0}", "x" * 5000, "\0", "a/b", "ä",
    [], [[]], [None], {}, {"": None}, {"name": "x", "set": 1}, [{"name": "x", "set": 1}], {"when": []}, "GET", "/x",
]  # fmt: skip


def _mutate(value: Any, random_: random.Random) -> Any:
    """The value with one node of it changed, removed or doubled."""
    if not isinstance(value, dict | list) or not value or random_.random() < 0.15:
        return random_.choice(ODD)
    if isinstance(value, list):
        at = random_.randrange(len(value))
        changed = list(value)
        how = random_.random()
        if how < 0.15:
            del changed[at]
        elif how < 0.3:
            changed.insert(at, changed[at])
        else:
            changed[at] = _mutate(changed[at], random_)
        return changed
    name = random_.choice(list(value))
    changed_object = dict(value)
    how = random_.random()
    if how < 0.1:
        del changed_object[name]
    elif how < 0.2:
        changed_object[random_.choice(["", "x", "name", "when", "steps", "http", name + "s"])] = changed_object.pop(
            name
        )
    else:
        changed_object[name] = _mutate(value[name], random_)
    return changed_object


TREES = [
    json.loads(path.read_text())
    for folder in ("flows", "examples/flows")
    for path in sorted((ROOT / folder).glob("*.json"))
    if path.name != "connections.json"
]


#: What stands for each node of each shipped flow, one at a time.
INSTEAD: list[Any] = [None, True, 0, -1, float("inf"), "", "x", [], [[]], {}, {"a": {}}]
SHIPPED = [
    path
    for folder in ("flows", "examples/flows")
    for path in sorted((ROOT / folder).iterdir())
    if path.suffix in (".json", ".toml")
]


def _nodes(tree: Any, *way: Any) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Every node below the root: what holds it, its name or number there, and the way to it."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key, (*way, key)
        if isinstance(value, dict | list):
            yield from _nodes(value, *way, key)


def remembering(file: dict[str, Any]) -> Callable[..., Template]:
    """`Build.template` for many flows that differ in one node: what compiled without faults is not compiled again."""
    known: dict[str, Template] = {}
    whole = file["tree"]
    compiled = Build.template

    def compile_once(build: Build, value: Any, place: str) -> Template:
        request, before = whole.get("request"), len(build.faults)
        key = repr((value, build.names, place, request.get("body") if isinstance(request, dict) else None))
        template = known.get(key) or compiled(build, value, place)
        if len(build.faults) == before:
            known[key] = template
        build.schema, build.volatile = template.schema, build.volatile or template.volatile
        return template

    return compile_once


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_with_any_node_replaced_a_shipped_file_is_well_or_has_faults(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = AsteraLite(flows=str(path.parent))
    assert not app.deployer.reload()
    file = {"tree": parse_flow_text(path.read_text(), path.name)}
    monkeypatch.setattr(Build, "template", remembering(file))
    for parent, key, way in _nodes(file):
        original = parent[key]
        for parent[key] in INSTEAD:
            if path.name == "connections.json":
                (tmp_path / path.name).write_text(json.dumps(file["tree"]))
                load_connections(tmp_path, {})
                continue
            try:
                flow = app.deployer.build(file["tree"], path.stem)
            except FlowError:
                continue
            if not {"steps", "tests"} & set(way):  # what else is made of a flow can be made of any
                deployments = Deployments([flow])
                to_json([make(deployments, "http://x", True) for make in (openapi_document, postman_document)])
            for test in flow.tests if "tests" in way else ():
                run_test(flow, test, app.outside)
        parent[key] = original


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_file_holds_it_is_a_flow_or_has_faults(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(250):
        tree = random_.choice(TREES)
        for _ in range(random_.randint(1, 4)):
            tree = _mutate(tree, random_)
        if not isinstance(tree, dict):
            continue
        try:
            build_flow(tree, "f")
        except FlowError as error:
            assert all(fault.message and (fault.place.startswith("/") or not fault.place) for fault in error.faults)
