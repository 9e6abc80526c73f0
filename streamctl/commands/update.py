"""`streamctl update`: a newer log goes on from an older run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from streamctl.commands.options import Json, Run, print_json


def command(
    old: Annotated[Path, typer.Argument(help="The run to go on from.")],
    run: Run,
    json_: Json = False,
) -> None:
    """Make the stages of a newer log from an older run's, without training.

    Items that both know keep their codes, new ones get free codes by their text; models of codes
    and evidence keep their weights; counts and memories are of the new log. `eval` shows what
    that is worth, beside what is trained anew in another run.

    Reads: OLD; data of the run (`data prepare` of the newer log). Writes: RUN/tokenizer and the
    stages of OLD that do not know single items.
    Example: `streamctl update runs/june --run runs/july`.
    Next: `streamctl eval --run RUN`, `streamctl refit --run RUN`.
    """
    from streamctl.evaluation.update import update
    from streamctl.runs import RunDir

    made = update(RunDir(old), RunDir(run))
    if json_:
        print_json({"run": str(run), "stages": made})
    else:
        typer.echo(f"{run}: {', '.join(made)}")
