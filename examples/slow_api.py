"""A slow third-party API to try flows against without the internet: a stand-in for Open-Meteo, and more.

    GET /v1/search?name=Berlin&count=1
    GET /v1/forecast?latitude=52.52&longitude=13.41&daily=temperature_2m_max,temperature_2m_min&forecast_days=3
    GET /v1/cities?limit=5&offset=0&country=DE     all places, a page at a time; `next` is the address of the next one
    GET /status/{code}      answers at once with that status code
    GET /delay/{seconds}    answers after so many seconds, at most 60

The /v1 calls take `--delay` seconds. The weather is invented, but the same for the same place and day.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import re
import socketserver
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlencode

MAX_DELAY_S = 60.0
NUMBER = re.compile(r"-?[0-9]{1,6}(\.[0-9]{1,20})?")
UNITS = {"temperature_2m_max": "°C", "temperature_2m_min": "°C"}

Query = Mapping[str, str]
Answer = tuple[int, Any]


class City(NamedTuple):
    """One row of the geocoding table; the members are those of a search result."""

    id: int
    name: str
    latitude: float
    longitude: float
    elevation: float
    country_code: str
    timezone: str
    country: str


CITIES = (
    City(1, "Berlin", 52.52, 13.41, 74.0, "DE", "Europe/Berlin", "Germany"),
    City(2, "Berlin", 44.47, -71.19, 311.0, "US", "America/New_York", "United States"),
    City(3, "Paris", 48.85, 2.35, 42.0, "FR", "Europe/Paris", "France"),
    City(4, "London", 51.51, -0.13, 25.0, "GB", "Europe/London", "United Kingdom"),
    City(5, "Madrid", 40.42, -3.70, 665.0, "ES", "Europe/Madrid", "Spain"),
    City(6, "Zürich", 47.37, 8.55, 429.0, "CH", "Europe/Zurich", "Switzerland"),
    City(7, "Reykjavík", 64.14, -21.90, 37.0, "IS", "Atlantic/Reykjavik", "Iceland"),
    City(8, "Cairo", 30.06, 31.25, 23.0, "EG", "Africa/Cairo", "Egypt"),
    City(9, "Nairobi", -1.28, 36.82, 1669.0, "KE", "Africa/Nairobi", "Kenya"),
    City(10, "New York", 40.71, -74.01, 10.0, "US", "America/New_York", "United States"),
    City(11, "São Paulo", -23.55, -46.64, 769.0, "BR", "America/Sao_Paulo", "Brazil"),
    City(12, "Tokyo", 35.69, 139.69, 44.0, "JP", "Asia/Tokyo", "Japan"),
    City(13, "Sydney", -33.87, 151.21, 58.0, "AU", "Australia/Sydney", "Australia"),
)


# ---- Parameters ------------------------------------------------------------------------------------------------------


class BadParameter(Exception):
    """The message is the `reason` of a 400."""


def number(query: Query, name: str, low: float, high: float, default: str = "") -> float:
    """A number between two bounds, or BadParameter."""
    text = query.get(name, default)
    # float() alone would also take "nan", "1_0" and the digits of other scripts.
    if not NUMBER.fullmatch(text) or not low <= float(text) <= high:
        raise BadParameter(f"'{name}' must be a number from {low:g} to {high:g}, not '{text}'")
    return float(text)


def integer(query: Query, name: str, low: int, high: int, default: str) -> int:
    """A whole number between two bounds, or BadParameter."""
    value = number(query, name, low, high, default)
    if not value.is_integer():
        raise BadParameter(f"'{name}' must be a whole number")
    return int(value)


# ---- The calls -------------------------------------------------------------------------------------------------------
# To add one: a function from match and query to (status, JSON value), and a row in ROUTES.


def plain(name: str) -> str:
    """For comparing: lower case, without accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", name.casefold()) if not unicodedata.combining(char))


def search(_match: re.Match[str], query: Query) -> Answer:
    """Places whose name begins so; when there is none, `results` is missing, as in the original."""
    if "name" not in query:
        raise BadParameter("'name' is required")
    start, count = plain(query["name"].strip()), integer(query, "count", 1, 100, "10")
    found = [city._asdict() for city in CITIES if len(start) > 1 and plain(city.name).startswith(start)]
    return 200, ({"results": found[:count]} if found else {}) | {"generationtime_ms": 0.5}


def timezone_of(latitude: float, longitude: float) -> str:
    """The time zone of a known city that is near, else GMT."""
    near = (city for city in CITIES if abs(city.latitude - latitude) < 1 and abs(city.longitude - longitude) < 1)
    return next((city.timezone for city in near), "GMT")


def temperatures(latitude: float, longitude: float, day: date) -> dict[str, float]:
    """Warmer towards the equator and in the summer of that hemisphere, plus the day's own whim."""
    season = math.cos(2 * math.pi * (day.timetuple().tm_yday - 200) / 365) * latitude / 90
    # Seeded with text, which is stable between runs; hash() is not.
    whim = random.Random(f"{latitude:.2f} {longitude:.2f} {day}")
    highest = 31 - 26 * abs(latitude / 90) + 18 * season + whim.uniform(-4, 4)
    return {
        "temperature_2m_max": round(highest, 1),
        "temperature_2m_min": round(highest - whim.uniform(5, 11), 1),
    }


def forecast(_match: re.Match[str], query: Query) -> Answer:
    """The coming days, one list for each variable asked for."""
    latitude, longitude = number(query, "latitude", -90, 90), number(query, "longitude", -180, 180)
    days = integer(query, "forecast_days", 1, 16, "7")
    wanted = [name for name in query.get("daily", "").split(",") if name]
    for name in wanted:
        if name not in UNITS:
            raise BadParameter(f"'daily' knows no '{name}'")
    auto = query.get("timezone") == "auto"
    zone = timezone_of(latitude, longitude) if auto else query.get("timezone", "GMT")
    answer: dict[str, Any] = {"latitude": latitude, "longitude": longitude, "timezone": zone, "generationtime_ms": 0.5}
    if wanted:
        today = datetime.now(UTC).date()
        dates = [today + timedelta(days=ahead) for ahead in range(days)]
        values = [temperatures(latitude, longitude, day) for day in dates]
        answer["daily_units"] = {"time": "iso8601"} | {name: UNITS[name] for name in wanted}
        answer["daily"] = {"time": [str(day) for day in dates]}
        answer["daily"] |= {name: [value[name] for value in values] for name in wanted}
    return 200, answer


def cities(_match: re.Match[str], query: Query) -> Answer:
    """A page of the table, with a relative link to the next one, which is null at the end."""
    limit, offset = integer(query, "limit", 1, 100, "10"), integer(query, "offset", 0, 10_000, "0")
    country = query.get("country", "")
    found = [city._asdict() for city in CITIES if country in ("", city.country_code)]
    more = urlencode({"limit": limit, "offset": offset + limit, "country": country})
    return 200, {"cities": found[offset : offset + limit], "next": f"?{more}" if offset + limit < len(found) else None}


def status(match: re.Match[str], _query: Query) -> Answer:
    """The status code that the path names."""
    code = integer(match.groupdict(), "code", 200, 599, "")
    return code, {"status": code}


def delay(match: re.Match[str], _query: Query) -> Answer:
    """An answer that takes as long as the path says."""
    seconds = min(number(match.groupdict(), "seconds", 0, math.inf), MAX_DELAY_S)
    time.sleep(seconds)
    return 200, {"delay": seconds}


class Route(NamedTuple):
    """A call: which paths, which function, and whether it is slow like the real thing."""

    path: re.Pattern[str]
    call: Callable[[re.Match[str], Query], Answer]
    slow: bool


ROUTES = (
    Route(re.compile(r"/v1/search"), search, slow=True),
    Route(re.compile(r"/v1/forecast"), forecast, slow=True),
    Route(re.compile(r"/v1/cities"), cities, slow=True),
    Route(re.compile(r"/status/(?P<code>[^/]*)"), status, slow=False),
    Route(re.compile(r"/delay/(?P<seconds>[^/]*)"), delay, slow=False),
)


def respond(target: str, delay_s: float) -> Answer:
    """The answer to a request target, after the time it takes."""
    path, _, query_text = target.partition("?")
    query = {name: ",".join(values) for name, values in parse_qs(query_text, keep_blank_values=True).items()}
    for route in ROUTES:
        if match := route.path.fullmatch(unquote(path)):
            if route.slow:
                time.sleep(delay_s)
            try:
                return route.call(match, query)
            except BadParameter as fault:
                return 400, {"error": True, "reason": str(fault)}
    return 404, {"error": True, "reason": "Not Found"}


# ---- Server ----------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Holds the delay; a thread for each connection, so that slow answers do not queue up."""

    request_queue_size = 128  # the default backlog of 5 is soon full when answers are slow

    def __init__(self, address: tuple[str, int], delay_s: float) -> None:
        super().__init__(address, Handler)
        self.delay_s = delay_s

    def server_bind(self) -> None:
        """Binds; HTTPServer would also look the host's name up, which can wait for DNS."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One line for a client that did not wait, which a slow answer invites; a traceback for anything else."""
        fault = sys.exception()
        if isinstance(fault, OSError):
            print(f"{client_address[0]}: {fault}", file=sys.stderr)
        else:
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection with one request: in HTTP/1.0 an unread body can never be taken for the next request."""

    server: Server
    timeout = 30
    wbufsize = -1  # head and body leave in one piece

    def do_GET(self) -> None:
        """Answers with JSON."""
        # http.server decodes the target as Latin-1, but a name typed without escaping arrives as UTF-8.
        target = self.path.encode("latin-1").decode(errors="replace")
        code, value = respond(target, self.server.delay_s)
        self.send_response(code)
        if code in {204, 304}:
            self.end_headers()
            return
        content = json.dumps(value, ensure_ascii=False).encode()
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


# ---- Command line ----------------------------------------------------------------------------------------------------


def seconds_argument(text: str) -> float:
    """A number of seconds that time.sleep takes."""
    if not NUMBER.fullmatch(text) or float(text) < 0:
        raise argparse.ArgumentTypeError("not a number of seconds")
    return float(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=9263, help="port, 0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--delay", type=seconds_argument, default=1.0, metavar="SECONDS", help="of the /v1 calls (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    try:
        server = Server((options.host, options.port), options.delay)
    except (OSError, OverflowError) as fault:
        parser.exit(3, f"cannot listen on {options.host}:{options.port}: {fault}\n")
    with server, contextlib.suppress(KeyboardInterrupt):
        host, port = server.server_address[:2]
        print(f"listening on http://{host!s}:{port}/", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
