"""Every kernel on every backend against the float64 reference, and what callers may rely on."""

import os
import subprocess
import sys

import pytest
import torch
from streamctl.kernels import (
    KernelError,
    backends,
    nearest_codeword,
    reconstruct,
    residual_quantize,
    straight_through,
    trie_topk,
)

from benchmarks.cases import DTYPES, OPS, Rows, assert_equal, beams_cases, to_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNNABLE = [name for name, missing in backends(DEVICE).items() if not missing]
SWEEP = [
    pytest.param(op, backend, name, dtype, id=f"{op}-{backend}-{name}-{dtype}")
    for op in OPS
    for backend in RUNNABLE
    if backend != "reference"
    for name in OPS[op].cases()
    for dtype in DTYPES
    if dtype == "float32" or name in ("plain", "strided-columns", "root", "vocabulary", "strided")
]


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Uninitialized memory reads as NaN or as an absurd integer, so unwritten outputs show."""
    empty = torch.empty

    def poison(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -(2**40) % 127)

    monkeypatch.setattr(torch, "empty", poison)


@pytest.mark.parametrize(("op", "backend", "name", "dtype"), SWEEP)
def test_backend_equals_the_reference(op, backend, name, dtype, poisoned_outputs):
    cases, call, tolerance = OPS[op]
    case = to_device(cases(DTYPES[dtype])[name], DEVICE)
    if backend == "triton" and DEVICE == "cpu" and isinstance(case, Rows):
        # The interpreter takes milliseconds a row.
        case = case._replace(x=case.x[:7])
    assert_equal(call(case, backend), call(case, "reference"), tolerance)


def some_backends():
    return [name for name in RUNNABLE if name != "triton"]


@pytest.mark.parametrize("backend", some_backends())
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_named(backend, value):
    x, codebooks = torch.randn(5, 4), torch.randn(2, 3, 4)
    x[3, 1] = value
    for function in (
        lambda: nearest_codeword(x, codebooks[0], backend=backend),
        lambda: residual_quantize(x, codebooks, backend=backend),
    ):
        with pytest.raises(KernelError, match=r"x must be finite.* row 3"):
            function()
    codebooks[0, 2, 0] = value
    with pytest.raises(KernelError, match="codebook must be finite"):
        nearest_codeword(x, codebooks[0], backend=backend)
    with pytest.raises(KernelError, match="codebooks must be finite"):
        residual_quantize(x, codebooks, backend=backend)


BAD = {
    "x must be a torch.Tensor, got numpy.ndarray": lambda x, c: nearest_codeword(x.numpy(), c[0]),
    r"x must have shape \(N, 4\), got \(5, 3\)": lambda x, c: nearest_codeword(x[:, :3], c[0]),
    r"codebook must have shape \(K, D\), got \(2, 3, 4\)": lambda x, c: nearest_codeword(x, c),
    "x must be float32 or bfloat16, got float64": lambda x, c: residual_quantize(x.double(), c),
    r"codebooks needs at least one level": lambda x, c: residual_quantize(x, c[:0]),
    r"codebook needs at least one codeword": lambda x, c: nearest_codeword(x, c[0, :0]),
    r"codes must lie in \[0, 3\)": lambda x, c: reconstruct(torch.full((5, 2), 3), c),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_arguments_say_what_is_required_and_what_came(message):
    with pytest.raises(KernelError, match=message):
        BAD[message](torch.randn(5, 4), torch.randn(2, 3, 4))


def small_trie():
    case = beams_cases()["first-level"]
    return dict(zip(case._fields[:5], case[:5], strict=True))


@pytest.mark.parametrize("backend", some_backends())
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": torch.full((3, 5), 10**9)}, r"nodes must lie in \[-1, \d+\), got 1000000000"),
        ({"nodes": torch.full((3, 5), -2)}, r"nodes must lie in \[-1, \d+\), got -2"),
        ({"logits": torch.full((3, 5, 23), torch.nan)}, "must not hold NaN"),
        ({"logits": torch.full((3, 5, 23), torch.inf)}, "must not hold NaN or .inf"),
        ({"beam_scores": torch.full((3, 5), torch.nan)}, "must not hold NaN"),
        ({"logits": torch.zeros(3, 5, 7)}, r"trie tokens must lie in \[0, 7\)"),
        ({"k": 0}, "k must be an int >= 1, got 0"),
        ({"normalize": "all"}, "normalize must be one of"),
        ({"trie": (1, 2, 3)}, "trie must be a CsrTrie, got tuple"),
        ({"allowed": torch.ones(3, dtype=torch.bool)}, r"allowed must have shape"),
    ],
)
def test_wrong_searches_are_refused(backend, change, message):
    with pytest.raises(KernelError, match=message):
        trie_topk(**{**small_trie(), **change}, backend=backend)


def test_a_malformed_trie_is_refused_not_read_past():
    arguments = small_trie()
    start = arguments["trie"].child_start.clone()
    start[1:] = 10**9
    arguments["trie"] = arguments["trie"]._replace(child_start=start)
    for backend in some_backends():
        with pytest.raises(KernelError, match="child_start must rise"):
            trie_topk(**{**arguments, "nodes": torch.zeros(3, 5).long()}, backend=backend)


def test_vocabulary_scores_are_the_masked_log_softmax():
    case = beams_cases()["root"]
    scores, _, tokens, _ = trie_topk(*case[:5], normalize="vocabulary")
    expected = case.logits.log_softmax(-1)[:, 0].gather(1, tokens) + case.beam_scores
    torch.testing.assert_close(scores, expected)


def test_legal_scores_of_all_children_sum_to_one():
    case = beams_cases()["root"]
    scores, *_ = trie_topk(*case[:4], 21)
    total = scores.logsumexp(1) - case.beam_scores[:, 0]
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-5, rtol=0)


def test_a_filter_does_not_raise_the_scores_of_what_it_leaves():
    case = beams_cases()["allowed"]

    def found(allowed):
        scores, parents, _, nodes = trie_topk(*case[:4], 40, allowed=allowed)
        place = (nodes >= 0).nonzero().tolist()
        return {(u, int(parents[u, i]), int(nodes[u, i])): float(scores[u, i]) for u, i in place}

    every, filtered = found(None), found(case.options["allowed"])
    assert filtered and filtered.items() < every.items()


def test_straight_through_passes_the_gradient_to_x_alone():
    x = torch.randn(6, 4, requires_grad=True)
    codebooks = torch.randn(3, 5, 4, requires_grad=True)
    codes, quantized = straight_through(x, codebooks)
    assert torch.equal(quantized, reconstruct(codes, codebooks))
    weight = torch.randn(6, 4)
    (quantized * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert codebooks.grad is None
    # Eq. 6's codebook term gathers the codewords itself.
    sum(((codebooks[i][codes[:, i]]) ** 2).sum() for i in range(3)).backward()
    assert codebooks.grad.abs().sum() > 0


def test_unknown_backends_list_the_known(monkeypatch):
    x, codebook = torch.randn(2, 3), torch.randn(4, 3)
    message = "unknown backend 'fast'; known: auto, reference, numba, triton"
    with pytest.raises(KernelError, match=message):
        nearest_codeword(x, codebook, backend="fast")
    monkeypatch.setenv("STREAMCTL_KERNELS", "fast")
    with pytest.raises(KernelError, match="STREAMCTL_KERNELS: " + message):
        nearest_codeword(x, codebook)


def test_an_explicit_backend_that_cannot_run_raises(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match=r"'triton', which cannot run here: it runs on CUDA"):
            nearest_codeword(torch.randn(2, 3), torch.randn(4, 3), backend="triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match="pip install numba"):
        nearest_codeword(torch.randn(2, 3), torch.randn(4, 3), backend="numba")


def test_an_argument_wins_over_the_environment(monkeypatch):
    from streamctl.kernels.dispatch import resolve

    assert resolve(None, "cpu") == "numba" and resolve(None, "mps") == "reference"
    monkeypatch.setenv("STREAMCTL_KERNELS", "reference")
    assert resolve(None, "cpu") == "reference" and resolve("numba", "cpu") == "numba"


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, streamctl.kernels as k\n"
        "assert k.__version__ == '0'\n"
        "print([m for m in ('torch', 'numba', 'triton', 'numpy') if m in sys.modules])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_an_op_stays_a_function_after_its_folder_is_imported():
    code = (
        "import streamctl.kernels.trie_topk.reference, streamctl.kernels as k\n"
        "from streamctl.kernels import trie_topk\n"
        "print(callable(trie_topk) and callable(k.trie_topk) and callable(k.nearest_codeword))"
    )
    assert run_python(code).stdout.strip() == "True"


@pytest.mark.skipif("triton" in RUNNABLE, reason="the sweep above already ran it")
def test_triton_kernels_equal_the_reference_under_the_interpreter():
    pytest.importorskip("triton")
    sweep = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, "-k", "equals and triton-"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert sweep.returncode == 0, sweep.stdout[-3000:]
