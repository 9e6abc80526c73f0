"""Everything that needs a GPU, in one call on a machine that has one.

    python benchmarks/gpu.py [--output FOLDER] [--run runs/beauty] [--minutes 7] [--size paper]
    python benchmarks/gpu.py --interpret     what Triton's interpreter can check without a GPU

In this order, each part written to FOLDER/gpu.json as soon as it ends: every Triton kernel against
the reference; the speed of kernels, decoding and training; then as many jobs of `streamctl
reproduce` as begin within the minutes left, on a copy of --run, which needs data and tokenizer only
(`data prepare` and `tokenize` run anywhere, and need text encoder and FAISS). Nothing begins once
the minutes are over. The table, its receipts and the jobs' checkpoints lie in FOLDER/NAME; the same
command continues with them.
FOLDER is $OUT, else gpu-results. Exit code 1: no GPU, or a part failed (the others still ran).
"""

import argparse
import importlib
import json
import os
import shutil
import time
import traceback
from pathlib import Path

# The order in which jobs begin: the comparison the table is for, then the rest.
METHODS = (
    "popularity", "transitions", "knn", "tiger", "sasrec_ce", "stream", "sasrec_bce", "gru4rec",
    "bert4rec", "caser",
)  # fmt: skip
INTERPRETED_ROWS = 7  # the interpreter takes milliseconds a row


def sweep(device):
    """Every op, case and dtype on Triton beside the reference; raises with all that differ."""
    from cases import DTYPES, OPS, Rows, assert_equal, to_device

    agree, differ = 0, {}
    for name_of_op, op in OPS.items():
        for dtype in DTYPES.values():
            for name, made in op.cases(dtype).items():
                case = to_device(made, device)
                if device == "cpu" and isinstance(case, Rows):
                    case = case._replace(x=case.x[:INTERPRETED_ROWS])
                try:
                    expected = op.call(case, "reference")
                    assert_equal(op.call(case, "triton"), expected, op.tolerance)
                    agree += 1
                except (
                    Exception
                ) as error:  # a kernel that does not compile must not hide the others
                    where = f"{name_of_op}/{name}/{dtype}"
                    differ[where] = f"{type(error).__name__}: {error}"[:2000]
    if differ:
        raise RuntimeError(f"{len(differ)} cases differ, {agree} agree: {json.dumps(differ)}")
    return {"cases_that_agree": agree}


def speed(name):
    """`rows` of a sibling benchmark on the GPU."""
    return lambda: importlib.import_module(name).rows(device="cuda")


def table(source, output, size, until, device="cuda"):
    """Jobs of `reproduce` that begin before `until` (monotonic seconds), on a copy of the run.

    Without re-ranker and `ranker`: they need LightGBM, and no GPU.
    """
    from streamctl.evaluation.reproduce import Plan, reproduce
    from streamctl.runs import RunDir

    copy = output / source.name
    for stage in ("data", "tokenizer"):
        if not (copy / stage).exists():
            shutil.copytree(source / stage, copy / stage)
    result = None
    # One method at a time, so that the table on disk is never older than its last job.
    for count in range(1, len(METHODS) + 1):
        left = until - time.monotonic()
        if left <= 0:
            break
        plan = Plan(METHODS[:count], size=size, budget=left / 3600, device=device, rerank=False)
        result = reproduce(RunDir(copy), plan)
    return result or "no time was left for a job"


def parts(options, output, until):
    """Name -> function of everything to run, in order."""
    if options.interpret:
        return {"triton equals the reference": lambda: sweep("cpu")}
    todo = {"triton equals the reference": lambda: sweep("cuda")}
    for name in ("kernels", "decode", "train"):
        if (Path(__file__).parent / f"{name}.py").exists():
            todo[name] = speed(name)
    if options.run:
        todo["table"] = lambda: table(options.run, output, options.size, until)
    return todo


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--run", type=Path, help="a run with data and tokenizer, for the table")
    parser.add_argument("--size", default="paper", help="of the table's generative models")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing begins")
    parser.add_argument("--only", default="", help="the part to run, by the start of its name")
    parser.add_argument("--interpret", action="store_true", help="without a GPU, Triton alone")
    options = parser.parse_args()
    until = time.monotonic() + 60 * options.minutes
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if not options.interpret and not torch.cuda.is_available():
        raise SystemExit(
            "no CUDA device here: run this on a machine with one, or add --interpret to check"
            " the Triton kernels in Triton's interpreter"
        )
    from receipts import head

    options.output.mkdir(parents=True, exist_ok=True)
    report = head("gpu", "cpu" if options.interpret else "cuda") | {"parts": {}, "failed": {}}
    for name, run in parts(options, options.output, until).items():
        if not name.startswith(options.only):
            continue
        if time.monotonic() > until:
            report["failed"][name] = f"not begun: {options.minutes} minutes were over"
            continue
        start = time.monotonic()
        try:
            result = run()
            report["parts"][name] = {"seconds": time.monotonic() - start, "result": result}
            print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)
        except (Exception, SystemExit) as error:
            report["failed"][name] = traceback.format_exc()
            print(f"{name}: FAILED: {str(error)[:500]}", flush=True)
        (options.output / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
