"""Tables of the README and of docs/, generated from the receipts below results/ and the settings.

python benchmarks/readme.py          rewrites the blocks between <!-- NAME --> and <!-- /NAME -->
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import sys
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import scale_tables
from benchmarks.scale_tables import markdown
from docs import draw
from streamctl import cli, config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    *(
        f"docs/{name}.md"
        for name in ("results", "ablations", "speed", "scale", "config", "tutorial")
    ),
)
BRIEF = (
    "popularity", "transitions", "knn", "ranker", "sasrec_ce", "tiger", "stream_pt", "stream_sft",
    "stream_rl", "l0", "random_evidence",
)  # fmt: skip
MAIN = ("beauty", "scientific", "instruments")  # the sets of the main table, in this order
NONE = "No receipt is here yet: `streamctl reproduce` and `benchmarks/thinker.py` make them."


def interval(found: Mapping[str, float] | list[float] | None) -> str:
    """Bounds of a difference, from either kind of receipt."""
    if not found:
        return ""
    low, high = (found["low"], found["high"]) if isinstance(found, Mapping) else found
    return f"{low:+.4f} to {high:+.4f}"


def best(receipt: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of STREAM-Rec with the best masked ndcg@10 of all users."""
    rows = [row for row in draw.main_rows(receipt) if row["method"].startswith("stream")]
    return max(rows, key=lambda row: row["ndcg@10_masked"])


def results(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a method, a column a set: masked ndcg@10, and what STREAM-Rec has more."""
    if not found:
        return NONE
    tables = {name: {row["method"]: row for row in draw.main_rows(one)}
              for name, one in found.items()}  # fmt: skip
    rows = []
    for method in BRIEF:
        cells = []
        for name, table in tables.items():
            cell = f"{table[method]['ndcg@10_masked']:.4f}" if method in table else ""
            less = interval(best(found[name]).get(f"vs_{method}"))
            cells.append(f"{cell} ({less})" if cell and less else cell)
        if any(cells):
            title = draw.TITLES[method]
            if title.lower() != method and method not in ("l0", "random_evidence"):  # controls
                title += f" (`{method}`)"
            rows.append([title, *cells])
    head = [f"{name}, {one['users']:,} users" for name, one in found.items()]
    picture = "![Masked ndcg@10 of every method](docs/img/results.svg)"
    return f"{markdown(['', *head], rows)}\n\n{picture}"


# What thinking brings: words, the row (None: STREAM-Rec's best), what it is compared with.
QUESTIONS = (
    ("over no thought (l = 0)", None, "vs_l0"), ("over counts of what followed", None,
    "vs_transitions"), ("over kNN", None, "vs_knn"), ("over TIGER", None, "vs_tiger"),
    ("over SASRec (CE)", None, "vs_sasrec_ce"), ("over the ranker", None, "vs_ranker"),
    ("over the paper's letter (letter_stream_rl)", None, "vs_letter_stream_rl"),
    ("both re-ranked: over TIGER", None, "rerank_vs_tiger+rerank"),
    ("both re-ranked: over SASRec (CE)", None, "rerank_vs_sasrec_ce+rerank"),
    ("both re-ranked: over the ranker", None, "rerank_vs_ranker+rerank"),
    ("one re-ranker behind it, SASRec (CE) and BERT4Rec: over it alone",
    "stream_rl+sasrec_ce+bert4rec", "rerank_vs_stream_rl"),
    ("the same, over it re-ranked", "stream_rl+sasrec_ce+bert4rec", "rerank_vs_stream_rl+rerank"),
    ("SFT over pretraining", "stream_sft", "vs_stream_pt"),
    ("RL over SFT", "stream_rl", "vs_stream_sft"),
    ("the letter's thoughts over none", "letter_stream_sft", "vs_letter_no_thinking"),
)  # fmt: skip


def thinking(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a question, a column a set: the 95% interval of the difference."""
    lines = []
    for words, method, key in QUESTIONS:
        cells = []
        for receipt in tables.values():
            rows = {row["method"]: row for row in receipt["rows"]}
            row = best(receipt) if method is None else rows.get(method, {})
            if method is None and key not in row:  # RL is re-ranked, and SFT not everywhere
                row = rows.get("stream_rl", {})
            cells.append(interval(row.get(key)))
        if any(cells):
            lines.append([words, *cells])
    return markdown(["", *tables], lines)


def trained_with(names: Sequence[str]) -> str:
    """A line a setting that differs between sets, a column a set: what seed 0 was trained with."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in names:
        for kind, prefix in (("seed", ""), ("letter", "letter: ")):
            path = RESULTS / name / f"{kind}-0.json"
            stages = json.loads(path.read_text())["stages"] if path.exists() else {}
            for stage, made in stages.items():
                stage = stage.removeprefix("baselines/").partition("/")[0]  # rerank/NAME: rerank
                if stage == "eval" or (prefix and stage in ("tokenizer", "rerank")):
                    continue
                for key, value in made["config"].items():
                    found.setdefault((prefix + stage, key), {})[name] = value
    lines = [
        [
            f"{stage}.{key}",
            *(_shown(values[name]) if name in values else "" for name in names),
        ]
        for (stage, key), values in sorted(found.items())
        if key not in ("seed", "methods") and len({str(value) for value in values.values()}) > 1
    ]
    return markdown(["", *names], lines)


def changes(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line a changed thing, a column a set: masked ndcg@10 and what it differs by."""
    names: dict[tuple[str, int], list[str]] = {}
    for place, receipt in enumerate(found.values()):
        for row in receipt["rows"]:
            cells = names.setdefault((row["method"], row["l"]), [""] * len(found))
            cells[place] = f"{row['ndcg@10_masked']:.4f} ({interval(row['vs_whole'])})"
            if row["method"] in ("length", "whole"):
                cells[place] = f"{row['ndcg@10_masked']:.4f}, {row['ms_per_user']:.1f} ms"
    lines = [[f"l = {l}" if name == "length" else name.replace("_", " "), *cells]
             for (name, l), cells in names.items()]  # fmt: skip  # noqa: E741
    return markdown(["", *found], lines)


def table(receipt: Mapping[str, Any]) -> str:
    """Rows of `streamctl reproduce`: bare and re-ranked, and what STREAM-Rec has more."""
    top, rows = best(receipt), []
    for row in receipt["rows"]:
        published = row["published"]
        figures = (row["recall@10"], row["ndcg@10"], row["ndcg@10_masked"],
                   row["rerank_ndcg@10_masked"])  # fmt: skip
        cells = ["" if value is None else f"{value:.4f}" for value in figures]
        if 0 < row["rerank_seeds"] < row["seeds"]:
            cells[-1] += f" ({row['rerank_seeds']} of {row['seeds']} seeds)"
        rows.append(
            [
                row["method"], str(row["seeds"]),
                f"{published['ndcg@10']:.4f}" if published else "",
                *cells,
                interval(top.get(f"vs_{row['method']}")),
                f"{row['prefixes'] / 1e6:.2f}" if row["prefixes"] else "",
                f"{row['train_s'] / 60:.1f}", f"{row['ms_per_user']:.1f}",
            ]
        )  # fmt: skip
    head = ["", "seeds", "in print", "recall@10", "ndcg@10", "masked", "masked, re-ranked",
            f"{top['method']} less this", "million prefixes", "minutes", "ms"]  # fmt: skip
    return f"{receipt['users']:,} users of {receipt['data']}\n\n{markdown(head, rows)}"


def searched(receipt: Mapping[str, Any]) -> str:
    """What `search.py` tried of each method, and whether the choice is better than the table's."""
    rows = []
    for row in receipt["rows"]:
        tried = len(row["tried"])
        figures = (row["table_ndcg@10_masked"], row["ndcg@10_masked"])
        rows.append(
            [row["method"], str(tried), settings_said(row["table"]), settings_said(row["chosen"]),
             *(f"{figure:.4f}" for figure in figures), interval(row["gain"])]
        )  # fmt: skip
    head = ["", "trained", "settings", "chosen instead", "ndcg@10", "chosen's", "gain"]
    return markdown(head, rows)


def settings_said(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items()) or "-"


def commands() -> str:
    """Every command by group."""
    rows = []
    for group, names in cli.GROUPS.items():
        words = "streamctl data" if group == cli.DATA else "streamctl"
        rows.append([group.lower(), ", ".join(f"`{words} {name}`" for name in names)])
    return markdown(["", "commands"], rows)


def speed(receipt: dict[str, Any]) -> str:
    """Rows of a speed benchmark."""
    rows = []
    for row in receipt["rows"]:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        peer = "-" if row["peer"] is None else f"{row['peer']:.4g} ({row['peer_name']})"
        rows.append([row["case"], f"{row['ours']:.4g} {row['unit']}", peer, ratio])
    return markdown(["case", "ours", "best peer", "ratio"], rows)


def load(receipt: dict[str, Any]) -> str:
    """Rows of the server under load, with goals and what was missed."""
    rows = []
    for row in receipt["rows"]:
        found, goals = row["wrk"], row["goals"]
        measured = [f"{row['ours']:.1f} {row['unit']}"]
        if row["unit"] == "MB grown":
            measured[0] += f" in {row['minutes']:.0f} minutes"
        else:
            measured.append(f"p99 {found['p99_ms']:.0f} ms")
        measured.append(f"{row['errors']} errors in {found['ok'] + found['busy']:,} requests")
        alone = row.get("alone")
        wanted = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in goals.items())
        one = f"{alone['p50_ms']:.1f} ms p50, p99 {alone['p99_ms']:.0f} ms" if alone else "-"
        peer = "-" if row["peer"] is None else f"{row['peer']:.1f} ({row['ratio']:.1f}x)"
        reached = "yes" if row["reached"] else "no"
        rows.append([row["case"], ", ".join(measured), one, peer, wanted, reached])
    head = ["case", "measured", "one connection", "FastAPI + generate", "goal", "reached"]
    return markdown(head, rows)


def going_on(receipt: dict[str, Any]) -> str:
    """`update` beside training anew."""
    rows = []
    for way in ("updated", "anew"):
        found = receipt["accuracy"][way]
        figures = [f"{found[row]['ndcg@10_masked']:.4f}" for row in ("stream_sft", "l0")]
        rows.append([way, *figures, f"{receipt['seconds'][way] / 60:.0f}"])
    less = receipt["updated_less_anew_ndcg@10_masked"]["stream_sft"]
    old, new = receipt["logs"]["old"], receipt["logs"]["updated"]
    return (
        f"The set {receipt['run']}, from {old['interactions']:,} interactions to "
        f"{new['interactions']:,}, size {receipt['size']}; masked ndcg@10, "
        f"updated less anew {less['low']:+.4f} to {less['high']:+.4f}:\n\n"
        + markdown(["", "STREAM-Rec", "without a thought", "minutes"], rows)
    )


def comments(cls: type) -> dict[str, str]:
    """What the source says about each field: behind it, and in the lines right above it."""
    source = inspect.getsource(cls)
    said = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found, above = {}, 0
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            lines = range(node.lineno, node.end_lineno + 1)
            behind = " ".join(said[line] for line in lines if line in said)
            first = node.lineno
            while first - 1 > above and first - 1 in said:
                first -= 1
            before = " ".join(said[line] for line in range(first, node.lineno))
            found[node.target.id] = ". ".join(text for text in (behind, before) if text)
        above = node.end_lineno
    return found


def kinds(cls: type) -> dict[str, str]:
    """The annotations for people: a choice as its values, `int | None` as it is."""
    texts = {}
    for node in ast.parse(inspect.getsource(cls)).body[0].body:
        if isinstance(node, ast.AnnAssign):
            text = ast.unparse(node.annotation)
            text = text.replace("Size", "Literal['tiny', 'small', 'paper']")
            texts[node.target.id] = (
                text.replace("Literal[", "").replace("]", "").replace("'", "")
                if "Literal[" in text
                else "list of " + text.removeprefix("tuple[").partition(",")[0]
                if text.startswith("tuple[")
                else text
            ).replace(" | None", " or none")
            if "int" in texts[node.target.id] or "float" in texts[node.target.id]:
                texts[node.target.id] += ", {} to {}".format(*config.BOUNDS[node.target.id])
    return texts


def _shown(value: Any) -> str:
    """A default as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else str(value) or "empty"


def _section(cls: type) -> str:
    """The settings of a stage, a row a key."""
    said, kind = comments(cls), kinds(cls)
    rows = [
        f"| `{cls.section}.{name}` | {_shown(field.default)} | {kind[name]} | {said[name]} |"
        for name, field in cls.__dataclass_fields__.items()
        if name in kind and name != "section"
    ]
    about = inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ")
    return "\n".join([f"### {cls.section}", about, "", "| key | default | takes | |",
                      "| --- | --- | --- | --- |", *rows])  # fmt: skip


def settings() -> str:
    """The settings of every stage, read from streamctl/config.py."""
    return "\n\n".join(map(_section, config.STAGES))


BLOCKS = {"serve": load, "update": going_on, **scale_tables.BLOCKS}
SPEED = ("kernels", "decode", "train")  # those with a place of their own in docs/speed.md


def render() -> dict[str, str]:
    """Block name -> markdown, for every receipt that is there, for the settings and commands."""
    blocks, receipts, more = {}, {}, []
    for path in sorted(RESULTS.glob("*.json")):
        receipt = receipts[path.stem] = json.loads(path.read_text())
        if path.stem.startswith("thinker-"):
            continue
        if path.stem.startswith("search-"):
            blocks[path.stem] = searched(receipt)
            continue
        if receipt["name"] in BLOCKS:
            blocks[path.stem] = BLOCKS[receipt["name"]](receipt)
        elif path.stem.startswith("table-"):
            if path.stem.removeprefix("table-") not in draw.SETS:
                blocks[path.stem] = table(receipt)
        elif "rows" in receipt and "ratio" in receipt["rows"][0]:
            if path.stem in SPEED:
                blocks[path.stem] = speed(receipt)
            else:
                more.append(f"`{path.stem}.json`\n\n{speed(receipt)}")
    tables, thinkers = draw.receipts("table"), draw.receipts("thinker")
    sets = {name: tables[name] for name in MAIN if name in tables}
    return blocks | {
        "results": results(tables),
        "tables": "\n\n".join(f"**{name}**, {table(one)}" for name, one in sets.items()) or NONE,
        "thinking": thinking(sets) if sets else NONE,
        "changes": changes(thinkers) if thinkers else NONE,
        "more-speed": "\n\n".join(more) or "No other receipt is here yet.",
        "commands": commands(),
        "arithmetic": scale_tables.arithmetic(receipts),
        "settings": settings(),
        "trained-with": trained_with([*sets, *(name for name in tables if name not in sets)]),
    }


def main() -> None:
    blocks = render()
    pages = {ROOT / page: (ROOT / page).read_text() for page in PAGES}
    for name in blocks:
        if not any(f"<!-- {name} -->" in text for text in pages.values()):
            raise SystemExit(
                f"no page has a place for {name}: add <!-- {name} --> <!-- /{name} -->"
            )
    for path, text in pages.items():
        for name, block in blocks.items():
            begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
            if begin in text:
                head, rest = text.split(begin)
                text = f"{head}{begin}\n{block}\n{end}{rest.split(end)[1]}"
        path.write_text(text, encoding="utf-8")
    for name, picture in draw.pictures().items():
        (draw.IMAGES / name).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
