"""Every command and output of README.md, docs/ and CONTRIBUTING.md: each document is followed as it stands.

A document is run in a folder of its own that looks like a checkout, with free ports in place of 9261 to 9264
(and of nginx's 8080). Where it speaks of port 5432 there is a PostgreSQL, and `psql` is its superuser:

- Lines that begin with `$ ` are typed into a shell; what follows, up to the next of them, is what it must print. `…`
  stands for anything, in a line or as a line. Times, dates and the like are any; ids and tokens, too, but the same one
  each time: the server's own stands in for the document's in later commands.
- A command whose output ends in a line with `listening on` gets a terminal of its own and goes on. What it says later
  stands below a paragraph such as "The listener prints:"; "Stop the server with Ctrl-C" ends it.
- A block below "Save … `name`:" is written to that file, below "… writes `name`:" it must be that file, below "… in
  `name`:" it must be a part of it.
- `<!-- needs: node -->` above a block skips it where there is no such program, and then the document is reported as
  skipped; `<!-- not run: why -->` says why nobody runs it. Any other block is a fault.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from nodes import CURE, Cluster, postgres_bin
from support import ROOT

from astera_lite import SETTING_FIELDS
from astera_lite_tools import COMMANDS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
#: Whose other blocks are tested by themselves.
ELSEWHERE = {"flows.md": "test_docs_flows.py", "embedding.md": "test_docs_embedding.py"}
PORTS = ("9261", "9262", "9263", "9264", "8080")
POSTGRES_PORT = "5432"
#: What programs listen on by themselves, so that it can be replaced.
DEFAULT_PORTS = {"examples/callback_listener.py": "9262", "examples/slow_api.py": "9263"}
#: What differs from run to run; those of the first kind are the same wherever they come again.
SAME = (
    r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
    r"|\bastera_[A-Za-z0-9_-]{43}(?![A-Za-z0-9_-])|\bwhsec_[A-Za-z0-9+/]{43}="
)
ANY = [
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z",
    r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT",
    r"\d{4}-\d\d-\d\d",
    r"v1,[A-Za-z0-9+/]{43}=",
    r"\b[0-9a-f]{16}\b",
    r"\b1\d{9}\b",
    r"\d+ ms\b",
    r"\d+\.\d s\b",
    r"\d{1,3}(?:,\d{3})+",
]
MASK = re.compile(
    "|".join([f"(?P<same>{SAME})", *(f"(?P<any{n}>{mask})" for n, mask in enumerate(ANY)), "(?P<dots>…)"])
)
DEADLINE_S = 20
#: A reader is slower than a test: a command that only looks is given again until it sees what the document says.
LOOKS = re.compile(r"curl (?!.*(-X|-d|--data|publishingAsync))|python astera_lite.py jobs?\b")
READER_S = 5
DONE = r"\s*DONE (?P<code>\d+)\n"  # printed behind a command


class Item(NamedTuple):
    line: int
    kind: str  # text, block or comment
    text: str


def items_of(page: str) -> list[Item]:
    """Paragraphs, blocks and comments of a document, in order."""
    items: list[Item] = []
    lines = page.split("\n")
    at = 0
    while at < len(lines):
        begin, line = at, lines[at]
        at += 1
        if line.startswith("```"):
            while not lines[at].startswith("```"):
                at += 1
            items.append(Item(begin + 1, "block", "\n".join(lines[begin + 1 : at])))
            at += 1
        elif line.startswith("    ") and (begin == 0 or not lines[begin - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            items.append(Item(begin + 1, "block", "\n".join(text[4:] for text in lines[begin:at]).rstrip()))
        elif line.startswith("<!--"):
            items.append(Item(begin + 1, "comment", line.removeprefix("<!--").removesuffix("-->").strip()))
        elif line.strip():
            while at < len(lines) and lines[at].strip() and not lines[at].startswith("```"):
                at += 1
            items.append(Item(begin + 1, "text", " ".join(lines[begin:at])))
    return items


class Terminal:
    """A shell, and what it has printed."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.shell = subprocess.Popen(
            ["bash"], cwd=folder, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whatever started us may have ignored it
        )  # fmt: skip
        self.command, self.unread, self.ended = "", "", False
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.shell.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while data := os.read(self.shell.stdout.fileno(), 65536):
            with self.news:
                self.unread += decoder.decode(data).replace("\r\n", "\n")
                self.news.notify_all()
        with self.news:
            self.ended = True
            self.news.notify_all()

    def type(self, command: str) -> None:
        self.command = command
        assert self.shell.stdin is not None
        self.shell.stdin.write(command.encode())
        self.shell.stdin.flush()

    def until(self, pattern: re.Pattern[str], change: Callable[[str], str]) -> re.Match[str] | None:
        """What is printed, once it matches from its beginning; None if it does not in time."""
        end = time.monotonic() + DEADLINE_S
        with self.news:
            while not (match := pattern.match(change(self.unread))):
                if self.ended or not self.news.wait(end - time.monotonic()):
                    return None
            self.unread = change(self.unread)[match.end() :]
            return match

    def interrupt(self) -> bool:
        """Ctrl-C; whether it ends."""
        assert self.shell.stdin is not None
        with contextlib.suppress(OSError):
            self.shell.stdin.close()
        os.killpg(self.shell.pid, signal.SIGINT)
        self.reader.join(DEADLINE_S)
        return self.ended

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.shell.pid, signal.SIGKILL)
        self.shell.wait()
        self.reader.join(DEADLINE_S)
        for stream in (self.shell.stdin, self.shell.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()


def free_ports(count: int) -> list[str]:
    """Ports of four digits like those of the documents, so that lengths are the same; no others are given out there."""
    ports: list[str] = []
    while len(ports) < count:
        port = random.randrange(5000, 9999)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if str(port) not in (*ports, *PORTS):
                ports.append(str(port))
    return ports


class Walk:
    """A document on its way: the folder, the terminals, and what stands for what."""

    def __init__(self, page: str, folder: Path, cache: Path, cluster: Cluster | None = None) -> None:
        self.page, self.folder = page, folder
        for entry in ROOT.iterdir():
            if (
                not entry.name.startswith((".", "__"))
                and entry.name not in ("flows", "data")
                and ".db" not in entry.name
            ):
                (folder / entry.name).symlink_to(entry)
        shutil.copytree(ROOT / "flows", folder / "flows")
        (folder / "__pycache__").symlink_to(cache)
        (folder / ".bin").mkdir()
        (folder / ".bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / ".bin" / "python").chmod(0o755)
        (folder / ".curlrc").write_text('silent\nshow-error\nnoproxy = "*"\n')
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ASTERA_", "PYTHONDONT"))}
        self.env = kept | {
            "PATH": f"{folder}/.bin{os.pathsep}{os.environ['PATH']}",
            "CURL_HOME": str(folder),
            "PYTHONUNBUFFERED": "1",
            "ASTERA_LITE_PORT": self.ports["9261"],
        }
        if cluster is not None:
            self.ports[POSTGRES_PORT] = str(cluster.port)
            self.env |= {
                "PGHOST": "127.0.0.1",
                "PGPORT": str(cluster.port),
                "PGUSER": "astera",
                "PGDATABASE": "postgres",
            }
        self.same: dict[str, str] = {}  # ids and tokens of the document, and the real ones
        self.missing: list[str] = []
        self.here = Terminal(folder, self.env)
        self.others: list[Terminal] = []

    def __enter__(self) -> Walk:
        return self

    def leave(self) -> None:
        """At the end of a document: what still runs is stopped, and ids mean nothing any more."""
        for terminal in self.others:
            assert terminal.ended or terminal.interrupt(), f"{self.page}: {terminal.command} does not stop"
            terminal.close()
        self.others.clear()
        self.same.clear()

    def __exit__(self, *error: object) -> None:
        for terminal in (*self.others, self.here):
            terminal.close()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # unless the document got as far as to stop it
            os.kill(int((self.folder / "nginx.pid").read_text()), signal.SIGTERM)

    def real(self, text: str) -> str:
        """A document's command or file, with this run's ports and ids."""
        for program, port in DEFAULT_PORTS.items():
            text = re.sub(rf"(python \S*{re.escape(program)})(?!.*--port)", rf"\1 --port {port}", text)
        for written, port in self.ports.items():
            text = re.sub(rf"(?<!\d){written}(?!\d)", port, text)
        return re.sub(SAME, lambda found: self.same.get(found[0], found[0]), text)

    def written(self, output: str) -> str:
        """What was printed, with the document's ports and paths."""
        for written, port in self.ports.items():
            output = re.sub(rf"(:|%3A){port}(?!\d)", rf"\g<1>{written}", output)
        return output.replace(str(self.folder), ".")

    def pattern(self, expected: str, last: str) -> tuple[re.Pattern[str], dict[str, str]]:
        """What an output must look like, and which group holds which id of the document."""
        groups: dict[str, str] = {}

        def part(found: re.Match[str]) -> str:
            if found["dots"]:
                return ".*?"
            if not found["same"]:
                return "(?:" + next(mask for n, mask in enumerate(ANY) if found[f"any{n}"]) + ")"
            known = found["same"]
            if known in self.same:
                return re.escape(self.same[known])
            for group, name in groups.items():
                if name == known:
                    return f"(?P={group})"
            groups[f"id{len(groups)}"] = known
            return f"(?P<id{len(groups) - 1}>{SAME})"

        lines = []
        for line in expected.strip("\n").split("\n"):
            if line.strip() == "…":
                lines.append("(?:.*\n)*?")
                continue
            pieces, at = "", 0
            for found in MASK.finditer(line):
                pieces += literal(line[at : found.start()]) + part(found)
                at = found.end()
            lines.append(pieces + literal(line[at:].rstrip()) + "[ \t]*(?:\n|\\Z)")
        return re.compile(r"\s*" + "".join(lines) + last), groups

    def learn(self, match: re.Match[str], groups: dict[str, str]) -> None:
        self.same |= {name: match[group] for group, name in groups.items()}

    def named(self, text: str) -> Terminal:
        """The terminal that a paragraph speaks of."""
        word = re.search(r"\b(server|listener|receiver|API)\b", text)
        part = {"server": "astera_lite", "API": "slow_api"}.get(word[1], word[1]) if word else ""
        found = [one for one in self.others if part in one.command and not one.ended]
        assert found, f"no such terminal: {text}"
        return found[-1]

    def run(self, items: list[Item]) -> None:
        before, directive = "", ""
        for item in items:
            where = f"{self.page}:{item.line}"
            if item.kind == "comment":
                directive = item.text
            elif item.kind == "text":
                before, directive = item.text, ""
                if re.search(r"[Ss]top (the \w+|it) with Ctrl-C", before):
                    assert self.named(before).interrupt(), f"{where}: it does not stop"
            else:
                what, _, word = directive.partition(": ")
                if what == "needs" and not shutil.which(word):
                    self.missing.append(f"line {item.line} needs {word}")
                elif what != "not run":
                    self.block(where, before, item.text)
                directive = ""

    def block(self, where: str, before: str, text: str) -> None:
        name = re.search(r"`([\w./-]+)`:$", before)
        if text.startswith("$ "):
            for command, output in commands(text):
                self.command(f"{where}: $ {command}", command, output)
        elif re.search(r"\b(server|listener|receiver|API) prints\b.*:$", before):
            terminal = self.named(before)
            pattern, groups = self.pattern(text, "")
            match = terminal.until(pattern, self.written)
            assert match, f"{where}: expected:\n{text}\ngot:\n{self.written(terminal.unread)}"
            self.learn(match, groups)
        elif name and re.search(r"\b[Ss]ave\b", before):
            file = self.folder / name[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(self.real(text) + "\n")
        elif name and re.search(r"\bwrites `[^`]*`:$", before):
            assert (self.folder / name[1]).read_text().strip() == text.strip(), where
        elif name and re.search(r"\bin `[^`]*`:$", before):
            for part in text.split("\n…\n"):
                assert f"\n{part}\n" in (ROOT / name[1]).read_text(), f"{where}: not there:\n{part}"
        else:
            assert self.page in ELSEWHERE, f"{where}: nobody runs this"

    def command(self, where: str, command: str, expected: str) -> None:
        goes_on = "listening on" in expected.rpartition("\n")[2]
        pattern, groups = self.pattern(expected, "" if goes_on else DONE)
        if goes_on:
            self.others.append(Terminal(self.folder, self.env))
            self.others[-1].type(f"{self.real(command)}\n")
            match = self.others[-1].until(pattern, self.written)
            assert match, f"{where}\nexpected:\n{expected}\ngot:\n{self.written(self.others[-1].unread)}"
            self.learn(match, groups)
            return
        end = time.monotonic() + READER_S
        while True:
            kept = f"{{ (exit ${{last:-0}}); {self.real(command)}\n}} </dev/null; last=$?"
            self.here.type(f"{kept}; printf '\\nDONE %s\\n' $last\n")
            done = self.here.until(re.compile(f"(?s:.*?)\n{DONE}"), self.written)
            assert done, f"{where}\nit does not end:\n{self.here.unread}"
            match = pattern.fullmatch(done[0])
            if match or not LOOKS.match(command) or time.monotonic() > end:
                break
            time.sleep(0.1)
        assert match, f"{where}\nexpected:\n{expected}\ngot:\n{done[0]}"
        assert expected or match["code"] == "0", f"{where}\nends with {match['code']}"
        self.learn(match, groups)


def literal(text: str) -> str:
    """A pattern of this text; columns may be of any width."""
    return re.sub(r"(?:\\ ){2,}", " {2,}", re.escape(text))


def commands(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a block, and what each prints."""
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = part.split("\n")
        count = 1
        while lines[count - 1].endswith("\\"):
            count += 1
        yield "\n".join(lines[:count]), "\n".join(lines[count:]).strip("\n")


posix = pytest.mark.skipif(
    os.name != "posix" or not (shutil.which("bash") and shutil.which("curl")),
    reason="wants bash and curl: install them",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where bytecode is kept, so that not each command compiles the module."""
    return tmp_path_factory.mktemp("cache")


@posix
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_document_says(page: Path, tmp_path: Path, cache: Path) -> None:
    text, cluster = page.read_text("utf-8"), None
    with contextlib.ExitStack() as stack:
        if re.search(rf"\b{POSTGRES_PORT}\b", text):
            if postgres_bin() is None:
                pytest.skip(CURE)
            cluster = Cluster.made(tcp=True)
            stack.callback(cluster.remove)
        walk = stack.enter_context(Walk(page.name, tmp_path, cache, cluster))
        walk.run(items_of(text))
    if walk.missing:
        pytest.skip(f"{page.name}: {'; '.join(walk.missing)}; all else was run")


@posix
def test_one_reader_follows_them_all_in_one_folder(tmp_path: Path, cache: Path) -> None:
    """In the order of the README: what one document leaves behind is not in the way of the next."""
    readme = (ROOT / "README.md").read_text("utf-8")
    names = re.findall(r"^\| \[.+?\]\((docs/.+?)\)", readme, re.MULTILINE)
    assert len(names) > 6
    with Walk("README.md", tmp_path, cache) as walk:
        for name in ("README.md", *names):
            text = (ROOT / name).read_text("utf-8")
            if POSTGRES_PORT not in text:
                walk.page = Path(name).name
                walk.run(items_of(text))
                walk.leave()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_are_commands(page: Path) -> None:
    for span in re.findall(
        r"`(?:[A-Z_]+=\S+ )?python (?:-m )?astera_lite(?:\.pyz?)?((?: [^`]*)?)`", page.read_text("utf-8")
    ):
        name, *words = [*span.split(), "serve"] if span.strip()[:1] != "-" else ["serve", *span.split()]
        assert name in COMMANDS, span
        known = {argument.strip("-") for argument, _ in COMMANDS[name][2]} | {*SETTING_FIELDS, "config", "version"}
        assert {word[2:].replace("-", "_") for word in words if word[:2] == "--"} <= known, span


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if "://" not in link:
                path, _, place = link.partition("#")
                target = (page.parent / path) if path else page
                assert target.exists(), f"{page.name}: {link}"
                heads = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.MULTILINE) if place else []
                assert not place or place in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads], link


KEY = "01a20acd-0ddd-7000-bcdb-8f18d955a4cc"
OTHER = "01a20acd-1a92-7000-8a6a-d4a80adcfcf4"


@posix
@pytest.mark.parametrize(
    "page",
    [
        "    $ echo one\n    two",
        "    $ echo one; echo two\n    one",
        "    $ echo one",
        "    $ echo 2026-11-24T12:45:40.318Z\n    …T12:45:40\n",
        f"    $ echo {KEY} {OTHER}\n    {KEY} {KEY}",
        "    $ false",
        "    words that nobody runs",
        "Save this as `a.txt`:\n\n    one\n\nThen:\n\n    $ cat a.txt\n    two",
        "This writes `flows/hello.json`:\n\n    {}",
        "    $ echo listening on listener; cat\n    listening on listener\n\nThe listener prints:\n\n    more",
        "It is in `astera_lite.py`:\n\n    def main() -> Nothing:",
    ],
)
def test_a_wrong_document_fails(page: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_docs.DEADLINE_S", 0.5)
    with Walk("page.md", tmp_path, cache) as walk, pytest.raises(AssertionError, match=r"page\.md|no such terminal"):
        walk.run(items_of(page))


@posix
def test_ids_times_and_ports_are_those_of_the_run(tmp_path: Path, cache: Path) -> None:
    page = f"""
    $ echo {KEY} 9261 http://127.0.0.1:9261/ 2026-11-24T12:45:40.318Z; echo more; echo {OTHER}
    {OTHER} … http://127.0.0.1:9261/ 2020-01-01T00:00:00Z
    …
    {KEY}
    $ echo {OTHER} {KEY}
    {OTHER} {KEY}
"""
    with Walk("page.md", tmp_path, cache) as walk:
        walk.run(items_of(page))
        assert walk.same == {OTHER: KEY, KEY: OTHER}
