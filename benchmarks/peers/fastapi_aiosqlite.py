"""FastAPI with aiosqlite: `async def` paths, one connection for the application, a transaction for each write.

With MIXED=1 in the environment nothing keeps the transactions of concurrent requests apart on that connection: a commit
takes along what others have begun, so fewer reach the disk, and a rollback would undo them too.
"""

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import aiosqlite
from fastapi import BackgroundTasks, FastAPI, HTTPException, Request, Response
from pydantic import BaseModel


class Pad(BaseModel):
    pad: str


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with aiosqlite.connect("peer.db") as db:
        await db.execute("PRAGMA journal_mode = WAL")
        await db.execute("PRAGMA synchronous = FULL")
        await db.execute(
            "CREATE TABLE jobs (id TEXT PRIMARY KEY, status TEXT, created REAL, request TEXT, result TEXT)"
        )
        await db.commit()
        app.state.db = db
        yield


app = FastAPI(lifespan=lifespan)
transaction = nullcontext() if os.environ.get("MIXED") else asyncio.Lock()


async def run(db: aiosqlite.Connection, job: str, a: int, b: str, body: dict[str, Any]) -> None:
    result = json.dumps({"a": a, "b": b, "body": body})
    async with transaction:
        await db.execute("UPDATE jobs SET status = 'Completed', result = ? WHERE id = ?", (result, job))
        await db.commit()


@app.post("/submit", status_code=202)
async def submit(a: int, b: str, body: Pad, ask: Request, answer: Response, tasks: BackgroundTasks) -> dict[str, Any]:
    db, job = ask.app.state.db, str(uuid.uuid4())
    request = json.dumps({"a": a, "b": b, "body": body.model_dump()})
    async with transaction:
        await db.execute("INSERT INTO jobs VALUES (?, 'Running', ?, ?, NULL)", (job, time.time(), request))
        await db.commit()
    tasks.add_task(run, db, job, a, b, body.model_dump())
    answer.headers["Location"] = f"/jobs/{job}/status"
    return {"id": job, "status": "Running"}


@app.get("/jobs/{job}/status")
async def status(job: str, ask: Request) -> dict[str, Any]:
    async with ask.app.state.db.execute("SELECT status FROM jobs WHERE id = ?", (job,)) as cursor:
        row = await cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return {"id": job, "status": row[0]}


@app.get("/jobs/{job}/result")
async def result(job: str, ask: Request) -> Response:
    async with ask.app.state.db.execute("SELECT result FROM jobs WHERE id = ?", (job,)) as cursor:
        row = await cursor.fetchone()
    if row is None or row[0] is None:
        raise HTTPException(404)
    return Response(row[0], media_type="application/json")


@app.post("/sync")
async def sync(a: int, b: str, body: Pad) -> dict[str, Any]:
    return {"a": a, "b": b, "body": body}
