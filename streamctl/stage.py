"""A stage's folder: to read when it is finished, to write while it is in work."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.config import to_dict
from streamctl.distributed import is_main, ranks
from streamctl.errors import StreamctlError, typed_with
from streamctl.files import atomic_file, disk_errors, file_hash, read_json, tensors_hash
from streamctl.provenance import provenance

SCHEMA = 2  # of a manifest; stages of another one are made again
MANIFEST = "manifest.json"
COMMANDS = {
    "data": "data prepare SOURCE",
    "tokenizer": "tokenize",
    "think-curve": "eval --think-curve",
    "beam-losses": "eval --decode exact",
    "baselines/no_thinking": "run",
    "final": "refit",
}
_ESSENTIAL = {"hash", "artifacts", "parents", "config"}  # of a manifest of any version


def command_for(stage: str) -> str:
    """The command that makes a stage: `tokenize` for "tokenizer", `baseline NAME`, ..."""
    if stage in COMMANDS:
        return COMMANDS[stage]
    if stage.startswith("rerank/"):
        return f"rerank --methods {stage.removeprefix('rerank/').replace('+', ',')}"
    name = stage.removeprefix("baselines/")
    return name if name == stage else f"baseline {name}"


class Stage:
    """A finished stage, to read.

    Args:
        root: the run's folder.
        name: the stage's folder below it.
    """

    def __init__(self, root: Path, name: str):
        self.root, self.name = root, name
        self.path = root / name

    @property
    def command(self) -> str:
        """The command line that makes this stage."""
        words = self._made_from() if self.name == "data" else command_for(self.name)
        return f"streamctl {words} --run {shlex.quote(str(self.root))}"

    def _made_from(self) -> str:
        """The command of a data stage, with its source where its config.toml names one."""
        try:
            made = tomllib.loads((self.path / "config.toml").read_text(encoding="utf-8"))["data"]
            source = made["source"]
        except (OSError, ValueError, KeyError, TypeError):
            return command_for("data")
        if made.get("format") == "synthetic":
            users, items = re.findall(r"\d+", source)
            return f"data synth --users {users} --items {items} --seed {made['seed']}"
        return f"data prepare {shlex.quote(source or 'SOURCE')}"

    def again(self, changes: Sequence[str] = ()) -> str:
        """The command line that makes this stage anew, with the settings of its config.toml.

        Args:
            changes: `stage.key=value` texts of the settings that are to differ.
        """
        if command_for(self.name) == "run":  # which does nothing again
            old = shlex.quote(str(self.path))
            return f"mv {old} {old}.previous, then {self.command}"
        command = self.resume()
        words = [f"--set {shlex.quote(text)}" for text in changes]
        return " ".join([command, *([] if " data synth " in command else words), "--force"])

    def resume(self) -> str:
        """The command line that makes this stage, with the settings of its config.toml."""
        made, command = self.path / "config.toml", self.command
        if not made.is_file() or command_for(self.name) == "run" or " data synth " in command:
            return command
        return f"{command} --config {shlex.quote(str(made))}"

    def redo(self, changes: Sequence[str] = ()) -> str:
        """The user's own command with --force where it makes this stage, else `again`."""
        command = command_for(self.name)
        typed = None if command == "run" else typed_with(command, "--force")  # run has none
        return typed or self.again(changes)

    @property
    def complete(self) -> bool:
        return (self.path / MANIFEST).is_file()

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json.

        Raises:
            StreamctlError: it is missing, no JSON, or not as it was written.
        """
        path = self.path / MANIFEST
        manifest = read_json(path, run=self.again())
        if not isinstance(manifest, dict) or not manifest.keys() >= _ESSENTIAL:
            raise self._error("the manifest is damaged (it is not one of a stage)", path)
        if manifest.get("schema") != SCHEMA:
            raise self._error("this stage was made by another version of streamctl", self.path)
        if manifest.get("seal") != _seal(manifest):
            raise self._error("the manifest is damaged (its checksum does not match)", path)
        return manifest

    @property
    def hash(self) -> str:
        """Identity of the artifacts: children record it and are stale when it changes."""
        return self.manifest["hash"]

    def stale_parents(self) -> list[str]:
        """Parents whose artifacts have changed (or gone) since this stage was made."""
        return [
            parent
            for parent, seen in self.manifest["parents"].items()
            if not (made := Stage(self.root, parent)).complete or made.hash != seen
        ]

    @property
    def outdated(self) -> bool:
        """Whether it is complete, of parents that have changed since."""
        return self.complete and bool(self.stale_parents())

    def file(self, name: str) -> Path:
        """Path of an artifact.

        Raises:
            StreamctlError: the manifest lists no such artifact, or it is gone.
        """
        if name not in self.manifest["artifacts"]:
            raise self._error(f"stage {self.name} has no artifact {name}", self.path)
        path = self.path / name
        if not path.is_file():
            raise self._error("artifact is missing", path)
        return path

    def _error(self, what: str, where: Path) -> StreamctlError:
        return StreamctlError(what, where=where, run=self.again())

    def array(self, name: str) -> np.ndarray:
        """A `.npy` artifact."""
        return np.load(self.file(name), allow_pickle=False)

    def json(self, name: str) -> Any:
        """A `.json` artifact."""
        return read_json(self.file(name))

    def verify(self) -> None:
        """Compare every artifact with the hash in the manifest.

        Raises:
            StreamctlError: naming the first artifact that is missing or has changed.
        """
        for name, expected in self.manifest["artifacts"].items():
            path = self.file(name)
            if file_hash(path) != expected:
                what = "artifact is damaged (its hash differs from manifest.json)"
                raise self._error(what, path)

    def check_sources(self, hashes: Mapping[str, str]) -> None:
        """Raise if one of the user's files that it was made of is there and is another one now."""
        for name, seen in hashes.items():
            if Path(name).is_file() and file_hash(Path(name)) != seen:
                raise StreamctlError(
                    f"the file has changed since stage {self.name} was made of it",
                    where=name,
                    run=self.redo(),
                )


class StageWriter(Stage):
    """A stage in work. Made by `RunDir.begin`; `publish` completes it.

    `resumed` is true when a checkpoint of an interrupted run with the same settings was found.
    """

    def __init__(self, root: Path, name: str, config: Any, parents: Mapping[str, str]):
        super().__init__(root, name)
        self.config = config
        self.parents = dict(parents)
        self.started = time.monotonic()
        self.earlier_s = 0.0
        self._progress = self.path / ".progress"
        self._artifacts: set[str] = set()

    @property
    def resumed(self) -> bool:
        return (self._progress / "checkpoint.safetensors").is_file()

    def wall_s(self) -> float:
        """Seconds of work so far, those before an interruption (up to its checkpoint) included."""
        return self.earlier_s + time.monotonic() - self.started

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write artifact `name` to; published under its name when the block ends."""
        with atomic_file(self.path / name) as path:
            yield path
        self._artifacts.add(name)

    def save_array(self, name: str, array: np.ndarray) -> None:
        with self.writing(name) as path, open(path, "wb") as handle:
            np.save(handle, array, allow_pickle=False)

    def save_tensors(self, name: str, tensors: Mapping[str, Any]) -> None:
        """Write torch tensors as safetensors."""
        from safetensors.torch import save_file

        with self.writing(name) as path:
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)

    def save_json(self, name: str, value: Any) -> None:
        with self.writing(name) as path:
            path.write_text(
                json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )

    def save_table(self, name: str, table: Any) -> None:
        """Write a pyarrow table as parquet."""
        import pyarrow.parquet as pq

        with self.writing(name) as path:
            pq.write_table(table, path, compression="zstd")

    def adopt(self, name: str) -> None:
        """Count a file that is already in the folder (a `save_pretrained` one) as an artifact."""
        if is_main():
            with open(self.path / name, "rb") as handle:
                os.fsync(handle.fileno())
        self._artifacts.add(name)

    def log(self, **metrics: Any) -> None:
        """Append one record to metrics.jsonl."""
        if not is_main():
            return
        path = self.path / "metrics.jsonl"
        with disk_errors(path), open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(metrics) + "\n")

    def save_checkpoint(self, tensors: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Replace the checkpoint: one safetensors file with `meta` (JSON) and a hash in its header.

        Records logged to metrics.jsonl after this checkpoint are dropped when it is loaded.
        """
        from safetensors.torch import save_file

        if not is_main():
            return
        log = self.path / "metrics.jsonl"
        record = {
            "meta": dict(meta),
            "wall_s": self.wall_s(),
            "logged_bytes": log.stat().st_size if log.exists() else 0,
        }
        header = {"record": (text := json.dumps(record)), "hash": tensors_hash(tensors, text)}
        with atomic_file(self._progress / "checkpoint.safetensors") as path:
            save_file({key: value.contiguous() for key, value in tensors.items()}, path, header)

    def load_checkpoint(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """(tensors, meta) of the last checkpoint, or None if there is none.

        Raises:
            StreamctlError: it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        if not self.resumed:
            return None
        file = self._progress / "checkpoint.safetensors"
        try:
            with safe_open(file, "pt") as handle:
                header = handle.metadata()
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            undamaged = header["hash"] == tensors_hash(tensors, header["record"])
            record = json.loads(header["record"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            undamaged = False
        if not undamaged:
            raise StreamctlError(
                "the checkpoint is damaged (its hash differs)",
                where=file,
                run=f"{self.command} after removing it: the stage begins anew",
            )
        log = self.path / "metrics.jsonl"
        if is_main() and log.exists():
            os.truncate(log, min(record["logged_bytes"], log.stat().st_size))
        self.earlier_s = record["wall_s"]
        self.started = time.monotonic()
        return tensors, record["meta"]

    def publish(self, **extra: Any) -> None:
        """Hash the artifacts and write manifest.json; `extra` is kept in the manifest."""
        if is_main():
            self._write_manifest(extra)
        ranks().agree()  # nobody goes on before the stage is complete

    def _write_manifest(self, extra: Mapping[str, Any]) -> None:
        artifacts = {name: file_hash(self.path / name) for name in sorted(self._artifacts)}
        identity = json.dumps(artifacts, sort_keys=True).encode()
        manifest = {
            "schema": SCHEMA,
            "stage": self.name,
            "hash": hashlib.sha256(identity).hexdigest(),
            "artifacts": artifacts,
            "parents": self.parents,
            "config": to_dict(self.config),
            "seed": getattr(self.config, "seed", None),
            "wall_s": round(self.wall_s(), 2),
            "processes": ranks().count,
            **provenance(),
            **extra,
        }
        manifest = json.loads(json.dumps(manifest))
        manifest["seal"] = _seal(manifest)
        with atomic_file(self.path / MANIFEST) as path:
            path.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(self._progress, ignore_errors=True)


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest but its seal."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
