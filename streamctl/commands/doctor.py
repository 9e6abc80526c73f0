"""`streamctl doctor`: what this installation has and can do, for a bug report."""

from __future__ import annotations

import importlib.util
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

from streamctl.commands.options import Json, print_json, print_next, print_table, switch

PACKAGES = (
    "streamctl", "torch", "transformers", "numpy", "numba", "pyarrow", "duckdb", "safetensors",
    "scikit-learn", "sentence-transformers", "lightgbm", "accelerate", "fastapi", "uvicorn",
    "triton",
)  # fmt: skip
FLAGS = ("avx2", "avx512f", "avx512bf16", "amx-bf16", "neon", "bf16", "sve")  # LLVM's names


def command(
    offline: bool = switch("Do not ask the hub for the text encoder.", "--offline"),
    strict: bool = switch("Exit with 1 when something is missing.", "--strict"),
    json_: Json = False,
) -> None:
    """Say what is installed and what works here: paste it into a bug report.

    Versions, processor, GPU, FAISS, the default text encoder, and where files can be written.

    Reads: the installation. Writes: nothing that stays.
    Example: `streamctl doctor --offline`.
    Next: `streamctl demo`.
    """
    from streamctl.errors import StreamctlError

    found = examine(offline=offline)
    if json_:
        print_json(found)
    else:
        rows = [[row["what"], row["found"], row["problem"] or "ok"] for row in found["checks"]]
        print_table("streamctl doctor", ["", "found", ""], rows)
    problems = [row for row in found["checks"] if row["problem"]]
    if strict and problems:
        raise StreamctlError(
            "; ".join(f"{row['what']}: {row['problem']}" for row in problems),
            run="what is named there, then `streamctl doctor` again",
        )
    if not json_ and not problems:
        print_next(command)


def examine(*, offline: bool = False) -> dict[str, list[dict[str, str]]]:
    """Everything that is looked at: `checks`, with `what`, `found` and `problem` ("": none)."""
    checks = [_row("python", f"{platform.python_version()} on {platform.platform()}")]
    checks += [_version(name) for name in PACKAGES]
    checks += [_processor(), _gpu(), _faiss(), _encoder(offline), _cache()]
    checks += [
        _place("working folder", Path.cwd()),
        _place("temporary folder", Path(tempfile.gettempdir())),
    ]
    return {"checks": checks}


def _row(what: str, found: str, problem: str = "") -> dict[str, str]:
    return {"what": what, "found": found, "problem": problem}


def _version(name: str) -> dict[str, str]:
    try:
        return _row(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        if name == "triton":  # kernels of a GPU need it, nothing else does
            return _row(name, "not installed")
        return _row(name, "not installed", "pip install 'streamctl[cpu]'")


def _processor() -> dict[str, str]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    has = ", ".join(flag for flag in FLAGS if features.get(flag)) or "no vector features"
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()} ({binding.get_host_cpu_name()}), {cores} cores, {has}"
    return _row("processor", f"{machine}; OMP_NUM_THREADS {threads}")


def _gpu() -> dict[str, str]:
    if not importlib.util.find_spec("torch"):
        return _row("GPU", "torch is not installed", "pip install 'streamctl[cpu]'")
    import torch

    if not torch.cuda.is_available():
        return _row("GPU", "none found; the CPU is used")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return _row("GPU", f"{', '.join(names)} (CUDA {torch.version.cuda})")


def _faiss() -> dict[str, str]:
    try:
        import faiss
    except ImportError:
        return _row("faiss", "not installed", "pip install faiss-cpu")
    return _row("faiss", f"{faiss.__version__}, {faiss.get_num_gpus()} GPUs")


def _encoder(offline: bool) -> dict[str, str]:
    """Whether the default text encoder is here, or can be had; nothing is downloaded."""
    from streamctl.config import TokenizeConfig
    from streamctl.tokenizer.encoders import PACKAGED, PROBE_S

    name = TokenizeConfig.encoder
    if importlib.util.find_spec(PACKAGED.get(name, "") or "none_such"):
        return _row("text encoder", f"{name}, from an installed package")
    try:
        from huggingface_hub import HfApi, snapshot_download

        snapshot_download(name, allow_patterns="*.safetensors", local_files_only=True)
        return _row("text encoder", f"{name}, in the hub's cache")
    except Exception:
        pass
    if offline:
        return _row("text encoder", f"{name} is not here", "--encoder tfidf needs none")
    try:
        HfApi().model_info(name, timeout=PROBE_S)
    except Exception as error:  # of the hub's client and of the library that it asks through
        why = str(error).strip().partition("\n")[0][:80]
        return _row("text encoder", f"{name}: {why}", "--encoder tfidf needs none")
    return _row("text encoder", f"{name}, on the hub; the first `tokenize` downloads it")


def _cache() -> dict[str, str]:
    from streamctl import cache

    if (place := cache.folder()) is None:
        return _row("cache", "nowhere", "set STREAMCTL_CACHE to a folder that you can write")
    return _row("cache", str(place))


def _place(what: str, folder: Path) -> dict[str, str]:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return _row(what, str(folder))
    except OSError as error:
        return _row(what, str(folder), error.strerror or "cannot be written")
