"""RecBole's atomic files: NAME.inter and NAME.item, tab-separated, with typed headers."""

from __future__ import annotations

from pathlib import Path

from streamctl.data.sinks.sink import Export, Sink, text_file


def _write(export: Export) -> list[Path]:
    inter, item = (export.path(f"{export.name}.{kind}") for kind in ("inter", "item"))
    export.check_ids(inter, "\t")
    with text_file(inter) as handle:
        handle.write("user_id:token\titem_id:token\ttimestamp:float\n")
        handle.writelines(f"{user}\t{i}\t{time}\n" for user, i, time in export.interactions())
    with text_file(item) as handle:
        header = ["item_id:token", *(f"{column}:token_seq" for column in export.columns)]
        handle.write("\t".join(header) + "\n")
        for name, fields in export.items():
            handle.write("\t".join([name, *fields.values()]) + "\n")
    return [inter, item]


SINK = Sink("recbole", "recbole", "NAME.inter + NAME.item", _write)
