"""What every command under torchrun does around its work: watch the other ranks, and end all of them when one fails."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fire_megatron.config.errors import UserError

if TYPE_CHECKING:
    from fire_megatron.platform import Watch, World


class Note(Protocol):
    """Is told why a run fails; ``hopeless`` when to try again would be in vain."""

    def __call__(self, reason: str, *, hopeless: bool = False) -> None:
        """Note it."""
        ...


def guarded(
    world: World, action: Callable[[Watch], object], *, held: str, timeout: float, note: Note | None = None
) -> None:
    """Do something with an eye on the other ranks: when one of them fails, all of them leave and say which.

    Args:
        world: this process's place.
        action: is given the watch.
        held: what this rank holds, for messages.
        timeout: seconds within which a run ends after one of its processes died.
        note: told of every failure, on each rank.

    Raises:
        UserError: the same on every rank. One that is this rank's alone ends the process, with exit code 2.
    """
    from fire_megatron.platform import launch
    from fire_megatron.platform.watch import EXIT_CODE, FAREWELL_IN_FAILURE

    watch = launch.watch(world, roles=held, timeout=timeout)
    tell: Note = note or (lambda reason, *, hopeless=False: None)
    if note is not None:
        watch.on_leave = note
    watch.start()
    try:
        action(watch)
        watch.close()
        return
    except UserError as error:
        tell(str(error), hopeless=not error.passing)
        if error.everywhere or world.size == 1:
            watch.close()
            raise
        reason, code = str(error), 2
        launch.report_mistake(error)
        print(f"error on rank {world.rank}: {reason}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        if world.size == 1:
            raise
        reason, code = f"{held} on rank {world.rank} was interrupted", 130
    except Exception as error:
        if world.size == 1:
            tell(f"{type(error).__name__}: {error}")
            raise
        traceback.print_exc()
        reason, code = _reason(error, watch, f"{held} on rank {world.rank}"), EXIT_CODE
        tell(reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
    watch.fail(reason)
    watch.close(farewell=FAREWELL_IN_FAILURE)
    sys.stdout.flush()
    os._exit(code)  # to take process groups apart may wait for ranks that are not there


def _reason(error: Exception, watch: Watch, here: str) -> str:
    """What failed: often an error is the mere consequence of what happened to another rank."""
    missing = watch.missing()
    if not missing:
        return f"{here} failed: {type(error).__name__}: {error}"
    return (
        f"{watch.describe(missing)}: no sign of life since, so the run ends; run again to continue from the last "
        "checkpoint"
    )


def report(error: UserError, rank: int) -> int:
    """Tell a user's mistake once; exit code 2."""
    from fire_megatron.platform import launch

    launch.report_mistake(error)
    if rank == 0 or not error.everywhere:
        where = "" if error.everywhere or launch.launched_world_size() == 1 else f" on rank {rank}"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    return 2
