"""The tests in tests/gpu, on the device: what the numbers are worth comes before what they cost."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from benchmarks.cost.gpu.session import Rows

__all__ = ["correctness"]

ROOT = Path(__file__).parents[3]
OF_SMOKE = ("tests/gpu/test_gpu_numbers.py", "-k", "eigenproblem")  # the suite runs them all, and not twice


def correctness(device: str, rows: Rows) -> None:
    """Run tests/gpu in a process of its own; a row for each test, also before a crash or the limit.

    Raises:
        RuntimeError: A test failed, or no test ran.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.txt"
        chosen = OF_SMOKE if device == "cpu" else ("tests/gpu",)
        command = [sys.executable, "-m", "pytest", *chosen, "-W", "ignore", "-p", "no:cacheprovider"]
        with report.open("w") as output:
            try:
                subprocess.run(
                    [*command, "-vv", "--tb=short", "-ra", f"--junitxml={folder}/tests.xml"],
                    cwd=ROOT,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=max(rows.time_left, 1),
                    check=False,
                )
            except subprocess.TimeoutExpired:
                output.write("\nthe time was over\n")
        outcomes = list(_outcomes(Path(folder) / "tests.xml", report))
        text = report.read_text()
    for test, outcome, reason in outcomes:
        rows.add(outcome=outcome, test=test, reason=reason)
    failed = [test for test, outcome, _ in outcomes if outcome in ("failed", "error")]
    if failed or not outcomes:
        print(text[-20_000:], flush=True)
        raise RuntimeError(f"{len(failed)} tests failed: {', '.join(failed)}" if failed else "no test ran")


def _outcomes(xml: Path, report: Path) -> Iterator[tuple[str, str, str]]:
    """Yield test, outcome and reason: from the XML, or from the lines that a run without an end has printed."""
    if xml.exists():
        for case in ElementTree.parse(xml).iter("testcase"):
            problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
            outcome = "passed" if problem is None else {"failure": "failed"}.get(problem.tag, problem.tag)
            reason = "" if problem is None else (problem.get("message") or "")[:300]
            yield str(case.get("name")), outcome, reason
        return
    for line in report.read_text().splitlines():
        test, _, rest = line.partition(" ")
        if "::" in test and rest.split():
            yield test.partition("::")[2], rest.split()[0].lower(), ""
