"""``python -m mdexport`` is the command ``mdexport``."""

from mdexport.cli import main

main()
