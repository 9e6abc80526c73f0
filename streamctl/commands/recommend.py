"""`streamctl recommend`: one history in the terminal with its reasoning, or a file of users."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamctl.commands.options import Device, Json, Run, option, print_json, print_table, switch
from streamctl.config import MAX_K, MAX_THINK

if TYPE_CHECKING:
    from streamctl.recommender import Recommender

SHOWN = 20  # latest items of a history
TITLE = 50  # characters of a title in the lines of a thought
COMMAS = (
    "if an id holds a comma, give --history once for each id, or --history @FILE with an id a line"
)


def command(
    run: Run,
    user: str | None = option("A user of the log."),
    history: list[str] | None = option(
        "Item ids, oldest first, separated by commas; or the option once an id; or @FILE with an "
        "id a line."
    ),
    k: int = option("How many items.", "-k", "--k", default=10, min=1, max=MAX_K),
    think: int | None = option(
        "Pieces of evidence to think with (default: as trained).", min=0, max=MAX_THINK
    ),
    diversity: float = option(
        "0 to 1: make the list's items less alike.", default=0.0, min=0, max=1
    ),
    method: str | None = option("What answers (default: the best on validation)."),
    keep_seen: bool = switch("Recommend items of the history, too.", "--keep-seen"),
    input_: Path | None = option(
        "Parquet of users (user_id or history), or a folder of such.", "--input"
    ),
    output: Path | None = option("Parquet of their answers, or a folder of such."),
    on: str | None = option("ray: on a Ray cluster (default: here).", metavar="ray"),
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Recommend for one user or history and show what the model thought, or for a file of users.

    Each piece of evidence that was thought of is shown in words, with the ranking after it.

    A file's answers stand in the order of its rows; a row that has none says why in `problem`.
    Stopped and called again it goes on; `torchrun --nproc-per-node N -m -- streamctl recommend ...`
    shares the rows among N workers, `--on ray` among those of a Ray cluster.

    Reads: the stages of the method that answers; with --input, a parquet with a column user_id or
    history (item ids, oldest first), or all of a folder.
    Writes: nothing, or what --output names.
    Example: `streamctl recommend --run runs/mine --history i4,i7 -k 5`.
    Next: `streamctl serve --run RUN` answers the same over HTTP.
    """
    from streamctl.api import load
    from streamctl.errors import StreamctlError, UsageError
    from streamctl.runs import RunDir

    chosen = [
        name
        for name, given in (("--user", user), ("--history", history), ("--input", input_))
        if given
    ]
    if len(chosen) != 1:
        given = " and ".join(chosen) or "none of them"
        raise UsageError(
            f"give one of --user, --history and --input, not {given}",
            run="`streamctl recommend --help` has an example of each",
        )
    if (input_ is None) != (output is None):
        raise UsageError(
            "--input and --output go together", run="--input USERS.parquet --output ANSWERS.parquet"
        )
    if on not in (None, "ray"):
        raise UsageError(f"--on {on}: it takes ray", run="--on ray")
    if on and input_ is None:
        raise UsageError("--on ray goes with --input", run="--input USERS.parquet")
    if input_ is not None:
        from streamctl.bulk import recommend_files

        summary = recommend_files(
            RunDir(run), input_, output, method=method, device=device, on_ray=on == "ray",
            k=k, think=think, diversity=diversity, keep_seen=keep_seen,
        )  # fmt: skip
        if json_:
            print_json(summary)
        else:
            alone = summary["world_size"] == 1
            rows = [
                [name, value]
                for name, value in summary.items()
                if not (alone and name in ("rank", "world_size"))
            ]
            print_table("Bulk recommendations", ["", "value"], rows)
        return
    ids = history and history_ids(history)
    recommender = load(run, method, device=device)
    options = {"k": k, "think": think, "diversity": diversity, "keep_seen": keep_seen}
    try:
        answer = ask(recommender, ids, user, shorten=None if json_ else TITLE, **options)
    except StreamctlError as error:
        if ids and ids[0] != history[0] and "," in history[0] and "catalogue" in error.what:
            raise StreamctlError(error.what, run=COMMAS) from error
        raise
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
        raise UsageError(
            f"--history {value}: cannot be read: {reason}",
            run="--history @FILE with a text file of item ids, one a line",
        ) from error
    return [line.strip() for line in lines if line.strip()]


def ask(
    recommender: Recommender, history: list[str] | None, user: str | None, *,
    shorten: int | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """History, thought and answer; `before` is the answer without a thought.

    Args:
        shorten: characters of a title in the thought's lines; None: all.
    """
    from streamctl.recommender import shortened

    think = options.get("think")
    read = recommender.history(user) if history is None else recommender.named(history)
    items = before = recommender.recommend(history, user=user, **options)
    told = {key.decode(): value.decode() for key, value in items.schema.metadata.items()}
    if "note" not in told:
        without = options | {"think": 0, "k": 10}
        before = recommender.recommend(history, user=user, **without)
    thought = recommender.explain(history, user=user, think=think, shorten=shorten)
    tables = {"history": read, "items": items, "before": before, "thought": thought}
    lists = {name: table.to_pylist() for name, table in tables.items()}
    told_of = {item["item_id"] for item in lists["items"]}  # of a method that does not think
    lists["thought"] = [
        step for step in lists["thought"] if step["ranking"] or step["item_id"] in told_of
    ]
    for step in lists["thought"]:  # the title of what would be first if it ended there
        best = recommender.named((step["ranking"] or [])[:1])["title"].to_pylist()
        step["first"] = shortened(best[0], shorten) if best else None
    return {"run": recommender.run.resolve().name, "note": None, **told, **lists}


def show(answer: dict[str, Any]) -> None:
    """Print history, thought and ranking."""
    from rich.table import Table

    from streamctl.data import POPULAR
    from streamctl.progress import plain_console

    console = plain_console()
    by = f"({answer['method']} of {answer['run']})"
    if answer["history"]:
        console.print(f"History {by}", style="bold")
    for item in answer["history"][-SHOWN:]:
        console.print(f"  {item['title']}  ({item['item_id']})")
    thought = answer["thought"]
    if answer["history"]:
        thinks = any(step["ranking"] for step in thought)
        aside = f"What the log says of these items ({answer['method']} did not think)"
        title = "Thought" if thinks else aside if thought else "No thought"
        console.print(title, style="bold")
    before = [item["item_id"] for item in answer["before"]]
    for number, step in enumerate(thought, 1):
        console.print(f"  {number}. {step['reason']}{share(step['weight'])}")
        if ranking := step["ranking"]:
            new = sum(item not in before for item in ranking)
            items = "item" if new == 1 else "items"
            told = f"{new} {items} entered the top {len(ranking)}"
            console.print(f"        top item now: {step['first']}; {told}", style="dim")
            before = ranking
    title = "Recommended" if answer["history"] else f"Recommended {by}"
    table = Table(title=title, title_justify="left")
    for name in ("", "item", "title", "score"):
        table.add_column(name, justify="right" if name in ("", "score") else "left")
    counts = answer["method"] == POPULAR
    for place, item in enumerate(answer["items"], 1):
        score = f"{item['score']:.{0 if counts else 3}f}"
        table.add_row(str(place), item["item_id"], item["title"], score)
    console.print(table)


def share(weight: float | None) -> str:
    """` (23%)`, ` (<1%)`; nothing of a step without a weight."""
    if weight is None:
        return ""
    return " (<1%)" if weight < 0.01 else f" ({weight:.0%})"


def show_first_user(run: Path, *, device: str) -> None:
    """The reasoning for the log's first user (what `demo` ends with)."""
    from streamctl.api import load

    recommender = load(run, device=device)
    show(ask(recommender, None, recommender.users[0], shorten=TITLE))
