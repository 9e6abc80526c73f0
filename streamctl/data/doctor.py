"""What is wrong with a source, and the remedy for each: `data doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamctl.config import DataConfig
from streamctl.data import checks
from streamctl.data.checks import Finding
from streamctl.data.prepare import build, reading_of
from streamctl.data.sources import find_source, read_source
from streamctl.data.sources.raw import database_errors
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
    source: Path, config: DataConfig, *, columns: Mapping[str, str] | None = None
) -> Examination:
    """Read a source as `data prepare` would and look for what makes results wrong.

    Bad lines do not stop it: they are listed, and the rest is examined without them.

    Raises:
        StreamctlError: no such path, no format that fits, or nothing at all can be read.
    """
    kind, _ = find_source(source, config.format)
    reading = reading_of(dataclasses.replace(config, skip_bad=1.0), columns)
    items = Path(config.items) if config.items else None
    try:
        raw = read_source(source, config.format, items=items, reading=reading)
    except StreamctlError:
        # Where bad lines alone are in the way, the first one says more than what is left.
        reading = reading_of(dataclasses.replace(config, skip_bad=0.0), columns)
        raw = read_source(source, config.format, items=items, reading=reading)
    with database_errors():
        findings = [
            *checks.files_found(raw),
            *checks.bad_lines(raw, reading.damages),
            *checks.repeated_and_unordered(raw),
            *checks.clock(raw),
            *checks.described_items(raw),
            *checks.parts(raw),
        ]
    statistics = None
    try:
        catalog, log, statistics = build(raw, config)
    except StreamctlError as error:
        findings.append(checks.Finding("filters", "error", error.what, error.run or ""))
    else:
        findings += [
            *checks.filters(statistics),
            *checks.order(log, statistics),
            *checks.leakage(catalog, log, config.history),
            *checks.as_published(statistics),
        ]
    names = [str(path) for path in raw.files]
    return Examination(str(source), kind.name, names, findings, statistics)
