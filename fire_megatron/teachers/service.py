"""Ranks that hold teachers and none of the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fire_megatron.parallel.control import Control
from fire_megatron.teachers.pool import TeacherPool
from fire_megatron.teachers.transfer import Transfer


def serve_student(
    pool: TeacherPool,
    transfer: Transfer,
    control: Control,
    *,
    idle: Callable[[], None],
    done: Callable[[], None] = lambda: None,
) -> str | None:
    """The life of a rank that holds teachers and none of the student: do as the student says, until it says stop.

    Args:
        pool: with this rank's teachers.
        transfer: of their states.
        control: the student's orders.
        idle: called between orders, and about once a second while there is none.
        done: called after each order.

    Returns:
        Why the run ends, if not because it is done.
    """
    while True:
        idle()
        pool.doing("waiting for the student", patient=True)
        order: dict[str, Any] = control.wait(idle)
        match order["do"]:
            case "sample":
                pool.begin()
                pool.serve_all(pool.schedule(order["rounds"]), keep=order["keep"])
            case "score":
                pool.serve_all(pool.shared, keep=order["keep"])
            case "attach":
                for name in order["teachers"]:
                    transfer.serve(name)
            case "stop":
                return order["error"]
        done()
