"""What only a store of several servers has, without a server."""

from __future__ import annotations

import queue
from contextlib import closing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodes import Cluster


def test_a_server_that_was_alone_tells_one_that_came_later(cluster: Cluster) -> None:
    """It tells of a change at once, not only after its next renewal of the lease (20 minutes away here)."""
    from astera_lite_postgres import PostgresStore

    url = cluster.create("test-came-later")
    met: queue.Queue[str] = queue.Queue()
    heard: queue.Queue[str] = queue.Queue()
    with closing(PostgresStore(url, lease=3600)) as first:
        first.open(met.put, dict)
        for _ in range(5):  # all that it may have missed before it listened
            met.get(timeout=10)
        with closing(PostgresStore(url, lease=3600)) as second:
            assert met.get(timeout=10) == "jobs"
            second.open(heard.put, dict)
            for _ in range(5):
                heard.get(timeout=10)
            first.close()
            assert heard.get(timeout=10) == "jobs"
