"""Item text -> vectors from word counts: TF-IDF and a truncated SVD, with nothing to download."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
import torch

from streamctl.runs import Stage, StageWriter

WIDTH = 256  # of the vectors, where the texts have so many independent words
MAX_WORDS = 50_000  # the most frequent words that count
FIT_TEXTS = 200_000  # of a larger catalogue a sample is counted
GRAM = 3  # characters of the longest piece of a text without blanks
NO_BLANKS = "".join(
    rf"\p{{{script}}}"
    for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan")
)
# A run of a script without blanks; a word or number of any other script; one emoji or sign.
TOKEN = regex.compile(
    rf"(?P<run>[{NO_BLANKS}\u30fc\u3005]+)|[[\p{{L}}\p{{M}}\p{{N}}]--[{NO_BLANKS}]]+|\p{{So}}",
    regex.V1,
)


def words(text: str) -> list[str]:
    """What is counted of a text: words and pairs of words; of runs without blanks 1 to 3 letters.

    Compatibility forms (full width, ligatures) and case are no difference.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    found: list[str] = []
    before = ""
    for match in TOKEN.finditer(text):
        token = match[0]
        if match["run"]:
            for length in range(1, GRAM + 1):
                found += [token[n : n + length] for n in range(len(token) - length + 1)]
            before = ""
            continue
        found.append(token)
        if before:
            found.append(f"{before} {token}")
        before = token
    return found


class TfidfEncoder:
    """Words weighted by rarity (TF-IDF), projected by a truncated SVD."""

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
        """Fit on a catalogue's texts; where they hold no words, every vector is zero."""
        from sklearn.decomposition import TruncatedSVD

        if len(texts) > FIT_TEXTS:
            rows = np.random.default_rng(seed).choice(len(texts), FIT_TEXTS, replace=False)
            texts = [texts[row] for row in np.sort(rows)]
        if not any(map(TOKEN.search, texts)):
            return cls(["\0"], np.ones(1), np.ones((1, 1)))  # a word that no text holds
        counter = _vectorizer(max_features=MAX_WORDS)
        counts = counter.fit_transform(texts)
        vocabulary = counter.get_feature_names_out().tolist()
        if len(vocabulary) == 1:  # nothing to reduce
            return cls(vocabulary, counter.idf_, np.ones((1, 1)))
        svd = TruncatedSVD(min(WIDTH, *counts.shape), random_state=seed % 2**32)
        with np.errstate(invalid="ignore"):  # a share of no variance
            svd.fit(counts)
        return cls(vocabulary, counter.idf_, svd.components_)

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

    return TfidfVectorizer(analyzer=words, sublinear_tf=True, **options)
