"""Run by tests/cli/test_plan.py: many calls of ``fire-megatron plan`` in one process, which a simulated world makes
useless for anything else. Reads a JSON list of arguments lists, prints a list of exit codes and texts."""

import contextlib
import io
import json
import sys

from fire_megatron.cli.main import main
from fire_megatron.plan import pieces


def call(arguments: list[str]) -> dict:
    """One call; ``--whole`` before the others runs every layer and row, ``--advised`` makes the call once more with
    what the first one, which is then ``first``, has advised."""
    if arguments[0] == "--advised":
        first = call(arguments[1:])
        advice = (part for item in json.loads(first["out"])["advice"] for part in item["change"].split(" "))
        return call([*arguments[1:], *advice]) | {"first": first}
    whole, kept = arguments[0] == "--whole", (pieces.MANY_LAYERS, pieces.FEW_ROWS)
    if whole:
        pieces.MANY_LAYERS, pieces.FEW_ROWS = 1000, 1000
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(["plan", *arguments[whole:]])
    finally:
        pieces.MANY_LAYERS, pieces.FEW_ROWS = kept
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    json.dump([call(arguments) for arguments in json.load(sys.stdin)], sys.stdout)
