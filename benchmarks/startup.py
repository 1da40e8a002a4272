"""Time from the start of the process to its first 202, beside that of a bare Python with its two largest imports.

Floor 150 ms as a script, 100 ms installed; aim 90 and 60 ms; bare Python is about 45 ms. They are started in turn, and
the ratio is made within a turn: the server as a script with no database (its tables are made), then with the one that
this left, then where no bytecode may be kept, then as the installed command starts it (the module from its bytecode),
with no database.
"""

import contextlib
import http.client
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from common import (
    BODY,
    INSTALLED,
    JSON,
    ROOT,
    SUBMIT,
    Server,
    arguments,
    environment,
    free_port,
    installed_command,
    our_command,
    ours,
    spread,
    table,
    temporary,
)


def bare() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import http.server, sqlite3"], check=True, env=environment())
    return (time.perf_counter() - began) * 1000


def first_202(folder: Path, command: Callable[[int], list[str]] = our_command, **more: str) -> float:
    """Milliseconds; a connection is tried every half of one."""
    port = free_port()
    with open(folder / "server.log", "ab") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command(port), cwd=folder, env=environment(**more), stderr=log, stdout=log, start_new_session=True
        )
    server = Server(port, folder, [process])
    status = 0
    try:
        while status != 202:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            with contextlib.suppress(ConnectionError), contextlib.closing(client):
                client.request("POST", SUBMIT, BODY, JSON)
                status = client.getresponse().status
            if time.perf_counter() - began > 30 or process.poll() is not None:
                sys.exit(f"it does not start:\n{server.log}")
            time.sleep(0.0005)
        return (time.perf_counter() - began) * 1000
    finally:
        server.kill()


def copied_command(folder: Path, port: int) -> list[str]:
    """The server as a script beside which there is no bytecode."""
    for file in (*ROOT.glob("astera_lite*.py"), ROOT / "schema.sql"):
        shutil.copy(file, folder)
    command = our_command(port)
    return [command[0], str(folder / "astera_lite.py"), *command[2:]]


def main() -> None:
    args = arguments(__doc__, rounds=10)
    with ours():  # so that the bytecode is there
        pass
    bare()
    plain, fresh, again, uncached, installed = [], [], [], [], []
    for _ in range(args.rounds):
        with temporary() as folder:
            plain.append(bare())
            fresh.append(first_202(folder))
            again.append(first_202(folder))
        with temporary() as folder:
            uncached.append(first_202(folder, partial(copied_command, folder), PYTHONDONTWRITEBYTECODE="1"))
        with temporary() as folder:
            installed.append(first_202(folder, installed_command, **INSTALLED))
    rows = []
    for label, floor, aim, times in (
        ("new database", 150, 90, fresh),
        ("existing database", 150, 90, again),
        ("new database, no bytecode cache", 150, 90, uncached),
        ("new database, installed command", 100, 60, installed),
    ):
        ratio = spread([mine / other for mine, other in zip(times, plain, strict=True)])
        reached = f"{spread(times)} ms, ×{ratio} of bare"
        rows.append((f"start to first 202, {label}", f"{floor} ms", f"{aim} ms", reached))
    rows.append(("bare Python", "", "", f"{spread(plain)} ms"))
    print(table(rows))


if __name__ == "__main__":
    main()
