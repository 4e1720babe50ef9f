"""``torchrun ... -m fire_megatron.evaluate --checkpoint DIR --benchmark FILE ...``."""

import sys

from fire_megatron.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
