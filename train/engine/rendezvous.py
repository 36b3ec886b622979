"""How processes find each other, wait for each other, and notice that one is gone.

Process 0 listens; each other one opens a TCP connection to it, which stays open until
the run ends. Messages are lines of JSON. JAX's own runtime connects afterwards, to the
same port: it would wait in silence, and end the program from C++.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

#: seconds: between two lines that say who is missing; for a message under way; and for
#: a process to end by itself, with its own message, after another one has ended
SAY, ANSWER, GRACE = 10.0, 5.0, 5.0


def parse(address: str, flag: str = "--coordinator") -> tuple[str, int]:
    """Returns host and port of ``HOST:PORT`` or ``[IPV6]:PORT``.

    Raises:
        ValueError: it is neither.
    """
    parts = re.fullmatch(
        r"(?:\[([0-9a-fA-F:.%\w]+)\]|([^\s:\[\]/]+)):([0-9]{1,5})", address
    )
    if not parts or not 1 <= int(parts[3]) <= 65535:
        raise ValueError(
            f"{flag} is {address!r}; expected HOST:PORT with a port from 1 to 65535,"
            " such as 10.0.0.1:1234 or [::1]:1234."
        )
    return parts[1] or parts[2], int(parts[3])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _die(text: str) -> None:
    """Ends the program: its main thread may hang in a collective for ever."""
    _say(f"\nerror: {text}")  # below the progress bar
    os._exit(1)


class Peers:
    """The connections of one process: of process 0 to all, of the others to process 0.

    Args:
        this, count: which process this is, of how many.
        timeout: seconds, after which one that is missing is an error.
        die: what is done when another process is gone.
    """

    def __init__(
        self, this: int, count: int, timeout: float, die: Callable[[str], None] = _die
    ):
        self.this, self.count, self._timeout, self._die = this, count, timeout, die
        self._sockets: dict[int, socket.socket] = {}
        self._changed = threading.Condition()
        self._arrived: dict[int, set[int]] = {}  # who is at which meeting
        self._meetings, self._left = 0, False

    # -- finding each other

    def gather(self, host: str, port: int, bind: tuple[str, int] | None = None) -> None:
        """Connects all; returns when all are there.

        Raises:
            ValueError: one does not come, or is not who it should be.
        """
        (self._listen(bind or ("", port)) if self.this == 0 else self._dial(host, port))
        for i, connection in self._sockets.items():
            connection.settimeout(None)
            threading.Thread(
                target=self._read, args=(i, connection), daemon=True
            ).start()

    def _listen(self, address: tuple[str, int]) -> None:
        try:
            server = _server(address)
        except OSError as error:
            raise ValueError(
                f"process 0 cannot listen on {address[0] or '*'}:{address[1]}: {error}."
            ) from error
        with server:
            server.settimeout(0.2)
            for _ in self._waits():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    self._admit(connection)
                self._drop_closed()
                if len(self._sockets) == self.count - 1:
                    break
        # the listener is closed first: JAX's takes its port
        for i in self._sockets:
            self._send(i, go=0)

    def _admit(self, connection: socket.socket) -> None:
        """Takes a newcomer in; one that does not speak like a trainer is ignored."""
        self._drop_closed()
        connection.settimeout(ANSWER)
        try:
            hello = _receive(connection)
            i, count = int(hello["process"]), int(hello["of"])
        except (OSError, ValueError, KeyError, TypeError):
            connection.close()
            return
        fault = None
        if count != self.count:
            fault = (
                f"process {i} has --num_processes={count}, process 0 has"
                f" --num_processes={self.count}; give all the same."
            )
        elif i == 0 or i in self._sockets:
            fault = f"two processes have --process_id={i}; give each its own."
        if fault:
            with contextlib.suppress(OSError):
                _transmit(connection, error=fault)
            self._fail(fault)
        connection.settimeout(None)
        self._sockets[i] = connection

    def _dial(self, host: str, port: int) -> None:
        self._why = "no answer"
        for _ in self._waits(lambda: f"process 0 at {host}:{port} ({self._why})"):
            try:
                connection = socket.create_connection((host, port), timeout=ANSWER)
                _transmit(connection, process=self.this, of=self.count)
                self._sockets[0] = connection
                break
            except OSError as error:
                self._why = error.strerror or str(error)
                time.sleep(0.2)
        connection.settimeout(self._timeout + ANSWER)  # it has the limit as well
        while True:
            try:
                message = _receive(connection)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{host}:{port} ended the meeting, or is no process 0 of a run"
                    f" that is starting ({error}); start all processes again, with a"
                    " port that is free."
                ) from error
            if "error" in message:
                raise ValueError(message["error"])
            if "go" in message:
                return
            _say(message.get("say", ""))

    # -- waiting for each other

    def meet(self) -> None:
        """Returns when all processes have called it as often as this one.

        Raises:
            ValueError: one does not come in time.
        """
        self._meetings += 1
        number = self._meetings
        with self._changed:
            if self.this:
                self._send(0, at=number)
                limit = self._timeout + ANSWER
                if not self._changed.wait_for(lambda: number in self._arrived, limit):
                    raise ValueError(f"process 0 did not answer within {limit:.0f} s.")
                return
            here = self._arrived.setdefault(number, set())
            for _ in self._waits(here=here):
                if len(here) == self.count - 1:
                    break
                self._changed.wait(0.2)
        for i in self._sockets:
            self._send(i, go=number)

    def leave(self) -> None:
        """Says that this process ends as it should."""
        self._left = True
        for i in self._sockets:
            self._send(i, bye=self.this)

    def report(self, error: Exception) -> None:
        """Tells the others why this process is about to end."""
        text = f"process {self.this} ended: {error}"[:500]
        for i in self._sockets:
            self._send(i, error=text)

    def abandon(self) -> None:
        """Ends a program that has not left, without JAX's wait for the others.

        They may hang in a collective with this process, for ever.
        """
        if not self._left:
            self._left = True  # the others end because of this one: no news
            sys.stdout.flush()
            sys.stderr.flush()
            self._outlast()
            os._exit(1)

    def _waits(self, missing=None, here=None) -> Iterator[None]:
        """Counts down the limit, and says every ten seconds for whom."""
        start = said = time.monotonic()
        while True:
            yield
            now = time.monotonic()
            if now - start < self._timeout and now - said < SAY:
                continue
            if missing:
                text = missing()
            else:
                present = sorted({0, *(self._sockets if here is None else here)})
                text = (
                    f"{self.count - len(present)} of {self.count} processes"
                    f" ({', '.join(map(str, present))} {_are(present)} here)"
                )
            if now - start >= self._timeout:
                self._fail(
                    f"waited {self._timeout:g} s for {text}, the limit of"
                    " --join_timeout; see what the others print."
                )
            said = now
            _say(f"waiting for {text}")
            if not missing:
                for i in self._sockets:
                    self._send(i, say=f"waiting for {text}")

    def _fail(self, text: str) -> None:
        for i in self._sockets:
            self._send(i, error=text)
        raise ValueError(text)

    # -- noticing that one is gone

    def _read(self, i: int, connection: socket.socket) -> None:
        """The thread that listens to process `i`."""
        while True:
            try:
                message = _receive(connection)
            except (OSError, ValueError):
                message = {}
            place = message.get("at", message.get("go"))
            if place is not None:
                with self._changed:
                    self._arrived.setdefault(place, set()).add(i)
                    self._changed.notify_all()
            elif "say" in message:
                _say(message["say"])
            elif "bye" in message:
                return
            else:
                self._lost(i, message)
                return

    def _lost(self, i: int, message: dict[str, Any]) -> None:
        """Ends this program, as process `i` is gone or is about to be.

        One that told why may have told the main thread as well, which gets time to end
        with a message of its own. Without that it is a matter of milliseconds: JAX's
        runtime notices, too, and aborts.
        """
        told = message.get("error")
        text = told or message.get("gone") or _gone(i)
        if self.this == 0:
            for other in self._sockets:
                self._send(other, **{"error" if told else "gone": text})
        if told:
            time.sleep(GRACE)
        if not self._left:
            self._outlast()
            self._die(text)

    def _outlast(self) -> None:
        """Has process 0 end last: without its coordinator JAX aborts the others."""
        if self.this == 0:
            deadline = time.monotonic() + 2 * GRACE
            while time.monotonic() < deadline and not all(
                map(_closed, self._sockets.values())
            ):
                time.sleep(0.05)

    def _drop_closed(self) -> None:
        """Forgets processes that ended while they waited: they may come again."""
        for i in [i for i, each in self._sockets.items() if _closed(each)]:
            self._sockets.pop(i).close()

    def _send(self, i: int, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the reading side notices
            _transmit(self._sockets[i], **message)


def _are(present: list[int]) -> str:
    return "is" if len(present) == 1 else "are"


def _gone(i: int) -> str:
    return (
        f"process {i} ended before the run did; see what it printed. The same command,"
        " given to all processes again, resumes from the last checkpoint."
    )


def _closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it; takes nothing out of it."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _server(address: tuple[str, int]) -> socket.socket:
    if not address[0] and socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a machine without IPv6
            return socket.create_server(
                address, family=socket.AF_INET6, dualstack_ipv6=True
            )
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    return socket.create_server(address, family=family)


def _transmit(connection: socket.socket, **message: Any) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Reads one line, of ten thousand bytes at most, and no byte after it."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(line) > 10_000:
            raise ConnectionError("the connection was closed")
        line += byte
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not a message of a trainer")
    return message
