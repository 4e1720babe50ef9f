#!/usr/bin/env python3
"""``fire-megatron convert`` from a checkout that is not installed."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fire_megatron.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
