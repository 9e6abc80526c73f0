"""Dependency audit: known vulnerabilities of the pinned packages, asked of PyPI's advisory service.

python .ci/audit.py constraints.txt

Ends with code 1 when a pinned package has a known vulnerability. Where the service cannot be
reached it says so and ends with 0: a machine without internet can still lint.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

TIMEOUT_S = 300


def judge(report: dict[str, Any]) -> tuple[int, list[str]]:
    """(exit code, lines to print) of a pip-audit report.

    A report in which no package could be looked up is not a clean one: the code is 0, but the
    lines say that nothing was audited.
    """
    packages = report["dependencies"]
    audited = [package for package in packages if "vulns" in package]
    found = [
        f"{package['name']} {package['version']}: {vulnerability['id']}, "
        f"mended in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        for package in audited
        for vulnerability in package["vulns"]
    ]
    if found:
        return 1, ["dependency audit: vulnerable packages", *found]
    if not audited:
        return 0, ["dependency audit: NOT DONE, the advisory service knows none of the packages"]
    skipped = len(packages) - len(audited)
    unknown = f", {skipped} unknown to the service" if skipped else ""
    return 0, [f"dependency audit: {len(audited)} packages without findings{unknown}"]


def main(requirements: str) -> int:
    command = [sys.executable, "-m", "pip_audit", "--requirement", requirements, "--no-deps"]
    command += ["--disable-pip", "--progress-spinner", "off", "--timeout", "10", "--format", "json"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        print(f"dependency audit: NOT DONE, the advisory service took over {TIMEOUT_S} s")
        return 0
    try:
        report = json.loads(answer.stdout)
    except json.JSONDecodeError:
        last = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
        if "ConnectionError" in answer.stderr or "Timeout" in answer.stderr or "HTTP" in last:
            print(f"dependency audit: NOT DONE, the advisory service cannot be reached ({last})")
            return 0
        print(f"dependency audit: pip-audit failed: {last}")
        return 1
    code, lines = judge(report)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
