"""Room 12: who may call, from which page, under which name, and what the server refuses to expose."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ECHO, PROGRAM, Running, get_flow, running, talk

from astera_lite import AsteraLite, ConfigError, Server

TOKEN = "s3cret-Token~1"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
FLOWS = {"hello": get_flow("/hello", response={"body": "hi"}), "echo": ECHO}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("guarded"), FLOWS, token=TOKEN) as run:
        yield run


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("free"), FLOWS) as run:
        yield run


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    origins = "https://app.example, http://localhost:3000/"
    with running(tmp_path_factory.mktemp("shared"), FLOWS, cors_origins=origins, token=TOKEN) as run:
        yield run


# --- token ---

NO_ID = "0192f0c1-0000-7000-8000-000000000000"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/api/publishing/hello"),
        ("GET", "/api/publishingAsync/hello"),
        ("GET", "/api/publishing/nothing"),
        ("DELETE", "/api/publishing/hello"),
        ("POST", "/api/publishing/echo?a=x"),
        ("GET", "/api/jobs"),
        ("GET", "/api/jobs?limit=x"),
        ("GET", f"/api/jobs/{NO_ID}"),
        ("GET", f"/api/jobs/{NO_ID}/status"),
        ("GET", f"/api/jobs/{NO_ID}/result"),
        ("GET", "/api/jobs/malformed/status"),
        ("POST", f"/api/jobs/{NO_ID}/cancel"),
        ("POST", f"/api/jobs/{NO_ID}/rerun"),
        ("POST", f"/api/jobs/{NO_ID}/callback"),
        ("DELETE", f"/api/jobs/{NO_ID}"),
        ("GET", "/api/deployments"),
        ("GET", "/api/deployments/nothing"),
        ("GET", "/nothing"),
        ("PUT", "/api/jobs"),
        ("POST", "/health"),
    ],
)
def test_without_a_token_everything_is_401_before_it_is_anything_else(guarded: Running, method: str, path: str) -> None:
    answer = guarded.client(method, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json()["status"] == 401
    assert "Job-Status" not in answer.headers, "it would tell whether there is such a job"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.lower()}",
        f"Bearer x {TOKEN}",
        f"Basic {TOKEN}",
        f"Basic OnMzY3JldC1Ub2tlbn4x, Bearer {TOKEN}",
        TOKEN,
        "Bearer ½é\xff",
        "Bearer " + "x" * 10_000,
    ],
)
def test_a_wrong_token_is_401(guarded: Running, value: str) -> None:
    answer = guarded.client.get("/api/jobs", headers={"Authorization": value.encode("latin-1")})
    assert answer.status_code == 401
    assert TOKEN not in answer.text
    scheme, _, given = value.partition(" ")  # who sent none is told of no fault (RFC 6750, section 3.1)
    wrong = scheme.lower() == "bearer" and bool(given)
    assert ('error="invalid_token"' in answer.headers["WWW-Authenticate"]) == wrong


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER", "bEaReR"])
def test_the_scheme_is_matched_in_any_case(guarded: Running, scheme: str) -> None:
    assert guarded.client.get("/api/jobs", headers={"Authorization": f"{scheme} {TOKEN}"}).status_code == 200


def test_a_repeated_authorization_does_not_let_in(guarded: Running) -> None:
    host, port = guarded.server.server_address[:2]
    lines = f"Authorization: Bearer x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head = f"GET /api/jobs HTTP/1.1\r\nHost: {host}:{port}\r\n{lines}Connection: close\r\n\r\n"
    assert talk(guarded.server, head.encode()).startswith(b"HTTP/1.1 401 ")


def test_the_right_token_sees_404_and_405_as_they_are(guarded: Running) -> None:
    assert guarded.client.get("/nothing", headers=BEARER).status_code == 404
    assert guarded.client.get(f"/api/jobs/{NO_ID}/status", headers=BEARER).status_code == 404
    assert guarded.client("PUT", "/api/jobs", headers=BEARER).status_code == 405


@pytest.mark.parametrize(("method", "path", "code"), [("GET", "/health", 200), ("HEAD", "/health", 200)])
def test_health_needs_no_token(guarded: Running, method: str, path: str, code: int) -> None:
    assert guarded.client(method, path).status_code == code
    assert guarded.client(method, path, headers={"Authorization": "Bearer wrong"}).status_code == code


@pytest.mark.parametrize("path", ["/api/publishing/hello", "/api/jobs", "/nothing", "/health"])
def test_options_needs_no_token(guarded: Running, path: str) -> None:
    answer = guarded.client("OPTIONS", path)
    assert answer.status_code == 204
    assert "OPTIONS" in answer.headers["Allow"]


def test_a_job_of_a_guarded_server_lives_its_whole_life_with_the_token(guarded: Running) -> None:
    guarded.client.session.headers.update(BEARER)
    try:
        status = guarded.client.finished(guarded.client.get("/api/publishingAsync/hello"))
        assert guarded.client.get(status["resultUrl"]).json() == "hi"
        assert [job["id"] for job in guarded.client.get("/api/jobs").json()["jobs"]][:1] == [status["id"]]
    finally:
        del guarded.client.session.headers["Authorization"]
    assert guarded.client.get(status["resultUrl"]).status_code == 401


def test_a_token_may_be_any_text(tmp_path: Path) -> None:
    with running(tmp_path, FLOWS, token="schlüssel ☃") as run:
        for value, code in (("schlüssel ☃", 200), ("schlussel ☃", 401), ("schlüssel", 401)):
            assert (
                run.client.get("/api/jobs", headers={"Authorization": b"Bearer " + value.encode()}).status_code == code
            )


@pytest.mark.parametrize("token", ["", " ", "\t"])
def test_a_blank_token_is_refused_and_opens_nothing(tmp_path: Path, token: str) -> None:
    with pytest.raises(ConfigError, match="token"), running(tmp_path, FLOWS, token=token) as run:
        assert run.client.get("/api/jobs", headers={"Authorization": "Bearer"}).status_code == 401


def test_the_token_shows_nowhere(guarded: Running) -> None:
    for path in ("/health", "/api/deployments", "/api/jobs", "/nothing"):
        answer = guarded.client.get(path, headers=BEARER)
        assert TOKEN not in answer.text + str(answer.headers)
    assert TOKEN not in repr(guarded.server.access.__dict__)


# --- Host ---


@pytest.mark.parametrize(
    "host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST", "localhost:80", "127.0.0.1:1", "[::1]:9"]
)
def test_loopback_names_are_served_whatever_their_port(free: Running, host: str) -> None:
    assert free.client.get("/api/jobs", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil.localhost", "10.0.0.1", "[::2]",
     "0.0.0.0", "2130706433", "127.1", "127.0.0.1.", "xn--lcalhost-54a", "a,localhost"],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), ("GET", "/nothing"), ("OPTIONS", "/health")])
def test_another_name_on_a_loopback_listener_is_421(free: Running, host: str, method: str, path: str) -> None:
    answer = free.client(method, path, headers={"Host": host})
    assert answer.status_code == 421
    assert answer.json()["status"] == 421


def test_the_name_in_an_absolute_target_counts(free: Running) -> None:
    for target, wanted in (("http://evil.example/health", b"421"), ("http://localhost/health", b"200")):
        head = f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert talk(free.server, head.encode()).split()[1] == wanted


def test_a_wrong_name_is_421_even_with_the_token_and_nothing_is_accepted(guarded: Running) -> None:
    before = len(guarded.client.get("/api/jobs", headers=BEARER).json()["jobs"])
    answer = guarded.client.get("/api/publishingAsync/hello", headers={**BEARER, "Host": "evil.example"})
    assert answer.status_code == 421
    assert len(guarded.client.get("/api/jobs", headers=BEARER).json()["jobs"]) == before


@pytest.mark.parametrize(
    ("public_url", "host"),
    [
        ("https://jobs.example", "jobs.example"),
        ("https://jobs.example:8443/astera", "JOBS.example:8443"),
        ("http://[2001:db8::1]:80", "[2001:db8::1]"),
    ],
)
def test_the_public_name_is_served_behind_a_proxy_on_the_same_machine(
    tmp_path: Path, public_url: str, host: str
) -> None:
    with running(tmp_path, FLOWS, public_url=public_url, insecure_open=True) as run:
        assert run.client.get("/health", headers={"Host": host}).status_code == 200
        assert run.client.get("/health").status_code == 200
        assert run.client.get("/health", headers={"Host": "evil.example"}).status_code == 421


def test_an_open_listener_takes_any_name(tmp_path: Path) -> None:
    app = AsteraLite(database=str(tmp_path / "jobs.db"), insecure_open=True)
    with app, Server(app, host="0.0.0.0", port=0) as server:
        answer = talk(server, b"GET /health HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")


# --- Origin and Sec-Fetch-Site ---


@pytest.mark.parametrize(
    "origin",
    ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://", "", "*", "http://localhost"],
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/api/jobs"), ("POST", "/api/publishing/echo"), ("GET", "/")])
def test_a_foreign_origin_is_403(free: Running, origin: str, method: str, path: str) -> None:
    answer = free.client(method, path, headers={"Origin": origin})
    assert answer.status_code == 403
    assert "Access-Control-Allow-Origin" not in answer.headers


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "[::1]"])
def test_a_page_of_the_server_itself_may_call(free: Running, name: str) -> None:
    host = f"{name}:{free.server.server_address[1]}"
    answer = free.client.post("/api/publishing/echo", headers={"Host": host, "Origin": f"http://{host}"})
    assert answer.status_code == 200
    other = free.client.post("/api/publishing/echo", headers={"Host": host, "Origin": f"https://{host}"})
    assert other.status_code == 403, "another scheme is another origin"


@pytest.mark.parametrize(
    ("public_url", "host", "origin", "code"),
    [
        ("https://jobs.example", "jobs.example", "https://jobs.example", 200),
        ("https://jobs.example/", "jobs.example", "https://jobs.example", 200),
        ("https://jobs.example/astera", "jobs.example", "https://jobs.example", 200),
        ("https://jobs.example:443", "jobs.example", "https://jobs.example", 200),
        ("http://jobs.example:80/astera", "jobs.example:1", "http://jobs.example", 200),
        ("https://jobs.example:80", "jobs.example", "https://jobs.example", 403),
        ("https://jobs.example:80", "jobs.example", "https://jobs.example:80", 200),
        ("https://jobs.example", "jobs.example", "https://other.example", 403),
        ("https://jobs.example", "localhost:9261", "http://localhost:9261", 200),
    ],
)
def test_with_a_public_url_its_origin_is_ours(
    tmp_path: Path, public_url: str, host: str, origin: str, code: int
) -> None:
    with running(tmp_path, FLOWS, public_url=public_url, token=TOKEN) as run:
        answer = run.client.post("/api/publishing/echo", headers={**BEARER, "Host": host, "Origin": origin})
        assert answer.status_code == code


@pytest.mark.parametrize(
    ("value", "method", "path", "code"),
    [
        ("cross-site", "GET", "/api/jobs", 200),  # a person follows a link to what only reads
        ("cross-site", "GET", "/openapi.json", 200),
        ("cross-site", "GET", "/health", 200),
        ("cross-site", "GET", f"/api/jobs/{NO_ID}/result", 404),
        ("cross-site", "GET", "/api/publishing/hello", 403),
        ("cross-site", "GET", "/api/publishingAsync/hello", 403),
        ("cross-site", "HEAD", "/api/jobs", 403),
        ("cross-site", "POST", f"/api/jobs/{NO_ID}/cancel", 403),
        ("cross-site", "DELETE", f"/api/jobs/{NO_ID}", 403),
        ("cross-site", "POST", "/", 403),
        ("cross-site", "GET", "/", 404),  # a link to the console may be followed; there is none in this version
        ("same-site", "GET", "/api/jobs", 200),
        ("same-origin", "GET", "/api/jobs", 200),
        ("none", "GET", "/api/jobs", 200),
    ],
)
def test_requests_from_pages_of_other_sites_are_403(
    free: Running, value: str, method: str, path: str, code: int
) -> None:
    link = {"Sec-Fetch-Site": value, "Sec-Fetch-Mode": "navigate"}
    assert free.client(method, path, headers=link | {"Sec-Fetch-Dest": "document"}).status_code in (code, 200)
    if value == "cross-site" and path != "/":  # what a page does by itself is no navigation of a window
        for more in ({"Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Dest": "iframe"}, {"Origin": "https://evil.example"}):
            assert free.client(method, path, headers=link | more).status_code == 403
    answer = free.client(method, path, headers=link)
    if path == "/" and code == 404:
        assert answer.status_code != 403
    else:
        assert answer.status_code == code


def test_a_refused_page_starts_no_job(free: Running) -> None:
    before = len(free.client.get("/api/jobs").json()["jobs"])
    assert free.client.get("/api/publishingAsync/hello", headers={"Origin": "https://evil.example"}).status_code == 403
    assert free.client.get("/api/publishingAsync/hello", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert len(free.client.get("/api/jobs").json()["jobs"]) == before


# --- CORS ---


@pytest.mark.parametrize(
    "origins",
    ["*", "app.example", "https://app.example/path", "https://*.example", "null", "https://a.example https://b.example",
     "https://a@b.example", "https://a.example:x", "https://bücher.example", "https://"],
)  # fmt: skip
def test_what_is_no_origin_is_refused_at_the_start(tmp_path: Path, origins: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AsteraLite(database=str(tmp_path / "jobs.db"), cors_origins=f"https://ok.example, {origins}")
    (fault,) = caught.value.faults
    assert (fault.where, "https://app.example" in fault.message) == ("cors_origins", True)


def test_origins_are_compared_as_browsers_write_them(tmp_path: Path) -> None:
    origins = "HTTPS://App.Example:443/,http://[::1]:3000 , app://local,,"
    with running(tmp_path, FLOWS, cors_origins=origins) as run:
        for origin in ("https://app.example", "http://[::1]:3000", "app://local"):
            answer = run.client.get("/api/jobs", headers={"Origin": origin})
            assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, origin)


@pytest.mark.parametrize(
    ("request_line", "header", "code"),
    [
        ("POST /api/publishing/echo", "Content-Length: 999999999999", 413),
        (f"GET /{'x' * 20_000}", "X: y", 414),
        ("GET /", f"X: {'y' * 70_000}", 431),
        ("GET /", "X : y", 400),
        ("GET /", "Expect: more", 417),
        ("POST /", "Transfer-Encoding: zip, chunked", 400),
        ("GET /", "Host: evil.example:1", 400),
    ],
)
def test_a_page_may_read_why_its_request_was_refused_early(
    shared: Running, request_line: str, header: str, code: int
) -> None:
    for origin, allowed in (("https://app.example", True), ("https://evil.example", False)):
        head = f"{request_line} HTTP/1.1\r\nHost: localhost\r\nOrigin: {origin}\r\n{header}\r\n\r\n"
        answer = talk(shared.server, head.encode()).decode()
        assert answer.startswith(f"HTTP/1.1 {code} ")
        assert (f"\r\nAccess-Control-Allow-Origin: {origin}\r\n" in answer) == allowed


def test_a_page_may_read_that_it_calls_the_server_by_a_wrong_name(shared: Running) -> None:
    answer = shared.client.get("/api/jobs", headers={"Host": "other.example", "Origin": "https://app.example"})
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (421, "https://app.example")
    assert "public_url" in answer.json()["detail"]


@pytest.mark.parametrize("origin", ["https://app.example", "http://localhost:3000"])
def test_a_named_origin_gets_the_cors_answers(shared: Running, origin: str) -> None:
    more = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    for path, code in (("/api/publishingAsync/hello", 202), ("/nothing", 404), ("/api/publishing/echo", 405)):
        answer = shared.client.get(path, headers=BEARER | more)
        assert answer.status_code == code
        assert answer.headers["Access-Control-Allow-Origin"] == origin
        assert "Origin" in answer.headers["Vary"]
        exposed = {name.strip() for name in answer.headers["Access-Control-Expose-Headers"].split(",")}
        assert exposed >= {"Location", "Retry-After", "Job-Status", "X-Request-Id", "Preference-Applied"}
        assert exposed >= {"Content-Location", "Idempotency-Replayed"}
        assert "Access-Control-Allow-Credentials" not in answer.headers
    unauthorized = shared.client.get("/api/jobs", headers=more)
    assert (unauthorized.status_code, unauthorized.headers["Access-Control-Allow-Origin"]) == (401, origin)


@pytest.mark.parametrize(
    "origin",
    ["https://app.example.evil", "http://app.example", "https://app.example:444", "https://evil.example", "null"],
)
def test_an_origin_that_only_looks_like_a_named_one_is_403(shared: Running, origin: str) -> None:
    for method in ("GET", "OPTIONS"):
        answer = shared.client(method, "/api/jobs", headers=BEARER | {"Origin": origin})
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_preflight_says_what_may_be_sent(shared: Running) -> None:
    wanted = "authorization, content-type, idempotency-key, prefer"
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": wanted,
    }
    answer = shared.client("OPTIONS", "/api/publishingAsync/echo", headers=asked)
    assert answer.status_code == 204
    assert answer.content == b""
    assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
    assert "POST" in answer.headers["Access-Control-Allow-Methods"]
    assert answer.headers["Access-Control-Allow-Headers"] == wanted
    assert int(answer.headers["Access-Control-Max-Age"]) > 0
    for sent, echoed in (("a,b", "a, b"), ("x-a ,, b c, (d), e\te, f", "x-a, f"), ("a b", None)):
        answer = shared.client("OPTIONS", "/", headers=asked | {"Access-Control-Request-Headers": sent})
        assert answer.headers.get("Access-Control-Allow-Headers") == echoed


def test_a_header_has_one_line_whoever_sets_it(tmp_path: Path) -> None:
    own = {"access-control-allow-origin": "*", "vary": "Accept, prefer", "content-location": "/x", "cache-control": "a"}
    own |= {"etag": "v1", "preference-applied": "x", "access-control-expose-headers": "X-A", "retry-after": "9"}
    flow = get_flow("/own", response={"headers": own, "body": 1})
    origin = "https://app.example"
    with running(tmp_path, {"own": flow}, cors_origins=origin) as run:
        sync = run.client.get("/api/publishing/own", headers={"Origin": origin})
        job = run.client.get("/api/publishingAsync/own", headers={"Origin": origin, "Prefer": "wait=9"})
        result = run.client.get(job.headers["Content-Location"], headers={"Origin": origin, "Prefer": "wait=1"})
        for answer in (sync, job, result, run.client.get("/api/publishing/x", headers={"Origin": origin})):
            names = [name.lower() for name, _ in answer.raw.headers.items()]
            assert sorted(names) == sorted(set(names))
            assert answer.headers["Access-Control-Allow-Origin"] == origin
            assert answer.headers["Vary"].endswith("Origin")
        assert sync.headers["Vary"] == "Accept, prefer, Prefer, Origin"
        assert sync.headers["Access-Control-Expose-Headers"].startswith("X-A, Location, Retry-After, ")
        assert sync.headers["ETag"] == result.headers["ETag"] == '"v1"'
        assert job.headers["Content-Location"].startswith(run.server.url)
        assert job.headers["Preference-Applied"] == "wait=9"


def test_where_origins_are_named_every_answer_says_that_it_depends_on_the_origin(shared: Running) -> None:
    for path, more in (("/api/jobs", {}), ("/nothing", {}), ("/api/jobs", {"Origin": "https://evil.example"})):
        assert shared.client.get(path, headers=BEARER | more).headers["Vary"] == "Origin"
    assert shared.client.get("/api/publishing/hello", headers=BEARER).headers["Vary"] == "Prefer, Origin"
    assert shared.client("BREW", "/").headers["Vary"] == "Origin"


def test_without_cors_origins_nothing_speaks_cors(free: Running) -> None:
    own = {"Origin": free.server.url}
    for answer in (free.client.get("/api/jobs", headers=own), free.client("OPTIONS", "/api/jobs", headers=own)):
        assert "Vary" not in answer.headers
        assert not [name for name in answer.headers if name.lower().startswith("access-control-")]


# --- what the server refuses to expose ---

OPEN_HOSTS = ["0.0.0.0", "::", "10.1.2.3", "no-such-name.invalid", ""]


@pytest.mark.parametrize("host", OPEN_HOSTS)
def test_it_refuses_to_listen_openly_beyond_loopback(tmp_path: Path, host: str) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app, pytest.raises(ConfigError, match="no token"):
        Server(app, host=host, port=0)


def test_it_refuses_a_public_url_without_a_token(tmp_path: Path) -> None:
    app = AsteraLite(database=str(tmp_path / "jobs.db"), public_url="https://jobs.example")
    with app, pytest.raises(ConfigError, match=r"public_url.*no token"):
        Server(app, port=0)


@pytest.mark.parametrize("settings", [{"token": TOKEN}, {"insecure_open": True}])
def test_a_token_or_insecure_open_lets_it_listen_everywhere(tmp_path: Path, settings: dict[str, Any]) -> None:
    app = AsteraLite(database=str(tmp_path / "jobs.db"), public_url="https://jobs.example", **settings)
    with app, Server(app, host="0.0.0.0", port=0) as server:
        code = b"401" if "token" in settings else b"200"
        assert talk(server, b"GET /api/jobs HTTP/1.0\r\n\r\n").split()[1] == code


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_loopback_needs_neither(tmp_path: Path, host: str) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app, Server(app, host=host, port=0):
        pass


def test_the_address_it_announces_is_one_it_serves(tmp_path: Path) -> None:
    with AsteraLite(database=str(tmp_path / "jobs.db")) as app, Server(app, host="127.0.0.2", port=0) as server:
        name = server.url.partition("//")[2]
        answer = talk(server, f"GET /health HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 200 ")


def test_callbacks_to_loopback_are_not_allowed_by_a_listener_that_is_open(tmp_path: Path) -> None:
    app = AsteraLite(database=str(tmp_path / "jobs.db"), insecure_open=True)
    with app, Server(app, host="0.0.0.0", port=0) as server:
        app.deploy("hello", FLOWS["hello"])
        url = "/api/publishingAsync/hello?callbackUrl=http%3A%2F%2F127.0.0.1%2F"
        answer = talk(server, f"GET {url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("flags", "environ"),
    [
        (["--host", "0.0.0.0"], {}),
        (["--host", "0.0.0.0"], {"ASTERA_LITE_TOKEN": ""}),
        ([], {"ASTERA_LITE_PUBLIC_URL": "https://jobs.example"}),
    ],
)
def test_the_command_refuses_exposure_with_one_line_and_exit_code_1(
    tmp_path: Path, flags: list[str], environ: dict[str, str]
) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ASTERA_")}
    command = [*PROGRAM, "--port", "0", *flags]
    ended = subprocess.run(command, cwd=tmp_path, env=clean | environ, capture_output=True, text=True, timeout=5)
    assert ended.returncode == 1
    assert "token" in ended.stderr.lower()
    assert "Traceback" not in ended.stderr
