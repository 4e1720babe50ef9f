"""Rows of Parquet files, a batch of rows in memory at a time. Needs pyarrow, which is optional."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fire_megatron.config.errors import DataError

SUFFIXES = (".parquet", ".pq")
_BATCH = 1024
"""Rows in memory."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow, which cannot be imported ({error}); pip install pyarrow, or "
            "install fire_megatron with its extra [data]"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); make the file again") from error


def column_names(path: Path) -> list[str]:
    """Names of the columns. Raises DataError when the file cannot be read."""
    with _opened(path) as file:
        return list(file.schema_arrow.names)


def read_parquet(
    path: Path, columns: Collection[str] | None = None
) -> Iterator[tuple[str, dict[str, Any] | DataError]]:
    """Place (``file:row``, counted from 1) and row, or what is wrong with it.

    Structs and maps become dicts, lists become lists.

    Args:
        path: the file.
        columns: top-level columns to read; names that the file lacks are passed over. None reads all.

    Raises:
        DataError: no pyarrow, or a file that cannot be read.
    """
    with _opened(path) as file:
        wanted = [name for name in file.schema_arrow.names if columns is None or name in columns]
        if not wanted:
            yield from ((f"{path}:{number + 1}", {}) for number in range(file.metadata.num_rows))
            return
        number = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
            for row in _rows(batch):
                number += 1
                yield f"{path}:{number}", row


def _rows(batch: Any) -> Iterator[dict[str, Any] | DataError]:
    try:
        yield from batch.to_pylist(maps_as_pydicts="lossy")
        return
    except UnicodeDecodeError:
        pass  # one row or more; the others are fine
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist(maps_as_pydicts="lossy")
        except UnicodeDecodeError as error:
            yield DataError(f"a text is not UTF-8 ({error}); repair it")
