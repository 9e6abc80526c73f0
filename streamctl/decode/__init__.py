"""Decoding: think tokens, then codes inside the catalogue's trie; rollouts for GRPO."""

from streamctl.decode.beam import recommend
from streamctl.decode.recommender import PolicyRecommender
from streamctl.decode.sample import Rollout, rollout, rollout_logprobs

__all__ = [
    "PolicyRecommender",
    "Rollout",
    "recommend",
    "rollout",
    "rollout_logprobs",
]
