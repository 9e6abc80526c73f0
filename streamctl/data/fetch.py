"""A public data set as a folder that `data prepare` reads."""

from __future__ import annotations

import json
from pathlib import Path

from streamctl.data.archives import unpack
from streamctl.data.download import damage, download
from streamctl.data.public import PublicSet, Remote
from streamctl.errors import StreamctlError
from streamctl.files import atomic_file, file_hash, locked, read_json
from streamctl.progress import say

RECORD = ".fetched.json"  # written last: which files the folder holds, and their hashes


def fetch(public: PublicSet, folder: Path, mirror: str | None = None) -> list[Path]:
    """Fetch a set into `folder`; a complete one is checked and left alone.

    A file that somebody put there by hand is checked and used. Where the owner publishes no
    checksum, the hash of what came is kept, and a later change of the folder is noticed.

    Args:
        mirror: address of a folder that holds the files by name, instead of the owner's servers.

    Returns:
        the set's files.

    Raises:
        StreamctlError: not reachable, damaged, an unsafe archive, a changed folder, or another
            process is fetching into it.
    """
    busy = StreamctlError(
        "another process is fetching into this folder", where=folder, run="wait for it"
    )
    with locked(folder / ".lock", busy):
        known = _recorded(public, folder)
        if known is not None:
            say(f"{public.name}: complete already")
            return known
        files: list[Path] = []
        for remote in public.files:
            path = folder / remote.name
            _bring(remote, path, mirror)
            if path.suffix == ".zip":
                files += unpack(path, folder)
                path.unlink()
            else:
                files.append(path)
        record = {str(path.relative_to(folder)): file_hash(path) for path in files}
        with atomic_file(folder / RECORD) as temporary:
            temporary.write_text(
                json.dumps({"set": public.name, "sha256": record}, indent=1), encoding="utf-8"
            )
    return files


def _bring(remote: Remote, path: Path, mirror: str | None) -> None:
    if path.is_file():
        fault = damage(path, path.name, remote.md5)
        if fault is None:
            return
        raise StreamctlError(f"the file {fault}", where=path, run="the same command without it")
    download(remote.urls(mirror), path, remote.md5)


def _recorded(public: PublicSet, folder: Path) -> list[Path] | None:
    """The files of a complete folder, or None if it is not complete."""
    if not (folder / RECORD).is_file():
        return None
    record = read_json(folder / RECORD)
    try:
        name, hashes = record["set"], dict(record["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise StreamctlError(
            "the record of what was fetched is damaged",
            where=folder / RECORD,
            run="the same command without it",
        ) from error
    if name != public.name:
        raise StreamctlError(f"holds {name}, not {public.name}", where=folder, run="--into OTHER")
    for file, seen in hashes.items():
        path = folder / file
        if not path.is_file() or file_hash(path) != seen:
            state = "has changed since it was fetched" if path.is_file() else "is missing"
            raise StreamctlError(
                f"the file {state}", where=path, run=f"rm {folder / RECORD} and the same command"
            )
    return [folder / file for file in hashes]
