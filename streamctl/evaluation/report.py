"""The evaluation for people: a table in the terminal and a plot as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from streamctl.files import atomic_file
from streamctl.progress import NAME_WIDTH, plain_console

TITLES = {
    "popularity": "Popularity",
    "caser": "Caser",
    "gru4rec": "GRU4Rec",
    "transitions": "Transitions",
    "knn": "kNN",
    "ranker": "Ranker",
    "sasrec_bce": "SASRec (BCE)",
    "sasrec_ce": "SASRec (CE)",
    "bert4rec": "BERT4Rec",
    "tiger": "TIGER",
    "stream_pt": "STREAM-Rec pretrained",
    "stream_sft": "STREAM-Rec SFT",
    "stream_rl": "STREAM-Rec RL",
    "no_thinking": "no thinking, as long",
    "random_thinking": "random thoughts, SFT",
    "random_thinking_rl": "random thoughts, RL",
    "oracle_thinking": "oracle thoughts",
}
SAME = "HR@k = recall@k: each target counts alone."
_COLUMNS = ("recall@10", "ndcg@10")  # what fits 80 characters; --json has the rest
_INK, _MUTED, _BLUE, _GREY = "#1f2933", "#52606d", "#2f6fb0", "#9aa5b1"


def table(result: Mapping[str, Any]) -> Table:
    """Methods above controls, one row each; the interval is of the difference to TIGER."""
    over_tiger = any("tiger" in others for others in result["comparisons"].values())
    several = result["targets"] > result["users"]
    targets = f" with {result['targets']:,} targets" if several else ""
    shown = Table(
        title=f"{result['split']} split, {result['users']:,} users{targets}, whole catalogue of "
        f"{result['items']:,} items, ties {result['ties']}",
        title_justify="left",
        caption="over TIGER: paired 95% interval, over users, of the difference of ndcg@10.\n"
        * over_tiger
        + "masked: items that the user already had are left out of the ranking. "
        + SAME,
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("", no_wrap=True)
    for mask in ("", "\nmasked"):
        for name in _COLUMNS:
            header = name.replace("@", "\n@") + mask
            shown.add_column(header, justify="right", no_wrap=True)
        if over_tiger and not mask:
            shown.add_column("over TIGER", justify="right", no_wrap=True)
    shown.add_column("ms a\nuser", justify="right", no_wrap=True)
    for group in ("methods", "controls"):
        for name, row in result[group].items():
            difference = result["comparisons"].get(name, {}).get("tiger")
            shown.add_row(
                TITLES.get(name, name if len(name) <= NAME_WIDTH else name.replace("+", "\n+")),
                *(f"{row[column]:.4f}" for column in _COLUMNS),
                *([_interval(difference)] if over_tiger else []),
                *(f"{row['masked'][column]:.4f}" for column in _COLUMNS),
                f"{row['ms_per_user']:.2f}",
                style=None if group == "methods" else "dim",
            )
        shown.add_section()
    return shown


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A flat row a method, then its controls: method, control, best, figures, `masked` figures."""
    best = (result.get("winner") or {}).get("method")
    return [
        {"method": name, "control": group == "controls", "best": name == best}
        | {key: value for key, value in row.items() if isinstance(value, float)}
        | {
            f"masked {key}": value
            for key, value in row["masked"].items()
            if isinstance(value, float)
        }
        for group in ("methods", "controls")
        for name, row in result[group].items()
    ]


def _interval(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    return f"{difference['low']:+.4f} {difference['high']:+.4f}"


def show(result: Mapping[str, Any]) -> None:
    """Print the table, which rows are what, and whether the think labels are worth anything."""
    console = plain_console()
    console.print(table(result))
    for group in ("methods", "controls"):
        for name, row in result[group].items():
            if note := row.get("note"):
                console.print(f"{name}: {note}", style="dim")
    if winner := result["winner"]:
        said = f"best on validation: {winner['method']}, masked ndcg@10 {winner['ndcg@10']:.4f}"
        if after := winner["next"]:
            bounds = _interval(after)
            said += f", {after['difference']:+.4f} over {after['method']} (95%: {bounds})"
        console.print(f"{said}; `recommend` and `serve` use it", highlight=False)
    for stage, report in result["thinking"].items():
        if "distinct_chains" in report:
            steps = ", ".join(f"{value:.1f}" for value in report["perplexity_by_step"])
            console.print(
                f"think labels of {stage}: {report['distinct_chains']:,} distinct chains for "
                f"{report['distinct_targets']:,} targets, perplexity by step {steps}",
            )
    if result["collapsed"]:
        console.print(
            "the think labels have collapsed: thoughts of this run say next to nothing",
            style="bold red",
        )


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Bars of unmasked ndcg@10 with 95% intervals over users, as PNG; controls in grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    rows = [
        (TITLES.get(name, name), row, colour)
        for group, colour in (("methods", _BLUE), ("controls", _GREY))
        for name, row in result[group].items()
    ][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.36 * len(rows)), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=_MUTED)
    titles, entries, colours = zip(*rows, strict=True)
    values = np.array([entry["ndcg@10"] for entry in entries])
    low, high = np.array([entry["interval"] for entry in entries]).T
    axis.barh(titles, values, color=colours)
    around = [values - low, high - values]
    axis.errorbar(values, range(len(rows)), xerr=around, fmt="none", ecolor=_INK, capsize=3)
    for place, (value, end) in enumerate(zip(values, high, strict=True)):
        axis.annotate(f"{value:.4f}", (end, place), (5, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, 1.15 * max(high) or 1)
    axis.set_xlabel("ndcg@10, seen items left in (95% bootstrap interval over users)")
    axis.set_title(
        f"{result['split']} split, {result['users']:,} users: methods (blue) and controls (grey)",
        loc="left",
    )
    with atomic_file(path) as part:
        figure.savefig(part, format="png", dpi=150)
