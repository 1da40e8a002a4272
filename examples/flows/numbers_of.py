"""Functions for the flow `primes`."""

from __future__ import annotations

from typing import Any


def primes(context: Any, below: int) -> int:
    """How many primes there are below a number: a sieve, a part at a time, so that progress shows."""
    sieve = bytearray([1]) * below
    sieve[:2] = bytes(min(below, 2))
    root = int(below**0.5)
    for number in range(2, root + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, below, number)))
        if number % 100 == 0:
            context.progress(number, root)
    return sum(sieve)
