"""docs/flows.md and examples/flows: every example of the page is a step of a flow there, and every flow there works."""

from __future__ import annotations

import json
import re
import sys
import threading
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
from support import ROOT, Client, compiled

from astera_lite import (
    FLOW,
    FUNCTIONS,
    METHODS,
    STEP_KINDS,
    VALUE_SCHEMA,
    AsteraLite,
    Elsewhere,
    Member,
    Server,
    StepKind,
    Table,
    step_table,
    to_json,
    wing,
)
from astera_lite_requests import CONNECTIONS

sys.path.insert(0, str(ROOT / "examples"))

PAGE = (ROOT / "docs" / "flows.md").read_text()
FILES = sorted(path for path in (ROOT / "examples" / "flows").iterdir() if path.suffix in (".json", ".toml"))
ROWS = [
    {"code": "DEN", "name": "Denver International", "state": "CO", "elevation": 5434},
    {"code": "ASE", "name": "Aspen", "state": "CO", "elevation": 7820},
    {"code": "TRM", "name": "Thermal", "state": "CA", "elevation": -115},
    {"code": "SFO", "name": "San Francisco", "state": "CA", "elevation": 13},
    {"code": "LXV", "name": "Leadville", "state": "CO", "elevation": 9934},
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    import slow_api

    api = slow_api.Server(("127.0.0.1", 0), 0.0)
    threading.Thread(target=api.serve_forever, args=(0.01,), daemon=True).start()
    folder = tmp_path_factory.mktemp("examples")
    (folder / "data").mkdir()
    env = {"ASTERA_FLOW_WEATHER_URL": f"http://127.0.0.1:{api.server_address[1]}"}
    app = AsteraLite(
        flows=str(ROOT / "examples" / "flows"),
        database=str(folder / "jobs.db"),
        data=str(folder / "data"),
        environ=env,
        port=0,
    )
    with app, Server(app) as server:
        assert app.deployments.faults == []
        app.outside.env["ASTERA_FLOW_SELF"] = server.url
        client = Client(server)
        loaded = client.post("/api/publishing/airports", json=ROWS)
        assert (loaded.status_code, loaded.json()) == (201, {"loaded": 5})
        yield client
    api.shutdown()
    api.server_close()


def both(client: Client, path: str) -> tuple[int, Any]:
    """What a flow answers; the same in both modes."""
    now = client.get(f"/api/publishing{path}")
    later = client.get(f"/api/publishingAsync{path}", headers={"Prefer": "wait=20"})
    assert (now.status_code, now.content) == (later.status_code, later.content)
    return now.status_code, now.json() if "json" in now.headers["Content-Type"] else now.text


def test_airports_are_paged_filtered_and_sorted(client: Client) -> None:
    code, page = both(client, "/airports")
    assert (code, [row["code"] for row in page["airports"]], page["of"]) == (200, ["ASE", "DEN"], 5)
    seen = [row["code"] for row in page["airports"]]
    while page["cursor"]:
        _, page = both(client, f"/airports?cursor={page['cursor']}")
        seen += [row["code"] for row in page["airports"]]
    assert seen == ["ASE", "DEN", "LXV", "SFO", "TRM"]
    _, page = both(client, "/airports?state=CO&sort_by=-elevation&above=6000")
    assert [row["code"] for row in page["airports"]] == ["LXV", "ASE"]
    assert page["cursor"] is None
    for wrong in ("cursor=x", "sort_by=colour", "above=high"):
        refused = client.get(f"/api/publishingAsync/airports?{wrong}")
        assert (refused.status_code, refused.json()["errors"][0]["name"]) == (400, wrong.partition("=")[0])


@pytest.mark.parametrize(
    ("path", "code", "body"),
    [
        ("/airports/SFO", 200, {"name": "San Francisco", "state": "CA", "elevation": 13, "kind": "low"}),
        ("/airports/LXV?form=text", 200, "Leadville, CO: 9000 feet and more\n"),
        ("/airports/TRM?form=text", 200, "Thermal, CA: below the sea\n"),
        ("/airports/XYZ", 404, {"error": "there is no airport XYZ"}),
        ("/airports/X'--", 400, None),
        ("/cities?country=US", 200, {"cities": ["Berlin", "New York"], "pages": 1}),
        ("/careful/200", 200, {"status": 200}),
        ("/careful/503", 200, {"status": 0}),
        ("/primes?below=1000", 200, {"primes": 168}),
        ("/trip/XYZ/Berlin", 404, {"error": "there is no airport XYZ"}),
    ],
)
def test_what_the_examples_answer(client: Client, path: str, code: int, body: Any) -> None:
    if code == 400:
        assert client.get(f"/api/publishing{path}").status_code == 400
        return
    assert both(client, path) == (code, body)


def test_cities_come_from_several_pages(client: Client) -> None:
    import slow_api

    assert both(client, "/cities") == (200, {"cities": [city.name for city in slow_api.CITIES], "pages": 3})


def test_compare_and_trip(client: Client) -> None:
    code, rows = both(client, "/compare?city=Berlin,Cairo,Nowhere")
    assert code == 200 and [row["city"] for row in rows][2] == "Nowhere" and rows[2]["warmth"] is None
    assert rows[0]["warmth"] >= rows[1]["warmth"]
    warmth = {row["city"]: row["warmth"] for row in rows}
    assert both(client, "/trip/SFO/Cairo") == (200, {"airport": "San Francisco", "warmth": warmth["Cairo"]})


def test_patient_and_nap(client: Client) -> None:
    assert both(client, "/patient") == (200, {"slept": 0.4})
    failed = client.get("/api/publishingAsync/nap?seconds=13", headers={"Prefer": "wait=0"})
    assert failed.status_code == 202
    client.post(failed.headers["Location"].replace("/status", "/cancel"))


def test_words(client: Client) -> None:
    answer = client.post("/api/publishing/words", data="to be or not\nto be", headers={"Content-Type": "text/plain"})
    assert answer.json() == ["be", "not", "or", "to"]


# ---- the page --------------------------------------------------------------------------------------------------------


def all_steps(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        yield tree
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from all_steps(item)


def trees() -> list[Any]:
    folders = [*FILES, *(ROOT / "flows").glob("*.json")]
    return [tomllib.loads(p.read_text()) if p.suffix == ".toml" else json.loads(p.read_text()) for p in folders]


def blocks() -> list[str]:
    found = re.findall(r"(?:^    .*\n)+", PAGE, re.MULTILINE)
    return [block for block in found if block.lstrip().startswith(('{"name', '{\n      "name', '"response'))]


@pytest.mark.parametrize("block", blocks(), ids=lambda block: " ".join(block.split())[:40])
def test_every_example_of_the_page_stands_in_a_flow(block: str) -> None:
    text = block if block.lstrip().startswith("{") else "{" + block + "}"
    example = json.loads(text)
    if "response" in example:
        assert any(tree.get("response") == example["response"] for tree in trees())
    else:
        assert any(step == example for tree in trees() for step in all_steps(tree))


def test_the_page_has_an_example_of_every_kind() -> None:
    shown = {kind for block in blocks() for kind in STEP_KINDS if f'"{kind}":' in block}
    assert shown == set(STEP_KINDS)


# ---- the table of all members ----------------------------------------------------------------------------------------


def tables(name: str, member: Member) -> Iterator[tuple[str, Table]]:
    """Every object that may stand in a member, with the way to it."""
    member = wing(member.name) if isinstance(member, Elsewhere) else member
    if isinstance(member, Table):
        if member.name and name:  # it has rows of its own
            return
        yield name, member
        for key, item in member.members.items():
            yield from tables(f"{name}.{key}".lstrip("."), item)
        return
    for part in ("item", "plain", "structured"):
        if part in vars(member):
            yield from tables(name, vars(member)[part])
    if isinstance(member, StepKind):
        yield from tables(name, member.members)


def table_of_members() -> str:
    """The table at the end of the page, as the tables of members have it."""
    lines = ["| object | member | is | if left out |", "|---|---|---|---|"]
    objects = [("flow", FLOW), ("step", step_table(STEP_KINDS)), ("schema", VALUE_SCHEMA), ("connection", CONNECTIONS)]
    for start, root in objects:
        for name, table in tables("", root):
            for key, member in table.members.items():
                member = wing(member.name) if isinstance(member, Elsewhere) else member
                default = (
                    "required" if member.required else "" if member.default is None else f"`{to_json(member.default)}`"
                )
                word = f"a step that {member.word}" if isinstance(member, StepKind) else member.word
                lines.append(f"| {name or start} | `{key}` | {word.replace('|', chr(92) + '|')} | {default} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_members_is_that_of_the_code() -> None:
    assert table_of_members() in PAGE, "python tests/test_docs_flows.py writes it"


ROWS_OF_FUNCTIONS = re.findall(r"^\| `(\w+)(\(.*?\))` \| .* \| `(.*)` is `(.*)` \|$", PAGE, re.MULTILINE)


def test_the_table_of_functions_has_the_functions_of_the_language() -> None:
    shown = {f"{name}{parameters}" for name, parameters, _, _ in ROWS_OF_FUNCTIONS}
    assert shown == {function.signature.replace(", /", "") for function in FUNCTIONS.values()}


@pytest.mark.parametrize(("name", "source", "value"), [(row[0], *row[2:]) for row in ROWS_OF_FUNCTIONS])
def test_the_example_of_a_function_is_true(name: str, source: str, value: str) -> None:
    assert name in source
    found, expected = compiled(f"${{[{source}, {value}]}}")({})
    assert (found, type(found)) == (expected, type(expected))


def test_the_page_lists_the_methods_of_the_language() -> None:
    text = PAGE[PAGE.index("The methods of text are") : PAGE.index("**Limits.**")]
    listed = [re.findall(r"[a-z]+", part) for part in re.findall("`([^`]+)`", text)]
    assert listed == [sorted(METHODS[kind]) for kind in (str, list, dict)]


if __name__ == "__main__":
    head, heading, _ = PAGE.partition("## All members\n")
    (ROOT / "docs" / "flows.md").write_text(f"{head}{heading}\n{table_of_members()}")
