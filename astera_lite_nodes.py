"""The work of a server that shares its database with others: news of the others, and what follows from the news.

A wing of astera_lite, which loads this file where `database` is the address of a PostgreSQL database.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, cast

from astera_lite import (
    NO_ROOM,
    STOPPED,
    Application,
    AsteraError,
    Busy,
    Claimed,
    Clock,
    Fault,
    Flow,
    FlowError,
    Job,
    JobKey,
    JobKeys,
    Outcome,
    Progress,
    Run,
    State,
    StoreError,
    Submission,
    await_write,
    log,
    optional,
    parse_flow_text,
)

_Refusal = Outcome | AsteraError
_PAUSE_S = 0.01  # pause between two looks at the news, which collects news that arrive together
_SIZE_EVERY_S = 60.0  # PostgreSQL adds up the sizes of all files: a millisecond


class DatabaseClock(Clock):
    """The time of the database, the same for all servers. It does not jump with a server's own clock."""

    source: Callable[[], int] | None = None  # milliseconds since the epoch; None: the store is not open yet

    def now(self) -> int:
        """The time of the database."""
        return super().now() if self.source is None else self.source()

    def wall(self) -> int:
        """The time of the database, which people and other machines see, too."""
        return self.now()

    def look(self) -> int:
        """Return 0: there is no jump."""
        return 0


class Node:
    """This server as one of several. `start` it when the application is built, and `stop` it before the store."""

    def __init__(self, app: Application) -> None:
        self.app = app
        self._store = cast(Any, app.store)  # with the methods that only a shared store has
        self.rows: dict[str, str] = dict(self._store.deployed())  # text of the shared flows, by name
        self.members: list[dict[str, Any]] = []  # servers, as of the last second, for /health and the console
        self.size = 0  # bytes of the database, as of the last minute
        self._size_at = -math.inf  # when that was, monotonic
        #: Work of once a second, because news may be lost.
        self.chores = (self.read_flows, self.cancel_asked, self.read_members, self.end_overdue_calls)
        self._call_numbers = itertools.count()
        self._may_be_free = True  # jobs that no server owns
        self._news: deque[str] = deque()
        self._woken = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._follow, name="astera-nodes", daemon=True)
        app.deployer.shared = self.flows
        if isinstance(app.clock, DatabaseClock):
            app.clock.source = self._store.now

    def start(self) -> None:
        """Join the servers: announce this one, and listen to the others."""
        self._thread.start()
        self._store.open(self.tell, self.progress)
        self.read_members()

    def stop(self, timeout_s: float) -> None:
        """Stop following the news."""
        self._stopping = True
        self._woken.set()
        self._thread.join(timeout_s)

    def hand_over(self) -> None:
        """Begin to stop: begin nothing any more, and leave jobs without a thread to the other servers."""
        queue = self.app.engine.queue
        with queue.changed:
            queue.stopping = True
            without = (State.READY, State.WAITING)
            jobs = [entry for entry in queue.entries.values() if entry.number >= 0 and entry.state in without]
            for entry in jobs:
                queue.move(entry, State.GONE)
        if jobs:
            self._store.release([entry.number for entry in jobs])
        for number in list(self._store.calls):
            self._store.answer_call(number, STOPPED)

    # --- news ---

    def tell(self, word: str) -> None:
        """Let the thread act soon on a kind of news: jobs, ends, cancel, flows, tokens or lost. Any thread may call."""
        self._news.append(word)
        self._woken.set()

    def _follow(self) -> None:
        """The loop of the thread."""
        follow: dict[str, Callable[[], object]] = {
            "lost": self.abandon,
            "cancel": self.cancel_asked,
            "jobs": self._look_for_jobs,
            "ends": self.app.tell_watchers,
            "flows": self.read_flows,
            "tokens": self.app.read_tokens,
        }
        while not self._stopping:
            self._woken.wait()
            self._woken.clear()
            words = {self._news.popleft() for _ in range(len(self._news))}
            for word in follow:
                try:
                    if word in words and not self._stopping:
                        follow[word]()
                except StoreError as error:  # the chore of each second tries again
                    log.debug("news of other servers (%s): %s", word, error)
                except Exception:  # a fault of this program must not end the thread
                    log.exception("news of other servers (%s)", word)
            time.sleep(_PAUSE_S)

    # --- jobs ---

    def placed(self, submission: Submission, flow: Flow) -> Submission:
        """Leave a new job to any server if this one has no room, or if the flow's limit counts on all servers."""
        queue = self.app.engine.queue
        owned = flow.limit is None and queue.queued <= queue.workers
        if not owned:  # now, for once it is stored any server may claim it, this one, too
            queue.dismiss(submission.job.key.seq)
        return submission._replace(owned=owned, limit=flow.limit if flow.when_full == "refuse" else None)

    def claim(self) -> list[Claimed]:
        """Take free jobs of flows that this server publishes, as many as the engine has room for."""
        queue, flows = self.app.engine.queue, self.app.deployments.by_name.values()
        room = 0 if queue.stopping else 2 * queue.workers - queue.queued
        if room <= 0:
            return []
        limits = {flow.name: flow.limit for flow in flows}
        found: list[Claimed] = self._store.claim(queue, room, limits)
        # a flow that runs as often as it may leaves jobs for which there is room at the next end
        self._may_be_free = bool(found) or any(limits.values())
        return found

    def _look_for_jobs(self) -> None:
        self._may_be_free = True
        self.app.take_up()

    def has_room(self) -> None:
        """After the end of a run: look for waiting jobs, if there may be some."""
        queue = self.app.engine.queue
        if self._may_be_free and queue.queued < queue.workers and "jobs" not in self._news:
            self.tell("jobs")

    def cancel(self, job: Job) -> bool:
        """Let the owner of a job that is not in this engine cancel the job; True, because it may end soon."""
        await_write(partial(self._store.ask_cancel, job.key))
        self.cancel_asked()  # if no server owned the job, this server owns it now
        return True

    def cancel_asked(self) -> None:
        """Cancel jobs of this server whose cancellation was requested on another server."""
        for job in self._store.cancelled():
            self.app.engine.cancel(job)

    def abandon(self) -> None:
        """Drop the jobs in hand that may be another server's by now; nothing of their runs is written any more."""
        queue = self.app.engine.queue
        with queue.changed:
            held = [entry for entry in queue.entries.values() if entry.number >= 0 and entry.state is not State.NEW]
            jobs = [entry for entry in held if not self._store.owns(entry.number)]  # others were taken since
            for entry in jobs:
                if entry.cancel is not None:
                    entry.cancel.set()
                queue.move(entry, State.GONE)
        words = "this server did not renew its lease in time: %d jobs are left to the other servers"
        log.warning(words, len(jobs))
        keys = JobKeys(self.app.keys.last, self._store.node, self._store.nodes)
        self.app.keys = keys  # it is another start, with another number
        self._look_for_jobs()

    def progress(self) -> dict[int, Progress]:
        """The progress of running jobs, by `seq`."""
        running = [(entry.number, entry.run) for entry in self.app.engine.queue.running() if entry.number >= 0]
        return {seq: run.progress for seq, run in running if run is not None and run.progress is not None}

    def progress_of(self, key: JobKey) -> Progress | None:
        """The progress of a job that runs on another server."""
        return None if key.seq in self.app.engine.queue else cast(Progress | None, self._store.progress(key))

    # --- synchronous calls of flows whose limit counts on all servers ---

    def run_sync(self, run: Run, done: Callable[[_Refusal], None]) -> None:
        """Have the engine run a flow when the limit leaves room; `done` gets the outcome, Busy or StoreError."""
        number = next(self._call_numbers)

        def begin(refusal: _Refusal | None) -> None:
            try:
                if refusal is None:
                    self.app.engine.run_sync(run, end)
            except Busy as busy:
                refusal = busy
            if refusal is not None:
                end(refusal)

        def end(outcome: _Refusal) -> None:  # who sees the end may call the flow at once, on any server
            self._store.leave_call(number, lambda *_: done(outcome))

        self._enter(number, run, begin)

    def run_here(self, run: Run) -> Outcome:
        """Run a flow on the calling thread when the limit leaves room; raises Busy, StoreError."""
        number, answers = next(self._call_numbers), SimpleQueue[_Refusal | None]()
        self._enter(number, run, answers.put)
        try:
            refusal = answers.get()
            if isinstance(refusal, AsteraError):
                raise refusal
            return refusal or self.app.engine.run_here(run)
        finally:
            await_write(partial(self._store.leave_call, number))

    def _enter(self, number: int, run: Run, tell: Callable[[_Refusal | None], None]) -> None:
        """Wait until the limit leaves room for a call; `tell` gets None then, or why the call cannot begin."""
        if self.app.engine.queue.stopping:
            raise Busy("The server is stopping.", 5)
        self._store.enter_call(number, run.flow, run.deadline, tell)

    def end_overdue_calls(self) -> None:
        """Answer calls that waited too long."""
        now = self.app.clock.monotonic()
        for number, (_, deadline, _) in list(self._store.calls.items()):
            if deadline <= now:
                self._store.answer_call(number, NO_ROOM)

    # --- flows ---

    def read_flows(self) -> None:
        """Publish flows that were deployed on another server."""
        if dict(self._store.deployed()) == self.rows:
            return
        with self.app.deployer.changing:
            rows = dict(self._store.deployed())  # again: what was read above may have been replaced meanwhile
            if rows != self.rows:
                before, self.rows = self.rows, rows
                try:
                    self.app.deployer.reload()
                except BaseException:  # the next look is to try again
                    self.rows = before
                    raise
                log.info("read the flows again%s", optional("astera_lite_notices:on_reload", self.app.deployments))

    def flows(self) -> tuple[list[Flow], list[Fault]]:
        """The shared flows, and their faults; a flow whose new text is faulty stays in service."""
        deployer, flows, faults = self.app.deployer, list[Flow](), list[Fault]()
        for name, text in self.rows.items():
            file = f"{name}.json"
            try:
                if name not in deployer.own:
                    flows.append(deployer.build(parse_flow_text(text, file), name, file))
            except FlowError as error:
                faults += error.faults
                flows += [flow for flow in [deployer.deployments.by_name.get(name)] if flow is not None]
        return flows, faults

    def deploy(self, name: str, text: str | None) -> None:
        """Deploy a flow on all servers, or remove it there if the text is None; raises StoreError."""
        await_write(partial(self._store.deploy, name, text))
        self.read_flows()

    # --- what people see ---

    def read_members(self) -> None:
        """Read the list of servers and the size of the database."""
        self.members, now = self._store.members(), time.monotonic()
        if now >= self._size_at + _SIZE_EVERY_S:
            self.size, self._size_at = self._store.size(), now
