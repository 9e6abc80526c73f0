"""`streamctl annotate`: think labels by iterative inference."""

from __future__ import annotations

from streamctl.commands.options import Job, print_stage, stage_command, switch


@stage_command()
def command(
    job: Job, strict: bool = switch("Exit with 1 if the think labels have collapsed.", "--strict")
) -> None:
    """Label the evidence that each training example should think of (Eqs. 12-13).

    Labels that have collapsed are reported in red; `--strict` makes that an error.

    Reads: the data, tokenizer and pretrain stages. Writes: RUN/annotate: thoughts.npy, the heads,
    report.json (targets in the evidence and labelled; with a vocabulary distinct chains,
    perplexity, distance by step).
    Example: `streamctl annotate --run runs/mine`.
    Next: `streamctl sft --run RUN`.
    """
    from streamctl.config import AnnotateConfig
    from streamctl.training.annotate import annotate

    stage = job.make(annotate, job.settings(AnnotateConfig), strict=strict)
    report = stage.json("report.json")
    rows = [["examples", f"{report['examples']:,}"]]
    if "vocabulary" in report:
        distance = ", ".join(f"{d:.3f}" for d in report["distance"])
        rows += [
            ["distinct chains", f"{report['distinct_chains']:,}"],
            [f"perplexity (of {report['vocabulary']} tokens)", f"{report['perplexity']:.1f}"],
            ["distance to the target, s_0 to s_l", distance],
            ["collapsed", "yes" if report["collapsed"] else "no"],
        ]
    else:
        rows += [
            ["target among the user's evidence", f"{report['targets_in_evidence']:.1%}"],
            ["target labelled", f"{report['targets_chosen']:.1%}"],
        ]
    print_stage(stage, job.json, rows)
