"""`streamctl evidence`: the thinker that looks up what other users took."""

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
    """Train a state that ranks the catalogue, and the memory of evidence that it looks up.

    The memory holds what users took after every training prefix. A thought is a sequence of
    questions to it, each of another kind; validation users choose which, and how many help.

    Reads: the data and tokenizer stages. Writes: RUN/evidence: the weights, the memory,
    report.json, metrics.jsonl. Interrupt it; the same command continues.
    Next: `streamctl eval --run RUN`, `streamctl recommend --run RUN --evidence --user ID`.
    """
    from streamctl.config import EvidenceConfig, resolve
    from streamctl.decode.questions import VIEWS
    from streamctl.runs import RunDir
    from streamctl.training.evidence import evidence

    settings = resolve(EvidenceConfig, file=config, sets=set_ or (), size=size, seed=seed)
    stage = evidence(RunDir(run), settings, device=device, force=force)
    report = stage.json("report.json")
    memory = report["memory"]
    rows = [
        *valid_rows(report),
        *(
            [f"look-up {number}", f"{question['view']}: {VIEWS[question['view']].asks}"]
            for number, question in enumerate(report["settings"]["questions"], 1)
        ),
        ["look-ups that help", report["look_ups"]],
        ["memory", f"{memory['rows']:,} rows, {memory['bytes'] / 1e6:.0f} MB ({memory['index']})"],
        ["milliseconds a look-up", stage.manifest["search_ms"]],
        epochs_row(report),
    ]
    print_stage(stage, json_, rows)
