"""``python -m mdruntime`` is the command ``mdruntime``."""

import sys

from mdruntime.cli import main

sys.exit(main())
