"""`streamctl data export`: the data of a run as files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamctl.commands.options import Json, Run, print_json


def command(
    folder: Annotated[Path, typer.Argument(help="Where the files go; its name names them.")],
    run: Run,
    format_: Annotated[
        str, typer.Option("--format", help="recbole, lcrec (also LETTER) or table.")
    ] = "recbole",
    json_: Json = False,
) -> None:
    """Write the filtered log and the catalogue of a run for RecBole, LC-Rec or as csv and jsonl.

    Reads: data/ of the run. Writes: FOLDER/NAME.inter and NAME.item, or the like.
    Next: train the other tool on them, or `streamctl data prepare FOLDER --run OTHER`.
    """
    from streamctl.data.export import export
    from streamctl.runs import RunDir

    files = [str(path) for path in export(RunDir(run), folder, format_)]
    if json_:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))
