"""A policy on disk: two folders that transformers loads, the thinker, and its shape.

config.json, model.safetensors           encoder and slow decoder (T5ForConditionalGeneration)
direct/config.json, model.safetensors    encoder and direct decoder, likewise
thinker.safetensors                      MLP_s and MLP_r, and the weighing of evidence
policy.json                              PolicyConfig
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from streamctl.errors import StreamctlError
from streamctl.files import atomic_file, read_json
from streamctl.model.backbone import BackboneConfig
from streamctl.tokenizer.tokens import Tokens


def huggingface_config(shape: BackboneConfig, start: int) -> dict[str, Any]:
    """config.json of transformers' T5; `start` is the token that its decoder begins with."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": shape.vocabulary,
        "d_model": shape.d_model,
        "d_kv": shape.d_kv,
        "d_ff": shape.d_ff,
        "num_heads": shape.heads,
        "num_layers": shape.layers,
        "num_decoder_layers": shape.decoder_layers,
        "relative_attention_num_buckets": shape.buckets,
        "relative_attention_max_distance": shape.max_distance,
        "dropout_rate": shape.dropout,
        "layer_norm_epsilon": shape.eps,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "pad_token_id": Tokens.PAD,
        "decoder_start_token_id": start,
        "eos_token_id": None,
        "dtype": "float32",
    }


def save(
    state: Mapping[str, torch.Tensor], config: Any, shape: BackboneConfig, folder: Path
) -> list[str]:
    """Write a policy into `folder`; returns the names of the files, relative to it.

    Args:
        state: its weights by name.
        config: its PolicyConfig, a dataclass; shape: of its T5.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}

    def part(*prefixes: str) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}

    direct = {
        name.replace("direct.", "decoder.", 1): tensor
        for name, tensor in part("shared.", "encoder.", "direct.").items()
    }
    tensors = {
        "model.safetensors": part("shared.", "encoder.", "decoder."),
        "direct/model.safetensors": direct,
        "thinker.safetensors": part("thinker.", "weighing."),
    }
    texts = {
        "config.json": huggingface_config(shape, Tokens.THINK),
        "direct/config.json": huggingface_config(shape, Tokens.BOS),
        "policy.json": dataclasses.asdict(config),
    }
    (folder / "direct").mkdir(parents=True, exist_ok=True)
    for name, content in tensors.items():
        with atomic_file(folder / name) as path:
            save_file(content, path, {"format": "pt"})
    for name, value in texts.items():
        with atomic_file(folder / name) as path:
            path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return [*tensors, *texts]


def load(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The values of the PolicyConfig in `folder`, and the weights by name.

    Raises:
        StreamctlError: a file is missing or damaged.
    """
    values = read_json(folder / "policy.json")
    weights = _read(folder / "model.safetensors")
    for name, tensor in _read(folder / "direct" / "model.safetensors").items():
        if name.startswith("decoder."):
            weights[name.replace("decoder.", "direct.", 1)] = tensor
    return values, weights | _read(folder / "thinker.safetensors")


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StreamctlError(
            f"cannot be read: {error}",
            where=path,
            run="the command that makes this stage, with --force",
        ) from error
