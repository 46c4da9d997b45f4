"""Ends the ranks of a run soon after one of them has died, since they would wait for it. Importing this loads no torch.

A rank that was killed says nothing to the others, which may wait for it for days. Each rank therefore keeps a
connection to rank 0, which the system closes when a process dies in whatever way. A rank that ends well says goodbye.
"""

from __future__ import annotations

import atexit
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_GRACE = 5.0  # seconds that a rank has to end by itself, for example with the error that ended the other
_CONNECT = 20.0  # seconds that a rank tries to reach rank 0
_GOODBYE, _TOLD = b".", b"!"  # what a rank says at its end; rank 0, when it has said which rank has died
EXIT_CODE = 128 + signal.SIGTERM


class Watch:
    """Watches the other ranks from a thread of its own, until this process ends.

    `number`, `size`: this rank and the number of ranks. `publish` gives the port of rank 0, and a key, to all others,
    which get them by `lookup`. Where the network does not let them connect, nothing is watched.
    """

    current: Watch | None = None  # of this process

    def __init__(self, number: int, size: int, publish: Callable[[str], None], lookup: Callable[[], str]) -> None:
        self.number = number
        self._noticed = threading.Event()
        Watch.current = self
        self._connections: list[socket.socket] = []
        if number == 0:
            server = socket.create_server(("", 0), backlog=size)
            key = secrets.token_hex(8)
            publish(f"{server.getsockname()[1]} {key}")
            threading.Thread(target=self._serve, args=(server, size - 1, key.encode()), daemon=True).start()
        else:
            try:
                port, key = lookup().split()
                connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), _CONNECT)
            except OSError:
                return
            connection.settimeout(None)
            connection.sendall(key.encode() + number.to_bytes(4, "little"))
            self._connections.append(connection)
            threading.Thread(target=self._listen, args=({connection: 0},), daemon=True).start()
        atexit.register(self.leave)

    def wait_for_end(self) -> None:
        """Let this process be ended if another rank has died. An error of communication may be noticed first."""
        if self._noticed.wait(1.0):
            time.sleep(2 * _GRACE + 5)

    def leave(self) -> None:
        """Tell the other ranks that this one ends well; after an error of the program they are left to notice it."""
        if hasattr(sys, "last_type"):  # Python has printed a traceback
            return
        self._say(_GOODBYE)

    def _serve(self, server: socket.socket, others: int, key: bytes) -> None:
        """Take the connections of all other ranks, which know `key`, and listen to them."""
        ranks: dict[socket.socket, int] = {}
        server.settimeout(2 * _CONNECT)
        try:
            while len(ranks) < others:
                connection, _ = server.accept()
                connection.settimeout(_CONNECT)
                said = _receive(connection, len(key) + 4)
                if said[:-4] != key:  # a scan of the network, for example
                    connection.close()
                    continue
                ranks[connection] = int.from_bytes(said[-4:], "little")
                connection.settimeout(None)
                self._connections.append(connection)
        except OSError:  # some could not connect
            pass
        server.close()
        self._listen(ranks)

    def _listen(self, ranks: dict[socket.socket, int]) -> None:
        """Wait until a connection ends without a goodbye, and then end this process."""
        selector = selectors.DefaultSelector()
        for connection in ranks:
            selector.register(connection, selectors.EVENT_READ)
        while ranks:
            for key, _ in selector.select():
                ended: Any = key.fileobj
                try:
                    said = ended.recv(1)
                except OSError:
                    said = b""
                dead = ranks.pop(ended)
                selector.unregister(ended)
                if said != _GOODBYE:
                    self._end(None if said == _TOLD else dead)

    def _end(self, dead: int | None) -> None:
        """End this process, and say that rank `dead` has died; None if rank 0 says it."""
        self._noticed.set()
        if self.number == 0:
            self._say(_TOLD)
        time.sleep(_GRACE)
        if self.number == 0 or (self.number == 1 and dead is not None):  # of all others it was rank 0
            os.write(2, f"ppcl: rank {dead} has died, so all ranks end; the same command resumes.\n".encode())
        sys.stdout.flush()
        os._exit(EXIT_CODE)

    def _say(self, word: bytes) -> None:
        for connection in self._connections:
            with suppress(OSError):  # that rank has ended before
                connection.sendall(word)


def _receive(connection: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes; fewer if the connection ends or fails before."""
    received = b""
    with suppress(OSError):
        while len(received) < size and (more := connection.recv(size - len(received))):
            received += more
    return received
