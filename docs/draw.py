"""The pictures of the documentation, as SVG: the idea, and the plots of the receipts.

python docs/draw.py          writes docs/img/idea.svg, and results.svg and lengths.svg of what
                             benchmarks/results/{table,thinker}-*.json hold
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks" / "results", ROOT / "docs" / "img"
INK, MUTED, LINE, PAPER, BLUE, SOFT, GREY = (
    "#1f2933", "#52606d", "#cbd2d9", "#ffffff", "#2f6fb0", "#e3eefa", "#9aa5b1",
)  # fmt: skip
SETS = ("beauty", "instruments", "scientific", "demo")
SERIES = (BLUE, "#b25d1e", "#3d8168", "#7a4f9a")
TITLES = {
    "popularity": "Popularity", "transitions": "Transitions", "knn": "kNN", "ranker": "Ranker",
    "caser": "Caser", "gru4rec": "GRU4Rec", "bert4rec": "BERT4Rec", "sasrec_bce": "SASRec (BCE)",
    "sasrec_ce": "SASRec (CE)", "tiger": "TIGER", "stream_pt": "STREAM-Rec pretrained",
    "stream_sft": "STREAM-Rec SFT", "stream_rl": "STREAM-Rec RL", "l0": "no thought (l = 0)",
    "random_evidence": "random evidence",
}  # fmt: skip


def svg(width: int, height: int, parts: Sequence[str], title: str) -> str:
    """A whole picture on white paper, which also shows where pages are dark."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
    )
    paper = f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, color: str = INK, size: int = 13, anchor: str = "start",
         bold: bool = False) -> str:  # fmt: skip
    weight = ' font-weight="600"' if bold else ""
    place = f'x="{x:g}" y="{y:g}" fill="{color}" font-size="{size}" text-anchor="{anchor}"'
    return f"<text {place}{weight}>{escape(words)}</text>"


def box(x: float, y: float, width: float, height: float, fill: str = PAPER) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="6" fill="{fill}" stroke="{LINE}"/>'


def line(points: Sequence[tuple[float, float]], color: str = GREY, width: float = 1.5) -> str:
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"/>'


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    head = f'<path d="M{to_x:g} {to_y:g} l-8 -4 v8 z" fill="{GREY}"/>'
    return line([(x, y), (to_x - 6, to_y)]) + head


def idea() -> str:
    """History -> evidence by hops -> weights -> answer."""
    hops = (
        ("next", "what others took after these items", ("acrylic paints", "masking fluid")),
        ("alike", "what is alike by its text", ("sable brush set",)),
        ("next of next", "what followed what was found", ("easel",)),
        ("next of alike", "what followed what is alike", ("gesso",)),
        ("others", "what users with such a history took", ("palette knife",)),
    )
    weights = (("masking fluid", 34), ("palette knife", 22), ("acrylic paints", 17),
               ("easel", 9), ("sable brush set", 5))  # fmt: skip
    parts = []
    for x, words in ((20, "1. the history"), (190, "2. evidence, hop by hop"),
                     (530, "3. the thought: weights"), (770, "4. the answer")):  # fmt: skip
        parts.append(text(x, 30, words, bold=True))
    for row, item in enumerate(("mixing palette", "paper pad", "brush set")):
        parts += [box(20, 110 + 44 * row, 120, 32, SOFT), text(32, 131 + 44 * row, item)]
    for row, (name, about, items) in enumerate(hops):
        y = 48 + 54 * row
        parts += [box(190, y, 300, 46), text(202, y + 19, name, bold=True)]
        parts += [text(478, y + 19, ", ".join(items), anchor="end")]
        parts += [text(202, y + 37, about, color=MUTED, size=12)]
        parts += [arrow(140, 170, 190, y + 23), arrow(490, y + 23, 530, 170)]
    for row, (name, share) in enumerate(weights):
        y = 80 + 42 * row
        parts += [text(540, y, name), text(740, y, f"{share}%", anchor="end", color=MUTED)]
        parts += [f'<rect x="540" y="{y + 6}" width="{share * 5.5:g}" height="10" rx="3" '
                  f'fill="{BLUE}"/>']  # fmt: skip
    parts += [arrow(740, 170, 770, 170), box(770, 110, 170, 120, SOFT)]
    parts += [text(782, 134, "masking fluid", bold=True), text(782, 158, "palette knife")]
    parts += [text(782, 182, "acrylic paints"), text(782, 206, "and what the codes add",
              color=MUTED, size=12)]  # fmt: skip
    parts += [text(530, 310, "P(item) = pi P(its codes) + (1 - pi) weight(item)", color=MUTED)]
    return svg(960, 330, parts, "A history brings items to mind; they are weighed; they answer")


def receipts(kind: str) -> dict[str, dict[str, Any]]:
    """Name of the set -> receipt: "table" of `streamctl reproduce`, "thinker" of `thinker.py`."""
    paths = {name: RESULTS / f"{kind}-{name}.json" for name in SETS}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def main_rows(receipt: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of all users: methods, then the two controls."""
    return [row for row in receipt["rows"] if row.get("ndcg@10") is not None]


def results(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Masked ndcg@10 of every method, with its 95% interval; a panel a set, STREAM-Rec in blue."""
    names = [
        name
        for name in TITLES
        if any(row["method"] == name for one in found.values() for row in main_rows(one))
    ]
    wide, left, tall = 250, 170, 24
    parts = [text(left - 10, 66 + tall * place, TITLES[name], anchor="end")
             for place, name in enumerate(names)]  # fmt: skip
    for panel, (name, receipt) in enumerate(found.items()):
        x = left + panel * (wide + 20)
        rows = {row["method"]: row for row in main_rows(receipt)}
        most = max(max(row.get("ndcg@10_masked_95", (row["ndcg@10_masked"],)))
                   for row in rows.values())  # fmt: skip
        parts.append(text(x, 30, f"{name}, masked ndcg@10", bold=True))
        for place, method in enumerate(names):
            if method not in rows:
                continue
            value, y = rows[method]["ndcg@10_masked"], 54 + tall * place
            color = BLUE if method.startswith("stream") else GREY
            length = value / most * (wide - 60)
            parts.append(f'<rect x="{x}" y="{y}" width="{length:.1f}" height="15" rx="3" '
                         f'fill="{color}"/>')  # fmt: skip
            low, high = rows[method].get("ndcg@10_masked_95", (value, value))
            ends = [(x + bound / most * (wide - 60), y + 7.5) for bound in (low, high)]
            parts.append(line(ends, INK, 1))
            where = max(x + length, ends[1][0]) + 6
            parts.append(text(where, y + 12, f"{value:.4f}", color=MUTED, size=12))
    width = left + len(found) * (wide + 20)
    return svg(width, 70 + tall * len(names), parts, "Masked ndcg@10 of every method")


def lengths(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Masked ndcg@10, as a share of the best, over the number of items that are weighed."""
    curves = {
        name: [(row["l"], row["ndcg@10_masked"]) for row in receipt["rows"]
               if row["method"] == "length"] for name, receipt in found.items()
    }  # fmt: skip
    curves = {name: points for name, points in curves.items() if points}
    steps = sorted({size for points in curves.values() for size, _ in points})
    left, top, wide, high = 60, 50, 500, 200
    place = {size: left + 30 + number * (wide - 60) / max(1, len(steps) - 1)
             for number, size in enumerate(steps)}  # fmt: skip
    parts = [text(20, 28, "ndcg@10 by length of the thought, as a share of the best", bold=True)]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + high * (1 - share)
        parts += [line([(left, y), (left + wide, y)], LINE, 1)]
        parts += [text(left - 8, y + 4, f"{share:.0%}", anchor="end", color=MUTED, size=12)]
    parts += [text(x, top + high + 20, str(size), anchor="middle", color=MUTED, size=12)
              for size, x in place.items()]  # fmt: skip
    parts.append(text(left + wide / 2, top + high + 42, "items weighed (l)", anchor="middle"))
    for number, (name, points) in enumerate(curves.items()):
        most = max(value for _, value in points)
        color = SERIES[number % len(SERIES)]
        path = [(place[size], top + high * (1 - value / most)) for size, value in points]
        parts += [line(path, color, 2.5), text(left + wide + 12, top + 14 + 22 * number,
                  f"{name} (best {most:.4f})", color=color)]  # fmt: skip
    return svg(760, 310, parts, "ndcg@10 by length of the thought")


def pictures() -> dict[str, str]:
    """File name -> SVG, of everything that can be drawn."""
    drawn = {"idea.svg": idea()}
    for name, kind, draw in (("results", "table", results), ("lengths", "thinker", lengths)):
        if found := receipts(kind):
            drawn[f"{name}.svg"] = draw(found)
    return drawn


if __name__ == "__main__":
    for file, drawing in pictures().items():
        (IMAGES / file).write_text(drawing, encoding="utf-8")
