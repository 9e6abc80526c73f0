"""`streamctl rl`: stage 3, GRPO."""

from __future__ import annotations

from streamctl.commands.options import (
    Config,
    Device,
    Force,
    Json,
    Run,
    Seed,
    Sets,
    print_stage,
    valid_rows,
)


def command(
    run: Run,
    config: Config = None,
    set_: Sets = None,
    seed: Seed = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Stage 3: sharpen the thoughts by GRPO on five rewards (Eqs. 20-27), guarded by validation.

    Reads: the data, tokenizer, annotate and sft stages. Writes: RUN/rl: the policy of the best
    step (SFT's own where no step was better), report.json, metrics.jsonl with each reward.
    Interrupt it; the same command continues.
    Example: `streamctl rl --run runs/mine --set steps=50`.
    Next: `streamctl eval --run RUN`.
    """
    from streamctl.config import RlConfig, resolve
    from streamctl.runs import RunDir
    from streamctl.training.rl import rl

    settings = resolve(RlConfig, file=config, sets=set_ or (), seed=seed)
    stage = rl(RunDir(run), settings, device=device, force=force)
    report = stage.json("report.json")
    rows = [*valid_rows(report), ["steps (best)", f"{report['steps']} ({report['best_step']})"]]
    print_stage(stage, json_, rows)
