"""`streamctl demo`: the whole path on a synthetic shop."""

from __future__ import annotations

from pathlib import Path

from streamctl.commands.options import Device, Json, option, print_next

# Small enough for minutes on two cores; the same stages and code as a real run.
SHOP = {"users": 3000, "items": 600}
SETTINGS = (
    "tokenize.encoder=tfidf",
    "tokenize.codes=32",
    "tokenize.levels=3",
    "pretrain.epochs=8",
    "sft.epochs=14",
    "rl.steps=30",
    "rl.validate_every=10",
    "baseline.epochs=8",
)


def command(
    run: Path = option("Folder to make.", default=Path("runs/demo")),
    seed: int = option("Seed of the shop and of training.", default=0),
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Make a synthetic shop, train every stage on it, and show the table and one user's reasoning.

    Reads: nothing. Writes: a complete run, runs/demo unless told otherwise; minutes on two cores.
    Run it again and it continues or shows the finished run.
    Example: `streamctl demo --run runs/demo`.
    Next: `streamctl serve --run RUN`; with your own log, `streamctl data doctor LOG`.
    """
    from streamctl.commands import eval as eval_command
    from streamctl.commands import recommend as recommend_command
    from streamctl.data import synthesize
    from streamctl.pipeline import Settings, run_all
    from streamctl.runs import RunDir

    folder = RunDir(run)
    if not folder.stage("data").complete:
        synthesize(folder, seed=seed, **SHOP)
    settings = Settings(sets=SETTINGS, seed=seed, size="tiny")
    stage = run_all(folder, settings, device=device)
    eval_command.render(stage, json_)
    if not json_:
        recommend_command.show_first_user(run, device=device)
        print_next(command, RUN=run)
