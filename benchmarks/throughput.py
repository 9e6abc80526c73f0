"""What each stage gets through in a second of one core.

    python benchmarks/throughput.py --json --save

A synthetic shop goes through every stage, at size tiny, on one thread. Time is processor time
of the process, so that other work on the machine does not count; each stage's figure includes its
validation and its files. docs/scale.md multiplies from here.
"""

from __future__ import annotations

import os
import tempfile
import time

import receipts

from streamctl import config as configs
from streamctl.data import load_data, synthesize
from streamctl.evaluation.stage import evaluate_run
from streamctl.provenance import provenance
from streamctl.runs import RunDir
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import sft

USERS, ITEMS = 400, 200
EPOCHS = 2
RL = {"steps": 4, "batch": 32, "group": 16, "validate_every": 4}


def measure(run: RunDir) -> list[dict[str, object]]:
    """A row a stage: what was counted, how many, and how many a core-second."""
    rows = []

    def stage(name: str, unit: str, count: int, work) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        work()
        spent = time.process_time() - processor
        rows.append({
            "stage": name, "unit": unit, "count": count, "core_s": round(spent, 2),
            "per_core_s": round(count / spent, 1),
            "wall_s": round(time.perf_counter() - wall, 2),
        })  # fmt: skip

    synthesize(run, users=USERS, items=ITEMS, seed=0)
    split = load_data(run)[1]
    examples, users = len(split.train), len(split.test)
    config = configs.TokenizeConfig(encoder="tfidf", codes=32, levels=3, epochs=50)
    stage("tokenize", "items x epochs", ITEMS * config.epochs, lambda: tokenize(run, config))
    settings = configs.PretrainConfig(epochs=EPOCHS)
    stage("pretrain", "sequences", examples * EPOCHS, lambda: pretrain(run, settings))
    labels = configs.AnnotateConfig(fit_epochs=0)
    stage("annotate", "sequences", examples, lambda: annotate(run, labels))
    tuning = configs.SftConfig(rounds=1, epochs=EPOCHS)
    stage("sft", "sequences", examples * EPOCHS, lambda: sft(run, tuning))
    rewarded = configs.RlConfig(**RL)
    rollouts = RL["steps"] * RL["batch"] * RL["group"]
    stage("rl", "rollouts", rollouts, lambda: rl(run, rewarded))
    table = configs.EvalConfig(methods=("stream_rl",), bootstrap=100)
    # Seen items left in, and masked: two rankings a user.
    stage("eval", "rankings", 2 * users, lambda: evaluate_run(run, table))
    return rows


def main() -> None:
    options = receipts.parser(__doc__).parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch._dynamo  # imported by the first optimizer otherwise: no part of any stage

    torch.set_num_threads(1)
    for _ in range(2):  # the first time compiles, once a machine
        with tempfile.TemporaryDirectory(prefix="streamctl-throughput-") as folder:
            stages = measure(RunDir(folder))
    result = {"name": "throughput", "size": "tiny", "stages": stages, "threads": 1, **provenance()}
    receipts.finish(result, options)


if __name__ == "__main__":
    main()
