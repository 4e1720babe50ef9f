"""Files are there whole or not at all."""

import os
from pathlib import Path

import pytest

from fire_megatron.platform.files import write_whole


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "recipe.yaml"
    write_whole(target, ["old"])
    target.chmod(0o640)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_whole(target, ["new"])
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    write_whole(target, ["n", "ew"])
    assert target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o640
