"""The console at `/`: its route, and the page as people use it, in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import requests
from support import ROOT, Api, Sink, get_flow, process, running, until

import astera_lite_admin

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "</textarea></pre><img src=x onerror='window.hit=1'><script>window.hit=1</script>${1}\u202e"
LONG = "W" * 60
FLOWS: dict[str, dict[str, Any]] = {
    "every": get_flow(
        "/every/{where}/{many}",
        description="Takes a parameter of each kind.",
        request={
            "parameters": {
                "where": {"in": "path", "example": "a/b c"},
                "many": {"in": "path", "type": "array", "example": ["x", "y"]},
                "count": {"in": "query", "type": "integer", "minimum": 1, "maximum": 5, "default": 2},
                "sure": {"in": "query", "type": "boolean"},
                "kind": {"in": "query", "enum": ["plain", "rich"], "required": True},
                "tags": {"in": "query", "type": "array"},
                "X-Who": {"in": "header"},
            }
        },
        response={"body": "${params}"},
    ),
    "text": {
        "request": {
            "method": "PUT",
            "resource": "/text",
            "body": {"type": "string"},
            "contentTypes": ["text", "json"],
        },
        "response": {"body": "${request.body}"},
    },
    "hostile": get_flow(
        "/hostile",
        description=HOSTILE,
        request={"parameters": {"text": {"in": "query", "description": HOSTILE}}},
        steps=[{"name": "said", "set": "${params.text}"}],
        response={"status": 200, "headers": {"Content-Type": "text/html"}, "body": "${said}"},
    ),
    "numbers": get_flow("/numbers", response={"body": {"long": 9007199254740993, "none": {}, "list": [1, 2]}}),
    "written": get_flow("/written", response={"body": {"שלום": "عالم", "n": "عالم"}}),
    "written_long": get_flow("/written-long", response={"body": "${'ש' * 300000}"}),
    "upload": {
        "request": {
            "method": "POST",
            "resource": "/upload",
            "processing": ["asynchronous"],
            "contentTypes": ["binary", "text"],
        }
    },
    "away": get_flow("/away", response={"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}}),
    "bytes": get_flow("/bytes", response={"body": "${[1] * 90000}"}),
    "broken": {"request": {"method": "GTE", "resource": "/broken"}},
    "names": get_flow(
        "/names",
        request={"parameters": {name: {"in": "query"} for name in ("constructor", "toString", "valueOf")}},
        response={"body": "${params}"},
    ),
    "nothing": {
        "request": {"method": "POST", "resource": "/nothing", "body": {"type": "null"}, "contentTypes": ["form"]},
        "response": {"body": 1},
    },
    "long": get_flow(
        "/long",
        description=LONG,
        request={"parameters": {LONG: {"in": "query", "description": LONG}}},
        steps=[{"name": "no", "fail": {"message": LONG}}],
    ),
    "bounds": {
        "request": {
            "method": "POST",
            "resource": "/bounds",
            "body": {
                "type": "object",
                "required": ["few", "word", "list"],
                "properties": {
                    "few": {"type": "integer", "maximum": -2},
                    "word": {"type": "string", "minLength": 7, "maxLength": 7},
                    "list": {"type": "array", "minItems": 3, "items": {"type": "boolean"}},
                },
            },
        },
        "response": {"body": "${request.body}"},
    },
    "odd": get_flow("/odd", request={"parameters": {name: {"in": "query"} for name in ("first name", "a%20b", "a b")}}),
    "naming": get_flow(
        "/naming",
        steps=[
            {
                "name": "enrich_customer_addresses_with_geocoding_results",
                "each": {
                    "of": "${[1]}",
                    "steps": [{"name": "notifyAccountingDepartment", "set": "${'lorem ipsum ' * 30}"}],
                },
            }
        ],
        response={"body": 1},
    ),
    "taken": get_flow("/taken", response={"status": 422, "body": {"message": "email is taken"}}),
    "registering": get_flow(
        "/registering",
        request={"parameters": {"api": {"in": "query", "required": True}}},
        steps=[
            {"name": "optional", "set": "${1 / 0}", "onError": "none"},
            {
                "name": "each_one",
                "each": {
                    "of": "${[1]}",
                    "steps": [
                        {
                            "name": "register",
                            "http": "${params.api}/api/publishing/taken",
                            "retry": {"attempts": 2, "delay": 0, "on": [422]},
                        }
                    ],
                },
            },
        ],
    ),
    "deep": get_flow("/deep", response={"body": "${" + "[" * 20 + "[1] * 90000" + "]" * 20 + "}"}),
}


# --- the route ---


class Parts(HTMLParser):
    """What stands inside the elements `script` and `style`, and every attribute."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {"script": [], "style": []}
        self.attributes: list[tuple[str, str | None]] = []
        self.tag = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        self.tag = ""

    def handle_data(self, data: str) -> None:
        if self.tag in self.found:
            self.found[self.tag].append(data)


def policy_of(answer: requests.Response) -> dict[str, str]:
    parts = (part.strip().partition(" ") for part in answer.headers["Content-Security-Policy"].split(";"))
    return {name: value for name, _, value in parts}


def test_the_page_may_run_what_it_holds_and_nothing_else(tmp_path: Path) -> None:
    with running(tmp_path) as (_, _, client):
        answer = client.get("/?x=1")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-cache"
    parts = Parts(answer.text)
    hashes = {
        tag: "'sha256-" + base64.b64encode(hashlib.sha256("".join(texts).encode()).digest()).decode() + "'"
        for tag, texts in parts.found.items()
    }
    assert policy_of(answer) == {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert not [name for name, _ in parts.attributes if name.startswith("on") or name in ("style", "src")]
    assert {value for name, value in parts.attributes if name == "href"} >= {"#/flows", "#/jobs"}


def test_head_and_an_unchanged_page_send_no_body(tmp_path: Path) -> None:
    with running(tmp_path) as (_, _, client):
        whole, head = client.get("/"), client("HEAD", "/")
        assert head.status_code == 200 and head.content == b""
        assert int(head.headers["Content-Length"]) == len(whole.content)
        tag = whole.headers["ETag"]
        for given in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            same = client.get("/", headers={"If-None-Match": given})
            assert (same.status_code, same.content) == (304, b"")
            assert same.headers["ETag"] == tag
            assert same.headers["Content-Security-Policy"] == whole.headers["Content-Security-Policy"]
        assert client.get("/", headers={"If-None-Match": '"x"'}).status_code == 200
        answer = client.post("/")
        assert answer.status_code == 405 and answer.headers["Allow"] == "GET, HEAD, OPTIONS"


def test_the_page_needs_no_token_and_holds_no_data(tmp_path: Path) -> None:
    with running(tmp_path, {"secretly": get_flow("/secretly", response={"body": 1})}, token="a long token") as run:
        answer = run.client.get("/")
        assert answer.status_code == 200
        assert answer.content == (ROOT / "console.html").read_bytes()
        assert run.client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
        assert run.client.get("/api/deployments").status_code == 401


def test_line_ends_of_a_checkout_do_not_change_the_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = astera_lite_admin._console_page()
    monkeypatch.setattr(astera_lite_admin, "resource", lambda name: sent.body.replace(b"\n", b"\r\n"))
    assert astera_lite_admin._console_page.__wrapped__() == sent


@pytest.mark.parametrize(("missing", "code"), [("console.html", 404), ("astera_lite_admin.py", 501)])
def test_without_its_files_the_server_runs_and_says_what_is_missing(tmp_path: Path, missing: str, code: int) -> None:
    for name in {"astera_lite.py", "astera_lite_admin.py", "console.html", "schema.sql"} - {missing}:
        shutil.copy(ROOT / name, tmp_path / name)
    with process(tmp_path, program=(sys.executable, str(tmp_path / "astera_lite.py"))) as (_, url, lines):
        assert not any(line.startswith("console:") for line in lines)  # a start names what is there
        answer = requests.get(url, timeout=10)
        assert answer.status_code == code
        assert answer.headers["Content-Type"] == "application/problem+json"
        assert missing in answer.json()["detail"] and "beside astera_lite.py" in answer.json()["detail"]
        assert requests.get(f"{url}/health", timeout=10).json()["status"] == "ok"
        shutil.copy(ROOT / missing, tmp_path)
        assert requests.get(url, timeout=10).status_code == 200


def test_health_tells_more_to_those_who_may_know(tmp_path: Path) -> None:
    flows = {
        "now": get_flow("/now", response={"body": 1}),
        "later": get_flow("/later", steps=[{"name": "w", "wait": 0}]),
    }
    with running(tmp_path, flows, workers=3) as (_, _, client):
        for path in ("/now", "/later"):
            client.finished(client.get(f"/api/publishingAsync{path}"))
        whole = client.get("/health").json()
        assert (whole["workers"], whole["finished"]) == (3, 2)
        assert whole["jobs"] == {"queued": 0, "running": 0, "waiting": 0}
    with running(tmp_path, flows, token="a long token") as (_, _, client):
        bearer = {"Authorization": "Bearer a long token"}
        assert client.get("/health", headers=bearer).json()["finished"] == 0
        for headers in ({}, {"Authorization": "Bearer another"}):
            answer = client.get("/health", headers=headers)
            assert answer.status_code == 200
            assert not {"workers", "finished"} & answer.json().keys()


# --- in a browser ---


LOOK = """Object.defineProperty(document, 'visibilityState', {value: '%s', configurable: true});
document.dispatchEvent(new Event('visibilitychange'))"""


class Seen(NamedTuple):
    """A server, and a way to open its console: `open(fragment, width, scheme)`."""

    url: str
    api: Api
    open: Callable[..., Page]


def write_flows(folder: Path, **flows: Any) -> None:
    shutil.copytree(ROOT / "flows", folder / "flows")
    for name, tree in flows.items():
        (folder / "flows" / f"{name}.json").write_text(json.dumps(tree))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        cure = "no Chromium is installed: apt-get install chromium, or Google Chrome"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(cure)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        found = started.chromium.launch(executable_path=path)
        yield found
        found.close()


@pytest.fixture
def pages(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a page of a server; at the end no page may have complained, or loaded anything from elsewhere."""
    complaints: list[str] = []
    contexts = []

    def open_page(
        url: str, fragment: str = "", width: int = 1440, scheme: str = "light", clock: bool = False, **more: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
        context.set_default_timeout(8000)
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        page = context.new_page()
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda sent: sent.redirected_from or sent.url.startswith(url) or complaints.append(sent.url))
        if clock:
            page.clock.install()
        page.goto(f"{url}/{fragment}")
        page.wait_for_selector("main h1")
        return page

    yield open_page
    for context in contexts:
        context.close()
    answered = "Failed to load resource: "  # the browser's note of a 4xx, or of a server that is gone
    assert [text for text in complaints if not text.startswith(answered)] == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Api]]:
    folder = tmp_path_factory.mktemp("console")
    write_flows(folder, **FLOWS)
    with process(folder) as (_, url, _):
        api = Api(url)
        yield url, api
        api.session.close()


@pytest.fixture
def console(server: tuple[str, Api], pages: Callable[..., Page]) -> Seen:
    url, api = server
    return Seen(url, api, lambda *args, **more: pages(url, *args, **more))


def said(page: Page, text: str) -> None:
    page.locator("#say", has_text=text).wait_for()


def passing(page: Page, holds: Callable[[], bool]) -> None:
    """Let the page's clock go on, a look at a time, until this holds."""

    def holds_by_now() -> bool:
        page.clock.run_for(2000)
        page.wait_for_timeout(20)  # for the answers
        return holds()

    until(holds_by_now)


def raw(page: Page, name: str) -> str:
    return page.get_by_label(name, exact=True).inner_text()


def clipboard(page: Page) -> str:
    return str(page.evaluate("navigator.clipboard.readText()"))


def test_flows_are_shown_with_addresses_that_can_be_copied(console: Seen) -> None:
    page = console.open()
    assert page.title() == "Flows · Astera Lite"
    card = page.locator("li.flow", has=page.get_by_text("/weather/{city}", exact=True))
    assert card.locator(".mode").all_inner_texts() == ["sync", "async"]
    assert card.locator(".method").inner_text() == "GET"
    assert "warm days ahead" in card.inner_text()
    card.get_by_role("button", name="Copy the asynchronous URL of weather").click()
    said(page, "Copied")
    assert clipboard(page) == f"{console.url}/api/publishingAsync/weather/{{city}}"
    faults = page.get_by_role("region", name="Files with faults").inner_text()
    assert "broken.json at /request/method" in faults and 'did you mean "GET"?' in faults
    page.get_by_role("button", name="Copy the synchronous curl line of order").click()
    until(lambda: clipboard(page).startswith("curl "))
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", f"{clipboard(page)} -s"], capture_output=True, text=True, timeout=20)
        assert json.loads(done.stdout)["customer"] == "Ada"


def test_copying_works_without_a_clipboard_for_pages(console: Seen) -> None:
    page = console.open("#/jobs")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as on http://192.168.1.2
    page.get_by_role("link", name="Flows").click()
    copy = page.get_by_role("button", name="Copy the synchronous URL of hello")
    copy.click()
    said(page, "Copied")
    assert copy.evaluate("element => element === document.activeElement")
    page.get_by_role("link", name="Jobs").click()
    page.get_by_label("Open by id").focus()
    page.keyboard.press("Control+V")
    assert page.get_by_label("Open by id").input_value() == f"{console.url}/api/publishing/hello"


def test_a_flow_is_tried_synchronously(console: Seen) -> None:
    page = console.open("#/flows/every")
    for label, text in {"where *": "ü/ &", "many *": "1\n2", "count": "5", "tags": "x y\nz=1", "X-Who": "me"}.items():
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_label("sure").select_option("true")
    page.get_by_label("kind *").select_option("rich")
    assert page.locator(".hint", has_text="integer · 1 to 5 · default 2").is_visible()
    page.get_by_role("button", name="Copy as curl").click()
    said(page, "Copied")
    page.get_by_role("button", name="Send", exact=True).click()
    said(page, "The answer is 200 OK")
    sent = raw(page, "Request: request").split("\n")
    path = "/api/publishing/every/%C3%BC%2F%20%26/1%2C2?count=5&sure=true&kind=rich&tags=x%20y&tags=z%3D1"
    assert sent[:3] == [f"GET {path} HTTP/1.1", f"Host: {console.url.removeprefix('http://')}", "X-Who: me"]
    head, _, body = raw(page, "Request: response").partition("\n\n")
    assert head.startswith("HTTP/1.1 200 OK\n") and "\nX-Request-Id: " in head
    given = {"where": "ü/ &", "many": ["1", "2"], "count": 5, "sure": True, "kind": "rich", "tags": ["x y", "z=1"]}
    assert json.loads(body) == given | {"X-Who": "me"}
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", f"{clipboard(page)} -s"], capture_output=True, text=True, timeout=20)
        assert json.loads(done.stdout) == json.loads(body)


def test_what_the_server_refuses_is_shown_as_it_says_it(console: Seen) -> None:
    page = console.open("#/flows/every")
    page.get_by_label("count").fill("many")
    page.get_by_label("kind *").select_option("rich")
    page.get_by_role("button", name="Send", exact=True).click()
    said(page, "The answer is 400 Bad Request")
    errors = json.loads(raw(page, "Request: response").partition("\n\n")[2])["errors"]
    assert [error["name"] for error in errors] == ["count"]
    page.goto(f"{console.url}/#/jobs?status=x")
    page.get_by_text("must be one of Running").wait_for()
    assert page.get_by_role("main").inner_text().count("must be one of") == 1


def test_bodies_are_shown_as_they_were_sent(console: Seen) -> None:
    page = console.open("#/flows/numbers")
    page.get_by_role("button", name="Send", exact=True).click()
    shown = '{\n  "long": 9007199254740993,\n  "none": {},\n  "list": [\n    1,\n    2\n  ]\n}'
    page.get_by_text("Content-Length").wait_for()
    assert raw(page, "Request: response").endswith(f"\n\n{shown}")
    page.goto(f"{console.url}/#/flows/away")
    page.get_by_role("heading", level=1, name="/away").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text("A redirect, which browsers do not show to pages").wait_for()
    said(page, "The answer is a redirect")
    page.goto(f"{console.url}/#/flows/bytes")
    page.get_by_role("heading", level=1, name="/bytes").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text("Content-Length: 180").wait_for()
    page.goto(f"{console.url}/#/flows/deep")
    page.get_by_role("heading", level=1, name="/deep").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text("Content-Length: 1800").wait_for()
    shown = raw(page, "Request: response").rstrip()
    assert shown.endswith("[1," + "1," * 89_998 + "1" + "]" * 21)  # indented, it is 3.9 MB


def test_what_is_not_shown_of_a_request_is_told(console: Seen) -> None:
    page = console.open("#/jobs")

    def shown(body: bytes, media: str = "text/plain") -> str:
        url = f"{console.url}/api/publishingAsync/upload"
        job = console.api.session.post(url, body, headers={"Content-Type": media}, timeout=10).json()["id"]
        page.goto(f"{console.url}/#/jobs/{job}")
        page.locator("main code", has_text=job).wait_for()
        return raw(page, "Raw request").partition("\n\n")[2]

    assert shown(b"\xff\x89PNG" * 300, "application/octet-stream") == "(1.5 KiB that are not text)"
    assert shown(b"\0\1" * 300, "application/octet-stream") == "(600 bytes that are not text)"
    assert shown(b"x" * 4096) == "x" * 4096
    assert shown(b"x" * 5000) == "x" * 4096 + "\n… 4.9 KiB in all"
    cut = shown(("x" + "é" * 3000).encode())  # inside a character
    assert cut.startswith("xé") and cut.endswith("\n… 5.9 KiB in all")


def test_a_body_has_an_example_its_rules_and_its_content_type(console: Seen) -> None:
    page = console.open("#/flows/order")
    body = page.get_by_label("Body")
    example = {"customer": "Ada", "items": [{"sku": "apple", "quantity": 1}]}
    assert json.loads(body.input_value()) == example
    page.get_by_text("Schema of the body").click()
    schema = json.loads(page.get_by_label("Schema", exact=True).inner_text())
    assert schema["properties"]["items"]["items"]["properties"]["quantity"]["minimum"] == 1
    body.fill('{"customer": ')
    assert "application/json · " in page.locator("#body-hint").inner_text()
    assert body.get_attribute("aria-invalid") == "true"
    page.get_by_role("button", name="Example again").click()
    assert json.loads(body.input_value()) == example
    page.goto(f"{console.url}/#/flows/text")
    page.get_by_role("heading", level=1, name="/text").wait_for()
    assert body.input_value() == "text"
    page.get_by_label("Content type").select_option("application/json")
    assert body.input_value() == '"text"'
    page.get_by_role("button", name="Send", exact=True).click()
    said(page, "The answer is 200 OK")
    assert "PUT /api/publishing/text HTTP/1.1" in raw(page, "Request: request")
    assert "Content-Type: application/json" in raw(page, "Request: request")


def test_a_flow_is_tried_asynchronously_to_its_result_and_callback(console: Seen, sink: Sink) -> None:
    page = console.open("#/flows/slow")
    assert page.get_by_label("synchronous", exact=True).count() == 0
    page.get_by_label("seconds").fill("300")
    page.get_by_label("callbackUrl").fill(f"{sink.url}/done?a=b&c")
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text("step pause, 1 of 2 done").wait_for()
    accepted = raw(page, "Request: response")
    assert accepted.startswith("HTTP/1.1 202 Accepted\n")
    job = json.loads(accepted.partition("\n\n")[2])["id"]
    requests.post(f"{console.url}/api/jobs/{job}/cancel", timeout=10)
    page.get_by_role("region", name="Result").wait_for()
    assert "\nJob-Status: Error" in raw(page, "Status: response")
    assert raw(page, "Result: response").startswith("HTTP/1.1 409 Conflict\n")
    headers, document = sink.next()
    assert headers["location"].endswith(f"{document['id']}/result")
    page.get_by_role("link", name="Open the job").click()
    page.get_by_role("heading", level=1, name="Job of slow").wait_for()
    assert document["id"] in page.url


def test_one_answer_of_a_server_that_is_not_well_is_not_the_end(console: Seen) -> None:
    page = console.open("#/flows/hello", clock=True)
    ill = {"status": 503, "json": {"status": 503}}
    page.get_by_label("asynchronous", exact=True).check()
    for asked in ("status", "result"):
        page.route(f"**/{asked}", lambda route: route.fulfill(**ill), times=1)
    page.get_by_role("button", name="Send", exact=True).click()
    passing(page, page.get_by_role("region", name="Result").is_visible)
    assert raw(page, "Result: response").startswith("HTTP/1.1 200 OK")
    page.route("**/result", lambda route: route.fulfill(**ill), times=1)
    page.get_by_role("link", name="Open the job").click()
    page.get_by_text("The server answers 503 Service Unavailable; trying again.").wait_for()
    passing(page, page.get_by_label("Raw response").is_visible)
    assert raw(page, "Raw response").startswith("HTTP/1.1 200 OK\n")
    assert not re.search(r"(?m)^(Date|X-Request-Id): ", raw(page, "Raw response"))  # they are those of a look at it
    zoned = r"\d{4}(-\d\d){2} \d\d(:\d\d){2} GMT(.\d\d:\d\d)? \(\d{4}.*T.*Z\)"
    assert re.fullmatch(zoned, page.locator("time").first.get_attribute("title") or "")


def test_one_flow_that_cannot_be_drawn_leaves_the_others_alone(console: Seen) -> None:
    page = console.open()
    for name in ("names", "nothing", "hello"):
        page.get_by_role("link", name=f"Try it: {name}", exact=True).wait_for()
    page.goto(f"{console.url}/#/flows/names")
    page.get_by_label("constructor").fill("x")
    page.get_by_role("button", name="Send", exact=True).click()
    said(page, "The answer is 200 OK")
    assert "GET /api/publishing/names?constructor=x HTTP/1.1" in raw(page, "Request: request")

    flows = requests.get(f"{console.url}/api/deployments", timeout=10).json()
    next(flow for flow in flows["deployments"] if flow["name"] == "names")["urls"] = None
    page.route("**/api/deployments", lambda route: route.fulfill(json=flows))
    page.get_by_role("link", name="Flows", exact=True).click()
    page.get_by_text("names cannot be shown").wait_for()
    page.get_by_role("link", name="Try it: hello").wait_for()
    page.route("**/api/deployments", lambda route: route.fulfill(json={}))
    page.goto(f"{console.url}/#/jobs/x")
    page.get_by_role("link", name="Flows", exact=True).click()
    page.get_by_text("The page failed").wait_for()


def test_examples_keep_to_the_bounds_and_what_is_required_is_asked_for(console: Seen) -> None:
    page = console.open("#/flows/bounds")
    assert json.loads(page.get_by_label("Body").input_value()) == {"few": -2, "word": "wordxxx", "list": [True] * 3}
    refused = requests.post(f"{console.url}/api/publishing/bounds", json=1, timeout=10).json()
    assert refused["detail"] == "body: must be an object"
    page.goto(f"{console.url}/#/flows/every")
    page.get_by_label("where *").fill("")
    page.get_by_role("button", name="Send", exact=True).click()
    assert page.evaluate("document.activeElement.name") == "p-where"
    assert page.locator(":user-invalid").count() == 2
    assert page.get_by_label("Request: request").count() == 0


def test_a_line_for_curl_sends_what_the_page_sends(console: Seen) -> None:
    page = console.open("#/flows/text")
    for body in ("@/etc/hostname", "it's\na line"):
        page.get_by_label("Body").fill(body)
        page.get_by_role("button", name="Copy as curl").click()
        until(lambda body=body: f"--data-raw '{body[:2]}" in clipboard(page))  # type: ignore[misc]
        if shutil.which("curl"):
            done = subprocess.run(["sh", "-c", f"{clipboard(page)} -s"], capture_output=True, text=True, timeout=20)
            assert json.loads(done.stdout) == body


def test_each_field_is_described_by_its_hint(console: Seen) -> None:
    page = console.open("#/flows/odd")
    texts = (
        "field => field.getAttribute('aria-describedby').split(' ').map(id => document.getElementById(id)?.innerText)"
    )
    for name in ("first name", "a%20b", "a b"):
        assert page.get_by_label(name, exact=True).evaluate(texts) == ["query"]
        page.get_by_label(name, exact=True).fill(name)
    page.get_by_role("link", name="Flows", exact=True).click()
    page.get_by_role("heading", level=1, name="Flows").wait_for()
    page.go_back()
    page.get_by_role("heading", level=1, name="/odd").wait_for()
    assert page.locator("#curl").inner_text().endswith("?first%20name=first%20name&a%2520b=a%2520b&a%20b=a%20b'")


def test_what_was_typed_is_there_when_one_comes_back(console: Seen) -> None:
    page = console.open("#/flows/every")
    page.get_by_label("many *").fill("1\n2")
    page.get_by_label("kind *").select_option("rich")
    page.get_by_label("asynchronous", exact=True).check()
    page.get_by_label("callbackUrl").fill("http://127.0.0.1:1/")
    line = page.locator("#curl").inner_text()
    assert "1%2C2" in line and "kind=rich" in line and "callbackUrl" in line
    page.get_by_role("link", name="Jobs", exact=True).click()
    page.get_by_role("heading", level=1, name="Jobs").wait_for()
    page.go_back()
    page.get_by_role("heading", level=1, name="/every").wait_for()
    assert page.locator("#curl").inner_text() == line
    assert page.get_by_label("many *").input_value() == "1\n2"


def test_what_was_typed_outlives_another_token(tmp_path: Path, pages: Callable[..., Page]) -> None:
    write_flows(tmp_path)
    with process(tmp_path, env={"ASTERA_LITE_TOKEN": "a-token-of-some-length"}) as (_, url, _):
        page = pages(url, "#/flows/hello")
        for asking in ("Enter token", "Token ✓"):
            page.get_by_role("button", name=asking).click()
            page.locator("#token-text").fill("a-token-of-some-length")
            page.keyboard.press("Enter")
            page.locator("h1:focus").get_by_text("/hello").wait_for()  # where a reader goes on
            if asking == "Enter token":
                page.get_by_label("name").fill("Grace")
        assert page.get_by_label("name").input_value() == "Grace"


def test_a_double_click_makes_one_job(console: Seen) -> None:
    page = console.open("#/flows/hello")
    made: list[str] = []
    page.on("response", lambda answer: made.append(answer.url) if answer.status in (201, 202) else None)
    page.get_by_label("asynchronous", exact=True).check()
    page.get_by_role("button", name="Send", exact=True).dblclick(delay=20)
    page.get_by_role("region", name="Result").wait_for()
    assert len(made) == 1
    page.get_by_role("link", name="Open the job").click()
    again = page.get_by_role("button", name="Run again")
    page.route("**/rerun", lambda route: None)
    again.click()
    page.locator("button[aria-disabled=true]", has_text="Run again").wait_for()
    page.wait_for_timeout(1100)  # no redrawing of the page sets it free
    assert again.get_attribute("aria-disabled") == "true"
    page.unroute("**/rerun")
    page.reload()
    made.clear()
    old = page.url
    again.dblclick()
    page.wait_for_url(lambda url: url != old)
    page.locator(".head .Completed").wait_for()
    assert len(made) == 1


def test_the_polls_of_a_job_have_pauses_and_rest_while_nobody_looks(tmp_path: Path, pages: Callable[..., Page]) -> None:
    write_flows(tmp_path)
    polls: list[str] = []
    with process(tmp_path, "--max-wait", "0s") as (started, url, _):
        page = pages(url, "#/flows/slow", clock=True)
        page.on("request", lambda request: polls.append(request.url) if request.url.endswith("/status") else None)
        page.get_by_label("seconds").fill("300")
        page.get_by_role("button", name="Send", exact=True).click()
        page.get_by_text("asked 1×").wait_for()
        page.wait_for_timeout(300)
        assert len(polls) == 1
        passing(page, lambda: len(polls) > 2)
        page.evaluate(LOOK % "hidden")
        page.clock.run_for(20_000)
        page.wait_for_timeout(100)
        polls.clear()
        page.clock.run_for(20_000)
        page.wait_for_timeout(100)
        assert polls == []
        page.evaluate(LOOK % "visible")
        passing(page, lambda: bool(polls))
        page.route("**/status", lambda route: route.fulfill(status=401, json={"status": 401}))
        passing(page, page.get_by_text("The job goes on, but its status cannot be read: 401").is_visible)
        page.unroute("**/status")
        page.get_by_role("button", name="Send", exact=True).click()
        page.get_by_text("asked 1×").wait_for()
        started.kill()
        passing(page, page.get_by_text("The server has stopped answering. It has accepted the job").is_visible)
        assert "#/jobs/" in str(page.get_by_role("link", name="Open the job").get_attribute("href"))


def test_the_list_of_jobs_is_live_filtered_and_paged(console: Seen) -> None:
    ids = [console.api.submit("/hello", name=str(number)) for number in range(55)]
    page = console.open("#/jobs")
    rows = page.locator("tbody tr")
    assert rows.count() == 50
    first = page.get_by_role("link", name=ids[-1])
    first.focus()
    failed = requests.post(
        f"{console.url}/api/publishingAsync/orders",
        json={"customer": "Ada", "items": [{"sku": "plum", "quantity": 1}]},
        timeout=10,
    ).json()["id"]
    page.get_by_role("link", name=failed).wait_for()
    assert first.evaluate("element => element === document.activeElement")
    page.get_by_role("link", name="Older").click()
    page.get_by_role("link", name=ids[0]).wait_for()
    assert "cursor=" in page.url and page.get_by_role("link", name=ids[-1]).count() == 0
    page.get_by_role("link", name="Newer").click()
    page.get_by_role("link", name=failed).wait_for()
    page.get_by_role("link", name="Older").click()
    page.get_by_role("link", name="Newest").click()
    page.get_by_role("link", name=failed).wait_for()
    page.get_by_role("combobox", name="Status").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.wait_for_url("**status=Error")  # until its rows are there, those of a status on the way may be shown: none
    until(lambda: {"Error"} <= set(rows.locator("td:first-child").all_inner_texts()) <= {"Error", "Cancelled"})
    assert page.evaluate("document.activeElement.name") == "status"
    assert page.get_by_role("link", name=ids[-1]).count() == 0
    page.get_by_role("combobox", name="Flow").select_option("hello")
    page.get_by_text("No such jobs").wait_for()
    page.get_by_role("link", name="Show all jobs").click()
    page.get_by_role("link", name=failed).wait_for()
    assert page.get_by_role("combobox", name="Status").input_value() == ""
    page.go_back()
    page.get_by_text("No such jobs").wait_for()
    assert page.get_by_role("combobox", name="Status").input_value() == "Error"
    page.reload()
    page.get_by_text("No such jobs").wait_for()
    page.get_by_label("Open by id").fill(failed)
    page.get_by_label("Open by id").press("Enter")
    page.get_by_text("not enough in stock: plum", exact=True).wait_for()
    assert page.get_by_label("Raw response").inner_text().startswith("HTTP/1.1 409 Conflict")


def test_a_choice_that_is_made_while_an_earlier_one_loads_is_kept(console: Seen) -> None:
    page, held, running = console.open("#/jobs"), list[Any](), re.compile("/api/jobs.*status=Running")
    page.add_init_script("addEventListener('hashchange', (event) => window.late && event.stopImmediatePropagation())")
    page.reload()
    page.route(running, lambda route: held.append(route))
    status = page.get_by_role("combobox", name="Status")
    status.focus()
    with page.expect_request(running):
        page.keyboard.press("ArrowDown")
    page.evaluate("window.late = true")  # the event that tells the page of its new address; the address has changed
    page.keyboard.press("ArrowDown")
    with page.expect_response(running):
        held[0].continue_()
    page.evaluate("new Promise((done) => setTimeout(done, 100))")  # what the page makes of the response
    assert status.input_value() == "Completed"


def test_a_job_is_cancelled_run_again_and_deleted(console: Seen) -> None:
    job = console.api.submit("/slow", seconds=300)
    page = console.open(f"#/jobs/{job}")
    page.get_by_text("step pause, 1 of 2 done").wait_for()
    assert page.get_by_role("listitem").all_inner_texts()[0].startswith("Accepted")
    page.get_by_role("button", name="Delete").click(force=True)
    said(page, "Not now: the job is still running.")
    page.get_by_role("button", name="Cancel").click()
    page.locator(".head .state", has_text="Cancelled").wait_for()
    page.get_by_text("The job was cancelled.", exact=True).wait_for()
    assert page.locator("main .fault").count() == 0  # which is red: nothing failed
    page.get_by_role("button", name="Cancel").click(force=True)
    said(page, "Not now: the job is finished.")
    page.get_by_role("button", name="Run again").click()
    page.wait_for_url(lambda url: "#/jobs/" in url and job not in url)
    page.locator(".head .state", has_text="Running").wait_for()
    assert page.get_by_label("Raw request").inner_text() == "GET /slow?seconds=300"
    page.get_by_role("button", name="Cancel").click()
    page.locator(".head .state", has_text="Cancelled").wait_for()
    again = page.url.rpartition("/")[2]
    page.get_by_role("button", name="Copy id").click()
    said(page, "Copied")
    assert clipboard(page) == again
    questions: list[str] = []
    page.once("dialog", lambda dialog: (questions.append(dialog.message), dialog.dismiss()))
    page.get_by_role("button", name="Delete").click()
    assert [text.partition("?")[0] for text in questions] == ["Delete this job"]
    assert console.api.job(again)["status"] == "Error"
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete").click()
    said(page, "The job was deleted")
    page.get_by_role("heading", level=1, name="Jobs").wait_for()
    assert console.api.job(again)["status"] == "Unknown"
    page.go_back()
    page.get_by_text("Unknown job").wait_for()


def test_callbacks_are_shown_with_their_attempts_and_sent_again(console: Seen, sink: Sink) -> None:
    job = console.api.submit("/hello", callbackUrl=f"{sink.url}/done")
    sink.next()
    page = console.open(f"#/jobs/{job}")
    page.get_by_text("Called back").wait_for()
    page.get_by_role("button", name="Send callback again").click()
    said(page, "The callback is sent again")
    sink.next()
    page.get_by_text("2 attempts").wait_for()
    attempts = page.get_by_role("table", name="Callback attempts").get_by_role("row")
    assert [row.get_by_role("cell").last.inner_text() for row in attempts.all()[1:]] == ["204", "204"]
    sink.answers = [500]
    owed = console.api.submit("/hello", callbackUrl=f"{sink.url}/done")
    sink.next()
    page.goto(f"{console.url}/#/jobs/{owed}")
    page.get_by_text(re.compile(r"1 attempt, next in \d")).wait_for()
    page.get_by_role("button", name="Delete").click(force=True)
    said(page, "Not now: its callback is still pending.")


def test_steps_are_shown_with_their_output(console: Seen) -> None:
    order = {"customer": "Ada", "items": [{"sku": "plum", "quantity": 1}]}
    job = requests.post(f"{console.url}/api/publishingAsync/orders", json=order, timeout=10).json()["id"]
    console.api.job(job, wait=5)
    page = console.open(f"#/jobs/{job}")
    rows = page.get_by_role("table", name="Steps").get_by_role("row").all()
    shown = [[cell.inner_text() for cell in row.get_by_role("cell").all()] for row in rows[1:]]
    assert [tuple(cells[:3]) for cells in shown[1:]] == [
        ('short\n["plum"]', "set", "finished"),
        ("refused\n\nnot enough in stock: plum\n\norder.json, line 36 · /steps/2/fail", "fail", "failed"),
    ]
    assert shown[0][0].startswith('stock\n{"apple":')
    assert page.locator("h2", has_text="409 Conflict · failed").count() == 1


def test_the_reason_of_a_failure_is_shown(console: Seen) -> None:
    job = console.api.submit("/registering", api=console.url)
    console.api.job(job, wait=5)
    page = console.open(f"#/jobs/{job}")
    answer, place = (
        '{\n  "message": "email is taken"\n}',
        "registering.json, line 1 · /steps/1/each/steps/0/http · attempt 2 of 2",
    )
    card = page.locator("main .fault")
    assert card.locator("p").all_inner_texts() == ["each_one/0/register: the API it calls answered 422", place]
    assert card.get_by_label("Answer 422").inner_text() == answer
    rows = page.get_by_role("table", name="Steps").get_by_role("row")
    going_on = rows.filter(has=page.get_by_text("optional", exact=True))
    assert "division by zero" in going_on.inner_text() and "/steps/0/set" in going_on.inner_text()
    failed = rows.filter(has=page.locator("code", has_text="each_one/0/register"))
    assert failed.locator("p").all_inner_texts()[:2] == ["the API it calls answered 422", place]
    assert failed.get_by_label("Answer 422").first.is_visible()
    failed.get_by_text("Earlier failed attempts: 1").click()
    assert "attempt 1 of 2" in failed.locator("details").inner_text()


@pytest.mark.parametrize("width", [320, 768, 1000, 1440])
def test_no_space_is_left_empty_and_no_word_is_broken(console: Seen, width: int) -> None:
    job = console.api.submit("/naming")
    console.api.finished(job)
    page = console.open(f"#/jobs/{job}", width=width)
    page.locator("#health dl").wait_for()
    ends = """list => {
        const edge = list.getBoundingClientRect().right, rows = {};
        for (const cell of list.children) {
            const { top, right } = cell.getBoundingClientRect();
            rows[top] = Math.max(rows[top] ?? 0, right);
        }
        return Object.values(rows).map((right) => Math.round(edge - right));
    }"""
    assert set(page.locator("#health dl").evaluate(ends)) == {1}  # its border
    lines = """names => names.flatMap((name) => [...name.childNodes].filter((node) => node.data).map((node) => {
        const range = document.createRange();
        range.selectNode(node);
        return [node.data, range.getClientRects().length];
    }))"""
    parts = page.get_by_role("table", name="Steps").locator("code").evaluate_all(lines)
    assert dict(parts)["notifyAccountingDepartment"] == 1
    assert {count for _, count in parts} == {1}


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_buttons_that_belong_together_stand_together(console: Seen, width: int) -> None:
    tops = (
        "boxes => boxes.map((box) => box.map((one) => one.getBoundingClientRect().top)).map((at) => new Set(at).size)"
    )
    page = console.open("#/flows", width=width)
    buttons = "ways => ways.map((way) => [...way.querySelectorAll('button')])"
    ways = page.locator(".way")
    assert set(ways.evaluate_all(f"ways => ({tops})(({buttons})(ways))")) == {1}
    job = console.api.submit("/hello")
    page.goto(f"{console.url}/#/jobs/{job}")
    page.get_by_role("button", name="Copy result URL").wait_for()
    bottom = page.get_by_role("button", name="Copy result URL").evaluate("one => one.getBoundingClientRect().bottom")
    top, _, _, last = (
        page.get_by_role("button", name=name, exact=True).evaluate("one => one.getBoundingClientRect().top")
        for name in ("Cancel", "Run again", "Send callback again", "Delete")
    )
    assert top >= bottom if width < 1000 else top == last


def test_values_are_rounded_before_they_are_written(console: Seen) -> None:
    page = console.open("#/flows", clock=True)
    shown = {
        400: "400 ms", 999.6: "1.0 s", 59_940: "59.9 s", 59_960: "1 min 0 s", 119_700: "2 min 0 s",
        3_599_400: "59 min 59 s", 3_599_700: "1 h 0 min", 7_170_000: "2 h 0 min", 8_000_000: "2 h 13 min",
    }  # fmt: skip
    assert page.evaluate("times => times.map(lasting)", list(shown)) == list(shown.values())
    health = console.api.session.get(f"{console.url}/health", timeout=10).json()
    for count, text in {1023: "1023 bytes", 1024: "1.0 KiB", (1 << 20) - 1: "1.0 MiB", 5 << 40: "5120.0 GiB"}.items():
        health["database"]["bytes"] = count
        page.route("**/health", lambda route: route.fulfill(json=health))
        passing(page, page.locator("#health dd", has_text=text).is_visible)


def test_health_is_seen_at_a_glance(console: Seen) -> None:
    page = console.open("#/jobs")
    health = page.get_by_role("region", name="Health")
    before = health.inner_text()
    assert "OK" in before and "of 32" in before and "iB" in before
    for number in range(20):
        console.api.submit("/hello", name=str(number))
    rate = health.locator("dd", has_text="/ s")
    until(lambda: rate.count() and float(rate.inner_text().split()[0]) > 0)
    name = health.get_by_role("img", name="Jobs finished a second").get_attribute("aria-label")
    assert name is not None and float(name.split()[-1]) > 0


def test_servers_that_share_a_database_are_shown(console: Seen) -> None:
    page = console.open("#/jobs", clock=True)
    servers = page.get_by_role("table", name="Servers")
    assert not servers.count()
    about = {"number": 0, "since": "2026-11-29T05:27:09.550Z", "leaseLeftMs": 12_000, "jobs": 7, "self": True}
    nodes = [{"name": "north", **about}, {"name": LONG, **about, "number": 1, "jobs": 0, "self": False}]
    health = console.api.session.get(f"{console.url}/health", timeout=10).json() | {"node": "north", "nodes": nodes}
    page.route("**/health", lambda route: route.fulfill(json=health))
    passing(page, servers.is_visible)
    row = servers.get_by_role("row", name="north")
    assert [row.get_by_role("cell").nth(at).inner_text() for at in (0, 1, 3)] == ["north (responds)", "7", "12.0 s"]
    health["nodes"] = nodes[:1]
    passing(page, servers.is_hidden)


def test_a_server_that_is_not_well_says_why(console: Seen) -> None:
    page = console.open("#/jobs", clock=True)
    ill = console.api.session.get(f"{console.url}/health", timeout=10).json()
    ill |= {"status": "unavailable", "reason": "the disk is full"}
    page.route("**/health", lambda route: route.fulfill(status=503, json=ill))
    alert = page.get_by_role("alert").filter(has_text="The server accepts no jobs: the disk is full")
    passing(page, alert.is_visible)
    assert "unavailable" in page.get_by_role("region", name="Health").inner_text()
    page.unroute("**/health")
    passing(page, alert.is_hidden)


def test_a_view_that_is_awaited_says_so(console: Seen) -> None:
    page, held = console.open("#/flows"), list[Any]()
    page.route("**/api/jobs?*", lambda route: held.append(route))
    with page.expect_request("**/api/jobs?*"):
        page.get_by_role("link", name="Jobs", exact=True).click()
    assert page.get_by_role("main").get_attribute("aria-busy") == "true"
    held[0].continue_()
    page.get_by_role("heading", level=1, name="Jobs").wait_for()
    assert page.get_by_role("main").get_attribute("aria-busy") is None


@pytest.mark.parametrize("view", ["flows", "flows/hello", "jobs", "jobs/any"])
def test_what_is_not_an_answer_of_the_server_is_not_taken_for_one(console: Seen, view: str) -> None:
    page = console.open("#/jobs?status=Error")
    page.route("**/api/**", lambda route: route.fulfill(body="<title>Log in</title>", content_type="text/html"))
    page.goto(f"{console.url}/#/{view}")
    page.get_by_text("The answer is not from Astera Lite: its content type is text/html").wait_for()
    assert page.get_by_role("main").get_by_role("button").count() == 0


def test_a_page_that_is_not_seen_asks_for_nothing(console: Seen) -> None:
    page = console.open("#/jobs", clock=True)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(console.url).partition("?")[0]))
    passing(page, lambda: set(asked) >= {"/api/jobs", "/health"})
    page.evaluate(LOOK % "hidden")
    page.wait_for_timeout(200)  # for what is under way
    asked.clear()
    for _ in range(5):
        page.clock.run_for(3000)
        page.wait_for_timeout(50)
    assert asked == []
    page.evaluate(LOOK % "visible")
    passing(page, lambda: set(asked) >= {"/api/jobs", "/health"})


def test_tokens_are_asked_for_and_kept_in_memory_only(tmp_path: Path, pages: Callable[..., Page]) -> None:
    write_flows(tmp_path)
    token = "schlüssel-☃-of-some-length"
    with process(tmp_path, env={"ASTERA_LITE_TOKEN": token}) as (_, url, _):
        page = pages(url, "#/jobs")
        page.get_by_text("A token is required").wait_for()
        assert "with a token" in page.locator("#health").inner_text()
        page.get_by_role("button", name="Enter token").click()
        page.locator("#token-text").fill("wrong")
        page.get_by_role("button", name="Use it").click()
        page.get_by_text("it may be mistyped or revoked").wait_for()
        assert page.get_by_role("button", name="Token ✓").count() == 0  # which would say that the server takes it
        page.get_by_role("button", name="Token", exact=True).click()
        page.locator("#token-text").fill(token)
        page.keyboard.press("Enter")
        page.get_by_text("No jobs yet").wait_for()
        page.get_by_role("link", name="try a flow").click()
        page.get_by_role("link", name="Try it: hello").click()
        page.get_by_role("button", name="Send", exact=True).click()
        said(page, "The answer is 200 OK")
        assert "Authorization: Bearer ••••" in raw(page, "Request: request")
        assert '-H "Authorization: Bearer $TOKEN"' in page.locator("#curl").inner_text()
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])")
        assert "schl" not in kept and "schl" not in page.content()
        page.get_by_role("button", name="Token ✓").click()
        page.get_by_role("button", name="Forget it").click()
        page.get_by_text("A token is required").wait_for()
        page.get_by_role("button", name="Enter token").click()
        page.get_by_role("button", name="Cancel").click()
        assert page.get_by_role("dialog").count() == 0


def test_a_server_that_is_gone_is_told_and_looked_for(tmp_path: Path, pages: Callable[..., Page]) -> None:
    (tmp_path / "flows").mkdir()
    with process(tmp_path) as (_, url, _):
        page = pages(url, clock=True)
        page.get_by_text("python astera_lite.py new NAME").wait_for()
        other = pages(url, "#/jobs", clock=True)
        other.get_by_text("newest first, live").wait_for()
    passing(other, other.get_by_text(re.compile("The server does not answer; last seen at [0-9:]+")).is_visible)
    assert other.get_by_text("newest first").is_visible() and other.get_by_text("live").is_hidden()
    alert = page.get_by_role("alert").filter(has_text="The server does not answer")
    passing(page, alert.is_visible)
    assert "gone" in page.get_by_role("region", name="Health").inner_text()
    page.get_by_text("python astera_lite.py new NAME").wait_for()  # what was there stays
    (tmp_path / "flows" / "hello.json").write_text((ROOT / "flows" / "hello.json").read_text())
    with process(tmp_path, "--port", url.rpartition(":")[2]):
        passing(page, alert.is_hidden)
        said(page, "The server answers again")
        page.get_by_role("link", name="Try it: hello").wait_for()
        passing(other, other.get_by_text("newest first, live").is_visible)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_every_view_fits_and_is_accessible(console: Seen, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    console.api.submit("/slow", seconds=300)
    owed = console.api.submit("/hello", name="A" * 80, callbackUrl="http://127.0.0.1:1/" + "x" * 80)
    waits = console.api.submit("/slow", seconds=300)
    fails = console.api.submit("/long")
    why = console.api.submit("/registering", api=console.url)
    page = console.open(width=width, scheme=scheme, bypass_csp=True)  # for what looks at the page
    views = {
        "#/flows": "Flows", "#/flows/every": "/every", "#/flows/order": "/orders", "#/jobs": "Jobs",
        f"#/jobs/{owed}": "Job of hello", f"#/jobs/{waits}": "Job of slow", "#/jobs/nothing": "Job nothing",
        "#/flows/long": "/long", f"#/jobs/{fails}": "Job of long",
        f"#/jobs/{why}": "Job of registering",
    }  # fmt: skip
    for fragment, title in views.items():
        page.goto(f"{console.url}/{fragment}")
        page.get_by_role("heading", level=1, name=title).wait_for()
        if "/order" in fragment:
            page.get_by_role("button", name="Send", exact=True).click()
            said(page, "The answer is 201 Created")
        if fragment == "#/flows/long":
            page.get_by_role("button", name="Send", exact=True).click()
            page.get_by_text("500 Internal Server Error ·").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), fragment
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
    assert page.get_by_text("Colours").is_visible()
    page.get_by_label("Colours").select_option("light")
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light"
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light"
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"


def test_everything_can_be_done_by_keyboard(console: Seen) -> None:
    page = console.open()
    press = page.keyboard.press
    name_of = "(e => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText)(document.activeElement)"

    def tab_to(name: str) -> None:
        seen = []
        for _ in range(80):
            press("Tab")
            seen.append(page.evaluate(name_of))
            if seen[-1] == name:
                return
        raise AssertionError(f"{name} is not among {seen}")

    press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the content"
    press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    tab_to("Try it: slow")
    press("Enter")
    page.get_by_role("heading", level=1, name="/slow").wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1"  # so that a reader begins there
    tab_to("seconds")
    page.keyboard.type("0.2")
    tab_to("Send")
    press("Enter")
    page.get_by_role("region", name="Result").wait_for()
    assert json.loads(raw(page, "Result: response").partition("\n\n")[2])["waited"] == 0.2
    tab_to("Open the job")
    press("Enter")
    page.get_by_role("heading", level=1, name="Job of slow").wait_for()
    tab_to("Delete")
    page.once("dialog", lambda dialog: dialog.dismiss())
    press("Enter")
    assert page.evaluate("document.activeElement.innerText") == "Delete"
    page.once("dialog", lambda dialog: dialog.accept())
    press("Space")
    page.get_by_role("heading", level=1, name="Jobs").wait_for()


def test_names_stand_before_their_values_in_every_script(console: Seen) -> None:
    page = console.open("#/flows/written")
    page.get_by_role("button", name="Send", exact=True).click()
    left = """(body, text) => {
        const texts = document.createTreeWalker(body, NodeFilter.SHOW_TEXT), range = document.createRange();
        while (!texts.nextNode().data.includes(text));
        const at = texts.currentNode.data.indexOf(text);
        range.setStart(texts.currentNode, at);
        range.setEnd(texts.currentNode, at + text.length);
        return range.getBoundingClientRect().left;
    }"""
    answer = page.get_by_label("Request: response")
    answer.get_by_text("שלום").wait_for()
    assert answer.evaluate(left, "שלום") < answer.evaluate(left, "عالم")
    assert '"שלום": "عالم",\n' in answer.text_content()  # with nothing in it that was not sent
    page.goto(f"{console.url}/#/flows/written_long")
    page.get_by_role("heading", level=1, name="/written-long").wait_for()
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text("truncated").wait_for()  # soon: the quotation that is cut has no end


def test_hostile_texts_stay_texts(console: Seen) -> None:
    job = console.api.submit("/hostile", text=HOSTILE, callbackUrl="http://127.0.0.1:1/?<img%20src=x>")
    console.api.job(job, wait=5)
    page = console.open()
    seen = HOSTILE.replace("\u202e", r"\u202e")
    assert seen in page.get_by_role("main").text_content()
    page.goto(f"{console.url}/#/flows/hostile")
    page.locator("[name=p-text]").fill(HOSTILE)
    page.get_by_role("button", name="Send", exact=True).click()
    said(page, "The answer is 200 OK")
    assert seen in page.get_by_label("Request: response").text_content()
    assert page.locator("[name=p-text]").input_value() == HOSTILE
    assert "\u202e" not in page.get_by_role("main").inner_text()
    for fragment in (f"#/jobs?flow={HOSTILE}", f"#/flows/{HOSTILE}", f"#/jobs/{HOSTILE}", "#/flows/%E0%A4%A"):
        page.goto(f"{console.url}/{fragment}")
        page.wait_for_timeout(150)
        page.locator("main h1").wait_for()
    page.goto(f"{console.url}/#/jobs/{job}")
    page.get_by_label("Raw response").get_by_text("onerror").wait_for()
    assert page.evaluate("window.hit") is None
    assert page.locator("main img, main script").count() == 0
