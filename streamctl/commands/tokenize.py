"""`streamctl tokenize`: item texts to Semantic IDs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from streamctl.commands.options import Job, option, print_json, print_table, stage_command


@stage_command()
def command(
    job: Job,
    encoder: str | None = option("A model's name, a local folder, or tfidf (no download)."),
    method: str | None = option("rqvae or rqkmeans."),
    levels: int | None = option("Levels of codes that the quantizer learns."),
    collisions: str | None = option("reassign, or dedup (one more digit)."),
    vectors: Path | None = option("Item vectors (.npy, .parquet) instead of texts."),
    semantic_ids: Path | None = option("LC-Rec's index.json instead of a quantizer."),
) -> None:
    """Turn every item's text into a vector and a Semantic ID, and find its nearest items by text.

    A .npy of --vectors has a row for each item of RUN/data/items.parquet, in its order, or
    NAME.ids.txt with the ids beside it; a .parquet has item_id and the vector.

    Reads: the data stage. Writes: RUN/tokenizer: codes.npy, codebooks.npy, item_vectors.npy,
    neighbours.npy, index.json, report.json (usage, entropy, collisions), the fitted tokenizer.
    Example: `streamctl tokenize --run runs/mine --encoder tfidf`.
    Next: `streamctl pretrain --run RUN`, or `streamctl run --run RUN` for every stage.
    """
    from streamctl.config import TokenizeConfig
    from streamctl.tokenizer.stage import tokenize

    settings = job.settings(
        TokenizeConfig, encoder=encoder, method=method, levels=levels, collisions=collisions,
        vectors=vectors, semantic_ids=semantic_ids,
    )  # fmt: skip
    report = job.make(tokenize, settings).json("report.json")
    print_json(report) if job.json else render(report)


def render(report: dict[str, Any]) -> None:
    """The report as a table on stdout."""
    rows = [
        [str(number), level["codes"], level["used"], level["usage"], level["perplexity"]]
        for number, level in enumerate(report["levels"], 1)
    ]
    title = f"Semantic IDs of {report['items']:,} items"
    print_table(title, ["level", "codes", "used", "usage", "perplexity"], rows)
    before = report["quantizer"]
    typer.echo(
        f"items that share a code: {before['collision_rate']:.2%} as quantized, "
        f"{report['collision_rate']:.2%} now ({report['moved']} moved); "
        f"reconstruction error {before['reconstruction_error']:.3f} of the variance"
    )
