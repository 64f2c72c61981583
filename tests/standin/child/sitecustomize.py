"""Puts the stand-ins in place when a child process of a test starts: see standin.environment."""

import os

from tests.standin import installed
from tests.standin.options import VARIABLE, Options

if VARIABLE in os.environ:
    installed(Options.from_json(os.environ[VARIABLE]))
