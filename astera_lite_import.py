"""The command `import`: copies a SQLite database into an empty PostgreSQL database.

A wing of astera_lite. All tables and columns of the SQLite database exist in PostgreSQL under the same names.
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
        wing("astera_lite_postgres:PostgresStore")(url, name="import").close()  # makes the tables
        psycopg = importlib.import_module("psycopg")
        try:
            with psycopg.connect(url) as db:
                return _fill(db, source)
        except psycopg.Error as error:
            raise StoreError(f"nothing was imported: {str(error).splitlines()[0]}") from None


def _fill(db: Any, source: sqlite3.Connection) -> dict[str, int]:
    """Copy the rows of all tables. Returns numbers of rows by table."""
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
        with contextlib.closing(SqliteReader(path)) as reader:
            reader.backup(copy)
        SqliteStore(copy).close()  # also corrects its times after a leap of the clock
        yield stack.enter_context(contextlib.closing(sqlite3.connect(copy)))
