"""Fixtures of every test."""

from __future__ import annotations

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
