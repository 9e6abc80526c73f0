"""`streamctl pretrain`: stage 1."""

from __future__ import annotations

from streamctl.commands.options import (
    Config,
    Device,
    Force,
    Json,
    Run,
    Seed,
    Sets,
    Size,
    epochs_row,
    print_stage,
    valid_rows,
)


def command(
    run: Run,
    size: Size = None,
    config: Config = None,
    set_: Sets = None,
    seed: Seed = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Stage 1: train the T5 to write the codes of the next item (Eqs. 9-11).

    The shape of the model (`--size`) is decided here and kept by every later stage.

    Reads: the data and tokenizer stages. Writes: RUN/pretrain: the policy, which loads in
    transformers, report.json, metrics.jsonl. Interrupt it; the same command continues.
    Example: `streamctl pretrain --run runs/mine --size tiny --set epochs=20`.
    Next: `streamctl annotate --run RUN`.
    """
    from streamctl.config import PretrainConfig, resolve
    from streamctl.runs import RunDir
    from streamctl.training.pretrain import pretrain

    settings = resolve(PretrainConfig, file=config, sets=set_ or (), size=size, seed=seed)
    stage = pretrain(RunDir(run), settings, device=device, force=force)
    report = stage.json("report.json")
    print_stage(stage, json_, [*valid_rows(report), epochs_row(report)])
