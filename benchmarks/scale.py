"""What a growing catalogue does to Semantic IDs, the trie and decoding.

    python benchmarks/scale.py --json --save            up to 10 million synthetic items

Item vectors are a seeded mixture of mixtures (popular themes, rarer themes inside them, noise),
quantized by residual k-means fitted on a sample, m = 4 levels of K = 256. For each size: how many
items share their codes before anything resolves it, the seconds and bytes of the trie, and the
milliseconds a user that a beam of 50 takes with a model of size tiny (its weights do not matter).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from streamctl.kernels import residual_quantize

from streamctl.decode.beam import recommend
from streamctl.model.policy import Policy, PolicyConfig
from streamctl.runs import provenance
from streamctl.tokenizer.collisions import reassign
from streamctl.tokenizer.rqkmeans import residual_kmeans
from streamctl.tokenizer.tokens import Tokens
from streamctl.tokenizer.trie import PrefixTrie

RESULTS = Path(__file__).parent / "results"
LEVELS, CODES, DIM = 4, 256, 32
THEMES, PARTS = 512, 64  # themes, and themes inside each
CHUNK = 200_000
SAMPLE = 100_000  # items that the codebooks are fitted on
RESOLVED = 100_000  # largest catalogue whose collisions are resolved here, item by item
USERS, HISTORY, BEAM, REPEATS = 64, 10, 50, 5


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


def quantize(items: int, codebooks: torch.Tensor, seed: int) -> np.ndarray:
    """Codes (N, m) int64 of the first `items` items."""
    codes = np.empty((items, LEVELS), np.int64)
    start = 0
    for chunk in vectors(items, seed):
        codes[start : start + len(chunk)] = residual_quantize(chunk, codebooks)[0].numpy()
        start += len(chunk)
    return codes


def collisions(codes: np.ndarray) -> dict[str, float]:
    """How many items share their codes, and how crowded the worst code is."""
    numbers = codes @ CODES ** np.arange(LEVELS - 1, -1, -1)
    counts = np.unique(numbers, return_counts=True)[1]
    return {
        "sharing": float(counts[counts > 1].sum() / len(codes)),
        "distinct": len(counts),
        "most_on_one_code": int(counts.max()),
    }


def trie_bytes(trie: PrefixTrie) -> int:
    return sum(value.nbytes for value in vars(trie).values() if isinstance(value, np.ndarray))


def decode_ms(trie: PrefixTrie, tokens: torch.Tensor, seed: int) -> list[float]:
    """Milliseconds a user of beam search, several times, after a warm-up."""
    policy = Policy.build(PolicyConfig.of_size("tiny", (CODES,) * LEVELS), tokens, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(len(tokens), (USERS, HISTORY), generator=generator)
    found = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        recommend(policy, trie, history, BEAM, beam=BEAM, decoder="direct")
        found.append(1000 * (time.perf_counter() - began) / USERS)
    return found[1:]


def measure(sizes: list[int], seed: int) -> list[dict[str, object]]:
    sample = torch.cat(list(vectors(SAMPLE, seed)))
    codebooks = residual_kmeans(sample, LEVELS, CODES, 10, seed)
    rows = []
    for items in sizes:
        began = time.perf_counter()
        codes = quantize(items, codebooks, seed)
        quantized_s = time.perf_counter() - began
        row = {"items": items, "quantize_items_per_s": round(items / quantized_s)}
        row |= collisions(codes)
        if items <= RESOLVED:
            latents = torch.cat(list(vectors(items, seed)))
            began = time.perf_counter()
            resolved = reassign(codes, latents, codebooks)
            spent = time.perf_counter() - began
            row["moved"] = int((resolved != codes).any(1).sum())
            row["reassign_s"] = round(spent, 2)
        tokens = Tokens((CODES,) * LEVELS).item_tokens(codes)
        del codes
        began = time.perf_counter()
        trie = PrefixTrie(tokens)
        row["trie_build_s"] = round(time.perf_counter() - began, 2)
        row["trie_nodes"] = trie.n_nodes
        row["trie_bytes_per_item"] = round(trie_bytes(trie) / items, 1)
        took = decode_ms(trie, torch.from_numpy(tokens), seed)
        row["decode_ms_per_user"] = round(statistics.median(took), 3)
        row["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10000,100000,1000000,10000000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the receipt")
    parser.add_argument("--save", action="store_true", help="write results/scale.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    catalogue = measure([int(size) for size in options.sizes.split(",")], options.seed)
    result = {"name": "scale", "catalogue": catalogue, "codes": CODES, "levels": LEVELS}
    result |= {"beam": BEAM, "seed": options.seed, "threads": 1}
    result |= {"wall_s": round(time.monotonic() - began, 1), **provenance()}
    if options.save:
        (RESULTS / "scale.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
