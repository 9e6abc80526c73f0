"""`streamctl refit`: the winner on everything, for production."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from streamctl.commands.options import (
    Config,
    Device,
    Force,
    Json,
    Run,
    Sets,
    print_json,
    print_table,
)


def command(
    run: Run,
    method: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--method", help="Another method than the one that won on validation."),
    ] = None,
    config: Config = None,
    set_: Sets = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Make RUN/final: the winner with every interaction, those held out for evaluation included.

    Counts and the memory of other users are complete; weights that hang on no single item stay as
    validation chose them; methods with vectors of their own for items train again, for as many
    epochs as validation found. `recommend` and `serve` answer by it from then on. It cannot be
    evaluated: nothing is held out.

    Reads: data, the eval stage and the winner's stages. Writes: RUN/final.
    Example: `streamctl refit --run runs/mine`.
    Next: `streamctl serve --run RUN`.
    """
    from streamctl.config import RefitConfig, resolve
    from streamctl.evaluation.refit import refit
    from streamctl.runs import RunDir

    settings = resolve(RefitConfig, file=config, sets=set_ or (), method=method)
    stage = refit(RunDir(run), settings, device=device, force=force)
    manifest = stage.manifest
    if json_:
        print_json({key: manifest[key] for key in ("stage", "method", "stages", "wall_s")})
        return
    rows = [["method", manifest["method"]], ["stages", ", ".join(manifest["stages"])]]
    print_table(f"{stage.path}", ["", "value"], [*rows, ["seconds", f"{manifest['wall_s']:.0f}"]])
