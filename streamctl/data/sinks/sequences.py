"""`user_sequence.txt` (a user and then the items, a line a user) and items.jsonl."""

from __future__ import annotations

from pathlib import Path

from streamctl.data.sinks.sink import Export, Sink, cannot_hold, text_file, write_lines


def _write(export: Export) -> list[Path]:
    inter, item = export.path("user_sequence.txt"), export.path("items.jsonl")
    for name in (*export.log.user_ids, *export.catalog.ids):
        if name.split() != [name]:
            raise cannot_hold(f"id {name!r} (blanks part ids)", inter)
    with text_file(inter) as handle:
        handle.writelines(" ".join([user, *taken]) + "\n" for user, taken, _ in export.sequences())
    write_lines(item, ({"item_id": name, **fields} for name, fields in export.items()))
    return [inter, item]


SINK = Sink("sequences", "sequences", "user_sequence.txt + items.jsonl", _write, times=False)
