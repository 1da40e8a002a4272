"""Starlette as fast as it gets: whatever waits is committed together in a thread, jobs run in the loop, reads too."""

import asyncio
import json
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Write = tuple[str, tuple[Any, ...], asyncio.Future[None]]


def connect() -> sqlite3.Connection:
    db = sqlite3.connect("peer.db", isolation_level=None, check_same_thread=False)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    return db


class Writer:
    """Commits in one transaction whatever has come since the last one began."""

    def __init__(self) -> None:
        self.db = connect()
        self.queue: asyncio.Queue[Write] = asyncio.Queue()

    async def write(self, sql: str, *values: Any) -> None:
        """Return once it is on disk."""
        done = asyncio.get_running_loop().create_future()
        self.queue.put_nowait((sql, values, done))
        await done

    def commit(self, batch: list[Write]) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        for sql, values, _ in batch:
            self.db.execute(sql, values)
        self.db.execute("COMMIT")

    async def serve(self) -> None:
        while True:
            batch = [await self.queue.get()]
            while not self.queue.empty():
                batch.append(self.queue.get_nowait())
            await asyncio.to_thread(self.commit, batch)
            for _, _, done in batch:
                done.set_result(None)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.reader = connect()
    app.state.reader.execute(
        "CREATE TABLE jobs (id TEXT PRIMARY KEY, status TEXT, created REAL, request TEXT, result TEXT)"
    )
    app.state.writer, app.state.tasks = Writer(), set()
    serving = asyncio.create_task(app.state.writer.serve())
    yield
    serving.cancel()


async def checked(request: Request) -> dict[str, Any]:
    try:
        a, b, body = int(request.query_params["a"]), request.query_params["b"], await request.json()
    except (KeyError, ValueError) as error:
        raise HTTPException(400) from error
    if not isinstance(body, dict):
        raise HTTPException(400)
    return {"a": a, "b": b, "body": body}


async def run(writer: Writer, job: str, given: dict[str, Any]) -> None:
    await writer.write("UPDATE jobs SET status = 'Completed', result = ? WHERE id = ?", json.dumps(given), job)


async def submit(request: Request) -> Response:
    given, job, state = await checked(request), str(uuid.uuid4()), request.app.state
    await state.writer.write("INSERT INTO jobs VALUES (?, 'Running', ?, ?, NULL)", job, time.time(), json.dumps(given))
    task = asyncio.create_task(run(state.writer, job, given))
    state.tasks.add(task)  # the loop itself keeps only a weak reference
    task.add_done_callback(state.tasks.discard)
    return JSONResponse({"id": job, "status": "Running"}, 202, {"Location": f"/jobs/{job}/status"})


def row(request: Request) -> tuple[str, str | None]:
    sql = "SELECT status, result FROM jobs WHERE id = ?"
    found = request.app.state.reader.execute(sql, (request.path_params["job"],)).fetchone()
    if found is None:
        raise HTTPException(404)
    return found


async def status(request: Request) -> Response:
    return JSONResponse({"id": request.path_params["job"], "status": row(request)[0]})


async def result(request: Request) -> Response:
    text = row(request)[1]
    if text is None:
        raise HTTPException(404)
    return Response(text, media_type="application/json")


async def sync(request: Request) -> Response:
    return JSONResponse(await checked(request))


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/submit", submit, methods=["POST"]),
        Route("/jobs/{job}/status", status),
        Route("/jobs/{job}/result", result),
        Route("/sync", sync, methods=["POST"]),
    ],
)
