"""``python -m rlsloth`` is the command ``rlsloth``."""

import sys

from rlsloth.cli import main

sys.exit(main())
