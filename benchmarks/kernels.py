"""Speed and memory of streamctl.kernels beside what a user would otherwise take.

    python benchmarks/kernels.py --json [--save] [--repeats 7] [--only residual_quantize]

Everything is timed in one run, contenders taking turns, medians. A backend whose results differ
from the reference gets no row: the run stops. `rows("cuda")` is what benchmarks/gpu.py runs.
"""

from __future__ import annotations

import subprocess
import sys

import peers
import torch
from cases import OPS, assert_equal, random_beams, random_items, random_rows, to_device
from streamctl.kernels import nearest_codeword, residual_quantize, trie_topk

BACKEND = {"cpu": "numba", "cuda": "triton"}
# Rows at which chunked addmm + argmin was fastest of 512 .. 8192 on a CPU; a GPU wants many more.
CHUNK = {"cpu": 2048, "cuda": 1 << 17}
# (N, D, L, K) of the cases.
QUANTIZE = {"cpu": (200_000, 32, 4, 256), "cuda": (10_000_000, 32, 4, 256)}
ANNOTATE = (256, 256, 1, 1024)
NEAREST = {"cpu": (100_000, 256, 1, 1024), "cuda": (1_000_000, 256, 1, 1024)}


def check(ours, reference, op, backend):
    try:
        assert_equal(ours, reference, OPS[op].tolerance)
    except AssertionError as error:
        raise SystemExit(
            f"{op} {backend}: differs from the reference; no figures for it\n{error}"
        ) from None


def short(n):
    if n < 1000:
        return f"n{n}"
    return f"n{n // 1_000_000}m" if n >= 1_000_000 else f"n{n // 1000}k"


def search_row(case, contenders, work, repeats, now):
    """A row of a search: the best exact peer is compared with."""
    broken = {}
    seconds = peers.take_turns(contenders, repeats, now, broken)
    if "streamctl" in broken:
        raise SystemExit(f"{case}: ours failed: {broken['streamctl']}")
    # Peers whose answers differ are listed, never compared with.
    inexact = {peer: work / seconds.pop(peer) for peer in list(seconds) if "inexact" in peer}
    more = {"peers_that_failed": broken, "inexact_peers": inexact}
    return peers.row(
        case, seconds, work, "rows/s", **{key: part for key, part in more.items() if part}
    )


def nearest_by_cdist(x, codebook, _):
    return torch.cdist(x, codebook).argmin(1)


def nearest_by_addmm(x, codebook, bias):
    return torch.addmm(bias, x, codebook.T, alpha=-2).argmin(1)


def nearest_by_tf32(x, codebook, bias):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    index = nearest_by_addmm(x, codebook, bias)
    torch.set_float32_matmul_precision(before)
    return index


def levels(x, codebooks, nearest, chunk):
    """Residual quantization as one writes it in PyTorch, `chunk` rows at a time."""
    codes = torch.empty(len(x), len(codebooks), dtype=torch.int64, device=x.device)
    biases = codebooks.square().sum(2)
    for start in range(0, len(x), chunk):
        residual = x[start : start + chunk].clone()
        for level, codebook in enumerate(codebooks):
            code = nearest(residual, codebook, biases[level])
            codes[start : start + chunk, level] = code
            residual -= codebook[code]
    return codes


def torch_peers(x, codebooks, device):
    chunk = CHUNK[device]
    whole = len(x) if device == "cpu" else 1 << 20
    ways = {
        "torch cdist+argmin": (nearest_by_cdist, whole),
        "torch chunked addmm+argmin": (nearest_by_addmm, chunk),
        "torch.compile cdist+argmin": (torch.compile(nearest_by_cdist), whole),
        "torch.compile chunked addmm+argmin": (torch.compile(nearest_by_addmm), chunk),
    }
    if device == "cuda":
        ways["torch chunked TF32 addmm+argmin (inexact)"] = (nearest_by_tf32, chunk)
        try:
            before = torch.get_float32_matmul_precision()
            from rectokens.ops.nn_quantize import nearest_neighbor_quantize

            torch.set_float32_matmul_precision(before)  # rectokens sets it for everybody
            ways["rectokens nearest_neighbor_quantize (inexact)"] = (
                lambda r, c, _: nearest_neighbor_quantize(r, c),
                len(x),
            )
        except ImportError:
            pass
    return {
        name: lambda way=way, rows=rows: levels(x, codebooks, way, rows)
        for name, (way, rows) in ways.items()
    }


def residual_quantize_row(repeats, device, now):
    n, d, depth, k = QUANTIZE[device]
    name = BACKEND[device]
    x, codebooks = to_device(random_rows(n, d, depth, k), device)
    some = torch.arange(0, n, n // 2000, device=device)
    ours, residual = residual_quantize(x, codebooks, backend=name)
    expected = residual_quantize(x[some], codebooks, backend="reference")
    check((ours[some], residual[some]), expected, "residual_quantize", name)
    contenders = {"streamctl": lambda: residual_quantize(x, codebooks, backend=name)}
    with torch.no_grad():
        contenders |= torch_peers(x, codebooks, device)
        if device == "cpu":
            contenders |= quantizer_libraries(x, depth, k)
        case = f"residual_quantize/{short(n)}-d{d}-l{depth}-k{k}"
        return search_row(case, contenders, n, repeats, now)


def quantizer_libraries(x, depth, k):
    import faiss
    from vector_quantize_pytorch import ResidualVQ

    rq = faiss.ResidualQuantizer(x.shape[1], depth, 8)
    rq.max_beam_size = 1
    rq.train_type = faiss.ResidualQuantizer.Train_default
    rq.train(x[:5000].numpy())
    vq = ResidualVQ(dim=x.shape[1], num_quantizers=depth, codebook_size=k).eval()
    return {
        "faiss ResidualQuantizer beam 1": lambda: rq.compute_codes(x.numpy()),
        "vector-quantize-pytorch ResidualVQ": lambda: vq(x[None]),
    }


def nearest_codeword_row(shape, repeats, device, now):
    n, d, _, k = shape
    name = BACKEND[device]
    x, codebooks = to_device(random_rows(n, d, 1, k), device)
    some = torch.arange(0, n, max(1, n // 500), device=device)
    index, distance = nearest_codeword(x, codebooks[0], backend=name)
    expected = nearest_codeword(x[some], codebooks[0], backend="reference")
    check((index[some], distance[some]), expected, "nearest_codeword", name)
    contenders = {"streamctl": lambda: nearest_codeword(x, codebooks[0], backend=name)}
    contenders |= torch_peers(x, codebooks, device)
    if device == "cpu":
        contenders |= search_libraries(x, codebooks[0])
    case = f"nearest_codeword/{short(n)}-d{d}-k{k}"
    return search_row(case, contenders, n, repeats, now)


def search_libraries(x, codebook):
    import faiss

    flat = faiss.IndexFlatL2(x.shape[1])
    flat.add(codebook.numpy())
    kmeans = faiss.Kmeans(x.shape[1], len(codebook))
    kmeans.centroids, kmeans.index = codebook.numpy(), flat
    return {
        "faiss IndexFlatL2": lambda: flat.search(x.numpy(), 1),
        "faiss Kmeans.assign": lambda: kmeans.assign(x.numpy()),
    }


# VmHWM is this program's own high-water mark; getrusage's would start at the parent's.
MEMORY = """
import sys, torch
from pathlib import Path
from streamctl.kernels import residual_quantize
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
n = int(sys.argv[1])
codebooks = torch.randn(4, 256, 32)
residual_quantize(torch.randn(20_000, 32), codebooks)
x = torch.empty(n, 32).uniform_(-1, 1)
before = peak()
codes, residual = residual_quantize(x, codebooks)
print((peak() - before - codes.nbytes - residual.nbytes) / 1e6)
"""


def memory_row():
    """Peak memory beyond inputs and outputs, in MB; the goal is under 64, flat in N."""
    used = {}
    for n in (1_000_000, 10_000_000):
        run = [sys.executable, "-c", MEMORY, str(n)]
        used[n] = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    return {
        "case": "memory/n10m", "ours": used[10_000_000], "unit": "MB beyond inputs and outputs",
        "peer_name": None, "peer": None, "ratio": None, "goal": 64.0, "at_1m": used[1_000_000],
    }  # fmt: skip


def dict_trie_step(case, root, prefixes):
    """A beam step as transformers' prefix_allowed_tokens_fn does it: a dict walk, a mask a beam."""
    batch, width, vocabulary = case.logits.shape
    mask = torch.full((batch, width, vocabulary), -torch.inf)
    for b in range(batch):
        for w in range(width):
            node = root
            for token in prefixes[b][w]:
                node = node[token]
            mask[b, w, list(node)] = 0.0
    scores = (case.logits + mask).log_softmax(-1) + case.beam_scores[..., None]
    return scores.view(batch, -1).topk(case.k)


def paths_to(case, items):
    """The token prefix of every beam's node, and the items as nested dicts."""
    start, token, child = (part.tolist() for part in case.trie)
    paths = {0: []}
    wanted = set(case.nodes.flatten().tolist())
    layer = [0]
    while not wanted <= paths.keys():
        below = []
        for node in layer:
            for edge in range(start[node], start[node + 1]):
                paths[child[edge]] = [*paths[node], token[edge]]
                below.append(child[edge])
        layer = below
    root = {}
    for item in items.tolist():
        node = root
        for code in item:
            node = node.setdefault(code, {})
    return root, [[paths[n] for n in line] for line in case.nodes.tolist()]


def trie_rows(repeats, device, now):
    """A step at depth 1 for 32 users x 20 beams; `at_root`: with all beams at the root.

    The root has 256 children in both catalogues: the same number should cost the same.
    """
    name = BACKEND[device]
    for size, count in (("12k", 12_000), ("1m", 1_000_000)):
        items = random_items(count, 4, 256)
        case = random_beams(items, 32, 20, 1, 1026, 20)
        arguments = to_device(case, device)[:5]
        logits, nodes, scores, trie, k = arguments
        root = (logits, torch.zeros_like(nodes), scores, trie, k)
        for these in (arguments, root):
            expected = trie_topk(*these, backend="reference")
            check(trie_topk(*these, backend=name), expected, "trie_topk", name)
        top, prefixes = paths_to(case, items)
        contenders = {
            "streamctl": lambda a=arguments: trie_topk(*a, backend=name),
            "at the root": lambda a=root: trie_topk(*a, backend=name),
            "Python dict trie": lambda c=case, r=top, p=prefixes: dict_trie_step(c, r, p),
        }
        seconds = peers.take_turns(contenders, 5 * repeats, now)
        more = {"at_root": 1 / seconds.pop("at the root")}
        more["children"] = case.trie.child_start.diff()[case.nodes].sum().item()
        yield peers.row(f"trie_topk/{size}", seconds, 1, "steps/s", **more)


def rows(device="cpu", repeats=7, only="", clock="wall"):
    """The rows of all cases (those whose name starts with `only`) on a device."""
    now = peers.clock(clock, device)
    makers = {
        "residual_quantize": lambda: [residual_quantize_row(repeats, device, now)],
        "nearest_codeword": lambda: [
            nearest_codeword_row(shape, repeats, device, now)
            for shape in (NEAREST[device], ANNOTATE)
        ],
        "trie_topk": lambda: list(trie_rows(repeats, device, now)),
    }
    if device == "cpu":
        makers["memory"] = lambda: [memory_row()]
    return [row for name, make in makers.items() if name.startswith(only) for row in make()]


if __name__ == "__main__":
    peers.run("kernels", __doc__.splitlines()[0], rows)
