"""nearest_codeword in Triton: three passes of rising precision, see triton_search."""

import torch

from .. import triton_search


def run(x, codebook, mask):
    n = x.shape[0]
    index = torch.full((n,), -1, dtype=torch.int64, device=x.device)
    distance = torch.zeros(n, dtype=torch.float32, device=x.device)
    rows, live = triton_search.live_rows(x, mask)
    if not len(live):
        return index, distance
    codebook = codebook.float().contiguous()
    found = triton_search.nearest(live, codebook)
    length = triton_search.distances(live, codebook, found)
    if rows is None:
        return found, length
    index[rows], distance[rows] = found, length
    return index, distance
