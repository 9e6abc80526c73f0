"""A run on disk: a folder a stage, published by a manifest that is written last.

    runs/NAME/{data,tokenizer,pretrain,annotate,sft,rl,baselines/<name>,eval}/
        config.toml     the resolved configuration, written before work starts
        metrics.jsonl   one JSON object a logged step
        <artifacts>     parquet, npy, safetensors, json
        manifest.json   written last: its presence means that the stage is complete
        .progress/      parents' hashes and the last checkpoint of a stage in work

Every file is written beside its final name, synced and renamed, so that a reader sees the old
file or the new one and never half of one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.config import to_dict
from streamctl.distributed import SINGLE, is_main, ranks
from streamctl.errors import StreamctlError, UsageError
from streamctl.files import atomic_file, disk_errors, file_hash, read_json, tensors_hash
from streamctl.progress import warn

SCHEMA = 1
MANIFEST = "manifest.json"
COMMANDS = {
    "data": "data prepare SOURCE",
    "tokenizer": "tokenize",
    "think-curve": "eval --think-curve",
    "beam-losses": "eval --decode exact",
}
_PACKAGES = ("torch", "transformers", "numpy", "numba", "faiss-cpu", "scikit-learn", "pyarrow")


def command_for(stage: str) -> str:
    """The command that makes a stage: `tokenize` for "tokenizer", `baseline NAME`, ..."""
    if stage.startswith("baselines/"):
        return "baseline " + stage.removeprefix("baselines/")
    return COMMANDS.get(stage, stage)


def _git_revision() -> str | None:
    source = Path(__file__).resolve()
    git = ["git", "-C", str(source.parent)]
    options = {"capture_output": True, "text": True, "timeout": 5, "check": True}
    try:
        # An installed copy may lie inside a repository that is somebody else's.
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], **options)
        answer = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12"], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in ("streamctl", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def provenance() -> dict[str, Any]:
    """Where a result came from: git revision, versions, machine, peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {
        "git": _git_revision(),
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20,
    }


class Stage:
    """A finished stage, to read."""

    def __init__(self, run: RunDir, name: str):
        self.run = run
        self.name = name
        self.path = run.path / name

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
        manifest = read_json(path, run=f"{self.run.command(self.name)} --force")
        if "seal" in manifest and manifest["seal"] != _seal(manifest):
            raise StreamctlError(
                "the manifest is damaged (its seal differs from what it says)",
                where=path,
                run=f"{self.run.command(self.name)} --force",
            )
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
            if not self.run.stage(parent).complete or self.run.stage(parent).hash != seen
        ]

    def file(self, name: str) -> Path:
        """Path of an artifact.

        Raises:
            StreamctlError: the manifest lists no such artifact, or it is gone.
        """
        if name not in self.manifest["artifacts"]:
            raise StreamctlError(
                f"stage {self.name} has no artifact {name}",
                where=self.path,
                run=f"{self.run.command(self.name)} --force",
            )
        path = self.path / name
        if not path.is_file():
            raise self._artifact("is missing", path)
        return path

    def _artifact(self, problem: str, path: Path) -> StreamctlError:
        run = f"{self.run.command(self.name)} --force"
        return StreamctlError(f"artifact {problem}", where=path, run=run)

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
            path = self.path / name
            if not path.is_file():
                raise self._artifact("is missing", path)
            if file_hash(path) != expected:
                raise self._artifact("is damaged (its hash differs from manifest.json)", path)


class StageWriter(Stage):
    """A stage in work. Made by `RunDir.begin`; `publish` completes it.

    `resumed` is true when a checkpoint of an interrupted run with the same settings was found.
    """

    def __init__(self, run: RunDir, name: str, config: Any, parents: Mapping[str, str]):
        super().__init__(run, name)
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
            path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

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
        with disk_errors(path), open(path, "a") as handle:
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
                run=f"{self.run.command(self.name)} after removing it: the stage begins anew",
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
            path.write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(self._progress, ignore_errors=True)


class RunDir:
    """A run's folder. `RunDir(path)` makes it when the first stage begins."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def command(self, stage: str) -> str:
        """The command line that makes `stage` of this run."""
        return f"streamctl {command_for(stage)} --run {self.path}"

    def stage(self, name: str) -> Stage:
        """A stage, complete or not."""
        return Stage(self, name)

    def require(self, name: str) -> Stage:
        """A complete, undamaged stage whose parents have not changed since.

        Raises:
            StreamctlError: no such run, stage missing, damaged or stale; names the command to run.
        """
        if not self.path.is_dir():
            raise StreamctlError(
                "no such run", where=self.path, run=f"{self.command('data')} (makes it)"
            )
        stage = self.stage(name)
        if not stage.complete:
            started = (stage.path / "config.toml").exists()
            state = "was interrupted" if started else "is missing"
            raise StreamctlError(f"stage {name} {state}", where=self.path, run=self.command(name))
        stale = stage.stale_parents()
        if stale:
            raise StreamctlError(
                f"stage {name} is stale: {' and '.join(stale)} changed after it was made",
                where=self.path,
                run=f"{self.command(name)} --force",
            )
        stage.verify()
        for parent in stage.manifest["parents"]:
            if self.stage(parent).stale_parents():
                self.require(parent)
        return stage

    @contextmanager
    def begin(
        self, name: str, config: Any, parents: Sequence[str] = (), *, force: bool = False
    ) -> Iterator[StageWriter | None]:
        """Start or continue a stage; yields None when it is complete with these settings.

        Args:
            name: the stage's folder below the run.
            config: its dataclass; written to config.toml before the block runs.
            parents: stages it reads; each is required, and its hash recorded.
            force: redo a complete stage; the old folder is kept as `NAME.previous`.

        Raises:
            StreamctlError: a parent is missing or stale, the stage is complete with other
                settings or parents, or another process works on it.
        """
        hashes = {parent: self.require(parent).hash for parent in parents}
        writer = StageWriter(self, name, config, hashes)
        job = ranks()
        job.agree()  # all have read what the main process is about to change
        if not job.main:
            yield writer if job.agree() else None
            return
        with self._lock(name):
            wanted = self._prepare(writer, force)
            job.agree(wanted)
            yield writer if wanted else None

    def _prepare(self, writer: StageWriter, force: bool) -> bool:
        """Make the folder ready to begin or to continue; False when the stage is complete."""
        config, hashes = writer.config, writer.parents
        if writer.complete and not force:
            self._check_same(writer, config, hashes)
            writer.verify()
            return False
        if writer.name in SINGLE and ranks().count > 1:
            raise UsageError(
                f"stage {writer.name} is made by one process",
                run=f"{self.command(writer.name)} (without torchrun) before the others",
            )
        progress = writer.path / ".progress"
        state = {"config": to_dict(config), "parents": hashes}
        same = (
            not writer.complete
            and (progress / "state.json").is_file()
            and read_json(progress / "state.json") == json.loads(json.dumps(state))
        )
        if not same:
            if writer.resumed and not writer.complete:
                warn(
                    f"{writer.name} was begun with other settings or parents: it begins anew, and "
                    f"what was done is kept as {writer.name}.previous"
                )
            self._set_aside(writer.path)
            _write_config(writer.path / "config.toml", config)
            with atomic_file(progress / "state.json") as path:
                path.write_text(json.dumps(state))
        for leftover in writer.path.rglob(".*.part"):  # of a process that was killed
            leftover.unlink()
        if same and not writer.resumed:
            (writer.path / "metrics.jsonl").unlink(missing_ok=True)
        return True

    def _check_same(self, stage: Stage, config: Any, hashes: Mapping[str, str]) -> None:
        old, new = stage.manifest["config"], json.loads(json.dumps(to_dict(config)))
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        stale = [
            key for key, value in hashes.items() if stage.manifest["parents"].get(key) != value
        ]
        if not changed and not stale:
            return
        if changed:
            differences = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)
            what = f"stage {stage.name} is complete with other settings ({differences})"
        else:
            what = f"stage {stage.name} is stale: {' and '.join(stale)} changed after it was made"
        raise StreamctlError(
            what,
            where=self.path,
            run=f"{self.command(stage.name)} --force (keeps the old one as {stage.name}.previous)",
        )

    def _set_aside(self, folder: Path) -> None:
        """Keep the folder as NAME.previous; but never half a stage in the place of a whole one."""
        if not folder.exists():
            return
        files = [file.name for file in folder.rglob("*") if file.is_file()]
        if all(name == "config.toml" or name.endswith(".part") for name in files):
            return  # of a process that was killed before it had begun
        previous = folder.with_name(folder.name + ".previous")
        if (previous / MANIFEST).exists() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder)
            return
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        lock = self.path / f".{name.replace('/', '-')}.lock"
        with disk_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = open(lock, "w")  # noqa: SIM115 - closed below, outside of the disk's errors
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StreamctlError(
                    f"another process works on stage {name}",
                    where=self.path,
                    run="wait for it to end, or use another --run",
                ) from error
            yield


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest but its seal."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _write_config(path: Path, config: Any) -> None:
    import tomli_w

    buffer = io.BytesIO()
    tomli_w.dump({config.section: to_dict(config)}, buffer)
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
