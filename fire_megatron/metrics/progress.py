"""Progress of what is counted: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from tqdm import tqdm

Progress = tqdm
_SECONDS = 30.0
"""Between lines; what takes less has none."""


class _Lines(tqdm):
    """Whole lines in place of a bar that is drawn over, which a file or a pipe would keep every state of."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], None]:
        def line(text: str) -> None:
            if text.strip():
                print(text.strip(), file=file, flush=True)

        return line

    def close(self) -> None:
        self.delay = math.inf  # as if it had never been drawn: nothing to wipe, and commands say what is done
        super().close()


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> Progress:
    """A :class:`tqdm.tqdm` on standard error that is at home in log files too.

    Args:
        iterable: what is gone through, if not told by ``update``.
        show: whether to show anything.
        options: ``total``, ``desc``, ``unit`` and the like.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, disable=not show, **options)
    options.update(delay=_SECONDS, mininterval=_SECONDS, maxinterval=_SECONDS, ncols=0)
    return _Lines(iterable, disable=not show, **options)
