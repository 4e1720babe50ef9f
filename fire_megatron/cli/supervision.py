"""What every command under torchrun does around its work: refuse mistakes on all ranks alike, watch the other ranks,
and end all of them when one fails."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from fire_megatron.config.errors import UserError
from fire_megatron.platform import launcher
from fire_megatron.platform.apex import refuse_other_apex
from fire_megatron.platform.quiet import quiet_third_parties

if TYPE_CHECKING:
    from fire_megatron.platform.launch import World
    from fire_megatron.platform.watch import Watch

Checked = TypeVar("Checked")
_PROGRAMMING = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    TypeError, ValueError,
)  # fmt: skip
"""Errors of a program, which another start meets at the same place; devices, networks and file systems raise others
(``RuntimeError``, ``OSError``)."""


class Note(Protocol):
    """Is told why a run fails, on the rank that fails and on those that hear of it; ``hopeless`` when another attempt
    would fail too."""

    def __call__(self, reason: str, *, hopeless: bool = False) -> None:
        """Note it."""
        ...


def supervised(
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
    from fire_megatron.platform.watch import FAREWELL_IN_FAILURE

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
        if world.rank == 0 or not error.everywhere:
            tell(str(error), hopeless=_is_hopeless(error))
        if error.everywhere or world.size == 1:
            watch.close()
            raise
        code = 2
        _report_hopeless(error)
        print(f"error on rank {world.rank}: {error}", file=sys.stderr, flush=True)
        watch.give_up(str(error))
    except KeyboardInterrupt:
        if world.size == 1:
            raise
        code = 130
        watch.give_up(f"{held} on rank {world.rank} was interrupted")
    except Exception as error:
        if world.size == 1:
            tell(_named(error), hopeless=_is_hopeless(error))
            raise
        code = _failed(error, watch, tell, held=held, rank=world.rank)
    watch.close(farewell=FAREWELL_IN_FAILURE)
    sys.stdout.flush()
    os._exit(code)  # to take process groups apart may wait for ranks that are not there


def _failed(error: Exception, watch: Watch, tell: Note, *, held: str, rank: int) -> int:
    """Tell every rank what failed: often an error is the mere consequence of what happened to another rank. Returns the
    exit code."""
    from fire_megatron.platform.watch import EXIT_CODE

    missing, here = watch.missing(), _named(error)
    if missing:
        reason = watch.recorder.mentioned(
            f"{watch.describe(missing)}: no sign of life since, so the run ends; run again to continue from the last "
            "checkpoint"
        )
        print(f"rank {rank} ({held}) noticed by {here}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
        reason = f"{held} on rank {rank} failed: {here}"
        if _is_hopeless(error):  # the others hear of the reason alone, so this rank tells first
            tell(reason, hopeless=True)
            _report_hopeless(error)
    heard = watch.give_up(reason)
    tell(heard)
    if rank == 0 or heard == reason:
        print(f"error: {heard}", file=sys.stderr, flush=True)
    watch.recorder.dump(heard)
    return EXIT_CODE


def _named(error: Exception) -> str:
    return " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def _is_hopeless(error: Exception) -> bool:
    """Whether another start would fail in the same way."""
    return not error.passing if isinstance(error, UserError) else isinstance(error, _PROGRAMMING)


def _report_hopeless(error: Exception) -> None:
    if _is_hopeless(error):
        launcher.report_mistake(str(error) if isinstance(error, UserError) else _named(error))


def run_command(check: Callable[[], Checked], work: Callable[[Checked], object]) -> int:
    """A command from its first check to its exit code.

    Args:
        check: raises UserError for a mistake, before anything is begun.
        work: is given what ``check`` returned, on every rank or on none.

    Returns:
        0 done, 2 a mistake in the input, 130 interrupted. :func:`supervised` ends the process with codes of its own.
    """
    rank, checked, problem, stop = 0, None, None, lambda: None
    quiet_third_parties()
    try:
        rank = launcher.launched_rank()
        try:
            refuse_other_apex()
            checked = check()
        except UserError as error:
            problem = str(error)
            if launcher.launched_world_size() == 1:  # nobody to tell: without torch, whose import takes seconds
                raise
        from fire_megatron.platform import launch

        stop = launch.stop
        launch.raise_on_any_rank(problem)
        work(checked)
        return 0
    except UserError as error:
        return _report(error, rank)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        _report_hopeless(error)
        raise
    finally:
        stop()


def _report(error: UserError, rank: int) -> int:
    """Tell a user's mistake once; exit code 2."""
    _report_hopeless(error)
    if rank == 0 or not error.everywhere:
        where = "" if error.everywhere or launcher.launched_world_size() == 1 else f" on rank {rank}"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    return 2
