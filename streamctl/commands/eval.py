"""`streamctl eval`: the table of every method and control in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from streamctl.commands.options import Config, Device, Force, Json, Run, Seed, Sets, print_json

if TYPE_CHECKING:
    from streamctl.config import EvalConfig
    from streamctl.runs import RunDir, Stage


def command(
    run: Run,
    split: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--split", help="test (default) or valid."),
    ] = None,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--methods", help="Rows of the table, comma-separated; default: all."),
    ] = None,
    beam: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--beam", help="Width of the search over codes; default 50.", min=1),
    ] = None,
    users: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--users", help="Evaluate a seeded sample of so many; 0: everyone.", min=0),
    ] = None,
    decode: Annotated[
        str, typer.Option("--decode", help="beam, or exact: what beams lose to the true top-k.")
    ] = "beam",
    think_curve: Annotated[
        bool,
        typer.Option("--think-curve", help="ndcg@10 against milliseconds by thought and beam."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if the think labels have collapsed.")
    ] = False,
    seed: Seed = None,
    config: Config = None,
    set_: Sets = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Rank the whole catalogue by every method and control in the run, and compare them.

    recall@k is also known as HR@k: each target is looked for alone. Figures with seen items left
    in and masked are both given. Redone by itself when a stage it reads has changed.

    `--decode exact` instead compares beams of 20 and 50 with best-first search of the whole
    catalogue, and `--think-curve` measures thoughts of 0, 1, 2, 4, ... and their
    controls; both on 1,000 users unless --users says otherwise.

    Reads: data and every trained stage. Writes: RUN/eval (metrics.json, ranks, plots as PNG),
    RUN/beam-losses (losses.json), RUN/think-curve (points.json, think-curve.png).
    Example: `streamctl eval --run runs/mine --methods stream_sft,ranker`.
    Next: `streamctl recommend --run RUN --user ID`.
    """
    from streamctl.config import EvalConfig, resolve
    from streamctl.errors import UsageError
    from streamctl.evaluation.stage import evaluate_run
    from streamctl.runs import RunDir

    settings = resolve(
        EvalConfig,
        file=config,
        sets=set_ or (),
        split=split,
        methods=methods,
        beam=beam,
        users=users,
        seed=seed,
    )
    if decode not in ("beam", "exact"):
        raise UsageError(f"unknown --decode {decode!r}; known: beam, exact")
    if decode == "exact" or think_curve:
        _measure(RunDir(run), settings, device, json_, think_curve)
        return
    stage = evaluate_run(RunDir(run), settings, device=device, force=force)
    render(stage, json_, strict=strict)


def _measure(run: RunDir, settings: EvalConfig, device: str, json_: bool, curve: bool) -> None:
    """The think curve, or exact search beside beams."""
    from streamctl.evaluation import curve as curves

    measure, name, show = (
        (curves.think_curve, "points.json", curves.show_curve)
        if curve
        else (curves.beam_losses, "losses.json", curves.show_losses)
    )
    stage = measure(run, settings, device=device)
    if json_:
        print_json(stage.json(name))
        return
    show(stage.json(name))
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
            run=RunDir(stage.root).again("annotate", ["annotate.fit_epochs=0"]),
        )
