"""`streamctl data doctor`: what is wrong with a source."""

from __future__ import annotations

from pathlib import Path

import typer

from streamctl.commands.data_prepare import COLUMNS, FORMAT, ITEMS, Source
from streamctl.commands.options import Job, print_json, print_next, stage_command, switch

_MARKS = {"good": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}


@stage_command("run", "seed", "device", "force")
def command(
    job: Job,
    source: Source,
    format_: str | None = FORMAT,
    columns: str | None = COLUMNS,
    items: Path | None = ITEMS,
    strict: bool = switch("Exit with code 1 when there is an ERROR.", "--strict"),
) -> None:
    """Examine a log and its items before you prepare them, with a remedy for every finding.

    Bad lines (file and line), duplicates, impossible times, sequences sorted by item id, what
    the filters take, cold test items, leakage, ties, and differences from published statistics.

    Reads: SOURCE. Writes: nothing.
    Example: `streamctl data doctor sales.csv --items goods.csv`.
    Next: `streamctl data prepare SOURCE --run runs/NAME`, with the options that the remedies name.
    """
    from streamctl.config import DataConfig
    from streamctl.data.doctor import examine
    from streamctl.errors import TYPED

    settings = job.settings(DataConfig, source=source, format=format_, items=items, columns=columns)
    found = examine(source, settings)
    if job.json:
        print_json(found.to_dict())
    else:
        typer.echo(
            f"{found.source}: {found.format} ({', '.join(Path(file).name for file in found.files)})"
        )
        for finding in found.findings:
            typer.echo(f"{_MARKS[finding.level]:>8}  {finding.topic}: {finding.what}")
            for line in finding.lines:
                typer.echo(f"{'':10}  {line}")
            if finding.remedy:
                typer.echo(f"{'':10}-> {finding.remedy}")
        words = TYPED.get()  # the log and all options that say how it is read
        given = words[words.index("doctor") + 1 :] if "doctor" in words else [str(source)]
        given = tuple(word for word in given if word != "--strict")
        print_next(command, SOURCE=given, NAME=source.stem)
    if strict and any(finding.level == "error" for finding in found.findings):
        raise typer.Exit(1)
