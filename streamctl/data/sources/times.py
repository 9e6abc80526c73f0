"""Times of any kind as whole numbers in the same order."""

from __future__ import annotations

from typing import Any

LARGEST_TIME = 1 << 62  # in the unit that is kept
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_DATE = r"[0-9]{4}[-/][0-9]{1,2}[-/][0-9].*"
# SQL of the column `time`: whether it is a whole number as people write them; the number that it
# is, or NULL; the nanoseconds since 1970 of the date that it is, or NULL. Casts to TIMESTAMP_NS
# leave the zone out, casts to TIMESTAMPTZ what is below microseconds.
INTEGER = "coalesce(try_cast(time AS BIGINT)::VARCHAR = time, false)"
NUMBER = f"CASE WHEN regexp_full_match(trim(time), '{_NUMBER}') THEN try_cast(time AS DOUBLE) END"
DATE = f"""CASE WHEN regexp_full_match(trim(time), '{_DATE}')
    THEN epoch_us(try_cast(trim(time) AS TIMESTAMPTZ))::HUGEINT * 1000
       + coalesce(epoch_ns(try_cast(trim(time) AS TIMESTAMP_NS)) % 1000, 0) END"""


def as_integers(con: Any) -> tuple[str, bool, int]:
    """(SQL expression that makes BIGINT of `staged.time`, whether they are dates, scale).

    Whole numbers stay as they are. Fractions are multiplied by the scale, the least power of ten
    that makes all of them whole, or the largest with which they fit into 62 bits. Dates become
    microseconds since 1970, or nanoseconds if some have such; their scale is the parts of a second.
    """
    whole, total = con.execute(
        f"SELECT count(*) FILTER ({INTEGER} OR time IS NULL), count(*) FROM staged"
    ).fetchone()
    if total == whole:
        return "time::BIGINT", False, 1
    if not con.execute(f"SELECT count({NUMBER}) FROM staged").fetchone()[0]:
        largest, fine = con.execute(f"""
            SELECT max(abs(d)), bool_or(d % 1000 <> 0) FROM (SELECT {DATE} AS d FROM staged)
            """).fetchone()
        if fine and largest < LARGEST_TIME * 2:
            return f"({DATE})::BIGINT", True, 10**9
        return f"(({DATE}) // 1000)::BIGINT", True, 10**6
    text = "try_cast(trim(time) AS DECIMAL(38, 18))::VARCHAR"
    places, largest = con.execute(f"""
        SELECT max(length(rtrim(split_part({text}, '.', 2), '0'))),
            max(abs(try_cast(time AS DOUBLE))) FROM staged""").fetchone()
    while places and largest * 10.0**places >= LARGEST_TIME:
        places -= 1
    parts = f"split_part({text}, '.', 1) || left(split_part({text}, '.', 2), {places})"
    return f"({parts})::BIGINT", False, 10**places
