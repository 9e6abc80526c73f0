"""What speed benchmarks share: contenders taking turns, a receipt head."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "numba", "triton", "faiss-cpu", "vector-quantize-pytorch", "rectokens")


def take_turns(contenders, repeats, device="cpu"):
    """Median seconds of each function of a dict, what its first call took, and why some have none.

    Returns (medians, first calls, failures), each a dict by the contender's name.
    """
    times, first, broken = {name: [] for name in contenders}, {}, {}
    for turn in range(repeats + 1):  # the first turn compiles and warms up
        for name, function in contenders.items():
            if name in broken:
                continue
            start = time.perf_counter()
            try:
                function()
                if torch.device(device).type == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # a peer that cannot run here is reported, not hidden
                broken[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                continue
            took = time.perf_counter() - start
            if turn:
                times[name].append(took)
            else:
                first[name] = took
    medians = {n: sorted(t)[len(t) // 2] for n, t in times.items() if n not in broken}
    return medians, first, broken


def row(case, ours, peers, unit="s", **more):
    """One line of a receipt; `peers` are seconds by name, the best of them is compared with."""
    best = min(peers, key=peers.get) if peers else None
    base = {"case": case, "ours": ours, "unit": unit, "peer_name": best}
    base |= {"peer": peers.get(best), "ratio": peers[best] / ours if best else None}
    return base | {**more, "peers": peers}


def provenance(name, device="cpu"):
    """A receipt's head: machine, threads, load, versions, revision."""

    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    machine = f"{model}, {os.cpu_count()} cores, {platform.system()}"
    if torch.device(device).type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return {
        "name": name,
        "machine": machine,
        "threads": torch.get_num_threads(),
        "load_before": list(os.getloadavg()),
        "versions": {package: installed(package) for package in PACKAGES},
        "git": git.strip(),
    }
