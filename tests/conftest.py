"""Fixtures of every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import Sink


@pytest.fixture
def sink() -> Iterator[Sink]:
    with Sink() as receiver:
        yield receiver
