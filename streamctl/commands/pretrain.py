"""`streamctl pretrain`: stage 1, a T5 that writes the codes of the next item."""

from __future__ import annotations

from streamctl.commands.options import Job, Size, print_stage, stage_command, training_rows


@stage_command()
def command(job: Job, size: Size = None) -> None:
    """Stage 1: train the T5 to write the codes of the next item (Eqs. 9-11).

    The shape of the model (`--size`) is decided here and kept by every later stage.

    Reads: the data and tokenizer stages. Writes: RUN/pretrain: the policy, which loads in
    transformers, report.json, metrics.jsonl. Interrupt it; the same command continues.
    Example: `streamctl pretrain --run runs/mine --size tiny --set epochs=20`.
    Next: `streamctl annotate --run RUN`.
    """
    from streamctl.config import PretrainConfig
    from streamctl.training.pretrain import pretrain

    stage = job.make(pretrain, job.settings(PretrainConfig, size=size))
    print_stage(stage, job.json, training_rows(stage.json("report.json")))
