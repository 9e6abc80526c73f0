"""Where compiled code is kept from one run to the next."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def prepare() -> None:
    """Give Numba a folder that can be written, before anything imports it.

    By itself it takes the installation's folder or the home's, and where neither can be written
    (a read-only image, a service without a home) every import of compiled code would raise.
    """
    if "NUMBA_CACHE_DIR" in os.environ or _writable(Path(__file__).parent / "__pycache__"):
        return
    folder = next(filter(_writable, _folders()), None)
    os.environ["NUMBA_CACHE_DIR"] = str(folder or tempfile.mkdtemp(prefix="streamctl-"))


def _folders() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(home):
        yield Path(home, "streamctl", "numba")
    for base in (tempfile.gettempdir(), "/dev/shm"):
        yield Path(base, f"streamctl-{os.getuid()}")


def _writable(folder: Path) -> bool:
    """Whether files can be made there, and nobody else can: cached code is run as it is read."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            about = folder.stat()
    except OSError:
        return False
    return about.st_uid == os.getuid() and not about.st_mode & 0o002
