"""`streamctl reproduce`: the whole table, method by method and seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from streamctl.commands.options import Device, Json, Sets, print_json, print_table

ONE_LINE = 96  # columns of a terminal that holds both ends of an interval side by side


def command(
    target: Annotated[
        str, typer.Argument(help="A run's folder, or NAME for runs/NAME, such as beauty.")
    ],
    methods: Annotated[
        Optional[str],  # noqa: UP045 - Typer reads Optional
        typer.Option(
            "--methods",
            help="Comma-separated: popularity, caser, gru4rec, bert4rec, sasrec_bce, sasrec_ce, "
            "tiger, tiger_vocabulary, tiger_long, stream, stream_plain_rl; default: all.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds 0..N-1 of each.", min=1)] = 1,
    size: Annotated[
        str, typer.Option("--size", help="Generative models: tiny, small or paper.")
    ] = "small",
    budget: Annotated[
        float, typer.Option("--budget", help="Hours after which no job begins; 0: none.", min=0)
    ] = 0.0,
    save: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--save",
            help="Copy table-NAME.json and NAME/ (receipts, ranks by user) to this folder.",
        ),
    ] = None,
    check: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--check", help="Run what this receipt describes again, and compare."),
    ] = None,
    set_: Sets = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Do jobs of another plan again; each is kept as .previous."),
    ] = False,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Train and evaluate every method with every seed, and print the table.

    A method is what is trained, a row what is measured (`eval --methods` takes rows): sasrec_bce
    and sasrec_ce are `eval`'s row sasrec with either loss, tiger_vocabulary and tiger_long its row
    tiger; stream gives stream_pt, stream_sft, stream_rl and their controls, stream_plain_rl gives
    stream_rl without the rewards of Eqs. 25-27.

    Interrupt it at any time: the same command continues, job by job. With `--check RECEIPT` that
    receipt's stages are made again in RUN/check and every figure is compared.

    Reads: data of the run, for generative methods its tokenizer too. Writes: RUN/reproduce (a
    run and a receipt for each job, table.json).
    Next: `streamctl eval --run RUN/reproduce/stream-0`.
    """

    from streamctl.errors import UsageError
    from streamctl.evaluation.jobs import JOBS, Plan
    from streamctl.evaluation.reproduce import reproduce, save_receipts
    from streamctl.progress import plain_console
    from streamctl.runs import RunDir

    if size not in ("tiny", "small", "paper"):
        raise UsageError(f"--size is {size!r}; it takes one of tiny, small, paper")
    for text in set_ or ():
        if "." not in text.partition("=")[0]:
            raise UsageError(
                f"--set {text}: `reproduce` takes stage.key=value, such as sft.lr=1e-3, "
                "or METHOD.key=value, such as sasrec_ce.dropout=0.5"
            )
    folder = Path(target) if Path(target).is_dir() else Path("runs") / target
    if check is not None:
        _check(folder, check, device, json_)
        return
    chosen = tuple(methods.split(",")) if methods else tuple(JOBS)
    plan = Plan(chosen, tuple(range(seeds)), size, tuple(set_ or ()), budget, device)
    table = reproduce(RunDir(folder), plan, force=force)
    if save is not None:
        save_receipts(RunDir(folder), plan, save)
    if json_:
        print_json(table)
        return
    columns = ("recall@10", "ndcg@10", "ndcg@10_masked")
    between = "\n" if plain_console().width < ONE_LINE else " "
    rows = []
    for row in table["rows"]:
        published = row["published"]
        figures = [f"{row[column]:.4f}" for column in columns]
        versus = [
            f"{row[key][0]:+.4f}{between}{row[key][1]:+.4f}" if row[key] else ""
            for key in ("vs_tiger", "vs_sasrec_ce")
        ]
        shown = f"{published['ndcg@10']:.4f}" if published else ""
        rows.append([row["method"], *figures, shown, *versus])
    print_table(
        f"{table['data']}, size {table['size']}: differences in ndcg@10, 95%",
        ["", "recall\n@10", "ndcg\n@10", "masked", "in\nprint", "less\nTIGER",
         "less\nSASRec\n(CE)"],
        rows,
    )  # fmt: skip


def _check(folder: Path, receipt: Path, device: str, json_: bool) -> None:
    from streamctl.errors import StreamctlError
    from streamctl.evaluation.check import check_receipt
    from streamctl.runs import RunDir

    found = check_receipt(RunDir(folder), receipt, device=device)
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
        )
    if not json_:
        typer.echo(f"{receipt}: all {found['figures']} figures are the same again")
