"""The cache folder of this machine: compiled code, measured choices.

`import streamctl` tells Numba of it before anything is compiled, since Numba's own place is beside
the installed source, which may be read-only, or in a home, which may not exist.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def _writable(folder: Path) -> bool:
    """Whether files can be made there, and nobody else can: cached code is run as it is read."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            about = folder.stat()
    except OSError:
        return False
    return about.st_uid == os.getuid() and not about.st_mode & 0o022


def _places() -> Iterator[Path]:
    if told := os.environ.get("STREAMCTL_CACHE"):
        yield Path(told)
    if told := os.environ.get("XDG_CACHE_HOME"):
        yield Path(told) / "streamctl"
    home = os.path.expanduser("~")
    if os.path.isabs(home):
        yield Path(home) / ".cache" / "streamctl"
    for base in (*_temporary(), "/dev/shm"):
        yield Path(base) / f"streamctl-{os.getuid()}"


def _temporary() -> Iterator[str]:
    try:
        yield tempfile.gettempdir()
    except OSError:  # no folder at all can be written
        return


@cache
def folder() -> Path | None:
    """The first of these that is the user's own and can be written; None where none is.

    $STREAMCTL_CACHE, $XDG_CACHE_HOME/streamctl, ~/.cache/streamctl, one in the temporary folder.
    """
    return next(filter(_writable, _places()), None)


def prepare() -> None:
    """Where Numba keeps compiled code, unless NUMBA_CACHE_DIR says it."""
    if (place := folder()) is None:
        return
    told = os.environ.setdefault("NUMBA_CACHE_DIR", str(place / "numba"))
    if "numba" in sys.modules:
        sys.modules["numba"].config.CACHE_DIR = told
