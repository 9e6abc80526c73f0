"""Where a result comes from: git revision, versions, machine, memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Those that decide results, and the peers that benchmarks time.
_PACKAGES = (
    "torch", "transformers", "numpy", "numba", "triton", "faiss-cpu", "scikit-learn", "pyarrow",
    "duckdb", "lightgbm", "rectools", "rectokens", "vector-quantize-pytorch",
)  # fmt: skip


def _git_revision() -> str | None:
    source = Path(__file__).resolve()
    git = ["git", "-C", str(source.parent)]
    options = {"capture_output": True, "text": True, "timeout": 5, "check": True}
    try:
        # An installed copy may lie inside a repository that is somebody else's.
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], **options)
        answer = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12"], **options)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in ("streamctl", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The CPU's model, where the system tells it."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text(encoding="utf-8", errors="replace").splitlines() if cpus.exists() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def provenance() -> dict[str, Any]:
    """Where a result came from: git revision, versions, machine, peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {
        "git": _git_revision(),
        "versions": versions(),
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20,
    }
