"""``torchrun ... -m fire_megatron.train --recipe FILE [key=value ...]``."""

import sys

from fire_megatron.cli.train import main

sys.exit(main())
