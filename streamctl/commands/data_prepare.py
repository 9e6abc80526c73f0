"""`streamctl data prepare`: a log and its items -> the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from streamctl.commands.options import (
    Config,
    Force,
    Json,
    Run,
    Seed,
    Sets,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from streamctl.runs import Stage


def command(
    source: Annotated[Path, typer.Argument(help="A folder, or the interactions file.")],
    run: Run,
    format_: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--format", help="The reader; found out by itself (auto) unless given."),
    ] = None,
    columns: Annotated[
        str, typer.Option("--columns", help="user=NAME,item=NAME,time=NAME, if unusual.")
    ] = "",
    min_user: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--min-user", help="Interactions a user needs [5 with times, else 3]."),
    ] = None,
    min_item: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--min-item", help="Interactions an item needs [5 with times, else 1]."),
    ] = None,
    ties: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--ties",
            help="Equal times: keep the input order, or shuffle (seeded); runs: shuffle each run "
            "of ascending item ids of a log without times.",
        ),
    ] = None,
    seed: Seed = None,
    config: Config = None,
    set_: Sets = None,
    json_: Json = False,
    force: Force = False,
) -> None:
    """Filter a log, order it by time, number its items, and split it leave-one-out.

    Formats: table (csv, tsv, parquet, jsonl + items), sequences (user_sequence.txt), recbole,
    amazon2023, amazon (2014 and 2018 json.gz), movielens, lcrec; .gz and .zst are read as they
    are. A log with times gets the iterated 5-core filter, one in order only is left as it is.
    The catalogue holds the items that are left; --min-item 0 keeps the others, too.

    Reads: SOURCE. Writes: data/ of the run: interactions, users, items and statistics.
    Next: `streamctl tokenize --run RUN`, or `streamctl run --run RUN` for every stage.
    """
    from streamctl.config import DataConfig, resolve
    from streamctl.data import prepare
    from streamctl.data.sources import parse_columns
    from streamctl.runs import RunDir

    settings = resolve(
        DataConfig,
        file=config,
        sets=set_ or (),
        source=str(source),
        format=format_,
        min_user=min_user,
        min_item=min_item,
        ties=ties,
        seed=seed,
    )
    render(prepare(RunDir(run), settings, columns=parse_columns(columns), force=force), json_)


def render(stage: Stage, json_: bool) -> None:
    """Statistics of a data stage as JSON or as a table, beside the published ones."""
    facts = stage.json("statistics.json")
    if json_:
        print_json(facts)
        return
    published = facts["published"] or {}
    rows = [
        [label, _text(facts[name]), _text(published.get(name, ""))]
        for name, label in (
            ("users", "users"),
            ("items", "items"),
            ("interactions", "interactions"),
            ("mean_length", "mean length"),
            ("sparsity", "sparsity"),
            ("train_prefixes", "train examples"),
            ("repeats", "repeated (user, item)"),
            ("tied_neighbours", "neighbours at equal times"),
            ("test_id_above_valid_id", "P(test id > valid id)"),
        )
    ]
    removed = facts["removed"]
    rows.append([f"users lost (min-user {removed['min_user']})", _text(removed["users"]), ""])
    rows.append([f"items lost (min-item {removed['min_item']})", _text(removed["items"]), ""])
    columns = ["", "here", "published" if published else ""]
    print_table(f"{facts['source']} ({facts['format']})", columns, rows)


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
