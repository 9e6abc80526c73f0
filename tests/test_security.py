"""Nothing that is loaded can run code: no pickle, no eval, no shell."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from streamctl.errors import StreamctlError
from streamctl.runs import RunDir
from streamctl.stage import SCHEMA, _seal

SOURCES = sorted(
    path
    for folder in ("streamctl", "kernels", "benchmarks", ".ci")
    for path in (ROOT / folder).rglob("*.py")
)
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
UNSAFE_CALLS = {
    "eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "torch.save",
    "pd.read_pickle", "pandas.read_pickle",
    "tarfile.open", "shutil.unpack_archive", "torch.hub.load", "torch.jit.load",
}  # fmt: skip


def unsafe(source: str) -> list[str]:
    """What in a source file could run code that comes with data: "line: what"."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"{node.lineno}: imports {n}" for n in names if n.split(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {word.arg: word.value for word in node.keywords if word.arg}
        given = {name: getattr(value, "value", ...) for name, value in options.items()}
        if called in UNSAFE_CALLS or called.endswith(".extractall"):
            found.append(f"{node.lineno}: calls {called}")
        if called == "torch.load" and given.get("weights_only") is not True:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if given.get("allow_pickle", False) is not False:
            found.append(f"{node.lineno}: {called} with allow_pickle")
        if given.get("trust_remote_code", False) is not False:
            found.append(f"{node.lineno}: {called} with trust_remote_code")
        if given.get("shell", False) is not False:
            found.append(f"{node.lineno}: {called} with shell")
        if called.startswith("AutoModel") and given.get("use_safetensors") is not True:
            found.append(f"{node.lineno}: {called} may read a pickled checkpoint")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=flag)",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "eval('1')",
        "archive.extractall('.')",
        "subprocess.run('ls', shell=True)",
        "AutoModel.from_pretrained('x')",
        "AutoTokenizer.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_walk_finds_what_could_run_code(source):
    assert unsafe(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load('x', weights_only=True)",
        "np.load('x', allow_pickle=False)",
        "policy.eval()",
        "ast.literal_eval('1')",
        "AutoModel.from_pretrained('x', use_safetensors=True)",
    ],
)
def test_the_walk_lets_the_safe_forms_pass(source):
    assert not unsafe(source)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_file_could_run_code_that_comes_with_data(path):
    assert unsafe(path.read_text()) == []


def test_an_array_that_holds_pickled_objects_is_refused(tmp_path):
    run = RunDir(tmp_path)
    stage = tmp_path / "tokenizer"
    stage.mkdir()
    np.save(stage / "x.npy", np.array([{"a": 1}], dtype=object))
    names = {"x.npy": ""}
    manifest = {"schema": SCHEMA, "hash": "", "artifacts": names, "parents": {}, "config": {}}
    (stage / "manifest.json").write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    with pytest.raises((ValueError, StreamctlError), match="allow_pickle"):
        run.stage("tokenizer").array("x.npy")


def audit():
    specification = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_dependency_audit_fails_on_a_finding_and_never_calls_silence_clean():
    judge = audit().judge
    flaw = {"id": "PYSEC-1", "fix_versions": ["2.1"]}
    clean = {"name": "a", "version": "1", "vulns": []}
    skipped = {"name": "b", "skip_reason": "not found"}
    code, lines = judge({"dependencies": [clean, {"name": "c", "version": "2", "vulns": [flaw]}]})
    assert code == 1
    assert "c 2: PYSEC-1, mended in 2.1" in lines
    assert judge({"dependencies": [clean, skipped]}) == (
        0,
        ["dependency audit: 1 packages without findings, 1 unknown to the service"],
    )
    code, lines = judge({"dependencies": [skipped, skipped]})
    assert code == 0
    assert "NOT DONE" in lines[0]


def test_every_pin_is_exact_and_named_once():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in lines]
    assert all("==" in line for line in lines)
    assert len(names) == len(set(names))


def test_security_md_names_what_it_promises():
    text = (ROOT / "SECURITY.md").read_text()
    for path in ("tests/test_security.py", ".ci/audit.py", "constraints.txt"):
        assert path in text
        assert Path(ROOT / path).exists()
