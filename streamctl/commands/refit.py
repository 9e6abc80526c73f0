"""`streamctl refit`: the winner trained on all interactions, for production."""

from __future__ import annotations

from streamctl.commands.options import Job, option, print_stage, stage_command


@stage_command("seed")
def command(
    job: Job, method: str | None = option("Another method than the one that won on validation.")
) -> None:
    """Make RUN/final: the winning method on all interactions, held-out ones included.

    Counts and kNN memory are made of all interactions. Weights that depend on no single item stay
    as validation chose them; methods with a vector for each item are trained again, for as many
    epochs as validation found best. `recommend` and `serve` use it from then on. It cannot be
    evaluated, since nothing is held out.

    Reads: data, the eval stage and the winner's stages. Writes: RUN/final.
    Example: `streamctl refit --run runs/mine`.
    Next: `streamctl serve --run RUN`.
    """
    from streamctl.config import RefitConfig
    from streamctl.evaluation.refit import refit

    stage = job.make(refit, job.settings(RefitConfig, method=method))
    report = {key: stage.manifest[key] for key in ("stage", "method", "stages", "wall_s")}
    rows = [["method", report["method"]], ["stages", ", ".join(report["stages"])]]
    print_stage(stage, job.json, rows, report)
