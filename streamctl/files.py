"""Files written whole or not at all, and the disk's errors as one line."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from streamctl.distributed import is_main
from streamctl.errors import StreamctlError
from streamctl.progress import warn

# What zipfile raises while it reads a damaged archive.
BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    In a job of several processes the main one writes; what the others write is thrown away.

    Raises:
        StreamctlError: the disk is full, cannot be written or fails; `path` is as it was.
    """
    if is_main():
        with atomic_file_each(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch) / path.name


@contextmanager
def atomic_file_each(path: Path) -> Iterator[Path]:
    """`atomic_file` for a file of this process alone, whichever of several it is."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            with suppress(OSError):  # on a disk that has become read-only
                temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the disk while `path` is written into one line that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StreamctlError(
            f"cannot be written: {reason}",
            where=path,
            run="free some space or make the folder writable, then run it again",
        ) from error


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems sync files alone
            os.fsync(folder)
    finally:
        os.close(folder)


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def locked(path: Path, busy: StreamctlError) -> Iterator[None]:
    """Hold a lock on a file, which is created if needed.

    On a file system without locks (some network mounts) it warns and goes on.

    Raises:
        StreamctlError: `busy`, if another process holds it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            told = "this file system has no locks; run one command at a time here"
            warn(f"{path.parent}: {told}")
        yield


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, Any], text: str) -> str:
    """SHA-256 of named torch tensors and a text that belongs to them."""
    import torch

    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        if values.numel():
            digest.update(memoryview(values.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def read_json(path: Path, *, run: str | None = None) -> Any:
    """A JSON file's value; `run` is the command that makes the file again.

    Raises:
        StreamctlError: it cannot be read or is not JSON, with file and line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StreamctlError(f"cannot be read: {error.strerror}", where=path, run=run) from error
    except UnicodeDecodeError as error:
        raise StreamctlError("not a text file in UTF-8", where=path, run=run) from error
    except json.JSONDecodeError as error:
        what = f"not JSON: {error.msg}"
        raise StreamctlError(what, where=path, line=error.lineno, run=run) from error
