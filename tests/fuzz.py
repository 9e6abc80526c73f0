"""Broken and odd data: every input ends in success or in one line and exit code 1.

python tests/fuzz.py [--save] [--inputs 20000] [--seed 0]      the long campaign

Two sources of inputs: a corpus of broken files (broken_files.py), and logs that Hypothesis
generates in every format with odd ids and times, damage to the bytes, and truncated compression
(odd_logs.py). Each goes through the reader, the filters and the numbering with one of ten
settings; one in ten through the whole `data prepare`, `data doctor` or `data export` as the command
line runs it (in this process, for speed), and a sample through a process of its own. Counted are
tracebacks (any other exception, or more than one line), hangs (more than 60 s of the processor) and
stages left half-written; the exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from broken_files import CORPUS, put
from hypothesis import HealthCheck, Phase, given, seed, settings
from odd_logs import sources

from streamctl import cli
from streamctl.config import DataConfig
from streamctl.data.prepare import build, reading_of
from streamctl.data.sinks import SINKS
from streamctl.data.sources import read_source
from streamctl.errors import StreamctlError
from streamctl.provenance import provenance

RESULT = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "fuzz.json"
HANG_S = 60  # of the processor; ten times as long by the clock


class Campaign:
    """Runs inputs and counts how they end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.ends: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    def run(self, what: str, files: dict[str, bytes] | None, way: str) -> str:
        """One input: `files`, or the corpus entry `what`; `way` is a key of WAYS."""
        source, run = self.folder / "source", self.folder / "run"
        for path in (source, run, self.folder / "out"):
            shutil.rmtree(path, ignore_errors=True)
        source.mkdir()
        if files is None:
            CORPUS[what](source)
        else:
            for name, content in files.items():
                put(source, name, content)
        end, detail = _ends(lambda: WAYS[way](source, run))
        if (run / "data").exists() and not (run / "data" / "manifest.json").exists():
            end, detail = "half-written stage", f"{end}: {detail}"
        self.ends[end] += 1
        if end not in ("success", "one line"):
            self.failures.append({"input": what, "way": way, "end": end, "detail": detail})
        return f"{end}: {detail}"


# How an input is read, cleaned and split; its size chooses.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"skip_bad": 1.0},
    {"skip_bad": 1.0, "ids": "number", "repeats": "drop"},
    {"split": "60%,80%"},
    {"split": "1012,1020", "min_user": 1},
    {"split": "leave-one-out", "repeats": "last", "max_per_user": 4},
    {"since": "1003", "until": "9999-12-31"},
    {"until": "2020-01-01", "ties": "shuffle", "skip_bad": 0.5},
    {"min_rating": 5.0, "min_item": 0},
    {"described": True, "repeats": "first"},
)


def _inside(source: Path, run: Path) -> None:
    size = sum(file.stat().st_size for file in source.iterdir())
    settings = {"min_user": 3, "min_item": 1, **SETTINGS[size % len(SETTINGS)]}
    config = DataConfig(**settings)
    build(read_source(source, reading=reading_of(config)), config)


def _command(*words: str) -> None:
    """The command line in this process; a failure is raised as SystemExit with its code."""
    old, sys.argv = sys.argv, ["streamctl", *words]
    try:
        cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
    finally:
        sys.argv = old


def _prepare(source: Path, run: Path) -> None:
    _command("data", "prepare", str(source), "--run", str(run), "--min-user", "3", "--json")


def _doctor(source: Path, run: Path) -> None:
    _command("data", "doctor", str(source), "--json")


def _export(source: Path, run: Path) -> None:
    _prepare(source, run)
    formats = list(SINKS)
    first = sum(file.stat().st_size for file in source.iterdir())  # another input, other formats
    for number in range(first, first + 3):
        kind = formats[number % len(formats)]
        out = run.parent / "out" / kind
        _command("data", "export", str(out), "--run", str(run), "--format", kind)


def _process(source: Path, run: Path) -> None:
    command = [sys.executable, "-m", "streamctl", "data", "prepare", str(source), "--run", str(run)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("warning: ")]
    if answer.returncode not in (0, 1) or "Traceback" in answer.stderr:
        raise RuntimeError(f"exit code {answer.returncode}: {answer.stderr[-300:]}")
    if answer.returncode:
        raise StreamctlError("\n".join(lines))


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "reader": _inside,
    "prepare": _prepare,
    "doctor": _doctor,
    "export": _export,
    "process": _process,
}


class _Hang(BaseException):
    pass


def _ends(call: Callable[[], None]) -> tuple[str, str]:
    """(how a call ends, a detail): "success", "one line", "traceback" or "hang"."""

    def ring(*_: object) -> None:
        raise _Hang

    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    timers = {signal.ITIMER_PROF: HANG_S, signal.ITIMER_REAL: 10 * HANG_S}
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, ring)
    for timer, seconds in timers.items():
        signal.setitimer(timer, seconds)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            call()
        return "success", ""
    except SystemExit as stop:
        errors.flush()
        text = errors.buffer.getvalue().decode().strip()
        if stop.code in (0, None):
            return "success", ""
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        if stop.code == 1 and len(said) == 1 and text.splitlines()[-1] == said[0]:
            return "one line", said[0][:300]
        return "traceback", f"exit code {stop.code}: {text[-300:]}"
    except (StreamctlError, OSError) as error:
        lines = str(error).splitlines()
        return ("one line" if len(lines) == 1 else "traceback"), str(error)[:300]
    except _Hang:
        return "hang", f"more than {HANG_S} s"
    except Exception:
        return "traceback", traceback.format_exc()[-800:]
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)


def generated(campaign: Campaign, inputs: int, number: int) -> None:
    """Inputs that Hypothesis generates from the seed `number`; failures are counted, not shrunk."""

    @seed(number)
    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(sources())
    def each(files: dict[str, bytes]) -> None:
        done = sum(campaign.ends.values())
        way = {5: "prepare", 10: "doctor", 15: "export"}.get(done % 30, "reader")
        campaign.run(repr(files)[:2000], files, way)

    each()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/fuzz.json")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder))
        for number, name in enumerate(CORPUS):
            for way in ("prepare", "doctor", "process")[: 2 + (number % 6 == 0)]:
                campaign.run(name, None, way)
        entries = sum(campaign.ends.values())
        generated(campaign, options.inputs, options.seed)
    receipt = {
        "name": "fuzz",
        "command": f"python tests/fuzz.py --save --inputs {options.inputs}",
        "inputs": sum(campaign.ends.values()),
        "tracebacks": campaign.ends["traceback"],
        "hangs": campaign.ends["hang"],
        "half_written": campaign.ends["half-written stage"],
        "succeeded": campaign.ends["success"],
        "one_line": campaign.ends["one line"],
        "corpus_inputs": entries,
        "failures": campaign.failures[:50],
        "seed": options.seed,
        "seconds": round(time.monotonic() - started, 1),
        **{key: value for key, value in provenance().items() if key != "peak_memory_mb"},
    }
    text = json.dumps(receipt, indent=1)
    print(text)
    if options.save:
        RESULT.write_text(text + "\n")
    sys.exit(bool(campaign.failures))


if __name__ == "__main__":
    main()
