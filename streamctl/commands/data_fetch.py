"""`streamctl data fetch`: a public data set from its owner's server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamctl.commands.options import Json, option, print_json


def command(
    name: Annotated[
        str, typer.Argument(help="ml-1m, amazon-2014-beauty, Video_Games, ...; none: list them.")
    ] = "",
    into: Path | None = option("Folder to make.", show_default="data/NAME"),
    mirror: str | None = option("http(s) address of a folder with the set's files."),
    json_: Json = False,
) -> None:
    """Fetch a public set: MovieLens 100K to 32M, or a 5-core category of Amazon Reviews.

    Amazon's releases of 2014, 2018 and 2023; of the last one also as the owner splits it, such as
    amazon-2023-video-games-last-out (the last two of each user) and -timestamp (two moments).

    An interrupted download goes on where it stopped; checksums are compared where the owner
    publishes them; the files appear under their names only when they are whole.

    Reads: the owner's server (or --mirror). Writes: data/NAME (or --into).
    Example: `streamctl data fetch ml-1m`.
    Next: `streamctl data doctor data/NAME`, `streamctl data prepare data/NAME --run runs/NAME`.
    """
    from streamctl.data.fetch import fetch
    from streamctl.data.public import SETS, find_set
    from streamctl.errors import UsageError

    if not name:
        if json_:
            print_json({"sets": sorted(SETS)})
        else:
            typer.echo("\n".join(SETS))
        return
    if mirror is not None and not mirror.startswith(("http://", "https://")):
        raise UsageError(f"--mirror takes an http(s) address, not {mirror!r}")
    public = find_set(name)
    folder = into or Path("data") / public.name
    files = [str(path) for path in fetch(public, folder, mirror)]
    if json_:
        print_json({"set": public.name, "folder": str(folder), "files": files})
        return
    typer.echo("\n".join(files))
    typer.echo(f"terms: {public.terms}")
    typer.echo(f"Next: streamctl data prepare {folder} --run runs/{public.name}")
