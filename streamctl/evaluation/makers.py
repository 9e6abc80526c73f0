"""Which function makes a stage, by the stage's name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from streamctl import config as configs
from streamctl.baselines.train import train_baseline
from streamctl.evaluation.rerank import rerank
from streamctl.tokenizer.stage import tokenize
from streamctl.training.annotate import annotate
from streamctl.training.pretrain import pretrain
from streamctl.training.rl import rl
from streamctl.training.sft import TWIN, sft

Maker = tuple[Callable[..., Any], type]
# Stages in the order in which they are made; then baselines, then rankers behind methods.
MAKERS: dict[str, Maker] = {
    "tokenizer": (tokenize, configs.TokenizeConfig),
    "pretrain": (pretrain, configs.PretrainConfig),
    "annotate": (annotate, configs.AnnotateConfig),
    "sft": (sft, configs.SftConfig),
    "rl": (rl, configs.RlConfig),
    TWIN: (functools.partial(sft, twin=True), configs.SftConfig),
}


def maker(stage: str) -> Maker:
    """What makes a stage of this name, and its configuration."""
    if stage.startswith("rerank/"):
        return rerank, configs.RerankConfig
    return MAKERS.get(stage, (train_baseline, configs.BaselineConfig))
