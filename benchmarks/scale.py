"""What a growing catalogue and a growing log do to memory, building and look-ups.

    python benchmarks/scale.py --json --save      to a million items and 100 million interactions

`catalogue`: item vectors are a seeded mixture of mixtures (popular themes, rarer themes inside
them, noise), quantized by residual k-means fitted on a sample, m = 4 levels of K = 256. For each
size: how many items share their codes, seconds to move those apart, seconds and bytes of the trie,
and milliseconds a user of a beam of 50 with a model of size tiny (its weights do not matter).

`log`: sequences of independent draws from a catalogue whose popularity falls by a power law, so
that pairs repeat as little as they can. For each number of interactions: seconds and bytes of what
the hops of evidence read, and milliseconds to gather one history's evidence, alone and in a batch.

A row is measured in a process of its own, with one thread; its times are processor time, so that
other work on the machine does not count, and its `peak_gb` is that process's.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import receipts
import torch
from streamctl.kernels import residual_quantize

from streamctl.decode.beam import recommend
from streamctl.model.policy import Policy, PolicyConfig
from streamctl.provenance import provenance
from streamctl.retrieval.evidence import Evidence
from streamctl.tokenizer.collisions import reassign
from streamctl.tokenizer.rqkmeans import residual_kmeans
from streamctl.tokenizer.tokens import Tokens
from streamctl.tokenizer.trie import PrefixTrie

LEVELS, CODES, DIM = 4, 256, 32
THEMES, PARTS = 512, 64  # themes, and themes inside each
CHUNK = 200_000  # items, or users
SAMPLE = 100_000  # items that the codebooks are fitted on
USERS, HISTORY, BEAM, REPEATS = 64, 10, 50, 5
SHOP = 100_000  # items of the log
A_USER = 20  # interactions, on average
TILT = 2.5  # the most popular hundredth of the items has 16% of the interactions
NEAR = 50  # text neighbours
TOGETHER, ALONE = 256, 100  # histories of a batch, and those that are asked for one by one


def vectors(items: int, seed: int):
    """Chunks (<= CHUNK, DIM) float32 of item vectors; the same first items for every size."""
    rng = np.random.default_rng(seed)
    themes = rng.standard_normal((THEMES, DIM), np.float32)
    parts = 0.5 * rng.standard_normal((THEMES * PARTS, DIM), np.float32)
    popularity = 1 / np.arange(1, THEMES + 1) ** 0.7
    popularity /= popularity.sum()
    for start in range(0, items, CHUNK):
        rng = np.random.default_rng([seed, start])
        theme = rng.choice(THEMES, CHUNK, p=popularity)
        part = theme * PARTS + np.minimum(rng.geometric(0.08, CHUNK) - 1, PARTS - 1)
        noise = 0.35 * rng.standard_normal((CHUNK, DIM), np.float32)
        yield torch.from_numpy((themes[theme] + parts[part] + noise)[: items - start])


def collisions(codes: np.ndarray) -> dict[str, float]:
    """How many items share their codes, and how crowded the worst code is."""
    numbers = codes @ CODES ** np.arange(LEVELS - 1, -1, -1)
    counts = np.unique(numbers, return_counts=True)[1]
    return {
        "sharing": float(counts[counts > 1].sum() / len(codes)),
        "distinct": len(counts),
        "most_on_one_code": int(counts.max()),
    }


def size_of(*held: object) -> int:
    """Bytes of the arrays that objects hold."""
    arrays = [value for one in held for value in vars(one).values()]
    return sum(value.nbytes for value in arrays if isinstance(value, np.ndarray))


def seconds(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, float]:
    """What `work` returns, and processor time."""
    began = time.process_time()
    return work(*arguments, **options), time.process_time() - began


def decode_ms(trie: PrefixTrie, tokens: torch.Tensor, users: int, seed: int) -> float:
    """Milliseconds a user of beam search, the median of several times, after a warm-up."""
    policy = Policy.build(PolicyConfig.of_size("tiny", (CODES,) * LEVELS), tokens, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(len(tokens), (users, HISTORY), generator=generator)
    took = []
    for _ in range(REPEATS + 1):
        options = {"beam": BEAM, "decoder": "direct"}
        took.append(seconds(recommend, policy, trie, history, BEAM, **options)[1])
    return 1000 * statistics.median(took[1:]) / users


def catalogue(items: int, codebooks: torch.Tensor, seed: int) -> dict[str, Any]:
    """The row of one size."""
    torch.set_num_threads(1)
    latents = torch.cat(list(vectors(items, seed)))
    (codes, *_), quantized_s = seconds(residual_quantize, latents, codebooks)
    codes = codes.numpy()
    row = {"items": items, "quantize_items_per_s": round(items / quantized_s), **collisions(codes)}
    resolved, spent = seconds(reassign, codes, latents, codebooks)
    row |= {"moved": int((resolved != codes).any(1).sum()), "reassign_s": round(spent, 2)}
    del latents, codes
    tokens = Tokens((CODES,) * LEVELS).item_tokens(resolved)
    trie, spent = seconds(PrefixTrie, tokens)
    row |= {"trie_build_s": round(spent, 2), "trie_nodes": trie.n_nodes}
    row["trie_bytes_per_item"] = round(size_of(trie) / items, 1)
    for name, users in (("decode_ms_per_user", USERS), ("decode_ms_alone", 1)):
        row[name] = round(decode_ms(trie, torch.from_numpy(tokens), users, seed), 2)
    return row


def sequences(interactions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Items int32 (T,) of all users, one after the other, and offsets int64 (U + 1,)."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(1 / A_USER, interactions // A_USER)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.empty(offsets[-1], np.int32)
    for start in range(0, len(items), CHUNK):
        part = items[start : start + CHUNK]
        part[:] = SHOP * np.random.default_rng([seed, start]).random(len(part)) ** TILT
    return items, offsets


def log(interactions: int, seed: int) -> dict[str, Any]:
    """The row of one number of interactions."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    found = sequences(interactions, seed)
    items, offsets = found
    text = rng.standard_normal((SHOP, DIM), np.float32)
    near = rng.integers(0, SHOP, (SHOP, NEAR), np.int32)
    evidence, spent = seconds(Evidence, found, text, near)
    counts, memory = evidence.transitions, evidence.memory
    held = size_of(evidence, counts, memory)
    held += sum(array.nbytes for array in (*counts.followers.arrays,
                                           *memory.postings.arrays))  # fmt: skip
    row = {
        "interactions": len(items), "users": len(offsets) - 1, "items": SHOP,
        "index_s": round(spent, 1), "gb": round(held / 1e9, 2),
        "pairs": len(counts.followers.columns[0]), "rows": len(memory),
        "postings": len(memory.postings.columns[0]),
    }  # fmt: skip

    def ask(number: int) -> float:
        """Milliseconds a history, each of another user."""
        users = rng.choice(len(offsets) - 1, number, replace=False)
        histories = np.full((number, HISTORY), -1, np.int64)
        for line, user in enumerate(users):
            latest = items[offsets[user] : offsets[user + 1]][-HISTORY:]
            histories[line, : len(latest)] = latest
        return 1000 * seconds(evidence.gather, histories, users)[1] / number

    ask(TOGETHER)  # compiles, or reads what was compiled
    row["gather_ms"] = round(statistics.median(ask(TOGETHER) for _ in range(REPEATS)), 3)
    row["gather_ms_alone"] = round(statistics.median(ask(1) for _ in range(ALONE)), 3)
    return row


def apart(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """A row from a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        row = pool.submit(work, *arguments).result()
        row["peak_gb"] = round(pool.submit(provenance).result()["peak_memory_mb"] / 1024, 2)
    return row


def main() -> None:
    parser = receipts.parser(__doc__)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--interactions", default="1000000,10000000,100000000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, load = time.monotonic(), list(os.getloadavg())
    sample = torch.cat(list(vectors(SAMPLE, options.seed)))
    codebooks = residual_kmeans(sample, LEVELS, CODES, 10, options.seed)
    sizes, lengths = (
        [int(number) for number in text.split(",") if number]
        for text in (options.sizes, options.interactions)
    )
    result = {
        "name": "scale",
        "catalogue": [apart(catalogue, size, codebooks, options.seed) for size in sizes],
        "log": [apart(log, length, options.seed) for length in lengths],
        "codes": CODES, "levels": LEVELS, "beam": BEAM, "users": USERS, "together": TOGETHER,
        "seed": options.seed, "threads": 1, "load": load,
        "wall_s": round(time.monotonic() - began, 1), **provenance(),
    }  # fmt: skip
    receipts.finish(result, options)


if __name__ == "__main__":
    main()
