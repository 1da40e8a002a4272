"""Fixtures of every test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

import hypothesis
import pytest
from support import Sink

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
