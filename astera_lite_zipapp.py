"""The command `zipapp`: the server as one file. A wing of astera_lite."""

from __future__ import annotations

import compileall
import os
import py_compile
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from astera_lite import SHIPPED, WINGS, ConfigError, Conflict, Settings, reason_of, resource

_ZIPPED_MAIN = b"""\
import sys

if sys.version_info < (3, 11):
    this = "this is %d.%d.%d (%s)" % (sys.version_info[:3] + (sys.executable,))
    sys.exit("Astera Lite needs Python 3.11 or later; " + this)

sys.excepthook = lambda *error: None if error[0] is KeyboardInterrupt else sys.__excepthook__(*error)  # Ctrl-C
import astera_lite

sys.exit(astera_lite.main())
"""


def pack(args: Any, settings: Settings) -> int:
    """The command: write the server as one file, with bytecode for this Python; other versions use the source."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("astera_lite.py", "schema.sql", *sorted({*WINGS, *SHIPPED} - {"schema.sql"})):
            try:
                data = resource(name)
            except ConfigError:
                if name in ("astera_lite.py", "schema.sql"):
                    raise
                print(f"{name} is missing, so it is left out", file=sys.stderr)
                continue
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH  # times in a zip depend on the time zone
        compileall.compile_dir(folder, stripdir=folder, quiet=1, legacy=True, invalidation_mode=unchecked)
        with open(os.path.join(folder, "__main__.py"), "wb") as file:
            file.write(_ZIPPED_MAIN)
        try:
            with open(args.file, "wb") as file:
                file.write(b"#!/usr/bin/env python3\n")
                with zipfile.ZipFile(file, "w") as archive:
                    for name in sorted(os.listdir(folder)):
                        whole = zipfile.ZipInfo(name)  # of 1980: the same file each time
                        archive.writestr(whole, Path(folder, name).read_bytes(), zipfile.ZIP_DEFLATED)
            mode = os.stat(args.file).st_mode
            os.chmod(args.file, mode | (mode & 0o444) >> 2)  # everybody who may read the file may run it
        except OSError as error:
            raise Conflict(f"{args.file}: {reason_of(error)}") from None
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"wrote {args.file}: for Python 3.11 or later, {version} starts it quickest", file=sys.stderr)
    return 0
