"""`streamctl eval`: the table of every method and control in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from streamctl.commands.options import Job, option, print_json, print_table, stage_command, switch

if TYPE_CHECKING:
    from streamctl.config import EvalConfig
    from streamctl.runs import Stage


@stage_command()
def command(
    job: Job,
    split: str | None = option("test (default) or valid."),
    methods: str | None = option("Rows to evaluate, comma-separated; default: all."),
    beam: int | None = option("Width of the search over codes; default 50.", min=1),
    users: int | None = option(
        "Evaluate a seeded sample of this many users; 0: all. --think-curve and "
        "--decode exact then take 1,000.",
        min=0,
    ),
    decode: str = option("beam, or exact: what beams lose to the true top-k.", default="beam"),
    think_curve: bool = switch("ndcg@10 by milliseconds, thought and beam.", "--think-curve"),
    strict: bool = switch("Exit with 1 if the think labels have collapsed.", "--strict"),
) -> str | None:
    """Rank the whole catalogue by every method and control in the run, and compare them.

    recall@k is also known as HR@k: each target counts alone. Figures are given with seen items
    left in and masked. Rows are evaluated again when a stage that they read has changed; those
    that still hold stay in the table, whatever --methods asks for.

    `--decode exact` instead compares beams of 20 and 50 with an exact search of the whole
    catalogue, and `--think-curve` measures thoughts of 0, 1, 2, 4, ... and their
    controls; both on 1,000 users unless --users says otherwise.

    Reads: data and every trained stage. Writes: RUN/eval (metrics.json, ranks, a plot),
    RUN/beam-losses (losses.json), RUN/think-curve (points.json, think-curve.png).
    Example: `streamctl eval --run runs/mine --methods stream_sft,ranker`.
    Next: `streamctl recommend --run RUN --user ID`, `streamctl refit --run RUN`.
    """
    from streamctl.config import EvalConfig
    from streamctl.errors import UsageError
    from streamctl.evaluation.methods import answering, method_names
    from streamctl.evaluation.stage import evaluate_run

    settings = job.settings(EvalConfig, split=split, methods=methods, beam=beam, users=users)
    if decode not in ("beam", "exact"):
        raise UsageError(f"unknown --decode {decode!r}; known: beam, exact")
    if decode == "exact" and think_curve:
        raise UsageError(
            "--decode exact and --think-curve are measurements of their own", run="one of them"
        )
    if decode == "exact" or think_curve:
        _measure(job, settings, think_curve)
    else:
        stage = job.make(evaluate_run, settings)
        render(stage, job.json, strict=strict)
        folder, name, _ = answering(job.folder)
        if not job.json and name != (stage.manifest["winner"] or {}).get("method", name):
            again = f"`{job.folder.command('final')} --force`"
            typer.echo(f"but {folder.path} was asked for and answers by {name}; {again} ends that")
        if method_names(job.folder) == ["popularity"]:
            return f"{job.folder.command('run')}, which trains every stage"
    return None


def _measure(job: Job, settings: EvalConfig, curve: bool) -> None:
    """The think curve, or exact search beside beams."""
    from streamctl.evaluation import curve as curves

    measure, name, rows_of = (
        (curves.think_curve, "points.json", curves.curve_rows)
        if curve
        else (curves.beam_losses, "losses.json", curves.loss_rows)
    )
    stage = measure(job.folder, settings, device=job.device)
    result = stage.json(name)
    if job.json:
        print_json(result)
        return
    title = f"{result['stage']}, {result['split']} split, {result['users']:,} users"
    print_table(title, *rows_of(result))
    if curve:
        typer.echo(f"plot: {stage.path / 'think-curve.png'}")


def render(stage: Stage, json_: bool, *, strict: bool = False) -> None:
    """Print a finished evaluation, as a table or as one JSON object.

    Raises:
        StreamctlError: `strict`, and the think labels have collapsed.
    """
    from streamctl.errors import StreamctlError
    from streamctl.evaluation.report import show
    from streamctl.evaluation.stage import read_result
    from streamctl.runs import RunDir

    result = read_result(stage)
    if json_:
        print_json(result)
    else:
        show(result)
        typer.echo(f"plots: {', '.join(str(path) for path in sorted(stage.path.glob('*.png')))}")
    if strict and result["collapsed"]:
        raise StreamctlError(
            "the think labels have collapsed",
            where=stage.root,
            run=RunDir(stage.root).stage("annotate").again(["annotate.fit_epochs=0"]),
        )
