"""The settings of every stage as tables for docs/config.md, read from streamctl/config.py."""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from typing import Any

from streamctl import config


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


def shown(value: Any) -> str:
    """A default as `--set` takes it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "empty"
    return "none" if value is None else str(value) or "empty"


def table(cls: type) -> str:
    """A row a key."""
    said, kind = comments(cls), kinds(cls)
    rows = [
        f"| `{cls.section}.{name}` | {shown(field.default)} | {kind[name]} | {said[name]} |"
        for name, field in cls.__dataclass_fields__.items()
        if name in kind and name != "section"
    ]
    about = inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ")
    return "\n".join([f"### {cls.section}", about, "", "| key | default | takes | |",
                      "| --- | --- | --- | --- |", *rows])  # fmt: skip


def tables() -> str:
    """All stages, in their order."""
    return "\n\n".join(table(stage) for stage in config.STAGES)


if __name__ == "__main__":
    print(tables())
