"""Fixtures of every test."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from nodes import CURE, Cluster, postgres_bin
from support import Sink, databases

# Hundreds of tests start Python. It compiles nothing that has been compiled, whatever the environment says.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A signal that is ignored stays so in the programs that the tests start: nohup ignores SIGHUP, `&` in a script SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

#: What takes long by nature and does not depend on the version of Python: whole files, or tests by name. A plain run
#: leaves them out; `pytest -m slow` runs them, as .ci/run does once.
SLOW = {
    "test_broken_flows.py": ("test_with_any_node_replaced_a_shipped_file_is_well_or_has_faults",),
    "test_console.py": (),
    "test_crash.py": ("test_a_kill_while_the_database_is_made_leaves_what_the_next_start_takes",),
    "test_deploy.py": ("test_two_servers_behind_nginx", "test_two_servers_through_pgbouncer_in_session_mode"),
    "test_docs.py": (),
    "test_docs_embedding.py": ("test_the_programs_are_well_typed",),
    "test_engine.py": ("test_waiting_jobs_take_memory_by_their_bytes_and_not_by_their_parsed_values",),
    "test_flows.py": ("test_whatever_stands_anywhere_in_a_file_is_a_fault_and_never_a_crash",),
    "test_framing.py": (
        "test_the_same_requests_are_read_however_the_bytes_are_cut",
        "test_what_the_server_takes_for_a_request_an_honest_parser_takes_for_the_same",
    ),
    "test_hostile_input.py": ("test_what_a_pattern_keeps_in_memory_is_bounded",),
    "test_nodes.py": (),
    "test_openapi.py": (
        "test_a_client_in_python_is_generated_checked_and_calls",
        "test_a_client_in_typescript_is_generated_compiled_and_calls",
        "test_the_server_does_what_the_document_says",
        "test_the_server_does_what_the_document_says_where_a_token_is_wanted",
    ),
    "test_outages.py": (),
    "test_packaging.py": ("test_a_program_that_embeds_it_is_type_checked",),
    "test_postman.py": (
        "test_a_redirect_is_an_answer_and_a_variable_in_an_example_is_text",
        "test_flows_of_every_kind_run_green",
        "test_names_of_query_parameters_are_sent_as_they_are",
        "test_the_collection_of_the_repository_runs_green",
        "test_the_collection_runs_green_where_a_token_is_wanted",
    ),
    "test_storage_faults.py": ("test_a_disk_that_is_full_when_a_server_starts_again",),
    "test_storm.py": (),
    "test_terminal.py": (),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = SLOW.get(item.path.name)
        if names is not None and (not names or item.name.partition("[")[0] in names):
            item.add_marker(pytest.mark.slow)
    # A worker has a file at a time: those that take longest begin first, so that none is alone at the end.
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (SLOW.get(item.path.name) != (), -tests[item.path]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `both_stores` run on SQLite and on PostgreSQL, if they have a folder and are not marked `sqlite`.

    On PostgreSQL they run once, among the slow ones; test_store_postgres.py and test_shared.py run with every Python.
    """
    marks = {mark.name for mark in metafunc.definition.iter_markers()}
    if "both_stores" in marks and "sqlite" not in marks and "tmp_path" in metafunc.fixturenames:
        second = pytest.param("postgresql", marks=pytest.mark.slow)
        metafunc.parametrize("_database", ["sqlite", second], indirect=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL of these tests."""
    if postgres_bin() is None:
        pytest.skip(CURE)
    pytest.importorskip("psycopg", reason="the driver is missing: pip install psycopg[binary]")
    import psycopg

    def execute(connection: Any, *arguments: Any, **keywords: Any) -> Any:
        """A database that takes its time must not hold up other connections of the server."""
        assert threading.current_thread().name != "astera-loop", "the loop asks the database"
        return usual(connection, *arguments, **keywords)

    usual, psycopg.Connection.execute = psycopg.Connection.execute, execute
    made = Cluster.made()
    yield made
    made.remove()
    psycopg.Connection.execute = usual


@pytest.fixture(autouse=True)
def _database(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where the servers of a test have their database: each folder one of its own."""
    if getattr(request, "param", "sqlite") == "sqlite":
        yield
        return
    cluster: Cluster = request.getfixturevalue("cluster")
    urls: dict[Path, str] = {}

    def url_of(folder: Path) -> str:
        if folder not in urls:
            urls[folder] = cluster.create(f"test-{next(_numbers)}")
        return urls[folder]

    with databases(url_of):
        yield


_numbers = itertools.count()

# the same examples every time, however slow the machine
hypothesis.settings.register_profile("ours", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("ours")


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as receiver:
        yield receiver


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    command = shutil.which("openssl")
    if command is None:
        pytest.skip("a certificate is made by the openssl command, which is not here")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    made = subprocess.run(
        [
            command, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-keyout", key, "-out", cert, "-subj", "/CN=localhost",
            "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
        ],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"openssl makes no certificate: {made.stderr[-200:]}")
    return cert, key
