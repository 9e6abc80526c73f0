"""The model is T5: its checkpoints load in transformers and give the same numbers there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from transformers import T5ForConditionalGeneration

from streamctl.device import autocast
from streamctl.errors import StreamctlError
from streamctl.model import Policy, PolicyConfig
from streamctl.model.backbone import relative_buckets
from streamctl.model.candidates import thoughts_logprob
from streamctl.tokenizer import Tokens

SIZES = (6, 5, 7)


def small_policy(history: str = "codes", seed: int = 0, items: int = 40, **others) -> Policy:
    """A policy over random items, in evaluation mode."""
    shape = {"layers": 2, "decoder_layers": 3, "d_model": 24, "heads": 3, "d_kv": 5, "d_ff": 48}
    config = PolicyConfig(SIZES, history=history, **{**shape, **others})
    generator = torch.Generator().manual_seed(seed)
    codes = [torch.randint(size, (items,), generator=generator) for size in SIZES]
    tokens = Tokens(SIZES).item_tokens(torch.stack(codes, 1).numpy())
    return Policy.build(config, torch.from_numpy(tokens), seed).eval()


def histories(items: int, lengths: list[int], seed: int = 1) -> torch.Tensor:
    """Random histories of these lengths, padded with -1 on the right."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(items, (len(lengths), max(lengths)), generator=generator)
    return rows.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], -1)


def transformers_model(policy: Policy, folder, name: str = "") -> T5ForConditionalGeneration:
    """The saved policy as transformers loads it, nothing missing and nothing left over."""
    policy.save(folder)
    model, report = T5ForConditionalGeneration.from_pretrained(
        folder / name, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def encoder_inputs(policy: Policy, history: torch.Tensor) -> dict[str, torch.Tensor]:
    """What transformers' encoder is given for these histories."""
    mask = (history >= 0).long()
    if policy.config.history == "items":
        vectors = policy.shared.weight[policy.item_tokens[history.clamp(min=0)]].sum(2)
        return {"inputs_embeds": vectors / len(SIZES) ** 0.5, "attention_mask": mask}
    tokens = policy.item_tokens[history.clamp(min=0)].flatten(1)
    return {"input_ids": tokens, "attention_mask": mask.repeat_interleave(len(SIZES), 1)}


@pytest.mark.parametrize("name", ["slow", "direct"])
@pytest.mark.parametrize("lengths", [[4, 4, 4], [20, 3, 1, 9]], ids=["unpadded", "padded"])
@pytest.mark.parametrize("history", ["codes", "items"])
@torch.no_grad()
def test_checkpoint_gives_the_same_logits_in_transformers(tmp_path, history, lengths, name):
    policy = small_policy(history)
    for parameter in policy.direct.parameters():
        parameter.mul_(1.1)
    oracle = transformers_model(policy, tmp_path, "direct" if name == "direct" else "")
    past = histories(len(policy.item_tokens), lengths)
    inputs = torch.randint(policy.tokens.size, (len(lengths), 9))
    ours = policy.logits(policy.decode(policy.encode(past), inputs, name))
    theirs = oracle(**encoder_inputs(policy, past), decoder_input_ids=inputs).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_transformers(tmp_path):
    policy = small_policy("codes")
    oracle = transformers_model(policy, tmp_path)
    past = histories(len(policy.item_tokens), [5, 2])
    inputs, labels = policy.target_inputs(torch.tensor([3, 9]), torch.tensor([[4, 8], [9, 5]]))
    hidden = policy.decode(policy.encode(past), inputs)
    logits = policy.logits(hidden).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, labels.flatten()).backward()
    oracle(**encoder_inputs(policy, past), decoder_input_ids=inputs, labels=labels).loss.backward()
    theirs = dict(oracle.named_parameters())
    for name, parameter in policy.named_parameters():
        if name.startswith(("shared.", "encoder.", "decoder.")):
            torch.testing.assert_close(
                parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=name
            )


def test_padding_changes_nothing():
    policy = small_policy("items")
    past = histories(len(policy.item_tokens), [7, 2])
    inputs = torch.randint(policy.tokens.size, (2, 4))
    together = policy.decode(policy.encode(past), inputs)
    alone = policy.decode(policy.encode(past[1:, :2]), inputs[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_relative_buckets_are_exact_when_near_and_logarithmic_when_far():
    place = torch.tensor([0, 1, 7, 8, 11, 12, 200])
    two_sided = relative_buckets(place, place, bidirectional=True, buckets=32, limit=128)
    # log(200 / 8) / log(16) * 8 > 8: the last bucket; 11: log(1.375) / log(16) * 8 = 0.92.
    assert two_sided[0].tolist() == [0, 17, 23, 24, 24, 25, 31]
    assert two_sided[:, 0].tolist() == [0, 1, 7, 8, 8, 9, 15]
    causal = relative_buckets(place, place, bidirectional=False, buckets=32, limit=128)
    assert causal[:, 0].tolist() == [0, 1, 7, 8, 11, 12, 31]
    assert causal[0].tolist() == [0] * 7


def test_incremental_decoding_equals_a_whole_pass():
    """Shared prefix, branches, and reordered caches give what teacher forcing gives."""
    policy = small_policy("items")
    encoded = policy.encode(histories(len(policy.item_tokens), [6, 3]))
    think = torch.randint(3, policy.tokens.size, (2, 3))
    codes = torch.randint(3, policy.tokens.size, (2, 4, 3))
    _, past = policy.prompt(encoded, think)
    first, past = policy.extend(encoded, codes[..., :1], past=past)
    parent = torch.tensor([[2, 0, 0, 3], [1, 1, 3, 2]])
    rows = torch.arange(2)[:, None]
    later, _ = policy.extend(encoded, codes[..., 1:], past=past.reorder(parent))
    begin = torch.tensor([Tokens.THINK]).expand(2, 1)
    prefix = torch.cat([begin, think, torch.full_like(begin, Tokens.BOS)], 1)
    for branch in range(4):
        chosen = codes[rows[:, 0], parent[:, branch], :1]
        tokens = torch.cat([prefix, chosen, codes[:, branch, 1:]], 1)
        whole = policy.decode(encoded, tokens)
        torch.testing.assert_close(
            first[rows[:, 0], parent[:, branch], 0], whole[:, 5], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(later[:, branch], whole[:, 6:], atol=1e-5, rtol=1e-5)


def test_branches_of_a_user_share_cross_attention_keys():
    policy = small_policy("items")
    encoded = policy.encode(histories(len(policy.item_tokens), [6, 3]))
    tokens = torch.randint(3, policy.tokens.size, (2 * 5, 4))
    together = policy.decode(encoded, tokens, repeat=5)
    alone = policy.decode(encoded.rows(torch.arange(2).repeat_interleave(5)), tokens)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert encoded.memories["slow", True, False][0][0].shape[0] == 2


@pytest.mark.parametrize("length", [0, 2])
def test_target_logprob_is_the_sum_of_the_codes_log_probabilities(length):
    policy = small_policy("items")
    encoded = policy.encode(histories(len(policy.item_tokens), [6, 6, 6]))
    items = torch.randint(len(policy.item_tokens), (3, 5))
    think = torch.randint(3, policy.tokens.size, (3, length))
    found = policy.target_logprob(encoded, items, think)
    for column in range(5):
        inputs, labels = policy.target_inputs(items[:, column], think)
        table = torch.log_softmax(policy.logits(policy.decode(encoded, inputs)).float(), -1)
        codes = table[:, -3:].gather(-1, policy.item_tokens[items[:, column]][..., None])
        torch.testing.assert_close(found[:, column], codes[..., 0].sum(1), atol=1e-5, rtol=1e-5)
        one = policy.target_logprob(encoded, items[:, column], think)
        torch.testing.assert_close(one, found[:, column], atol=1e-5, rtol=1e-5)
        assert labels.shape == inputs.shape == (3, 3 + (1 + length if length else 0))


def test_layout_is_think_tokens_bos_codes():
    policy = small_policy()
    codes = policy.item_tokens[5].tolist()
    inputs, labels = policy.target_inputs(torch.tensor([5]), torch.tensor([[7, 8]]))
    assert inputs.tolist() == [[Tokens.THINK, 7, 8, Tokens.BOS, *codes[:-1]]]
    assert labels.tolist() == [[7, 8, -100, *codes]]
    inputs, labels = policy.target_inputs(torch.tensor([5]))
    assert inputs.tolist() == [[Tokens.BOS, *codes[:-1]]] and labels.tolist() == [codes]


def test_saved_policy_loads_unchanged(tmp_path):
    policy = small_policy("items", think_codebook=9)
    with torch.no_grad():
        policy.thinker.state.wo.weight.normal_()
    names = policy.save(tmp_path)
    assert sorted(names) == sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    )
    loaded = Policy.load(tmp_path, policy.item_tokens)
    assert loaded.config == policy.config and not loaded.training
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_damaged_or_foreign_checkpoints_are_refused_in_one_line(tmp_path):
    policy = small_policy()
    policy.save(tmp_path)
    with pytest.raises(StreamctlError, match="item tokens have shape"):
        Policy.load(tmp_path, policy.item_tokens[:, :2])
    values = dataclasses.asdict(policy.config) | {"d_model": 32}
    (tmp_path / "policy.json").write_text(json.dumps(values))
    with pytest.raises(StreamctlError, match="weights do not fit"):
        Policy.load(tmp_path, policy.item_tokens)
    (tmp_path / "thinker.safetensors").unlink()
    with pytest.raises(StreamctlError, match=r"thinker\.safetensors"):
        Policy.load(tmp_path, policy.item_tokens)


def test_same_seed_builds_the_same_policy():
    first, again, other = small_policy(seed=3), small_policy(seed=3), small_policy(seed=4)
    assert torch.equal(first.shared.weight, again.shared.weight)
    assert not torch.equal(first.shared.weight, other.shared.weight)
    for slow, direct in zip(first.decoder.parameters(), first.direct.parameters(), strict=True):
        assert torch.equal(slow, direct)


def test_dropout_is_a_function_of_the_seed_and_keeps_the_mean():
    policy = small_policy("items", dropout=0.3).train()
    past = histories(len(policy.item_tokens), [6, 6])

    def states(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return policy.encode(past).states.detach()

    assert torch.equal(states(1), states(1))
    assert not torch.equal(states(1), states(2))
    policy.eval()
    assert torch.equal(states(1), states(2))


def test_thinker_begins_as_the_plain_sums_of_the_paper():
    policy = small_policy("items")
    encoded = policy.encode(histories(len(policy.item_tokens), [6, 3]))
    hidden = torch.randn(2, 4, 24)
    found = policy.states(encoded, hidden)
    start = torch.stack([encoded.states[0].mean(0), encoded.states[1, :3].mean(0)])
    torch.testing.assert_close(found[:, 0], start)
    torch.testing.assert_close(found[:, 3], start + hidden[:, :3].sum(1))
    target = torch.randn(2, 24)
    torch.testing.assert_close(
        policy.thinker.residual(target, start, normalise=False), target - start
    )


def test_item_vectors_are_the_mean_of_learned_levels():
    policy = small_policy(dedup=True)
    tokens = policy.item_tokens[[4, 7]]
    expected = policy.shared.weight[tokens[:, :2]].mean(1)
    torch.testing.assert_close(policy.item_vectors(torch.tensor([4, 7])), expected)


def test_training_learns_to_copy_the_last_item():
    """A toy task: the target is the latest item; the initial weights let it be learnt quickly."""
    policy = small_policy("items", d_model=32, heads=4, d_kv=8, d_ff=64, dropout=0.0).train()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    for _ in range(250):
        past = torch.randint(40, (64, 4), generator=generator)
        inputs, _ = policy.target_inputs(past[:, -1])
        hidden = policy.decode(policy.encode(past), inputs)
        loss = -policy.answer_logprobs(hidden, past[:, -1]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
@torch.no_grad()
def test_items_of_many_thoughts_score_as_each_thought_alone(softmax):
    policy = small_policy(softmax=softmax)
    history = torch.tensor([[0, 1, 2], [3, 4, -1]])
    items = torch.tensor([[5, 6, 7, 5], [1, 0, 2, 3]])
    low, high = policy.tokens.think_range
    think = torch.randint(low, high, (2, 3, 2), generator=torch.Generator().manual_seed(1))
    encoded = policy.encode(history)
    together = thoughts_logprob(policy, encoded, items, think)
    for number in range(3):
        alone = policy.target_logprob(encoded, items, think[:, number])
        torch.testing.assert_close(together[:, number], alone, atol=1e-5, rtol=1e-5)
    without = thoughts_logprob(policy, encoded, items, think[:, :1, :0])
    torch.testing.assert_close(without[:, 0], policy.target_logprob(encoded, items))


@torch.no_grad()
def test_prefixes_that_candidates_share_are_read_once_and_certain_codes_not_at_all(monkeypatch):
    policy = small_policy(softmax="catalogue")
    codes = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [2, 3, 1]])
    policy.item_tokens = torch.from_numpy(policy.tokens.item_tokens(codes))
    read = []
    extend = Policy.extend

    def counted(self, encoded, tokens, *others, **options):
        read.append(tuple(tokens.shape))
        return extend(self, encoded, tokens, *others, **options)

    monkeypatch.setattr(Policy, "extend", counted)
    think = torch.full((1, 2, 1), policy.tokens.FIRST)
    encoded = policy.encode(torch.tensor([[3, 4]]))
    thoughts_logprob(policy, encoded, torch.tensor([[0, 1, 2, 3, 4]]), think)
    # The prompt of both thoughts; one first code with two ways on; one pair of codes likewise.
    assert read == [(1, 2, 3), (1, 2, 1), (1, 2, 1)]


def test_packed_weights_follow_every_update_and_agree_with_the_modules():
    policy = small_policy()
    history = torch.tensor([[0, 1, 2], [3, 4, -1]])
    items = torch.tensor([[5, 6], [1, 0]])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.05, fused=True)
    for _ in range(2):
        slow = policy.target_logprob(policy.encode(history), items)
        with torch.no_grad():
            fast = policy.target_logprob(policy.encode(history), items)
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
        optimizer.zero_grad()
        (-slow.mean()).backward()
        optimizer.step()


@torch.no_grad()
def test_users_encoded_in_fp32_are_decoded_in_bf16_too():
    policy = small_policy()
    encoded, items = policy.encode(histories(40, [3, 2])), torch.tensor([[5, 6], [1, 0]])
    exact = policy.target_logprob(encoded, items)
    with autocast(torch.device("cpu")):
        near = policy.target_logprob(encoded, items)
    torch.testing.assert_close(near, exact, atol=0.1, rtol=0.05)
