"""Memory and time of `data prepare` on a synthetic log that does not fit in them as objects.

python benchmarks/prepare.py --json [--save] [--interactions 100000000]

The log is a csv with 20 interactions a user and popular and rare items (a power law), in the order
of time; `streamctl data prepare` reads, filters (5-core), orders, numbers and writes it in a
process of its own, whose peak resident memory the kernel reports. Temporary files are deleted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import receipts
from pyarrow import csv

from streamctl.provenance import provenance

PER_USER = 20
PER_ITEM = 200
ROWS = 1 << 22


def write_log(path: Path, interactions: int, seed: int) -> None:
    """A csv of `interactions` rows: user_id, item_id, timestamp (seconds)."""
    rng = np.random.default_rng(seed)
    users, items = interactions // PER_USER, interactions // PER_ITEM
    schema = pa.schema(
        [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64())]
    )
    with csv.CSVWriter(path, schema, write_options=csv.WriteOptions(quoting_style="none")) as out:
        for start in range(0, interactions, ROWS):
            count = min(ROWS, interactions - start)
            user = pa.array(rng.integers(0, users, count)).cast(pa.string())
            item = pa.array((items * rng.random(count) ** 2).astype(np.int64)).cast(pa.string())
            moment = 1_300_000_000 + (np.arange(start, start + count) * 300_000_000) // interactions
            names = (
                pa.compute.binary_join_element_wise(a, b, "") for a, b in (("u", user), ("i", item))
            )
            out.write_batch(pa.record_batch([*names, pa.array(moment)], schema))


def measure(interactions: int, seed: int) -> dict[str, Any]:
    """Prepare a synthetic log in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "interactions.csv"
        write_log(source, interactions, seed)
        size = source.stat().st_size
        command = [sys.executable, "-m", "streamctl", "data", "prepare", str(source)]
        command += ["--run", str(Path(folder) / "run"), "--json"]
        started = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            facts = json.loads(process.stdout.read())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if process.returncode:
            raise SystemExit(f"data prepare ended with {process.returncode}")
    return {
        "interactions": interactions,
        "seconds": round(seconds, 1),
        "minutes_per_100m": round(seconds / 60 * 1e8 / interactions, 1),
        "peak_gb": round(usage.ru_maxrss / 1024**2, 2),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "source_gb": round(size / 1e9, 2),
        "kept": {name: facts[name] for name in ("users", "items", "interactions")},
    }


def main() -> None:
    parser = receipts.parser(__doc__)
    parser.add_argument("--interactions", type=int, action="append")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = [measure(n, options.seed) for n in options.interactions or [10_000_000, 100_000_000]]
    receipt = {
        "name": "prepare",
        "command": "python benchmarks/prepare.py --json --save",
        **rows[-1],
        "rows": rows,
        "seed": options.seed,
        "load": round(os.getloadavg()[0], 1),
        **{key: value for key, value in provenance().items() if key != "peak_memory_mb"},
    }
    receipts.finish(receipt, options)


if __name__ == "__main__":
    main()
