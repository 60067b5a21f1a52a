"""TCP proxy on the loopback interface that can fall silent: it stays connected, and passes nothing on."""

from __future__ import annotations

import select
import socket
import threading
from contextlib import suppress


class SilentProxy:
    """Proxy to a port of this machine.

    Args:
        port: Port of the server.

    Attributes:
        address: Port of the proxy.
        silent: Whether nothing is passed on. New connections are accepted, as if packets were lost behind a router.
    """

    def __init__(self, port: int) -> None:
        self.port, self.silent = port, False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self.port))
                self._open += [near, far]
                threading.Thread(target=self._pass_on, args=(near, far), daemon=True).start()

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        other = {near: far, far: near}
        with suppress(OSError, ValueError):
            while True:
                for one in select.select([near, far], [], [], 0.05)[0] if not self.silent else ():
                    data = one.recv(65536)
                    if not data:
                        near.close()
                        far.close()
                        return
                    while self.silent:
                        threading.Event().wait(0.02)
                    other[one].sendall(data)
                if self.silent:
                    threading.Event().wait(0.02)

    def close(self) -> None:
        """Close all connections."""
        for one in (self._server, *self._open):
            with suppress(OSError):
                one.close()

    def __enter__(self) -> SilentProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
