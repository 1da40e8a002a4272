"""Flask, and SqliteHuey (synced to disk) as its task queue; the consumer is a process of its own."""

from typing import Any

from flask import Flask, Response, abort, jsonify, request
from huey import SqliteHuey

app = Flask(__name__)
huey = SqliteHuey(filename="peer.db", fsync=True, timeout=30)


@huey.task()
def echo(given: dict[str, Any]) -> dict[str, Any]:
    return given


def checked() -> dict[str, Any]:
    a, b, body = request.args.get("a", type=int), request.args.get("b"), request.get_json()
    if a is None or b is None or not isinstance(body, dict):
        abort(400)
    return {"a": a, "b": b, "body": body}


@app.post("/submit")
def submit() -> tuple[Response, int, dict[str, str]]:
    job = echo(checked()).id
    return jsonify(id=job, status="Running"), 202, {"Location": f"/jobs/{job}/status"}


@app.get("/jobs/<job>/status")
def status(job: str) -> Response:
    finished = huey.result(job, preserve=True) is not None
    return jsonify(id=job, status="Completed" if finished else "Running")


@app.get("/jobs/<job>/result")
def result(job: str) -> Response:
    value = huey.result(job, preserve=True)
    if value is None:
        abort(404)
    return jsonify(value)


@app.post("/sync")
def sync() -> Response:
    return jsonify(checked())
