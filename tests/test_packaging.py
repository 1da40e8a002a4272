"""What people install and copy: wheel, sdist and zipapp, built and run as they are, away from the checkout."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from nodes import Cluster
from support import ROOT, SCRIPT, Api, process

from astera_lite import SHIPPED, WINGS, __version__

MODULES = ("astera_lite.py", *WINGS)
WHEEL = f"astera_lite-{__version__}-py3-none-any.whl"


def run(*command: str | Path, folder: Path, code: int = 0) -> str:
    """What a command prints; it must end with this code."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("ASTERA_", "PYTHONPATH", "PIP_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=plain, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def away_from_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    pyz: Path
    bin: Path  # of an environment that holds the wheel and nothing else
    site: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, folder=ROOT)
    run(sys.executable, SCRIPT, "zipapp", "one.pyz", folder=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", folder=folder)
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    wheel = folder / WHEEL
    pip = [sys.executable, "-m", "pip", "--python", scripts / "python", "install", "-q", "--no-index"]
    run(*pip, wheel, folder=folder)
    say = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(scripts / "python", "-c", say, folder=folder).strip())
    return Built(wheel, folder / f"astera_lite-{__version__}.tar.gz", folder / "one.pyz", scripts, site)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with flows, one of which starts a process that needs the module, too."""
    (tmp_path / "flows").mkdir()
    for name in ("primes.json", "numbers_of.py"):
        (tmp_path / "flows" / name).write_bytes((ROOT / "examples" / "flows" / name).read_bytes())
    return tmp_path


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as file:
        return {name: file.read(name) for name in file.namelist()}


def test_the_wheel_holds_the_module_and_what_it_needs(built: Built) -> None:
    found = members(built.wheel)
    for name in MODULES:
        assert found.pop(name) == (ROOT / name).read_bytes()
    for name in ("astera_lite", "astera_lite_embedding"):
        assert found.pop(f"{name}/py.typed") == b""
    for name in SHIPPED:
        assert found.pop(f"astera_lite/{name}") == (ROOT / name).read_bytes()
    assert {name.partition("/")[0] for name in found} == {f"astera_lite-{__version__}.dist-info"}


def test_what_is_needed_beside_the_module_is_all_that_is_there() -> None:
    assert sorted(SHIPPED) == sorted(path.name for kind in ("sql", "html", "json") for path in ROOT.glob(f"*.{kind}"))


def test_the_wheel_needs_nothing_else(built: Built) -> None:
    (found,) = importlib.metadata.distributions(path=[str(built.site)])
    assert found.version == __version__
    assert all("extra ==" in line for line in found.requires or ())


def test_the_sdist_makes_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert (source / "tests" / "test_packaging.py").exists()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, folder=source)
    assert (tmp_path / WHEEL).read_bytes() == built.wheel.read_bytes()


@pytest.mark.parametrize("form", ["script", "zipapp", "module", "command"])
def test_each_form_of_it_serves(built: Built, work: Path, form: str) -> None:
    program, shown = {
        "script": ((sys.executable, SCRIPT), "python astera_lite.py"),
        "zipapp": ((sys.executable, str(built.pyz)), "python one.pyz"),
        "module": ((str(built.bin / "python"), "-m", "astera_lite"), "python -m astera_lite"),
        "command": ((str(built.bin / "astera-lite"),), "astera-lite"),
    }[form]
    assert run(*program, "--version", folder=work) == f"Astera Lite {__version__}\n"
    assert run(*program, "--help", folder=work).startswith(f"usage: {shown} [COMMAND]")
    with process(work, program=program) as (started, url, _):
        api = Api(url)
        assert api.result(api.finished(api.submit("/primes", below=100))["id"]) == {"primes": 25}
        api.session.close()
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0


def test_the_zipapp_serves_on_postgresql(built: Built, work: Path, cluster: Cluster) -> None:
    arguments = ("--database", cluster.create("zipapp"))
    with process(work, *arguments, program=(sys.executable, str(built.pyz))) as (started, url, _):
        api = Api(url)
        assert api.result(api.finished(api.submit("/primes", below=100))["id"]) == {"primes": 25}
        api.session.close()
        started.send_signal(signal.SIGTERM)
        assert started.wait(10) == 0


@pytest.mark.parametrize("words", [["serve"], ["jobs"], ["token", "ada"]])
def test_without_the_driver_of_postgresql_it_says_what_to_install(built: Built, work: Path, words: list[str]) -> None:
    command = [built.bin / "astera-lite", *words, "--database", "postgresql://ada:s3cret@127.0.0.1/jobs"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=60, check=False)
    told = r"database: PostgreSQL needs psycopg 3\.2 or newer, which is not installed for \S+: pip install .*\n"
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(told, done.stderr)


@pytest.mark.parametrize("how", ["-I", "-P", "link", "linked module"])
def test_a_script_serves_however_it_is_found(work: Path, how: str) -> None:
    """With an isolated child, which has to find the module, too."""
    script = Path(SCRIPT)
    if how == "link":
        script = work / "serve-flows"
        script.symlink_to(SCRIPT)
    elif how == "linked module":
        (work / "astera_lite.py").symlink_to(SCRIPT)
    found = ["-m", "astera_lite"] if how == "linked module" else [str(script)]
    python = os.path.realpath(sys.executable)  # without this environment, which has the module, too
    program = (python, *([how] if how.startswith("-") else []), *found)
    assert run(*program, "check", folder=work).strip() == ""
    with process(work, program=program) as (_, url, _):
        api = Api(url)
        assert api.result(api.finished(api.submit("/primes", below=100))["id"]) == {"primes": 25}
        api.session.close()


def test_a_script_is_compiled_once_where_no_bytecode_is_kept(tmp_path: Path) -> None:
    for name in (*MODULES, "schema.sql"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n\ndef tell(event, args):\n"
        "    if event == 'compile' and str(args[1]).endswith('astera_lite.py'):\n"
        "        open('compiled', 'a').write('again ')\n\nsys.addaudithook(tell)\n"
    )
    env = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tmp_path)}
    program = (sys.executable, "astera_lite.py")
    with process(tmp_path, program=program, env=env) as (_, url, _):
        assert Api(url).counts()["running"] == 0
    assert (tmp_path / "compiled").read_text() == "again "
    subprocess.run([*program, "schema"], cwd=tmp_path, env={**os.environ, **env}, capture_output=True, check=True)
    assert (tmp_path / "compiled").read_text() == "again again "


@pytest.mark.parametrize("by", [("-m", "cProfile", "-o", "profile"), ("-m", "trace", "--count", "--summary")])
def test_a_profiler_may_start_the_script(tmp_path: Path, by: tuple[str, ...]) -> None:
    with process(tmp_path, program=(sys.executable, *by, SCRIPT)) as (_, url, _lines):
        assert Api(url).counts()["running"] == 0


def _older_pythons() -> list[str]:
    names = [f"python3.{minor}" for minor in range(6, 11)]
    folders = [*map(Path, os.get_exec_path()), *Path.home().glob(".pyenv/versions/*/bin")]
    return [str(path / name) for path in folders if path.name != "shims" for name in names if (path / name).exists()]


def test_an_older_python_reads_as_far_as_the_line_that_refuses_it() -> None:
    source = (ROOT / "astera_lite.py").read_text("utf-8")
    ast.parse(source, feature_version=(3, 8))
    first = source[: source.index("sys.version_info < (needed := ")]
    assert first.isascii()  # or Python 2 would complain of that


@pytest.mark.parametrize("python", _older_pythons())
def test_an_older_python_is_told_which_one_is_needed(built: Built, tmp_path: Path, python: str) -> None:
    say = "import sys; print('this is %d.%d.%d (%s)' % (*sys.version_info[:3], sys.executable))"
    minor = int(Path(python).name.removeprefix("python3."))
    this = subprocess.run([python, "-c", say], capture_output=True, text=True, timeout=60, check=False).stdout
    for program in (SCRIPT, built.pyz):
        done = subprocess.run([python, program], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        if minor >= 8 or program == built.pyz:
            assert done.stderr == f"Astera Lite needs Python 3.11 or later; {this}"
        else:  # these fail before a line runs; they show the one that they stumble over
            assert "# Astera Lite needs Python 3.11 or later" in done.stderr
            assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_zipapp_is_whole_and_makes_itself(built: Built, tmp_path: Path) -> None:
    found = members(built.pyz)
    assert set(found) == {"__main__.py", *MODULES, *(f"{name}c" for name in MODULES), *SHIPPED}
    run(sys.executable, built.pyz, "zipapp", folder=tmp_path)
    again = members(tmp_path / "astera_lite.pyz")
    for name in MODULES:
        assert again.pop(f"{name}c")[:16] == found.pop(f"{name}c")[:16]  # the rest may be written variously
    assert again == found
    assert run(sys.executable, built.pyz, "zipapp", "no/such.pyz", folder=tmp_path, code=1) == ""


def test_the_zipapp_is_the_same_each_time_and_everybody_may_run_it(tmp_path: Path) -> None:
    pyz = tmp_path / "astera_lite.pyz"
    for mask, mode in ((0o022, 0o755), (0o027, 0o750), (0o077, 0o700)):
        pyz.unlink(missing_ok=True)
        subprocess.run(
            [sys.executable, SCRIPT, "zipapp"], cwd=tmp_path, umask=mask, capture_output=True, timeout=60, check=True
        )
        assert pyz.stat().st_mode & 0o777 == mode
    assert run(pyz, "--version", folder=tmp_path) == f"Astera Lite {__version__}\n"
    with process(tmp_path, program=(sys.executable, "./astera_lite.pyz")) as (_, url, _lines):
        assert Api(url).counts()["running"] == 0
    with zipfile.ZipFile(pyz) as file:
        assert {each.date_time for each in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_zipapp_of_what_is_there(tmp_path: Path) -> None:
    for name in ("astera_lite.py", "astera_lite_tools.py", "astera_lite_zipapp.py", "schema.sql"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "astera_lite.py", "zipapp"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    left_out = re.findall(r"^(\S+) is missing, so it is left out$", done.stderr, re.MULTILINE)
    assert left_out == [
        "astera_lite_admin.py",
        "astera_lite_advice.py",
        "astera_lite_database.py",
        "astera_lite_documents.py",
        "astera_lite_embedding.py",
        "astera_lite_nodes.py",
        "astera_lite_notices.py",
        "astera_lite_postgres.py",
        "astera_lite_python.py",
        "astera_lite_requests.py",
        "astera_lite_secrets.py",
        "astera_lite_steps.py",
        "astera_lite_tls.py",
        "console.html",
        "openapi.json",
        "schema_postgres.sql",
    ]
    with process(tmp_path, program=(sys.executable, "astera_lite.pyz")) as (_, url, _):
        assert Api(url).counts()["running"] == 0
    (tmp_path / "schema.sql").unlink()
    run(*command, folder=tmp_path, code=1)


@pytest.mark.parametrize(("part", "spoiled"), [("astera_lite.pyc", b"\0\0\0\0"), ("astera_lite.py", b"no Python")])
def test_the_zipapp_has_bytecode_for_this_python_and_source_for_others(
    built: Built, tmp_path: Path, part: str, spoiled: bytes
) -> None:
    with zipfile.ZipFile(tmp_path / "other.pyz", "w") as file:
        for name, data in members(built.pyz).items():
            file.writestr(name, spoiled + data[len(spoiled) :] if name == part else data)
    assert run(sys.executable, "other.pyz", "--version", folder=tmp_path) == f"Astera Lite {__version__}\n"


def test_a_program_that_embeds_it_is_type_checked(built: Built, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from astera_lite import AsteraLite, Context, Server\n\n"
        "def late(context: Context) -> None:\n    context.sleep('1')\n\n"
        "with AsteraLite(database='jobs.db') as app, Server(app, port=0) as server:\n"
        "    job = app.submit('hello', {'name': 'Ada'})\n"
        "    reveal_type((server.url, app.wait(job.id).status, app.result(job.id).status_code))\n"
        "    app.wait(7)\n"
    )
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable", built.bin / "python"]
    said = run(*mypy, program, folder=tmp_path, code=1)
    assert 'Revealed type is "tuple[str, astera_lite.Status, int]"' in said
    assert 'Argument 1 to "wait" of "AsteraLite" has incompatible type "int"; expected "str | Job"' in said
    assert 'Argument 1 to "sleep" of "Context" has incompatible type "str"; expected "float"' in said
    assert "Found 2 errors" in said
