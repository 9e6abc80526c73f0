"""A small shop through every stage, its commands run in forks of a server that has imported all.

What is killed, cut off or timed is then the work, not the seconds of imports before it. Benchmarks
and tests of faults and of several processes share this.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from streamctl.runs import RunDir

SETTINGS = """
[tokenize]
encoder = "tfidf"
codes = 8
levels = 3
dim = 16
latent = 8
hidden = [32]
epochs = 12
batch = 64
neighbours = 10
[pretrain]
epochs = 2
batch = 64
[annotate]
length = 2
[sft]
rounds = 2
epochs = 1
batch = 64
[rl]
steps = 4
group = 4
batch = 16
negatives = 5
validate_every = 2
[baseline]
epochs = 2
[eval]
beam = 10
bootstrap = 50
"""
SHOP = "data synth --users 40 --items 40 --seed 1"
_PRELOAD = ["streamctl.pipeline", "streamctl.evaluation.stage", "streamctl.training.rl",
            "streamctl.tokenizer.stage", "streamctl.baselines.train", "streamctl.training.sft",
            "streamctl.training.pretrain", "streamctl.cli", "streamctl.kernels.cpu_quantize",
            "streamctl.kernels.trie_topk.numba_cpu", "faiss", "matplotlib.backends.backend_agg",
            "sklearn.decomposition", "sklearn.feature_extraction.text", "torch._dynamo",
            "typer.rich_utils"]  # fmt: skip


def command(words: Sequence[str], output: Path, arm: Callable[[], None] | None) -> None:
    """The console command in this process: stdout to OUTPUT.out, stderr to OUTPUT.err."""
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{output}.{kind}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, number)
    import torch

    from streamctl.cli import main

    torch.set_num_threads(1)
    if arm is not None:
        arm()
    sys.argv = ["streamctl", *words]
    main()


@dataclass(frozen=True)
class Answer:
    """How a command ended: its exit code (-9 when it was killed) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Commands:
    """Runs console commands in forks; outputs go to files in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(_PRELOAD)

    def start(
        self, words: Sequence[str], arm: Callable[[], None] | None = None, output: str = "command"
    ):
        """A process of the command; `arm` is called in it first, `output` names its files."""
        process = self.context.Process(target=command, args=(words, self.folder / output, arm))
        process.start()
        return process

    def wait(self, process, output: str = "command") -> Answer:
        process.join()
        texts = ((self.folder / f"{output}.{kind}").read_text() for kind in ("out", "err"))
        return Answer(process.exitcode, *texts)

    def run(self, words: Sequence[str], arm: Callable[[], None] | None = None) -> Answer:
        """Run to the end. `arm` is called in the fork before the command."""
        return self.wait(self.start(words, arm))


def hashes(run: RunDir) -> dict[str, dict[str, str]]:
    """Every complete stage's artifacts and their hashes."""
    found = {}
    for path in sorted(run.path.rglob("manifest.json")):
        name = str(path.parent.relative_to(run.path))
        found[name] = run.stage(name).manifest["artifacts"]
    return found
