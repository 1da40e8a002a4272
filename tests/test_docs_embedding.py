"""docs/embedding.md: every program in it prints what stands below it, with three files, and its types are right."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

PAGE = (ROOT / "docs" / "embedding.md").read_text("utf-8")
PROGRAMS = re.findall(
    r"^## (.+?)\n(?:(?!^##).)*?```python\n(.+?)```\n\n```text\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE
)


@pytest.mark.parametrize(("program", "printed"), [pytest.param(*rest, id=title) for title, *rest in PROGRAMS])
def test_a_program_prints_what_is_shown(tmp_path: Path, program: str, printed: str) -> None:
    for name in ("astera_lite.py", "astera_lite_embedding.py", "schema.sql"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", program],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, printed), done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_every_program_is_found() -> None:
    assert len(PROGRAMS) == PAGE.count("```python") == PAGE.count("```text") > 6


def test_the_programs_are_well_typed(tmp_path: Path) -> None:
    for number, (_, program, _) in enumerate(PROGRAMS):
        (tmp_path / f"program{number}.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--cache-dir", os.devnull, str(tmp_path)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
