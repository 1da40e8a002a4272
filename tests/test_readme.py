"""What README.md says is what the program does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support import ROOT, running

import astera_lite

README = (ROOT / "README.md").read_text("utf-8")


def code_block_after(words: str) -> str:
    """The indented block that follows a line with these words, without its indentation."""
    lines = README[README.index(words) :].split("\n")[1:]
    while not lines[0].startswith("    "):
        lines.pop(0)
    block = []
    for line in lines:
        if line and not line.startswith("    "):
            break
        block.append(line[4:])
    return "\n".join(block).strip() + "\n"


def test_the_settings_table_is_that_of_the_program() -> None:
    rows = [f"| `{name}` | {default} | {text} |" for name, default, text in astera_lite.settings_table()]
    assert "\n".join(rows) in README


def test_the_flow_shown_is_the_one_that_new_writes() -> None:
    assert code_block_after("writes `flows/lookup.json`") == astera_lite.starter_flow("lookup")


def test_the_flow_shown_answers_as_shown(tmp_path: Path) -> None:
    with running(tmp_path, {"lookup": json.loads(code_block_after("writes `flows/lookup.json`"))}) as (_, _, client):
        assert client.get("/api/publishing/lookup/7").text in README
        assert client.get("/api/publishing/lookup/-1").status_code == 404


def test_every_endpoint_in_the_table_is_a_route() -> None:
    table = README[README.index("## Endpoints") : README.index("## Settings")]
    for route in astera_lite.ROUTES:
        path = route.path.replace("/*", "{resource}")
        assert path in table or f"…/{path.rpartition('/')[2]}" in table, path


def test_the_test_line_is_the_one_that_ci_runs() -> None:
    line = next(line for line in README.split("\n") if line.startswith("    python -m venv"))
    assert line.endswith('pip install -q -e ".[test]" && .venv/bin/python -m pytest')


def test_the_embedding_example_does_what_it_prints() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "embed.py"), "--once"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert "{'km': 504.0}" in done.stdout
    assert "Completed {'to': 2, 'be': 2, 'or': 1, 'not': 1}" in done.stdout
    assert '200 {"km":20015.1}' in done.stdout
