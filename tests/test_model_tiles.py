"""Products over tiles and whole compiled passes give what plain PyTorch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from streamctl.kernels import choice, simd
from test_model import histories, small_policy

from streamctl.errors import UsageError
from streamctl.model import frozen, passes, tiles

KINDS = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(not simd.HAS_BF16_DOT, reason="no bf16 products here"),
    ),
]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 2, 1), (3, 34, 33), (48, 64, 100)])
def test_a_product_over_tiles_is_the_product(dtype, rows, inputs, outputs):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    out = np.full((rows, tiles.padded(outputs)), np.nan, np.float32)
    bits = x.view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else x.numpy()
    passes.product(bits, tiles.pack(weight, dtype), 0, rows, out)
    wanted = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(torch.from_numpy(out[:, :outputs]), wanted, atol=1e-4, rtol=1e-5)
    assert (out[:, outputs:] == 0).all()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("history", ["codes", "items"])
def test_compiled_passes_and_plain_torch_agree_with_the_modules(dtype, history, monkeypatch):
    """Users of different lengths, more rows than a block, several tokens at once and one by one."""
    policy = small_policy(history, d_model=48, heads=3, d_kv=18, d_ff=70, decoder_layers=2)
    past = histories(40, [20, 1, 7, 13, 2, 20])
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(3, policy.tokens.size, (6, 4, 3), generator=generator)
    second = torch.randint(3, policy.tokens.size, (6, 9, 1), generator=generator)
    parent = torch.randint(4, (6, 9), generator=generator)

    def run():
        encoded = policy.encode(past)
        early, _ = policy.extend(encoded, first)
        last, cache = policy.extend(encoded, first, last_only=True)
        assert torch.equal(last, early[:, :, -1:])
        late, _ = policy.extend(encoded, second, past=cache.reorder(parent))
        real = encoded.states if encoded.mask is None else encoded.states[encoded.mask]
        return real, early, late, policy.logits(late)

    wanted = [x.detach() for x in run()]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        found = run()
        assert frozen.packed(policy.encoder, frozen.PackedEncoder, past.float()).like == dtype
        monkeypatch.setenv("STREAMCTL_DECODE", "plain")
        plain = run()
        assert frozen.packed(policy.encoder, frozen.PackedEncoder, past.float()) is None
    # Two stacks of rounding to bf16 (2^-9 of their size) add up to a few hundredths.
    bound = 2e-5 if dtype == torch.float32 else 0.06
    for ours, by_torch, theirs in zip(found, plain, wanted, strict=True):
        torch.testing.assert_close(ours.float(), theirs, atol=bound, rtol=0)
        torch.testing.assert_close(by_torch.float(), theirs, atol=bound, rtol=0)


@torch.no_grad()
def test_a_row_depends_on_no_other_row():
    policy = small_policy("items", d_kv=6)
    past = histories(40, [9, 9, 9, 9, 9, 9, 9])
    together = policy.encode(past).states
    for user in range(7):
        assert torch.equal(together[user], policy.encode(past[user : user + 1]).states[0])


def test_weights_are_packed_again_when_they_are_trained_and_not_when_others_are():
    trained, frozen_one = small_policy("items"), small_policy("items")
    frozen_one.requires_grad_(False)
    past = histories(40, [9, 9])

    def packed(policy):
        with torch.no_grad():
            policy.encode(past)
            return frozen.packed(policy.encoder, frozen.PackedEncoder, past.float())

    before = packed(trained), packed(frozen_one)
    optimizer = torch.optim.AdamW(
        [*trained.parameters(), *frozen_one.parameters()], lr=0.1, fused=True
    )
    trained.encode(past).states.sum().backward()
    optimizer.step()
    assert packed(trained) is not before[0]
    assert packed(frozen_one) is before[1]


@torch.no_grad()
@pytest.mark.parametrize("users", [1, 16])
def test_the_chosen_way_is_not_slower_than_plain_torch_by_more_than_noise(users, monkeypatch):
    policy = small_policy("items", d_model=64, heads=4, d_kv=16, d_ff=128)
    past = histories(40, [20] * users)
    choices = {}
    monkeypatch.setattr(choice, "_answers", choices)
    monkeypatch.setattr(choice.places, "folder", lambda: None)

    def by(way):
        def run():
            monkeypatch.setenv("STREAMCTL_DECODE", way)
            encoded = policy.encode(past)
            policy.extend(encoded, torch.full((users, 20, 1), 5))

        return run

    torch.manual_seed(3)
    by("auto")()
    drawn = torch.randint(1 << 62, ())
    torch.manual_seed(3)
    assert torch.randint(1 << 62, ()) == drawn  # measuring takes no chance from a training
    assert set(choices.values()) <= {"packed", "plain"} and len(choices) == 2
    for _ in range(3):  # a machine that does much else is asked again
        times = choice.times({way: by(way) for way in ("auto", "plain")})
        if times["auto"] <= 1.3 * times["plain"]:
            return
    raise AssertionError(times)


def test_an_unknown_way_is_refused_with_the_known_ones(monkeypatch):
    monkeypatch.setenv("STREAMCTL_DECODE", "fast")
    with torch.no_grad(), pytest.raises(UsageError, match="known: auto, packed, plain"):
        small_policy().encode(histories(40, [3]))
