"""API keys: who may read and who may change items."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path
from typing import Literal

from streamctl.errors import StreamctlError
from streamctl.progress import warn

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
        self._stamp = self._stamp_now()
        self._keys = self._read()

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
        rights = {right for right, known in self._keys if hmac.compare_digest(digest, known)}
        return max(rights, default=None)  # "write" includes "read"

    def _refresh(self) -> None:
        """Read a changed file; one that cannot be used keeps the last keys in force."""
        if (stamp := self._stamp_now()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = self._read()
        except StreamctlError as error:
            warn(f"the changed key file is not used, the last keys stay in force: {error}")

    def _stamp_now(self) -> tuple[int, int, int] | None:
        if self.path is None:
            return None
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self) -> list[tuple[Right, bytes]]:
        found: list[tuple[Right, bytes]] = []
        for variable, right in ((READ_VARIABLE, "read"), (WRITE_VARIABLE, "write")):
            given = os.environ.get(variable, "").split(",")
            for key in filter(None, map(str.strip, given)):
                found.append((right, _checked(key, f"${variable}", None)))
        if self.path is None:
            return found
        try:
            text = self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise StreamctlError(
                f"cannot be read: {reason}",
                where=self.path,
                run="--keys with a text file of lines `read KEY` and `write KEY`",
            ) from error
        for number, line in enumerate(text.splitlines(), 1):
            words = line.partition("#")[0].split()
            if words and (len(words) != 2 or words[0] not in ("read", "write")):
                raise StreamctlError(
                    "not `read KEY` or `write KEY`",
                    where=self.path,
                    line=number,
                    run="`openssl rand -hex 24` makes a key",
                )
            if words:
                found.append((words[0], _checked(words[1], self.path, number)))
        if not found:  # a file that has lost its keys must not open the door to everybody
            raise StreamctlError("it holds no key", where=self.path, run=_MAKE_ONE)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _checked(key: str, where: str | Path, line: int | None) -> bytes:
    """The digest of a key that is long enough."""
    if len(key) < SHORTEST:
        what = f"a key has {len(key)} characters; {SHORTEST} is the least"
        raise StreamctlError(what, where=where, line=line, run=_MAKE_ONE)
    return _digest(key)
