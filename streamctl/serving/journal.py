"""The journal of catalogue changes: an append-only file that survives a killed server."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamctl.errors import StreamctlError


class Journal:
    """One JSON object a line; a record counts once its line end is on the disk.

    Several processes may share the file: each reads what the others wrote with `news`, and a
    writer holds `lock` from its last look to its `append`, so that all see one order.

    Args:
        path: the file; it and its folder are made by the first append.
        sound: whether an object is a record that the reader can use.
    """

    def __init__(self, path: Path, sound: Callable[[dict[str, Any]], bool] = lambda _: True):
        self.path, self._sound = path, sound
        self._position = 0
        self._line = 0

    def news(self) -> list[dict[str, Any]]:
        """The records written since the last call, by this process or another.

        A last line without its end is a write that was cut off: it is left alone here and cut
        away by the next append. Records before a damaged line are given first; the call after
        that raises.

        Raises:
            StreamctlError: a complete line is no sound record; names file and line.
        """
        try:
            if os.stat(self.path).st_size <= self._position:
                return []
        except FileNotFoundError:
            return []
        with open(self.path, "rb") as handle:
            handle.seek(self._position)
            content = handle.read()
        records: list[dict[str, Any]] = []
        for line in content[: content.rfind(b"\n") + 1].splitlines(keepends=True):
            record = self._record(line)
            if record is None:
                if records:
                    break
                raise StreamctlError(
                    "not a record of the catalogue's changes",
                    where=self.path,
                    line=self._line + 1,
                    run="remove this line",
                )
            records.append(record)
            self._position += len(line)
            self._line += 1
        return records

    def _record(self, line: bytes) -> dict[str, Any] | None:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return record if isinstance(record, dict) and self._sound(record) else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers, in this process or another, out."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(self.path.name + ".lock"), "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def append(self, record: dict[str, Any]) -> None:
        """Write one record and wait until the disk has it. Call `news` first, inside `lock`.

        Raises:
            OSError: the disk refused it; the file is as it was.
        """
        line = json.dumps(record).encode() + b"\n"
        new = not self.path.exists()
        with open(self.path, "r+b" if not new else "w+b") as handle:
            handle.truncate(self._position)
            handle.seek(self._position)
            try:
                handle.write(line)
                handle.flush()
                os.fsync(handle.fileno())
            except OSError:
                os.truncate(self.path, self._position)
                raise
        if new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._position += len(line)
        self._line += 1
