"""A policy's matrices in the layout that oneDNN computes in: nothing is rearranged at each call.

For a model that answers a request at a time on a CPU: with 20 rows a matrix product takes less
time than bringing its weights into shape. What it gives is what it gave; it cannot be trained or
saved any more.
"""

from __future__ import annotations

import torch
from torch import nn

from streamctl.model.backbone import Attention, Block, FeedForward
from streamctl.model.policy import Policy


class _Linear(nn.Module):
    """x W^T, and the activation after it ("none" or "relu")."""

    def __init__(self, weight: torch.Tensor, then: str = "none"):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, self.then, [], "")


class _FeedForward(nn.Module):
    def __init__(self, plain: FeedForward):
        super().__init__()
        self.wi, self.wo = _Linear(plain.wi.weight, "relu"), _Linear(plain.wo.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.wi(x))


class _Attention(Attention):
    def __init__(self, plain: Attention):
        nn.Module.__init__(self)
        self.heads, self.d_kv = plain.heads, plain.d_kv
        q, k, v = (part.weight for part in (plain.q, plain.k, plain.v))
        self.q, self.o = _Linear(q), _Linear(plain.o.weight)
        self.qkv, self.kv = _Linear(torch.cat([q, k, v])), _Linear(torch.cat([k, v]))
        if hasattr(plain, "relative_attention_bias"):
            self.relative_attention_bias = plain.relative_attention_bias

    def queries_keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.split(part) for part in self.qkv(x).chunk(3, -1))

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = self.kv(x).chunk(2, -1)
        return self.split(key), self.split(value)


def pack(policy: Policy) -> Policy:
    """The same policy with its blocks' matrices packed, if it is in bf16 on a CPU with oneDNN."""
    ready = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    weight = policy.shared.weight
    if not ready or weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return policy
    for block in [module for module in policy.modules() if isinstance(module, Block)]:
        for layer in block.layer:
            for name, child in list(layer.named_children()):
                if isinstance(child, Attention):
                    setattr(layer, name, _Attention(child))
                elif isinstance(child, FeedForward):
                    setattr(layer, name, _FeedForward(child))
    return policy
