"""What few flows ask of requests: patterns of texts; pages, filters and an order of a response's rows.

A wing of astera_lite, which loads this file when a flow is deployed that has one of them.
"""

from __future__ import annotations

import operator
import re
import types
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from astera_lite import (
    MAX_PAGE,
    MAX_WORK,
    Budget,
    ExpressionError,
    FlowFailure,
    InputErrors,
    Selection,
    as_text,
    field_values,
    kind_of,
    read_number,
    sha256,
    shown,
    suggest,
    to_json,
)

# Python's white space is not ECMA's, its `$` also holds before a last line feed, and its `.` takes more line ends.
_SPACES = "\\t-\\r \\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\ufeff"
_TRANSLATED = {".": r"[^\n\r\u2028\u2029]", r"\s": f"[{_SPACES}]", r"\S": f"[^{_SPACES}]"}
_ATOM = r"\\[dDwWnrtfv]|\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\[!-/:-@\[-`{-~]"
_PATTERN_TOKEN = re.compile(
    rf"\[\^?+(?!\])(?:{_ATOM}|\\s|[^\\\[\]&~|-]|-(?!-)|&(?!&)|~(?!~)|\|(?!\|))++\]|{_ATOM}|\\[bBsS]"
    r"|\((?:\?:)?(?!\?)|[)|^$.]|(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??(?![*+?{])|[^\\()\[\]{}|^$.*+?]"
)
#: Whether a position matches: by whether a character of a word is before it (None: nothing is), the character behind it
#: (empty: nothing is), and whether that is one of a word.
_POSITIONS: dict[str, Callable[[bool | None, str, bool], bool]] = {
    "^": lambda before, after, word: before is None,
    "$": lambda before, after, word: after == "",
    r"\b": lambda before, after, word: bool(before) != word,
    r"\B": lambda before, after, word: bool(before) == word,
}
_MAX_PROGRAM = 2800  # instructions: a character repeated as often as a text may be long fits in
_MAX_MATCHED = 16 << 10  # characters
_MAX_MATCHING = 4 << 20  # characters times instructions
_MAX_REMEMBERED = 1 << 14  # places in a program, for each pattern


class Pattern:
    """A regular expression as JSON Schema has them (ECMA 262), less look-around and back references.

    A search takes time by the length of the text, because it follows all ways through a program at once. An
    instruction is the `match` of a regular expression, which takes one character; the name of a position; or a tuple
    of jumps, each of which is a way to go on. Raises re.error or ValueError.
    """

    def __init__(self, text: str) -> None:
        with warnings.catch_warnings():  # of what is refused below
            warnings.simplefilter("ignore")
            re.compile(text)  # finds most faults
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
        """The program of what stands before the next `)`; its tokens are taken off the end of the list."""
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
        """Where in the program a search is behind the character `after`, and the next `before`; its end is a match."""
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
        """Whether it matches somewhere in the text, which may have `longest` characters."""
        if len(text) > self.longest:
            return False
        places: frozenset[int] = frozenset()
        before = None
        for character in text:
            places, before = self._next(places, before, character)
        return len(self._program) in self._next(places, before, "")[0]


class Selected(NamedTuple):
    """What a request asks of the rows."""

    offset: int = 0
    sort: Sequence[str] = ()  # fields, a leading "-" for descending
    filters: Mapping[str, Sequence[str]] = types.MappingProxyType({})  # the texts that each field may have
    stamp: str = ""  # ties a cursor to the request

    def cursor(self, offset: int) -> str:
        """What asks for the rows from here on."""
        return f"{offset}.{self.stamp}"

    def rows(self, given: Any, place: str) -> list[Any]:
        """The rows that were asked for, in the order that was asked for: rows without a value come last."""
        if type(given) not in (list, tuple) or not all(type(row) is dict for row in given):
            raise ExpressionError(f"{place}: filter and sort need a list of objects")
        rows = list(given)
        Budget(MAX_WORK).deep(field_values(rows, *self.filters, *self.sort))
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
            except TypeError:  # values of several kinds
                known.sort(key=lambda row, name=name: as_text(row[name]), reverse=descending)  # type: ignore[misc]
            rows = known + [row for row in rows if row.get(name) is None]
        return rows

    def page(self, rows: Any, size: Any) -> dict[str, Any]:
        """What expressions see as `page`: its items, the cursor of the next one, and the number of rows in all."""
        if type(size) is not int or not 1 <= size <= MAX_PAGE:
            raise ExpressionError(f"/response/page/size: {shown(size)} is not a number from 1 to {MAX_PAGE}")
        if self.filters or self.sort:
            rows = self.rows(rows, "/response/page/items")
        if type(rows) not in (list, tuple):
            raise ExpressionError(f"/response/page/items: {kind_of(rows)} is not a list")
        end = self.offset + size
        cursor = self.cursor(end) if end < len(rows) else None
        return {"items": rows[self.offset : end], "cursor": cursor, "total": len(rows)}


def _is_selected(value: Any, texts: Sequence[str], numbers: Collection[float]) -> bool:
    return value in numbers if type(value) in (int, float) else value is not None and as_text(value) in texts


def read_selection(selection: Selection, path: str, query: Mapping[str, list[str]], errors: InputErrors) -> Selected:
    """What a request asks for; faults are added to `errors`."""
    for name in {"cursor", "sort_by"} & {*selection.names}:
        if len(query.get(name, ())) > 1:
            errors.add("query", name, "must be given once")
    sort = tuple(filter(None, query.get("sort_by", [""])[0].split(","))) if selection.sort else ()
    known = (
        selection.sort if isinstance(selection.sort, frozenset) else {part.removeprefix("-") for part in sort} - {""}
    )
    for name in [part.removeprefix("-") for part in sort]:
        if name not in known:
            errors.add("query", "sort_by", f"knows no field {shown(name)}{suggest(name, known)}")
    filters = {name: query[name] for name in selection.filters if name in query}
    if not selection.page:
        return Selected(0, sort, filters)
    rest = sorted(item for item in query.items() if item[0] != "cursor")
    stamp = sha256(to_json([path, rest]).encode()).hex()[:16]
    cursor = query.get("cursor", [""])[0]
    match = re.fullmatch(rf"([1-9][0-9]{{0,14}})\.{stamp}", cursor)
    if cursor and not match:
        errors.add("query", "cursor", "is none that this endpoint gave for this request: begin again without it")
    return Selected(int(match[1]) if match else 0, sort, filters, stamp)
