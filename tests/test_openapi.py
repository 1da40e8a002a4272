"""The OpenAPI document: that it is valid, and that the server does what it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from support import EVERYTHING, NPM, PROGRAM, ROOT, Client, Running, Sink, get_flow, process, running

import astera_lite
from astera_lite import Deployments, build_flow
from astera_lite_admin import DEFAULT_LIST, MAX_LIST
from astera_lite_documents import openapi_document
from astera_lite_requests import Pattern

METHODS = {"get", "put", "post", "delete", "patch"}


def document(*flows: tuple[str, dict[str, Any]], secured: bool = False) -> dict[str, Any]:
    deployments = Deployments([build_flow(tree, name) for name, tree in flows])
    assert deployments.faults == []
    return openapi_document(deployments, "http://127.0.0.1:9261", secured)


def operations(tree: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in tree["paths"].items():
        for method, operation in methods.items():
            assert method in METHODS
            yield path, method, operation


def resolved(tree: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in part:
        found: Any = tree
        for name in part["$ref"].split("/")[1:]:
            found = found[name]
        part = found
    return part


WHOLE = document(*EVERYTHING.items())


@pytest.mark.parametrize("secured", [False, True])
def test_the_document_is_valid(secured: bool) -> None:
    OpenAPIV31SpecValidator(document(*EVERYTHING.items(), secured=secured)).validate()
    OpenAPIV31SpecValidator(document(secured=secured)).validate()


def test_the_flows_of_the_repository_have_a_valid_document() -> None:
    for folder in ("flows", "examples/flows"):
        command = [*PROGRAM, "openapi", "--flows", str(ROOT / folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        OpenAPIV31SpecValidator(json.loads(done.stdout)).validate()


def test_the_command_says_what_is_not_in_the_document(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(get_flow("/good", response={"body": 1})))
    (tmp_path / "bad.json").write_text('{"request": {"method": "GTE", "resource": "/bad"}}')
    command = [*PROGRAM, "openapi", "--flows", str(tmp_path)]
    done = subprocess.run([*command, "--port", "80"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "GTE" in done.stderr
    tree = json.loads(done.stdout)
    assert tree["servers"] == [{"url": "http://127.0.0.1:80"}]
    assert "/api/publishing/good" in tree["paths"] and "/api/publishing/bad" not in tree["paths"]


def test_every_route_is_in_the_document() -> None:
    routes = [route for route in astera_lite.ROUTES if not route.path.endswith("/*") and route.path != "/"]
    missing = [
        f"{route.method} {route.path}"
        for route in routes
        if route.method.lower() not in WHOLE["paths"].get(route.path, {})
    ]
    assert missing == [], "describe these routes in openapi.json, under `paths`"
    for name, tree in EVERYTHING.items():
        request = tree["request"]
        for mode in request["processing"]:
            path = astera_lite.PREFIXES[mode] + request["resource"].replace("{id}", "{number}")
            assert WHOLE["paths"][path][request["method"].lower()]["tags"] == [name]


def test_names_are_unique_and_everything_is_described() -> None:
    ids = [operation["operationId"] for _, _, operation in operations(WHOLE)]
    assert len(ids) == len(set(ids))
    tags = [tag["name"] for tag in WHOLE["tags"]]
    assert len(tags) == len(set(tags))
    for path, method, operation in operations(WHOLE):
        assert operation["summary"] and operation["description"], (path, method)
        assert set(operation["tags"]) <= set(tags)
        for item in operation.get("parameters", []):
            assert resolved(WHOLE, item)["description"]
        for response in operation["responses"].values():
            assert resolved(WHOLE, response)["description"]
            assert "X-Request-Id" in resolved(WHOLE, response)["headers"]


def test_nothing_shared_is_unused_and_nothing_used_is_missing() -> None:
    text = json.dumps(WHOLE)
    for kind, parts in WHOLE["components"].items():
        for name in parts:
            assert f'"#/components/{kind}/{name}"' in text
    assert not (set(WHOLE["components"]) - {"schemas", "responses", "parameters", "headers"})


def test_a_token_is_declared_only_where_one_is_wanted() -> None:
    secured = document(*EVERYTHING.items(), secured=True)
    assert secured["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert secured["security"] == [{"token": []}]
    assert WHOLE["security"] == [] and "securitySchemes" not in WHOLE["components"]
    for path, _, operation in operations(secured):
        assert ("401" in operation["responses"]) == (path != "/health"), path
        assert "403" in operation["responses"]
    assert secured["paths"]["/health"]["get"]["security"] == []
    assert all("401" not in operation["responses"] for _, _, operation in operations(WHOLE))


def test_asynchronous_operations_declare_what_a_job_needs() -> None:
    operation = WHOLE["paths"]["/api/publishingAsync/once"]["get"]
    assert list(operation["callbacks"]["finished"]) == ["{$request.query.callbackUrl}"]
    names = {resolved(WHOLE, item)["name"] for item in operation["parameters"]}
    assert names == {"callbackUrl", "Prefer", "Idempotency-Key"}
    accepted = resolved(WHOLE, operation["responses"]["202"])
    assert accepted["headers"].keys() >= {"Location", "Retry-After", "Job-Status", "Preference-Applied"}
    body = {"type": "array", "minItems": 2, "maxItems": 2, "items": {}}
    assert operation["responses"]["201"]["content"] == {"application/json": {"schema": body}}


def test_a_synchronous_operation_is_synchronous() -> None:
    both = WHOLE["paths"]["/api/publishing/rows"]["get"]
    assert "202" not in both["responses"] and "422" not in both["responses"]
    assert {item["name"] for item in both["parameters"]} == {"cursor", "state", "sort_by"}
    assert "`Prefer: respond-async` (RFC 7240) makes the request a job, as `rows.submit` does." in both["description"]
    # A form for people sends what an example says.
    shared = [item for item in WHOLE["components"]["parameters"].values() if item["in"] == "header"]
    assert shared and not [item for item in shared if {"example", "examples"} & (item.keys() | item["schema"].keys())]


def test_a_result_is_what_flows_answer() -> None:
    flows = {
        "page": get_flow("/page", response={"headers": {"Content-Type": "text/html"}, "body": "<p>"}),
        "lost": get_flow("/lost", response={"status": 404, "headers": {"Content-Type": "text/csv"}, "body": "a,b"}),
        "made": get_flow("/made", response={"status": "${200}", "headers": {"Content-Type": "image/png"}, "body": "x"}),
    }

    def result_of(*names: str) -> dict[str, dict[str, Any]]:
        tree = document(*((name, flows[name]) for name in names))
        responses = tree["paths"]["/api/jobs/{id}/result"]["get"]["responses"]
        return {code: resolved(tree, answer)["content"] for code, answer in responses.items()}

    plain, media = result_of(), {"schema": {}}
    assert plain["2XX"] == {"application/json": media}
    problem, unknown = ({"$ref": f"#/components/schemas/{name}"} for name in ("Problem", "UnknownJobProblem"))
    assert plain["default"] == {"application/json": media, "application/problem+json": {"schema": problem}}
    assert result_of("page") == plain | {"2XX": {"application/json": media, "text/html": media}}
    either = {"schema": {"anyOf": [unknown, problem]}}
    assert result_of("lost") == plain | {"404": {"application/problem+json": either, "text/csv": media}}
    assert all("image/png" in content for content in result_of("made").values())


def test_what_a_flow_may_answer_is_told_as_far_as_it_is_known() -> None:
    computed = get_flow(
        "/x",
        request={"parameters": {"code": {"in": "query", "type": "integer"}}},
        response=[
            {"when": "${params.code}", "status": "${params.code}", "body": "${params}"},
            {"status": 418, "headers": {"Content-Type": "text/html", "X-Tea": "yes"}, "body": "<p>${1}"},
        ],
    )
    responses = document(("x", computed))["paths"]["/api/publishing/x"]["get"]["responses"]
    assert responses["default"]["content"] == {"application/json": {"schema": {}}}
    assert responses["418"]["content"] == {"text/html": {"schema": {}}}
    assert responses["418"]["headers"]["X-Tea"] == {"schema": {"type": "string"}, "required": True}
    responses = WHOLE["paths"]["/api/publishing/responding"]["get"]["responses"]
    assert "The flow fails: there is no value" in responses["409"]["description"]
    assert "203" in responses


def test_paths_that_differ_in_the_names_of_parameters_are_one() -> None:
    path = WHOLE["paths"]["/api/publishing/people/{number}"]
    assert set(path) == {"get", "put"}
    assert [item["name"] for item in path["get"]["parameters"] if item.get("in") == "path"] == ["number"]


@pytest.mark.parametrize(
    ("spec", "schema"),
    [
        ({"additionalProperties": {}}, {"additionalProperties": {}}),
        ({"additionalProperties": False}, {"additionalProperties": False}),
        ({"minItems": 2, "maxLength": 3}, {"minLength": 2, "minItems": 2, "maxLength": 3, "maxItems": 3}),
        ({"type": "array", "minLength": 1, "minItems": 2}, {"type": "array", "minItems": 2}),
        ({"type": "string", "maxLength": 1, "maxItems": 2}, {"type": "string", "maxLength": 1}),
    ],
)
def test_the_document_refuses_and_allows_what_the_server_does(spec: dict[str, Any], schema: dict[str, Any]) -> None:
    tree = get_flow("/x", request={"method": "POST", "body": spec})
    operation = document(("x", tree))["paths"]["/api/publishing/x"]["post"]
    assert operation["requestBody"]["content"]["application/json"]["schema"] == schema


@pytest.mark.parametrize(
    "text", ["^[a-z]+$", r"^\d{2,3}(?:-[A-Z])?$", r"a\.b|c", "[^,]*", r"\u00e9+?", "a{2}", r"[\w-]x", "[!&|~/]"]
)
def test_a_pattern_of_json_schema_is_told_as_it_was_written(text: str) -> None:
    tree = get_flow("/x", request={"parameters": {"a": {"in": "query", "pattern": text}}})
    [parameter] = [
        item
        for item in document(("x", tree))["paths"]["/api/publishing/x"]["get"]["parameters"]
        if item.get("name") == "a"
    ]
    assert parameter["schema"]["pattern"] == text


@pytest.mark.parametrize(
    "text",
    [
        r"\Aa",
        r"a\Z",
        "(?i)a",
        "(?P<x>a)",
        "a++",
        "a*+",
        "(?>a)",
        "[]a]",
        "[[:alpha:]]",
        "a{,3}",
        "[a||b]",
        "(?<=a)b",
        "{",
    ],
)
def test_a_pattern_of_python_alone_is_a_fault(text: str) -> None:
    with pytest.raises((ValueError, re.error)):
        Pattern(text)


def test_a_pattern_means_what_json_schema_says() -> None:
    end = Pattern(r"^\d+$")
    assert end.search("12") and not end.search("12\n") and not end.search("١٢")
    assert Pattern(r"^\s.\S$").search("\u00a0ab")
    assert not Pattern("^.$").search("\u2028")
    backslash = Pattern(r"^[\\s]$")
    assert backslash.search("s") and backslash.search("\\") and not backslash.search(" ")
    edge = Pattern(r"\bab\B")
    assert edge.search("x abc") and not edge.search("xabc") and not edge.search("ab c")


def called(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


PYTHON_CALLER = """
import sys
from uuid import UUID

from made.api.hello import hello_run, hello_submit
from made.api.jobs_api import get_job_result, get_job_status
from made.api.order import order_run
from made.client import Client
from made.models.hello_run_response_200 import HelloRunResponse200
from made.models.order_run_body import OrderRunBody
from made.models.order_run_body_items_item import OrderRunBodyItemsItem
from made.models.order_run_body_items_item_sku import OrderRunBodyItemsItemSku
from made.models.problem import Problem
from made.models.status_document import StatusDocument

with Client(base_url=sys.argv[1], raise_on_unexpected_status=True) as client:
    hello = hello_run.sync(client=client, name="Ada & Bob")
    assert isinstance(hello, HelloRunResponse200)
    print(hello.greeting)
    job = hello_submit.sync(client=client, name="ü", callback_url=sys.argv[2])
    assert isinstance(job, StatusDocument)
    status = get_job_status.sync(job.id, client=client, prefer="wait=10")
    assert isinstance(status, StatusDocument)
    print(status.status, get_job_result.sync(job.id, client=client))
    items = [OrderRunBodyItemsItem(sku=OrderRunBodyItemsItemSku.PLUM, quantity=1)]
    refused = order_run.sync(client=client, body=OrderRunBody(customer="Ada", items=items))
    assert isinstance(refused, Problem)
    print(refused.detail)
    lost = get_job_result.sync(UUID(int=0), client=client)
    print(type(lost).__name__)
"""


def test_a_client_in_python_is_generated_checked_and_calls(tmp_path: Path, sink: Sink) -> None:
    (tmp_path / "all.json").write_text(json.dumps(WHOLE))
    program = str(Path(sys.executable).with_name("openapi-python-client"))
    (tmp_path / "bare.yml").write_text("post_hooks: []")  # they tidy what is made, with whatever ruff is found
    make = (program, "generate", "--meta", "none", "--config", "bare.yml", "--output-path")
    warned = [line for line in called(*make, "whole", "--path", "all.json", cwd=tmp_path).split("\n") if "WARN" in line]
    # Dates in headers, and bodies that are text, are beyond it.
    paths = ["publishing/headers", "publishingAsync/headers", "publishing/text", "publishingAsync/text"]
    assert sorted(line.split("/api/")[1].split()[0] for line in warned) == sorted(paths)
    (tmp_path / "caller.py").write_text(PYTHON_CALLER)
    with process(tmp_path, "--flows", str(ROOT / "flows")) as (_, url, _):
        called(*make, "made", "--url", f"{url}/openapi.json", "--fail-on-warning", cwd=tmp_path)
        called(sys.executable, "-m", "mypy", "caller.py", cwd=tmp_path)
        said = called(sys.executable, "caller.py", url, f"{sink.url}/done", cwd=tmp_path).splitlines()
    greeting, result, detail, lost = said
    assert greeting == "Hello, Ada & Bob!"
    assert result == "Completed {'greeting': 'Hello, ü!'}"
    assert detail == "not enough in stock: plum"
    assert lost == "UnknownJobProblem"
    assert sink.next()[1]["status"] == "Completed"


OPENAPI_TYPESCRIPT = ROOT / "node_modules" / ".bin" / "openapi-typescript"
TYPESCRIPT_CALLER = """
import type { operations } from "./api";

type Operation = { parameters: { query?: object }, responses: object };
type Body<O extends Operation, Status> =
    O["responses"] extends { [S in Status & number]: { content: { "application/json": infer B } } } ? B : never;

async function call<Id extends keyof operations, Status extends number>(
    _: Id, path: string, status: Status, query: NonNullable<operations[Id]["parameters"]["query"]> = {},
): Promise<Body<operations[Id], Status>> {
    const words = Object.entries(query).map((pair) => pair.map((text) => encodeURIComponent(String(text))).join("="));
    const answer = await fetch(`URL${path}?${words.join("&")}`);
    if (answer.status !== status) throw new Error(`${path}: ${answer.status}`);
    return answer.json();
}

const greeting: string = (await call("hello.run", "/api/publishing/hello", 200, { name: "Ada & Bob" })).greeting;
const job = await call("hello.submit", "/api/publishingAsync/hello", 202, { name: "ü" });
const result: operations["getJobResult"]["responses"]["2XX"]["content"]["application/json"] =
    await (await fetch(job.statusUrl.replace(/status$/, "result"), { headers: { Prefer: "wait=10" } })).json();
const { jobs } = await call("listJobs", "/api/jobs", 200, { flow: "hello", status: "Completed" });
console.log(JSON.stringify([greeting, result, jobs.map((one) => one.flow)]));
export {};
"""


@pytest.mark.skipif(
    not OPENAPI_TYPESCRIPT.exists() and not os.environ.get("CI"),
    reason=f"there is no openapi-typescript here: {NPM}",
)
def test_a_client_in_typescript_is_generated_compiled_and_calls(tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(WHOLE))
    compiler = str(OPENAPI_TYPESCRIPT.with_name("tsc"))
    compile_ = (compiler, "--strict", "--target", "es2022", "--module", "es2022", "--moduleResolution", "bundler")
    called(str(OPENAPI_TYPESCRIPT), "all.json", "--output", "whole.ts", cwd=tmp_path)
    with process(tmp_path, "--flows", str(ROOT / "flows")) as (_, url, _):
        called(str(OPENAPI_TYPESCRIPT), f"{url}/openapi.json", "--output", "api.ts", cwd=tmp_path)
        (tmp_path / "caller.mts").write_text(TYPESCRIPT_CALLER.replace("URL", url))
        called(*compile_, "whole.ts", "caller.mts", cwd=tmp_path)
        said = called("node", "caller.mjs", cwd=tmp_path)
    assert json.loads(said) == ["Hello, Ada & Bob!", {"greeting": "Hello, ü!"}, ["hello"]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("openapi"), EVERYTHING, max_wait="20ms") as server:
        yield server


def ask(folder: Path, url: str, *arguments: str) -> None:
    """Let schemathesis ask a server all that its document allows, and much that it does not."""
    config = str(ROOT / "tests" / "schemathesis.toml")
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", config, "run"]
    command += [f"{url}/openapi.json", "--continue-on-failure", *arguments]
    env = os.environ | {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, errors="replace", env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_server_does_what_the_document_says(run: Running, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask(tmp_path, run.server.url, "--max-examples", "15")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_the_server_does_what_the_document_says_where_a_token_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    for name in ("types", "person", "once"):
        (tmp_path / "flows" / f"{name}.json").write_text(json.dumps(EVERYTHING[name]))
    token = "a-long-enough-token-0123456789"
    with process(tmp_path, "--max-wait", "20ms", env={"ASTERA_LITE_TOKEN": token}) as (_, url, lines):
        ask(tmp_path, url, "--max-examples", "10", "--header", f"Authorization: Bearer {token}")
    assert "Traceback" not in "\n".join(lines)


def test_the_document_is_served_for_the_name_that_was_called(run: Running) -> None:
    answer = run.client.get("/openapi.json")
    assert answer.status_code == 200 and answer.headers["Content-Type"] == "application/json"
    assert answer.json()["servers"] == [{"url": run.server.url}]
    port = run.server.server_address[1]
    other = run.client.get("/openapi.json", headers={"Host": f"localhost:{port}"})
    assert other.json()["servers"] == [{"url": f"http://localhost:{port}"}]
    collection = run.client.get("/postman.json", headers={"Host": f"localhost:{port}"}).json()
    assert collection["variable"][0]["value"] == f"http://localhost:{port}"


def test_a_new_flow_is_in_the_next_document(tmp_path: Path) -> None:
    with running(tmp_path, {}) as (app, _, client):
        assert "/api/publishing/new" not in client.get("/openapi.json").json()["paths"]
        app.deploy("new", get_flow("/new", response={"body": 1}))
        assert "/api/publishing/new" in client.get("/openapi.json").json()["paths"]


def test_where_a_token_is_wanted_the_document_wants_it_too(tmp_path: Path) -> None:
    with running(tmp_path, {}, token="a-long-enough-token-0123456789") as (_, server, _):
        client = Client(server)
        try:
            assert client.get("/openapi.json").status_code == 401
            answer = client.get("/openapi.json", headers={"Authorization": "Bearer a-long-enough-token-0123456789"})
            assert answer.json()["security"] == [{"token": []}]
        finally:
            client.session.close()


def test_the_template_says_what_the_server_does() -> None:
    shared = json.loads(astera_lite.resource("openapi.json"))["components"]
    schemas, parameters = shared["schemas"], shared["parameters"]
    states = [status.value for status in astera_lite.Status]
    assert shared["headers"]["Job-Status"]["schema"]["enum"] == states
    for name in ("StatusDocument", "FinishedJob", "JobDetails"):
        assert schemas[name]["properties"]["status"]["enum"] == states[:3]
    assert schemas["StatusDocument"]["properties"]["callback"]["properties"]["state"]["enum"] == [
        *("pending", "delivered", "failed", "gone")
    ]
    assert schemas["Problem"]["properties"]["code"]["enum"] == ["failed", "timeout", "cancelled", "interrupted"]
    assert schemas["Deployment"]["properties"]["method"]["enum"] == list(astera_lite.FLOW_METHODS)
    assert schemas["Flow"]["properties"]["request"]["properties"]["method"]["enum"] == list(astera_lite.FLOW_METHODS)
    assert schemas["Deployment"]["properties"]["processing"]["items"]["enum"] == list(astera_lite.MODES)
    limit = parameters["Limit"]["schema"]
    assert (limit["default"], limit["maximum"]) == (DEFAULT_LIST, MAX_LIST)
