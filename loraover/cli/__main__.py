"""`python -m loraover.cli`."""

from loraover.cli import main

main()
