"""`streamctl data doctor`: what is wrong with a source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from streamctl.commands.options import Config, Json, Sets, print_json

_MARKS = {"good": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}


def command(
    source: Annotated[Path, typer.Argument(help="A folder, or the interactions file.")],
    format_: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--format", help="The reader; found out by itself (auto) unless given."),
    ] = None,
    columns: Annotated[
        str, typer.Option("--columns", help="user=NAME,item=NAME,time=NAME, if unusual.")
    ] = "",
    items: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--items", help="The file that describes the items, if it lies elsewhere."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 when there is an ERROR.")
    ] = False,
    config: Config = None,
    set_: Sets = None,
    json_: Json = False,
) -> None:
    """Examine a log and its items before they are prepared; a remedy for every finding.

    Bad lines (file and line), duplicates, impossible times, sequences sorted by item id, what
    the filters take, cold test items, leakage, ties, and differences from published statistics.

    Reads: SOURCE. Writes: nothing.
    Example: `streamctl data doctor sales.csv --items goods.csv`.
    Next: `streamctl data prepare SOURCE --run runs/NAME`.
    """
    from streamctl.config import DataConfig, resolve
    from streamctl.data.doctor import examine
    from streamctl.data.sources import parse_columns

    settings = resolve(
        DataConfig,
        file=config,
        sets=set_ or (),
        source=str(source),
        format=format_,
        items=None if items is None else str(items),
    )
    found = examine(source, settings, columns=parse_columns(columns))
    if json_:
        print_json(found.to_dict())
    else:
        typer.echo(f"{found.source}: {found.format} ({', '.join(map(_name, found.files))})")
        for finding in found.findings:
            typer.echo(f"{_MARKS[finding.level]:>8}  {finding.topic}: {finding.what}")
            for line in finding.lines:
                typer.echo(f"{'':10}  {line}")
            if finding.remedy:
                typer.echo(f"{'':10}-> {finding.remedy}")
    if strict and any(finding.level == "error" for finding in found.findings):
        raise typer.Exit(1)


def _name(path: str) -> str:
    return Path(path).name
