"""Exact vector-quantization and trie-search kernels; importable without streamctl's other parts.

    nearest_codeword(x, codebook)          index of, and squared distance to, the nearest codeword
    residual_quantize(x, codebooks)        codes of all levels and what is left of x
    reconstruct(codes, codebooks)          the sum of the chosen codewords
    straight_through(x, codebooks)         the same with the straight-through gradient (RQ-VAE)
    trie_topk(logits, nodes, ...)          one step of beam search constrained by a CsrTrie
    backends()                             which implementations run here

`auto` takes Triton for CUDA tensors, Numba for CPU tensors (once compiled, see `compiled.py`) and
the plain PyTorch reference for the rest. `backend=` wins over the environment variable
STREAMCTL_KERNELS. An explicit backend that cannot run raises
`KernelError`.
"""

import importlib
import sys
import types

# transformers probes for a package named `kernels` and reads its version; at the root of a source
# checkout it may find this folder instead, so the folder answers like an old, unusable release.
__version__ = "0"

# Public name -> the module it lives in. Resolved on first use, so that importing this package
# imports neither torch nor numba nor triton.
_HOME = {
    "nearest_codeword": ".nearest_codeword",
    "residual_quantize": ".residual_quantize",
    "reconstruct": ".residual_quantize",
    "straight_through": ".residual_quantize",
    "trie_topk": ".trie_topk",
    "CsrTrie": ".trie_topk",
    "KernelError": ".dispatch",
    "backends": ".dispatch",
}
OPS = ("nearest_codeword", "residual_quantize", "trie_topk")

__all__ = ["OPS", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name], __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """An op's folder and its function share a name; here the name always means the function.

    Without this, importing `streamctl.kernels.trie_topk.reference` would rebind
    `streamctl.kernels.trie_topk` from the function to the folder's module.
    """

    def __setattr__(self, name, value):
        if name in OPS and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
