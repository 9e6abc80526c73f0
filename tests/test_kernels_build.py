"""The Triton kernels compile to GPU code without a GPU: the interpreter would not notice."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Pointers by the types of what they lead to; other arguments are int32.
POINTERS = {
    "fp32": "x words exact bias centre norms left_over logits scores codebook priors",
    "i64": "codes index start nodes tokens children",
    "i32": "errors",
    "i8": "open_rows",
    "u8": "allowed",
}
# Compile-time arguments of each kernel, in forms that the ops use.
BUILDS = {
    "levels-tf32": (
        "triton_search",
        "_levels_kernel",
        {"WIDTH": 32, "PRECISION": "tf32", "DISTANCE": False, "BLOCK_N": 128, "BLOCK_K": 32},
    ),
    "levels-tf32x3": (
        "triton_search",
        "_levels_kernel",
        {"WIDTH": 64, "PRECISION": "tf32x3", "DISTANCE": True, "BLOCK_N": 64, "BLOCK_K": 32},
    ),
    "levels-of-ones": (  # Triton makes constants of integers that are 1
        "triton_search",
        "_levels_kernel",
        {"WIDTH": 16, "PRECISION": "tf32", "DISTANCE": True, "BLOCK_N": 64, "BLOCK_K": 32}
        | dict.fromkeys(("n", "k", "d", "levels", "tag_bits", "stride_n", "stride_d"), 1),
    ),
    "in-order": ("triton_search", "in_order_kernel", {"BLOCK_K": 256}),
    "children-whole": (
        "trie_topk.triton_gpu",
        "_children_kernel",
        {"MASKED": True, "WHOLE": True, "BLOCK": 256},
    ),
    "children-legal": (
        "trie_topk.triton_gpu",
        "_children_kernel",
        {"MASKED": False, "WHOLE": False, "BLOCK": 256},
    ),
}
# Most registers a thread may take: 8 warps a block and two blocks a processor, or one where rows
# fill the shared memory.
REGISTERS = {"levels": 255, "in-order": 64, "children": 64}
BUILD = """
import importlib, json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

where, name, constants, pointers = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module("streamctl.kernels." + where), name)
types = {n: "*" + t for t, names in pointers.items() for n in names.split()}
signature = {
    n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names
}
source = ASTSource(kernel, signature, constexprs=constants)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
code = built.asm["sass"]
print(json.dumps({
    "shared": built.metadata.shared,
    "mma": sorted(set(re.findall(r"\\b(HGMMA|HMMA|DMMA)\\b", code))),
}))
"""


@pytest.mark.parametrize("name", BUILDS)
def test_triton_kernels_compile_without_a_gpu_and_spill_nothing(name, tmp_path):
    where, kernel, constants = BUILDS[name]
    run = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps([where, kernel, constants, POINTERS])],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_DUMP_PTXAS_LOG": "1",
            "TRITON_CACHE_DIR": str(tmp_path),  # what is compiled already leaves no log
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    report = json.loads(run.stdout.splitlines()[-1])
    report["registers"] = int(re.search(r"Used (\d+) registers", run.stdout)[1])
    print(name, report)
    assert report["shared"] <= 227 << 10
    assert "0 bytes spill stores, 0 bytes spill loads" in run.stdout, run.stdout
    most = next(most for start, most in REGISTERS.items() if name.startswith(start))
    assert report["registers"] <= most, report
    if "PRECISION" in constants:
        assert report["mma"], report
