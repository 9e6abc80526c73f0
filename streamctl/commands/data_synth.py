"""`streamctl data synth`: a synthetic shop as the data of a run."""

from __future__ import annotations

from streamctl.commands.options import Force, Json, Run, option, print_next


def command(
    run: Run,
    users: int = option("Users of the shop.", default=3000),
    items: int = option("Items of the shop, 20 or more.", default=600),
    seed: int = option("Seed; the same seed makes the same shop.", default=0),
    json_: Json = False,
    force: Force = False,
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
    from streamctl.runs import RunDir

    render(synthesize(RunDir(run), users=users, items=items, seed=seed, force=force), json_)
    if not json_:
        print_next(command, RUN=run)
