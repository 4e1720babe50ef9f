"""``python -m fire_megatron COMMAND``."""

import sys

from fire_megatron.cli.main import main

sys.exit(main())
