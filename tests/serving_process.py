"""`streamctl serve` in a process of its own, and traffic to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
from conftest import until
from serving_run import KEYS

START = "import typer; from streamctl.commands.serve import command; typer.run(command)"
READ = {"Authorization": f"Bearer {KEYS['read']}"}
WRITE = {"Authorization": f"Bearer {KEYS['write']}"}
SLOW_S = 300  # what a machine that does much else at the same time may take


class Server:
    """A server on a free port, whose requests have a minute unless a test says otherwise."""

    def __init__(self, run: Path, *options: object, keys: Path | None = None):
        self.run = run
        words = ["--run", run, "--port", 0, "--deadline-ms", 60000, *options]
        if keys:
            words += ["--keys", keys]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the server
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, words)],
            stderr=self._errors,
            env={**os.environ, "COLUMNS": "1000", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    @property
    def errors(self) -> str:
        """What it has written to stderr so far."""
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode()

    def wait(self) -> Server:
        """Until it is ready."""
        until(lambda: self._alive() and re.search(r"for http://\S+\n", self.errors))
        self.url = re.search(r"for (http://\S+)\n", self.errors)[1]
        self.client = self.connect()
        until(self._ready)
        return self

    def connect(self) -> httpx.Client:
        """A client with connections of its own."""
        return httpx.Client(base_url=self.url, headers=READ, timeout=SLOW_S)

    def _alive(self) -> bool:
        assert self.process.poll() is None, self.errors
        return True

    def _ready(self) -> bool:
        try:
            return self._alive() and self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def recommend(self, **query) -> dict:
        answer = self.client.post("/v1/recommend", json=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ids(self, **query) -> list[str]:
        return [item["id"] for item in self.recommend(**query)["items"]]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SLOW_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(SLOW_S)


class Traffic:
    """Requests from several threads until told to stop; each must get its full answer."""

    def __init__(self, server: Server, threads: int = 4):
        self.server, self.done = server, threading.Event()
        self.answers: list[dict] = []
        self.failures: list[str] = []
        self.refused = 0
        self.threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        client = self.server.connect()
        body = {"user_id": f"u{number:03}", "k": 5, "think": number % 2}
        while not self.done.is_set():
            try:
                answer = client.post("/v1/recommend", json=body)
            except httpx.ConnectError:
                self.refused += 1  # nobody listens any more: the request was never sent
                return
            except httpx.HTTPError as error:
                self.failures.append(repr(error))
                return
            if answer.status_code != 200:
                self.failures.append(answer.text)
                return
            self.answers.append({"user": number, **answer.json()})

    def stop(self) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join()
