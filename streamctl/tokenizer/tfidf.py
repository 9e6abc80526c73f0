"""Item text -> vectors from word counts: TF-IDF and a truncated SVD, with nothing to download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from streamctl.errors import StreamctlError
from streamctl.runs import Stage, StageWriter

WIDTH = 256  # of the vectors, where the texts have so many independent words
MAX_WORDS = 50_000  # the most frequent words that count


class TfidfEncoder:
    """Words and pairs of words weighted by rarity (TF-IDF), projected by a truncated SVD."""

    def __init__(self, vocabulary: list[str], idf: np.ndarray, components: np.ndarray):
        """From what `fit` found.

        Args:
            vocabulary: W words, in the order of the columns.
            idf: (W,) float64, the weight of each word.
            components: (d_w, W) float64, the projection.
        """
        self.vocabulary, self.idf, self.components = vocabulary, idf, components
        self._counter = _vectorizer(vocabulary={word: n for n, word in enumerate(vocabulary)})
        self._counter.idf_ = idf

    @classmethod
    def fit(cls, texts: Sequence[str], seed: int) -> TfidfEncoder:
        """Fit on a catalogue's texts.

        Raises:
            StreamctlError: the texts hold no words.
        """
        from sklearn.decomposition import TruncatedSVD

        counter = _vectorizer(max_features=MAX_WORDS)
        try:
            counts = counter.fit_transform(texts)
        except ValueError as error:
            raise StreamctlError(f"the items' texts cannot be counted: {error}") from error
        width = max(1, min(WIDTH, min(counts.shape) - 1))
        svd = TruncatedSVD(width, random_state=seed % 2**32).fit(counts)
        return cls(counter.get_feature_names_out().tolist(), counter.idf_, svd.components_)

    @classmethod
    def load(cls, stage: Stage, saved: dict[str, Any]) -> TfidfEncoder:
        """From a tokenizer stage; `saved` is its encoder.json."""
        from safetensors.numpy import load_file

        arrays = load_file(stage.file("tfidf.safetensors"))
        return cls(saved["vocabulary"], arrays["idf"], arrays["components"])

    def save(self, stage: StageWriter) -> None:
        """Write encoder.json (the words) and tfidf.safetensors (weights and projection)."""
        stage.save_json("encoder.json", {"kind": "tfidf", "vocabulary": self.vocabulary})
        arrays = {"idf": self.idf, "components": self.components}
        stage.save_tensors(
            "tfidf.safetensors",
            {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()},
        )

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> vectors (N, d_w) float32; words that `fit` did not see count nothing."""
        if not len(texts):
            return np.empty((0, len(self.components)), np.float32)
        return (self._counter.transform(texts) @ self.components.T).astype(np.float32)


def _vectorizer(**options: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)
