"""`streamctl data synth`: a synthetic shop as the data of a run."""

from __future__ import annotations

from streamctl.commands.options import Job, option, stage_command


@stage_command("config", "sets", "device")
def command(
    job: Job,
    users: int = option("Users of the shop.", default=3000),
    items: int = option("Items of the shop, 20 or more.", default=600),
) -> None:
    """Make a synthetic shop whose users follow multi-step projects, as the data of a run.

    A project (watercolour pad, brush set, paints, palette, masking fluid) has steps that other
    projects share, so that what comes next shows in the earlier steps and not in the last item.

    Reads: nothing. Writes: data/ of the run: interactions, users, items and statistics.
    Example: `streamctl data synth --run runs/shop --users 500 --items 120`.
    Next: `streamctl run --run RUN --size tiny --set tokenize.encoder=tfidf`.
    """
    from streamctl.commands.data_prepare import render
    from streamctl.data import synthesize

    stage = synthesize(job.folder, users=users, items=items, seed=job.seed or 0, force=job.force)
    render(stage, job.json)
