"""`streamctl sft`: stage 2."""

from __future__ import annotations

from typing import Annotated

import typer

from streamctl.commands.options import (
    Config,
    Device,
    Force,
    Json,
    Run,
    Seed,
    Sets,
    epochs_row,
    print_stage,
    valid_rows,
)


def command(
    run: Run,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if the think labels have collapsed.")
    ] = False,
    config: Config = None,
    set_: Sets = None,
    seed: Seed = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Stage 2: learn to think, by weighing the evidence of each history (Eqs. 14-19).

    Reads: the data, tokenizer, pretrain and annotate stages. Writes: RUN/sft: the policy, the
    labels of each later round, report.json (self-made, oracle and no thoughts on validation).
    Interrupt it; the same command continues.
    Example: `streamctl sft --run runs/mine --set epochs=4`.
    Next: `streamctl rl --run RUN`.
    """
    from streamctl.config import SftConfig, resolve
    from streamctl.runs import RunDir
    from streamctl.training.sft import sft

    settings = resolve(SftConfig, file=config, sets=set_ or (), seed=seed)
    stage = sft(RunDir(run), settings, device=device, force=force, strict=strict)
    report = stage.json("report.json")
    print_stage(stage, json_, [*valid_rows(report), epochs_row(report)])
