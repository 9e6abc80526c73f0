"""Zip archives, unpacked so that nothing is written outside the folder."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from streamctl.errors import StreamctlError
from streamctl.files import BROKEN_ZIP, disk_errors

MAX_BYTES = 8 << 30  # unpacked: a set that is larger is no set we know
MAX_FILES = 10_000


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip into `folder`, without the one folder that all its members may lie in.

    Everything is unpacked beside and moved in at the end: a bad archive leaves nothing.

    Returns:
        the files.

    Raises:
        StreamctlError: no zip, a member with a path out of the folder, a link, more or larger
            files than MAX_FILES and MAX_BYTES, damage; names the member.
    """
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as scratch:
        try:
            with zipfile.ZipFile(archive) as file:
                members = _safe(file, archive)
                for member, place in members:
                    path = Path(scratch) / place
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with file.open(member) as source, open(path, "xb") as target:
                        shutil.copyfileobj(source, target, 1 << 20)
        except BROKEN_ZIP as why:
            raise StreamctlError(
                f"the archive is damaged: {why}", where=archive, run="fetch it again"
            ) from why
        files = []
        for _, place in members:
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(scratch) / place, target)
            files.append(target)
    return files


def _safe(file: zipfile.ZipFile, archive: Path) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files of an archive and where they go; raises on the first that is not harmless."""
    members = [member for member in file.infolist() if not member.is_dir()]
    if len(members) > MAX_FILES or sum(member.file_size for member in members) > MAX_BYTES:
        raise StreamctlError(
            f"unpacks to more than {MAX_FILES:,} files or {MAX_BYTES >> 30} GiB",
            where=archive,
            run="unpack it by hand where there is room, and give `data prepare` the folder",
        )
    places = []
    for member in members:
        place = PurePosixPath(member.filename)
        mode = member.external_attr >> 16
        bad = None
        if place.is_absolute() or ".." in place.parts or set(member.filename) & set("\\:\0"):
            bad = "leaves the folder"
        elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            bad = "is a link or a device"
        elif any(part.startswith(".") for part in place.parts):
            bad = "is hidden"
        if bad:
            raise StreamctlError(
                f"member {member.filename!r} {bad}: not unpacked",
                where=archive,
                run="do not use this archive; fetch it from its owner",
            )
        places.append(place)
    tops = {place.parts[0] for place in places}
    if len(tops) == 1 and all(len(place.parts) > 1 for place in places):
        places = [place.relative_to(place.parts[0]) for place in places]
    return list(zip(members, places, strict=True))
