"""The checks one after the other within a budget; what comes out is written after each of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gpu_checks.check import FAILED, LEFT_OUT, NEEDS_GPU, OK, Check, Context, Result
from gpu_checks.record import write
from gpu_checks.workers import Workers, exit_text

Say = Callable[[str], None]


def chosen(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """Those of these names, or that begin with one and an underscore, after all that they need; all without names.

    Raises:
        ValueError: a name that no check has.
    """
    if not only:
        return list(checks)
    by_name = {check.name: check for check in checks}
    wanted: set[str] = set()

    def want(name: str) -> None:
        wanted.add(name)
        for other in by_name[name].needs:
            want(other)

    for name in only:
        found = [check for check in by_name if check == name or check.startswith(f"{name}_")]
        if not found:
            raise ValueError(f"--only {name}: no check has that name; there are {', '.join(by_name)}")
        for check in found:
            want(check)
    return [check for check in checks if check.name in wanted]


class Runner:
    """Runs checks."""

    def __init__(
        self,
        checks: Sequence[Check],
        context: Context,
        workers: Workers,
        *,
        seconds: float,
        out: Path,
        about: Mapping[str, str | None],
        limits: Mapping[str, float] | None = None,
        say: Say = print,
    ) -> None:
        """Args: seconds: the budget, from now on; out: folder of results.json and results.md; about: what the figures
        rest on, versions above all; limits: seconds of single checks, instead of their own."""
        self._checks, self._context, self._workers = checks, context, workers
        self._end = time.monotonic() + seconds
        self._out, self._about, self._limits, self._say = out, dict(about), limits or {}, say
        self.results: list[Result] = []

    def run(self) -> bool:
        """Whether nothing has failed."""
        try:
            if not self._workers.start(max(0.0, min(180.0, self._end - time.monotonic()))):
                self._say("each check starts from nothing")
            for check in self._checks:
                result = self._one(check)
                self.results.append(result)
                self._say(result.line())
                if check.name == "card":
                    self._about |= {key: result.figures.get(key) for key in ("card", "driver")}
                write(self._out, self._about, self.results)
        finally:
            self._workers.close()
        return not any(result.state == FAILED for result in self.results)

    def _one(self, check: Check) -> Result:
        if check.gpu and not self._context.gpu:
            return Result(check.name, NEEDS_GPU, 0.0, "a CPU can say nothing of it")
        states = {result.check: result.state for result in self.results}
        missing = [name for name in check.needs if states.get(name) != OK]
        if missing:
            return Result(check.name, LEFT_OUT, 0.0, f"needs {', '.join(missing)}, which did not pass")
        left = self._end - time.monotonic()
        wanted = check.seconds if self._context.gpu else 2.0
        if left < wanted:
            return Result(check.name, LEFT_OUT, 0.0, f"no time: {max(left, 0):.0f} s left, it takes about {wanted:g} s")
        return self._in_a_process(check, min(self._limits.get(check.name, check.limit), left))

    def _in_a_process(self, check: Check, limit: float) -> Result:
        path, started = self._context.path(check.name), time.monotonic()
        path.unlink(missing_ok=True)
        code = self._workers.run(check.name, limit)
        seconds = round(time.monotonic() - started, 1)
        if path.is_file():
            left = json.loads(path.read_text())
            return Result(check.name, left["state"], seconds, left["told"], left["figures"])
        return Result(check.name, FAILED, seconds, f"{exit_text(code)} ({limit:.0f} s allowed); {self._last_words()}")

    def _last_words(self) -> str:
        lines = self._workers.log.read_text(errors="replace").replace("\r", "\n").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        return f"log ends with: {said[-1][-300:]}" if said else "it has printed nothing"
