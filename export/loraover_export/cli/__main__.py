"""`python -m loraover_export.cli`."""

from loraover_export.cli import main

main()
