"""The Postman collection: that it is one, and that newman runs it green against the server."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from support import EVERYTHING, NPM, PROGRAM, ROOT, get_flow, process, running

import astera_lite
from astera_lite import Deployments, build_flow
from astera_lite_documents import postman_document

MODULES = ROOT / "node_modules"
NEWMAN = shutil.which("newman") or shutil.which("newman", path=str(MODULES / ".bin"))
SCHEMA = MODULES / "@har-sdk" / "validator" / "dist" / "schemas" / "postman" / "v2.1.0.json"


def needs(there: Any, what: str) -> pytest.MarkDecorator:
    """Skip where a tool is missing; in CI, which installs it, that is a failure."""
    missing = not there and not os.environ.get("CI")
    return pytest.mark.skipif(missing, reason=f"there is no {what} here: {NPM}")


def collection(*flows: tuple[str, dict[str, Any]], secured: bool = False) -> dict[str, Any]:
    deployments = Deployments([build_flow(tree, name) for name, tree in flows])
    assert deployments.faults == []
    return postman_document(deployments, "http://127.0.0.1:9261", secured)


def requests_of(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    items = [item for folder in tree["item"] for item in folder["item"]]
    assert len({item["name"] for item in items}) == len(items)
    return {item["name"]: item["request"] for item in items}


def newman(folder: Path, source: str, *arguments: str) -> tuple[dict[str, int], list[str]]:
    """Run a collection: how often each of its requests was sent, and what failed."""
    assert NEWMAN is not None, NPM
    report = folder / "report.json"
    command = [NEWMAN, "run", source, "--reporters", "json", "--reporter-json-export", str(report)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, cwd=folder)
    assert report.exists(), done.stdout + done.stderr
    run = json.loads(report.read_text())["run"]
    failures = [f"{each['source'].get('name')}: {each['error']['message']}" for each in run["failures"]]
    assert bool(failures) == bool(done.returncode), done.stdout + done.stderr
    sent: dict[str, int] = {}
    for execution in run["executions"]:
        name = execution["item"]["name"]
        if "response" in execution:
            sent[name] = sent.get(name, 0) + 1
            assert len(execution["assertions"]) > 1, name
    return sent, failures


@needs(SCHEMA.exists(), "schema of collections")
@pytest.mark.parametrize("secured", [False, True])
def test_the_collection_is_valid(secured: bool) -> None:
    schema = json.loads(SCHEMA.read_text())
    for tree in (collection(*EVERYTHING.items(), secured=secured), collection(secured=secured)):
        jsonschema.Draft7Validator(schema).validate(tree)


def test_each_flow_has_a_folder_with_its_modes() -> None:
    tree = collection(*EVERYTHING.items())
    assert [folder["name"] for folder in tree["item"]] == [*sorted(EVERYTHING), "Server"]
    chain = ["submit", "poll", "fetch"]
    for folder in tree["item"][:-1]:
        run = ["run"] * ("synchronous" in EVERYTHING[folder["name"]]["request"]["processing"])
        assert [item["name"] for item in folder["item"]] == [f"{folder['name']}: {what}" for what in [*run, *chain]]
    variables = {each["key"]: each["value"] for each in tree["variable"]}
    assert variables["baseUrl"] == "http://127.0.0.1:9261" and variables["token"] == ""


def test_a_token_is_sent_only_where_one_is_wanted() -> None:
    assert collection()["auth"] == {"type": "noauth"}
    secured = collection(secured=True)
    assert secured["auth"]["type"] == "bearer" and secured["auth"]["bearer"][0]["value"] == "{{token}}"
    assert requests_of(secured)["health"]["auth"] == {"type": "noauth"}


def test_examples_come_from_the_flow() -> None:
    parameters = {
        "city": {"in": "path", "example": "São Paulo/Brazil"},
        "days": {"in": "query", "type": "integer", "default": 3},
        "kind": {"in": "query", "required": True, "enum": ["a&b", "c"]},
        "many": {"in": "query", "type": "array", "items": {"type": "integer"}, "example": [1, 2]},
        "note": {"in": "query", "minLength": 6},
        "X-Size": {"in": "header", "type": "number", "minimum": 2.5, "required": True},
    }
    body = {
        "type": "object",
        "required": ["name", "size", "sent"],
        "properties": {
            "name": {"type": "string", "minLength": 6},
            "size": {"type": "integer", "maximum": -4},
            "sent": {"type": ["date-time", "null"]},
            "tags": {"type": "array", "example": ["x"]},
            "left out": {"type": "string"},
        },
    }
    tree = {"request": {"method": "POST", "resource": "/in/{city}", "parameters": parameters, "body": body}}
    asked = requests_of(collection(("in", tree)))["in: run"]
    assert asked["url"]["raw"] == "{{baseUrl}}/api/publishing/in/:city?days=3&kind=a%26b&many=1&many=2"
    assert asked["url"]["variable"] == [{"key": "city", "value": "S%C3%A3o%20Paulo%2FBrazil", "description": ""}]
    assert [each["key"] for each in asked["url"]["query"] if each.get("disabled")] == ["note"]
    assert {each["key"]: each["value"] for each in asked["header"]} == {
        "X-Size": "2.5",
        "Content-Type": "application/json",
    }
    assert json.loads(asked["body"]["raw"]) == {
        "name": "namexx",
        "size": -4,
        "sent": "2026-01-31T12:00:00Z",
        "tags": ["x"],
    }


ODD_NAMES = {name: name[::-1] + "," for name in ("q&a", "x=y", "a b", "1+1", "50%", "ä#", "[x]", "{{token}}", "it's")}


@needs(NEWMAN, "newman")
def test_names_of_query_parameters_are_sent_as_they_are(tmp_path: Path) -> None:
    parameters = {name: {"in": "query", "example": value, "required": True} for name, value in ODD_NAMES.items()}
    flow = get_flow("/it's", request={"parameters": parameters, "strict": True}, response={"body": "${params}"})
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "odd.json").write_text(json.dumps(flow))
    with process(tmp_path) as (_, url, lines):
        sent, failures = newman(tmp_path, f"{url}/postman.json")
        printed = [shlex.split(line) for line in lines if "/api/publishing/" in line]
        answer = astera_lite.fetch("GET", printed[0][-1], {}, None, timeout=10, max_bytes=1 << 20)
    assert failures == [] and sent["odd: run"] == sent["odd: fetch"] == 1
    executions = json.loads((tmp_path / "report.json").read_text())["run"]["executions"]
    bodies = {each["item"]["name"]: bytes(each["response"]["stream"]["data"]) for each in executions}
    for body in (bodies["odd: run"], bodies["odd: fetch"], answer.body):
        assert json.loads(body) == ODD_NAMES


def test_values_that_do_not_suffice_are_told() -> None:
    asked = requests_of(collection(("strict", EVERYTHING["strict"])))
    assert "code must match the pattern" in asked["strict: run"]["description"]


def test_the_command_prints_what_the_route_gives(tmp_path: Path) -> None:
    with process(tmp_path, "--flows", str(ROOT / "flows")) as (_, url, _):
        port = url.rpartition(":")[2]
        command = [*PROGRAM, "postman", "--flows", str(ROOT / "flows")]
        done = subprocess.run([*command, "--port", port], capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        answer = astera_lite.fetch("GET", f"{url}/postman.json", {}, None, timeout=10, max_bytes=1 << 20)
        assert json.loads(answer.body) == json.loads(done.stdout)


@contextmanager
def weather_api() -> Iterator[dict[str, str]]:
    """examples/slow_api.py in the place of the API that the flow `weather` calls."""
    command = [sys.executable, str(ROOT / "examples" / "slow_api.py"), "--port", "0", "--delay", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as api:
        try:
            assert api.stdout is not None
            url = api.stdout.readline().split()[-1].rstrip("/")
            yield {"ASTERA_FLOW_GEOCODING_URL": url, "ASTERA_FLOW_WEATHER_URL": url}
        finally:
            api.kill()


@needs(NEWMAN, "newman")
def test_the_collection_of_the_repository_runs_green(tmp_path: Path) -> None:
    with weather_api() as env, process(tmp_path, "--flows", str(ROOT / "flows"), env=env) as (_, url, _):
        sent, failures = newman(tmp_path, f"{url}/postman.json")
    assert failures == []
    assert sent["slow: poll"] > 1  # it waits five seconds
    names = [f"{flow}: {what}" for flow in ("hello", "order", "weather") for what in ("run", "submit", "fetch")]
    assert sent.items() >= dict.fromkeys([*names, "slow: submit", "slow: fetch", "health", "jobs"], 1).items()


@needs(NEWMAN, "newman")
def test_the_collection_runs_green_where_a_token_is_wanted(tmp_path: Path) -> None:
    command = [*PROGRAM, "token", "ada", "--flows", "hello,order"]
    with process(tmp_path) as _:
        made = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=True)
    token = made.stdout.strip()
    flows = str(ROOT / "flows")
    with process(tmp_path, "--flows", flows, env={"ASTERA_LITE_TOKEN": "t" * 32}) as (_, url, _):
        documents = {}
        for name, text in (("admin", "t" * 32), ("ada", token)):
            headers = {"Authorization": f"Bearer {text}"}
            answer = astera_lite.fetch("GET", f"{url}/postman.json", headers, None, timeout=10, max_bytes=1 << 20)
            documents[name] = json.loads(answer.body)
            (tmp_path / f"{name}.json").write_bytes(answer.body)
        assert [folder["name"] for folder in documents["ada"]["item"]] == ["hello", "order", "Server"]
        assert len(documents["admin"]["item"]) == 5
        _, failures = newman(tmp_path, str(tmp_path / "ada.json"), "--env-var", f"token={token}")
        assert failures == []
        sent, failures = newman(tmp_path, str(tmp_path / "ada.json"), "--env-var", "token=wrong")
        assert any(each.startswith("hello: run: ") for each in failures)
        assert "hello: poll" not in sent  # what was not accepted is not asked for
        sent, failures = newman(
            tmp_path, str(tmp_path / "admin.json"), "--env-var", f"token={token}", "--folder", "slow"
        )
        assert failures and sent == {"slow: submit": 1}


@needs(NEWMAN, "newman")
def test_flows_of_every_kind_run_green(tmp_path: Path) -> None:
    asleep = get_flow("/asleep", steps=[{"name": "pause", "wait": "300ms"}], response={"body": 1})
    broken = get_flow("/broken", steps=[{"name": "no", "set": "${1 / 0}"}])
    with running(tmp_path, EVERYTHING | {"asleep": asleep, "broken": broken}) as run:
        sent, failures = newman(tmp_path, f"{run.server.url}/postman.json")
    assert {each.partition(":")[0] for each in failures} == {"broken"}  # a fault of a flow's is no promise kept
    assert "strict: poll" not in sent and sent["strict: submit"] == 1
    assert sent["person-put: fetch"] == sent["path: fetch"] == sent["form: fetch"] == 1
    assert sent["asleep: poll"] == 2


@needs(NEWMAN, "newman")
def test_a_redirect_is_an_answer_and_a_variable_in_an_example_is_text(tmp_path: Path) -> None:
    secret, sample = "t" * 32, "a {{token}} {{{token}}}"
    body = {"type": "object", "properties": {"{{token}}": {"example": sample}, "b": {"example": sample}}}
    parameters = {name: {"in": where, "example": sample} for name, where in (("X-A", "header"), ("q", "query"))}
    flows: dict[str, Any] = {
        "moved": get_flow("/moved", response={"status": 302, "headers": {"Location": "/nowhere"}}),
        "plain": get_flow("/plain", response={"headers": {"Content-Type": "text/plain; x=/json"}, "body": "no JSON"}),
    }
    types = {"json": ("application/json", body), "text": ("text/plain", {"example": sample})}
    types["form"] = ("application/x-www-form-urlencoded", body)
    for name, (media, spec) in types.items():
        request = {"method": "POST", "contentTypes": [media], "body": spec, "parameters": parameters}
        heard = {"body": {"body": "${request.body}", "params": "${params}"}}
        flows[name] = get_flow(f"/{name}", request=request, response=heard)
    with running(tmp_path, flows, token=secret) as run:
        answer = run.client.get("/postman.json", headers={"Authorization": f"Bearer {secret}"})
        (tmp_path / "collection.json").write_bytes(answer.content)
        sent, failures = newman(tmp_path, str(tmp_path / "collection.json"), "--env-var", f"token={secret}")
    assert failures == [] and sent["moved: run"] == sent["moved: fetch"] == 1
    executions = json.loads((tmp_path / "report.json").read_text())["run"]["executions"]
    answers = {each["item"]["name"]: bytes(each["response"]["stream"]["data"]).decode() for each in executions}
    for name in types:
        assert secret not in answers[f"{name}: run"] and "token}}" in answers[f"{name}: run"]
    assert json.loads(answers["json: run"])["body"] == {"{{token}}": sample, "b": sample}
    assert json.loads(answers["json: run"])["params"]["q"] == sample
