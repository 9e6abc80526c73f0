"""What the page shows of a run: its stages, the metrics table, training curves, code usage."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.evaluation.report import rows
from streamctl.evaluation.stage import read_result
from streamctl.runs import RunDir, Stage
from streamctl.tokenizer import SemanticIds

TOLD = ("seed", "wall_s", "peak_memory_mb", "git")  # of a stage
STAGES = ("data", "tokenizer", "pretrain", "annotate", "sft", "rl")
MOST_POINTS = 200  # of a curve
_METRICS = ("recall@", "ndcg@", "coverage@")
_SILENT = ("seconds", "_s", "lr", "memory", "per_s")


def run_report(run: RunDir, method: str) -> dict[str, Any]:
    """The report as plain JSON values; `method` is what answers."""
    names = [*STAGES, *sorted(f"baselines/{p.name}" for p in run.path.glob("baselines/*"))]
    done = [run.stage(one) for one in names if run.stage(one).complete]
    return {
        "run": run.path.resolve().name,
        "method": method,
        "stages": [
            {"name": one.name} | {key: one.manifest.get(key) for key in TOLD} for one in done
        ],
        "evaluation": _evaluation(run),
        "curves": [curve for one in done for curve in curves(one.path / "metrics.jsonl", one.name)],
        "codes": _codes(run.stage("tokenizer")),
    }


def _codes(stage: Stage) -> dict[str, Any] | None:
    """How the codes of each level are used; None for a run without any."""
    if not stage.complete:
        return None
    ids = SemanticIds.load(stage)
    report = ids.report()
    for level, summary in enumerate(report["levels"]):
        counts = np.bincount(ids.codes[:, level], minlength=summary["codes"])
        summary["counts"] = counts.tolist()
    return report


def _evaluation(run: RunDir) -> list[dict[str, Any]]:
    """Tables of the eval stage: {title, columns, rows}; none where it has not run."""
    if not (stage := run.stage("eval")).complete:
        return []
    shown = rows(read_result(stage))
    metrics = [name for name in shown[0] if name.startswith(_METRICS)]
    views = {"": "items seen before may return", "masked ": "items seen before left out"}
    return [
        {
            "title": f"Full catalogue, {title}",
            "columns": ["method", *metrics],
            "rows": [
                [
                    row["method"] + " (control)" * row["control"],
                    *(row.get(mask + m) for m in metrics),
                ]
                for row in shown
            ],
        }
        for mask, title in views.items()
    ]


def curves(path: Path, stage: str) -> list[dict[str, Any]]:
    """Each numeric metric of a log as points (place in the log, value); fewer than two: left out.

    Args:
        path: a metrics.jsonl, or none where nothing was logged.
        stage: named in every curve.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        place = record.get("epoch", record.get("step", number))
        for metric, value in record.items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            silent = metric in ("epoch", "step", "round") or metric.endswith(_SILENT)
            if numeric and np.isfinite(value) and not silent:
                series.setdefault(metric, []).append((place, value))
    found = []
    for metric, points in series.items():
        places = [place for place, _ in points]
        if any(b <= a for a, b in pairwise(places)):
            points = [(number, value) for number, (_, value) in enumerate(points, 1)]
        step = -(-len(points) // MOST_POINTS)
        if len(points) > 1:
            found.append({"stage": stage, "metric": metric, "points": points[::step]})
    return found
