"""`streamctl rl`: stage 3, GRPO on the thoughts."""

from __future__ import annotations

from streamctl.commands.options import Job, print_stage, stage_command, training_rows


@stage_command()
def command(job: Job) -> None:
    """Stage 3: sharpen the thoughts by GRPO (Eqs. 20-27), guarded by validation.

    Reads: the data, tokenizer, annotate and sft stages. Writes: RUN/rl: the policy of the best
    step (SFT's own where no step was better), report.json, metrics.jsonl with each reward.
    Interrupt it; the same command continues.
    Example: `streamctl rl --run runs/mine --set steps=50`.
    Next: `streamctl eval --run RUN`.
    """
    from streamctl.config import RlConfig
    from streamctl.training.rl import rl

    stage = job.make(rl, job.settings(RlConfig))
    print_stage(stage, job.json, training_rows(stage.json("report.json")))
