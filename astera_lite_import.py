"""The command `import`: copies a SQLite database into an empty PostgreSQL database.

A wing of astera_lite. The tables of both have the same names, and all columns of SQLite's are in PostgreSQL's, too.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from astera_lite import Conflict, DatabaseInUse, Settings, SqliteReader, SqliteStore, StoreError, is_postgres, wing

_TABLES = ("flows", "jobs", "pieces", "steps", "callbacks", "attempts", "tokens")


def import_command(args: Any, settings: Settings) -> int:
    """The command: fill the database of the settings, and tell how much it was; the exit code."""
    if not is_postgres(settings.database):
        raise Conflict("import fills a PostgreSQL database: set `database` to its address, postgresql://USER@HOST/NAME")
    counts = import_database(settings.database, args.file)
    print("imported", ", ".join(f"{table}: {count:,}" for table, count in counts.items()), file=sys.stderr)
    return 0


def import_database(url: str, path: str) -> dict[str, int]:
    """Fill an empty PostgreSQL database with all that a SQLite database holds, in one transaction; the rows by table.

    `path` is a backup, or the database of a server that does not run; it stays as it is. Raises Conflict if the
    PostgreSQL database is not empty, DatabaseInUse if a server has the SQLite database, ConfigError, StoreError.
    """
    with _copied(path) as source:
        wing("astera_lite_postgres:PostgresStore")(url, name="import").close()  # makes the tables
        psycopg = importlib.import_module("psycopg")
        try:
            with psycopg.connect(url) as db:
                return _fill(db, source)
        except psycopg.Error as error:
            raise StoreError(f"nothing was imported: {str(error).splitlines()[0]}") from None


def _fill(db: Any, source: sqlite3.Connection) -> dict[str, int]:
    """Copy the rows of all tables; how many they are."""
    db.execute("LOCK TABLE flows, jobs, tokens IN SHARE ROW EXCLUSIVE MODE")  # a server may be running
    for table in _TABLES:
        if db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():
            raise Conflict(f"the PostgreSQL database has {table} already: import fills an empty one")
    counts = dict.fromkeys(_TABLES, 0)
    for table in _TABLES:
        rows = source.execute(f"SELECT * FROM {table}")
        columns = ", ".join(column[0] for column in rows.description)
        with db.cursor() as cursor, cursor.copy(f"COPY {table} ({columns}) FROM STDIN") as copied:
            for row in rows:
                # NUL, which PostgreSQL's text cannot have, is in no JSON: at most in the words of a failed callback.
                copied.write_row([cell.replace("\0", "\ufffd") if isinstance(cell, str) else cell for cell in row])
                counts[table] += 1
    return counts


@contextlib.contextmanager
def _copied(path: str) -> Iterator[sqlite3.Connection]:
    """A copy of a SQLite database in a temporary folder, brought to the newest version of the schema."""
    with contextlib.ExitStack() as stack:
        if os.path.exists(f"{path}.lock"):  # else it is a backup
            lock = stack.enter_context(contextlib.closing(sqlite3.connect(f"{path}.lock", timeout=0)))
            try:
                lock.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error:
                raise DatabaseInUse(f"a server uses {path}: stop it, or import a backup") from None
        copy = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "copy.db")
        with contextlib.closing(SqliteReader(path)) as reader:
            reader.backup(copy)
        SqliteStore(copy).close()  # also brings its times to those of the system's clock
        yield stack.enter_context(contextlib.closing(sqlite3.connect(copy)))
