"""Time from the start of the process to its first 202, beside that of a bare Python with its two largest imports.

Floor 120 ms, aim 60 ms; bare Python is about 45 ms. They are started in turn, and the ratio is made within a turn:
the server as a script with no database (its tables are made), then with the one that this left, then as the installed
command starts it (the module from its bytecode), with no database.
"""

import contextlib
import http.client
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from common import (
    BODY,
    INSTALLED,
    JSON,
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


def first_202(folder: Path, command: Callable[[int], list[str]] = our_command) -> float:
    """Milliseconds; a connection is tried every half of one."""
    port = free_port()
    with open(folder / "server.log", "ab") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command(port), cwd=folder, env=environment(**INSTALLED), stderr=log, stdout=log, start_new_session=True
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


def main() -> None:
    args = arguments(__doc__, rounds=10)
    with ours():  # so that the bytecode is there
        pass
    bare()
    plain, fresh, again, installed = [], [], [], []
    for _ in range(args.rounds):
        with temporary() as folder:
            plain.append(bare())
            fresh.append(first_202(folder))
            again.append(first_202(folder))
        with temporary() as folder:
            installed.append(first_202(folder, installed_command))
    rows = []
    labels = {"new database": fresh, "existing database": again, "new database, installed command": installed}
    for label, times in labels.items():
        ratio = spread([mine / other for mine, other in zip(times, plain, strict=True)])
        rows.append((f"start to first 202, {label}", "120 ms", "60 ms", f"{spread(times)} ms, ×{ratio} of bare"))
    rows.append(("bare Python", "", "", f"{spread(plain)} ms"))
    print(table(rows))


if __name__ == "__main__":
    main()
