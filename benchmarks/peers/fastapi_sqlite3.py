"""FastAPI with sqlite3 in its thread pool: plain `def` paths, a connection kept for each thread, BackgroundTasks."""

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import BackgroundTasks, FastAPI, HTTPException, Response
from pydantic import BaseModel


class Pad(BaseModel):
    pad: str


kept = threading.local()


def connect() -> sqlite3.Connection:
    """The connection of the calling thread."""
    if not hasattr(kept, "db"):
        kept.db = sqlite3.connect("peer.db", timeout=30)
        kept.db.execute("PRAGMA synchronous = FULL")
    db: sqlite3.Connection = kept.db
    return db


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    db = connect()
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, status TEXT, created REAL, request TEXT, result TEXT)")
    db.commit()
    yield


app = FastAPI(lifespan=lifespan)


def run(job: str, a: int, b: str, body: dict[str, Any]) -> None:
    db, result = connect(), json.dumps({"a": a, "b": b, "body": body})
    db.execute("UPDATE jobs SET status = 'Completed', result = ? WHERE id = ?", (result, job))
    db.commit()


@app.post("/submit", status_code=202)
def submit(a: int, b: str, body: Pad, response: Response, tasks: BackgroundTasks) -> dict[str, Any]:
    db, job = connect(), str(uuid.uuid4())
    request = json.dumps({"a": a, "b": b, "body": body.model_dump()})
    db.execute("INSERT INTO jobs VALUES (?, 'Running', ?, ?, NULL)", (job, time.time(), request))
    db.commit()
    tasks.add_task(run, job, a, b, body.model_dump())
    response.headers["Location"] = f"/jobs/{job}/status"
    return {"id": job, "status": "Running"}


@app.get("/jobs/{job}/status")
def status(job: str) -> dict[str, Any]:
    row = connect().execute("SELECT status FROM jobs WHERE id = ?", (job,)).fetchone()
    if row is None:
        raise HTTPException(404)
    return {"id": job, "status": row[0]}


@app.get("/jobs/{job}/result")
def result(job: str) -> Response:
    row = connect().execute("SELECT result FROM jobs WHERE id = ?", (job,)).fetchone()
    if row is None or row[0] is None:
        raise HTTPException(404)
    return Response(row[0], media_type="application/json")


@app.post("/sync")
def sync(a: int, b: str, body: Pad) -> dict[str, Any]:
    return {"a": a, "b": b, "body": body}
