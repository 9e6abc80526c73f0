"""Results do not depend on threads, ranges or blocks; memory does not grow with the rows."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from streamctl.kernels import nearest_codeword, residual_quantize

pytest.importorskip("numba")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_bit(threads):
    x, codebooks = torch.randn(30_001, 12), torch.randn(3, 50, 12)
    results = []
    for count in (1, 2, 3):
        threads(count)
        codes, residual = residual_quantize(x, codebooks)
        index, distance = nearest_codeword(x, codebooks[0])
        results.append((codes, residual, index, distance))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_block_sizes_change_no_bit(monkeypatch):
    from streamctl.kernels import cpu_quantize

    x, codebooks = torch.randn(5_000, 12), torch.randn(3, 50, 12)
    expected = residual_quantize(x, codebooks)
    monkeypatch.setattr(cpu_quantize, "_RANGE", 777)
    monkeypatch.setattr(cpu_quantize, "block_rows", lambda width: cpu_quantize.simd.ROWS)
    for a, b in zip(residual_quantize(x, codebooks), expected, strict=True):
        assert torch.equal(a, b)


def test_float32_and_bf16_scans_agree(monkeypatch):
    from streamctl.kernels import cpu_quantize

    x, codebooks = torch.randn(5_000, 33), torch.randn(2, 130, 33)
    expected = residual_quantize(x, codebooks)
    monkeypatch.setattr(cpu_quantize, "BF16", False)
    for a, b in zip(residual_quantize(x, codebooks), expected, strict=True):
        assert torch.equal(a, b)


def test_many_threads_may_call_at_once():
    x, codebooks = torch.randn(20_000, 8), torch.randn(2, 30, 8)
    expected = residual_quantize(x, codebooks)[0]
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(residual_quantize, x, codebooks) for _ in range(16)]:
            assert torch.equal(future.result()[0], expected)


def test_a_forked_child_can_call():
    code = (
        "import os, torch\n"
        "from streamctl.kernels import residual_quantize as q\n"
        "torch.set_num_threads(2)\n"
        "x, c = torch.randn(40_000, 8), torch.randn(2, 30, 8)\n"
        "q(x, c)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    q(x, c)\n"
        "    os._exit(0)\n"
        "raise SystemExit(os.waitpid(pid, 0)[1])"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=500).returncode == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's high-water mark")
def test_extra_memory_does_not_grow_with_the_rows():
    code = (
        "import pathlib, torch\n"
        "from streamctl.kernels import residual_quantize as q\n"
        "c = torch.randn(4, 256, 32)\n"
        "q(torch.randn(20_000, 32), c)\n"
        "x = torch.zeros(2_000_000, 32)\n"
        "x += 1\n"
        "status = pathlib.Path('/proc/self/status')\n"
        "peak = lambda: 1024 * int(status.read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "codes, residual = q(x, c)\n"
        "print(peak() - before - codes.nbytes - residual.nbytes)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=500, env=os.environ
    )
    assert int(run.stdout) < 64e6, run.stderr
