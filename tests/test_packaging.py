"""The wheel, the direction of imports, and the name `kernels`."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def source_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_kernels_import_nothing_of_streamctl():
    for path in source_files("kernels"):
        upward = [name for name in imports_of(path) if name.split(".")[0] == "streamctl"]
        assert not upward, f"{path} imports {upward}"


def test_nothing_imports_kernels_by_its_folder_name():
    for folder in ("streamctl", "tests", "benchmarks", "kernels"):
        for path in source_files(folder):
            names = {name.split(".")[0] for name in imports_of(path)}
            assert "kernels" not in names, f"{path}: write streamctl.kernels"


def test_every_folder_is_packaged():
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {
        "streamctl" + str(path.parent.relative_to(ROOT)).removeprefix("streamctl").replace("/", ".")
        if path.is_relative_to(ROOT / "streamctl")
        else "streamctl." + str(path.parent.relative_to(ROOT)).replace("/", ".")
        for folder in ("streamctl", "kernels")
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == folders


# Modules whose distribution has another name.
DISTRIBUTIONS = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "llvmlite": "numba"}


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names_of(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", text)[0] for text in requirements)
    return {name.lower().replace("_", "-") for name in names}


def test_everything_imported_is_declared_and_everything_declared_is_imported():
    extras = project()["optional-dependencies"]
    own = [*extras["serve"], *extras["ray"], *extras["cpu"], *extras["gpu"]]
    declared = names_of([*project()["dependencies"], *own]) - {"streamctl"}
    imported = {
        name.split(".")[0]
        for folder in ("streamctl", "kernels")
        for path in source_files(folder)
        for name in imports_of(path)
    } - {*sys.stdlib_module_names, "streamctl", "__future__"}
    used = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imported}
    by_name = {"httptools", "uvloop"}  # uvicorn imports them where they are
    assert used <= declared, f"imported and not declared: {used - declared}"
    assert declared - by_name <= used, f"declared and not imported: {declared - by_name - used}"


def test_the_constraints_pin_what_is_declared_but_what_torch_pins_itself():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = names_of([line for line in lines if not line.startswith("#")])
    extras = project()["optional-dependencies"]
    ours = [*project()["dependencies"], *extras["serve"], *extras["ray"], *extras["cpu"]]
    wanted = names_of(ours) - {"streamctl"}
    assert wanted <= pinned, f"without a pin: {wanted - pinned}"
    assert not {name for name in pinned if name == "triton" or name.startswith("nvidia")}


def test_the_metadata_names_the_pythons_and_systems_that_it_is_for():
    told = project()["classifiers"]
    for python in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {python}" in told
    assert {"Operating System :: POSIX :: Linux", "Operating System :: MacOS"} <= {*told}
    assert project()["requires-python"] == ">=3.11"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools writes beside what it packs, and tests run side by side.
    source = folder / "source"
    for name in ("streamctl", "kernels"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
    command.append(source)
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_wheel_has_one_top_level_name_and_every_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"streamctl"}
    assert "streamctl/kernels/__init__.py" in names
    page = [p for p in (ROOT / "streamctl/serving/page").glob("*") if p.is_file()]
    for path in page:
        assert f"streamctl/serving/page/{path.name}" in names


def test_wheel_runs_from_another_directory(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['streamctl', '--version'];"
        "import streamctl, streamctl.kernels; from streamctl.cli import main;"
        f"assert streamctl.__file__.startswith({str(site)!r}); main()"
    )
    answer = subprocess.run(
        [sys.executable, "-S", "-c", _with_dependencies(program)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("streamctl ")


def _with_dependencies(program: str) -> str:
    """`-S` hides the editable install; the dependencies' folder is added by hand."""
    import typer

    return f"import sys; sys.path.append({str(Path(typer.__file__).parent.parent)!r}); " + program


def test_transformers_t5_imports_at_the_root():
    program = "from transformers import T5ForConditionalGeneration"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
