"""What README.md and the tables of docs/ say is what the program does; their commands are run by test_docs.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from support import ROOT

import astera_lite
import astera_lite_admin
import astera_lite_tools

README, SETTINGS, HTTP, OPERATIONS = (
    (ROOT / page).read_text("utf-8")
    for page in ("README.md", "docs/settings.md", "docs/http-api.md", "docs/operations.md")
)


def test_the_settings_table_is_that_of_the_program() -> None:
    rows = [f"| `{name}` | {default} | {text} |" for name, default, text in astera_lite_tools.settings_table()]
    assert "\n".join(rows) in SETTINGS


def test_every_route_is_in_the_document_of_the_http_interface() -> None:
    for route in astera_lite.ROUTES:
        path = route.path.replace("/*", "{resource}")
        is_there = f"{path}`" in HTTP or f"{path}?" in HTTP or f"…/{path.rpartition('/')[2]}" in HTTP
        assert is_there, f"docs/http-api.md has no row of {route.method} {path}"


def test_every_metric_is_in_the_table_of_operations(tmp_path: Path) -> None:
    with astera_lite.AsteraLite(database=str(tmp_path / "jobs.db")) as app:
        names = re.findall("^# TYPE (astera_[a-z_]+) ", astera_lite_admin.metrics_text(app), re.MULTILINE)
    table = [line for line in OPERATIONS.split("\n") if line.startswith("| `astera_")]
    assert [name for name in names if f"`{name}`" not in "".join(table)] == []


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
