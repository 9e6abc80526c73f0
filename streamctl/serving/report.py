"""What the page shows of a run: its stages, the metrics table, training curves, code usage."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.runs import RunDir, Stage
from streamctl.tokenizer import SemanticIds

STAGES = ("data", "tokenizer", "pretrain", "annotate", "sft", "rl")
MOST_POINTS = 200  # of a curve
_METRICS = ("recall@", "ndcg@", "coverage@")
_SILENT = ("seconds", "_s", "lr", "memory", "per_s")


def run_report(run: RunDir, name: str, method: str) -> dict[str, Any]:
    """The report as plain JSON values.

    Args:
        run: what is served. name: of its folder. method: what answers.
    """
    names = [*STAGES, *sorted(f"baselines/{p.name}" for p in run.path.glob("baselines/*"))]
    done = [run.stage(one) for one in names if run.stage(one).complete]
    return {
        "run": name,
        "method": method,
        "stages": [_summary(one) for one in done],
        "evaluation": _evaluation(run),
        "curves": [curve for one in done for curve in curves(one.path / "metrics.jsonl", one.name)],
        "codes": _codes(run.stage("tokenizer")),
    }


def _codes(stage: Stage) -> dict[str, Any] | None:
    """How the codes of each level are used; None for a run without any."""
    if not stage.complete:
        return None
    ids = SemanticIds.load(stage)
    codes = ids.report()
    for level, summary in enumerate(codes["levels"]):
        counts = np.bincount(ids.codes[:, level], minlength=summary["codes"])
        summary["counts"] = counts.tolist()
    return {key: codes[key] for key in ("items", "distinct", "collision_rate", "levels")}


def _summary(stage: Stage) -> dict[str, Any]:
    manifest = stage.manifest
    keys = ("seed", "wall_s", "peak_memory_mb", "git")
    return {"name": stage.name, **{key: manifest.get(key) for key in keys}}


def _evaluation(run: RunDir) -> list[dict[str, Any]]:
    """Tables of the eval stage: {title, columns, rows}; none where it has not run."""
    stage = run.stage("eval")
    if not stage.complete:
        return []
    results = stage.json("metrics.json")
    entries = {
        f"{name} (control)" if group == "controls" else name: entry
        for group in ("methods", "controls")
        for name, entry in results[group].items()
    }
    views = {
        "items seen before may return": entries,
        "items seen before left out": {name: entry["masked"] for name, entry in entries.items()},
    }
    return [_table(f"Full catalogue, {title}", rows) for title, rows in views.items()]


def _table(title: str, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    metrics = [name for name in next(iter(rows.values())) if name.startswith(_METRICS)]
    return {
        "title": title,
        "columns": ["method", *metrics],
        "rows": [[name, *(row.get(metric) for metric in metrics)] for name, row in rows.items()],
    }


def curves(path: Path, stage: str) -> list[dict[str, Any]]:
    """Each numeric metric of a log as points (place in the log, value); fewer than two: left out.

    Args:
        path: a metrics.jsonl; one that is missing or half written gives what can be read.
        stage: named in every curve.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            continue
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
