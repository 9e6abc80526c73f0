"""`streamctl serve`: recommendations over HTTP, and a page that shows the reasoning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from streamctl.commands.options import Device, Run


def command(
    run: Run,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Model processes.")] = 1,
    keys: Annotated[
        Optional[Path],  # noqa: UP045 - Typer reads Optional
        typer.Option("--keys", help="File of API keys: a line `read KEY` or `write KEY` each."),
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Answer without keys on a public address.")
    ] = False,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--method", help="What answers [default: the best on validation]."),
    ] = None,
    origins: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--cors", help="Origin of web pages that may call the API; repeatable."),
    ] = None,
    store: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--store", help="Folder of what changes meanwhile [default: RUN/serving]."),
    ] = None,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, max=1024, help="Most requests computed together.")
    ] = 32,
    max_wait_ms: Annotated[
        float,
        typer.Option("--max-wait-ms", min=0, help="An idle model waits so long for a batch."),
    ] = 0.0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Most requests waiting; beyond it 429.")
    ] = 128,
    deadline_ms: Annotated[
        int, typer.Option("--deadline-ms", min=1, help="Deadline of requests that name none.")
    ] = 1000,
    drain_seconds: Annotated[
        float, typer.Option("--drain-seconds", min=0, help="Goes on so long after SIGTERM.")
    ] = 1.0,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads a model; more workers do more.")
    ] = 1,
    device: Device = "auto",
) -> None:
    """Serve a trained run: an API under /v1, its description at /docs, a page at /.

    Answers with RUN/final where `streamctl refit` made it, else with the method that was best on
    validation, or with --method.
    Reads: these, and RUN/serving; STREAMCTL_READ_KEYS and STREAMCTL_WRITE_KEYS. Writes:
    RUN/serving, the items and interactions that come meanwhile.
    Example: `streamctl serve --run runs/mine --workers 2`.
    Next: `curl -X POST localhost:8000/v1/recommend -H 'content-type: application/json'
    -d '{"user_id": "u0017"}'`, or open http://localhost:8000/.
    """
    from streamctl.serving.server import serve
    from streamctl.serving.service import Settings

    serve(
        Settings(
            run=run,
            host=host,
            port=port,
            workers=workers,
            device=device,
            method=method,
            store=store,
            keys=keys,
            open_to_all=open_to_all,
            origins=tuple(origins or ()),
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            queue=queue,
            deadline_ms=deadline_ms,
            drain_s=drain_seconds,
            threads=threads,
        )
    )
