"""``python -m rlsloth`` is the command ``rlsloth``."""

import sys

from rlsloth.cli.main import main

sys.exit(main())
