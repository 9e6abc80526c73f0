"""Options that commands share, and the rendering of results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

NAME_WIDTH = 24  # of the longest name in a table that is kept on one line

Run = Annotated[
    Path, typer.Option("--run", help="The run's folder, e.g. runs/beauty.", show_default=False)
]
Config = Annotated[
    Optional[Path],  # noqa: UP045 - Typer reads Optional
    typer.Option("--config", help="A TOML file with a table for each stage it changes."),
]
Sets = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="key=value or stage.key=value, as in docs/config.md; repeatable."),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--seed", help="Seed of everything random in the stage."),
]


def _device(name: str) -> str:
    """A job that works on CPUs joins its processes over gloo, GPUs or none: Accelerate's word."""
    if name == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    return name


Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", callback=_device)
]
Size = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--size", help="Model size: tiny, small or paper."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Redo a complete stage; the old one is kept as NAME.previous."),
]


def print_json(value: Any) -> None:
    """One JSON object on stdout; other letters than ASCII as codes where stdout is not UTF-8."""
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(value, indent=1, ensure_ascii=ascii_only))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table on stdout; numbers with four decimals, everything but the first column right.

    Where it is wider than the terminal its cells break into lines, short names last of all.
    """
    from rich.table import Table

    from streamctl.progress import plain_console

    table = Table(title=title, title_justify="left")
    whole = all(len(str(row[0])) <= NAME_WIDTH for row in rows)
    for index, column in enumerate(columns):
        first = index == 0
        justify = "left" if first else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=first and whole)
    for row in rows:
        table.add_row(*(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row))
    plain_console().print(table)


def print_stage(stage: Any, json_: bool, rows: list[list[Any]]) -> None:
    """A finished training stage: its report as JSON, or `rows` and the time it took as a table."""
    if json_:
        print_json({"stage": stage.name, **stage.json("report.json")})
        return
    seconds = ["seconds", f"{stage.manifest['wall_s']:.0f}"]
    print_table(f"{stage.path}", ["", "value"], [*rows, seconds])


def valid_rows(report: dict[str, Any]) -> list[list[Any]]:
    """ndcg@10 on validation users, a row for each way of answering in a stage's report."""
    return [
        [f"validation ndcg@10, {name}", metrics["ndcg@10"]]
        for name, metrics in report["valid"].items()
    ]


def epochs_row(report: dict[str, Any]) -> list[Any]:
    """How many epochs were trained and, counted from 1, which was kept."""
    return ["epochs (best)", f"{report['epochs']} ({report['best_epoch'] + 1})"]
