"""Features of requests and responses that few flows use.

Of those that come in: patterns; forms; pages, filters and an order of a response's rows. Of those that go out:
connections with their credentials; pages, until; answers in gzip or deflate.

A wing of astera_lite, which loads this file for the first flow or answer that needs it.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import gzip
import hashlib
import io
import itertools
import operator
import re
import sys
import threading
import types
import urllib.parse
import warnings
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

from astera_lite import (
    CONNECTIONS_FILE,
    CONTENT_TYPES,
    LENIENT_DECODER,
    MAX_WORK,
    VALUE_TYPES,
    Address,
    Answer,
    Budget,
    Build,
    Duration,
    ExpressionError,
    FlowError,
    FlowFailure,
    HttpCall,
    InputErrors,
    MapOf,
    Member,
    Number,
    OneOf,
    OutboundError,
    OutgoingRequest,
    Pairs,
    Parameter,
    Run,
    Runner,
    Schema,
    Scope,
    StepError,
    Table,
    Template,
    Text,
    Url,
    Value,
    answer_too_large,
    as_text,
    encode_query,
    evaluated,
    fetch,
    from_json,
    kind_of,
    late,
    parse_query,
    parse_retry_after,
    pointer,
    read_number,
    shown,
    split_template,
    suggest,
    to_json,
    with_query,
)

_MAX_FIELDS = 10_000  # of a form: half a million took seconds


def _field(texts: list[str], schema: Any) -> Any:
    """The value of a field in the type of its schema. A text that is not of this type stays: the check refuses it."""
    kinds = schema.types if isinstance(schema, Schema) else ()
    if "array" in kinds:
        return [_field([text], schema.items) for text in texts]
    if len(texts) > 1:
        return texts
    for kind in kinds:
        read = VALUE_TYPES[kind].read
        value = read(texts[0]) if read else None
        if value is not None:
            return value
    return texts[0]


def read_form(text: str, schema: Schema | None) -> dict[str, Any]:
    """The value of a form, for the schema of the body; the message of a ValueError says what is wrong."""
    if text.count("&") >= _MAX_FIELDS:
        raise ValueError(f"it has more than {_MAX_FIELDS:,} fields")
    errors = InputErrors()
    fields = parse_query(text, errors)
    if errors:
        raise ValueError(errors[0]["name"] + ": " + errors[0]["message"])
    of = schema or Schema()
    return {name: _field(texts, of.properties.get(name, of.additional)) for name, texts in fields.items()}


# Python's white space differs from ECMA's, its `$` also matches before a last line feed, and its `.` more line ends.
_SPACES = "\\t-\\r \\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\ufeff"
_TRANSLATED = {".": r"[^\n\r\u2028\u2029]", r"\s": f"[{_SPACES}]", r"\S": f"[^{_SPACES}]"}
_ATOM = r"\\[dDwWnrtfv]|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\[!-/:-@\[-`{-~]"
_PATTERN_TOKEN = re.compile(
    rf"\[\^?+(?!\])(?:{_ATOM}|\\s|[^\\\[\]&~|-]|-(?!-)|&(?!&)|~(?!~)|\|(?!\|))++\]|{_ATOM}|\\[bBsS]"
    r"|\((?:\?:)?(?!\?)|[)|^$.]|(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??(?![*+?{])|[^\\()\[\]{}|^$.*+?]"
)
#: Whether a position matches, by: whether a word character is before it (None: no character), the character after it
#: (empty: none), and whether that is a word character.
_POSITIONS: dict[str, Callable[[bool | None, str, bool], bool]] = {
    "^": lambda before, after, word: before is None,
    "$": lambda before, after, word: after == "",
    r"\b": lambda before, after, word: bool(before) != word,
    r"\B": lambda before, after, word: bool(before) == word,
}
_MAX_PROGRAM = 2800  # instructions: enough to repeat one character for the whole length of a text
_MAX_MATCHED = 16 << 10  # characters
_MAX_MATCHING = 4 << 20  # characters times instructions
_MAX_REMEMBERED = 1 << 14  # places in a program, for each pattern


class Pattern:
    """A regular expression of JSON Schema (ECMA 262), without look-around and back references.

    A search takes time by the length of the text, because it follows all ways through a program at once. An
    instruction is the `match` of a regular expression, which takes one character; the name of a position; or a tuple
    of jumps, each of which is a way to go on. Raises ValueError.
    """

    def __init__(self, text: str) -> None:
        with warnings.catch_warnings():  # about patterns that are refused below
            warnings.simplefilter("ignore")
            try:
                re.compile(text)  # finds most faults
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        tokens, at = [], 0
        for match in _PATTERN_TOKEN.finditer(text):
            if match.start() == at:
                tokens.append(match[0])
                at = match.end()
        if at < len(text):
            raise ValueError(
                f"has {shown(text[at : at + 3])} at character {at + 1}, which patterns lack here: write it with "
                "characters, [classes], (groups), | and repeats; what must not match is refused by a `fail` step"
            )
        self.text = text
        self._program = self._compiled(tokens[::-1])
        size = len(self._program) + 1
        self.longest = min(_MAX_MATCHED, _MAX_MATCHING // size)
        self._next = lru_cache(1 + _MAX_REMEMBERED // size)(self._step)

    def __str__(self) -> str:
        return self.text

    def _compiled(self, tokens: list[str]) -> list[Any]:
        """The program of the part before the next `)`; its tokens are removed from the end of the list."""
        program: list[Any] = []
        while tokens and tokens[-1] != ")":
            token = tokens.pop()
            if token == "|":  # noqa: S105 (no password)
                other = self._compiled(tokens)
                return [(1, len(program) + 2), *program, (len(other) + 1,), *other]
            if token[0] == "(":
                part = self._compiled(tokens)
                tokens.pop()  # the closing bracket
            elif token in _POSITIONS:
                part = [token]
            else:
                within = re.sub(r"\\.", lambda match: _SPACES if match[0] == r"\s" else match[0], token)
                part = [re.compile(within if token[0] == "[" else _TRANSLATED.get(token, token), re.ASCII).match]
            program += self._repeated(part, tokens.pop()) if tokens and tokens[-1][0] in "*+?{" else part
            self._check_size(len(program))
        return program

    def _repeated(self, part: list[Any], mark: str) -> list[Any]:
        counts = {"*": "0,", "+": "1,", "?": "0,1"}.get(mark[0], mark.rstrip("?")[1:-1])
        least, comma, most = counts.partition(",")
        required, optional, size = int(least), int(most or least) - int(least), len(part) + 1
        self._check_size(size * max(required, optional))
        if comma and not most:
            return part * required + [(1, size + 1), *part, (-size,)]
        return part * required + [step for left in range(optional, 0, -1) for step in ((1, left * size), *part)]

    @staticmethod
    def _check_size(instructions: int) -> None:
        if instructions > _MAX_PROGRAM:
            raise ValueError("is too long: write it shorter, and a large number of repeats as maxLength")

    def _step(self, places: frozenset[int], before: bool | None, after: str) -> tuple[frozenset[int], bool]:
        """The places of a search after the character `after`, and the next `before`; the last place is a match."""
        end, word = len(self._program), after.isascii() and (after.isalnum() or after == "_")
        todo, found = [*places, 0], set()  # a match may begin anywhere
        seen = set(todo)
        for place in todo:
            if place == end:
                return frozenset((end,)), word
            step = self._program[place]
            if type(step) is tuple:
                ways = {place + jump for jump in step} - seen
            elif type(step) is str:
                ways = {place + 1} - seen if _POSITIONS[step](before, after, word) else set()
            else:
                ways = set()
                if after and step(after):
                    found.add(place + 1)
            todo += ways
            seen |= ways
        return frozenset(found), word

    def search(self, text: str) -> bool:
        """Whether the pattern matches anywhere in the text, which may have `longest` characters."""
        if len(text) > self.longest:
            return False
        places: frozenset[int] = frozenset()
        before = None
        for character in text:
            places, before = self._next(places, before, character)
        return len(self._program) in self._next(places, before, "")[0]


_MAX_PAGE = 10_000  # rows
MAX_SORTED = 8  # fields of `sort_by`, where any field may be one


class Selection(NamedTuple):
    """What a caller may request of the rows of a response: the next page, rows by the value of a field, an order."""

    page: bool
    filters: frozenset[str]
    sort: bool | frozenset[str]  # True: by any field
    items: Template | None = None  # the rows that are returned page by page
    size: Template | None = None

    @property
    def names(self) -> list[str]:
        """The query parameters for these requests."""
        return ["cursor"] * self.page + ["sort_by"] * bool(self.sort) + sorted(self.filters)

    def scope(self, selected: Selected, scope: Scope) -> Scope:
        """The names that expressions of the response can use: with `page` if the response has pages."""
        if self.items is None or self.size is None:
            return scope
        return {**scope, "page": selected.page(self.items(scope), self.size(scope))}

    def body(self, template: Template | None, selected: Selected, scope: Scope) -> Any:
        """The body of the response."""
        if template is None:
            return {name: scope["page"][name] for name in ("items", "cursor")}
        body = template(scope)
        if not self.page:
            return selected.rows(body, "/response/body")
        return {"cursor": scope["page"]["cursor"], **body} if type(body) is dict else body


def make_selection(build: Build, given: Mapping[str, Any], place: str) -> Selection:
    """The selections that callers may request of a response with these members."""
    page, sort = given.get("page"), given.get("sort", False)
    if page is None and given.get("body") is None:
        build.fault(place, "has filter or sort, but no rows: give a body that is a list, or a page")
    sort = frozenset(sort) if isinstance(sort, list) else sort
    items, size = (page["items"], page["size"]) if page else (None, None)
    return Selection(page is not None, frozenset(given.get("filter", ())), sort, items, size)


class Selected(NamedTuple):
    """The rows that a request wants."""

    offset: int = 0
    sort: Sequence[str] = ()  # fields, a leading "-" for descending
    filters: Mapping[str, Collection[str]] = types.MappingProxyType({})  # the texts that each field may have
    stamp: str = ""  # ties a cursor to the request

    def cursor(self, offset: int) -> str:
        """The cursor for the rows from here on."""
        return f"{offset}.{self.stamp}"

    def rows(self, given: Any, place: str) -> list[Any]:
        """The requested rows in the requested order: rows without a value come last."""
        if type(given) not in (list, tuple) or not all(type(row) is dict for row in given):
            raise ExpressionError(f"{place}: filter and sort need a list of objects")
        rows = list(given)
        names = [field.removeprefix("-") for field in (*self.filters, *self.sort)]
        Budget(MAX_WORK).deep([row.get(name) for row in rows for name in names])
        for name, texts in self.filters.items():
            numbers = {number for text in texts if (number := read_number(text)) is not None}
            rows = [row for row in rows if _is_selected(row.get(name), texts, numbers)]
        for field in reversed(self.sort):
            name, descending = field.removeprefix("-"), field.startswith("-")
            if rows and not any(name in row for row in rows):
                raise FlowFailure(400, f"sort_by knows no field {shown(name)}")
            known = [row for row in rows if row.get(name) is not None]
            try:
                known.sort(key=operator.itemgetter(name), reverse=descending)
            except TypeError:  # values of different types
                known.sort(key=lambda row, name=name: as_text(row[name]), reverse=descending)  # type: ignore[misc]
            rows = known + [row for row in rows if row.get(name) is None]
        return rows

    def page(self, rows: Any, size: Any) -> dict[str, Any]:
        """The value of `page` in expressions: its items, the cursor of the next page, and the number of all rows."""
        if type(size) is not int or not 1 <= size <= _MAX_PAGE:
            raise ExpressionError(f"/response/page/size: {shown(size)} is not a number from 1 to {_MAX_PAGE}")
        if self.filters or self.sort:
            rows = self.rows(rows, "/response/page/items")
        if type(rows) not in (list, tuple):
            raise ExpressionError(f"/response/page/items: {kind_of(rows)} is not a list")
        end = self.offset + size
        cursor = self.cursor(end) if end < len(rows) else None
        return {"items": rows[self.offset : end], "cursor": cursor, "total": len(rows)}


def _is_selected(value: Any, texts: Collection[str], numbers: Collection[float]) -> bool:
    return value in numbers if type(value) in (int, float) else value is not None and as_text(value) in texts


def read_selection(selection: Selection, path: str, query: Mapping[str, list[str]], errors: InputErrors) -> Selected:
    """The rows that a request wants; faults are added to `errors`."""
    for name in {"cursor", "sort_by"} & {*selection.names}:
        if len(query.get(name, ())) > 1:
            errors.add("query", name, "must be given once")
    sort: dict[str, str] = {}  # by field, each of which counts once
    for part in filter(None, query.get("sort_by", [""])[0].split(",") if selection.sort else ()):
        sort.setdefault(part.removeprefix("-"), part)
    known = selection.sort if isinstance(selection.sort, frozenset) else sort.keys() - {""}
    for name in sort:
        if name not in known:
            errors.add("query", "sort_by", f"knows no field {shown(name)}{suggest(name, known, errors)}")
    if known is not selection.sort and len(sort) > MAX_SORTED:
        errors.add("query", "sort_by", f"has more than {MAX_SORTED} fields")
    filters = {name: frozenset(query[name]) for name in selection.filters if name in query}
    if not selection.page:
        return Selected(0, tuple(sort.values()), filters)
    rest = sorted(item for item in query.items() if item[0] != "cursor")
    stamp = hashlib.sha256(to_json([path, rest]).encode()).hexdigest()[:16]
    cursor = query.get("cursor", [""])[0]
    match = re.fullmatch(rf"([1-9][0-9]{{0,14}})\.{stamp}", cursor)
    if cursor and not match:
        errors.add("query", "cursor", "is not from a response to this request: start again without it")
    return Selected(int(match[1]) if match else 0, tuple(sort.values()), filters, stamp)


_MAX_PAGES = 10_000  # unless the flow has `maxPages`: a step fails if an API returns pages without end
_STYLES = ("next", "link", "cursor", "offset", "page")


#: Members of `pages`, by the style that they belong to.
_BELONGING = {"parameter": "cursor", "limit": "offset", "size": "offset", "start": "page", "total": "offset, page"}


class _Pages:
    """A compiled `pages`."""

    def __init__(self, build: Build, given: dict[str, Any], place: str) -> None:
        [self.style] = [name for name in _STYLES if name in given]
        for name, styles in _BELONGING.items():
            if name in given and self.style not in styles.split(", "):
                build.fault(f"{place}/{name}", f"belongs to {styles}, not to {self.style}")
        if self.style == "cursor" and "parameter" not in given:
            build.fault(place, 'needs "parameter": the query parameter that takes the cursor')
        self.items, self.total = given["items"], given.get("total")  # total: the number of all items
        self.next = given[self.style] if self.style in ("next", "cursor") else None
        self.start: int = given.get("start", 1)
        self.first: dict[str, Any] = {}  # query of the first page
        if self.style == "offset":
            self.first = {given["offset"]: 0, given.get("limit", "limit"): given.get("size", 100)}
        elif self.style == "page":
            self.first = {given["page"]: self.start}
        #: The query parameter that requests the next page.
        self.parameter: str = next(iter(self.first), given.get("parameter", ""))
        self.max_pages: int | None = given.get("maxPages")
        self.max_items: int = given.get("maxItems", sys.maxsize)

    def following(self, output: dict[str, Any], scope: Scope, count: int, got: int, pages: int) -> Any:
        """The request for the next page: an address, or a value of the parameter; None at the end.

        A page that is shorter than asked for is not the last one: servers have limits of their own.
        """
        if self.style == "link":
            return _next_link(output["headers"].get("link", ""))
        if self.next is not None:
            following = self.next(scope) or None
            return following if following is None or self.parameter else as_text(following)
        total = self.total(scope) if self.total is not None else None
        if total is None:
            ended = not got
        elif type(total) is not int:
            raise ExpressionError(f"pages/total: {shown(total)} is not a number of items")
        elif got == 0 and count < total:
            detail = f"the API it calls has {total} items, as it says, and gave {count}"
            raise StepError(502, detail, detail, {"pages"}, safe=False)
        else:
            ended = count >= total
        return None if ended else count if self.style == "offset" else self.start + pages


_LINK_PARAMETER = r';\s*+([\w!#$%&\'*+.^`|~-]*+)(?:\s*+=\s*+("(?:[^"\\]|\\.)*+"?|[^\s;,"]*+))?+\s*+'


def _next_link(text: str) -> str | None:
    """The target of rel=next in a Link header (RFC 8288)."""
    for match in re.finditer(rf"<([^<>]*)>\s*+((?:{_LINK_PARAMETER})*+)", text):
        parameters = re.findall(_LINK_PARAMETER, match[2])
        relations = [value.strip('"').lower().split() for name, value in parameters if name.lower() == "rel"]
        if relations and "next" in relations[0]:  # of several, the first one counts
            return match[1]
    return None


_PARAMETER = partial(Text, "the name of a query parameter", r"(?!.*\$\{)(?s:.+)")


PAGES = Table(
    {
        "items": Value(default="${page.body}", names=("page",)),
        "next": Value(names=("page",)),
        "link": Member(holds=lambda value: value is True, word="true", json={"const": True}),
        "cursor": Value(names=("page",)),
        "offset": _PARAMETER(),
        "page": _PARAMETER(),
        "parameter": _PARAMETER(),
        "limit": _PARAMETER(),
        "size": Number(1),
        "start": Number(0),
        "total": Value(names=("page",)),
        "maxPages": Number(1),
        "maxItems": Number(1),
    },
    _Pages,
    choice=_STYLES,
)


def _all_pages(call: HttpCall, run: Run, scope: Scope, path: str) -> dict[str, Any]:
    """Call until there is no further page, or a limit is reached, and return all items.

    What is there is kept in `run.reached`, so that a further attempt goes on with the page that failed.
    """
    pages: _Pages = call.given["pages"]
    if path not in run.reached:
        request = call.request(run, scope)
        first = copy.copy(request)
        request.url = with_query(request.url, pages.first)
        run.reached[path] = (1, request, first, [], call.limit(run), None)
    while True:
        count, request, first, items, left, seen = run.reached[path]
        output, size = call.send(run, copy.copy(request), max(left, 1))
        page_scope = {**scope, "page": output}
        found = pages.items(page_scope)
        if type(found) is not list:
            raise ExpressionError(f"{call.place}/pages/items: {kind_of(found)} is not a list")
        got = len(items) + len(found)
        following = pages.following(output, page_scope, got, len(found), count)
        if following is None or count == pages.max_pages or got >= pages.max_items:
            more = following is not None or got > pages.max_items
            del run.reached[path]
            return {"items": [*items, *found][: pages.max_items], "pages": count, "more": more, **output}
        if following == seen or (pages.max_pages is None and count >= _MAX_PAGES):
            detail = "the API it calls names the same next page again and again"
            if following != seen:
                detail = f"the API it calls has more than {_MAX_PAGES:,} pages: say with maxPages how many you want"
            raise StepError(502, detail, f"{detail} (page {count})", {"pages"}, safe=False)
        if pages.parameter:
            request = copy.copy(first)
            request.url = with_query(first.url, {**pages.first, pages.parameter: following})
        else:
            call.go_to_next(request, following)
        items += found
        run.reached[path] = (count + 1, request, first, items, left - size, following)


_LONGEST_PAUSE_S = 3600.0


def _poll(call: HttpCall, run: Run, scope: Scope, path: str) -> dict[str, Any]:
    """Repeat a call until its answer meets the condition `until`."""
    given = call.given
    run.wait_until(run.journal.waits.get(path, 0), path)
    while True:
        output, _ = call.send(run, call.request(run, scope), call.limit(run))
        if given["until"]({**scope, "answer": output}):
            return output
        asked = parse_retry_after(output["headers"].get("retry-after"), run.outside.clock.wall())
        pause_ms = round(max(given.get("every", 2.0), min(asked, _LONGEST_PAUSE_S)) * 1000)
        run.wait_until(run.outside.clock.now() + pause_ms, path)


class Connection(NamedTuple):
    """A row of connections.json, which all calls to one API share. `timeout` is in seconds."""

    url: Address
    headers: Mapping[str, Template]
    timeout: float | None
    auth: Auth | None


_hide = late("astera_lite_secrets:hide")


class Auth:
    """How a connection authenticates the caller."""

    def __init__(self, kind: str, values: Mapping[str, Template]) -> None:
        self.kind, self.values = kind, values

    def apply(self, run: Run, request: OutgoingRequest) -> None:
        """Put the credentials into a request."""
        outside = run.outside
        scope = {"env": outside.env, "secrets": outside.secrets}
        values = {name: as_text(value(scope)) for name, value in self.values.items()}
        _hide(outside.masked, [values[name] for name in ("token", "password", "value") if name in values])
        if self.kind == "basic":
            proof = base64.b64encode(f"{values['user']}:{values['password']}".encode()).decode()
            _hide(outside.masked, [proof])
            request.headers["Authorization"] = f"Basic {proof}"
        elif self.kind == "bearer":
            request.headers["Authorization"] = f"Bearer {values['token']}"
        elif values["in"] == "query":
            request.url = with_query(request.url, {values["name"]: values["value"]})
        else:
            request.add_headers({values["name"]: values["value"]})

    def forget(self) -> bool:
        """Drop refused credentials; return whether other credentials can be obtained."""
        return False


_TOKEN_LIFE_S = 3600.0


class _ClientCredentials(Auth):
    """Tokens of the client credentials grant (RFC 6749, section 4.4), each kept until shortly before it expires."""

    def __init__(self, build: Build, values: Mapping[str, Template], place: str) -> None:
        super().__init__("oauth2", values)
        self._lock = threading.Lock()
        self._token, self._until = "", 0.0

    def apply(self, run: Run, request: OutgoingRequest) -> None:
        """Put the token into a request."""
        clock = run.outside.clock
        while not self._lock.acquire(timeout=min(run.left(), 1.0)):
            run.check()
        try:
            if clock.monotonic() >= self._until:
                self._token, life = self._fetch(run)
                self._until = clock.monotonic() + life - min(30.0, life / 10)
                _hide(run.outside.masked, [self._token])
            request.headers["Authorization"] = f"Bearer {self._token}"
        finally:
            self._lock.release()

    def forget(self) -> bool:
        """Drop the refused token: another one can be obtained."""
        self._until = 0.0
        return True

    def _fetch(self, run: Run) -> tuple[str, float]:
        """A new token, and its lifetime in seconds."""
        outside = run.outside
        values = evaluated(self.values, {"env": outside.env, "secrets": outside.secrets})
        client, secret = as_text(values["clientId"]), as_text(values["clientSecret"])
        _hide(outside.masked, [secret])
        form = {"grant_type": "client_credentials", "scope": values.get("scope")}
        headers = {"Accept": "application/json", "Content-Type": CONTENT_TYPES["form"]}
        if values["in"] == "body":
            form |= {"client_id": client, "client_secret": secret}
        else:  # section 2.3.1
            pair = f"{urllib.parse.quote_plus(client)}:{urllib.parse.quote_plus(secret)}".encode()
            headers["Authorization"] = "Basic " + base64.b64encode(pair).decode()
        url, body = as_text(values["tokenUrl"]), encode_query(form).encode()
        detail = "no token could be obtained for the API it calls"
        try:
            answer = fetch("POST", url, headers, body, timeout=run.left(), max_bytes=64 << 10)
            if not 200 <= answer.code < 300:
                raise OutboundError("transport", f"the token server answered {answer.code}")
            given = from_json(answer.body, LENIENT_DECODER)
            token = given["access_token"]
            if not isinstance(token, str) or not token:
                raise ValueError
            told = str(given.get("expires_in"))  # in any form; an invalid value counts as an hour
            return token, float(told) if re.fullmatch(r"[1-9][0-9]{0,8}(\.[0-9]+)?", told) else _TOKEN_LIFE_S
        except OutboundError as error:
            run.check()
            status, kind = (504, "timeout") if error.kind == "timeout" else (502, "transport")
            raise StepError(status, detail, str(error), {kind}) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StepError(502, detail, "the token server gave no token", {"transport"}) from None


OAUTH2 = Table(
    {
        "tokenUrl": Value(required=True),
        "clientId": Value(required=True),
        "clientSecret": Value(required=True),
        "scope": Value(),
        "in": Value(OneOf("header", "body"), default="header"),
    },
    _ClientCredentials,
)


def _make_auth(build: Build, given: dict[str, Any], place: str) -> Auth:
    [(kind, values)] = given.items()
    if isinstance(values, Auth):
        return values
    return Auth(kind, {"token": values} if kind == "bearer" else values)


_WHERE = Value(OneOf("header", "query"), required=True)
_AUTH: dict[str, Member] = {
    "bearer": Value(),
    "basic": Table({"user": Value(required=True), "password": Value(required=True)}),
    "apiKey": Table({"in": _WHERE, "name": Value(required=True), "value": Value(required=True)}),
    "oauth2": OAUTH2,
}
_CONNECTION = {
    "url": Url("an http or https URL", required=True),
    "headers": MapOf(Value(), default={}),
    "timeout": Duration(),
    "auth": Table(_AUTH, _make_auth, choice=_AUTH),
    "description": Text(),
}


def _make_connection(build: Build, given: dict[str, Any], place: str) -> Connection:
    return Connection(given["url"], given["headers"], given.get("timeout"), given.get("auth"))


CONNECTIONS = MapOf(Table(_CONNECTION, _make_connection))


def read_connections(tree: Any) -> dict[str, Connection]:
    """The connections of connections.json; raises FlowError."""
    build = Build(CONNECTIONS_FILE, Member())
    build.names = dict.fromkeys(("env", "secrets"))
    connections: dict[str, Connection] = CONNECTIONS.read(build, tree, "")
    if build.faults:
        raise FlowError(build.faults)
    return connections


class _ConnectionName(Text):
    def read(self, build: Build, value: Any, place: str) -> Any:
        name = super().read(build, value, place)
        if name is not None and name not in build.connections:
            build.fault(place, f"there is no {shown(name)} in connections.json{suggest(name, build.connections)}")
        return name


CONNECTION = _ConnectionName("the name of a connection")


class _Path(Url):
    """A path to append to the URL of a connection."""

    before = "\0/"

    def split(self, url: str) -> list[tuple[bool, str]]:
        """The parts of the text; raises ValueError if it would change the host of the connection."""
        if url and not url.startswith(("/", "?")):
            raise ValueError(f"{shown(url)} must begin with /: it is put behind the connection's url")
        return split_template(url)


PATH = _Path("a path such as /v1/cities")


class _ConnectedCall(HttpCall):
    """A call by a connection, which sees changes of connections.json."""

    def _connection(self, run: Run) -> Connection:
        connection: Connection | None = run.outside.connections.get(name := self.given["connection"])
        if connection is None:
            raise StepError(500, "its connection does not exist any more", f'connection "{name}"', {"missing"})
        return connection

    def begin(self, run: Run, scope: Scope) -> OutgoingRequest:
        """A request with the URL and the headers of the connection."""
        connection, request = self._connection(run), super().begin(run, scope)
        outer = {"env": run.outside.env, "secrets": run.outside.secrets}
        base, _, query = connection.url(outer)[0].partition("?")
        path, _, more = request.url.partition("?")
        both = "&".join(filter(None, (query, more)))
        request.url, request.fixed = base.rstrip("/") + path + (both and f"?{both}"), True
        request.add_headers(evaluated(connection.headers, outer))
        return request

    def send(self, run: Run, request: OutgoingRequest, max_bytes: int) -> tuple[dict[str, Any], int]:
        """Call the API within the time limit of the connection, unless the step has its own."""
        timeout = None if "timeout" in self.given else self._connection(run).timeout
        with run.within(timeout, "") if timeout else contextlib.nullcontext():
            return super().send(run, request, max_bytes)

    def exchange(self, run: Run, request: OutgoingRequest, max_bytes: int) -> Answer:
        """The response to one request; refused credentials are renewed once. Another origin gets none."""
        auth = self._connection(run).auth if request.fixed else None
        if auth is None:
            return super().exchange(run, request, max_bytes)
        for is_last in (False, True):
            proven = copy.copy(request)
            proven.headers = dict(request.headers)
            auth.apply(run, proven)
            answer = super().exchange(run, proven, max_bytes)
            if answer.code != 401 or is_last or not auth.forget():
                break
        return answer


def make_http(build: Build, given: dict[str, Any], place: str) -> Runner:
    """The runner of an `http` step with a connection, `pages` or `until`."""
    if "pages" in given and "until" in given:
        build.fault(place, "has pages and until: a step has one of pages, until")
    if "path" in given and "connection" not in given:
        build.fault(f"{place}/path", "needs a connection: name one, or write the whole address as url")
    if "every" in given and "until" not in given:
        build.fault(f"{place}/every", "sets how often `until` is checked, but there is no `until`")
    if given.get("every", 1) < 0.01:
        build.fault(f"{place}/every", "must be at least 10ms")
    if "connection" in given:
        address = given.get("path", lambda scope: ("", True))
        call: HttpCall = _ConnectedCall(build, {"url": address, **given}, place)
    else:
        call = HttpCall(build, given, place)
    return partial(_all_pages, call) if "pages" in given else partial(_poll, call) if "until" in given else call


class _Page(Table):
    """The `page` of a response, which expressions of the response use under this name."""

    def read(self, build: Build, value: Any, place: str) -> Any:
        if "page" in build.names:
            build.fault(place, 'is called `page` in expressions here: rename the step "page"')
        page = super().read(build, value, place)
        build.add_name("page")
        return page


PAGE = _Page({"items": Value(required=True), "size": Value(Number(1, _MAX_PAGE), default=100)})


def join_selections(build: Build, each: Sequence[Selection], parameters: Sequence[Parameter]) -> Selection:
    """The selections that callers may request of any response. A parameter with one of their names is a fault."""
    sorts = [one.sort for one in each if one.sort]
    sort = True if True in sorts else frozenset().union(*(one for one in sorts if isinstance(one, frozenset))) or False
    selection = Selection(any(one.page for one in each), frozenset().union(*(one.filters for one in each)), sort)
    for name in {item.name for item in parameters if item.where == "query"} & set(selection.names):
        place = f"/request/parameters/{pointer(name)}"
        build.fault(place, "selects rows of the response already: rename it, or leave it out of page, filter and sort")
    return selection


_CODINGS = ("gzip", "deflate")


def _codings(headers: Pairs) -> list[str]:
    """The codings of a body, in the order in which they were applied (RFC 9110, section 8.4)."""
    values = [value for name, value in headers if name.lower() == "content-encoding"]
    words = [word.strip().lower() for word in ",".join(values).split(",")]
    return [word.removeprefix("x-") for word in words if word not in ("", "identity")]


def check_codings(headers: Pairs) -> None:
    """Raise ValueError if a body has a coding that is unknown here."""
    for coding in _codings(headers):
        if coding not in _CODINGS:
            raise ValueError(f"in the Content-Encoding {shown(coding)}: {' and '.join(_CODINGS)} are known here")


def decoded(data: bytes, headers: Pairs, max_bytes: int) -> bytes:
    """A body decoded from gzip and deflate, up to the first unknown coding; raises OutboundError."""
    for coding in itertools.takewhile(_CODINGS.__contains__, reversed(_codings(headers))):
        try:
            if coding == "gzip":
                data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(max_bytes + 1)
            else:
                wrapped = data[0] & 15 == 8 and int.from_bytes(data[:2]) % 31 == 0  # RFC 1950; some omit it
                inflating = zlib.decompressobj(15 if wrapped else -15)
                data = inflating.decompress(data, max_bytes + 1)
                if not inflating.eof and len(data) <= max_bytes:
                    raise EOFError
        except (EOFError, IndexError, OSError, zlib.error):
            raise OutboundError("transport", f"the answer is not whole {coding}, although its headers say so") from None
        if len(data) > max_bytes:
            raise answer_too_large(max_bytes)
    return data
