"""Tables and sentences of docs/scale.md, each from the receipts that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
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
    """What the catalogue's size does to codes, trie and decoding, and the log's to evidence."""
    rows = [
        [
            f"{row['items']:,}",
            f"{row['sharing']:.1%}",
            f"{row['moved']:,}",
            f"{row['reassign_s']:.1f}",
            f"{row['trie_build_s']:.1f}",
            f"{row['trie_bytes_per_item']:.0f}",
            f"{row['trie_bytes_per_item'] * row['items'] / 1e6:,.0f}",
            f"{row['decode_ms_per_user']:.1f}",
            f"{row['decode_ms_alone']:.1f}",
            f"{row['peak_gb']:.1f}",
        ]
        for row in receipt["catalogue"]
    ]
    head = ["items", "share a code at first", "moved", "s to move them", "trie, s to build"]
    head += ["bytes an item", "MB", f"decode, ms a user of {receipt['users']}", "alone", "peak GB"]
    first, last = receipt["catalogue"][0], receipt["catalogue"][-1]
    names = receipt["codes"] ** receipt["levels"] / 1e9
    logs = [
        [
            f"{row['interactions']:,}",
            f"{row['index_s']:,.0f}",
            f"{row['gb']:.1f}",
            f"{row['peak_gb']:.1f}",
            f"{row['pairs'] / row['items']:,.0f}",
            f"{row['postings'] / row['items']:,.0f}",
            f"{row['gather_ms']:.2f}",
            f"{row['gather_ms_alone']:.2f}",
        ]
        for row in receipt["log"]
    ]
    counts = [row["interactions"] for row in receipt["log"]]
    times = [row["gather_ms"] for row in receipt["log"]]
    longer = [after / before for before, after in pairwise(times)]
    log_head = ["interactions", "s to count", "GB held", "peak GB", "pairs an item", "rows an item"]
    log_head += [f"ms a history of {receipt['together']}", "alone"]
    return f"""{markdown(head, rows)}

- **Codes.** {receipt["codes"]}^{receipt["levels"]} names {names:.1f} billion items, and yet at
  {last["items"]:,} items {last["sharing"]:.0%} share theirs as quantized: the space is not filled
  evenly. `--collisions reassign` moves {last["moved"]:,} of them in {last["reassign_s"]:.1f} s.
- **Trie.** int64 arrays, a leaf for each item: {last["trie_bytes_per_item"]:.0f} bytes an item.
- **Decoding.** The search looks at K tokens of each of {receipt["beam"]} prefixes a level,
  whatever the catalogue: from {first["items"]:,} to {last["items"]:,} items the time goes from
  {first["decode_ms_per_user"]:.1f} to {last["decode_ms_per_user"]:.1f} ms a user.

{markdown(log_head, logs)}

- **Look-ups.** Evidence of one history reads at most 1,024 pairs and 2,048 rows of an item; the
  columns say how many an item has on average. As these lists fill up, a look-up becomes longer: in
  a batch {longer[0]:.1f} times from {counts[0]:,} to {counts[1]:,} interactions,
  {longer[1]:.1f} times from there to {counts[2]:,}, where all are full. It is bounded, not flat.
- **Memory.** Beside the lists, 20 bytes a training prefix (its owner and the next four items) and
  4 bytes an interaction stay, and 8 bytes a prefix in each thread that gathers. The peak is that of
  counting."""


def arithmetic(receipts: Mapping[str, Receipt]) -> str:
    """The measured figures times a number."""
    speed = {row["stage"]: row["per_core_s"] for row in receipts["throughput"]["stages"]}
    sequences = USERS * TAKEN
    trie, log = receipts["scale"]["catalogue"][-1], receipts["scale"]["log"][-1]
    work = (
        ("pretraining, an epoch", sequences / speed["pretrain"]),
        ("annotation, once", sequences / speed["annotate"]),
        ("SFT, an epoch", sequences / speed["sft"]),
        ("RL, 10,000 steps of 128 users x 16", RL_ROLLOUTS / speed["rl"]),
        ("ranking every user once, beam 50", USERS / speed["eval"]),
        ("counting the evidence", log["index_s"] / log["interactions"] * sequences),
    )
    rows = [["interactions, 16 bytes each (user, item, time)", f"{16 * sequences / 1e9:.0f} GB"]]
    for what, seconds in work:
        on_all = seconds / CORES / 60
        minutes = f"{on_all:,.0f}" if on_all >= 10 else f"{on_all:.2g}"
        rows.append([what, f"{seconds / 3600:,.0f} core-hours, {minutes} minutes on "
                           f"{CORES:,} cores"])  # fmt: skip
    rows += [
        ["item vectors, 128 x float32", f"{ITEMS * 128 * 4 / 1e9:.0f} GB"],
        [
            f"trie at {trie['trie_bytes_per_item']:.0f} bytes an item",
            f"{ITEMS * trie['trie_bytes_per_item'] / 1e9:.0f} GB in each serving process",
        ],
        [
            "rows of the memory: 20 bytes a training prefix",
            f"{20 * sequences / 1e9:,.0f} GB in each process that gathers evidence",
        ],
        [
            "pairs and postings: 8 bytes each, 1,024 and 2,048 an item",
            f"{8 * 3072 * ITEMS / 1e12:.1f} TB at most",
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
