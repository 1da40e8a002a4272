"""Astera Lite inside another program: a flow that is a Python function, no flow files.

Run it, then call what it prints; or `--once` to call itself and end:

    python examples/embed.py
    curl 'http://127.0.0.1:9264/api/publishing/distance/52.52/13.41?to_latitude=48.14&to_longitude=11.58'
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # not needed once astera-lite is installed
from astera_lite import AsteraLite, Context, Server

EARTH_RADIUS_KM = 6371.0


def publish(app: AsteraLite) -> None:
    """Publish this program's functions. Parameters, their types and defaults follow from the signatures."""

    @app.flow("GET /distance/{latitude}/{longitude}")
    def distance(
        context: Context, latitude: float, longitude: float, to_latitude: float = 0.0, to_longitude: float = 0.0
    ) -> dict[str, float]:
        """The great-circle distance between two places."""
        a, b = math.radians(latitude), math.radians(to_latitude)
        across = math.radians(to_longitude - longitude)
        cosine = math.sin(a) * math.sin(b) + math.cos(a) * math.cos(b) * math.cos(across)
        return {"km": round(EARTH_RADIUS_KM * math.acos(max(-1.0, min(1.0, cosine))), 1)}

    @app.flow("POST /count-words", body={"type": "object", "required": ["text"]}, timeout="10s")
    def count_words(context: Context, body: dict[str, str]) -> dict[str, int]:
        """How often each word stands in a text; says how far it is."""
        words = body["text"].lower().split()
        counts: dict[str, int] = {}
        for position, word in enumerate(words):
            if position % 1000 == 0:
                context.progress(position, len(words))
            counts[word] = counts.get(word, 0) + 1
        return counts

    @app.step("convert")
    def convert(context: Context, km: float) -> dict[str, float]:
        """Kilometres in other units: a kind of step of this program's own."""
        return {"miles": round(km / 1.609344, 1), "nautical": round(km / 1.852, 1)}

    steps = [
        {"name": "way", "call": {"flow": "distance", "params": {"latitude": "${params.latitude}", "longitude": 0}}},
        {"name": "units", "convert": {"km": "${way.body.km}"}},
    ]
    parameters = {"latitude": {"in": "path", "type": "number"}}
    request = {"method": "GET", "resource": "/from-equator/{latitude}", "parameters": parameters}
    app.deploy("from-equator", {"description": "How far it is from the equator", "request": request, "steps": steps})


def main() -> None:
    """Serve until Ctrl-C, or with --once make one call of each kind and end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=9264, help="port to listen on (default: 9264)")
    parser.add_argument("--once", action="store_true", help="call the flows once, print the answers and end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        app = AsteraLite(database=f"{folder}/jobs.db", workers=4, retention="1h", shutdown_timeout="5s")
        publish(app)
        with app, Server(app, port=0 if args.once else args.port) as server:
            if args.once:
                call_each_way(app, server)
                return
            print(f"serving on {server.url}; Ctrl-C ends", flush=True)
            try:
                while True:
                    time.sleep(3600)
            except KeyboardInterrupt:
                pass


def call_each_way(app: AsteraLite, server: Server) -> None:
    """Inside the program and synchronously; inside and as a job; over HTTP."""
    munich = {"latitude": 52.52, "longitude": 13.41, "to_latitude": 48.14, "to_longitude": 11.58}
    print("run:   ", app.run("distance", munich).json())
    job = app.submit("count-words", body={"text": "to be or not to be"})
    print("submit:", app.wait(job.id, timeout=10).status, app.result(job.id).json())
    with urllib.request.urlopen(f"{server.url}/api/publishing/distance/0/0?to_longitude=180") as response:
        print("http:  ", response.status, response.read().decode().strip())


if __name__ == "__main__":
    main()
