"""`streamctl data export`: the data of a run as files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamctl.commands.options import Json, Run, option, print_json, print_next


def command(
    folder: Annotated[Path, typer.Argument(help="Where the files go; its name names them.")],
    run: Run,
    format_: str = option(
        "recbole, lcrec (also LETTER), sequences, table (csv), table-tsv, table-jsonl, "
        "table-parquet, movielens, movielens-csv, amazon2014, amazon2018, amazon2023, "
        "amazon2023-csv.",
        "--format",
        default="recbole",
    ),
    compress: str = option("none, gz or zst.", default="none"),
    json_: Json = False,
) -> None:
    """Write the filtered log and the catalogue of a run in a format that `data prepare` reads.

    LC-Rec, LETTER and sequences hold the order and no times; MovieLens holds titles and genres,
    Amazon the columns that its meta files have.

    Reads: data/ of the run, for lcrec the tokenizer's codes if there are some. Writes: FOLDER/
    NAME.inter and NAME.item, or the like.
    Example: `streamctl data export shop --run runs/mine --format recbole`.
    Next: train the other tool on FOLDER, or `streamctl data prepare FOLDER --run OTHER`.
    """
    from streamctl.data.sinks import export
    from streamctl.runs import RunDir

    files = [str(path) for path in export(RunDir(run), folder, format_, compress)]
    if json_:
        print_json({"files": files})
    else:
        typer.echo("\n".join(files))
        print_next(command, FOLDER=folder)
