"""What several servers on one PostgreSQL do while it is away, and when it comes back: real processes, real outages."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests
import test_nodes
from nodes import Cluster, Node, Peer, Proxy, database_name, database_url, nodes, say
from support import get_flow, until
from test_nodes import (
    GATE,
    HANG_S,
    HOLD,
    LEASE,
    LEASE_S,
    Load,
    call,
    calls_counted,
    documents,
    done,
    ended,
    hold,
    hold_call,
    marking,
    marks,
    stop_cleanly,
    unwell,
    well,
    write,
)

pytestmark = test_nodes.pytestmark
database, folder = test_nodes.database, test_nodes.folder


def test_a_database_that_crashes_under_load_loses_nothing_that_was_accepted(folder: Path) -> None:
    cluster = Cluster.made()
    try:
        with Peer() as peer, nodes(folder, cluster.url(), ["a", "b", "c"], *LEASE) as members:
            windows = []
            with Load(members, f"{peer.url}/hook") as load:
                for _ in range(3):
                    load.reach(200)
                    crashed = time.monotonic()
                    cluster.stop("immediate")
                    reasons = [unwell(node) for node in members]
                    cluster.start()
                    back = time.monotonic()
                    for node in members:
                        well(node)
                    load.reach(200)
                    windows.append((back - crashed, load.refused(crashed)))
            load.check(members[0].api, folder, peer)
            stop_cleanly(members)
        say(
            "database crashed",
            **load.figures(),
            down_s=[round(down, 2) for down, _ in windows],
            refused_s=[round(refused, 2) for _, refused in windows],
            reasons=sorted(set(reasons)),
        )
    finally:
        cluster.remove()


def test_a_standby_takes_over_from_a_primary_that_is_lost(folder: Path) -> None:
    with ExitStack() as stack:
        primary = Cluster.made(tcp=True)
        stack.callback(primary.remove)
        standby = primary.standby()
        stack.callback(standby.remove)
        addresses = [("127.0.0.1", primary.port), ("127.0.0.1", standby.port)]
        url = database_url(addresses, target_session_attrs="read-write")
        peer = stack.enter_context(Peer())
        members = stack.enter_context(nodes(folder, url, ["a", "b", "c"], *LEASE))
        with Load(members, f"{peer.url}/hook") as load:
            load.reach(300)
            lost = time.monotonic()
            primary.stop("immediate")
            reasons = [unwell(node) for node in members]
            standby.promote()
            promoted = time.monotonic()
            for node in members:
                well(node)
            healthy = time.monotonic()
            load.reach(300)
        load.check(members[0].api, folder, peer)
        stop_cleanly(members)
        say(
            "standby promoted",
            **load.figures(),
            promoted_after_s=round(promoted - lost, 2),
            healthy_after_promotion_s=round(healthy - promoted, 2),
            refused_s=round(load.refused(lost), 2),
            reasons=sorted(set(reasons)),
        )


def test_a_synchronous_standby_that_is_lost_stops_accepts_but_hangs_nothing(folder: Path) -> None:
    with ExitStack() as stack:
        primary = Cluster.made(tcp=True)
        stack.callback(primary.remove)
        standby = primary.standby()
        stack.callback(standby.remove)
        a, b = stack.enter_context(nodes(folder, primary.url(), ["a", "b"], *LEASE))
        running = hold(a)
        standby.stop("immediate")
        lost = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            path = "api/publishingAsync/single?n=1"
            answers = list(pool.map(lambda node: requests.get(f"{node.url}/{path}", timeout=HANG_S), (a, b)))
        assert [answer.status_code for answer in answers] == [503, 503]
        waited = time.monotonic() - lost
        reasons = [unwell(node) for node in (a, b)]
        assert all("standby" in reason for reason in reasons), reasons
        (folder / "go").touch()  # its end is to be stored
        standby.start()
        back = time.monotonic()
        for node in (a, b):
            well(node)
        healthy = time.monotonic() - back
        b.api.finished(running)
        assert done(folder, running).count("after") == 1
        for node in (a, b):
            assert node.api.finished(node.api.submit("/single", n=2))["attempt"] == 1
        ended(a.api)
        for document in documents(a.api).values():
            assert document["status"] == "Completed", document
    say("standby lost", slowest_503_s=round(waited, 2), well_after_s=round(healthy, 2), reasons=sorted(set(reasons)))


@pytest.mark.parametrize("how", ["refuse", "silence"])
def test_a_node_that_cannot_reach_the_database_says_why_and_recovers(
    folder: Path, cluster: Cluster, database: str, how: str
) -> None:
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(cluster.address))
        cut_off = database_url([("127.0.0.1", proxy.port)], database_name(database))
        a = stack.enter_context(Node(folder, "a", cut_off, *LEASE))
        b = stack.enter_context(Node(folder, "b", database, *LEASE))
        a.begin()
        b.start()
        a.ready()
        running = hold(a)
        cut = time.monotonic()
        proxy.cut(how)
        answered = []
        reasons: list[str] = []
        # Its job is taken over; meanwhile it answers, and says what is wrong.
        while not any(mark.pid == b.pid for mark in marks(folder)[running]):
            began = time.monotonic()
            assert began - cut < 60, "nobody takes the job over"
            submitted = requests.get(f"{a.url}/api/publishingAsync/single?n=1", timeout=HANG_S)
            assert submitted.status_code == 503, submitted.text
            answered.append(time.monotonic() - began)
            reasons.append(unwell(a))
        taken = next(mark.at for mark in marks(folder)[running] if mark.pid == b.pid) - cut
        assert a.api.job(running)["status"] == "Running"  # which it is: its own run, or the other one
        assert requests.get(f"{a.url}/api/jobs", timeout=HANG_S).status_code == 503
        assert b.api.job(running)["status"] == "Running"
        (folder / "go").touch()
        document = b.api.finished(running)
        mended = time.monotonic()
        proxy.mend()
        well(a)
        recovered = time.monotonic() - mended
        assert a.api.finished(a.api.submit("/single", n=2))["attempt"] == 1
        assert a.api.job(running)["finishedAt"] == document["finishedAt"]
        assert a.api.job(running)["attempt"] == document["attempt"] == 2
        assert done(folder, running).count("after") == 1
        assert "Traceback" not in a.said(), a.said()
        assert a.stop() == 0
    say(
        f"cut off ({how})",
        slowest_503_s=round(max(answered), 2),
        taken_over_after_s=round(taken, 2),
        well_after_s=round(recovered, 2),
        reason=reasons[-1],
    )


def test_a_node_that_is_cut_off_for_less_than_its_lease_goes_on(folder: Path, cluster: Cluster, database: str) -> None:
    with Proxy(cluster.address) as proxy:
        url = database_url([("127.0.0.1", proxy.port)], database_name(database))
        with nodes(folder, url, ["a"], "--lease", "1h") as (a,):
            running = hold(a)
            proxy.cut("refuse")
            assert requests.get(f"{a.url}/api/publishingAsync/single?n=1", timeout=HANG_S).status_code == 503
            (folder / "go").touch()
            until(lambda: "through" in done(folder, running))  # what it brought is yet to be stored
            proxy.mend()
            assert a.api.finished(running)["attempt"] == 1
            assert done(folder, running) == ["held", "through", "after"]


@pytest.mark.parametrize("how", ["refuse", "silence"])
def test_calls_of_a_limited_flow_are_refused_where_the_database_cannot_be_reached(
    folder: Path, cluster: Cluster, database: str, how: str
) -> None:
    flow = get_flow("/one", request=GATE, steps=[HOLD], concurrency=1)
    write(folder / "flows", {"one": flow, "free": get_flow("/free", steps=[marking("begin")])})
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(4))
        proxy = stack.enter_context(Proxy(cluster.address))
        cut_off = database_url([("127.0.0.1", proxy.port)], database_name(database))
        a = stack.enter_context(Node(folder, "a", cut_off, *LEASE)).start()
        b = stack.enter_context(Node(folder, "b", database, *LEASE)).start()
        running = hold_call(pool, a, folder)
        waiting = pool.submit(call, a, "/one")
        until(lambda: calls_counted(database) == 2)
        cut = time.monotonic()
        proxy.cut(how)
        fresh = call(a, "/one")
        refused = time.monotonic() - cut
        assert (waiting.result().status_code, fresh.status_code) == (503, 503), (waiting.result().text, fresh.text)
        assert "Retry-After" in fresh.headers
        assert call(a, "/free").status_code == 200
        elsewhere = pool.submit(call, b, "/one")  # the lease of the other one runs out
        until(lambda: len(marks(folder)) == 3, LEASE_S + 20)
        (folder / "go").touch()
        assert elsewhere.result().status_code == 200
        assert running.result().status_code == 200  # it cannot be undone
        answered = time.monotonic() - cut
        proxy.mend()
        well(a)
        until(lambda: call(a, "/one").status_code == 200)
        until(lambda: calls_counted(database) == 0)
        assert "Traceback" not in a.said(), a.said()
        assert a.stop() == 0
    say(
        f"calls of a node that is cut off ({how})",
        refused_after_s=round(refused, 2),
        answered_after_s=round(answered, 2),
    )
