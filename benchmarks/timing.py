"""The head of a receipt, under the name that thinker.py knows."""

from peers import provenance

__all__ = ["provenance"]
