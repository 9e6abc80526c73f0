"""Shared by the speed benchmarks: the paper-size model here and in transformers, clocks, receipts.

The model has the paper's shape (4 + 4 layers, 256 wide, 4 levels of 256 codes) and random weights;
the histories' lengths are those of Amazon Beauty's training prefixes where STREAMCTL_DATA has it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import receipts
import torch

from streamctl.data.log import InteractionLog
from streamctl.data.split import Split
from streamctl.device import autocast
from streamctl.model import Policy, PolicyConfig
from streamctl.retrieval.evidence import Evidence
from streamctl.tokenizer import PrefixTrie, Tokens

ITEMS, LEVELS, CODES = 12_101, 4, 256
LONGEST = 20
Clock = Callable[[], float]


def options(description: str) -> argparse.Namespace:
    parser = receipts.parser(description)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each contender")
    parser.add_argument("--only", default="", help="cases whose names start so")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: seconds of this process alone, for a machine that others use too",
    )  # fmt: skip
    return parser.parse_args()


def paper_policy(device: str = "cpu", history: str = "codes", seed: int = 0, **others) -> Policy:
    """A policy of the paper's size over random, distinct items.

    Codes are as uneven as Beauty's: two items of five share their first two with another, one of
    twenty its first three.
    """
    config = PolicyConfig.of_size("paper", (CODES,) * LEVELS, history=history, **others)
    random = np.random.default_rng(seed)
    drawn = (CODES * random.random((3 * ITEMS, LEVELS)) ** 2.5).astype(np.int64)
    codes = np.unique(drawn, axis=0)
    codes = codes[random.permutation(len(codes))[:ITEMS]]
    tokens = torch.from_numpy(Tokens(config.sizes).item_tokens(codes))
    return Policy.build(config, tokens, seed).eval().to(device)


def transformers_model(policy: Policy) -> Any:
    """The same weights in transformers' T5."""
    from transformers import T5ForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        policy.save(folder)
        return T5ForConditionalGeneration.from_pretrained(folder).eval().to(policy.device)


def catalogue(policy: Policy) -> PrefixTrie:
    return PrefixTrie(policy.item_tokens.cpu().numpy())


def real_lengths() -> tuple[np.ndarray, str]:
    """Lengths of all training histories of Beauty, or of a geometric stand-in, and which."""
    root = Path(__file__).resolve().parent.parent
    path = Path(os.environ.get("STREAMCTL_DATA", root.parent / "shared" / "data"))
    path = path / "amazon-2014-beauty" / "user_sequence.txt"
    if path.is_file():
        users = [len(line.split()) - 1 for line in path.read_text().splitlines()]
        return np.concatenate([np.minimum(np.arange(1, n - 2), LONGEST) for n in users]), "Beauty"
    random = np.random.default_rng(0)
    return np.minimum(random.geometric(0.17, 100_000), LONGEST), "geometric"


def histories(lengths: np.ndarray, seed: int = 0) -> torch.Tensor:
    """(B, longest) random items, -1 on the right."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(ITEMS, (len(lengths), int(lengths.max())), generator=generator)
    return table.masked_fill(torch.arange(table.shape[1]) >= torch.from_numpy(lengths)[:, None], -1)


def shop(users: int = 2000, seed: int = 4) -> tuple[Split, Evidence]:
    """Random items in sequences of real lengths, and all that comes to mind of them."""
    random = np.random.default_rng(seed)
    longest = random.choice(real_lengths()[0], users) + 4  # a prefix, its target, and the held out
    items = random.integers(0, ITEMS, longest.sum()).astype(np.int32)
    offsets = np.concatenate([[0], longest.cumsum()])
    log = InteractionLog(items, offsets, [str(user) for user in range(users)])
    split = Split(log, n_items=ITEMS)
    vectors = random.standard_normal((ITEMS, 64)).astype(np.float32)
    alike = random.integers(0, ITEMS, (ITEMS, 50))
    return split, Evidence(split.training_sequences(), vectors, alike)


def encoder_inputs(policy: Policy, history: torch.Tensor) -> dict[str, torch.Tensor]:
    """Token ids and mask of transformers' encoder for these histories (code positions)."""
    tokens = policy.item_tokens[history.clamp(min=0)].flatten(1)
    mask = (history >= 0).long().repeat_interleave(LEVELS, 1)
    return {"input_ids": tokens.masked_fill(mask == 0, Tokens.PAD), "attention_mask": mask}


def clock(kind: str, device: str) -> Clock:
    if device.startswith("cuda"):

        def synchronised() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return synchronised
    return time.process_time if kind == "cpu" else time.perf_counter


def take_turns(
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    now: Clock,
    broken: dict[str, str] | None = None,
) -> dict[str, float]:
    """Median seconds of each, the contenders alternating; the first turn warms up.

    A contender that raises ends the run, or is left out and noted in `broken`.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name in list(times):
            began = now()
            try:
                contenders[name]()
            except Exception as error:
                if broken is None:
                    raise
                broken[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                del times[name]
                continue
            if turn:
                times[name].append(now() - began)
    return {name: float(np.median(found)) for name, found in times.items()}


def row(case: str, seconds: dict[str, float], work: float, unit: str, **more: Any) -> dict:
    """One line of a receipt: `work` units done in the seconds of "streamctl" and of each peer."""
    peers = {name: work / value for name, value in seconds.items() if name != "streamctl"}
    best = max(peers, key=peers.get) if peers else None
    ours = work / seconds["streamctl"]
    base = {"case": case, "ours": ours, "unit": unit, "peer_name": best}
    base |= {"peer": peers.get(best), "ratio": ours / peers[best] if best else None}
    return base | {**more, "peers": peers, "seconds": seconds}


def peak_mb(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """How far each call raises the process's resident memory, or the GPU's, in MiB."""
    if torch.cuda.is_available():
        found = {}
        for name, function in contenders.items():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        return found

    def status(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    found = {}
    for name, function in contenders.items():
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed is no one's peak
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        function()
        found[name] = round(status("VmHWM") - before, 1)
    return found


def run(name: str, description: str, rows: Callable[..., list[dict]]) -> None:
    """The main of a speed benchmark: options, its rows, a receipt."""
    settings = options(description)
    torch.set_num_threads(settings.threads)
    began = time.time()
    receipt = receipts.head(name, settings.device) | {"lengths": real_lengths()[1]}
    receipt |= {"clock": settings.clock, "repeats": settings.repeats}
    receipt["rows"] = rows(settings.device, settings.repeats, settings.only, settings.clock)
    receipts.finish(receipt | {"wall_s": round(time.time() - began, 1)}, settings)


@contextlib.contextmanager
def way(name: str) -> Iterator[None]:
    """Decoding by the packed passes, by plain torch, or (auto) by whichever was faster here."""
    before = os.environ.get("STREAMCTL_DECODE")
    os.environ["STREAMCTL_DECODE"] = name
    try:
        yield
    finally:
        del os.environ["STREAMCTL_DECODE"]
        if before is not None:
            os.environ["STREAMCTL_DECODE"] = before


def bf16(device: str):
    """bf16 autocast where the device has it: both contenders' default precision."""
    return autocast(torch.device(device))
