"""`streamctl tokenize`: item texts to Semantic IDs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from streamctl.commands.options import (
    Config,
    Device,
    Force,
    Json,
    Run,
    Seed,
    Sets,
    print_json,
    print_table,
)


def command(
    run: Run,
    encoder: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--encoder", help="A model's name, a local folder, or tfidf (no download)."),
    ] = None,
    method: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--method", help="rqvae or rqkmeans."),
    ] = None,
    levels: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--levels", help="Levels that the quantizer learns."),
    ] = None,
    collisions: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--collisions", help="reassign, or dedup (one more digit)."),
    ] = None,
    vectors: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--vectors", help="Item vectors (.npy, .parquet) in the place of texts."),
    ] = None,
    semantic_ids: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--semantic-ids", help="LC-Rec's index.json in the place of a quantizer."),
    ] = None,
    config: Config = None,
    set_: Sets = None,
    seed: Seed = None,
    device: Device = "auto",
    json_: Json = False,
    force: Force = False,
) -> None:
    """Turn every item's text into a vector and a Semantic ID, and find its nearest items by text.

    A .npy of --vectors has a row for each item of RUN/data/items.parquet, in its order, or
    NAME.ids.txt with the ids beside it; a .parquet has item_id and the vector.

    Reads: the data stage. Writes: RUN/tokenizer: codes.npy, codebooks.npy, item_vectors.npy,
    neighbours.npy, index.json, report.json (usage, entropy, collisions), the fitted tokenizer.
    Example: `streamctl tokenize --run runs/mine --encoder tfidf`.
    Next: `streamctl pretrain --run RUN`.
    """
    from streamctl.config import TokenizeConfig, resolve
    from streamctl.runs import RunDir
    from streamctl.tokenizer.stage import tokenize

    flags = {"encoder": encoder, "method": method, "levels": levels, "collisions": collisions}
    flags["vectors"], flags["semantic_ids"] = vectors, semantic_ids
    settings = resolve(TokenizeConfig, file=config, sets=set_ or (), seed=seed, **flags)
    stage = tokenize(RunDir(run), settings, device=device, force=force)
    report = stage.json("report.json")
    if json_:
        print_json(report)
    else:
        render(report)


def render(report: dict[str, Any]) -> None:
    """The report as a table on stdout."""
    rows = [
        [str(number), level["codes"], level["used"], level["usage"], level["perplexity"]]
        for number, level in enumerate(report["levels"], 1)
    ]
    print_table(
        f"Semantic IDs of {report['items']:,} items",
        ["level", "codes", "used", "usage", "perplexity"],
        rows,
    )
    before = report["quantizer"]
    typer.echo(
        f"items that share a code: {before['collision_rate']:.2%} as quantized, "
        f"{report['collision_rate']:.2%} now ({report['moved']} moved); "
        f"reconstruction error {before['reconstruction_error']:.3f} of the variance"
    )
