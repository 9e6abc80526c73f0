"""What is wrong with a source, and the remedy for each: `data doctor`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamctl.config import DataConfig
from streamctl.data import raw_checks, split_checks
from streamctl.data.findings import Finding
from streamctl.data.prepare import build
from streamctl.data.salvage import Damage, salvage
from streamctl.data.sources import find_source
from streamctl.errors import StreamctlError


@dataclass(frozen=True)
class Examination:
    """All findings about a source, and the statistics `data prepare` would print of it."""

    source: str
    format: str
    files: list[str]
    findings: list[Finding]
    statistics: dict[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(
    source: Path,
    config: DataConfig,
    *,
    columns: Mapping[str, str] | None = None,
) -> Examination:
    """Read a source as `data prepare` would and look for what makes results wrong.

    Bad lines do not stop it: they are listed, and the rest is examined without them.

    Raises:
        StreamctlError: no such path, no format that fits, or nothing at all can be read.
    """
    kind, files = find_source(source, config.format)
    with tempfile.TemporaryDirectory() as folder:
        try:
            raw = kind.read(files, columns)
            damages: list[Damage] = []
        except StreamctlError as first:
            kept, damages = salvage(files, Path(folder), columns)
            if not damages:
                raise
            try:
                raw = kind.read(kept, columns)
            except StreamctlError:
                raise first from None  # it names the source's file, not the copy
    raw.files = tuple(filter(None, (files.interactions, files.items)))
    findings = [
        *raw_checks.files_found(raw),
        *raw_checks.bad_lines(damages),
        *raw_checks.repeated_and_unordered(raw),
        *raw_checks.clock(raw),
        *raw_checks.described_items(raw),
    ]
    statistics = None
    try:
        catalog, log, statistics = build(raw, config)
    except StreamctlError as error:
        findings.append(Finding("filters", "error", error.what, error.run or ""))
    else:
        findings += [
            *split_checks.filters(statistics),
            *split_checks.order(log, statistics),
            *split_checks.leakage(catalog, log),
            *split_checks.as_published(statistics),
        ]
    names = [str(path) for path in raw.files]
    return Examination(str(source), kind.name, names, findings, statistics)
