"""`streamctl baseline NAME`: train a method to compare with."""

from __future__ import annotations

from typing import Annotated

import typer

from streamctl.commands.options import Job, Size, option, print_stage, stage_command

KEPT = ("stage", "config", "parameters", "epochs", "best_epoch", "valid", "wall_s")


@stage_command()
def command(
    job: Job,
    name: Annotated[
        str,
        typer.Argument(
            help="popularity, transitions, knn, ranker, caser, gru4rec, "
            "sasrec_ce, sasrec_bce, bert4rec or tiger."
        ),
    ],
    loss: str | None = option("caser: ce (whole catalogue) or bce (sampled negatives)."),
    size: Size = None,
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
    from streamctl.config import BaselineConfig

    made = job.folder.stage(f"baselines/{name}")
    base = made.manifest["config"] if made.complete and not job.force else {}
    stage = job.make(
        train_baseline, job.settings(BaselineConfig, base=base, name=name, loss=loss, size=size)
    )
    report = {key: stage.manifest[key] for key in KEPT}
    rows = [[f"validation {key}", value] for key, value in report["valid"].items()]
    rows += [["parameters", f"{report['parameters']:,}"]]
    if report["epochs"]:
        rows += [["epochs (best)", f"{report['epochs']} ({report['best_epoch'] + 1})"]]
    print_stage(stage, job.json, rows, report)
