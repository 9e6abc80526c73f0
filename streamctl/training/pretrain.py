"""Stage 1: long answers on a shared encoder, and the direct decoder beside them (Eqs. 9-11)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from streamctl.config import PretrainConfig
from streamctl.decode.evidence import NOTHING
from streamctl.decode.retrieved import retrieved_codes
from streamctl.device import derive_seed, resolve_device
from streamctl.model.policy import Encoded, Policy, PolicyConfig
from streamctl.progress import say
from streamctl.runs import RunDir, Stage
from streamctl.training.gathered import (
    first_pieces,
    last_positions,
    standardise,
    suitable_hops,
)
from streamctl.training.loop import Batch, fit
from streamctl.training.losses import answer_loss, sequence_loss
from streamctl.training.material import Material, save_policy, warm_start
from streamctl.training.validation import Validator, validate


def retrieved_tokens(
    item_tokens: torch.Tensor, look_alikes: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """c'_1..c'_q of Eq. 9, (B, n * m): the codes of the target's nearest items, the less similar
    first. look_alikes: (N, n) int64, nearest first. They stand where thoughts will stand later."""
    return item_tokens[look_alikes[targets].flip(1)].flatten(1)


STANDARD = 4096  # examples from which features are standardised


def pieces_loss(
    policy: Policy, batch: Batch, encoded: Encoded, pieces: torch.Tensor, config: PretrainConfig
) -> torch.Tensor:
    """The answer's cross-entropy after the first 0 < n <= q pieces of the user's evidence.

    They are given in training as in serving, so nothing is learned of predicting them; n is drawn
    for the batch. pieces: (E, q, 2) int64, items and hops of each example, -1 for none.
    """
    drawn = torch.randint(pieces.shape[1], (), generator=batch.generator("retrieved"))
    some = pieces[batch.index.cpu(), : int(drawn) + 1].to(batch.target.device)
    items, hops = some.unbind(-1)
    vectors = policy.piece_vectors(items, hops.where(items >= 0, NOTHING))
    answer = policy.embed(policy.target_inputs(batch.target)[0])
    hidden = policy.decode(encoded, torch.cat([policy.around(vectors)[:, :-1], answer], 1))
    return answer_loss(policy, hidden, batch.target, config.temperature)


def pretrain_loss(
    policy: Policy, batch: Batch, retrieved: torch.Tensor, config: PretrainConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 10 for the slow decoder's long answer plus the direct decoder's cross-entropy.

    retrieved: Eq. 9's items, as `pieces_loss` or as `retrieved_tokens` (N, n) takes them.
    """
    encoded = policy.encode(batch.history)
    if retrieved.ndim == 3:
        slow = pieces_loss(policy, batch, encoded, retrieved, config)
    else:
        tokens = retrieved_tokens(policy.item_tokens, retrieved, batch.target)
        inputs, _ = policy.target_inputs(batch.target, tokens)
        hidden = policy.decode(encoded, inputs)
        practice = policy.logits(hidden[:, : tokens.shape[1]])
        slow = sequence_loss(practice, tokens, config.temperature)
        slow = slow + answer_loss(policy, hidden, batch.target, config.temperature)
    direct = direct_loss(policy, batch, encoded, config.temperature)
    return slow + config.direct_weight * direct, {"slow": slow, "direct": direct}


def direct_loss(
    policy: Policy, batch: Batch, encoded: object, temperature: float = 1.0
) -> torch.Tensor:
    """Cross-entropy of the target's codes under the direct decoder."""
    inputs, _ = policy.target_inputs(batch.target)
    hidden = policy.decode(encoded, inputs, "direct")
    return answer_loss(policy, hidden, batch.target, temperature)


def pretrain(
    run: RunDir, config: PretrainConfig, *, device: str = "auto", force: bool = False,
    warm: Stage | None = None,
) -> Stage:  # fmt: skip
    """Train the encoder, the slow decoder on Eq. 9's long answers and the direct decoder.

    The epoch of the best direct ndcg@10 on validation is kept: the encoder and the direct decoder
    are what later stages build on and compare with, while the long answers themselves are only
    practice. The slow path's figures are measured at the end.

    One default departs from the paper's letter: the target's codes are normalised over the codes
    that continue a prefix of the catalogue, which saves epochs of learning which codes spell an
    item (docs/results.md); `softmax=vocabulary` is Eq. 11.

    Writes the policy and report.json.

    Args:
        warm: another run's stage, whose weights it begins with and keeps where training on them
            is no better.
    """
    config = config.settled()
    with run.begin("pretrain", config, ["data", "tokenizer"], force=force) as stage:
        if stage is None:
            say("pretrain: complete already")
            return run.stage("pretrain")
        where = resolve_device(device)
        material = Material.load(run)
        shape = PolicyConfig.of_size(
            config.size, material.ids.sizes, history=config.history, dropout=config.dropout,
            think_codebook=config.think_codebook, softmax=config.softmax,
            dedup=material.ids.dedup, thoughts=config.thoughts,
        )  # fmt: skip
        seed = derive_seed(config.seed, "initial weights")
        policy = Policy.build(shape, material.item_tokens, seed).to(where)
        if warm is not None:
            warm_start(policy, warm)
        examples = material.split.train
        if config.thoughts == "evidence":
            held = last_positions(examples, config.hold)
            examples = examples.subset(np.delete(np.arange(len(examples)), held))
            hops = config.hops or suitable_hops(material.split.train)
            material = replace(material, hops=hops)
        if config.positions is not None:
            examples = examples.subset(last_positions(examples, config.positions))
        if config.retrieve == "history":
            count = config.neighbours
            retrieved = first_pieces(material.evidence, examples, count)
        else:
            retrieved = material.look_alikes(where, config.neighbours)
            count = retrieved.shape[1]
        validator = Validator(policy, material, config.seed)
        result = fit(
            stage, policy, config,
            loss=lambda batch: pretrain_loss(policy, batch, retrieved, config),
            examples=examples, validate=lambda: validator(decoder="direct"),
            start=warm is not None, device=where, title="pretrain",
        )  # fmt: skip
        if config.thoughts == "evidence":
            if warm is None:  # else the weights of evidence know the older scale
                rows = last_positions(material.split.train, 1)[:STANDARD]
                standardise(policy, material, rows)
            slow = validate(policy, material, config.seed, count)
        else:
            slow = validator(thoughts=lambda history, _: retrieved_codes(policy, history, count))
        report: dict[str, Any] = {
            "examples": len(examples),
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "hops": list(material.hops),
            "valid": {"direct": result.best, "slow": slow},
        }
        if warm is not None:
            report |= {"warm": warm.hash, "start": result.start}
        save_policy(stage, policy)
        stage.save_json("report.json", report)
        stage.publish(**report)
        say(
            f"pretrain: direct ndcg@10 {result.best['ndcg@10']:.4f}, "
            f"slow {report['valid']['slow']['ndcg@10']:.4f} on validation users"
        )
    return run.stage("pretrain")
