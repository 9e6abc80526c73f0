"""Starting and stopping the server process."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import uuid

from streamctl.errors import StreamctlError
from streamctl.progress import say, warn
from streamctl.runs import RunDir
from streamctl.serving.model import servable
from streamctl.serving.service import Settings

HEALTH_CHECK_S = 60  # a worker that loads a model may be silent for this long
SWITCH_S = 5e-5  # a model's thread that waits for the interpreter gets it after so long
KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, so that they are the ones to close


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is in work and return.

    Raises:
        StreamctlError: the run cannot be served, the key file is wrong, the port is taken, or an
            address that others can reach would be open to all.
    """
    import uvicorn

    stage = servable(RunDir(settings.run))
    with tempfile.TemporaryDirectory(prefix="streamctl-metrics-") as folder:
        if settings.workers > 1:
            # prometheus-client adds the workers' metrics up through files in this folder; it
            # looks at the variable when it is imported.
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        from streamctl.serving.closing import PatientServer, PatientWorkers
        from streamctl.serving.http import create_app

        _check_address(settings)
        listening = _bind(settings)
        several = settings.workers > 1
        loaded = multiprocessing.get_context("spawn").Event() if several else None
        settings = dataclasses.replace(settings, server=uuid.uuid4().hex, loaded=loaded)
        # The model asks for it after every operation: thousands of refusals must not hold it up.
        sys.setswitchinterval(SWITCH_S)
        factory = functools.partial(create_app, settings)
        config = uvicorn.Config(
            factory if several else factory(),
            factory=several,
            workers=settings.workers,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_worker_healthcheck=HEALTH_CHECK_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        say(f"loading {settings.run} ({stage.name}) for {_address(settings.host, listening)}")
        # uvicorn raises the signal again when it has stopped: by then there is nothing to end.
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: None)
        if several:
            workers = PatientWorkers(config, [listening], settings.drain_s)
            workers.run()
            if workers.failed:
                raise StreamctlError(
                    "a worker could not load the run, and none had; the warning above says why",
                    where=settings.run,
                )
            return
        server = PatientServer(config)
        service = config.app.state.service
        service.failed = lambda: setattr(server, "should_exit", True)
        server.run([listening])
        if service.failure is not None:
            raise service.failure


def _check_address(settings: Settings) -> None:
    from streamctl.serving.http import is_loopback
    from streamctl.serving.keys import KeyRing

    if is_loopback(settings.host) or KeyRing(settings.keys).guards_reading:
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
