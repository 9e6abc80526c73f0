"""`streamctl baseline NAME`: train a method to compare with."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from streamctl.commands.options import (
    Config,
    Device,
    Force,
    Json,
    Run,
    Seed,
    Sets,
    Size,
    print_json,
    print_table,
)


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="popularity, transitions, knn, ranker, caser, gru4rec, "
            "sasrec_ce, sasrec_bce, bert4rec or tiger.",
        ),
    ],
    run: Run,
    loss: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--loss", help="caser: ce (whole catalogue) or bce (sampled negatives)."),
    ] = None,
    size: Size = None,
    seed: Seed = None,
    config: Config = None,
    set_: Sets = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Train a method to compare with, on the same split and by the same loop.

    transitions, knn and ranker need no network: counts of what came next, votes of similar
    histories, and gradient-boosted trees over all that evidence.

    Reads: the data stage; for transitions, knn, ranker and tiger the tokenizer, too.
    Writes: RUN/baselines/NAME.
    Example: `streamctl baseline sasrec_ce --run runs/mine`.
    Next: `streamctl eval --run RUN`.
    """
    from streamctl.baselines.train import train_baseline
    from streamctl.config import BaselineConfig, resolve
    from streamctl.runs import RunDir

    folder = RunDir(run)
    complete = folder.stage(f"baselines/{name}").complete and not force
    base = folder.stage(f"baselines/{name}").manifest["config"] if complete else {}
    settings = resolve(
        BaselineConfig,
        base=base,
        file=config,
        sets=set_ or (),
        name=name,
        loss=loss,
        size=size,
        seed=seed,
    )
    stage = train_baseline(folder, settings, device=device, force=force)
    kept = ("stage", "config", "parameters", "epochs", "best_epoch", "valid", "wall_s")
    result = {key: stage.manifest[key] for key in kept}
    if json_:
        print_json(result)
        return
    rows = [[f"validation {key}", value] for key, value in result["valid"].items()]
    rows += [["parameters", f"{result['parameters']:,}"]]
    rows += [["epochs (best)", f"{result['epochs']} ({result['best_epoch'] + 1})"]]
    rows += [["seconds", f"{result['wall_s']:.0f}"]]
    print_table(f"baselines/{name}", ["", "value"], rows)
