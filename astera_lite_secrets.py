"""Secrets: the settings `secrets` and `callback_secret`, and what replaces secrets in text that leaves the server.

A wing of astera_lite, which loads this file for the first secret.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from astera_lite import ConfigError, Fault, Mask, log_message, read_toml, reason_of


def read_secrets(setting: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The secrets that flows may read, from the environment variables that are named, or from a TOML file.

    Raises ConfigError.
    """
    faults: list[Fault] = []
    values: dict[str, Any] = {}
    if not setting.endswith(".toml"):
        values = {name: environ.get(name) for name in filter(None, map(str.strip, setting.split(",")))}
        missing = [name for name, value in values.items() if value is None]
        faults = [Fault("secrets", "", f"there is no environment variable {name}") for name in missing]
        odd = [name for name, value in values.items() if value and value.encode(errors="ignore").decode() != value]
        faults += [Fault("secrets", "", f"the environment variable {name} is not UTF-8") for name in odd]
    else:
        try:
            if os.name == "posix" and os.stat(setting).st_mode & 0o077:
                faults.append(Fault(setting, "", "can be read by others: chmod 600 it"))
        except OSError as error:
            faults.append(Fault(setting, "", f"cannot be read: {reason_of(error)}"))
        values = {} if faults else read_toml(setting, faults)
        faults += [Fault(setting, name, "must be text") for name, value in values.items() if not isinstance(value, str)]
    if faults:
        raise ConfigError(faults)
    return values


def signing_key(secret: str) -> bytes:
    """The key in a Standard Webhooks secret (`whsec_` and base64); raises ConfigError."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        if secret.startswith("whsec_") and 24 <= len(key) <= 64:
            return key
    except (binascii.Error, ValueError):
        pass
    message = "must be whsec_ and the base64 of 24 to 64 random bytes, as `openssl rand -base64 32` gives them"
    raise ConfigError([Fault("callback_secret", "", message)])


def sign(key: bytes, message_id: str, timestamp_s: int, body: bytes) -> str:
    """A signature of Standard Webhooks 1.0: `v1,` and the base64 of HMAC-SHA256 over `id.timestamp.body`."""
    import hmac  # noqa: PLC0415 (0.9 MB that only signatures need)

    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def signer(secret: str) -> Callable[[str, int, bytes], str]:
    """What signs callbacks with a secret; raises ConfigError."""
    return partial(sign, signing_key(secret))


def _in_base64(data: bytes) -> Iterator[str]:
    """What the Base64 of any text has in it if the text has this; it depends on how many bytes come before."""
    yield base64.b64encode(data).decode()
    for before in range(3):
        # without the characters in which other bytes have a part
        text = base64.b64encode(bytes(before) + data).decode()[-(-before * 8 // 6) : (before + len(data)) * 8 // 6]
        if len(text) >= 8:  # fewer characters may stand anywhere
            yield from (text, text.replace("+", "-").replace("/", "_"))


class Known:
    """The secrets of a server.

    It recognises a secret, its forms in URLs, JSON, Base64 and Python, and its beginning before a … that cuts text off.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets, self._lock = frozenset(secrets), threading.Lock()
        self._hidden: list[str] = []
        self._learn()

    def hide(self, values: Iterable[str]) -> None:
        """Mask these values as well, but only the last 100 of those that were hidden."""
        given = list(values)
        with self._lock:
            known, others = self._hidden, [value for value in self._hidden if value not in given]
            self._hidden = [*others, *given][-100:]
            if not set(given) <= set(known):
                self._learn()

    def _learn(self) -> None:
        forms: set[str] = set()
        for value in filter(None, self._secrets.union(self._hidden)):
            quoted = {urllib.parse.quote(value, safe=""), urllib.parse.quote(value), urllib.parse.quote_plus(value)}
            quoted |= {re.sub("%..", lambda triplet: triplet[0].lower(), form) for form in quoted}  # as curl sends them
            written = (json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1])
            forms |= {value, *quoted, *written, *_in_base64(value.encode("utf-8", "replace"))}
        self._forms = sorted(forms, key=len, reverse=True)  # one secret may begin with another
        self.longest = max((len(form.encode("utf-8", "replace")) for form in forms), default=0)  # bytes

    def masked(self, text: str) -> str:
        """The text with every secret replaced."""
        for form in self._forms:
            text = text.replace(form, "***")
        *parts, rest = text.split("…")
        return "…".join([*map(self._without_beginning, parts), rest])

    def _without_beginning(self, text: str) -> str:
        """The text, without the first four or more characters of a secret at its end."""
        for form in self._forms:
            at = text.find(form[:4], max(len(text) - len(form) + 1, 0)) if len(form) > 4 else -1
            while at >= 0:
                if form.startswith(text[at:]):
                    return text[:at] + "***"
                at = text.find(form[:4], at + 1)
        return text

    def mask_record(self, record: logging.LogRecord) -> None:
        """Mask what a record of the log says."""
        record.msg, record.args = self.masked(log_message(record)), ()
        if "path" in vars(record):
            vars(record)["path"] = self.masked(str(vars(record)["path"]))
        if record.exc_info:
            record.exc_text = self.masked(record.exc_text or logging.Formatter().formatException(record.exc_info))


_first = threading.Lock()  # held while a mask gets its first values: two runs may use credentials at the same time


def hide(mask: Mask, values: Iterable[str]) -> None:
    """Mask these values as well, until 100 others were hidden later: access tokens are renewed again and again."""
    made = mask.known or Known()
    with _first:
        mask.known = mask.known or made
    mask.known.hide(values)
