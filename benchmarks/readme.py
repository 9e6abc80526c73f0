"""Tables of the README and of docs/, generated from the receipts below results/ and the settings.

python benchmarks/readme.py          rewrites the blocks between <!-- NAME --> and <!-- /NAME -->
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import scale_tables, settings_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/results.md", "docs/scale.md", "docs/config.md")
BRIEF = (
    "popularity", "caser", "gru4rec", "bert4rec", "sasrec_bce", "sasrec_ce", "tiger",
    "stream_pt", "stream_sft", "stream_rl", "no_thinking", "random_thinking", "oracle_thinking",
)  # fmt: skip
METRICS = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quality(receipt: dict[str, Any]) -> str:
    """Every method and control of a pipeline receipt, unmasked, with masked ndcg@10 beside."""
    evaluation = receipt["evaluation"]
    rows = []
    for group, suffix in (("methods", ""), ("controls", " (control)")):
        for name, entry in evaluation[group].items():
            figures = [f"{entry[metric]:.4f}" for metric in METRICS]
            rows.append([name + suffix, *figures, f"{entry['masked']['ndcg@10']:.4f}"])
    return markdown(["method", *METRICS, "ndcg@10, seen masked"], rows)


def _interval(bounds: list[float] | None) -> str:
    return f"{bounds[0]:+.4f} to {bounds[1]:+.4f}" if bounds else ""


def table(receipt: dict[str, Any]) -> str:
    """Rows of `streamctl reproduce`: published beside measured, and the paired intervals."""
    rows = []
    for row in receipt["rows"]:
        published = row["published"]
        seconds = row["train_s"]
        rows.append(
            [
                row["method"],
                str(row["seeds"]),
                f"{published['recall@10']:.4f} / {published['ndcg@10']:.4f}" if published else "",
                *(f"{row[metric]:.4f}" for metric in METRICS),
                f"{row['ndcg@10_masked']:.4f}",
                _interval(row.get("vs_tiger")),
                _interval(row.get("vs_sasrec_ce")),
                _interval(row.get("vs_twin")),
                "" if seconds is None else f"{seconds / 60:.1f}",
                f"{row['ms_per_user']:.2f}",
            ]
        )
    head = ["method", "seeds", "published recall@10 / ndcg@10", *METRICS, "ndcg@10, seen masked"]
    head += ["less TIGER", "less SASRec-CE", "less no thought", "minutes of training", "ms a user"]
    return markdown(head, rows)


def brief(receipt: dict[str, Any]) -> str:
    """The rows and columns of `table` that a reader of the README wants first."""
    rows = [
        [
            row["method"],
            str(row["seeds"]),
            f"{row['published']['ndcg@10']:.4f}" if row["published"] else "",
            *(f"{row[key]:.4f}" for key in ("recall@10", "ndcg@10", "ndcg@10_masked")),
            *(_interval(row.get(key)) for key in ("vs_tiger", "vs_sasrec_ce", "vs_twin")),
        ]
        for row in receipt["rows"]
        if row["method"] in BRIEF
    ]
    head = ["method", "seeds", "ndcg@10 in print", "recall@10", "ndcg@10", "ndcg@10, seen masked"]
    return markdown([*head, "less TIGER", "less SASRec-CE", "less no thought"], rows)


def minutes(receipt: dict[str, Any]) -> str:
    """Wall time of each stage."""
    stages = receipt["stages"].items()
    rows = [[name, f"{entry['wall_s'] / 60:.1f}"] for name, entry in stages]
    return markdown(["stage", "minutes"], rows)


def speed(receipt: dict[str, Any]) -> str:
    """Rows of a speed benchmark."""
    rows = []
    for row in receipt["rows"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        peer = "-" if row["peer"] is None else f"{row['peer']:.4g} ({row['peer_name']})"
        rows.append([row["case"], f"{row['ours']:.4g} {row['unit']}", peer, ratio])
    return markdown(["case", "ours", "best peer", "ratio"], rows)


def load(receipt: dict[str, Any]) -> str:
    """Rows of the server under load, with goals and what was missed."""
    rows = []
    for row in receipt["rows"]:
        found, goals = row["wrk"], row["goals"]
        measured = [f"{row['ours']:.1f} {row['unit']}"]
        if row["unit"] == "MB grown":
            measured[0] += f" in {row['minutes']:.0f} minutes"
        else:
            measured.append(f"p99 {found['p99_ms']:.0f} ms")
        measured.append(f"{row['errors']} errors in {found['ok'] + found['busy']:,} requests")
        alone = row.get("alone")
        wanted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in goals.items())
        one = f"{alone['p50_ms']:.1f} ms p50, p99 {alone['p99_ms']:.0f} ms" if alone else "-"
        peer = "-" if row["peer"] is None else f"{row['peer']:.1f} ({row['ratio']:.1f}x)"
        reached = "yes" if row["reached"] else "no"
        rows.append([row["case"], ", ".join(measured), one, peer, wanted, reached])
    head = ["case", "measured", "one connection", "FastAPI + generate", "goal", "reached"]
    return markdown(head, rows)


def curve(receipt: dict[str, Any]) -> str:
    """Every point of the think curve, beside the best without a thought in no more time."""
    rows = []
    for point in receipt["points"]:
        rival = point.get("no_thought_at_equal_latency")
        rows.append(
            [
                point["kind"], str(point["length"]), str(point["beam"]),
                f"{point['ndcg@10']:.4f}", f"{point['ms_per_user']:.2f}",
                "" if rival is None else f"{rival:.4f}",
            ]
        )  # fmt: skip
    head = ["thought", "l", "beam", "ndcg@10", "ms a user", "no thought in no more time"]
    return markdown(head, rows)


BLOCKS = {
    "think-curve": curve,
    "reproduce": table,
    "serve": load,
    **scale_tables.BLOCKS,
}


def render() -> dict[str, str]:
    """Block name -> markdown, for every receipt that is there, and for the settings."""
    blocks, receipts = {}, {}
    for path in sorted(RESULTS.glob("*.json")):
        receipt = receipts[path.stem] = json.loads(path.read_text())
        if receipt["name"] in BLOCKS:
            blocks[path.stem] = BLOCKS[receipt["name"]](receipt)
        elif path.stem.startswith("pipeline-"):
            blocks[path.stem] = quality(receipt)
            blocks[f"{path.stem}-minutes"] = minutes(receipt)
        elif "rows" in receipt and "ratio" in receipt["rows"][0]:
            blocks[path.stem] = speed(receipt)
    for name in ("beauty", "scientific"):
        if f"table-{name}" in receipts:
            blocks[f"brief-{name}"] = brief(receipts[f"table-{name}"])
    others = {"arithmetic": scale_tables.arithmetic(receipts), "settings": settings_table.tables()}
    return blocks | others


def main() -> None:
    blocks = render()
    pages = {ROOT / page: (ROOT / page).read_text() for page in PAGES}
    for name in blocks:
        if not any(f"<!-- {name} -->" in text for text in pages.values()):
            raise SystemExit(
                f"no page has a place for {name}: add <!-- {name} --> <!-- /{name} -->"
            )
    for path, text in pages.items():
        for name, block in blocks.items():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            if begin in text:
                head, rest = text.split(begin)
                text = f"{head}{begin}\n{block}\n{end}{rest.split(end)[1]}"
        path.write_text(text)


if __name__ == "__main__":
    main()
