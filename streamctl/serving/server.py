"""Starting and stopping the server process."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from typing import Any

from streamctl.errors import StreamctlError
from streamctl.progress import say, warn
from streamctl.serving.service import Service, Settings

KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that they are the ones to close
LAST_CALL_S = 2.0  # what connections have for their last request once the port is closed


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in work and return.

    Raises:
        StreamctlError: the run cannot be served, the key file is wrong, the port is taken, or an
            address that others can reach would be open to all.
    """
    import uvicorn

    from streamctl.serving.app import create_app

    class Server(uvicorn.Server):
        """uvicorn's server, with a time in which it answers and says that it is not ready."""

        def handle_exit(self, sign: int, frame: Any) -> None:
            if service.draining or not service.ready:
                super().handle_exit(sign, frame)
                return
            service.draining = True
            asyncio.get_running_loop().call_later(
                settings.drain_s, super().handle_exit, sign, frame
            )

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for one in (*self.servers, *(sockets or ())):
                one.close()  # nobody else begins
            service.closing = True  # each connection ends with its next answer
            end = time.monotonic() + LAST_CALL_S
            while self.server_state.connections and time.monotonic() < end:
                await asyncio.sleep(0.02)
            await super().shutdown(sockets)

    app = create_app(settings)
    service: Service = app.state.service
    _check_address(settings, service)
    listening = _bind(settings)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    service.url = _address(settings.host, listening)
    say(f"loading {settings.run} for {service.url}")
    # uvicorn raises the signal again when it has stopped: by then there is nothing to end.
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: None)
    server = Server(config)
    service.failed = lambda: setattr(server, "should_exit", True)
    server.run([listening])
    if service.failure is not None:
        raise service.failure


def _check_address(settings: Settings, service: Service) -> None:
    from streamctl.serving.app import is_loopback

    if is_loopback(settings.host) or service.keys.guards_reading:
        return
    if not settings.open_to_all:
        raise StreamctlError(
            "others can reach this address and no API key is set",
            where=f"--host {settings.host}",
            run="--keys FILE, or --open-to-all if that is wanted",
        )
    warn("everyone who reaches this address can read recommendations and histories")


def _bind(settings: Settings) -> socket.socket:
    """The socket to listen on: a port that is taken is refused before a model is loaded for it."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise StreamctlError(
            f"cannot listen there: {error.strerror or error}",
            where=f"{settings.host}:{settings.port}",
            run="--port with another number, or --host with an address of this machine",
        ) from error
    return listening


def _address(host: str, listening: socket.socket) -> str:
    """The server's URL, with the port that the system chose if it was left to it."""
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
