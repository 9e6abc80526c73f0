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
        str,
        typer.Option(
            "--columns", help="user=NAME,item=NAME,time=NAME,rating=NAME,event=NAME, if unusual."
        ),
    ] = "",
    items: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--items", help="The file that describes the items, if it lies elsewhere."),
    ] = None,
    skip_bad: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--skip-bad", help="Share of bad lines that are left out and listed [0]."),
    ] = None,
    ids: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--ids", help="exact, or number: 7, 7.0, 007 and ' 7' are the same id."),
    ] = None,
    since: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--since", help="Leave out what is before: a date, or the log's own number."),
    ] = None,
    until: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--until", help="Leave out what is after."),
    ] = None,
    min_rating: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option("--min-rating", help="Leave out lower ratings, and rows without one."),
    ] = None,
    events: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--events", help="Kinds to keep: view,cart,buy or view=0.1,cart=0.3,buy=1."),
    ] = None,
    drop_repeats: Annotated[
        bool, typer.Option("--drop-repeats", help="One of rows equal in user, item and time.")
    ] = False,
    one_per_item: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--one-per-item", help="first or last: one interaction of each user, item."),
    ] = None,
    described: Annotated[
        bool, typer.Option("--described", help="Only the items that the items file describes.")
    ] = False,
    max_per_user: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--max-per-user", help="The latest interactions that are kept of a user."),
    ] = None,
    min_user: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--min-user", help="Interactions a user needs [5 with times, else 3]."),
    ] = None,
    min_item: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--min-item", help="Interactions an item needs [5 with times, else 1]."),
    ] = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--split", help="auto (the source's own parts, else leave-one-out) or leave-one-out."
        ),
    ] = None,
    split_at: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--split-at", help="Where test begins, or VALIDATION,TEST: dates, or 80%,90%."
        ),
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
    """Clean and filter a log, order it by time, number its items, and split it.

    Formats: table (csv, tsv, parquet, jsonl + items), sequences (user_sequence.txt), recbole,
    amazon2023, amazon (2014 and 2018 json.gz), movielens, lcrec; .gz and .zst are read as they
    are. A log with times gets the iterated 5-core filter, one in order only is left as it is.
    The catalogue holds the items that are left; --min-item 0 keeps the others, too.

    The split is leave-one-out, or that of the source where it comes in parts (NAME.train.csv,
    NAME.valid.csv and NAME.test.csv, RecBole's NAME.train.inter ..., or train.csv ...), or at
    moments (--split-at), so that nobody's future is in anybody's training. Weights of --events
    count in popularity.

    Reads: SOURCE. Writes: data/ of the run: interactions, users, items and statistics.
    Example: `streamctl data prepare sales.csv --items goods.csv --run runs/mine`.
    Next: `streamctl tokenize --run RUN`, or `streamctl run --run RUN` for every stage.
    """
    from streamctl.config import DataConfig, resolve
    from streamctl.data import prepare
    from streamctl.data.sources import parse_columns
    from streamctl.errors import UsageError
    from streamctl.runs import RunDir

    if drop_repeats and one_per_item:
        raise UsageError("--one-per-item also drops what --drop-repeats does; give one of them")
    if split and split_at:
        raise UsageError("give --split or --split-at, not both")
    repeats = "drop" if drop_repeats else one_per_item
    settings = resolve(
        DataConfig,
        file=config,
        sets=set_ or (),
        source=str(source),
        format=format_,
        items=None if items is None else str(items),
        skip_bad=skip_bad,
        ids=ids,
        since=since,
        until=until,
        min_rating=min_rating,
        events=events,
        repeats=repeats,
        described=described or None,
        max_per_user=max_per_user,
        min_user=min_user,
        min_item=min_item,
        split=split_at or split,
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
            ("valid_targets", "validation targets"),
            ("test_targets", "test targets"),
            ("repeats", "repeated (user, item)"),
            ("tied_neighbours", "neighbours at equal times"),
            ("test_id_above_valid_id", "P(test id > valid id)"),
        )
    ]
    removed = facts["removed"]
    rows.append([f"users lost (min-user {removed['min_user']})", _text(removed["users"]), ""])
    rows.append([f"items lost (min-item {removed['min_item']})", _text(removed["items"]), ""])
    rows += [[f"taken out by {rule}", _text(n), ""] for rule, n in facts["cleaned"].items()]
    rows += [[f"bad lines of {file}", _text(n), ""] for file, n in facts["bad_lines"].items()]
    columns = ["", "here", "published" if published else ""]
    print_table(f"{facts['source']} ({facts['format']})", columns, rows)


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)
