"""`streamctl serve`: recommendations over HTTP, and a page that shows the reasoning."""

from __future__ import annotations

from pathlib import Path

from streamctl.commands.options import Device, Run, option, switch


def command(
    run: Run,
    host: str = option("Address to listen on.", default="127.0.0.1"),
    port: int = option("Port to listen on; 0: a free one.", default=8000, min=0, max=65535),
    workers: int = option("Model processes.", default=1, min=1),
    keys: Path | None = option("File of API keys: a line `read KEY` or `write KEY` each."),
    open_to_all: bool = switch("Answer without keys on a public address.", "--open-to-all"),
    method: str | None = option("What answers (default: the best on validation)."),
    origins: list[str] | None = option(
        "Origin of web pages that may call the API; repeatable.", "--cors"
    ),
    store: Path | None = option(
        "Folder for items and users added while serving (default: RUN/serving)."
    ),
    max_batch: int = option("Most requests in one batch.", default=32, min=1, max=1024),
    max_wait_ms: float = option(
        "How long an idle model waits to fill a batch.", default=0.0, min=0
    ),
    queue: int = option("Requests that may wait; more are refused (429).", default=128, min=1),
    deadline_ms: int = option("Deadline of requests that do not set one.", default=1000, min=1),
    drain_seconds: float = option("How long to go on answering after SIGTERM.", default=1.0, min=0),
    threads: int = option("CPU threads of each model; more workers help more.", default=1, min=1),
    device: Device = "auto",
) -> None:
    """Serve a trained run: an API under /v1, its description at /docs, a page at /.

    RUN/final answers if `streamctl refit` has made it, else the method that was best on
    validation; --method names another.
    Reads: that method's stages and RUN/serving; STREAMCTL_READ_KEYS and STREAMCTL_WRITE_KEYS.
    Writes: RUN/serving, the items and interactions that arrive while it serves.
    Example: `streamctl serve --run runs/mine --workers 2`.
    Next: `curl -X POST localhost:8000/v1/recommend -H 'content-type: application/json'
    -d '{"user_id": "USER"}'`, or open http://localhost:8000/.
    """
    from streamctl.serving.server import serve
    from streamctl.serving.service import Settings

    settings = Settings(
        run=run, host=host, port=port, workers=workers, device=device, method=method,
        store=store, keys=keys, open_to_all=open_to_all, origins=tuple(origins or ()),
        max_batch=max_batch, max_wait_ms=max_wait_ms, queue=queue, deadline_ms=deadline_ms,
        drain_s=drain_seconds, threads=threads,
    )  # fmt: skip
    serve(settings)
