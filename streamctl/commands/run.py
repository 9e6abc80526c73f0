"""`streamctl run`: every stage of a run."""

from __future__ import annotations

from streamctl.commands.options import Job, Size, stage_command


@stage_command("force")
def command(job: Job, size: Size = None) -> None:
    """Run every stage that is not complete yet, from tokenize to eval.

    Of the baselines it trains transitions, knn, ranker and tiger.

    Reads: the data stage of the run. Writes: every other stage folder.
    Interrupt it at any time; the same command continues.
    Example: `streamctl run --run runs/mine --size tiny --set tokenize.encoder=tfidf`.
    Next: `streamctl recommend --run RUN --user ID`, `streamctl refit --run RUN`, and then
    `streamctl serve --run RUN`.
    """
    from streamctl.commands.eval import render
    from streamctl.config import STAGES
    from streamctl.errors import UsageError
    from streamctl.pipeline import Settings, run_all

    for text in job.sets:
        if "." not in text.partition("=")[0]:
            own = [stage.section for stage in STAGES if text.partition("=")[0] in vars(stage)]
            such = f"{own[0]}.{text}" if own else "sft.lr=1e-3"
            raise UsageError(f"--set {text}: `run` takes stage.key=value, such as {such}")
    settings = Settings(file=job.config, sets=job.sets, seed=job.seed, size=size)
    render(run_all(job.folder, settings, device=job.device), job.json)
