"""What changes or copies a whole database: upgrade, tokens, backup, and the import from SQLite into PostgreSQL.

A wing of astera_lite. All tables and columns of the SQLite database exist in PostgreSQL under the same names.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from astera_lite import (
    DAMAGED,
    Conflict,
    DatabaseInUse,
    Execute,
    NotFound,
    Settings,
    SqliteReader,
    SqliteStore,
    StoreError,
    Token,
    errors_of_database,
    is_postgres,
    open_to_read,
    reason_of,
    store_error,
    suggest,
    to_json,
    wing,
)

# --- upgrade ---

#: Scripts that upgrade the schema by one version, by the version before.
UPGRADES: dict[int, str] = {
    1: """
    CREATE TABLE tokens (
        name    TEXT    PRIMARY KEY,
        hash    BLOB    NOT NULL,
        role    TEXT    NOT NULL CHECK (role IN ('user', 'admin')),
        flows   TEXT,
        created INTEGER NOT NULL
    ) WITHOUT ROWID;
    CREATE TABLE clock (
        one    INTEGER PRIMARY KEY CHECK (one = 1),
        offset INTEGER NOT NULL
    );
    """,
    # Before, pieces were stored before their job or the end of its run: a server that died left some behind.
    2: """
    CREATE INDEX jobs_token ON jobs (token, seq) WHERE token <> '';
    DELETE FROM pieces WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE seq = job
        AND (part = 'request_body' OR status <> 'Running' AND jobs.attempt = pieces.attempt));
    """,
}


# --- tokens ---


def edit_tokens(database: str, name: str, add: Token | None = None) -> None:
    """Add a token of this name to a database, or revoke the token that has this name; servers may be running on it.

    Creates a missing database. Raises Conflict for a name that is taken, NotFound for an unknown name, StoreError.
    """
    if is_postgres(database):
        with wing("astera_lite_postgres:transaction")(database, ("tokens",), news="tokens") as shared:
            _change(lambda sql, values: shared.execute(sql.replace("?", "%s"), values), name, add)
        return
    with contextlib.suppress(DatabaseInUse):
        SqliteStore(database).close()  # makes or upgrades it, unless a server has it
    with (
        errors_of_database(database),
        contextlib.closing(sqlite3.connect(database, timeout=10, isolation_level=None)) as db,
    ):
        db.execute("BEGIN IMMEDIATE")
        _change(db.execute, name, add)
        db.execute("COMMIT")


def _change(execute: Execute, name: str, add: Token | None) -> None:
    names = dict(execute("SELECT name, hash FROM tokens", ()).fetchall())
    if add is None:
        if not names.get(name):
            words = "was revoked before" if name in names else f"is not there{suggest(name, names)}"
            raise NotFound(f"the token {name} {words}")
        execute("UPDATE tokens SET hash = ? WHERE name = ?", (b"", name))
        return
    if names.get(name):
        raise Conflict(f"there is a token {name} already: revoke it first, or choose another name")
    if execute("SELECT 1 FROM jobs WHERE token <> '' AND token = ? LIMIT 1", (name,)).fetchone():
        words = "are still kept, and would be the new one's: choose another name"
        raise Conflict(f"jobs of an earlier token {name} {words}")
    flows = None if add.flows is None else to_json(sorted(add.flows))
    execute("DELETE FROM tokens WHERE name = ?", (name,))
    execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?)", (name, add.digest, add.role, flows, add.created))


# --- backup ---


def backup(database: str, path: str, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Copy a database, as of one moment, to a new file; a server may write to the database meanwhile.

    The file appears only when it is complete. `progress` gets the number of pages copied, and of all pages. Raises
    Conflict if the database is PostgreSQL, StoreError.
    """
    if is_postgres(database):
        raise Conflict("a PostgreSQL database is backed up by pg_dump, or by what its provider has for it")
    SqliteReader(database).close()  # raises if it is not ours
    part = f"{path}.part"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # of a backup that was killed
        with contextlib.closing(sqlite3.connect(part)) as copied, contextlib.closing(open_to_read(database)) as db:
            db.execute("BEGIN")
            db.execute("SELECT 1 FROM sqlite_schema").fetchone()  # the moment; or each write would restart the copy
            db.backup(copied, pages=1024, progress=lambda _, left, total: progress(total - left, total))
            if copied.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
                raise StoreError(DAMAGED)
        _give_name(part, path)
    except (OSError, StoreError, sqlite3.Error) as error:
        words = reason_of(error) if isinstance(error, OSError) else str(store_error(error))
        raise StoreError(f"{database if words == DAMAGED else path}: {words}") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(part)


def _give_name(part: str, path: str) -> None:
    """Give a file its name. Raises FileExistsError if another file has the name."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # no links on that file system
        with open(path, "xb"):
            os.replace(part, path)


# --- import ---

_TABLES = ("flows", "jobs", "pieces", "steps", "callbacks", "attempts", "tokens")


def import_command(args: Any, settings: Settings) -> int:
    """The command: fill the database of the settings, and print the number of rows. Returns the exit code."""
    if not is_postgres(settings.database):
        raise Conflict("import fills a PostgreSQL database: set `database` to its address, postgresql://USER@HOST/NAME")
    counts = import_database(settings.database, args.file)
    print("imported", ", ".join(f"{table}: {count:,}" for table, count in counts.items()), file=sys.stderr)
    return 0


def import_database(url: str, path: str) -> dict[str, int]:
    """Copy a SQLite database into an empty PostgreSQL database, in one transaction. Returns numbers of rows by table.

    `path` is a backup, or the database of a server that is stopped; the file does not change. Raises Conflict if the
    PostgreSQL database is not empty, DatabaseInUse if a server uses the SQLite database, ConfigError, StoreError.
    """
    with _copied(path) as source:
        try:
            with wing("astera_lite_postgres:transaction")(url, ("flows", "jobs", "tokens")) as db:
                return _fill(db, source)
        except StoreError as error:
            raise StoreError(f"nothing was imported: {error}") from None


def _fill(db: Any, source: sqlite3.Connection) -> dict[str, int]:
    """Copy the rows of all tables. Returns numbers of rows by table."""
    for table in _TABLES:
        if db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():
            raise Conflict(f"the PostgreSQL database has {table} already: import fills an empty one")
    counts = dict.fromkeys(_TABLES, 0)
    for table in _TABLES:
        rows = source.execute(f"SELECT * FROM {table}")
        columns = ", ".join(column[0] for column in rows.description)
        with db.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copied:
            for row in rows:
                # PostgreSQL's text cannot contain NUL. No JSON has one; the error of a failed callback may.
                copied.write_row([cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell for cell in row])
                counts[table] += 1
    return counts


@contextlib.contextmanager
def _copied(path: str) -> Iterator[sqlite3.Connection]:
    """A copy of a SQLite database in a temporary folder, upgraded to the present version of the schema."""
    with contextlib.ExitStack() as stack:
        if os.path.exists(f"{path}.lock"):  # otherwise it is a backup
            lock = stack.enter_context(contextlib.closing(sqlite3.connect(f"{path}.lock", timeout=0)))
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error:
                raise DatabaseInUse(f"a server uses {path}: stop it, or import a backup") from None
        copy = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "copy.db")
        backup(path, copy)
        SqliteStore(copy).close()  # also corrects its times after a jump of the clock
        yield stack.enter_context(contextlib.closing(sqlite3.connect(copy)))
