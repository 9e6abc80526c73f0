"""Speed and memory of streamctl.kernels beside what a user would otherwise take.

    python benchmarks/kernels.py --json [--save] [--repeats 7] [--only residual_quantize]

Everything is timed in one run, contenders taking turns, medians. `ceiling` is what the machine's
own large float32 matrix product would take for the same arithmetic; with bf16 dot products a
kernel may pass it (fraction > 1), so `bf16_fraction` gives its share of the bf16 product too. A
backend whose results differ from the reference gets no row: the run stops.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from streamctl.kernels import nearest_codeword, residual_quantize, trie_topk
from streamctl.kernels.nearest_codeword.cases import random_case as random_rows
from streamctl.kernels.trie_topk.cases import random_case as random_beams
from streamctl.kernels.trie_topk.cases import random_items

RESULTS = Path(__file__).parent / "results" / "kernels.json"
CHUNK = 2048  # rows at which chunked addmm + argmin was fastest of 512 .. 8192


def take_turns(contenders, repeats):
    """Median seconds of each function of a dict, or the reason why it has none."""
    times, broken = {name: [] for name in contenders}, {}
    for turn in range(repeats + 1):  # the first turn warms up
        for name, function in contenders.items():
            if name in broken:
                continue
            start = time.perf_counter()
            try:
                function()
            except Exception as error:  # a peer that cannot run here is reported, not hidden
                broken[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            if turn:
                times[name].append(time.perf_counter() - start)
    return {n: sorted(t)[len(t) // 2] for n, t in times.items() if n not in broken}, broken


def ceilings(repeats):
    """FLOP/s of large float32 and bf16 products, bytes/s of a copy."""
    a = torch.randn(2048, 2048)
    b, big = a.bfloat16(), torch.zeros(1 << 25)
    out = torch.empty_like(big)
    contenders = {"f32": lambda: a @ a, "bf16": lambda: b @ b, "copy": lambda: out.copy_(big)}
    seconds, _ = take_turns(contenders, repeats)
    flop = 2 * 2048**3
    return {
        "f32_flops": flop / seconds["f32"],
        "bf16_flops": flop / seconds["bf16"],
        "copy_bytes": 2 * big.nbytes / seconds["copy"],
    }


def check(ours, reference, what):
    for a, b in zip(ours, reference, strict=True):
        same = torch.equal(a, b) if a.dtype == torch.int64 else torch.allclose(a, b, rtol=1e-6)
        if not same:
            raise SystemExit(f"{what}: differs from the reference; no figures for it")


def row(case, ours, peers, broken, unit="s", **more):
    best = min(peers, key=peers.get) if peers else None
    base = {"case": case, "ours": ours, "unit": unit, "peer_name": best}
    base |= {"peer": peers.get(best), "ratio": peers[best] / ours if best else None}
    base |= {"ceiling": None, "fraction": None, **more, "peers": peers}
    return base | ({"peers_that_failed": broken} if broken else {})


def search_row(case, contenders, flop, limits, repeats):
    seconds, broken = take_turns(contenders, repeats)
    ours = seconds.pop("numba")
    ceiling = flop / limits["f32_flops"]
    bf16 = flop / limits["bf16_flops"] / ours
    more = {"ceiling": ceiling, "fraction": ceiling / ours, "bf16_fraction": bf16}
    return row(case, ours, seconds, broken, **more)


def nearest_by_cdist(x, codebook):
    return torch.cdist(x, codebook).argmin(1)


def nearest_by_addmm(x, codebook, bias):
    return torch.addmm(bias, x, codebook.T, alpha=-2).argmin(1)


def levels(x, codebooks, nearest, chunk):
    """Residual quantization as one writes it in PyTorch, `chunk` rows at a time."""
    codes = torch.empty(len(x), len(codebooks), dtype=torch.int64)
    biases = codebooks.square().sum(2)
    for start in range(0, len(x), chunk):
        residual = x[start : start + chunk].clone()
        for level, codebook in enumerate(codebooks):
            code = nearest(residual, codebook, biases[level])
            codes[start : start + chunk, level] = code
            residual -= codebook[code]
    return codes


def torch_peers(x, codebooks):
    def cdist(r, c, _):
        return nearest_by_cdist(r, c)

    compiled_cdist, compiled_addmm = torch.compile(cdist), torch.compile(nearest_by_addmm)
    n = len(x)
    return {
        "torch cdist+argmin": lambda: levels(x, codebooks, cdist, n),
        "torch chunked addmm+argmin": lambda: levels(x, codebooks, nearest_by_addmm, CHUNK),
        "torch.compile cdist+argmin": lambda: levels(x, codebooks, compiled_cdist, n),
        "torch.compile chunked addmm+argmin": lambda: levels(x, codebooks, compiled_addmm, CHUNK),
    }


def residual_quantize_row(limits, repeats):
    import faiss
    from vector_quantize_pytorch import ResidualVQ

    n, d, depth, k = 200_000, 32, 4, 256
    x, codebooks, _ = random_rows(n, d, depth, k)
    some = torch.arange(0, n, n // 2000)
    ours, residual = residual_quantize(x, codebooks, backend="numba")
    reference = residual_quantize(x[some], codebooks, backend="reference")
    check((ours[some], residual[some]), reference, "residual_quantize numba")
    rq = faiss.ResidualQuantizer(d, depth, 8)
    rq.max_beam_size = 1
    rq.train_type = faiss.ResidualQuantizer.Train_default
    rq.train(x[:5000].numpy())
    vq = ResidualVQ(dim=d, num_quantizers=depth, codebook_size=k).eval()
    with torch.no_grad():
        contenders = {
            "numba": lambda: residual_quantize(x, codebooks, backend="numba"),
            **torch_peers(x, codebooks),
            "faiss ResidualQuantizer beam 1": lambda: rq.compute_codes(x.numpy()),
            "vector-quantize-pytorch ResidualVQ": lambda: vq(x[None]),
        }
        flop = 2 * n * d * depth * k
        return search_row("residual_quantize/n200k-d32-l4-k256", contenders, flop, limits, repeats)


def nearest_codeword_row(limits, repeats):
    import faiss

    n, d, k = 100_000, 256, 1024
    x, codebooks, _ = random_rows(n, d, 1, k)
    some = torch.arange(0, n, n // 500)
    index, distance = nearest_codeword(x, codebooks[0], backend="numba")
    reference = nearest_codeword(x[some], codebooks[0], backend="reference")
    check((index[some], distance[some]), reference, "nearest_codeword numba")
    flat = faiss.IndexFlatL2(d)
    flat.add(codebooks[0].numpy())
    kmeans = faiss.Kmeans(d, k)
    kmeans.centroids, kmeans.index = codebooks[0].numpy(), flat
    contenders = {
        "numba": lambda: nearest_codeword(x, codebooks[0], backend="numba"),
        **torch_peers(x, codebooks),
        "faiss IndexFlatL2": lambda: flat.search(x.numpy(), 1),
        "faiss Kmeans.assign": lambda: kmeans.assign(x.numpy()),
    }
    flop = 2 * n * d * k
    return search_row("nearest_codeword/n100k-d256-k1024", contenders, flop, limits, repeats)


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
    more = {"ceiling": 64.0, "fraction": None, "at_1m": used[1_000_000]}
    return row("memory/n10m", used[10_000_000], {}, {}, "MB beyond inputs and outputs", **more)


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


def trie_rows(repeats):
    for name, count in (("12k", 12_000), ("1m", 1_000_000)):
        items = random_items(count, 4, 256)
        case = random_beams(items, 32, 20, 1, 1026, 20)
        arguments = case[:5]
        ours = trie_topk(*arguments, backend="numba")
        check(ours, trie_topk(*arguments, backend="reference"), "trie_topk numba")
        root, prefixes = paths_to(case, items)
        contenders = {
            "numba": lambda a=arguments: trie_topk(*a, backend="numba"),
            "Python dict trie": lambda c=case, r=root, p=prefixes: dict_trie_step(c, r, p),
        }
        seconds, broken = take_turns(contenders, 5 * repeats)
        children = case.trie.child_start.diff()[case.nodes].sum().item()
        yield row(f"trie_topk/{name}", seconds.pop("numba"), seconds, broken, children=children)


def provenance():
    def one(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    names = ("torch", "numba", "faiss-cpu", "vector-quantize-pytorch")
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "name": "kernels",
        "machine": f"{model}, {os.cpu_count()} cores, {platform.system()}",
        "threads": torch.get_num_threads(),
        "load_before": list(os.getloadavg()),
        "versions": {name: one(name) for name in names},
        "git": git.strip(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the whole receipt as JSON")
    parser.add_argument("--save", action="store_true", help=f"write it to {RESULTS}")
    parser.add_argument("--repeats", type=int, default=7, help="timed turns of each contender")
    parser.add_argument("--only", default="", help="run the cases whose name starts so")
    options = parser.parse_args()
    receipt = provenance()
    limits = ceilings(options.repeats)
    makers = {
        "residual_quantize": lambda: [residual_quantize_row(limits, options.repeats)],
        "nearest_codeword": lambda: [nearest_codeword_row(limits, options.repeats)],
        "memory": lambda: [memory_row()],
        "trie_topk": lambda: list(trie_rows(options.repeats)),
    }
    rows = []
    for name, make in makers.items():
        if name.startswith(options.only):
            rows += make()
    receipt |= {"ceilings": limits, "rows": rows}
    text = json.dumps(receipt, indent=1)
    if options.save:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(text + "\n")
    if options.json:
        print(text)
        return
    for r in rows:
        ratio = f"{r['ratio']:.1f}x {r['peer_name']}" if r["ratio"] else ""
        print(f"{r['case']:40} {r['ours']:.4g} {r['unit']}  {ratio}")


if __name__ == "__main__":
    main()
