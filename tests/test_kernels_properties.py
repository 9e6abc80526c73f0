"""Invariants of the quantizer, on inputs hypothesis makes up."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streamctl.kernels import backends, nearest_codeword, reconstruct, residual_quantize

BACKENDS = [name for name, missing in backends().items() if not missing and name != "triton"]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)
fast = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def problems(draw, integers=False):
    """(x, codebooks): Gaussian at some scale and offset, or small integers (exact, many ties)."""
    n, d = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    levels, k = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(n, d, generator=generator)
    codebooks = torch.randn(levels, k, d, generator=generator)
    if integers:
        return (x * 2).round(), (codebooks * 2).round()
    scale = draw(st.sampled_from([1e-6, 1.0, 300.0]))
    return x * scale, codebooks * scale * draw(st.sampled_from([0.3, 1.0]))


@fast
@given(problem=problems())
def test_codes_are_in_range_and_reconstruction_plus_residual_is_x(backend, problem):
    x, codebooks = problem
    codes, residual = residual_quantize(x, codebooks, backend=backend)
    assert codes.min() >= 0 and codes.max() < codebooks.shape[1]
    size = x.abs().amax() + codebooks.abs().amax((1, 2)).sum()
    total = reconstruct(codes, codebooks) + residual
    torch.testing.assert_close(total, x, rtol=0, atol=float(size) * 1e-6)


@fast
@given(problem=problems() | problems(integers=True))
def test_each_chosen_codeword_is_a_nearest_one_the_lowest_on_ties(backend, problem):
    x, codebooks = problem
    codes, residual = residual_quantize(x, codebooks, backend=backend)
    r = x
    for level, codebook in enumerate(codebooks):
        distances = (r[:, None].double() - codebook.double()).square().sum(2)
        chosen = distances.gather(1, codes[:, level, None])[:, 0]
        assert (chosen <= distances.amin(1) * (1 + 1e-12)).all()
        if torch.equal(x, x.round()):  # integers: ties are exact
            assert torch.equal(codes[:, level], distances.argmin(1))
        r = r - codebook[codes[:, level]]
    assert torch.equal(r, residual)


@fast
@given(problem=problems(), cut=st.integers(0, 40), seed=st.integers(0, 99))
def test_row_order_and_batch_splits_do_not_matter(backend, problem, cut, seed):
    x, codebooks = problem
    codes, residual = residual_quantize(x, codebooks, backend=backend)
    halves = [residual_quantize(part, codebooks, backend=backend) for part in (x[:cut], x[cut:])]
    assert torch.equal(torch.cat([h[0] for h in halves]), codes)
    assert torch.equal(torch.cat([h[1] for h in halves]), residual)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    shuffled = residual_quantize(x[order], codebooks, backend=backend)
    assert torch.equal(shuffled[0], codes[order]) and torch.equal(shuffled[1], residual[order])


@fast
@given(problem=problems(), seed=st.integers(0, 99))
def test_permuting_a_codebook_permutes_the_codes(backend, problem, seed):
    x, codebooks = problem
    order = torch.randperm(codebooks.shape[1], generator=torch.Generator().manual_seed(seed))
    index, distance = nearest_codeword(x, codebooks[0], backend=backend)
    moved, same = nearest_codeword(x, codebooks[0][order], backend=backend)
    assert torch.equal(order[moved], index)
    torch.testing.assert_close(same, distance, rtol=1e-6, atol=0)
