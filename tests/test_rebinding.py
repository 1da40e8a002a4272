"""A name whose answers change, with the system's own resolver: a name server on loopback in a namespace of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
from support import ROOT

INSIDE = """
import fcntl, json, socket, struct, sys, threading
sys.path.insert(0, sys.argv[1])
from astera_lite import (AddressPolicy, AddressRefused, OutboundError, fetch)

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:  # the new namespace's loopback is down
    fcntl.ioctl(control, 0x8914, struct.pack("16sh", b"lo", 0x1 | 0x40))

answers, asked = {}, []
names = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
names.bind(("127.0.0.1", 53))

def serve_names():
    while True:
        query, sender = names.recvfrom(512)
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += query[at] + 1
        kind, = struct.unpack("!H", query[at + 1 : at + 3])
        name = ".".join(labels)
        found = []
        if kind == 1:  # A
            asked.append(name)
            found = answers[name].pop(0) if len(answers[name]) > 1 else answers[name][0]
        head = query[:2] + struct.pack("!HHHHH", 0x8180, 1, len(found), 0, 0)
        records = b"".join(b"\\xc0\\x0c" + struct.pack("!HHIH", 1, 1, 0, 4) + socket.inet_aton(a) for a in found)
        names.sendto(head + query[12 : at + 5] + records, sender)

receiver, reached = socket.create_server(("127.0.0.1", 0)), []

def serve_receiver():
    while True:
        connection, _ = receiver.accept()
        reached.append(connection.recv(65536).decode())
        connection.sendall(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
        connection.close()

for serve in (serve_names, serve_receiver):
    threading.Thread(target=serve, daemon=True).start()

def attempt(name, allow, *found):
    answers[name] = list(found)
    asked.clear(), reached.clear()
    url = f"http://{name}:{receiver.getsockname()[1]}/"
    try:
        outcome = fetch("POST", url, {}, b"{}", timeout=5, max_bytes=0, policy=AddressPolicy(allow)).code
    except AddressRefused as refused:
        outcome = str(refused)
    except OutboundError as error:
        outcome = error.kind
    return [outcome, len(asked), len(reached)]

print(json.dumps([
    attempt("a.example", "none", ["127.0.0.1"]),
    attempt("b.example", "none", ["192.88.98.1"], ["127.0.0.1"]),
    attempt("c.example", "127.0.0.1", ["127.0.0.1"], ["10.0.0.1"]),
    attempt("d.example", "127.0.0.1", ["127.0.0.1", "10.0.0.1"]),
    attempt("e.example", "e.example", ["127.0.0.1"]),
    attempt("f.example", "f.example", ["169.254.169.254"]),
]))
"""


def test_each_attempt_looks_a_name_up_once_and_goes_where_it_was_judged(tmp_path: Any) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rmn", "true"], check=False).returncode:
        pytest.skip("needs namespaces of its own")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    (tmp_path / "inside.py").write_text(INSIDE)
    mounts = " && ".join(f"mount --bind '{tmp_path}/{name}' /etc/{name}" for name in ("resolv.conf", "nsswitch.conf"))
    command = [
        "unshare",
        "-rmn",
        "sh",
        "-c",
        f'{mounts} && exec "$@"',
        "sh",
        sys.executable,
        str(tmp_path / "inside.py"),
    ]
    found = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=60, check=False)
    if "mount" in found.stderr and not found.stdout:
        pytest.skip(f"cannot mount: {found.stderr}")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [
        ["its address is refused: 127.0.0.1 is not a public address", 1, 0],
        ["transport", 1, 0],  # no route to the address that was judged; the second answer was never asked for
        [204, 1, 1],
        ["its address is refused: 10.0.0.1 is not a public address", 1, 0],
        [204, 1, 1],
        ["its address is refused: 169.254.169.254 is a cloud metadata address", 1, 0],
    ]
