"""A model in a process of its own, and the lines of JSON that it reads and writes.

The server answers HTTP and knows no torch; the model computes and knows no HTTP. A model that dies
loses nothing: the server still has what it was asked, and asks another.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamctl.errors import StreamctlError, UsageError
from streamctl.serving.batcher import Gone
from streamctl.serving.question import Job
from streamctl.serving.store import Refused

LINE = 1 << 28  # bytes of an answer at most
ERRORS = {
    "refused": Refused,
    "usage": UsageError,
    "error": StreamctlError,
    "failed": RuntimeError,
}


class Model:
    """The server's end of a model process.

    Attributes:
        about: what the model said of itself when it was ready.
    """

    def __init__(self, process: asyncio.subprocess.Process):
        self._process, self._turn = process, asyncio.Lock()
        self.about: dict[str, Any] = {}

    @classmethod
    async def start(cls, **settings: Any) -> Model:
        """A process whose model is loaded and warm.

        Args:
            settings: of `answer_questions`.

        Raises:
            StreamctlError: the run cannot be served.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", __name__, json.dumps(settings),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE,
        )  # fmt: skip
        model = cls(process)
        try:
            model.about = await model._read()
        except Gone as gone:
            raise StreamctlError(
                f"the model's process ended while it loaded ({gone})",
                run="what it printed says why; if memory was short, fewer --workers",
            ) from None
        except BaseException:
            model.kill()
            raise
        return model

    async def answer(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Answers to jobs of one group."""
        return await self.ask("answer", jobs=[job.details for job in jobs], **jobs[0].group)

    async def ask(self, what: str, **details: Any) -> Any:
        """The answer to one question; questions take turns.

        Raises:
            Gone: the process has died.
            Refused, StreamctlError: as the model said.
        """
        # Who is no longer interested must not leave the answer to the next one.
        return await asyncio.shield(asyncio.ensure_future(self._ask(what, details)))

    async def _ask(self, what: str, details: dict[str, Any]) -> Any:
        async with self._turn:
            try:
                self._process.stdin.write(json.dumps([what, details]).encode() + b"\n")
                await self._process.stdin.drain()
            except (ConnectionError, RuntimeError):
                raise Gone(await self.died()) from None
            return await self._read()

    async def died(self) -> str:
        """Wait until the process has ended; how it did."""
        return f"exit code {await self._process.wait()}"

    async def _read(self) -> Any:
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise Gone(await self.died())
        kind, value = json.loads(line)
        if kind in ERRORS:
            raise ERRORS[kind](*value)
        return value

    async def stop(self) -> None:
        """Let it end."""
        self._process.stdin.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 5)
        self.kill()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


def answer_questions(
    run: str, store: str, method: str | None, device: str, threads: int, batch: int,
    also: list[str],
) -> None:  # fmt: skip
    """Load a run's model, then answer what comes on stdin until it is closed.

    Args:
        run, store: folders. method: that answers where nobody asks for another; None: the best.
        batch: most users asked about together. also: methods to load beside it.
    """
    # A signal to the whole group is for the server, which ends its models itself.
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever is printed is no answer

    def send(kind: str, value: Any) -> None:
        answers.write(json.dumps([kind, value]) + "\n")
        answers.flush()

    try:
        import torch

        torch.set_num_threads(threads)
        from streamctl.runs import RunDir
        from streamctl.serving.engine import Engine
        from streamctl.serving.store import Store

        folder = RunDir(Path(run))
        at = Store(folder, Path(store))
        engine = Engine(folder, at, method=method, device=device, batch=batch)
        engine.warm_up()
        for name in also:  # one that cannot be loaded is left to whoever asks for it
            with contextlib.suppress(StreamctlError):
                engine.load(name)
        gc.freeze()  # a collection over all that is loaded would keep a request waiting for 0.1 s
    except StreamctlError as error:
        send("usage" if isinstance(error, UsageError) else "error", [str(error)])
        return
    send("ready", engine.about())
    for line in sys.stdin:
        what, details = json.loads(line)
        try:
            send("answer", getattr(engine, what)(**details))
        except Refused as error:
            send("refused", [error.kind, error.field, error.detail])
        except StreamctlError as error:
            send("error", [str(error)])
        except Exception as error:
            import traceback

            traceback.print_exc()
            send("failed", [repr(error)])


if __name__ == "__main__":
    answer_questions(**json.loads(sys.argv[1]))
