"""Tables and sentences of docs/scale.md, each from the receipts that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Receipt = Mapping[str, Any]
USERS, ITEMS, TAKEN = 10**9, 10**8, 20  # what the page multiplies up to; interactions a user
CORES = 10_000
RL_ROLLOUTS = 10_000 * 128 * 16  # steps, users, group


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def throughput(receipt: Receipt) -> str:
    """What each stage gets through in a core-second."""
    rows = [[row["stage"], f"{row['per_core_s']:,.0f} {row['unit']}"] for row in receipt["stages"]]
    return markdown(["stage", "per core-second"], rows)


def prepare(receipt: Receipt) -> str:
    """One sentence: time and memory of the largest log."""
    row = receipt["rows"][-1]
    kept = row["kept"]
    return (
        f"`data prepare` of a synthetic log of {row['interactions'] / 1e6:,.0f} million "
        f"interactions\n({kept['users']:,} users and {kept['items']:,} items, "
        f"{row['source_gb']} GB of text) took {row['seconds']:.0f} s and "
        f"{row['peak_gb']} GB of memory:\n{row['minutes_per_100m']} minutes a 100 million."
    )


def ranks(receipt: Receipt) -> str:
    """Two processes of one thread beside one of two."""
    rows = [
        [row["stage"], f"{row['peer']:.4g} {row['unit']}", f"{row['ours']:.4g}",
         f"{row['ratio']:.2f}x"]
        for row in receipt["rows"]
    ]  # fmt: skip
    return markdown(["stage", "one process", "two processes", "ratio"], rows)


def million(receipt: Receipt) -> str:
    """Minutes and memory of every stage on a large shop."""
    rows = [
        [
            row["stage"],
            f"{row['minutes']:.1f}",
            "" if row["cpu_minutes"] is None else f"{row['cpu_minutes']:.1f}",
            f"{row['peak_gb']:.1f}",
        ]
        for row in receipt["stages"]
    ]
    return (
        f"{receipt['users']:,} users, {receipt['items']:,} items and "
        f"{receipt['interactions']:,} interactions: {receipt['minutes']:.0f} minutes, "
        f"{receipt['peak_gb']:.1f} GB at most.\n\n"
        + markdown(["stage", "minutes", "of them computing", "GB at most"], rows)
    )


def growth(receipt: Receipt) -> str:
    """What the catalogue's size does to codes, trie and decoding."""
    rows = [
        [
            f"{row['items']:,}",
            f"{row['sharing']:.1%}",
            f"{row['most_on_one_code']:,}",
            f"{row['trie_build_s']:.1f}",
            f"{row['trie_bytes_per_item']:.0f}",
            f"{row['trie_bytes_per_item'] * row['items'] / 1e6:,.0f}",
            f"{row['decode_ms_per_user']:.1f}",
            f"{row['peak_gb']:.1f}",
        ]
        for row in receipt["catalogue"]
    ]
    head = ["items", "share a code before it is resolved", "most on one code"]
    head += ["trie, s to build", "bytes an item", "MB", "decode, ms a user", "peak GB"]
    first, last = receipt["catalogue"][0], receipt["catalogue"][-1]
    moved = [row for row in receipt["catalogue"] if "moved" in row][-1]
    ms = 1000 * moved["reassign_s"] / moved["moved"]
    hours = (last["items"] - last["distinct"]) * ms / 3.6e6
    full = moved["trie_bytes_per_item"]
    names = receipt["codes"] ** receipt["levels"] / 1e9
    return f"""{markdown(head, rows)}

- **Codes.** {receipt["codes"]}^{receipt["levels"]} names {names:.1f} billion items, and yet at
  {last["items"]:,} items {last["sharing"]:.0%} share theirs: the space is not filled evenly.
  Resolving by moving (`--collisions reassign`) takes {ms:.1f} ms for each item moved
  ({moved["moved"]:,} moved of {moved["items"]:,}, measured); at {last["items"]:,} items that is
  arithmetic of {hours:.1f} hours.
- **Trie.** int64 arrays of the codes as quantized: {last["trie_bytes_per_item"]:.0f} bytes an item
  at the largest size, where many items have no leaf of their own; resolved, each has one, and it
  is nearer the {full:.0f} bytes of {moved["items"]:,} items.
- **Decoding.** The search looks at K tokens of each of {receipt["beam"]} prefixes a level,
  whatever the catalogue: from {first["items"]:,} to {last["items"]:,} items the time goes from
  {first["decode_ms_per_user"]:.1f} to {last["decode_ms_per_user"]:.1f} ms a user."""


def arithmetic(receipts: Mapping[str, Receipt]) -> str:
    """The measured figures times a number."""
    speed = {row["stage"]: row["per_core_s"] for row in receipts["throughput"]["stages"]}
    sequences = USERS * TAKEN
    moved = [row for row in receipts["scale"]["catalogue"] if "moved" in row][-1]
    work = (
        ("pretraining, an epoch", sequences / speed["pretrain"]),
        ("annotation, once", sequences / speed["annotate"]),
        ("SFT, an epoch", sequences / speed["sft"]),
        ("RL, 10,000 steps of 128 users x 16", RL_ROLLOUTS / speed["rl"]),
        ("ranking every user once, beam 50", USERS / speed["eval"]),
    )
    rows = [["interactions, 16 bytes each (user, item, time)", f"{16 * sequences / 1e9:.0f} GB"]]
    for what, seconds in work:
        on_all = seconds / CORES / 60
        rows.append([what, f"{seconds / 3600:,.0f} core-hours, {on_all:.2g} minutes on "
                           f"{CORES:,} cores"])  # fmt: skip
    rows += [
        ["item vectors, 128 x float32", f"{ITEMS * 128 * 4 / 1e9:.0f} GB"],
        [
            f"trie at {moved['trie_bytes_per_item']:.0f} bytes an item",
            f"{ITEMS * moved['trie_bytes_per_item'] / 1e9:.0f} GB in each serving process",
        ],
        [
            "gradient of the paper's size, about 10 M weights in fp32",
            f"{10e6 * 4 / 1e6:.0f} MB a step and rank, "
            f"{10e6 * 4 * 8 * 2 / 10e9 * 1000:.0f} ms on 10 Gbit/s",
        ],
    ]
    return markdown(["what", "figure"], rows)


BLOCKS: dict[str, Callable[[Receipt], str]] = {
    "throughput": throughput,
    "prepare": prepare,
    "ranks": ranks,
    "million": million,
    "scale": growth,
}
