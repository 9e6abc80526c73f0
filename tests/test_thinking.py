"""Thinking with evidence: weights, the mixture at the item, any length, and that it learns."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_model import encoder_inputs, histories, transformers_model
from test_retrieval_evidence import ITEMS, USERS, made, prefixes, shop

from streamctl import device
from streamctl.config import AnnotateConfig, PretrainConfig, RlConfig, SftConfig, TokenizeConfig
from streamctl.data import synthesize
from streamctl.data.log import InteractionLog
from streamctl.data.split import Split
from streamctl.decode import PolicyRecommender
from streamctl.decode.evidence import EvidenceRecommender, Weighed, log_odds, read_thought, weigh
from streamctl.distributed import Ranks, Share
from streamctl.errors import UsageError
from streamctl.model import Policy, PolicyConfig
from streamctl.ranking import evaluate
from streamctl.runs import RunDir
from streamctl.tokenizer import Tokens
from streamctl.tokenizer.trie import PrefixTrie
from streamctl.training import gathered as gathering
from streamctl.training import sft
from streamctl.training.annotate import heads_loss, infer, label_all
from streamctl.training.gathered import Gathered
from streamctl.training.loop import Batch, batches
from streamctl.training.material import Material
from streamctl.training.pretrain import pieces_loss
from streamctl.training.rl import Explorer
from streamctl.training.sft import Tuner, choice_logprobs, only_thinking
from streamctl.training.validation import surely_best

SIZES = (6, 5, 7)
HOPS = (6, 5, 4, 4, 6, 0)
LONELY = ITEMS - 1  # an item that nobody took


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    monkeypatch.setattr(device, "has_bf16", lambda where: False)


def thinker(softmax: str = "catalogue", seed: int = 0) -> Policy:
    """A policy whose weighing weighs: random weights, and codes no two items share."""
    shape = {"layers": 1, "decoder_layers": 2, "d_model": 24, "heads": 3, "d_kv": 8, "d_ff": 48}
    config = PolicyConfig(SIZES, softmax=softmax, thoughts="evidence", **shape)
    places = np.random.default_rng(seed).permutation(math.prod(SIZES))[:ITEMS]
    codes = np.stack(np.unravel_index(places, SIZES), 1)
    policy = Policy.build(config, torch.from_numpy(Tokens(SIZES).item_tokens(codes)), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        policy.shared.weight.mul_(2)
        for part in (policy.weighing.out, policy.weighing.linear, policy.weighing.codes_trust):
            part.weight.copy_(0.3 * torch.randn(part.weight.shape, generator=generator))
        policy.weighing.codes_trust.bias.fill_(0.2)
        policy.weighing.hop.weight.normal_(generator=generator)
        for part in policy.thinker.parameters():
            part.copy_(0.3 * torch.randn(part.shape, generator=generator))
    return policy


def sequences():
    """Everybody's items, `LONELY` not among them."""
    items, offsets = shop()
    return np.where(items == LONELY, 0, items), offsets


def split_of(items: np.ndarray, offsets: np.ndarray) -> Split:
    return Split(InteractionLog(items, offsets, [str(u) for u in range(USERS)]), n_items=ITEMS)


def recommender(policy: Policy, sizes=HOPS, **options) -> EvidenceRecommender:
    trie = PrefixTrie(policy.item_tokens.numpy())
    return EvidenceRecommender(policy, trie, made(sequences(), sizes=sizes), **options)


def asked() -> tuple[torch.Tensor, np.ndarray]:
    """Histories of some users, and of a stranger whose only item nobody took."""
    known, users = prefixes(sequences(), 9)
    known[-1] = [LONELY, -1, -1, -1, -1, -1]
    users[-1] = -1
    return torch.from_numpy(known), users


def batch_of(examples, rows, share: Share | None = None, seed: int = 0) -> Batch:
    share = share or Share.whole(len(rows))
    index = share.of(np.asarray(rows))
    targets = torch.from_numpy(examples.targets)
    history = torch.from_numpy(examples.histories(index))
    users = torch.from_numpy(examples.users[index])
    index = torch.from_numpy(index)
    return Batch(index, history, targets[index], users, targets[rows], share, seed=seed, epoch=0)


@pytest.mark.parametrize("length", [0, 1, 2, 5, 16, 64])
def test_every_length_ranks_k_items_and_says_what_it_thought(length):
    histories_, users = asked()
    found = recommender(thinker(), (8, 0, 0, 0, 4, 0)).recommend(
        histories_, 10, users=users, think=length
    )
    assert found.items.shape == found.scores.shape == (9, 10)
    assert ((found.items >= 0) & (found.items < ITEMS)).all()
    assert all(len(set(row)) == 10 for row in found.items.tolist())
    assert (found.scores.diff(dim=1) <= 1e-6).all()
    if not length:
        assert found.thought is None
        return
    items, weights, hops = found.thought.items, found.thought.weights, found.thought.hops
    assert items.shape == weights.shape == hops.shape == (9, length)
    assert ((items >= 0) == (hops >= 0)).all() and ((items >= 0) == (weights > 0)).all()
    # The stranger's item brings nothing to mind: the codes answer.
    assert (items[-1] == -1).all() and (items[:-1, 0] >= 0).all()
    torch.testing.assert_close(weights.sum(1), (items[:, 0] >= 0).float())
    assert (weights.diff(dim=1) <= 1e-6).all(), "a thought is in the order of its weights"


def test_without_evidence_the_slow_decoder_answers_after_an_empty_thought():
    policy = thinker()
    thinks = recommender(policy, (8, 0, 0, 0, 4, 0))
    found = thinks.recommend(torch.tensor([[LONELY]]), 5, think=3)
    encoded = policy.encode(torch.tensor([[LONELY]]))
    nothing = torch.full((1, 3), -1)
    hidden, past = policy.prompt(encoded, policy.piece_vectors(nothing, nothing + 7))
    wanted = policy.items_logprob(encoded, found.items, hidden, past)
    torch.testing.assert_close(found.scores, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 4, 32])
def test_k_distinct_items_that_are_allowed(length):
    histories_, users = asked()
    exclude = [np.arange(row, row + 12) for row in range(9)]
    allow = [np.arange(5, 35) if row % 2 else None for row in range(9)]
    found = recommender(thinker()).recommend(
        histories_, 10, users=users, think=length, exclude=exclude, allow=allow
    )
    for row, items in enumerate(found.items.tolist()):
        assert len(set(items)) == 10
        assert not set(items) & set(exclude[row].tolist())
        if allow[row] is not None:
            assert set(items) <= set(allow[row].tolist())
    few = recommender(thinker()).recommend(histories_[:1], 10, think=4, allow=[np.array([3, 9])])
    assert sorted(few.items[0].tolist()) == [-1] * 8 + [3, 9]


def codes_logprob(policy: Policy, encoded, thought: Weighed) -> torch.Tensor:
    """log P(codes | history, thought) of every item (B, N), each by a pass of its own."""
    vectors = policy.piece_vectors(thought.items[:, :8], thought.hops[:, :8])
    found = []
    for item in range(ITEMS):
        target = torch.full((len(encoded),), item)
        answer = policy.embed(policy.target_inputs(target)[0])
        inputs = torch.cat([policy.around(vectors)[:, :-1], answer], 1)
        hidden = policy.decode(encoded, inputs)[:, -policy.tokens.levels :]
        found.append(policy.answer_logprobs(hidden, target).sum(-1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("softmax", ["catalogue", "vocabulary"])
@pytest.mark.parametrize("length", [1, 6, 64])
@torch.no_grad()
def test_an_item_s_probability_is_both_parts_mixed_and_all_items_are_no_more_than_one(
    softmax, length
):
    policy = thinker(softmax)
    thinks = recommender(policy, beam=ITEMS)
    history, users = asked()
    found = thinks.recommend(history, ITEMS, users=users, think=length)
    encoded = policy.encode(history)
    thought = weigh(policy, thinks.evidence.gather(history.numpy(), users)).heaviest(length)
    odds = log_odds(policy, thought, policy.logits(read_thought(policy, encoded, thought)[0][:, 0]))
    pi = torch.sigmoid(odds)[:, None].double()
    weights = torch.zeros(len(history), ITEMS).double()
    real = thought.items >= 0
    weights.scatter_add_(
        1, thought.items.clamp(min=0), torch.where(real, thought.logits.exp(), 0).double()
    )
    wanted = pi * codes_logprob(policy, encoded, thought).double().exp() + (1 - pi) * weights
    assert (found.items.sort(1).values == torch.arange(ITEMS)).all()
    torch.testing.assert_close(
        found.scores.double().exp(), wanted.gather(1, found.items), atol=1e-5, rtol=1e-3
    )
    total = found.scores.double().exp().sum(1)
    assert (total <= 1 + 1e-4).all()
    if softmax == "catalogue":
        torch.testing.assert_close(total, torch.ones_like(total), atol=1e-4, rtol=0)


def direct_answer(policy: Policy, trie: PrefixTrie, history: torch.Tensor):
    return PolicyRecommender(policy, trie, decoder="direct").recommend(history, 10)


def test_l_0_is_the_direct_decoder_before_and_after_rl():
    policy = thinker()
    with torch.no_grad():
        for weight in policy.direct.parameters():
            weight.mul_(1.2)
    thinks = recommender(policy)
    history, users = asked()
    before = direct_answer(policy, thinks.trie, history)
    found = thinks.recommend(history, 10, users=users, think=0)
    assert torch.equal(found.items, before.items) and torch.equal(found.scores, before.scores)
    thought = thinks.recommend(history, 10, users=users, think=8)
    explorer, examples = explorer_of(policy, thinks.evidence)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.03)
    for step in range(4):
        explorer.loss(batch_of(examples, np.arange(16), seed=step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = thinks.recommend(history, 10, users=users, think=0)
    assert torch.equal(after.items, before.items) and torch.equal(after.scores, before.scores)
    assert not torch.equal(
        thinks.recommend(history, 10, users=users, think=8).scores, thought.scores
    )


def explorer_of(policy: Policy, evidence, **settings) -> tuple[Explorer, object]:
    examples = split_of(*sequences()).train
    reference = thinker()
    reference.load_state_dict(policy.state_dict())
    config = RlConfig(**{"group": 6, "think": 3, **settings})
    gathered = Gathered(evidence, examples)
    return Explorer(only_thinking(policy), reference, gathered, config, config.think), examples


def test_rl_begins_at_ratio_one_and_keeps_its_thoughts_for_every_update():
    policy = thinker()
    explorer, examples = explorer_of(policy, made(sequences(), sizes=HOPS))
    batch = batch_of(examples, np.arange(12))
    first = explorer.loss(batch)[1]
    assert first["ratio"].item() == pytest.approx(1, abs=1e-5)
    assert first["kl"].item() == pytest.approx(0, abs=1e-7)
    places = explorer._explored[0]
    with torch.no_grad():
        policy.weighing.linear.weight.add_(0.5)
    later = explorer.loss(Batch(**{**vars(batch), "update": 1}))[1]
    assert torch.equal(explorer._explored[0], places)
    assert later["ratio"].item() != pytest.approx(1, abs=1e-3)
    assert later["reward"].item() == first["reward"].item()


def test_a_thought_in_training_is_made_as_in_serving():
    """The same history of the same user: the same pieces, of the same weight."""
    policy, split = thinker(), split_of(*sequences())
    sequences_ = split.training_sequences()
    evidence = made(sequences_, sizes=HOPS)
    trie = PrefixTrie(policy.item_tokens.numpy())
    thinks = EvidenceRecommender(policy, trie, made(sequences_, sizes=HOPS))
    gathered = Gathered(evidence, split.train)
    rows = np.arange(0, len(split.train), 3)
    with torch.no_grad():
        trained = weigh(policy, gathered(rows))
        padded = torch.from_numpy(split.train.histories(rows))
        served = thinks.weighed(padded, split.train.users[rows])
        alone = thinks.weighed(padded[:1, : split.train.lengths[rows[0]]], split.train.users[:1])
    for name in ("items", "hops", "logits"):
        assert torch.equal(getattr(trained, name), getattr(served, name)), name
    torch.testing.assert_close(alone.logits, served.logits[:1])


@pytest.mark.parametrize("length", [0, 4])
def test_an_answer_does_not_depend_on_who_else_is_asked_about(length):
    thinks = recommender(thinker())
    history, users = asked()
    together = thinks.recommend(history, 10, users=users, think=length)
    for row in range(len(users)):
        alone = thinks.recommend(history[[row]], 10, users=users[[row]], think=length)
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=1e-5)
        assert alone.items[0].tolist() == together.items[row].tolist()
        if length:
            assert torch.equal(alone.thought.items[0], together.thought.items[row])


def test_random_evidence_is_a_user_s_own_and_as_strong():
    policy = thinker()
    history, users = asked()
    own = recommender(policy).weighed(history, users)
    one = recommender(policy, random=1).weighed(history, users)
    again = recommender(policy, random=1).weighed(history[[3]], users[[3]])
    assert torch.equal(one.items[3], again.items[0])
    assert torch.equal(one.logits, own.logits) and torch.equal(one.hops, own.hops)
    assert ((one.items >= 0) == (own.items >= 0)).all()
    assert (one.items == own.items)[own.items >= 0].float().mean() < 0.2


def test_a_saved_thinker_answers_as_before(tmp_path):
    policy = thinker()
    policy.save(tmp_path)
    loaded = Policy.load(tmp_path, policy.item_tokens)
    assert loaded.config == policy.config
    history, users = asked()
    answers = [
        recommender(p).recommend(history, 10, users=users, think=6) for p in (policy, loaded)
    ]
    assert torch.equal(answers[0].items, answers[1].items)
    assert torch.equal(answers[0].scores, answers[1].scores)
    assert torch.equal(answers[0].thought.weights, answers[1].thought.weights)


@pytest.mark.parametrize("name", ["slow", "direct"])
@torch.no_grad()
def test_the_t5_of_a_thinker_has_the_same_logits_in_transformers(tmp_path, name):
    policy = thinker()
    oracle = transformers_model(policy, tmp_path, "direct" if name == "direct" else "")
    past = histories(ITEMS, [7, 2, 4])
    inputs, _ = policy.target_inputs(torch.tensor([3, 9, 20]))
    ours = policy.logits(policy.decode(policy.encode(past), inputs, name))
    theirs = oracle(**encoder_inputs(policy, past), decoder_input_ids=inputs).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_choices_without_replacement_are_a_distribution_over_orders(length):
    logits = torch.tensor([0.3, -1.0, 2.0, 0.7, -torch.inf])
    orders = torch.tensor(list(itertools.permutations(range(4), length)))
    found = choice_logprobs(logits.expand(len(orders), -1), orders)
    assert found.shape == orders.shape
    assert found.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    barred = choice_logprobs(logits[None], torch.tensor([[4]]))
    assert barred.item() < -1e6
    assert choice_logprobs(logits[None], torch.tensor([[2, -1]]))[0, 1] == 0


def inferred(policy: Policy, length: int = 4):
    examples = split_of(*sequences()).train
    rows = np.flatnonzero(examples.lengths == 3)[:7]
    evidence = made(sequences(), sizes=HOPS)
    found = weigh(policy, evidence.gather(examples.histories(rows), examples.users[rows]))
    history = torch.from_numpy(examples.histories(rows))
    targets = torch.from_numpy(examples.targets[rows])
    return found, targets, infer(policy, policy.encode(history), found, targets, length)


@torch.no_grad()
def test_eq_12_inside_the_evidence_takes_the_nearest_piece_not_yet_chosen():
    policy = thinker()
    found, targets, steps = inferred(policy)
    tokens = policy.shared.weight.double().numpy()[policy.item_tokens.numpy()]
    items = tokens.mean(1)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    assert steps.chosen.shape == (7, 4) and steps.states.shape == (7, 5, 24)
    for row in range(7):
        pieces, chosen = found.items[row].tolist(), []
        for step in range(4):
            gap = steps.residuals[row, step].double().numpy()
            distance = {
                place: ((items[piece] - gap) ** 2).sum()
                for place, piece in enumerate(pieces)
                if piece >= 0 and place not in chosen
            }
            place = int(steps.chosen[row, step])
            assert distance[place] == pytest.approx(min(distance.values()), abs=1e-5)
            chosen.append(place)
    # Eq. 13: what is missing after each step is MLP_r of the gap between target and state.
    residual = policy.thinker.residual(policy.item_vectors(targets), steps.states[:, 2])
    torch.testing.assert_close(residual, steps.residuals[:, 2])


def test_eqs_14_and_15_inside_the_evidence_train_both_heads():
    policy = thinker().requires_grad_(False)
    policy.thinker.requires_grad_(True)
    examples = split_of(*sequences()).train
    gathered = Gathered(made(sequences(), sizes=HOPS), examples)
    rows = np.flatnonzero(examples.lengths == 2)[:10]
    loss, terms = heads_loss(policy, batch_of(examples, rows), gathered, AnnotateConfig(length=3))
    assert torch.isfinite(loss) and loss.item() == pytest.approx(
        sum(term.item() for term in terms.values())
    )
    loss.backward()
    for head in (policy.thinker.state, policy.thinker.residual_head):
        for parameter in head.parameters():
            assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().sum() > 0


def test_users_without_evidence_have_no_labels_and_cost_nothing():
    policy, split = thinker(), split_of(*sequences())
    gathered = Gathered(made(sequences(), sizes=(1, 0, 0, 0, 0, 0)), split.train)
    gathered.evidence.transitions.followers.sizes[: ITEMS // 2] = 0  # nobody took anything after
    labels, report = label_all(policy, gathered, 3, 64)
    pieces = gathered(np.arange(len(split.train))).items
    assert labels.shape == (len(split.train), 3) and report["examples"] == len(labels)
    assert ((labels >= 0).sum(1) == (pieces >= 0).sum(1)).all()
    assert 0 < report["targets_chosen"] == report["targets_in_evidence"] < 1
    empty = np.flatnonzero((pieces < 0).all(1))
    assert len(empty) > 10
    tuner = tuner_of(policy, gathered, torch.from_numpy(labels).long(), label_weight=1.0)
    loss, terms = tuner.loss(batch_of(split.train, empty[:8]))
    assert terms["weigh"] == terms["label"] == 0 and torch.isfinite(loss)
    loss.backward()
    for parameter in policy.weighing.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()


def tuner_of(policy, gathered, labels=None, held=None, **settings) -> Tuner:
    count = len(gathered.examples)
    labels = torch.full((count, 2), -1) if labels is None else labels
    held = torch.ones(count, dtype=torch.bool) if held is None else held
    return Tuner(only_thinking(policy), gathered, labels, held, SftConfig(**settings))


def test_sft_moves_the_weights_and_the_trust_and_leaves_codes_and_encoder():
    policy, split = thinker(), split_of(*sequences())
    tuner = tuner_of(policy, Gathered(made(sequences(), sizes=HOPS), split.train))
    rows = np.flatnonzero(split.train.lengths == 3)[:12]
    loss, terms = tuner.loss(batch_of(split.train, rows))
    loss.backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert {"weighing.linear.weight", "weighing.codes_trust.bias"} <= moved
    assert all(name.startswith("weighing.") for name in moved)
    assert policy.weighing.training and not policy.decoder.training, "codes as sure as in serving"
    assert all(torch.isfinite(value) for value in terms.values())


@pytest.mark.parametrize("kept", [1 << 30, 0])
def test_some_of_the_examples_have_the_evidence_that_they_have_among_all(kept, monkeypatch):
    monkeypatch.setattr(gathering, "KEPT", kept)
    split = split_of(*sequences())
    all_ = Gathered(made(sequences(), sizes=HOPS), split.train)
    pieces = all_(np.arange(len(split.train)))
    found = (pieces.items == split.train.targets[:, None]).any(1)
    assert found.any() and not found.all()
    np.testing.assert_array_equal(all_.found, found)
    some = all_.subset(np.flatnonzero(found))
    assert all_.known == pytest.approx(found.mean()) and some.known == 1
    np.testing.assert_array_equal(some(np.array([2, 0])).items, pieces.items[found][[2, 0]])
    np.testing.assert_array_equal(some.examples.targets, split.train.targets[found])


def test_a_share_does_not_take_the_evidence_of_all_examples_where_it_is_not_kept(monkeypatch):
    split, evidence = split_of(*sequences()), made(sequences(), sizes=HOPS)
    every, gather, rows = Gathered(evidence, split.train), evidence.gather, []
    assert every.known == pytest.approx(every.found.mean())

    def counted(histories, users):
        rows.append(len(users))
        return gather(histories, users)

    monkeypatch.setattr(evidence, "gather", counted)
    monkeypatch.setattr(gathering, "SAMPLE", 10)
    monkeypatch.setattr(gathering, "KEPT", 0)
    share = Gathered(evidence, split.train).known
    assert share == pytest.approx(every.found[:: len(split.train) // 10 + 1].mean())
    assert 1 < sum(rows) <= 1 + 10 < len(split.train)  # one to see how much there is


def test_sft_learns_from_the_examples_that_teach_and_without_dropout(monkeypatch, tmp_path):
    policy, split = thinker(), split_of(*sequences())
    train, evidence = split.train, made(sequences(), sizes=(2, 0, 0, 0, 0, 0))
    save_file(policy.thinker.state_dict(), tmp_path / "thinker.safetensors")
    arrays = {"rows.npy": np.arange(len(train)), "thoughts.npy": np.full((len(train), 2), -1)}
    made_before = SimpleNamespace(
        array=arrays.get, file=tmp_path.joinpath, manifest={"config": {"hold": 1}}
    )
    given = {}

    def load(stage, device, dropout):
        given["dropout"] = dropout
        return policy

    def stop(*_, examples, **__):
        given["examples"] = examples
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "fit", stop)
    run = SimpleNamespace(stage=lambda name: made_before)
    material = SimpleNamespace(split=split, evidence=evidence, policy=load)
    with pytest.raises(KeyboardInterrupt):
        sft._weigh(run, None, SftConfig().settled("evidence"), material, torch.device("cpu"))
    found = Gathered(evidence, train).found
    held = np.isin(np.arange(len(train)), gathering.last_positions(train, 1))
    teaches = np.flatnonzero(found | held)
    assert given["dropout"] == 0 and held[~found].sum() > 0 and len(teaches) < len(train)
    expected, learned = train.subset(teaches), given["examples"]
    np.testing.assert_array_equal(learned.targets, expected.targets)
    np.testing.assert_array_equal(learned.users, expected.users)


def test_codes_are_trusted_more_only_where_that_is_surely_better():
    users = np.arange(400)
    ranked = np.full((3, 400), 20, np.int32)
    ranked[0, :100] = 3
    ranked[1] = ranked[0]
    ranked[1, :12], ranked[1, 200:214] = 20, 3  # two users more, by chance
    ranked[2] = ranked[0]
    assert surely_best(ranked, users) == 0
    ranked[2, 200:260] = 3
    assert surely_best(ranked, users) == 2
    assert surely_best(ranked, np.repeat(np.arange(4), 100)) == 0, "four users say little"


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_have_the_loss_of_one(count):
    policy, split = thinker(), split_of(*sequences())
    policy.weighing.dropout.p = 0.0
    gathered = Gathered(made(sequences(), sizes=HOPS), split.train)
    rows = np.flatnonzero(split.train.lengths == 3)[:11]
    held = torch.arange(len(split.train)) % 3 == 0
    labels = torch.randint(0, 5, (len(split.train), 2))
    tuner = tuner_of(policy, gathered, labels, held, label_weight=0.5)
    explorer, _ = explorer_of(policy, gathered.evidence)
    for loss in (tuner.loss, explorer.loss):
        whole = loss(batch_of(split.train, rows))[0].item()
        shares = [Ranks(rank, count).share(len(rows)) for rank in range(count)]
        parts = [loss(batch_of(split.train, rows, share))[0].item() for share in shares]
        joined = sum(p * s.weight / len(rows) for p, s in zip(parts, shares, strict=True))
        assert joined == pytest.approx(whole, rel=1e-5, abs=1e-6)


def test_pretraining_reads_pieces_of_the_history_even_where_there_are_fewer_than_wanted():
    policy, split = thinker(), split_of(*sequences())
    evidence = made(sequences(), sizes=(3, 0, 0, 0, 0, 0))
    pieces = gathering.first_pieces(evidence, split.train, 8)
    assert pieces.shape == (len(split.train), 3, 2)
    whole = evidence.gather(split.train.histories(np.arange(9)), split.train.users[:9])
    assert pieces[:9, :, 0].tolist() == whole.items.tolist()
    batch = batch_of(split.train, np.flatnonzero(split.train.lengths == 2)[:6])
    loss = pieces_loss(policy, batch, policy.encode(batch.history), pieces, PretrainConfig())
    loss.backward()
    assert torch.isfinite(loss) and policy.weighing.hop.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"thoughts": "evidence", "retrieve": "target"}, "retrieve=target does not go with"),
        ({"thoughts": "vocabulary", "retrieve": "history"}, "retrieve=history does not go with"),
        ({"hops": (0, 0, 0, 0, 0, 0)}, "hops are all 0"),
    ],
)
def test_settings_of_two_kinds_of_thought_are_not_mixed(settings, message):
    with pytest.raises(UsageError, match=message):
        PretrainConfig(**settings).settled()
    letter = PretrainConfig(thoughts="vocabulary").settled()
    assert (letter.retrieve, letter.neighbours) == ("target", 2)
    assert PretrainConfig().settled().retrieve == "history"


@pytest.fixture(scope="module")
def small_shop(tmp_path_factory):
    """A synthetic shop of 400 users, tokenized."""
    from streamctl.tokenizer.stage import tokenize

    run = RunDir(tmp_path_factory.mktemp("shop") / "run")
    synthesize(run, users=400, items=150, seed=0)
    tokenize(
        run,
        TokenizeConfig(encoder="tfidf", dim=16, method="rqkmeans", codes=16, neighbours=10),
    )
    return Material.load(run)


def test_the_weighing_learns_to_think_at_every_length(small_shop):
    """Own thought above random evidence, trained above untrained; the T5 knows nothing here."""
    material = small_shop
    config = PolicyConfig.of_size(
        "tiny", material.ids.sizes, softmax="catalogue", dedup=material.ids.dedup,
        thoughts="evidence",
    )  # fmt: skip
    policy = Policy.build(config, material.item_tokens, 0).eval()
    train = material.split.train
    rows = gathering.last_positions(train, 5)
    gathering.standardise(policy, material, rows)
    gathered = Gathered(material.evidence, train.subset(rows))
    examples = gathered.examples

    def ndcg(length: int, **options) -> float:
        thinks = EvidenceRecommender(
            policy, material.trie, material.evidence, think=length, beam=10, mix="weights",
            **options,
        )  # fmt: skip
        found = evaluate(thinks, material.split.test, n_items=material.split.n_items, masked=True)
        return found.metrics["ndcg@10"]

    untrained = {length: ndcg(length) for length in (2, 8, 32)}
    tuner = tuner_of(policy, gathered, held=torch.zeros(len(examples), dtype=torch.bool))
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(policy.weighing.parameters(), lr=3e-3)
    order = itertools.islice(
        itertools.chain.from_iterable(batches(examples.lengths, 256, 0, e) for e in range(99)), 60
    )
    for step, index in enumerate(order):
        tuner.loss(batch_of(examples, index, seed=step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    policy.eval()
    for length, before in untrained.items():
        own = ndcg(length)
        assert own > before + 0.02, (length, own, before)
        assert own > ndcg(length, random=0) + 0.05, length
    assert ndcg(8) > ndcg(2), "thinking longer finds more"
