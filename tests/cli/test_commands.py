"""The commands under one name: all of them are told of, and a mistake is exit code 2 without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fire_megatron.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and text in out for name, (_, text) in COMMANDS.items())
    with pytest.raises(SystemExit) as left:
        main(["trian"])
    assert left.value.code == 2 and "choose from" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0 and "usage: " in capsys.readouterr().out


def test_reading_arguments_is_light(tmp_path):
    """torch takes seconds to import, which a mistake in an argument should not."""
    code = "import sys\nfrom fire_megatron.cli.main import main\n"
    code += f"print(main(['recipe', {str(tmp_path / 'absent.yaml')!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "2 False\n" and done.stderr.startswith("error: ")
