"""FastAPI with Procrastinate on PostgreSQL: paths defer jobs, its worker runs them and stores results in a table."""

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Response
from procrastinate import App, JobContext, PsycopgConnector
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel


def unchecked(**given: Any) -> AsyncConnectionPool:
    """A pool that does not ask the server, each time before a connection is used, whether it is still there."""
    return AsyncConnectionPool(**{**given, "check": None})


queue = App(
    connector=PsycopgConnector(pool_factory=unchecked, conninfo=os.environ["DATABASE_URL"], min_size=4, max_size=20)
)


class Pad(BaseModel):
    pad: str


def pool() -> AsyncConnectionPool:
    connector = queue.connector
    assert isinstance(connector, PsycopgConnector)
    return connector.pool


@queue.task(pass_context=True)
async def echo(context: JobContext, a: int, b: str, body: dict[str, Any]) -> None:
    result = json.dumps({"a": a, "b": b, "body": body})
    async with pool().connection() as db:
        await db.execute("INSERT INTO results VALUES (%s, %s) ON CONFLICT DO NOTHING", (context.job.id, result))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with queue.open_async():
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/submit", status_code=202)
async def submit(a: int, b: str, body: Pad, answer: Response) -> dict[str, Any]:
    job = await echo.defer_async(a=a, b=b, body=body.model_dump())
    answer.headers["Location"] = f"/jobs/{job}/status"
    return {"id": job, "status": "Running"}


@app.get("/jobs/{job}/status")
async def status(job: int) -> dict[str, Any]:
    found = await queue.job_manager.get_job_status_async(job)
    return {"id": job, "status": "Completed" if found.value == "succeeded" else "Running"}


@app.get("/jobs/{job}/result")
async def result(job: int) -> Response:
    async with pool().connection() as db:
        cursor = await db.execute("SELECT result FROM results WHERE job = %s", (job,))
        row = await cursor.fetchone()
    if row is None:
        raise HTTPException(404)
    return Response(row[0], media_type="application/json")


@app.post("/sync")
async def sync(a: int, b: str, body: Pad) -> dict[str, Any]:
    return {"a": a, "b": b, "body": body}
