"""The model: T5 mathematics, the thinker's heads, and the policy made of them."""

from __future__ import annotations

from streamctl.model.backbone import BackboneConfig
from streamctl.model.policy import Encoded, Policy, PolicyConfig
from streamctl.model.thinker import Thinker

__all__ = ["BackboneConfig", "Encoded", "Policy", "PolicyConfig", "Thinker"]
