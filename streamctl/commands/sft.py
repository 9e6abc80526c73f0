"""`streamctl sft`: stage 2, learning to weigh evidence."""

from __future__ import annotations

from streamctl.commands.options import Job, print_stage, stage_command, switch, training_rows


@stage_command()
def command(
    job: Job, strict: bool = switch("Exit with 1 if the think labels have collapsed.", "--strict")
) -> None:
    """Stage 2: learn to think, by weighing the evidence of each history (Eqs. 14-19).

    Reads: the data, tokenizer, pretrain and annotate stages. Writes: RUN/sft: the policy, the
    labels of each later round, report.json (self-made, oracle and no thoughts on validation).
    Interrupt it; the same command continues.
    Example: `streamctl sft --run runs/mine --set epochs=4`.
    Next: `streamctl rl --run RUN`.
    """
    from streamctl.config import SftConfig
    from streamctl.training.sft import sft

    stage = job.make(sft, job.settings(SftConfig), strict=strict)
    print_stage(stage, job.json, training_rows(stage.json("report.json")))
