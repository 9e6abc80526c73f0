"""API keys: who may read and who may change items."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Literal

from streamctl.errors import StreamctlError

Right = Literal["read", "write"]
READ_VARIABLE = "STREAMCTL_READ_KEYS"
WRITE_VARIABLE = "STREAMCTL_WRITE_KEYS"
SHORTEST = 16
_MAKE_ONE = "openssl rand -hex 24 (makes one)"


class KeyRing:
    """The keys in force, read again whenever the file changes.

    The file has a line a key, `read KEY` or `write KEY`; `#` begins a comment. The environment
    variables STREAMCTL_READ_KEYS and STREAMCTL_WRITE_KEYS hold keys with commas between them. A
    key that may write may read too.

    Args:
        path: the key file, or None for the environment alone.

    Raises:
        StreamctlError: the file cannot be read or holds no key, or a line is not a key; names file
            and line.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.problem: StreamctlError | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._keys: list[tuple[Right, bytes]] = []
        self._load()
        if path is not None and not self._keys:
            raise StreamctlError("it holds no key", where=path, run=_MAKE_ONE)

    @property
    def guards_reading(self) -> bool:
        """Whether reading needs a key: as soon as there is any key at all."""
        self._refresh()
        return bool(self._keys)

    def right_of(self, key: str) -> Right | None:
        """What a key may do; None for a key that is not on the ring.

        Every key is compared with every other in constant time, so that the time of the answer
        says nothing about how much of a guess was right.
        """
        self._refresh()
        digest = _digest(key)
        found: Right | None = None
        for right, known in self._keys:
            if hmac.compare_digest(digest, known) and found != "write":
                found = right
        return found

    def _refresh(self) -> None:
        """Read a changed file; one that has become unreadable keeps the last keys in force."""
        if self.path is None:
            return
        try:
            if self._stamp_now() != self._stamp:
                before = self._keys
                self._load()
                self.problem = None
                if before and not self._keys:
                    # A file that has lost its keys must not open the door to everybody.
                    self._keys = before
                    raise StreamctlError("it holds no key any more; the last ones stay in force")
        except (OSError, StreamctlError) as error:
            text = f"the changed key file is not used: {error}"
            self.problem = StreamctlError(text, where=self.path)

    def _stamp_now(self) -> tuple[int, int, int]:
        status = os.stat(self.path)
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _load(self) -> None:
        keys = [
            (right, _digest(key))
            for variable, right in ((READ_VARIABLE, "read"), (WRITE_VARIABLE, "write"))
            for key in _checked(variable, os.environ.get(variable, "").split(","))
        ]
        stamp = None
        if self.path is not None:
            try:
                stamp = self._stamp_now()
                text = self.path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "not a text file"
                raise StreamctlError(f"cannot be read: {reason}", where=self.path) from error
            for number, line in enumerate(text.splitlines(), 1):
                words = line.partition("#")[0].split()
                if not words:
                    continue
                if len(words) != 2 or words[0] not in ("read", "write"):
                    raise StreamctlError(
                        "not `read KEY` or `write KEY`", where=self.path, line=number
                    )
                _check_length(words[1], self.path, number)
                keys.append((words[0], _digest(words[1])))
        self._keys, self._stamp = keys, stamp


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _checked(variable: str, keys: list[str]) -> list[str]:
    keys = [key.strip() for key in keys if key.strip()]
    for key in keys:
        _check_length(key, f"${variable}", None)
    return keys


def _check_length(key: str, where: str | Path, line: int | None) -> None:
    if len(key) < SHORTEST:
        raise StreamctlError(
            f"a key has {len(key)} characters; {SHORTEST} is the least",
            where=where,
            line=line,
            run=_MAKE_ONE,
        )
