"""The options and the receipt that every benchmark has."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from streamctl.provenance import provenance

RESULTS = Path(__file__).parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """With --json and --save; the first line of the description is shown."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--json", action="store_true", help="print the receipt")
    made.add_argument("--save", action="store_true", help="write it to benchmarks/results/")
    return made


def head(name: str, device: str = "cpu") -> dict[str, Any]:
    """What a receipt begins with: where it was measured, by which versions, under what load."""
    cuda = device.startswith("cuda")
    return {
        "name": name,
        **{key: value for key, value in provenance().items() if key != "peak_memory_mb"},
        "device": torch.cuda.get_device_name() if cuda else device,
        "threads": torch.get_num_threads(),
        "load": list(os.getloadavg()),
        "seed": 0,
    }


def finish(receipt: dict[str, Any], options: argparse.Namespace) -> None:
    """Write results/NAME.json and print the receipt, as the options say."""
    text = json.dumps(receipt, indent=1)
    if options.save:
        (RESULTS / f"{receipt['name']}.json").write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
