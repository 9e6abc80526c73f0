"""The Triton kernels compile to GPU code without a GPU: the interpreter would not notice."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Pointers by the types of what they lead to; other arguments are int32.
POINTERS = {
    "fp32": "x words exact bias centre norms left_over sums logits scores codebook priors",
    "i64": "codes index order start nodes tokens children",
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
    "wide": (
        "triton_search",
        "wide_kernel",
        {"PRECISION": "tf32x3", "BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_D": 32},
    ),
    "in-order": ("triton_search", "in_order_kernel", {"BLOCK_K": 256}),
    "sums": ("codeword_sums.triton_gpu", "_sums_kernel", {"BLOCK_N": 16, "BLOCK_D": 32}),
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
BUILD = """
import importlib, json, sys
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
print(built.metadata.shared, "wgmma.mma_async" in built.asm["ptx"])
"""


@pytest.mark.parametrize("name", BUILDS)
def test_triton_kernels_compile_without_a_gpu(name):
    where, kernel, constants = BUILDS[name]
    run = subprocess.run(
        [sys.executable, "-c", BUILD, json.dumps([where, kernel, constants, POINTERS])],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    shared, tensor_cores = run.stdout.split()[-2:]
    assert int(shared) <= 227 << 10
    if "PRECISION" in constants:
        assert tensor_cores == "True"
