"""Options that commands share, and the rendering of results."""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from streamctl.runs import RunDir, Stage


def option(help: str, *names: str, default: Any = None, **limits: Any) -> Any:
    """An option of a command, called as its parameter unless names are given."""
    return typer.Option(default, *names, help=help, **limits)


def switch(help: str, name: str) -> Any:
    """An option that is on where it is given."""
    return typer.Option(False, name, help=help)


def _device(name: str) -> str:
    """A job that works on CPUs joins its processes over gloo, GPUs or none: Accelerate's word."""
    if name == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return name


Run = Annotated[
    Path, typer.Option("--run", help="The run's folder, e.g. runs/beauty.", show_default=False)
]
Config = Annotated[
    Path | None, typer.Option(help="A TOML file with a table for each stage it changes.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value or stage.key=value, as in docs/config.md; repeatable."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random in the stage.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", callback=_device)]
Size = Annotated[str | None, typer.Option(help="Model size: tiny, small or paper.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Redo a complete stage; the old one is kept as NAME.previous."),
]


@dataclass(frozen=True)
class Job:
    """What every command that makes a stage is told beside its own options."""

    run: Path = Path()
    config: Path | None = None
    sets: Sequence[str] = ()
    seed: int | None = None
    device: str = "auto"
    json: bool = False
    force: bool = False

    @property
    def folder(self) -> RunDir:
        from streamctl.runs import RunDir

        return RunDir(self.run)

    def settings(self, cls: type, base: Any = None, **flags: Any) -> Any:
        """A stage's configuration: defaults < `base` < file < `--set` < flags."""
        from streamctl.config import resolve
        from streamctl.progress import warn

        if "seed" in cls.__dataclass_fields__:
            flags["seed"] = self.seed
        settings = resolve(cls, base=base or {}, file=self.config, sets=self.sets, **flags)
        for text in self.sets:
            section, dot, _ = text.partition("=")[0].strip().rpartition(".")
            if dot and section != cls.section:
                warn(f"--set {text} has no effect here: this command makes {cls.section} alone")
        return settings

    def make(self, stage: Callable[..., Any], settings: Any, **options: Any) -> Any:
        """What `stage(run, settings, ...)` makes."""
        return stage(self.folder, settings, device=self.device, force=self.force, **options)


_SHARED = {
    "run": ("run", Run, inspect.Parameter.empty),
    "config": ("config", Config, None),
    "sets": ("set_", Sets, None),
    "seed": ("seed", Seed, None),
    "device": ("device", Device, "auto"),
    "json": ("json_", Json, False),
    "force": ("force", Force, False),
}


def stage_command(*absent: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a command the options of `Job`, which it gets as its first argument.

    What it returns, if anything, is the next step in the place of the one that its help names.

    Args:
        absent: fields of `Job` that this command has no option for.
    """
    shared = [(field, *option) for field, option in _SHARED.items() if field not in absent]

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        hints = typing.get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        parameters = [one.replace(annotation=hints[one.name]) for one in own]
        for _, name, kind, default in shared:
            one = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default,
                                    annotation=kind)  # fmt: skip
            parameters.append(one)
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        parameters.sort(key=lambda one: one.name != "run")  # the others in their order

        @functools.wraps(function)
        def command(**given: Any) -> None:
            told = {field: given.pop(name) for field, name, _, _ in shared}
            job = Job(**told | {"sets": tuple(told.get("sets") or ())})
            step = function(job, **given)
            if step and not job.json:
                typer.echo(f"Next: {step}")
            elif "run" in told and not job.json:
                print_next(function, RUN=job.run)

        command.__signature__ = inspect.Signature(parameters)
        command.__annotations__ = {one.name: one.annotation for one in parameters}
        return command

    return decorate


def print_next(command: Callable[..., None], **names: Any) -> None:
    """What a finished command's help names as the next step.

    Args:
        names: words that stand for RUN and the like: one, or several in a tuple.
    """
    step = " ".join((inspect.getdoc(command) or "").rpartition("Next: ")[2].split())
    for name, value in names.items():
        words = shlex.join(map(str, value if isinstance(value, tuple) else (value,)))
        step = re.sub(rf"\b{name}\b", lambda _, words=words: words, step)
    typer.echo("Next: " + step.replace("`", ""))


def print_json(value: Any) -> None:
    """One JSON object on stdout; other letters than ASCII as codes where stdout is not UTF-8."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(value, indent=1, ensure_ascii=ascii_only))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stdout; numbers with four decimals, everything but the first column right.

    Where it is wider than the terminal its cells break into lines, short names last of all.
    """
    from rich.table import Table

    from streamctl.progress import NAME_WIDTH, plain_console

    console, table = plain_console(), Table()
    whole = all(len(str(row[0])) <= NAME_WIDTH for row in rows)
    for index, column in enumerate(columns):
        first = index == 0
        justify = "left" if first else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=first and whole)
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    console.print(title, style="italic", soft_wrap=True)  # longer than a narrow table, too
    console.print(table)


def print_stage(stage: Stage, json_: bool, rows: list[list[Any]], report: Any = None) -> None:
    """A finished stage: its report as JSON, or `rows` and the time it took as a table."""
    if json_:
        print_json(report or {"stage": stage.name, **stage.json("report.json")})
        return
    seconds = ["seconds", f"{stage.manifest['wall_s']:.0f}"]
    print_table(f"{stage.path}", ["", "value"], [*rows, seconds])


def training_rows(report: dict[str, Any]) -> list[list[Any]]:
    """Of a stage's report: ndcg@10 on validation users for each way of answering, how many epochs
    (or steps) were trained and, epochs counted from 1, which was kept."""
    rows: list[list[Any]] = [
        [f"validation ndcg@10, {name}", metrics["ndcg@10"]]
        for name, metrics in report["valid"].items()
    ]
    if "steps" in report:
        return [*rows, ["steps (best)", f"{report['steps']} ({report['best_step']})"]]
    return [*rows, ["epochs (best)", f"{report['epochs']} ({report['best_epoch'] + 1})"]]
