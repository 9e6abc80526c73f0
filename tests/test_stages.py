"""Pretraining, SFT and RL: what each loss sees, what each stage keeps, and what guards it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_baselines import tokenized_cycle
from test_model import histories, small_policy

from streamctl import checkpoint
from streamctl.config import AnnotateConfig, PretrainConfig, RlConfig, SftConfig
from streamctl.decode import Rollout
from streamctl.decode.think import greedy_thought
from streamctl.distributed import Ranks, Share
from streamctl.errors import StreamctlError
from streamctl.tokenizer.trie import PrefixTrie
from streamctl.training import rewards
from streamctl.training.annotate import annotate
from streamctl.training.letter.annotate import label_all, think_vectors
from streamctl.training.letter.rl import Explorer, Judge, check_first, safe
from streamctl.training.letter.sft import Tuner, corrupt, total_loss
from streamctl.training.loop import Batch
from streamctl.training.losses import quantization_loss
from streamctl.training.material import Material
from streamctl.training.pretrain import pretrain, pretrain_loss, retrieved_tokens
from streamctl.training.rl import rl
from streamctl.training.sft import sft


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The circle, tokenized, pretrained and annotated."""
    run = tokenized_cycle(tmp_path_factory.mktemp("stages") / "run")
    letter = PretrainConfig(epochs=4, batch=64, lr=5e-3, thoughts="vocabulary")
    pretrain(run, letter, device="cpu")
    annotate(run, AnnotateConfig(length=2), device="cpu")
    return run


@pytest.fixture(scope="module")
def tuned(run):
    sft(run, SftConfig(rounds=2, epochs=1, batch=64, lr=2e-3, patience=0), device="cpu")
    return run


def batch_of(history: torch.Tensor, target: torch.Tensor, seed: int = 0) -> Batch:
    rows = torch.arange(len(target))
    share = Share.whole(len(target))
    return Batch(rows, history, target, rows, target, share, seed=seed, epoch=0)


def test_eq_09_retrieved_items_come_first_and_the_less_similar_before_the_nearer():
    items = torch.tensor([[10, 11], [20, 21], [30, 31]])
    look_alikes = torch.tensor([[1, 2], [2, 0], [0, 1]])  # nearest first
    found = retrieved_tokens(items, look_alikes, torch.tensor([0, 2]))
    assert found.tolist() == [[30, 31, 20, 21], [20, 21, 10, 11]]


def test_eq_10_scores_the_retrieved_codes_too():
    policy = small_policy("items")
    batch = batch_of(histories(40, [5, 5, 5]), torch.tensor([1, 2, 3]))
    look_alikes = torch.arange(80).view(40, 2) % 40
    config = PretrainConfig(temperature=1.0, direct_weight=0.0)
    loss, parts = pretrain_loss(policy, batch, look_alikes, config)
    think = retrieved_tokens(policy.item_tokens, look_alikes, batch.target)
    inputs, labels = policy.target_inputs(batch.target, think)
    scores = policy.logits(policy.decode(policy.encode(batch.history), inputs)).double()
    scores = scores.log_softmax(-1)
    want = -sum(
        scores[b, t, labels[b, t]] for b in range(3) for t in range(labels.shape[1])
        if labels[b, t] >= 0
    ) / 3  # fmt: skip
    assert (labels >= 0).sum() == 3 * 3 * 3  # two neighbours and the target, three codes each
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) == parts["slow"].item()


def test_eq_19_is_the_weighted_sum():
    terms = {name: torch.tensor(value) for name, value in
             {"sft": 2.0, "dpo": 0.5, "quant": 3.0, "state": 1.5}.items()}  # fmt: skip
    config = SftConfig(dpo_weight=0.1, quant_weight=0.25, state_weight=0.4)
    assert total_loss(terms, config).item() == pytest.approx(2 + 0.05 + 0.75 + 0.6)


def test_corruption_replaces_tokens_at_its_rate_with_legal_ones():
    thoughts = torch.zeros(4000, 4, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    found = corrupt(thoughts, 0.25, 100, 200, generator)
    changed = found[found != 0]
    assert 0.22 < len(changed) / found.numel() < 0.28
    assert changed.min() >= 100 and changed.max() < 200
    assert torch.equal(corrupt(thoughts, 0.0, 100, 200, generator), thoughts)


def test_sft_losses_move_every_part_of_the_model_and_not_the_reference():
    policy, reference = small_policy("items"), small_policy("items")
    reference.requires_grad_(False)
    look_alikes = (torch.arange(40)[:, None] + torch.arange(1, 6)) % 40
    tuner = Tuner(policy, reference, look_alikes, SftConfig(), "normalised")
    tuner.thoughts = torch.randint(*policy.tokens.think_range, (3, 2))
    loss, terms = tuner.loss(batch_of(histories(40, [5, 5, 5]), torch.tensor([1, 2, 3])))
    loss.backward()
    assert {"sft", "dpo", "quant", "state", "direct"} <= terms.keys()
    for part in (policy.encoder, policy.decoder, policy.direct, policy.thinker, policy.shared):
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        assert grads and any(grad.abs().sum() > 0 for grad in grads)
    assert all(p.grad is None for p in reference.parameters())


def tuner_of(policy, reference, thoughts, **settings) -> Tuner:
    look_alikes = (torch.arange(40)[:, None] + torch.arange(1, 6)) % 40
    tuner = Tuner(policy, reference, look_alikes, SftConfig(**settings), "normalised")
    tuner.thoughts = thoughts
    return tuner


def test_dpo_compares_policy_and_reference_without_dropout():
    policy, reference = (small_policy("items", dropout=0.5) for _ in range(2))
    tuner = tuner_of(policy.train(), reference, None)
    batch = batch_of(histories(40, [5, 5, 5]), torch.tensor([1, 2, 3]))
    # Without a thought the slow decoder begins as the direct one: nothing is preferred yet.
    found = tuner._dpo(batch, torch.empty(3, 0, dtype=torch.int64))
    assert found.item() == pytest.approx(math.log(2), abs=1e-6) and policy.training


def test_eq_15_counts_the_steps_whose_prefix_the_label_was_made_for():
    policy = small_policy("items")
    batch = batch_of(histories(40, [5, 5, 5]), torch.tensor([1, 2, 3]))
    low, high = policy.tokens.think_range
    random = corrupt(
        torch.zeros(3, 3, dtype=torch.int64), 1.0, low, high, batch.generator("corrupt")
    )
    labels = (random - low + 1) % (high - low) + low  # every token will be replaced by another
    encoded = policy.encode(batch.history)
    target = policy.item_vectors(batch.target).detach()
    first = policy.thinker.residual(target, policy.thinker.state(encoded.mean()))[:, None]
    vectors = think_vectors(policy)[labels - low]
    tuner = tuner_of(policy, small_policy("items"), labels, corrupt=1.0, own=0.0)
    found = tuner.loss(batch)[1]["quant"]
    wanted = quantization_loss(first, vectors[:, :1])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    whole = tuner_of(policy, small_policy("items"), labels, corrupt=0.0, own=0.0)
    assert whole.loss(batch)[1]["quant"] > 1.5 * found


def test_an_own_thought_is_the_policy_s_greedy_one_and_has_no_labels():
    policy = small_policy("items")
    batch = batch_of(histories(40, [5, 5, 5]), torch.tensor([1, 2, 3]))
    labels = torch.full((3, 2), policy.tokens.think_range[0])
    found = tuner_of(policy, small_policy("items"), labels, own=1.0).loss(batch)[1]
    encoded = policy.encode(batch.history)
    own = greedy_thought(policy, encoded, 2)
    wanted = -policy.target_logprob(encoded, batch.target, own).mean()
    assert found["think"] == 0
    assert found["target"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_own_thoughts_are_a_share_of_each_batch_whoever_has_its_rows():
    tuner = tuner_of(small_policy("items"), None, None, own=0.25)
    rows = torch.zeros(4000, 2, dtype=torch.int64)
    whole = tuner._own(batch_of(rows, rows[:, 0]))
    assert 0.22 < whole.float().mean() < 0.28
    share = Ranks(1, 3).share(4000)
    part = dataclasses.replace(batch_of(share.of(rows), share.of(rows[:, 0])), share=share)
    assert torch.equal(tuner._own(part), share.of(whole))


def test_labels_are_made_with_the_decoder_that_sft_starts_from(run):
    material, annotation = Material.load(run), run.stage("annotate")
    heads = load_file(annotation.file("thinker.safetensors"))
    made = {}
    for start in ("direct", "pretrain"):
        policy = material.starting_policy(run, start, torch.device("cpu"))
        policy.thinker.load_state_dict(heads)
        made[start] = label_all(policy, material.split.train, 2, "normalised", 512)[0]
    assert annotation.manifest["config"]["start"] == "direct"
    assert np.array_equal(annotation.array("thoughts.npy"), made["direct"])
    assert not np.array_equal(made["direct"], made["pretrain"])


def test_sft_annotates_anew_each_round_and_reports_self_oracle_and_direct(tuned):
    stage = tuned.stage("sft")
    report = stage.json("report.json")
    assert report["valid"].keys() == {"self", "direct", "oracle"}
    assert len(report["labels"]) == 2
    first, second = tuned.stage("annotate").array("thoughts.npy"), stage.array("thoughts-1.npy")
    assert first.shape == second.shape and not np.array_equal(first, second)


def test_the_twin_has_the_same_start_and_steps_and_no_thoughts(tuned):
    config = SftConfig(rounds=2, epochs=1, batch=64, lr=2e-3, patience=0)
    sft(tuned, config, device="cpu", twin=True)
    twin = tuned.stage("baselines/no_thinking")
    assert twin.manifest["epochs"] == tuned.stage("sft").manifest["epochs"]
    assert not list(twin.path.glob("thoughts*"))


def test_labels_that_collapse_fail_a_strict_stage_and_are_kept(run, monkeypatch):
    from streamctl.training.letter import annotate as module

    monkeypatch.setattr(module, "collapsed", lambda report: True)
    with pytest.raises(StreamctlError, match="collapsed"):
        annotate(run, AnnotateConfig(length=2, fit_epochs=0), device="cpu", force=True, strict=True)
    assert run.stage("annotate").json("report.json")["collapsed"]
    monkeypatch.undo()
    annotate(run, AnnotateConfig(length=2), device="cpu", force=True)


class Trainee:
    """A policy under GRPO, with an optimiser as `loop.fit` has it."""

    def __init__(self, policy, think: int = 2, **settings):
        reference = small_policy("items")
        reference.load_state_dict(policy.state_dict())
        reference.requires_grad_(False)
        parser = rewards.ItemParser(policy.item_tokens, policy.tokens.size)
        look_alikes = (torch.arange(40)[:, None] + torch.arange(1, 6)) % 40
        given = {"group": 8, "batch": 4, "negatives": 5, "anchor_weight": 0.0, **settings}
        config = RlConfig(**given).settled("vocabulary")
        judge = Judge(policy, reference, parser, look_alikes, config)
        trie = PrefixTrie(policy.item_tokens.numpy()) if config.rollouts == "catalogue" else None
        self.explorer = Explorer(policy, reference, judge, config, think, trie)
        self.optimizer = checkpoint.adamw(policy.parameters(), config.lr, 0.0)

    def step(self, history, target, seed: int) -> dict[str, float]:
        batch = dataclasses.replace(batch_of(history, target, seed), step=seed)
        self.optimizer.zero_grad()
        loss, metrics = self.explorer.loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.explorer.policy.parameters(), 1.0)
        self.optimizer.step()
        return {name: float(value.detach()) for name, value in metrics.items()}


def test_grpo_begins_at_ratio_one_and_kl_zero():
    found = Trainee(small_policy("items")).step(histories(40, [5] * 4), torch.arange(4), seed=0)
    assert found["ratio"] == pytest.approx(1, abs=1e-5)
    assert found["kl"] == pytest.approx(0, abs=1e-6)


def test_rl_trains_the_direct_decoder_on_the_encoder_that_it_shares():
    policy = small_policy("items")
    trainee = Trainee(policy, lr=3e-3)
    past, target = histories(40, [5] * 4), torch.arange(4)

    @torch.no_grad()
    def direct() -> float:
        return policy.target_logprob(policy.encode(past), target, decoder="direct").mean().item()

    before = direct()
    found = [trainee.step(past, target, seed)["direct"] for seed in range(8)]
    assert found[0] == pytest.approx(-before, rel=1e-4)
    assert direct() > before + 0.3, "l = 0 is answered by a decoder that the encoder has left"


def test_grpo_with_sampling_and_training_that_disagree_is_refused():
    logprobs = torch.full((2, 3, 4), -1.0)
    agreed = {"kl": torch.tensor(0.0)}
    check_first(logprobs, logprobs.clone(), agreed)
    with pytest.raises(StreamctlError, match="first ratio"):
        check_first(logprobs, logprobs + 0.01, agreed)
    with pytest.raises(StreamctlError, match="KL"):
        check_first(logprobs, logprobs.clone(), {"kl": torch.tensor(0.1)})


def test_grpo_raises_the_reward_it_is_given():
    only_exact = dict.fromkeys(
        ("format_weight", "similarity_weight", "likelihood_weight", "ranking_weight"), 0.0
    )
    past, target = histories(40, [5] * 4), torch.arange(4)
    for rollouts in ("catalogue", "free"):
        settings = {"lr": 3e-3, "group": 32, "rollouts": rollouts, **only_exact}
        trainee = Trainee(small_policy("items"), think=1, **settings)
        found = [trainee.step(past, target, seed)["reward"] for seed in range(30)]
        assert np.mean(found[-5:]) > np.mean(found[:5]) + 0.5, (rollouts, found)


def test_every_reward_has_a_weight_and_enters_the_sum():
    judge = Trainee(small_policy("items")).explorer.judge
    terms = {name: torch.full((1, 2), 10.0**place) for place, name in enumerate(rewards.TERMS)}
    assert judge.total(terms)[0, 0].item() == pytest.approx(11111)
    for name in rewards.TERMS:
        assert f"{name}_weight" in {field.name for field in dataclasses.fields(RlConfig)}


def test_weights_are_not_kept_where_ndcg_was_bought_with_recall():
    start = {"ndcg@10": 0.10, "recall@50": 0.50}
    assert safe({"ndcg@10": 0.12, "recall@50": 0.50}, start)
    assert not safe({"ndcg@10": 0.14, "recall@50": 0.49}, start)


def test_several_processes_have_the_grpo_loss_of_one():
    explorer = Trainee(small_policy("items")).explorer
    past, target = histories(40, [5] * 7), torch.arange(7)
    whole = explorer.loss(batch_of(past, target))[0].item()
    joined = 0.0
    for rank in range(3):
        share = Ranks(rank, 3).share(7)
        part = batch_of(share.of(past), share.of(target))
        part = dataclasses.replace(part, share=share, targets=target)
        joined += explorer.loss(part)[0].item() * share.weight / 7
    assert joined == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("updates", [1, 2])
def test_all_updates_on_a_batch_learn_from_its_first_rollouts(updates):
    policy = small_policy("items")
    explorer = Trainee(policy).explorer
    batch = batch_of(histories(40, [5] * 4), torch.arange(4))
    first = explorer.loss(batch)[1]
    rollouts = explorer._rollouts
    with torch.no_grad():
        policy.shared.weight.mul_(1.1)
    later = explorer.loss(dataclasses.replace(batch, update=updates))[1]
    assert explorer._rollouts is rollouts and later["reward"] == first["reward"]
    assert later["ratio"].item() != pytest.approx(1, abs=1e-3)


def test_the_rl_stage_logs_each_reward_and_ends_no_worse_than_sft(tuned):
    config = RlConfig(steps=4, group=4, batch=16, negatives=4, validate_every=2)
    rl(tuned, config, device="cpu")
    stage = tuned.stage("rl")
    report = stage.json("report.json")
    assert report["valid"]["best"]["ndcg@10"] >= report["valid"]["start"]["ndcg@10"]
    assert report["valid"]["best"]["recall@50"] >= report["valid"]["start"]["recall@50"]
    lines = map(json.loads, (stage.path / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if "reward" in line]
    assert [line["step"] for line in logged] == [2, 4] and report["steps"] == 4
    assert report["best_step"] in (0, 2, 4)
    for name in (*(f"reward/{term}" for term in rewards.TERMS), "zero_variance_groups",
                 "entropy", "format_failures", "kl"):  # fmt: skip
        assert name in logged[0], name


def test_eq_26_compares_with_the_frozen_direct_decoder():
    policy = small_policy("items")
    explorer = Trainee(policy).explorer
    past, target = histories(40, [5] * 4), torch.arange(4)
    with torch.no_grad():
        encoded = policy.encode(past)
        think = torch.randint(*policy.tokens.think_range, (4, 1, 2))
        slow = policy.target_logprob(encoded, target, think[:, 0])
        direct = explorer.reference.target_logprob(
            explorer.reference.encode(past), target, decoder="direct"
        )
        codes = policy.item_tokens[target][:, None]
        rollouts = Rollout(think, codes, torch.zeros(4, 1, 5))
        terms = explorer.judge(
            past, target, rollouts, encoded, torch.randn(4, 1, 5, 24), target, seed=0
        )
    want = (slow - direct).clamp(-1, 1)
    torch.testing.assert_close(terms["likelihood"][:, 0], want, atol=2e-2, rtol=2e-2)
    assert (terms["exact"] == 3).all() and (terms["format"] == 0).all()
