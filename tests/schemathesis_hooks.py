"""What schemathesis must not send, for no schema of the document can say that it is refused."""

from __future__ import annotations

from typing import Any

import schemathesis


def _within_64_bits(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_within_64_bits, value.values()))
    if isinstance(value, list):
        return all(map(_within_64_bits, value))
    return not isinstance(value, int) or -(1 << 63) <= value < 1 << 63


@schemathesis.hook
def filter_body(context: Any, body: Any) -> bool:
    """Integers beyond 64 bits are refused wherever they stand, also inside what a flow does not describe."""
    return _within_64_bits(body)
