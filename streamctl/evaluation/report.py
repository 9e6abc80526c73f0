"""The evaluation for people: a table in the terminal and plots as PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from streamctl.progress import plain_console
from streamctl.runs import RunDir, atomic_file

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
SAME = "HR@k = recall@k: each target is looked for alone."
_COLUMNS = ("recall@10", "ndcg@10")  # what fits 80 characters; --json has the rest
_INK, _MUTED, _BLUE, _GREY = "#1f2933", "#52606d", "#2f6fb0", "#9aa5b1"


def table(result: Mapping[str, Any]) -> Table:
    """Methods above controls, one row each; the interval is of the difference to TIGER."""
    several = result["targets"] > result["users"]
    targets = f" with {result['targets']:,} targets" if several else ""
    shown = Table(
        title=f"{result['split']} split, {result['users']:,} users{targets}, whole catalogue of "
        f"{result['items']:,} items, ties {result['ties']}",
        title_justify="left",
        caption="over TIGER: paired 95% interval, over users, of the difference of ndcg@10.\n"
        f"masked: items the user has taken are left out of the ranking. {SAME}",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    shown.add_column("", no_wrap=True)
    for mask in ("", "\nmasked"):
        for name in _COLUMNS:
            header = name.replace("@", "\n@") + mask
            shown.add_column(header, justify="right", no_wrap=True)
        if not mask:
            shown.add_column("over TIGER", justify="right", no_wrap=True)
    shown.add_column("ms a\nuser", justify="right", no_wrap=True)
    for group in ("methods", "controls"):
        for name, row in result[group].items():
            difference = result["comparisons"].get(name, {}).get("tiger")
            shown.add_row(
                TITLES.get(name, name),
                *(f"{row[column]:.4f}" for column in _COLUMNS),
                _interval(difference),
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
        | {f"masked {key}": value for key, value in row["masked"].items()}
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
        console.print(f"{said}; `recommend` and `serve` answer by it", highlight=False)
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


def plot_all(run: RunDir, result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the plots there is data for: ndcg.png, training.png, codes.png."""
    import matplotlib

    matplotlib.use("Agg")
    plots = {"ndcg.png": plot_ndcg(result)}
    curves = training_curves(run)
    if curves:
        plots["training.png"] = plot_training(curves)
    if run.stage("tokenizer").complete:
        plots["codes.png"] = plot_codes(run.stage("tokenizer").json("report.json"))
    written = []
    for name, figure in plots.items():
        with atomic_file(folder / name) as path:
            figure.savefig(path, format="png", dpi=150)
        written.append(folder / name)
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=_MUTED)
    return figure, axes


def plot_ndcg(result: Mapping[str, Any]) -> Any:
    """Bars of unmasked ndcg@10 with 95% intervals over users; controls in grey."""
    rows = [
        (TITLES.get(name, name), row, group)
        for group in ("methods", "controls")
        for name, row in result[group].items()
    ][::-1]
    figure, (axis,) = _figure(8, 1.2 + 0.36 * len(rows))
    values = [row["ndcg@10"] for _, row, _ in rows]
    low, high = zip(*(row["interval"] for _, row, _ in rows), strict=True)
    below = [v - a for v, a in zip(values, low, strict=True)]
    above = [b - v for v, b in zip(values, high, strict=True)]
    colours = [_BLUE if group == "methods" else _GREY for _, _, group in rows]
    axis.barh([title for title, _, _ in rows], values, color=colours)
    axis.errorbar(values, range(len(rows)), xerr=[below, above], fmt="none", ecolor=_INK, capsize=3)
    for place, (value, end) in enumerate(zip(values, high, strict=True)):
        axis.annotate(f"{value:.4f}", (end, place), (5, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, 1.15 * max(high) or 1)
    axis.set_xlabel("ndcg@10, seen items left in (95% bootstrap interval over users)")
    axis.set_title(
        f"{result['split']} split, {result['users']:,} users: methods (blue) and controls (grey)",
        loc="left",
    )
    return figure


def training_curves(run: RunDir) -> dict[str, list[dict[str, float]]]:
    """The logged records of every stage of the run that trains, by stage name."""
    curves = {}
    folders = [*run.path.glob("*/metrics.jsonl"), *run.path.glob("baselines/*/metrics.jsonl")]
    for path in sorted(folders):
        name = str(path.parent.relative_to(run.path))
        if ".previous" in name or not run.stage(name).complete:
            continue
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if any("valid/ndcg@10" in record or "loss" in record for record in records):
            curves[name] = records
    return curves


def plot_training(curves: Mapping[str, list[dict[str, float]]]) -> Any:
    """Training loss and validation ndcg@10 of each stage over its share of logged records."""
    figure, (left, right) = _figure(12, 4.5, 2)
    for name, records in curves.items():
        for axis, key in ((left, "loss"), (right, "valid/ndcg@10")):
            points = [
                (place / max(1, len(records) - 1), record[key])
                for place, record in enumerate(records)
                if key in record
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
    left.set_title("training loss", loc="left")
    right.set_title("validation ndcg@10", loc="left")
    for axis in (left, right):
        axis.set_xlabel("progress of the stage (0 = first record, 1 = last)")
        if axis.lines:
            axis.legend(frameon=False, fontsize="small")
    return figure


def plot_codes(report: Mapping[str, Any]) -> Any:
    """Share of each level's codes that are used, and their perplexity as a share of all codes."""
    levels = report["levels"]
    names = [f"level {number}\n{level['codes']} codes" for number, level in enumerate(levels, 1)]
    figure, (axis,) = _figure(2 + 1.3 * len(levels), 4)
    width = 0.38
    for offset, key, label, colour in (
        (-width / 2, "usage", "used", _BLUE),
        (width / 2, "perplexity", "perplexity / codes", _GREY),
    ):
        values = [level[key] / (level["codes"] if key == "perplexity" else 1) for level in levels]
        places = [place + offset for place in range(len(levels))]
        bars = axis.bar(places, values, width, label=label, color=colour)
        axis.bar_label(bars, [f"{value:.0%}" for value in values], fontsize="small")
    axis.set_xticks(range(len(levels)), names)
    axis.set_ylim(0, 1.25)
    axis.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axis.set_title(f"code usage, {report['collision_rate']:.1%} of items collide", loc="left")
    axis.legend(frameon=False, ncols=2, loc="upper right", fontsize="small")
    return figure
