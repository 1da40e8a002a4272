"""FastAPI with DBOS on PostgreSQL: a path starts a workflow in the background, DBOS keeps its status and its result."""

import os
from typing import Any

import uvicorn
from dbos import DBOS, DBOSConfig
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel

app = FastAPI()
config: DBOSConfig = {
    "name": "peer",
    "system_database_url": os.environ["DATABASE_URL"],
    "db_engine_kwargs": {"pool_pre_ping": False},  # it would cost a round trip before each use of a connection
    "log_level": "WARNING",
}
DBOS(config=config)


class Pad(BaseModel):
    pad: str


@DBOS.workflow()
def echo(a: int, b: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"a": a, "b": b, "body": body}


@app.post("/submit", status_code=202)
def submit(a: int, b: str, body: Pad, answer: Response) -> dict[str, Any]:
    job = DBOS.start_workflow(echo, a, b, body.model_dump()).workflow_id
    answer.headers["Location"] = f"/jobs/{job}/status"
    return {"id": job, "status": "Running"}


@app.get("/jobs/{job}/status")
def status(job: str) -> dict[str, Any]:
    found = DBOS.get_workflow_status(job)
    if found is None:
        raise HTTPException(404)
    return {"id": job, "status": "Completed" if found.status == "SUCCESS" else "Running"}


@app.get("/jobs/{job}/result")
def result(job: str) -> Any:
    found = DBOS.get_workflow_status(job)
    if found is None or found.status != "SUCCESS":
        raise HTTPException(404)
    return found.output


@app.post("/sync")
async def sync(a: int, b: str, body: Pad) -> dict[str, Any]:
    return {"a": a, "b": b, "body": body}


if __name__ == "__main__":
    DBOS.launch()
    uvicorn.run(
        app, port=int(os.environ["PORT"]), loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )
