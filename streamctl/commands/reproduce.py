"""`streamctl reproduce`: the whole table, method by method and seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from streamctl.commands.options import (
    Device,
    Json,
    Sets,
    option,
    print_json,
    print_next,
    print_table,
)


def command(
    target: Annotated[
        str, typer.Argument(help="A run's folder, or NAME for runs/NAME, such as beauty.")
    ],
    methods: str | None = option(
        "Comma-separated: popularity, transitions, knn, ranker, caser, gru4rec, bert4rec, "
        "sasrec_bce, sasrec_ce, tiger, stream, letter; default: all."
    ),
    seeds: int = option("Seeds 0..N-1 of each.", default=1, min=1),
    size: str = option("Generative models: tiny, small or paper.", default="small"),
    rerank: bool = option("Show every row re-ranked, too.", "--rerank/--no-rerank", default=True),
    budget: float = option(
        "Start no stage after this many hours; 0: no limit.", default=0.0, min=0
    ),
    save: Path | None = option("Copy table-NAME.json and NAME/ (receipts) to this folder."),
    check: Path | None = option("Make what this receipt describes again, and compare."),
    set_: Sets = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Train and evaluate every method with every seed, and print the table.

    `stream` gives STREAM-Rec after each stage and its controls, `letter` the same by the paper's
    letter (thoughts from the vocabulary, retrieval by the target), whose rows begin with letter_.
    Each row is shown bare and with a ranker behind it; `vs_*` in the JSON are 95% intervals of
    masked ndcg@10 over users and seeds.

    Interrupt it at any time: the same command continues, stage by stage. With `--check RECEIPT`
    that receipt's stages are made again in RUN/check and every figure is compared.

    Reads: data and tokenizer of the run. Writes: RUN/reproduce (a run for each seed, receipts,
    table.json).
    Example: `streamctl reproduce runs/mine --seeds 3 --size tiny`.
    Next: `streamctl reproduce RUN --check RUN/reproduce/receipts/seed-0.json` makes it once more.
    """
    from streamctl.errors import UsageError
    from streamctl.evaluation.receipts import save_receipts
    from streamctl.evaluation.reproduce import METHODS, Plan, reproduce
    from streamctl.runs import RunDir

    if size not in ("tiny", "small", "paper"):
        raise UsageError(
            f"--size is {size!r}; it takes one of tiny, small, paper", run="--size with one of them"
        )
    for text in set_ or ():
        if "." not in text.partition("=")[0]:
            raise UsageError(
                f"--set {text}: `reproduce` takes stage.key=value, such as sft.lr=1e-3, "
                "or METHOD.key=value, such as sasrec_ce.dropout=0.5"
            )
    run = RunDir(target if Path(target).is_dir() else Path("runs") / target)
    if check is not None:
        _check(run, check, device, json_)
        return
    chosen = tuple(methods.split(",")) if methods else tuple(METHODS)
    plan = Plan(chosen, tuple(range(seeds)), size, tuple(set_ or ()), rerank, budget, device)
    table = reproduce(run, plan)
    if save is not None:
        save_receipts(run, save)
    if json_:
        print_json(table)
    else:
        _show(table)
        if (run.path / "reproduce/receipts/seed-0.json").exists():
            print_next(command, RUN=run.path)


def _show(table: dict[str, Any]) -> None:
    """The table in 80 columns; its JSON has every metric and comparison."""
    rows = table["rows"]
    known = {key for row in rows for key in row}
    rivals = [name for name in ("ranker", "transitions", "tiger") if f"vs_{name}" in known]

    def cell(value: float | list[float] | None) -> str:
        if isinstance(value, list):
            return f"{value[0]:+.4f} {value[1]:+.4f}"
        return "" if value is None else f"{value:.4f}"

    columns = {
        "": [row["method"].replace("+", "\n+") for row in rows],
        "ndcg\n@10": [cell(row["ndcg@10"]) for row in rows],
        "masked": [cell(row["ndcg@10_masked"]) for row in rows],
        "re-\nranked": [cell(row["rerank_ndcg@10_masked"]) for row in rows],
        "in\nprint": [cell((row["published"] or {}).get("ndcg@10")) for row in rows],
    }
    if rivals:
        less = [cell(row.get(f"vs_{rivals[0]}")) for row in rows]
        columns[f"masked less\n{rivals[0]}, 95%"] = less
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    seeds = max((row["seeds"] for row in rows), default=0)
    title = f"{table['data']}, seeds: {seeds}; masked: seen items left out"
    print_table(title, list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def _check(run: Any, receipt: Path, device: str, json_: bool) -> None:
    from streamctl.errors import StreamctlError
    from streamctl.evaluation.reproduce import check_receipt

    found = check_receipt(run, receipt, device=device)
    if json_:
        print_json(found)
    elif found["differences"]:
        rows = [list(each.values()) for each in found["differences"]]
        print_table(f"{receipt}: what differs", ["row", "metric", "receipt", "now"], rows)
    if not found["same"]:
        changed = ", ".join(found["changed"]) or "nothing else"
        raise StreamctlError(
            f"{len(found['differences'])} of {found['figures']} figures differ, and the artifacts "
            f"of {', '.join(found['stages']) or 'no stage'} (changed since: {changed})",
            where=receipt,
            run="the same command with --json shows every difference and what has changed",
        )
    if not json_:
        typer.echo(f"{receipt}: all {found['figures']} figures are the same again")
