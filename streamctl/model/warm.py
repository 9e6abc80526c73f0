"""Compile all that answering a user calls: `python -m streamctl.model.warm`, see kernels.compiled.

Every function is compiled for the types that it is given below, and kept in Numba's cache.
"""

from __future__ import annotations

import fcntl
import os
import sys

import numpy as np
import torch

from streamctl import cache
from streamctl.device import autocast
from streamctl.kernels import compiled, residual_quantize, trie_topk
from streamctl.model.backbone import BackboneConfig, Decoder, Encoder
from streamctl.model.frozen import PackedDecoder, scores
from streamctl.retrieval.evidence import Evidence
from streamctl.tokenizer.trie import PrefixTrie


@torch.no_grad()
def compile_all() -> None:
    """Call each of them once on tiny inputs, in both dtypes."""
    config = BackboneConfig(8, 8, 4, 2, 16, 1, 1)
    x = torch.randn(2, 3, 8)
    mask = torch.tensor([[True] * 3, [True, True, False]])
    encoder, decoder = Encoder(config).eval(), Decoder(config).eval()
    table = torch.nn.Embedding(8, 8)
    trie, roots = PrefixTrie(np.array([[0, 2], [1, 3]])).on("cpu"), torch.zeros(2, 2).long()
    trie_topk(torch.randn(2, 2, 4), roots, torch.zeros(2, 2), trie, 2, backend="numba")
    for half in (True, False):  # bf16 first: it is what is served where the processor has it
        with autocast(torch.device("cpu"), half):
            for way in ("packed", "plain"):
                os.environ["STREAMCTL_DECODE"] = way
                PackedDecoder.sample(decoder, encoder(x, mask))
                scores(table, x)
    items, offsets = np.array([0, 1, 1, 0], np.int32), np.array([0, 2, 4])
    neighbours = np.array([[1], [0]], np.int32)
    Evidence((items, offsets), np.eye(2, dtype=np.float32), neighbours).gather(np.array([[0, 1]]))
    residual_quantize(x[0], torch.randn(2, 3, 8), backend="numba")


def main() -> None:
    """Compile, after another process that does; then leave word that it is done."""
    if (folder := cache.folder()) is None:
        sys.exit("nowhere to keep it: set STREAMCTL_CACHE to a folder that you can write")
    os.nice(19)
    os.environ["STREAMCTL_COMPILE"] = "wait"
    torch.set_num_threads(1)
    with open(folder / "compiling.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compile_all()
        compiled.finished()


if __name__ == "__main__":
    main()
