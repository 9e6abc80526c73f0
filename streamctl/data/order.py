"""Sort the remaining interactions by user and time, with dense indexes for users and items."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np

from streamctl.config import DataConfig
from streamctl.data.clean import moment, moment_text, parse_events
from streamctl.data.log import InteractionLog, forget, ranges
from streamctl.data.sources.raw import RawLog, sql_text
from streamctl.data.statistics import id_rank
from streamctl.device import derive_seed
from streamctl.errors import StreamctlError, UsageError
from streamctl.files import disk_errors
from streamctl.progress import say, warn

BATCH = 1 << 20


def number(raw: RawLog, config: DataConfig) -> tuple[InteractionLog, list[str]]:
    """(the interactions left, in order and with dense indexes; external id of each item index).

    By user, then part, time and input order. DuckDB sorts, on disk where the log is long.

    Raises:
        UsageError: a tie policy or a moment that does not fit the log.
    """
    if config.ties == "runs" and raw.timed:
        raise UsageError("--ties runs is for a log without times; this one takes --ties shuffle")
    if config.ties == "shuffle" and not raw.timed:
        warn("--ties shuffle has no effect: the source gives the order only, not times")
    names, dense = _number_items(raw, config)
    counts = raw.array("SELECT count(*) FROM log GROUP BY u ORDER BY u")
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    total = int(offsets[-1])
    weights = parse_events(config.events)
    chosen = {"i": np.int32}
    if raw.timed:
        chosen["t"] = np.int64
    if len(set(weights.values())) > 1:
        cases = " ".join(f"WHEN {sql_text(name)} THEN {w!r}" for name, w in weights.items())
        chosen[f"(CASE event {cases} END)::FLOAT"] = np.float32
    part = "part, " if raw.split else ""
    query = f"SELECT {', '.join(chosen)} FROM log ORDER BY u, {part}t, row"
    with disk_errors(Path(tempfile.gettempdir())):
        # A long log is not held in memory: its columns are maps of files that have no names.
        files = [tempfile.TemporaryFile() for _ in chosen]  # noqa: SIM115 - live as the maps
        for batch in raw.con.sql(query).to_arrow_reader(BATCH):
            values = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
            values[0] = dense[values[0]]
            for file, column in zip(files, values, strict=True):
                file.write(column.data)
        for file in files:
            file.flush()
    arrays = [
        np.memmap(file, dtype, "r+", shape=(total,))
        for file, dtype in zip(files, chosen.values(), strict=True)
    ]
    log = InteractionLog(
        items=arrays[0],
        offsets=offsets,
        user_ids=raw.array("SELECT name FROM users SEMI JOIN log USING (u) ORDER BY u").tolist(),
        timestamps=arrays[1] if raw.timed else None,
        weights=arrays[-1] if len(chosen) > 1 + raw.timed else None,
        cuts=_cuts(raw, config, offsets),
    )
    if config.ties != "keep" and (raw.timed or config.ties == "runs"):
        _shuffle(log, id_rank(names) if config.ties == "runs" else None, config.seed)
    return log, names


def _cuts(raw: RawLog, config: DataConfig, offsets: np.ndarray) -> np.ndarray | None:
    """int64 (U, 2): where each user's validation and test begin; None for leave-one-out.

    Raises:
        UsageError: no moments, or moments between which there is nothing.
    """
    if config.split == "leave-one-out" or (config.split == "auto" and not raw.split):
        return None
    if config.split == "auto":
        train, valid = "part < 1", "part < 2"
    else:
        first, second = _moments(raw, config.split)
        train, valid = f"t < {first}", f"t < {second}"
    found = raw.con.execute(f"""
        SELECT count(*) FILTER ({train}) AS train, count(*) FILTER ({valid}) AS valid
        FROM log GROUP BY u ORDER BY u""").fetchnumpy()
    cuts = np.stack([offsets[:-1] + found["train"], offsets[:-1] + found["valid"]], 1)
    if config.split == "auto" and not raw.one("SELECT count(*) FROM log WHERE part = 1"):
        # No part to validate on: the last of what trains, of users with something before it.
        cuts[:, 0] -= found["train"] > 1
    bounds = np.column_stack([offsets[:-1], cuts, offsets[1:]])
    for size, name in zip(np.diff(bounds).sum(0), ("train", "validate", "test"), strict=True):
        if not size:
            if config.split == "auto":
                raise StreamctlError(
                    f"the source's own parts leave no interactions to {name}",
                    where="data.split",
                    run="--split leave-one-out, or --split-at 80%,90%, splits the log anew",
                )
            span = [moment_text(raw, t) for t in raw.ask("SELECT min(t), max(t) FROM log")[0]]
            raise StreamctlError(
                f"no interactions are left to {name} with --split-at {config.split}; the log goes "
                f"from {span[0]} to {span[1]}",
                where="data.split",
                run="--split-at 80%,90% for moments by share",
            )
    if config.split != "auto":
        begins = (moment_text(raw, time) for time in (first, second))
        say("validation begins at {}, test at {}".format(*begins))
    return cuts


def _moments(raw: RawLog, text: str) -> tuple[int, int]:
    """(where validation begins, where test does), as times of the log."""
    if not raw.timed:
        raise UsageError(
            "--split-at needs a log with times; this one gives the order only",
            run="leave it out, or name the column of times: --columns time=NAME",
        )
    words = [word.strip() for word in text.split(",")]
    if len(words) > 2 or not all(words):
        raise UsageError(f"--split-at takes TIME or VALIDATION,TEST, not {text!r}")

    def at(share: float) -> int:
        return raw.one(f"SELECT quantile_disc(t, {share}) FROM log")

    found = []
    for word in words:
        if not word.endswith("%"):
            found.append(moment(raw, word, "--split-at"))
        elif re.fullmatch(r"\d{1,2}(\.\d+)?%", word, re.ASCII):
            found.append(at(float(word[:-1]) / 100))
        else:
            raise UsageError(f"--split-at takes a share like 80%, not {word!r}")
    if len(found) == 1:  # validation gets as many interactions as test
        test = raw.one(f"SELECT avg((t >= {found[0]})::INTEGER) FROM log")
        found.insert(0, min(at(max(0.0, 1 - 2 * test)), found[0]))
    if found[0] > found[1]:
        raise UsageError(
            f"--split-at {text}: validation comes before test", run="the earlier moment first"
        )
    return found[0], found[1]


def _number_items(raw: RawLog, config: DataConfig) -> tuple[list[str], np.ndarray]:
    """(external id of each dense index, int32 dense index of each number in `items`).

    The catalogue holds the items that occur in the filtered log; `--min-item 0` keeps those of
    the items file that nobody took, too. Numbers are a seeded permutation of the sorted ids, so
    that no model can read order or age from an id.
    """
    used = raw.array("SELECT DISTINCT i FROM log ORDER BY i")
    names = raw.array("SELECT name FROM items SEMI JOIN log USING (i) ORDER BY i").tolist()
    if config.min_item == 0 and raw.catalogue is not None:
        names += sorted(set(raw.catalogue.ids).difference(names))
    by_name = sorted(range(len(names)), key=names.__getitem__)
    rng = np.random.default_rng(derive_seed(config.seed, "items"))
    place = np.empty(len(names), np.int32)
    place[by_name] = rng.permutation(len(names))
    dense = np.full(raw.one("SELECT count(*) FROM items"), -1, np.int32)
    dense[used] = place[: len(used)]
    ordered = [""] * len(names)
    for name, index in zip(names, place.tolist(), strict=True):
        ordered[index] = name
    return ordered, dense


def _shuffle(log: InteractionLog, rank: np.ndarray | None, seed: int) -> None:
    """Shuffle equal times of each user, or, by `rank`, every run of ascending item ids.

    Public copies that give the order only have interactions of one time sorted by item id. Which
    runs are ties cannot be told, so runs shuffle true order too: figures are a lower bound.

    Args:
        rank: int32 (N,) rank of each item's id, numbers by value.
    """
    rng = np.random.default_rng(derive_seed(seed, "ties"))
    for first, last in ranges(log.offsets):
        part = slice(log.offsets[first], log.offsets[last])
        steps = np.diff(log.timestamps[part] if rank is None else rank[log.items[part]])
        starts = np.ones(part.stop - part.start, bool)
        starts[1:] = steps != 0 if rank is None else steps <= 0
        starts[log.offsets[first:last] - part.start] = True
        if log.cuts is not None:  # nothing changes its part
            cuts = log.cuts[first:last]
            starts[cuts[cuts < part.stop] - part.start] = True
        order = np.lexsort((rng.random(len(starts)), np.cumsum(starts)))
        for column in (log.items, log.timestamps, log.weights):
            if column is not None:
                column[part] = column[part][order]
                forget(column)
