"""Tables of the README, generated from the receipts below results/.

python benchmarks/readme.py          rewrites the blocks in README.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
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
        share = "-" if row["fraction"] is None else f"{row['fraction']:.0%}"
        peer = "-" if row["peer"] is None else f"{row['peer']:.4g} ({row['peer_name']})"
        rows.append([row["case"], f"{row['ours']:.4g} {row['unit']}", peer, ratio, share])
    return markdown(["case", "ours", "best peer", "ratio", "of the ceiling"], rows)


def render() -> dict[str, str]:
    """Block name -> markdown, for every receipt that is there."""
    blocks = {}
    for path in sorted(RESULTS.glob("*.json")):
        receipt = json.loads(path.read_text())
        if path.stem.startswith("pipeline-"):
            blocks[path.stem] = quality(receipt)
            blocks[f"{path.stem}-minutes"] = minutes(receipt)
        elif "rows" in receipt and "ratio" in receipt["rows"][0]:
            blocks[path.stem] = speed(receipt)
    return blocks


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    for name, block in render().items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text:
            raise SystemExit(f"README.md has no place for {name}: add {begin} and {end}")
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{block}\n{end}{rest.split(end)[1]}"
    path.write_text(text)


if __name__ == "__main__":
    main()
