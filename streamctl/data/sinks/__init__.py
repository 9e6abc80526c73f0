"""Writers of prepared data, one a format; each writes what its reader in `sources` reads."""

from __future__ import annotations

from pathlib import Path

from streamctl.data.catalog import Catalog
from streamctl.data.log import InteractionLog
from streamctl.data.sinks import amazon, lcrec, movielens, recbole, sequences, table
from streamctl.data.sinks.sink import Export, Sink
from streamctl.data.sources import find_source
from streamctl.data.sources.text import COMPRESSED
from streamctl.errors import StreamctlError, UsageError, close_matches
from streamctl.progress import warn
from streamctl.runs import RunDir

SINKS: dict[str, Sink] = {
    sink.name: sink
    for sink in (
        recbole.SINK,
        lcrec.SINK,
        sequences.SINK,
        *table.SINKS,
        *movielens.SINKS,
        *amazon.SINKS,
    )
}


def export(
    run: RunDir, folder: Path, format_name: str = "recbole", compression: str = "none"
) -> list[Path]:
    """Write the run's log and catalogue as files that `data prepare` and other tools read.

    The log is the filtered one, users by id and each user's items in order of time. A log without
    times gets positions where a format has a column of times. The text that an encoder reads is
    not written: reading makes it of the title and the columns again. Files that are there are
    replaced.

    Args:
        run: a run with a data stage; with a tokenizer, "lcrec" gets the items' codes too.
        folder: where the files go; made if missing. Its name names them.
        format_name: one of `SINKS`.
        compression: "none", "gz" or "zst".

    Returns:
        the files written, interactions first.

    Raises:
        UsageError: an unknown format or compression, or one that the format does not take.
        StreamctlError: no data stage, an id or a title that the format cannot hold, or a disk
            that is full or cannot be written.
    """
    if format_name not in SINKS:
        raise UsageError(f"unknown format {format_name!r}; {close_matches(format_name, SINKS)}")
    sink = SINKS[format_name]
    kinds = ["none", *(suffix.removeprefix(".") for suffix in COMPRESSED)]
    if compression not in kinds:
        raise UsageError(f"--compress is {compression!r}; it takes one of {', '.join(kinds)}")
    if compression != "none" and not sink.compressible:
        raise UsageError(f"{format_name} is compressed already; leave --compress out")
    stage = run.require("data")
    tokenizer = run.stage("tokenizer")
    files = sink.write(
        Export(
            folder,
            Catalog.load(stage),
            InteractionLog.load(stage),
            "" if compression == "none" else f".{compression}",
            tokenizer.file("index.json") if tokenizer.complete else None,
        )
    )
    try:
        _, read = find_source(folder)
        taken = read.interactions in files
        other = f"{folder} also holds {read.interactions.name}, which `data prepare` takes first"
    except StreamctlError as error:  # what was written is whole; what lay there is in its way
        taken, other = False, f"`data prepare` cannot read {folder} as it is now: {error}"
    if not taken:
        warn(other)
    return files
