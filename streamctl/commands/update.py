"""`streamctl update`: continue an older run on a newer log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamctl.commands.options import Job, print_json, stage_command


@stage_command("force")
def command(job: Job, old: Annotated[Path, typer.Argument(help="The run to go on from.")]) -> None:
    """Continue an older run on a newer log: codes stay, weights train on.

    Items that both know keep their codes, new ones get free codes by their text. Pretraining
    goes on for a few epochs, with the settings of the older run; what follows is made from it.
    To see what that is worth, train another run anew and compare `eval` of both.

    Reads: OLD; data of the run (`data prepare` of the newer log). Writes: RUN/tokenizer and the
    stages of OLD that do not know single items.
    Interrupt it at any time; the same command continues.
    Example: `streamctl update runs/june --run runs/july --set pretrain.epochs=2`.
    Next: `streamctl eval --run RUN`, and then `streamctl refit --run RUN`.
    """
    from streamctl.evaluation.update import update
    from streamctl.runs import RunDir

    made = update(
        RunDir(old), job.folder, file=job.config, sets=job.sets, seed=job.seed, device=job.device
    )
    if job.json:
        print_json({"run": str(job.run), "stages": made})
    else:
        typer.echo(f"{job.run}: {', '.join(made)}")
