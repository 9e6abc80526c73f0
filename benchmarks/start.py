"""How long a user waits for the first answer, and for the next ones.

    python benchmarks/start.py --json [--save]

A small shop is trained (or taken from --run), then, each in a cache folder of its own that is
empty at first, as after a fresh install: `streamctl recommend` is called twice, and `streamctl
serve` until it says that it is ready. `recommend/read-only` has no home and nothing but a temporary
folder to write. `ours` is wall seconds, `cpu_s` what the process itself computed: the two differ
where others use the machine.
"""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))
import receipts
from forks import SETTINGS

from streamctl.data import load_data
from streamctl.provenance import provenance
from streamctl.runs import RunDir

LONGEST_S = 120.0
GOALS = {"recommend/first": 5.0, "recommend/second": 3.0, "recommend/read-only": 5.0}
GOALS |= {"serve/first": 10.0}


def environment(cache: Path, **more: str) -> dict[str, str]:
    """That of a user who has never called streamctl: nothing is cached, nothing is told."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STREAMCTL_")}
    kept.pop("NUMBA_CACHE_DIR", None)
    return kept | {"XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"} | more


def shop(folder: Path) -> Path:
    """A small run that is pretrained."""
    (folder / "settings.toml").write_text(SETTINGS, encoding="utf-8")
    run, options = folder / "run", ["--config", str(folder / "settings.toml")]
    for words in (
        ["data", "synth", "--users", "200", "--items", "200"],
        ["tokenize", *options],
        ["pretrain", *options],
    ):
        command = [sys.executable, "-m", "streamctl", *words, "--run", str(run)]
        subprocess.run(command, check=True, capture_output=True)
    return run


def row(case: str, began: float, before: float) -> dict[str, object]:
    base = {"case": case, "ours": round(time.monotonic() - began, 2), "unit": "s"}
    base |= {"goal": GOALS[case], "cpu_s": round(processor_s() - before, 2)}
    return base | {"peer": None, "ratio": None}


def processor_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def recommend(case: str, run: Path, items: list[str], told: dict[str, str]) -> dict[str, object]:
    command = [sys.executable, "-m", "streamctl", "recommend", "--run", str(run)]
    began, before = time.monotonic(), processor_s()
    answer = subprocess.run(
        [*command, "--history", ",".join(items)], env=told, capture_output=True, text=True
    )
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return row(case, began, before)


def serve(run: Path, told: dict[str, str]) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamctl", "serve", "--run", str(run), "--port", str(port)]
    began, before = time.monotonic(), processor_s()
    with subprocess.Popen(
        command, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5):
                        break
                except (urllib.error.URLError, OSError) as error:
                    late = time.monotonic() - began > LONGEST_S
                    if late or server.poll() is not None:
                        server.kill()
                        said = server.stdout.read()
                        raise SystemExit(f"serve is not ready: {error}\n{said}") from error
                    time.sleep(0.05)
            ready = time.monotonic() - began
        finally:
            server.terminate()
            server.wait()
    return row("serve/first", began, before) | {"ours": round(ready, 2)}


def main() -> None:
    parser = receipts.parser(__doc__)
    parser.add_argument("--run", type=Path, help="a pretrained run [default: a small shop]")
    options = parser.parse_args()
    load, rows = os.getloadavg(), []
    with tempfile.TemporaryDirectory(prefix="streamctl-start-") as name:
        folder = Path(name)
        run = options.run or shop(folder)
        catalog, _ = load_data(RunDir(run))
        items = [str(item) for item in catalog.ids[:3]]
        told = environment(folder / "fresh")
        rows.append(recommend("recommend/first", run, items, told))
        rows.append(recommend("recommend/second", run, items, told))
        (folder / "tmp").mkdir()
        bare = environment(Path("/dev/null"), HOME="/dev/null", TMPDIR=str(folder / "tmp"))
        rows.append(recommend("recommend/read-only", run, items, bare))
        rows.append(serve(run, environment(folder / "served")))
    result = {"name": "start", "load": list(load), "rows": rows, **provenance()}
    receipts.finish(result, options)


if __name__ == "__main__":
    main()
