"""The think curve of a run as a receipt and a plot: `streamctl eval --think-curve`, kept.

    python benchmarks/think_curve.py RUN --name scientific --users 1000

Writes results/think-curve-NAME.json and docs/img/think-curve.png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

from streamctl.config import EvalConfig, to_dict
from streamctl.evaluation.curve import think_curve
from streamctl.runs import RunDir, provenance

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--users", type=int, default=1000, help="a seeded sample")
    options = parser.parse_args()
    run, config = RunDir(options.run), EvalConfig(users=options.users)
    stage = think_curve(run, config)
    receipt = {"name": "think-curve", "data_hash": run.stage("data").hash}
    receipt |= stage.json("points.json") | {"config": to_dict(config)}
    receipt |= {"wall_s": stage.manifest["wall_s"], "load": os.getloadavg(), **provenance()}
    path = ROOT / "benchmarks" / "results" / f"think-curve-{options.name}.json"
    path.write_text(json.dumps(receipt, indent=1) + "\n")
    shutil.copyfile(stage.path / "think-curve.png", ROOT / "docs" / "img" / "think-curve.png")
    print(path)


if __name__ == "__main__":
    main()
