"""The tests marked ``gpu``, a file at a time."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

from gpu_checks.check import PROJECT, Context, Findings, NotHere, need


def gpu_tests(context: Context, file: str) -> Findings:
    """Args: file: in tests/gpu."""
    need("pytest")
    if not (PROJECT / "tests" / "gpu" / file).is_file():
        raise NotHere(f"this checkout has no tests/gpu/{file}")
    report = context.folder / f"{file}.xml"
    report.unlink(missing_ok=True)
    pytest = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*pytest, f"tests/gpu/{file}"], cwd=PROJECT, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcome = {
        kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")
    }
    bad = [case.get("name") for case in (*outcome["failure"], *outcome["error"])]
    figures = {
        "passed": len(cases) - len(bad) - len(outcome["skipped"]),
        "failed": len(bad),
        "skipped": len(outcome["skipped"]),
    }
    why = sorted({str(case.find("skipped").get("message")) for case in outcome["skipped"]})
    told = f"{figures['passed']} passed, {figures['failed']} failed, {figures['skipped']} skipped"
    told += f" ({'; '.join(why)})" if why else ""
    problems = [f"failed: {', '.join(map(str, bad))}"] if bad else []
    if not figures["passed"] and not bad:
        raise NotHere(told)
    return Findings(told, figures, problems)
