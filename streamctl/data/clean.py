"""Cleaning and filtering: which rows count, then users and items with enough interactions."""

from __future__ import annotations

import datetime
import math
from decimal import Decimal

from streamctl.config import DataConfig
from streamctl.data.sources.raw import RawLog
from streamctl.data.sources.times import LARGEST_TIME
from streamctl.errors import StreamctlError, UsageError, count_of
from streamctl.progress import warn

LEAVE_ONE_OUT = 3  # history, valid and test: a user with less cannot be evaluated
FIRST_YEAR = 1990  # no public log is older
_SECONDS = 100_000_000_000  # larger times are no seconds but milliseconds, and so on


def parse_events(text: str) -> dict[str, float]:
    """`view=0.1,buy` -> {"view": 0.1, "buy": 1.0}.

    Raises:
        UsageError: another form, or a weight that evidence cannot count (in 1/1024).
    """
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, weight = part.rpartition("=")
        try:
            weights[name if equals else part] = float(weight) if equals else 1.0
        except ValueError:
            weights[part] = math.nan
    if not all(0.001 <= weight <= 1000 for weight in weights.values()):
        raise UsageError(f"--events takes view,buy or view=0.1,buy=1 (0.001 to 1000), not {text!r}")
    return weights


def clean(raw: RawLog, config: DataConfig) -> dict[str, int]:
    """Delete the rows that are not wanted; returns how many each rule deleted.

    Raises:
        UsageError: a rule that the log cannot follow.
    """
    taken: dict[str, int] = {}
    span = ""
    if raw.timed and (config.since or config.until):
        first, last = raw.ask("SELECT min(t), max(t) FROM log")[0]
        span = f"; the log goes from {moment_text(raw, first)} to {moment_text(raw, last)}"

    def drop(rule: str, condition: str, *values: object, told: str = "") -> None:
        before = len(raw)
        raw.con.execute(f"DELETE FROM log WHERE {condition}", list(values))
        taken[rule] = before - len(raw)
        if not len(raw):
            option, value = f"--{rule.replace('_', '-')}", getattr(config, rule)
            given = option if value is True else f"{option} {value}"
            raise UsageError(
                f"{given} leaves none of {count_of(before, 'interaction')}{told}",
                run=f"another {option}, or leave it out",
            )

    if config.since:
        drop("since", "t < ?", moment(raw, config.since, "--since"), told=span)
    if config.until and (day := _day_after(config.until)):
        drop("until", "t >= ?", moment(raw, day, "--until"), told=span)
    elif config.until:
        drop("until", "t > ?", moment(raw, config.until, "--until", up=False), told=span)
    if config.min_rating is not None:
        unread = raw.ask("SELECT count(*) FROM log WHERE rating IS NULL")[0][0]
        told = f"; {count_of(unread, 'rating')} missing or not a number" if unread else ""
        drop("min_rating", "rating IS NULL OR rating < ?", config.min_rating, told=told)
    if config.events:
        known = sorted(str(name) for (name,) in raw.ask("SELECT DISTINCT event FROM log LIMIT 20"))
        told = f"; the kinds are {', '.join(known)}"
        names = list(parse_events(config.events))
        if (absent := set(names) - set(known)) and len(known) < 20:
            warn(f"--events: no event is {' or '.join(sorted(absent))}{told}")
        drop("events", "event IS NULL OR event NOT IN (SELECT unnest(?))", names, told=told)
    if config.described:
        if raw.catalogue is None:
            raise UsageError("data.described needs an items file; --items FILE names it")
        raw.con.execute("CREATE TABLE described (name VARCHAR)")
        raw.con.execute("INSERT INTO described SELECT unnest(?)", [raw.catalogue.ids])
        drop("described", "i NOT IN (SELECT i FROM items SEMI JOIN described USING (name))")
    part = "part, " if raw.split else ""
    same = {
        "drop": f"GROUP BY {part}u, i, t, {raw.column('event')}",
        "first": "GROUP BY u, i",
        "last": "GROUP BY u, i",
    }.get(config.repeats)
    if config.repeats == "drop" and not raw.timed:
        warn("--drop-repeats has no effect: the source gives the order only, not times")
    elif same:
        order = f"({part}t, row)"
        which = "max" if config.repeats == "last" else "min"
        drop("repeats", f"row NOT IN (SELECT arg_{which}(row, {order}) FROM log {same})")
    if config.max_per_user is not None:
        drop(
            "max_per_user",
            f"""row IN (SELECT row FROM log
                SEMI JOIN (SELECT u FROM log GROUP BY u HAVING count(*) > $1) USING (u)
                QUALIFY row_number() OVER (PARTITION BY u ORDER BY ({part}t, row) DESC) > $1)""",
            config.max_per_user,
        )
    return taken


def moment(raw: RawLog, text: str, option: str, up: bool = True) -> int:
    """A time of the user's as the log has it: a date, or a number in the source's unit.

    Args:
        up: what lies between two times that the log can hold becomes the later one.

    Raises:
        UsageError: neither, or a log without times.
    """
    if not raw.timed:
        raise UsageError(
            f"{option} needs a log with times; this one gives the order only",
            run="leave it out, or name the column of times: --columns time=NAME",
        )
    try:
        value = Decimal(text)
    except ArithmeticError:
        value = None
    if value is not None and not value.is_finite():
        raise UsageError(f"{option} takes a date or a number, not {text!r}")
    if value is not None and raw.dates:
        raise UsageError(f"{option} takes a date here, such as 2024-01-31, not {text!r}")
    if value is None:
        value = _seconds(text, option)
        if not raw.dates:
            value *= round(time_units(raw) / raw.scale)
    value = max(-LARGEST_TIME, min(value, LARGEST_TIME)) * raw.scale  # 1e999999999, too
    return max(-LARGEST_TIME, min((math.ceil if up else math.floor)(value), LARGEST_TIME))


def time_units(raw: RawLog) -> float:
    """How many units of the log's times a second has: 1 for seconds, 1000 for milliseconds, ..."""
    parts = float(raw.scale)
    if not raw.dates:  # numbers that count seconds, or a thousandth, a millionth of them
        middle = raw.one("SELECT abs(coalesce(median(t), 0)) FROM log") / parts
        while middle >= _SECONDS:
            parts, middle = parts * 1000, middle / 1000
    return parts


def moment_text(raw: RawLog, time: int) -> str:
    """A time of the log for people: a date (UTC) if it can be one, else as the log writes it."""
    try:
        date = datetime.datetime.fromtimestamp(time / time_units(raw), datetime.UTC)
    except (ValueError, OverflowError, OSError):
        date = None
    if date is None or (not raw.dates and date.year < FIRST_YEAR):
        return f"{time / raw.scale:g}" if raw.scale > 1 else str(time)
    return date.strftime("%Y-%m-%d" if date.time() == datetime.time() else "%Y-%m-%d %H:%M:%S")


def _day_after(text: str) -> str | None:
    """The day after a date without a time of day: until that day is until its end."""
    try:
        day = datetime.date.fromisoformat(text.strip().replace("/", "-"))
        return str(day + datetime.timedelta(1)) if not text.strip().isdigit() else None
    except (ValueError, OverflowError):
        return None


def _seconds(text: str, option: str) -> Decimal:
    """Seconds from 1970 to a date."""
    try:
        date = datetime.datetime.fromisoformat(text.strip().replace("/", "-"))
    except ValueError:
        raise UsageError(
            f"{option} takes a date (2024-01-31, 2024-01-31T18:30) or a number in the log's own "
            f"unit, not {text!r}"
        ) from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.UTC)
    return Decimal(str(date.timestamp()))


def minimums(raw: RawLog, config: DataConfig, leave_one_out: bool) -> tuple[int, int]:
    """(interactions a user needs, interactions an item needs).

    By default a log with times gets the benchmarks' 5-core. One that gives the order only, or is
    split already, has been cut by whoever made it: cutting it again would change the published
    benchmark (of the Amazon 2018 Scientific copy a tenth would be left), so only what
    leave-one-out needs is asked for.
    """
    core = 5 if raw.timed and not raw.split else 1
    user = core if config.min_user is None else config.min_user
    item = core if config.min_item is None else config.min_item
    return max(user, LEAVE_ONE_OUT if leave_one_out else 1), item


def find_core(raw: RawLog, min_user: int, min_item: int) -> dict[str, int]:
    """Delete users and items with too few interactions, until none is left that has.

    Returns:
        how many rounds it took, and what each filter removed.

    Raises:
        StreamctlError: nothing is left.
    """
    removed = {"min_user": min_user, "min_item": min_item, "rounds": 0}
    steps = (("u", min_user, "short_users"), ("i", min_item, "rare_items"))
    removed |= {key: 0 for *_, kind in steps for key in (kind, f"interactions_of_{kind}")}
    distinct = "SELECT count(DISTINCT u), count(DISTINCT i), count(*) FROM log"
    *before, total = raw.ask(distinct)[0]
    [[longest]] = raw.ask(
        "SELECT coalesce(max(n), 0) FROM (SELECT count(*) AS n FROM log GROUP BY u)"
    )
    count = 1
    while count:
        removed["rounds"] += 1
        for letter, least, kind in steps:
            raw.con.execute(f"""
                CREATE OR REPLACE TABLE few AS SELECT {letter}, count(*) AS n
                FROM log GROUP BY {letter} HAVING n < {least}""")
            count, rows = raw.ask("SELECT count(*), coalesce(sum(n), 0)::BIGINT FROM few")[0]
            removed[kind] += count
            removed[f"interactions_of_{kind}"] += rows
            if count:
                raw.con.execute(f"DELETE FROM log WHERE {letter} IN (SELECT {letter} FROM few)")
    *after, left = raw.ask(distinct)[0]
    removed |= {"users": before[0] - after[0], "items": before[1] - after[1]}
    if not left:
        raise StreamctlError(
            f"no usable interactions are left of {total:,}: "
            f"{removed['interactions_of_short_users']:,} are of users with fewer than {min_user}, "
            f"{removed['interactions_of_rare_items']:,} of items with fewer than {min_item}",
            where=raw.files[0] if raw.files else None,
            run=f"--min-user {LEAVE_ONE_OUT} --min-item 1 (a user needs {LEAVE_ONE_OUT} "
            "interactions: history, valid, test)"
            if longest >= LEAVE_ONE_OUT and (min_user > LEAVE_ONE_OUT or min_item > 1)
            else f"more data: a log in which users took {LEAVE_ONE_OUT} items or more; are the "
            "columns of users and items the right ones (--columns user=NAME,item=NAME)?",
        )
    return removed
