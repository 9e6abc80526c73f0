"""`streamctl annotate`: think labels by iterative inference."""

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
    print_stage,
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
    """Label what each training example should think of, by iterative inference (Eqs. 12-13).

    Labels that have collapsed are reported in red; `--strict` makes that an error.

    Reads: the data, tokenizer and pretrain stages. Writes: RUN/annotate: thoughts.npy, the heads,
    report.json (targets in the evidence and labelled; with a vocabulary distinct chains,
    perplexity, distance by step).
    Example: `streamctl annotate --run runs/mine`.
    Next: `streamctl sft --run RUN`.
    """
    from streamctl.config import AnnotateConfig, resolve
    from streamctl.runs import RunDir
    from streamctl.training.annotate import annotate

    settings = resolve(AnnotateConfig, file=config, sets=set_ or (), seed=seed)
    stage = annotate(RunDir(run), settings, device=device, force=force, strict=strict)
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
    print_stage(stage, json_, rows)
