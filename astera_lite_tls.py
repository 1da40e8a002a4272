"""HTTPS: the context of the certificate, and the connections that are encrypted.

A wing of astera_lite, which loads this file if `tls_cert` is set.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import time
from typing import Any, NoReturn

from astera_lite import ConfigError, Fault, Handler, Server, Settings, reason_of


def tls_context(settings: Settings) -> ssl.SSLContext:
    """The context with which a server encrypts its connections; raises ConfigError."""

    def encrypted() -> NoReturn:  # OpenSSL itself would ask at the terminal
        cure = "decrypt it, because the server asks for no password: openssl pkey -in KEY -out NEW"
        raise ConfigError([Fault("tls_key" if settings.tls_key else "tls_cert", "", f"is encrypted: {cure}")])

    if settings.tls_cert is None:
        raise ConfigError([Fault("tls_cert", "", "is missing: tls_key goes with a certificate")])
    for name in ("tls_cert", "tls_key"):
        try:
            with open(getattr(settings, name) or os.devnull, "rb"):
                pass
        except OSError as error:
            raise ConfigError([Fault(name, "", f"cannot be read: {reason_of(error)}")]) from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, encrypted)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError([Fault("tls_cert", "", f"cannot be used: {reason_of(error)}")]) from None
    return context


class TlsHandler(Handler):
    """A connection with TLS. Reading and sending do the handshake, which has the time of a request."""

    request: ssl.SSLSocket

    def __init__(self, request: Any, client_address: Any, server: Server) -> None:
        assert server.tls is not None
        request = server.tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        super().__init__(request, client_address, server)
        self.deadline = self.since + server.settings.request_timeout
        self._in_handshake = True
        self._turned_away = False  # the response says so, after the handshake

    def read(self, size: int) -> bytes:
        """Up to so many bytes, and those that are decrypted already, which the selector does not report."""
        data = self.request.recv(size)
        self._end_handshake()
        while left := self.request.pending():
            data += self.request.recv(left)
        return data

    def not_ready(self, error: OSError) -> None:
        """Note the event that TLS waits for; close after another error."""
        if not isinstance(error, ssl.SSLWantReadError | ssl.SSLWantWriteError):
            super().not_ready(error)
            return
        self.wants_write = isinstance(error, ssl.SSLWantWriteError)
        if self.request.version() is not None:
            self._end_handshake()

    def _end_handshake(self) -> None:
        if not self._in_handshake:
            return
        self._in_handshake = False
        if self._turned_away:
            super().turn_away()
        else:
            self.deadline = time.monotonic() + self.server.settings.idle_timeout

    def turn_away(self) -> None:
        """Answer after the handshake that there is no room, and close."""
        self._turned_away = True
        self.leave()

    def linger(self) -> None:
        """Send close_notify, without waiting for that of the client."""
        with contextlib.suppress(OSError):
            self.request.unwrap()
        super().linger()
