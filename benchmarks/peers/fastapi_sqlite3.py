"""FastAPI with sqlite3 in its thread pool: plain `def` paths, a connection for each request, BackgroundTasks."""

import json
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Response
from pydantic import BaseModel


class Pad(BaseModel):
    pad: str


def connect() -> Iterator[sqlite3.Connection]:
    db = sqlite3.connect("peer.db", timeout=30, check_same_thread=False)
    db.execute("PRAGMA synchronous = FULL")
    try:
        yield db
    finally:
        db.close()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    for db in connect():
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE jobs (id TEXT PRIMARY KEY, status TEXT, created REAL, request TEXT, result TEXT)")
        db.commit()
    yield


app = FastAPI(lifespan=lifespan)
Db = Annotated[sqlite3.Connection, Depends(connect)]


def run(job: str, a: int, b: str, body: dict[str, Any]) -> None:
    for db in connect():
        result = json.dumps({"a": a, "b": b, "body": body})
        db.execute("UPDATE jobs SET status = 'Completed', result = ? WHERE id = ?", (result, job))
        db.commit()


@app.post("/submit", status_code=202)
def submit(a: int, b: str, body: Pad, response: Response, tasks: BackgroundTasks, db: Db) -> dict[str, Any]:
    job = str(uuid.uuid4())
    request = json.dumps({"a": a, "b": b, "body": body.model_dump()})
    db.execute("INSERT INTO jobs VALUES (?, 'Running', ?, ?, NULL)", (job, time.time(), request))
    db.commit()
    tasks.add_task(run, job, a, b, body.model_dump())
    response.headers["Location"] = f"/jobs/{job}/status"
    return {"id": job, "status": "Running"}


@app.get("/jobs/{job}/status")
def status(job: str, db: Db) -> dict[str, Any]:
    row = db.execute("SELECT status FROM jobs WHERE id = ?", (job,)).fetchone()
    if row is None:
        raise HTTPException(404)
    return {"id": job, "status": row[0]}


@app.get("/jobs/{job}/result")
def result(job: str, db: Db) -> Response:
    row = db.execute("SELECT result FROM jobs WHERE id = ?", (job,)).fetchone()
    if row is None or row[0] is None:
        raise HTTPException(404)
    return Response(row[0], media_type="application/json")


@app.post("/sync")
def sync(a: int, b: str, body: Pad) -> dict[str, Any]:
    return {"a": a, "b": b, "body": body}
