"""A small shop with an untrained model: enough for a server to be tested on."""

from __future__ import annotations

from pathlib import Path

import torch

from streamctl.config import (
    AnnotateConfig,
    PretrainConfig,
    SftConfig,
    TokenizeConfig,
)
from streamctl.data import synthesize
from streamctl.model import Policy, PolicyConfig
from streamctl.retrieval.evidence import SIZES
from streamctl.runs import RunDir
from streamctl.tokenizer import SemanticIds
from streamctl.tokenizer.stage import tokenize

THINK = 64  # pieces of evidence, where nobody asks for another number
KEYS = {"read": "reading-key-0123456789", "write": "writing-key-0123456789"}


def make_data(path: Path, seed: int = 0) -> RunDir:
    run = RunDir(path)
    synthesize(run, users=150, items=120, seed=seed)
    return run


def make_run(path: Path, seed: int = 0, codes: int = 16) -> RunDir:
    """Data, codes, and a micro model with seeded random weights published as the sft stage."""
    run = make_data(path)
    tokenizer = TokenizeConfig(
        encoder="tfidf", dim=16, method="rqkmeans", levels=3, codes=codes, neighbours=5
    )
    tokenize(run, tokenizer)
    ids = SemanticIds.load(run.stage("tokenizer"))
    shape = {"layers": 1, "decoder_layers": 1, "d_model": 16, "heads": 2, "d_kv": 8, "d_ff": 32}
    shape["thoughts"] = "evidence"
    config = PolicyConfig(sizes=ids.sizes, dedup=ids.dedup, **shape)
    tokens = torch.from_numpy(ids.tokens().item_tokens(ids.codes))
    policy = Policy.build(config, tokens, seed)
    with torch.no_grad():  # initial weights are near uniform: sharpen rankings and thoughts
        policy.shared.weight.mul_(3)
        policy.weighing.linear.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        policy.weighing.codes_trust.bias.zero_()
    settled, parents = PretrainConfig(seed=seed).settled(), ["data", "tokenizer"]
    publish(run, "pretrain", settled, parents, policy, hops=list(SIZES))
    publish(run, "annotate", AnnotateConfig(), ["pretrain"])
    publish(run, "sft", SftConfig(seed=seed), ["data", "tokenizer", "pretrain", "annotate"], policy)
    return run


def publish(
    run: RunDir, name: str, config, parents: list[str], policy: Policy | None = None, **told
) -> None:
    with run.begin(name, config, parents=parents) as stage:
        for file in policy.save(stage.path) if policy else ():
            stage.adopt(file)
        for epoch in range(3):
            stage.log(epoch=epoch, loss=1.0 / (epoch + 1))
        stage.publish(**told)
