"""Hostile input, in every place where input comes in: refused with a 4xx, never a 5xx, a traceback or a stall."""

from __future__ import annotations

import gc
import io
import json
import logging
import re
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes, unquote_to_bytes

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from support import EVERYTHING, Running, get_flow, process, running, talk

import astera_lite
import astera_lite_advice
import astera_lite_notices
from astera_lite import Flow, from_json, parse_prefer, unquote
from astera_lite_requests import Pattern

pytestmark = pytest.mark.both_stores

SYNC, ASYNC = "/api/publishing", "/api/publishingAsync"
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
FLOWS: dict[str, Any] = EVERYTHING | {
    "sql": {
        "request": {"method": "POST", "resource": "/sql", "body": {}},
        "steps": [
            {
                "name": "row",
                "sql": {"database": "d.db", "query": "SELECT :v AS v", "params": {"v": "${request.body}"}, "one": True},
            }
        ],
        "response": {"body": "${row.v}"},
    },
    "moving": get_flow(
        "/moving",
        request={"parameters": {"to": {"in": "query"}}},
        response={"status": 302, "headers": {"Location": "${params.to}", "X-Kept": "${params.to}"}},
    ),
    "typed": get_flow(
        "/typed",
        request={"parameters": {"type": {"in": "query"}}},
        response={"headers": {"Content-Type": "${params.type}"}, "body": "x"},
    ),
    "lines": get_flow(
        "/lines",
        request={"parameters": {"v": {"in": "query", "pattern": "^[a-z]+$"}}},
        response={"headers": {"X-V": "${params.v}"}, "body": "${params.v}"},
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "data").mkdir()
    with running(folder, FLOWS, max_wait="2s", data=str(folder / "data")) as server:
        import sqlite3

        sqlite3.connect(folder / "data" / "d.db").close()
        yield server


@pytest.fixture(autouse=True)
def no_traceback(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing that a client sends is a fault of the server."""
    yield
    assert [
        record.getMessage() for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR
    ] == []


def refused(answer: requests.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or (400,)), (answer.status_code, answer.text[:300])
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert "Traceback" not in answer.text and "codec" not in answer.text


#: What stands percent-encoded where a text is expected.
EVIL = [
    "%", "%zz", "%u0041", "%ff", "%c0%ae", "%ed%a0%80", "%00", "a%00b", "%0d%0aX-Evil:%20yes", "%0aX-Evil:%20yes",
    "%1b[31m", "%7f", "%C2%85", "%E2%80%A8", "%E2%80%AE", "%F0%9F%98%80", "%EF%BB%BF", "..%2f..%2fetc%2fpasswd",
    "%2e%2e", "..%5c", "%20", "9" * 30, "-0", "1e5", "NaN", "Infinity", "1e999999", "1" * 5000, "%D9%A1", "1_0",
    "';drop%20table%20jobs--", "${1}", "%24%7B1%7D", "<script>", "true%0a", "2026-01-01%0a", "0000-01-01",
    "2026-02-30", "2026-01-01T00:00:60Z", "2026-01-01T00:00:00+99:99",
]  # fmt: skip
#: Where it stands.
PLACES = [
    *[f"{{mode}}/types?q-{kind}={{evil}}" for kind in (*astera_lite.PARAMETER_TYPES, "array")],
    "{mode}/types?{evil}", "{mode}/types?{evil}={evil}", "{mode}/types?undeclared={evil}", "{mode}/{evil}",
    "{mode}/path/{evil}/2026-01-01/w/x", "{mode}/path/1/{evil}/w/x", "{mode}/path/1/2026-01-01/{evil}/x",
    "{mode}/path/1/2026-01-01/w/{evil}", "{mode}/reflecting?value={evil}", "{mode}/responding?value={evil}",
    "{mode}/refusing?why={evil}", "{mode}/moving?to={evil}", "{mode}/rows?cursor={evil}", "{mode}/rows?sort_by={evil}",
    "{mode}/rows?state={evil}", "{mode}/once?callbackUrl={evil}", "{mode}/once?callbackUrl=http://127.0.0.1:1{evil}",
    "/api/jobs?cursor={evil}", "/api/jobs?limit={evil}", "/api/jobs?flow={evil}", "/api/jobs?status={evil}",
    "/api/jobs/{evil}", "/api/jobs/{evil}/status", "/api/jobs/{evil}/result", "/api/deployments/{evil}", "/{evil}",
]  # fmt: skip


def raw(run: Running, method: str, target: str, headers: bytes = b"", body: bytes = b"") -> tuple[int, bytes, bytes]:
    """Status, head and body of a request that no client library has put right."""
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n".encode("latin-1") + headers
    if body:
        head += b"Content-Length: %d\r\n" % len(body)
    answer = talk(run.server, head + b"\r\n" + body)
    start, _, rest = answer.partition(b"\r\n\r\n")
    return int(start[9:12]), start, rest


def is_clean(status: int, head: bytes, body: bytes) -> None:
    assert status < 500, (status, body[:300])
    assert not re.search(rb"(?mi)^(x-evil|set-cookie)", head)
    assert not re.search(rb"[^\t\x20-\x7e\x80-\xff\r\n]", head)
    if b"\r\nContent-Type: application/problem+json" in head:
        assert json.loads(body)["status"] == status


@pytest.mark.parametrize("place", PLACES)
def test_evil_text_in_a_url(run: Running, place: str) -> None:
    for mode in (SYNC, ASYNC) if "{mode}" in place else ("",):
        for evil in EVIL:
            is_clean(*raw(run, "GET", place.format(mode=mode, evil=evil)))


def test_no_job_brings_a_5xx_later(run: Running) -> None:
    for evil in EVIL:
        for flow in ("reflecting?value=", "responding?value=", "moving?to="):
            is_clean(*raw(run, "GET", f"{ASYNC}/{flow}{evil}", b"Prefer: wait=2\r\n"))


@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST"])
def test_evil_names_of_deployments(run: Running, method: str) -> None:
    for evil in EVIL:
        status, head, body = raw(run, method, f"/api/deployments/{evil}", b"Content-Type: application/json\r\n", b"{}")
        is_clean(status, head, body)
        assert status in (403, 404, 405)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("a\r\nX-Evil: yes", "a%0D%0AX-Evil: yes"),
        ("a\0b", None),
        ("\u2028", "%E2%80%A8"),
        ("Käse €", "K%C3%A4se %E2%82%AC"),
        ("  around  ", "around"),
        ("\x7f\x1b", "%7F%1B"),
        ("😀", "%F0%9F%98%80"),
        ("", ""),
    ],
)
def test_request_data_in_a_header_of_the_answer(run: Running, sent: str, kept: str | None) -> None:
    for prefix, headers in ((SYNC, {}), (ASYNC, {"Prefer": "wait=2"})):
        answer = run.client.get(f"{prefix}/moving?to={quote(sent)}", headers=headers)
        if kept is None:
            refused(answer)
        else:
            assert answer.status_code == 302
            assert answer.headers["Location"] == kept
            assert answer.headers["X-Kept"] == kept.replace(
                "%C3%A4", "ä"
            )  # Latin-1 may stand in a header, not in a URL
            assert "X-Evil" not in answer.headers


def test_a_pattern_does_not_let_a_line_feed_through(run: Running) -> None:
    refused(run.client.get(f"{SYNC}/lines?v=abc%0a"))
    assert run.client.get(f"{SYNC}/lines?v=abc").headers["X-V"] == "abc"


#: JSON that is refused.
WRONG_JSON = {
    "NaN": b"NaN", "infinity": b"[-Infinity]", "beyond a double": b"1e999999", "beyond 64 bits": b"9223372036854775808",
    "below 64 bits": b"-9223372036854775809", "40 digits": b"1" * 40, "a million digits": b"1" * 1_000_000,
    "a lone surrogate": b'"\\ud800"', "a surrogate in a name": b'{"\\uDC00": 1}', "NUL": b'"\\u0000"',
    "NUL in a name": b'{"a\\u0000": 1}', "a raw NUL": b'"\x00"', "invalid UTF-8": b'"\xff"',
    "BOMs": b"\xef\xbb\xbf" * 2 + b"{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"), "a name twice": b'{"a": 1, "a": 2}', "something behind": b"{} x",
    "a comma": b"[1,]", "single quotes": b"{'a': 1}", "blanks": b" ", "deep lists": b"[" * 101 + b"]" * 101,
    "deep objects": b'{"a":' * 101 + b"1" + b"}" * 101, "unclosed": b"[" * 50,
    "10 MB of [": b"[" * 10_000_000, "2 million open objects": b'{"a":' * 2_000_000,
    "10 MB of quotes": b'"' + b'\\"' * 5_000_000, "an open text": b'"' + b"a" * 9_000_000,
}  # fmt: skip
RIGHT_JSON = {
    "64 bits": b"9223372036854775807", "the least": b"-9223372036854775808", "a pair": b'"\\ud83d\\ude00"',
    "a backslash and u0000": b'"\\\\u0000"', "deep": b"[" * 100 + b"]" * 100,
    "brackets in text": b'"' + b"[" * 200 + b'"',
    "wide": b"[" + b"[]," * 200 + b"[]]", "a double": b"1e300", "blanks around": b" \n{}\t",
    "BOM": b"\xef\xbb\xbf{}",
}  # fmt: skip


@pytest.mark.parametrize("mode", [SYNC, ASYNC])
@pytest.mark.parametrize("name", WRONG_JSON)
def test_json_that_is_refused(run: Running, mode: str, name: str) -> None:
    refused(run.client.post(f"{mode}/anything", data=WRONG_JSON[name], headers=JSON))


@pytest.mark.parametrize(
    ("end", "place", "times"), [(b'1], "b": 1, "b": 2}', "", 0), (b"9223372036854775808]}", "/a/9", 1)]
)
def test_a_faulty_body_is_parsed_again_only_to_find_its_integer(
    monkeypatch: pytest.MonkeyPatch, end: bytes, place: str, times: int
) -> None:
    """Parsing a body again takes as long as the first time, and searching it in Python ten times as long."""
    parsed = []
    monkeypatch.setattr(astera_lite_advice, "from_json", lambda *given: parsed.append(1) or from_json(*given))
    tree = {"request": {"method": "POST", "resource": "/x", "body": {}}, "response": {"body": 1}}
    body = b'{"a": [' + b"1," * 9 + end
    with pytest.raises(astera_lite.InputError) as refused:
        sent = astera_lite.StoredRequest("POST", "/x", "", {"content-type": "application/json"}, body)
        astera_lite.build_flow(tree, "t").bind(sent)
    assert (refused.value.errors[0]["name"], len(parsed)) == (place, times)


@pytest.mark.parametrize("name", RIGHT_JSON)
def test_json_that_is_taken(run: Running, name: str) -> None:
    answer = run.client.post(f"{SYNC}/anything", data=RIGHT_JSON[name], headers=JSON)
    assert answer.status_code == 200
    assert answer.json() == json.loads(RIGHT_JSON[name])
    assert run.client.post(f"{ASYNC}/anything", data=RIGHT_JSON[name], headers=JSON).status_code == 202


def _members(count: int, last: bytes = b"") -> bytes:
    return b"{" + b",".join(b'"k%d":1' % at for at in range(count)) + last + b"}"


#: Bodies that made the server stand still, and how they are answered; whatever it is, others are answered meanwhile.
HEAVY: dict[str, tuple[str, bytes, dict[str, str], int]] = {
    "one name twice among 100,000": ("/anything", _members(100_000, b',"k99999":2'), JSON, 400),
    "500,000 unknown members": ("/people", _members(500_000), JSON, 400),
    "a million faults": ("/people", b'{"name":"x","tags":[' + b"1," * 1_000_000 + b"1]}", JSON, 400),
    "an unknown member of 5 MB": ("/people", b'{"' + b"a" * 5_000_000 + b'":1}', JSON, 400),
    "2 million lists": ("/anything", b"[" + b"[]," * 2_000_000 + b"[]]", JSON, 400),
    "5 million lists, 99 deep": ("/anything", b"[" + (b"[" * 99 + b"]" * 99 + b",") * 50_000 + b"1]", JSON, 400),
    "400,000 objects": ("/anything", b"[" + b'{"a":1},' * 400_000 + b"1]", JSON, 202),
    "a million texts": ("/anything", b"[" + b'"a",' * 1_000_000 + b'"a"]', JSON, 202),
    "500,000 fields": ("/form", b"&".join(b"a%d=1" % at for at in range(500_000)), FORM, 400),
    "10,000 fields": ("/form", b"&".join(b"a%d=1" % at for at in range(10_000)), FORM, 202),
    "a field a million times": ("/form", b"a=1&" * 1_000_000, FORM, 400),
    "3 million escapes": ("/form", b"a=" + b"%41" * 3_000_000, FORM, 202),
    "9 MB of &": ("/form", b"&" * 9_000_000, FORM, 400),
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_heavy_body_is_answered_and_checked_apart_from_the_loop(
    run: Running, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body, headers, status = HEAVY[name]
    checked: set[int] = set()
    bind = Flow.bind

    def noting(self: Flow, *arguments: Any) -> Any:
        checked.add(threading.get_ident())
        return bind(self, *arguments)

    monkeypatch.setattr(Flow, "bind", noting)
    answer = run.client.post(ASYNC + path, data=body, headers=headers)
    assert run.server.ident not in checked
    assert checked
    assert answer.status_code == status, answer.text[:200]
    assert len(answer.content) < 100_000
    if status == 202:
        run.client.finished(answer)  # else the next body would share the interpreter with this one's job


def test_of_very_many_faults_the_first_hundred_are_told(run: Running) -> None:
    answer = run.client.post(SYNC + "/people", data=_members(5000), headers=JSON)
    refused(answer)
    assert len(answer.json()["errors"]) == 101
    assert answer.json()["errors"][-1]["message"] == "has more faults than are listed"


@pytest.mark.parametrize("body", ["9223372036854775807", "1e300", '"a\\u2028b"', '"\\ud83d\\ude00"', "-1", "null"])
def test_values_that_reach_sqlite(run: Running, body: str) -> None:
    answer = run.client.post(SYNC + "/sql", data=body, headers=JSON)
    assert (answer.status_code, answer.json()) == (200, json.loads(body))


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "x-unknown", "gzip, identity"])
def test_a_content_coding_is_refused(run: Running, coding: str) -> None:
    headers = {**JSON, "Content-Encoding": coding}
    for mode in (SYNC, ASYNC):
        answer = run.client.post(mode + "/anything", data=b"{}", headers=headers)
        refused(answer, 415)
        assert answer.headers["Accept-Encoding"] == "identity"  # RFC 9110, section 12.5.3
    refused(run.client("PUT", "/api/deployments/x", data=b"{}", headers=headers), 403, 415)
    assert run.client.post(SYNC + "/anything", data=b"{}", headers={**JSON, "Content-Encoding": "identity"}).ok


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json; charset=utf-16", 415),
        ("application/json; charset=latin-1", 415),
        ("application/json; charset=", 415),
        ('application/json;charset="UTF-8"', 200),
        ("APPLICATION/JSON ; charset=utf8", 200),
        ("application/json; q=1; charset=us-ascii", 200),
        ("application/merge-patch+json", 200),
        ("application/json, text/plain", 415),
        ("multipart/form-data; boundary=x", 415),
        ("*/*", 415),
        ("", 415),
    ],
)
def test_content_types(run: Running, kind: str, status: int) -> None:
    answer = run.client.post(SYNC + "/anything", data=b"{}", headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text


def test_an_empty_content_type_of_a_flow_is_none(run: Running) -> None:
    answer = run.client.get(SYNC + "/typed?type=")
    assert answer.headers["Content-Type"] == "application/json"
    assert run.client.get(SYNC + "/typed?type=text/csv").headers["Content-Type"] == "text/csv; charset=utf-8"


def test_the_name_of_what_does_not_decode_is_told_as_it_was_sent(run: Running) -> None:
    for mode in (SYNC, ASYNC):
        errors = run.client.get(mode + "/reflecting?value=%ff").json()["errors"]
        assert [(error["in"], error["name"]) for error in errors] == [("query", "value")]


@pytest.mark.parametrize("body", [b"\xe9", b"a\0b", b"\xed\xa0\x80"])
def test_text_that_is_none(run: Running, body: bytes) -> None:
    refused(run.client.post(SYNC + "/text", data=body, headers={"Content-Type": "text/plain"}))


@pytest.mark.parametrize("body", [b"a=%zz", b"a=%00", b"a=%ff", b"a=\xff", b"%=1"])
def test_forms_that_are_none(run: Running, body: bytes) -> None:
    refused(run.client.post(SYNC + "/form", data=body, headers=FORM))


def test_a_name_of_the_query_that_does_not_decode(run: Running) -> None:
    for name in ("%ff", "%00", "%ed%a0%80", "a%00b"):
        for mode in (SYNC, ASYNC):
            refused(run.client.get(f"{mode}/reflecting?{name}=1"))


VALUES = [
    b"\xff\xfe", b"a\x00b", b"\x1b[31m", b"a" * 60_000, b'"' * 5000, b'"\\' * 20_000, b",;=" * 10_000, b"'" * 9,
    b"wait=" + b"9" * 5000, b'wait="' + b"\\" * 30_000, b"wait=-1", b"wait=1_0", b"respond-async;" * 4000,
    b"\t" * 30_000 + b"x", b"bytes=" + b"0-," * 10_000, b"(" * 3000, b"W/" * 3000, b"\xc2\x85x", b'"abc', b'""',
]  # fmt: skip
NAMES = (
    "Prefer Idempotency-Key Content-Type Content-Encoding If-Match If-None-Match If-Modified-Since If-Range Range "
    "Accept Accept-Encoding Origin Access-Control-Request-Method Access-Control-Request-Headers Authorization Cookie "
    "Referer Sec-Fetch-Site X-Forwarded-For X-Forwarded-Host Forwarded X-Request-Id h-string h-integer h-number "
    "h-boolean h-date h-date-time h-array"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_evil_headers(run: Running, name: str) -> None:
    for value in VALUES:
        for method, mode in (("GET", SYNC), ("GET", ASYNC), ("OPTIONS", SYNC), ("POST", ASYNC)):
            path = "/headers" if method != "POST" else "/once"
            is_clean(*raw(run, method, mode + path, f"{name}: ".encode() + value + b"\r\n"))


# --- where a parser meets the world ---


@given(st.text())
def test_what_is_percent_encoded_comes_back(text: str) -> None:
    if "\0" in text:
        with pytest.raises(ValueError):
            unquote(quote(text, safe=""))
    else:
        assert unquote(quote(text, safe="")) == text
        assert unquote(quote_from_bytes(text.encode(), safe="")) == text


@given(st.text(alphabet="%=+ aA0fF?\n\r\t_é", max_size=30))
def test_percent_decoding_is_that_of_the_standard_library(text: str) -> None:
    try:
        found = unquote(text)
    except ValueError:
        return
    assert found.encode() == unquote_to_bytes(text)


_TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)  # fmt: skip


@given(_TREES)
def test_json_that_the_standard_library_writes_is_read(tree: Any) -> None:
    assert from_json(json.dumps(tree)) == tree
    assert from_json(json.dumps(tree, ensure_ascii=False).encode()) == tree


@given(st.text(alphabet='[]{}",:1\\a ', max_size=60))
@settings(max_examples=300)
def test_json_is_read_as_the_standard_library_does_or_refused(text: str) -> None:
    try:
        found = from_json(text)
    except ValueError:
        return
    assert found == json.loads(text)


@given(st.integers(1, 150), st.sampled_from(["[", '{"a":', '[1,{"b":', "[[],"]))
def test_depth_is_counted(depth: int, opening: str) -> None:
    closing = "".join("]" if mark == "[" else "}" for mark in reversed(re.sub(r"[^\[{]|\[(?=\])", "", opening)))
    text = opening * depth + "1" + closing * depth
    levels = depth * len(closing) + (opening == "[[],")
    if levels <= 100:
        assert from_json(text) == json.loads(text)
    else:
        with pytest.raises(ValueError):
            from_json(text)


@given(st.text(alphabet='wait=1,;" \\respond-async\t', max_size=200))
def test_preferences_never_fail(text: str) -> None:
    assert set(parse_prefer(text)) <= {"wait", "respond-async"}


# --- the log ---

_FORGING = "x\r\n2026-11-23T00:00:00.000Z error   forged\u2028\u2029\x85\x1b[31m\u202e\x00\x7f\ud800"


@pytest.mark.parametrize("formatter", [astera_lite._TextLines(), astera_lite_notices.JsonLines()])
def test_no_line_of_the_log_is_forged(formatter: logging.Formatter) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    try:
        raise ValueError(_FORGING)
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "it is %s", (_FORGING,), (type(error), error, None))
    handler.handle(record)
    stream.flush()
    written = stream.buffer.getvalue().decode()
    assert "forged" in written
    assert not re.search(r"[^\n\x20-\x7e]", written)
    lines = written.removesuffix("\n").split("\n")
    assert [line for line in lines if not line.startswith("    ")] == lines[:1]
    if isinstance(formatter, astera_lite_notices.JsonLines):
        assert len(lines) == 1 and "forged" in json.loads(lines[0])["message"]


# --- flow files ---


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_toml_has_numbers_that_json_has_not(tmp_path: Path, value: str) -> None:
    text = f'[request]\nmethod = "GET"\nresource = "/x"\n[request.parameters.a]\nin = "query"\nexample = {value}\n'
    with pytest.raises(astera_lite.FlowError):
        astera_lite.parse_flow_text(text, "x.toml")


def test_a_date_of_toml_does_not_break_the_documents(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    text = '[request]\nmethod = "GET"\nresource = "/x"\n[request.parameters.a]\nin = "query"\ntype = "date"\n'
    (tmp_path / "flows" / "x.toml").write_text(text + "default = 2026-11-23\nexample = 2026-11-24\n")
    with process(tmp_path) as (_, url, _):
        found = requests.get(f"{url}/api/deployments", timeout=10).json()
        assert found["faults"] == []
        about = found["deployments"][0]["parameters"]["a"]
        assert (about["default"], about["example"]) == ("2026-11-23", "2026-11-24")
        assert requests.get(f"{url}/openapi.json", timeout=10).status_code == 200


#: Patterns for which a backtracking matcher takes exponential or much time, and a text that does not match.
ENDLESS = [
    (r"^(a+)+$", "a" * 16_000 + "b"),
    (r"^(a*)*$", "a" * 16_000 + "b"),
    (r"(?:\d+)*x", "1" * 16_000),
    (r"^(.|x)*y", "x" * 16_000),
    (r"^(\w+\s?)*$", "ab " * 5000 + "!"),
    (r"^([a-z]+)*@", "a" * 16_000),
    (r"^((ab)*c*)*$", "abc" * 5000 + "!"),
    (r"^(a|ab|b)*$", "ab" * 8000 + "!"),
    (r"^.*,.*,.*,.*\d$", "," * 16_000),
    (r"a?" * 60 + "a" * 60, "a" * 59),
    (r"^(.|a){0,300}b$", "a" * 2500),
]
ENDING = [
    r"^[a-z]+(-[a-z]+)*$", r"^\d{5}(-\d{4})?$", r"^(\d+,)*\d+$", r"^(foo|bar)+$", r"^[^@ ]+@[^@ ]+\.[a-z]{2,}$",
    r"^([A-Z]{2}\d+;)*$", r"^(a{1,3}b)+$", r"^(?:[a-z]+\.)+[a-z]+$", "^([0-9a-f]{2}:){5}[0-9a-f]{2}$",
]  # fmt: skip


def test_a_pattern_takes_time_by_the_length_of_a_text_alone(tmp_path: Path) -> None:
    flows = {
        f"p{at}": get_flow(f"/p{at}", request={"method": "POST", "body": {"pattern": pattern}})
        for at, (pattern, _) in enumerate(ENDLESS)
    }
    with running(tmp_path, flows) as (_, _, client):
        for at, (pattern, text) in enumerate(ENDLESS):
            answer = client.post(f"/api/publishing/p{at}", json=text)
            assert answer.json()["errors"][0]["message"] == f"must match the pattern {pattern}"
            assert client.post(f"/api/publishing/p{at}", json="x" * 20_000).status_code == 400


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^(?=(a+)+$)x?", 'has "(?=" at character 2, which patterns lack here: write it with characters'),
        ("^(?!a)b", 'has "(?!" at character 2'),
        (r"(a)\1", r'has "\\1" at character 4'),
        ("(?i)a", 'has "(?i" at character 1'),
        ("a{5000}", "is too long: write it shorter, and a large number of repeats as maxLength"),
        ("(a{50}b){50}c{1000}", "is too long: write it shorter"),
    ],
)
def test_what_a_pattern_cannot_have_is_told_with_what_to_write(pattern: str, message: str) -> None:
    tree = get_flow("/x", request={"parameters": {"a": {"in": "query", "pattern": pattern}}})
    with pytest.raises(astera_lite.FlowError, match=re.escape(f"/request/parameters/a/pattern: {message}")):
        astera_lite.build_flow(tree, "x")


def test_what_finished_jobs_take_of_memory_is_bounded_whatever_is_in_them(tmp_path: Path) -> None:
    request = {"method": "POST", "resource": "/kept", "processing": ["asynchronous"], "body": {}}
    answer = {"headers": {"Location": "/kept/${request.body}"}, "body": 1}
    flow = {"request": request, "steps": [{"name": "w", "wait": 0}], "response": answer}
    with running(tmp_path, {"kept": flow}) as (_, _, client):
        tracemalloc.start()
        try:
            for n in range(15):
                client.finished(client.post(f"{ASYNC}/kept", data=json.dumps(f"{n}" + "a" * 2_000_000), headers=JSON))
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 15 << 20
        finally:
            tracemalloc.stop()


def test_what_a_pattern_keeps_in_memory_is_bounded() -> None:
    pattern = Pattern("(.|a){0,30}b$")
    tracemalloc.start()
    try:
        for start in range(0x10000, 0x12000, 2000):
            assert not pattern.search("".join(map(chr, range(start, start + 2000))) + "c")
        assert tracemalloc.get_traced_memory()[0] < 2 << 20
    finally:
        tracemalloc.stop()


LETTERS = st.sampled_from(["a", "b", "ab", ".", "[ab]", "[^a]", r"\d", r"\w", "^", "$", r"\b", r"\s", "-", ""])
REPEATS = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "+?", "??", ""])
PATTERNS = st.recursive(
    LETTERS,
    lambda part: (
        st.tuples(part, part, REPEATS).map(lambda made: f"({made[0]}|{made[1]}){made[2]}")
        | st.tuples(part, part).map("".join)
    ),
    max_leaves=12,
)


@given(PATTERNS, st.text("ab1- _", max_size=9))
def test_a_pattern_matches_what_python_matches(pattern: str, text: str) -> None:
    wanted = re.search(pattern.replace("$", r"\Z"), text, re.ASCII)
    assert Pattern(pattern).search(text) == (wanted is not None)


@pytest.mark.parametrize("pattern", ENDING)
def test_a_pattern_that_ends_is_deployed(pattern: str) -> None:
    astera_lite.build_flow(get_flow("/x", request={"parameters": {"a": {"in": "query", "pattern": pattern}}}), "x")
