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

import json
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streamctl.config import as_text, to_dict
from streamctl.distributed import SINGLE, ranks
from streamctl.errors import StreamctlError, UsageError, did_you_mean
from streamctl.files import atomic_file, disk_errors, locked, read_json
from streamctl.progress import warn
from streamctl.stage import MANIFEST, Stage, StageWriter

__all__ = ["RunDir", "Stage", "StageWriter"]


PREVIOUS = ".previous"  # the end of a folder's name that a new stage has taken the place of


class RunDir:
    """A run's folder. `RunDir(path)` makes it when the first stage begins."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def command(self, stage: str) -> str:
        """The command line that makes `stage` of this run."""
        return self.stage(stage).command

    def stage(self, name: str) -> Stage:
        """A stage, complete or not."""
        return Stage(self.path, name)

    def stages(self, group: str) -> list[str]:
        """Names of the complete stages `GROUP/NAME`, without copies, such as those that are kept
        as NAME.previous."""
        paths = (self.path / group).glob("*/" + MANIFEST)
        names = (f"{group}/{path.parent.name}" for path in paths)
        own = (name for name in names if not name.endswith(PREVIOUS))
        return sorted(name for name in own if self.stage(name).manifest["stage"] == name)

    def ancestors(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Manifests of stages and of all that they come from, by name."""
        waiting, found = list(names), {}
        while waiting:
            name = waiting.pop()
            if name not in found:
                found[name] = self.stage(name).manifest
                waiting += found[name]["parents"]
        return found

    def copy(self, name: str, target: RunDir) -> None:
        """Copy a complete stage to another run, unless it is there; the manifest comes last.

        Raises:
            StreamctlError: another one is there.
        """
        source, copied = self.stage(name), target.stage(name)
        if copied.complete:
            if copied.hash != source.hash:
                raise StreamctlError(
                    f"{target.path.name} was made from another {name}",
                    where=target.path,
                    run=f"mv {target.path} {target.path}.previous, then the same command",
                )
            return
        with disk_errors(copied.path):
            ignored = shutil.ignore_patterns(MANIFEST)
            shutil.copytree(source.path, copied.path, ignore=ignored, dirs_exist_ok=True)
            shutil.copy2(source.path / MANIFEST, copied.path / MANIFEST)

    def _check_folder(self) -> None:
        """Refuse a run whose path is, or goes through, a file."""
        for path in (self.path, *self.path.parents):
            if path.is_file():
                raise StreamctlError(
                    "this is a file, and a run is a folder", where=path, run="another --run"
                )

    def require(self, name: str) -> Stage:
        """A complete, undamaged stage whose parents have not changed since.

        Raises:
            StreamctlError: no such run, stage missing, damaged or stale; names the command to run.
        """
        if not self.path.is_dir():
            self._check_folder()
            beside = self.path.parent.glob("*/*/" + MANIFEST)
            near = did_you_mean(str(self.path), {str(file.parent.parent) for file in beside})
            raise StreamctlError(
                f"no such run; {near}" if near else "no such run",
                where=self.path,
                run=f"{self.command('data')} (makes it)",
            )
        stage = self.stage(name)
        if not stage.complete:
            inside = sorted(file.parent.parent for file in self.path.glob("*/data/" + MANIFEST))
            if inside and name == "data" and not any(self.path.glob("*/" + MANIFEST)):
                raise StreamctlError(
                    "this folder holds runs and is none itself",
                    where=self.path,
                    run=" or ".join(f"--run {shlex.quote(str(run))}" for run in inside[:3]),
                )
            state = "was interrupted" if (stage.path / "config.toml").exists() else "is missing"
            raise StreamctlError(f"stage {name} {state}", where=self.path, run=stage.resume())
        stale = stage.stale_parents()
        if stale:
            raise StreamctlError(
                f"stage {name} is stale: {' and '.join(stale)} changed after it was made",
                where=self.path,
                run=stage.again(),
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
        self._check_folder()
        hashes = {parent: self.require(parent).hash for parent in parents}
        writer = StageWriter(self.path, name, config, hashes)
        job = ranks()
        job.agree()  # all have read what the main process is about to change
        if not job.main:
            yield writer if job.agree() else None
            return
        busy = StreamctlError(
            f"another process is working on stage {name}",
            where=self.path,
            run="wait for it to end, or use another --run",
        )
        with locked(self.path / f".{name.replace('/', '-')}.lock", busy):
            wanted = self._prepare(writer, force)
            job.agree(wanted)
            yield writer if wanted else None

    def _prepare(self, writer: StageWriter, force: bool) -> bool:
        """Make the folder ready to begin or to continue; False when the stage is complete."""
        if writer.complete and not force:
            self._check_same(writer)
            writer.verify()
            return False
        if writer.name in SINGLE and ranks().count > 1:
            raise UsageError(
                f"stage {writer.name} is made by one process",
                run=f"{self.command(writer.name)} (without torchrun) before the others",
            )
        record = writer.path / ".progress" / "state.json"
        state = json.loads(
            json.dumps({"config": to_dict(writer.config), "parents": writer.parents})
        )
        same = not writer.complete and record.is_file() and read_json(record) == state
        if not same:
            begun = writer.resumed and not writer.complete
            kept = self._set_aside(writer.path)
            if begun:
                previous = writer.name + PREVIOUS
                warn(
                    f"{writer.name} starts again, for its settings or parents have changed since "
                    "it was started; "
                    + (
                        f"the unfinished work is kept as {previous}"
                        if kept
                        else f"{previous} still holds the last complete stage"
                    )
                )
            _write_config(writer.path / "config.toml", writer.config)
            with atomic_file(record) as path:
                path.write_text(json.dumps(state), encoding="utf-8")
        for leftover in writer.path.rglob(".*.part"):  # of a process that was killed
            leftover.unlink()
        if same and not writer.resumed:
            (writer.path / "metrics.jsonl").unlink(missing_ok=True)
        return True

    def _check_same(self, stage: StageWriter) -> None:
        """Refuse a complete stage that was made with other settings or parents."""
        made = stage.manifest
        old, new = made["config"], json.loads(json.dumps(to_dict(stage.config)))
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        stale = [key for key, value in stage.parents.items() if made["parents"].get(key) != value]
        if not changed and not stale:
            return
        changes: list[str] = []
        if changed:
            differences = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)
            what = f"stage {stage.name} is complete with other settings ({differences})"
            section = stage.config.section
            known = [key for key in changed if hasattr(stage.config, key)]
            changes = [f"{section}.{key}={as_text(new.get(key))}" for key in known]
        else:
            what = f"stage {stage.name} is stale: {' and '.join(stale)} changed after it was made"
        raise StreamctlError(
            what,
            where=self.path,
            run=f"{stage.redo(changes)} (keeps the old one as {stage.name}.previous)",
        )

    def _set_aside(self, folder: Path) -> bool:
        """Keep the folder as NAME.previous, but never replace a complete stage by a part of one.

        Returns:
            whether it was kept.
        """
        if not folder.exists():
            return False
        files = [file.name for file in folder.rglob("*") if file.is_file()]
        if all(name == "config.toml" or name.endswith(".part") for name in files):
            return False  # of a process that was killed before it had begun
        previous = folder.with_name(folder.name + PREVIOUS)
        if (previous / MANIFEST).exists() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder)
            return False
        shutil.rmtree(previous, ignore_errors=True)
        folder.rename(previous)
        return True


def _write_config(path: Path, config: Any) -> None:
    import tomli_w

    with atomic_file(path) as temporary:
        text = tomli_w.dumps({config.section: to_dict(config)})
        temporary.write_text(text, encoding="utf-8")
