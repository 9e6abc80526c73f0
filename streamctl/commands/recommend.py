"""`streamctl recommend`: one history in the terminal with its reasoning, or a file of users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from streamctl.commands.options import Device, Json, Run, print_json, print_table

if TYPE_CHECKING:
    from streamctl.runs import RunDir
    from streamctl.serving.schemas import Query


def command(
    run: Run,
    user: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option("--user", help="A user of the log."),
    ] = None,
    history: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--history",
            help="Item ids, oldest first, separated by commas; or the option once an id; or "
            "@FILE with an id a line.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Items wanted.", min=1, max=1000)] = 10,
    think: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--think", help="Think tokens [default: as trained].", min=0, max=64),
    ] = None,
    diversity: Annotated[
        float,
        typer.Option("--diversity", help="0 to 1: make the list's items less alike.", min=0, max=1),
    ] = 0.0,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--method", help="What answers [default: the best on validation]."),
    ] = None,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Recommend items of the history, too.")
    ] = False,
    input_: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--input", help="Parquet of users to answer in bulk (user_id or history)."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--output", help="Where the bulk answers go, as parquet."),
    ] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Recommend for one user or history and show what the model thought, or for a file of users.

    Each piece of evidence that was thought of is shown in words, with the ranking after it.

    A file's answers stand in the order of its rows; a row that has none says why in `problem`.
    Stopped and called again it goes on; `torchrun --nproc-per-node N -m -- streamctl recommend ...`
    shares the rows among N workers.

    Reads: what `streamctl serve` answers with, or --method, and what came while it served; with
    --input, a parquet with a column user_id or history (item ids, oldest first).
    Writes: nothing, or the file that --output names.
    Example: `streamctl recommend --run runs/mine --history i4,i7 -k 5`.
    Next: `streamctl serve --run RUN` answers the same over HTTP.
    """
    from streamctl.errors import UsageError
    from streamctl.runs import RunDir

    chosen = [
        name
        for name, given in (("--user", user), ("--history", history), ("--input", input_))
        if given
    ]
    if len(chosen) != 1:
        given = " and ".join(chosen) or "none of them"
        raise UsageError(f"give one of --user, --history and --input, not {given}")
    if (input_ is None) != (output is None):
        raise UsageError("--input and --output go together")
    folder = RunDir(run)
    query: dict[str, Any] = {
        "k": k,
        "exclude_seen": not keep_seen,
        "method": method or "auto",
        "diversity": diversity,
    }
    query["think"] = "auto" if think is None else think
    if input_ is not None:
        from streamctl.serving.bulk import recommend_file

        question = checked(user_id="of each row", **query)
        summary = recommend_file(folder, input_, output, question, device=device)
        print_json(summary) if json_ else show_summary(summary)
        return
    if user is not None:
        query["user_id"] = user
    else:
        query["history"] = history_ids(history)
    answer = ask(folder, query, device)
    print_json(answer) if json_ else show(answer)


def history_ids(values: list[str]) -> list[str]:
    """Item ids of `--history`: one value is split at commas, several are an id each.

    Raises:
        UsageError: a file of ids that cannot be read.
    """
    from streamctl.errors import UsageError

    if len(values) > 1:
        return values
    value = values[0]
    if not value.startswith("@"):
        return [item.strip() for item in value.split(",") if item.strip()]
    try:
        lines = Path(value[1:]).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise UsageError(f"--history {value}: cannot be read: {reason}") from error
    return [line.strip() for line in lines if line.strip()]


def checked(**fields: Any) -> Query:
    """A query whose values are within their limits; otherwise a UsageError names the option."""
    from pydantic import ValidationError

    from streamctl.errors import UsageError
    from streamctl.serving.schemas import Query

    try:
        return Query(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        name = first["loc"][0] if first["loc"] else "query"
        raise UsageError(f"--{name}: {first['msg']}") from error


def show_summary(summary: dict[str, Any]) -> None:
    """What a bulk job, or this worker's share of it, did."""
    rows = [[name, value] for name, value in summary.items()]
    print_table("Bulk recommendations", ["", "value"], rows)


def ask(run: RunDir, query: dict[str, Any], device: str) -> dict[str, Any]:
    """One explained answer of the engine, with the history it was given."""
    from streamctl.errors import StreamctlError
    from streamctl.serving.engine import Engine
    from streamctl.serving.question import as_job, in_words
    from streamctl.serving.store import Refused, Store

    question = checked(explain=True, **query)
    method = None if question.method == "auto" else question.method
    engine = Engine(run, Store(run), method=method, device=device)
    try:
        job = as_job(question, engine.store, engine.about())
    except Refused as error:
        raise StreamctlError(str(error), where=run.path) from error
    [answer] = engine.answer([job.details], *job.group)
    read = job.details["history"][-engine.about()["history"] :]
    return {
        **in_words(answer, engine.store),
        "note": answer["note"] or job.note,
        "run": engine.about()["run"],
        "history": engine.store.describe(read),
    }


def show(answer: dict[str, Any]) -> None:
    """Print history, thought and ranking."""
    from rich.table import Table

    from streamctl.progress import plain_console

    console = plain_console()
    console.print(f"History ({answer['method']} of {answer['run']})", style="bold")
    for item in answer["history"]:
        console.print(f"  {item['title']}  ({item['id']})")
    told = answer["explain"] or {"before": [], "steps": []}
    console.print("Thought" if told["steps"] else answer["note"] or "No thought", style="bold")
    before = [item["id"] for item in told["before"]]
    for number, step in enumerate(told["steps"], 1):
        share = "" if step["weight"] is None else f" ({step['weight']:.0%})"
        console.print(f"  {number}. {step['text']}{share}")
        ranking = [item["id"] for item in step["ranking"]]
        new = [item for item in ranking if item not in before]
        top = step["ranking"][0]["title"] if ranking else "-"
        console.print(f"        now first: {top}; {len(new)} new among {len(ranking)}", style="dim")
        before = ranking
    table = Table(title="Recommended", title_justify="left")
    for name in ("", "item", "title", "score"):
        table.add_column(name, justify="right" if name in ("", "score") else "left")
    for place, item in enumerate(answer["items"], 1):
        row = (str(place), item["id"], item["title"], f"{item['score']:.3f}")
        table.add_row(*row)
    console.print(table)


def show_first_user(run: RunDir, *, device: str) -> None:
    """The reasoning for the log's first user (what `demo` ends with)."""
    from streamctl.data import load_data

    _, split = load_data(run)
    show(ask(run, {"user_id": split.log.user_ids[0]}, device))
