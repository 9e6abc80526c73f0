"""How the server stops listening without resetting a connection that is on its way."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import struct
import sys
import time

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

LAST_CALL_S = 0.2  # connections made just before the end are accepted for so long
FIRST_REQUEST_S = 2.0  # and have so long, at most, to send their first request

_SO_ATTACH_FILTER = 26
# Classic BPF over the TCP header, (code, jump if true, jump if false, operand): load the byte of
# flags, keep the SYN bit; 0 lets the packet pass whole, 1 drops it.
_NO_SYN = (
    (0x30, 0, 0, 13),
    (0x54, 0, 0, 2),
    (0x15, 0, 1, 0),
    (0x06, 0, 0, 0xFFFFFFFF),
    (0x06, 0, 0, 0),
)


class PatientServer(uvicorn.Server):
    """uvicorn's server, which on stopping would reset connections whose request is on its way.

    Closing a socket that listens resets every connection that the kernel has made and the server
    has not accepted yet. So first no further connection is begun, then those that were are
    accepted and get their answers, and only then is the socket closed.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            for listening in server.sockets:
                begin_no_connection(listening.fileno())
        await asyncio.sleep(LAST_CALL_S)
        for server in self.servers:
            server.close()
        end = time.monotonic() + FIRST_REQUEST_S
        while any(map(_silent, self.server_state.connections)) and time.monotonic() < end:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


class PatientWorkers(Multiprocess):
    """uvicorn's parent of several workers, which listen on one socket.

    On SIGTERM the workers go on answering and say that they are not ready; then no further
    connection is begun, those that were get their answers, and only then do the workers stop.

    Args:
        config: the workers' configuration.
        sockets: what they listen on.
        drain_s: seconds that they go on for.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], drain_s: float):
        super().__init__(config, sockets)
        self.drain_s = drain_s

    @property
    def failed(self) -> bool:
        """Whether it stopped because a worker could not begin while none had a model."""
        return any(process.exitcode == STARTUP_FAILURE for process in self.processes)

    def terminate_all(self) -> None:
        super().terminate_all()
        if self.failed:  # there is nobody to answer
            return
        time.sleep(self.drain_s)
        for listening in self.sockets:
            begin_no_connection(listening.fileno())
        time.sleep(LAST_CALL_S + FIRST_REQUEST_S)
        super().terminate_all()  # a worker that is told twice stops


def _silent(connection: asyncio.Protocol) -> bool:
    """Whether a connection has not sent a request yet."""
    return getattr(connection, "cycle", None) is None


def begin_no_connection(listening: int) -> None:
    """Let the kernel drop new connections to a listening socket, and keep those it has begun.

    To a client it looks as if the first packet were lost: it tries again, and finds the socket
    closed. Where the system has no such filter (other than Linux), or refuses it, nothing is done.

    Args:
        listening: the socket's file descriptor.
    """
    if not sys.platform.startswith("linux"):
        return
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in _NO_SYN))
    program = struct.pack("HP", len(_NO_SYN), ctypes.addressof(code))
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(listening)) as same:
        same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
