"""The single-pass loops give what plain PyTorch gives, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from streamctl.model import fused

KINDS = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("rows", [1, 700])
def test_residual_norm_is_a_sum_and_a_root_mean_square_norm(dtype, rows):
    torch.manual_seed(0)
    x, delta, weight = leaf(rows, 129, dtype=dtype), leaf(rows, 129, dtype=dtype), leaf(129)
    total, out = fused.residual_norm(x, delta, weight, 1e-6, 0.0)
    slopes = torch.randn(2, rows, 129)
    inputs = (x, delta, weight)
    found = torch.autograd.grad((total * slopes[0] + out * slopes[1]).sum(), inputs)
    plain = x.float() + delta.float()
    norm = F.rms_norm(plain, (129,), weight, 1e-6)
    wanted = torch.autograd.grad((plain * slopes[0] + norm * slopes[1]).sum(), inputs)
    assert total.dtype == out.dtype == dtype
    for ours, theirs in ((out, norm), *zip(found, wanted, strict=True)):
        scale = theirs.detach().float().abs().max().item()
        torch.testing.assert_close(ours.float(), theirs.float(), atol=KINDS[dtype] * scale, rtol=0)


def test_dropout_is_drawn_again_the_same_in_the_backward_pass():
    torch.manual_seed(3)
    x, delta, weight = torch.zeros(40, 256), leaf(40, 256), torch.ones(256)
    total, _ = fused.residual_norm(x, delta, weight, 1e-6, 0.25)
    (grad,) = torch.autograd.grad(total.sum(), delta)
    kept = total != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(total, torch.where(kept, delta / 0.75, 0.0))
    torch.testing.assert_close(grad, torch.where(kept, 1 / 0.75, 0.0))
    alone = fused.dropout(delta, 0.25)
    (grad,) = torch.autograd.grad(alone.sum(), delta)
    assert torch.equal(grad != 0, alone != 0) and not torch.equal(alone != 0, kept)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_softmax_adds_the_bias_of_its_head_and_closes_masked_keys(dtype):
    torch.manual_seed(1)
    scores, bias = leaf(3, 2, 4, 5, 9, dtype=dtype), leaf(4, 5, 9)
    mask = torch.rand(3, 9) > 0.3
    mask[:, 0] = True
    out = fused.softmax(scores, bias, mask)
    slopes = torch.randn(out.shape)
    found = torch.autograd.grad((out * slopes).sum(), (scores, bias))
    added = scores.float() + bias
    plain = torch.softmax(added.masked_fill(~mask.view(3, 1, 1, 1, 9), -torch.inf), -1)
    wanted = torch.autograd.grad((plain * slopes).sum(), (scores, bias))
    assert (out[~mask[:, None, None, None].expand_as(out)] == 0).all()
    for ours, theirs in ((out, plain), *zip(found, wanted, strict=True)):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=KINDS[dtype], rtol=0)


def test_a_score_that_is_no_number_is_not_hidden():
    scores = torch.zeros(2, 1, 1, 40)
    scores[1, 0, 0, 7] = torch.nan
    out = fused.softmax(scores)
    assert out[0].isfinite().all() and out[1].isnan().any()
