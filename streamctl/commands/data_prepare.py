"""`streamctl data prepare`: a log and its items -> the data of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamctl.commands.options import Job, option, print_json, print_table, stage_command, switch

if TYPE_CHECKING:
    from streamctl.runs import Stage

Source = Annotated[Path, typer.Argument(help="A folder, or the interactions file.")]
FORMAT = option("Name of the format; detected (auto) unless given.", "--format")
COLUMNS = option("Column names, if unusual: user=NAME,item=NAME,time=NAME,rating=NAME,event=NAME.")
ITEMS = option("File that describes the items, if it is not beside SOURCE.")


@stage_command("device")
def command(
    job: Job,
    source: Source,
    format_: str | None = FORMAT,
    columns: str | None = COLUMNS,
    items: Path | None = ITEMS,
    skip_bad: float | None = option(
        "Largest share of bad lines to leave out and list (default: 0)."
    ),
    ids: str | None = option("exact, or number: 7, 7.0, 007 and ' 7' are the same id."),
    since: str | None = option(
        "Leave out earlier interactions: a date, or a number in the log's unit."
    ),
    until: str | None = option("Leave out later interactions; a day counts to its end."),
    min_rating: float | None = option("Leave out lower ratings, and rows without a rating."),
    events: str | None = option("Kinds to keep: view,cart,buy or view=0.1,cart=0.3,buy=1."),
    drop_repeats: bool = switch("Keep one of rows equal in user, item and time.", "--drop-repeats"),
    one_per_item: str | None = option("first or last: keep one interaction of each user and item."),
    described: bool = switch("Keep only the items that the items file describes.", "--described"),
    max_per_user: int | None = option("Keep at most this many of each user's latest interactions."),
    min_user: int | None = option("Interactions a user needs (default: 5 with times, else 3)."),
    min_item: int | None = option("Interactions an item needs (default: 5 with times, else 1)."),
    split: str | None = option(
        "auto (the source's own parts, else leave-one-out) or leave-one-out."
    ),
    split_at: str | None = option("Where test begins, or VALIDATION,TEST: dates, or 80%,90%."),
    ties: str | None = option(
        "Equal times: keep the input order, or shuffle (seeded); runs: shuffle each run of "
        "ascending item ids of a log without times."
    ),
) -> None:
    """Clean and filter a log, order it by time, number its items, and split it.

    Formats: table (csv, tsv, parquet, jsonl + items), sequences (user_sequence.txt), recbole,
    amazon2023, amazon (2014 and 2018 json.gz), movielens, lcrec; .gz and .zst are read as they
    are. A log with times gets the iterated 5-core filter, one in order only is left as it is.
    The catalogue holds the items that are left; --min-item 0 keeps the others, too.

    The split is leave-one-out, or the source's own if it comes in parts (NAME.train.csv,
    NAME.valid.csv and NAME.test.csv, RecBole's NAME.train.inter ..., or train.csv ...), or by
    time (--split-at), so that training holds nothing later than a test item. Weights of --events
    count in popularity and in the counts of what followed what.

    Reads: SOURCE. Writes: data/ of the run: interactions, users, items and statistics.
    Example: `streamctl data prepare sales.csv --items goods.csv --run runs/mine`.
    Next: `streamctl tokenize --run RUN`, or `streamctl run --run RUN` for every stage.
    """
    from streamctl.config import DataConfig
    from streamctl.data import prepare
    from streamctl.errors import UsageError

    if drop_repeats and one_per_item:
        raise UsageError("--one-per-item also drops what --drop-repeats does; give one of them")
    if one_per_item not in (None, "first", "last"):
        raise UsageError(
            f"--one-per-item is {one_per_item!r}; it takes first or last",
            run="--one-per-item first" if one_per_item != "drop" else "--drop-repeats",
        )
    if split and split_at:
        raise UsageError(
            "give --split or --split-at, not both", run="--split-at alone for moments, else --split"
        )
    settings = job.settings(
        DataConfig, source=source, format=format_, items=items, columns=columns,
        skip_bad=skip_bad, ids=ids, since=since, until=until, min_rating=min_rating, events=events,
        repeats="drop" if drop_repeats else one_per_item, described=described or None,
        max_per_user=max_per_user, min_user=min_user, min_item=min_item, split=split_at or split,
        ties=ties,
    )  # fmt: skip
    render(prepare(job.folder, settings, force=job.force), job.json)


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
