"""What a growing memory of evidence costs: bytes, milliseconds a look-up, rows that join it.

    python benchmarks/memory.py --json --save            131,072 and 1,048,576 synthetic rows

Rows are prefixes of 2 to 20 items drawn from a catalogue of a twelfth as many items, themes first
and popular items inside a theme; a row's state is its theme with noise, 128 wide. Questions are
prefixes drawn alike, one at a time, as in serving. The graph and the lists of FAISS are compared
with the exact search; item views are always exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from streamctl.decode.questions import BROAD, SHARP
from streamctl.retrieval.memory import Memory
from streamctl.runs import provenance

RESULTS = Path(__file__).parent / "results"
WIDTH, RECENT, AFTER, NEIGHBOURS = 128, 20, 4, 100
ROWS_PER_ITEM, ITEMS_PER_THEME, QUESTIONS, ADDED = 12, 40, 50, 1000
GRAPH_ROWS = 200_000  # the most rows whose HNSW graph is built here: it takes minutes


def prefixes(rows: int, items: int, seed: int) -> tuple[np.ndarray, ...]:
    """keys, taken, users, recent of so many rows."""
    rng = np.random.default_rng(seed)
    themes = items // ITEMS_PER_THEME
    theme = (themes * rng.random(rows) ** 2).astype(np.int64)  # some themes have more rows
    inside = (ITEMS_PER_THEME * rng.random((rows, RECENT + AFTER)) ** 2).astype(np.int64)
    stray = rng.random(inside.shape) < 0.2
    chosen = np.where(
        stray, rng.integers(0, items, inside.shape), theme[:, None] * ITEMS_PER_THEME + inside
    ).astype(np.int32)
    recent = chosen[:, :RECENT]
    recent[np.arange(RECENT) >= rng.integers(2, RECENT + 1, rows)[:, None]] = -1
    centres = np.random.default_rng(0).standard_normal((themes, WIDTH), np.float32)
    keys = centres[theme] + 0.7 * rng.standard_normal((rows, WIDTH), np.float32)
    return keys, chosen[:, RECENT:], np.arange(rows) // 6, recent


def each(ask, count: int) -> tuple[float, list[np.ndarray]]:
    """Median milliseconds of one question alone, and the rows found; the first one warms up."""
    times, found = [], []
    for number in [0, *range(count)]:
        began = time.perf_counter()
        found.append(ask(number).rows[0])
        times.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(times[1:]), 3), found[1:]


def measure(rows: int) -> dict[str, object]:
    items = rows // ROWS_PER_ITEM
    data = prefixes(rows, items, 1)
    states, _, _, asked = prefixes(QUESTIONS, items, 2)
    result: dict[str, object] = {"rows": rows, "items": items}
    exact: list[np.ndarray] = []
    for kind in ("flat", "ivf", "hnsw"):
        if kind == "hnsw" and rows > GRAPH_ROWS:
            continue
        began = time.perf_counter()
        memory = Memory(*data, kind=kind)
        built = round(time.perf_counter() - began, 2)
        took, found = each(lambda n, m=memory: m.search(states[n : n + 1], NEIGHBOURS), QUESTIONS)
        exact = exact or found
        shared = [len(set(a) & set(b)) / NEIGHBOURS for a, b in zip(exact, found, strict=True)]
        result[kind] = {"build_s": built, "ms": took, "found": round(float(np.mean(shared)), 3)}
    result["bytes_per_row_state"] = round(memory.keys.nbytes / rows, 1)
    result["bytes_per_row_rest"] = round(
        (memory.bytes - memory.keys.nbytes) / rows, 1
    )  # what was taken, who took it, the items
    for name, weighing in (("items", SHARP), ("taste", BROAD)):
        began = time.perf_counter()
        index = memory.by_items(weighing)
        built = round(time.perf_counter() - began, 2)
        took, _ = each(
            lambda n, x=index: x.search(x.weigh(asked[n : n + 1]), NEIGHBOURS, memory.users),
            QUESTIONS,
        )
        result[name] = {
            "build_s": built, "ms": took, "bytes_per_row": round(index.bytes / rows, 1)
        }  # fmt: skip
    new = prefixes(ADDED, items, 3)
    times = []
    for start in range(0, ADDED, 10):
        began = time.perf_counter()
        memory.append(*(array[start : start + 10] for array in new))
        times.append(1000 * (time.perf_counter() - began))
    result["append_10_rows_ms"] = round(statistics.median(times), 3)
    found = index.search(index.weigh(new[3][-1:]), 1, memory.users)
    if found.rows[0, 0] != rows + ADDED - 1:
        raise SystemExit("a row that was added is not found")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="131072,1048576")
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    began = time.monotonic()
    sizes = [measure(int(rows)) for rows in options.rows.split(",")]
    result = {"name": "memory", "sizes": sizes, "neighbours": NEIGHBOURS, "width": WIDTH}
    result |= {"threads": 1, "wall_s": round(time.monotonic() - began, 1), **provenance()}
    if options.save:
        (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
