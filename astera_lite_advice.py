"""What error messages add for authors: what to write instead, and the place in their files.

A wing of astera_lite, which loads this file for the first message of this kind; a message does without it.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import keyword
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from astera_lite import (
    CONNECTIONS_FILE,
    EXPRESSION_FILE,
    INT64,
    LENIENT_DECODER,
    QUOTED,
    WINGS,
    FlowFailure,
    Run,
    Step,
    StepError,
    from_json,
    is_flow_file,
    pointer,
    read_text,
    suggest,
)

# --- expressions: what other languages have, and what to write instead ---

_WORDS = {
    word: advice
    for words, advice in {
        "append extend insert push add unshift": "list + [x]: nothing changes a value in place",
        "update setdefault": "merge(a, b): nothing changes a value in place",
        "sort": "sorted(…) or sort_by(…)",
        "reverse": "reversed(…)",
        "includes contains has_key has hasOwnProperty": "x in y",
        "substring substr slice charAt at": "text[from:to]",
        "map filter forEach reduce flatMap remove pop popitem clear": "[… for x in … if …]",
        "format concat sprintf": "${…} inside the text, or a + b",
        "toString String stringify": "str(…) or json(…)",
        "parseInt Number parseFloat": "int(…) or float(…)",
        "toLowerCase to_lower lowercase": ".lower()",
        "toUpperCase to_upper uppercase": ".upper()",
        "length size": "len(…)",
        "trim": ".strip()",
        "indexOf": ".find(…)",
        "startsWith": ".startswith(…)",
        "endsWith": ".endswith(…)",
        "replaceAll": ".replace(…)",
        "padStart": ".rjust(…)",
        "padEnd": ".ljust(…)",
        "toFixed": "round(x, digits)",
        "some": "any(…)",
        "every": "all(…)",
        "set": "unique(…)",
        "tuple": "[…]",
        "dict": "{name: … for … in …}",
        "encode": "base64(…) or urlencode(…)",
        "parse": "parse_json(…)",
        "isinstance": "a comparison",
        # nodes of Python's syntax
        "Lambda": "there is no lambda: sort_by, group_by and index_by take the name of a field",
        "JoinedStr": "there are no f-strings: write ${…} inside the text",
        "NamedExpr": "nothing can be assigned: add a `set` step",
        "Starred": "there is no `*`: join lists with +",
        "Set SetComp": "there are no sets: use unique([…])",
        "Await": "there is no await",
        "Yield YieldFrom": "there is no yield",
        "BitAnd BitOr BitXor LShift RShift MatMult": "the operators are + - * / // % ** and the comparisons",
        "Invert": "there is no ~",
    }.items()
    for word in words.split()
}
_SYNTAX = {
    "&&": "there is no &&: write `and`",
    r"\|\|": "there is no ||: write `or`",
    "[=!]==": "there is no === or !==: write == or !=",
    "!(?!=)": "there is no !: write `not`",
    r"\?\?": "there is no ??: write `a if a != null else b`",
    r"\?[^:]*:": "there is no ? : here: write `a if condition else b`",
    "=>": "there is no =>: write a comprehension, [… for x in …]",
    "`": "there is no `…`: text stands in quotes",
    "(?<![=!<>:])(?<!default)(?<!digits)(?<!reverse)(?<!start)(?<!step)=(?!=)": "= does not compare: write ==",
}


def on_word(word: str) -> str:
    """What to write instead of a function, a method, or a node of Python's syntax; "" if there is no advice."""
    return _WORDS.get(word, "")


def on_name(name: str, known: Mapping[str, Any]) -> str:
    """What an unknown name may stand for; "" if there is no advice. `known` are the names with their schemas."""
    if name == "steps":
        return ': write the name of the step without "steps."'
    request = known.get("request")
    places = {"params": known.get("params"), "request.body": request and request.properties.get("body"), **known}
    found = [place for place, schema in places.items() if schema and place != "error" and name in schema.properties]
    if not found and name.isupper() and "env" in known and name.lower() not in known:
        found = ["env", "secrets"]
    nearest = " or ".join(f'"{place}.{name}"' for place in found[:3])
    return f"; did you mean {nearest}?" if found else ""


def on_syntax(source: str) -> str:
    """What is wrong with an expression that Python's parser refuses; "" if there is no advice."""
    if word := re.search(rf"\.({'|'.join(keyword.kwlist)})\b", source):
        return f'{word[1]} is a word of the language: write ["{word[1]}"] for the field of that name'
    bare = re.sub(QUOTED, "''", source)
    return next((advice for pattern, advice in _SYNTAX.items() if re.search(pattern, bare)), "")


def on_failure(error: Exception, sources: Sequence[tuple[str, str]]) -> str:
    """Why an expression failed: the place, the part, and the fault in words of the language.

    `sources` are the places and texts of the expressions, by the line numbers that their code has.
    """
    place = part = ""
    names: Mapping[str, Any] = {}
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename == EXPRESSION_FILE:
            line, _, start, end = next(itertools.islice(code.co_positions(), trace.tb_lasti // 2, None))
            if line and line <= len(sources) and start is not None and end is not None:
                place, source = sources[line - 1]
                part = f"({source})".encode()[start:end].decode(errors="replace") or source
                names = trace.tb_frame.f_locals
        trace = trace.tb_next
    message = _on_no_member(error.args[0], part, names) if isinstance(error, KeyError) else _message_of(error, part)
    return f"{place}: {part}: {message}" if place else message


_MAX_MEMBERS, _LISTED, _MAX_LISTED_NAME = 30, 10, 40  # looked at, listed in a message, and characters of each name


_ON_OUTSIDE = {
    "env": ": set this environment variable, which env_allow must name",
    "secrets": ": the setting secrets must name it",
}


def _on_no_member(key: Any, part: str, names: Mapping[str, Any]) -> str:
    """What to write instead of a member that an object lacks. Names are listed whole, so that secrets are masked."""
    message = f'there is no member "{key}"'
    if outside := re.match(r"(env|secrets)\b", part):
        message += _ON_OUTSIDE[outside[1]]
    with contextlib.suppress(AttributeError, LookupError, SyntaxError, TypeError, ValueError):
        node: Any = ast.parse(f"({part})", mode="eval").body
        members = _value_of(node.value, {**names.get("_s", {}), **names})
        short = [name for name in itertools.islice(members.keys(), _MAX_MEMBERS) if len(name) <= _MAX_LISTED_NAME]
        known = [name for name in short if name.isprintable()]
        more = ", …" if len(members) > len(known[:_LISTED]) else ""
        message += f"{suggest(str(key), known)} (members: {', '.join(known[:_LISTED]) or 'none'}{more})"
    return message + (f'; if it may be missing, write .get("{key}")' if isinstance(key, str) else "")


def _value_of(node: Any, names: Mapping[str, Any]) -> Any:
    """The value of a chain of names and members, such as `a.b[0]`, but of no other expression."""
    if isinstance(node, ast.Name) and node.id not in ("env", "secrets"):
        return names[node.id]
    return _value_of(node.value, names)[node.attr if isinstance(node, ast.Attribute) else node.slice.value]


_TYPE_ERRORS = {
    r"concatenate str|for \+: .*'str'": "+ joins text with text: write ${…} inside it, str(…), or int(…) for numbers",
    "concatenate list": "+ joins a list only with a list: write list + [x]",
    r"(operand|instances).*'NoneType'": "one side is null: `… or 0` gives a number instead",
    r"(operand|instances).*'str'|type str ": "text is not a number: int(…) or float(…) reads one",
    "'in <string>'": "only text can be in text: write str(…)",
    "instances of 'dict'": "objects have no order: compare members",
    r"has no len\(\)": "only text, lists and objects have a length",
    "is not .*iterable": "only lists, objects and text have items; where it may be null, write `… or []`",
    "unhashable type": "a list or an object cannot be the name of a member or a group",
}


def _message_of(error: Exception, part: str) -> str:
    message = str(error)
    if isinstance(error, MemoryError | OverflowError | RecursionError):
        return "it is too large or nested too deeply"
    if isinstance(error, TypeError):
        if words := next((words for pattern, words in _TYPE_ERRORS.items() if re.search(pattern, message)), ""):
            return words
        if "indices must be integers" in message or "is not subscriptable" in message:
            kinds = {"list": "a list", "tuple": "a list", "byte": "binary data", "'NoneType'": "null"}
            kind = kinds.get(message.partition(" ")[0], "text" if "indices" in message else "a number or a boolean")
            return f"{kind} has no members{_on_no_members(kind, part)}"
    return message


def _on_no_members(kind: str, part: str) -> str:
    node: Any = ast.parse(f"({part})", mode="eval").body
    is_length = isinstance(node, ast.Attribute) and node.attr == "length"
    if kind == "a list" or is_length:
        return ": len(…) is the length" if is_length else ": [0] is its first item"
    has_text = isinstance(node, ast.Attribute | ast.Subscript) and kind in ("text", "binary data")
    return f": parse_json({ast.unparse(node.value)}) reads it if it is JSON" if has_text else ""


# --- files and requests ---


#: By what follows the message of Python's JSON parser: the last character before the place, a line feed, the place.
_JSON_SLIPS = {
    r"\n(//|/\*|#)": "JSON has no comments; use a description, or write the flow as TOML",
    r"\n'": 'JSON has "double" quotes',
    r"trailing comma|,\n[}\]]": "there is a comma after the last item",
    r"control character.*\n[\r\n]": "a quote is missing on this line (a line break in a text is written \\n)",
    r"Unterminated": "the text that begins here has no closing quote",
    r"delimiter \"\n\w": 'a quote is missing before this place, or one inside a text is not written \\"',
    r"':' delimiter": "a colon is missing before this place",
    r"',' delimiter": "a comma or a closing bracket is missing before this place",
    r"value.*\n(True|False|None)\b": "JSON writes true, false and null",
    r"Expecting.*\n[A-Za-z]": 'names and texts stand in "double" quotes',
    r"Extra.*\n[}\]]": "there is a bracket too many",
}


def on_json(error: json.JSONDecodeError) -> str:
    """What is wrong with a file that Python's JSON parser refuses; "" if there is no advice."""
    before, rest = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 10]
    if not error.doc.strip():
        return ": the file is empty; `new NAME` writes a first flow"
    if not rest:
        return ": the file ends too early, a } or ] or a quote is missing"
    found = f"{error.msg} {before[-1:]}\n{rest}"
    return next((f": {advice}" for pattern, advice in _JSON_SLIPS.items() if re.search(pattern, found)), "")


def on_twice(text: str, message: str) -> str:
    """Where in a JSON file the second member of a name is, if `message` says that there are two."""
    if message.endswith("occurs twice"):
        try:
            pointer_lines(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno}, column {error.colno}"
    return ""


def on_member(name: str) -> str:
    """Where in a flow file a misplaced member belongs; "" if there is no advice."""
    if name in ("when", "retry", "onError"):
        return f": it belongs to the step, beside its kind: {name}"
    if name in ("contentTypes", "strict"):
        return f": it belongs to request, beside body: /request/{name}"
    return {
        "parameters": ": it belongs to request: /request/parameters",
        "steps": ": it stands beside request: /steps",
    }.get(name, "")


def on_segment(segment: str) -> str:
    """What is wrong with a segment of a flow's resource."""
    if "?" in segment:
        return ": query parameters stand under parameters, not in the path"
    braces = "{" in segment or "}" in segment
    return ": a parameter is a whole segment in braces, such as /x/{id}" if braces else ": percent-encode the rest"


def on_body(body: bytes, error: ValueError) -> tuple[str, str]:
    """The place of an integer beyond 64 bits, and what a shell may have done to JSON on a command line."""
    if body[:1] == b"'":
        return "", '; it begins with \', which shells of Windows do not remove: write "{\\"name\\": \\"Ada\\"}"'
    if re.match(rb"[ \t\r\n]*\{[ \t\r\n]*[A-Za-z_]", body):
        return "", '; a shell may have taken its double quotes: write \\" for each, or send a file with -d @body.json'
    if "64 bits" in str(error):  # to parse a large body again takes long
        with contextlib.suppress(ValueError):
            return _large_integer(from_json(body, LENIENT_DECODER), ""), ""
    return "", ""


def _large_integer(value: Any, place: str) -> str:
    """The place of the first integer beyond 64 bits inside a value, or ""; there may be millions of others."""
    members = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
    for key, item in members:
        if type(item) is int and item not in INT64:
            return f"{place}/{pointer(str(key))}"
        if type(item) in (dict, list) and (found := _large_integer(item, f"{place}/{pointer(str(key))}")):
            return found
    return ""


_STRAY_SUFFIX = re.compile(r"\.(ya?ml|json[c5]|(json|toml)(\.txt)?)$", re.IGNORECASE)


def on_stray(folder: str | os.PathLike[str], name: str) -> str:
    """Why an entry of the flows folder that looks like a flow is not read; "" for any other entry."""
    if name[0] == ".":
        return ""
    with contextlib.suppress(OSError):  # there is no folder
        inside = os.listdir(os.path.join(folder, name))
        of_flows = any(map(is_flow_file, inside)) and not any(file.endswith(".py") for file in inside)
        return "flows in a folder inside are not read: move them one up" if of_flows else ""
    suffix = _STRAY_SUFFIX.search(name)
    cure = "write it as JSON or TOML, in a file that ends in .json or .toml"
    return f"is not read: {cure}, not {suffix[0]}" if suffix else ""


# --- failures: where it is ---

_MAX_BODY = 500  # bytes of an API's response


def explain(failure: dict[str, Any], error: BaseException, run: Run, step: Step) -> None:
    """Add details for the flow's author to the failure of a step."""
    outside, kind = run.outside, failure["kind"]
    if isinstance(error, FlowFailure):
        failure["status"] = error.status
    elif isinstance(error, StepError):
        if error.answer is not None:
            masked = outside.masked
            head = masked(error.answer.body[: _MAX_BODY + masked.longest].decode("utf-8", "replace"))
            failure["status"] = error.answer.code
            failure["body"] = head.encode()[:_MAX_BODY].decode("utf-8", "ignore")
        if error.source:
            failure["source"] = error.source
    elif kind == "error" and step.kind.code:
        failure["source"] = source_of(error)
    elif kind == "expression" and failure["message"].startswith(step.place.rpartition("/")[0] + "/"):
        failure["pointer"], _, failure["message"] = failure["message"].partition(": ")
    elif kind == "expression" and failure["message"].startswith("/"):
        failure["message"] = f"{CONNECTIONS_FILE}: {failure['message']}"
    path = os.path.join(outside.folder, failure["file"]) if outside.folder else ""
    failure["line"] = line_of(path, failure["pointer"], run.flow.text)


def source_of(error: BaseException) -> dict[str, Any] | None:
    """File and line of an exception in the step's own code: the innermost frame in the folder of its function."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [frame for frame in frames if os.path.basename(frame[0]) not in ("astera_lite.py", *WINGS)]
    beside = [frame for frame in theirs if os.path.dirname(frame[0]) == os.path.dirname(theirs[0][0])]
    return {"file": os.path.basename(beside[-1][0]), "line": beside[-1][1]} if beside else None


_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[\]{},:]|\n')


def pointer_lines(text: str) -> dict[str, int]:
    """The line on which each value of a well-formed JSON text begins, by its JSON Pointer without the first slash.

    Raises JSONDecodeError where an object has a second member of a name.
    """
    lines: dict[str, int] = {}
    line = 1
    names: list[str | int] = []  # the path to the next value
    expects_name = False
    for match in _JSON_TOKEN.finditer(text):
        mark = match[0]
        if mark == "\n":
            line += 1
        elif mark in "{[":
            names.append(0 if mark == "[" else "")
            expects_name = mark == "{"
        elif mark in "]}":
            names.pop()
        elif mark == ",":
            last = names[-1]
            names[-1] = last + 1 if isinstance(last, int) else last
            expects_name = not isinstance(last, int)
        elif mark != ":" and expects_name:
            names[-1], expects_name = pointer(json.loads(mark)), False
            if "/".join(map(str, names)) in lines:
                raise json.JSONDecodeError("occurs twice", text, match.start())
        if names and not expects_name:
            lines.setdefault("/".join(map(str, names)), line)
    return lines


@lru_cache(maxsize=64)
def _lines_of_file(path: str, changed: int, text: str | None) -> Mapping[str, int]:
    written = read_text(path)
    tree = from_json(written)
    return pointer_lines(written) if text is None or tree == json.loads(text) else {}


def line_of(path: str, place: str, text: str | None = None) -> int | None:
    """The line of a JSON file to which a JSON Pointer leads, or of the nearest existing place around it.

    None where the file has no such place, is no JSON, or does not say `text` (JSON) any more.
    """
    try:
        lines = _lines_of_file(path, os.stat(path).st_mtime_ns, text)
    except (OSError, ValueError):
        return None
    names = place.split("/")[1:]
    while names and "/".join(names) not in lines:
        names.pop()
    return lines["/".join(names)] if names else None
