"""`streamctl eval`: the table of every method and control in a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from streamctl.commands.options import Config, Device, Force, Json, Run, Seed, Sets, print_json

if TYPE_CHECKING:
    from streamctl.runs import Stage


def command(
    run: Run,
    split: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--split", help="test (default) or valid."),
    ] = None,
    methods: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--methods", help="Rows to evaluate, comma-separated; default: all."),
    ] = None,
    beam: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--beam", help="Width of the search over codes; default 50.", min=1),
    ] = None,
    users: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--users", help="Evaluate a seeded sample of so many; 0: everyone.", min=0),
    ] = None,
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

    recall@k is also known as HR@k: each user has one target. Figures with seen items left in and
    masked are both given. Redone by itself when a stage it reads has changed.

    Reads: data and every trained stage. Writes: RUN/eval (metrics.json, ranks, plots as PNG).
    Next: `streamctl recommend --run RUN --user ID`.
    """
    from streamctl.config import EvalConfig, resolve
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
    stage = evaluate_run(RunDir(run), settings, device=device, force=force)
    render(stage, json_, strict=strict)


def render(stage: Stage, json_: bool, *, strict: bool = False) -> None:
    """Print a finished evaluation, as a table or as one JSON object.

    Raises:
        StreamctlError: `strict`, and the think labels have collapsed.
    """
    from streamctl.errors import StreamctlError
    from streamctl.evaluation.report import show
    from streamctl.evaluation.stage import read_result

    result = read_result(stage)
    if json_:
        print_json(result)
    else:
        show(result)
        typer.echo(f"plots: {', '.join(str(path) for path in sorted(stage.path.glob('*.png')))}")
    if strict and result["collapsed"]:
        raise StreamctlError(
            "the think labels have collapsed",
            where=stage.run.path,
            run=f"streamctl annotate --run {stage.run.path} --set mode=normalised --force",
        )
