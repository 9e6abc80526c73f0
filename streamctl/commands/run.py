"""`streamctl run`: every stage of a run."""

from __future__ import annotations

from streamctl.commands.options import Config, Device, Json, Run, Seed, Sets, Size


def command(
    run: Run,
    size: Size = None,
    seed: Seed = None,
    config: Config = None,
    set_: Sets = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Run every stage that is not complete, from tokenize to eval, TIGER among them.

    Reads: the data stage of the run. Writes: every other stage folder.
    Interrupt it at any time; the same command continues.
    Example: `streamctl run --run runs/mine --size tiny --set tokenize.encoder=tfidf`.
    Next: `streamctl recommend --run RUN --user ID`, `streamctl serve --run RUN`.
    """
    from streamctl.commands.eval import render
    from streamctl.config import STAGES
    from streamctl.errors import UsageError
    from streamctl.pipeline import Settings, run_all
    from streamctl.runs import RunDir

    for text in set_ or ():
        if "." not in text.partition("=")[0]:
            own = [stage.section for stage in STAGES if text.partition("=")[0] in vars(stage)]
            such = f"{own[0]}.{text}" if own else "sft.lr=1e-3"
            raise UsageError(f"--set {text}: `run` takes stage.key=value, such as {such}")
    settings = Settings(file=config, sets=set_ or (), seed=seed, size=size)
    stage = run_all(RunDir(run), settings, device=device)
    render(stage, json_)
