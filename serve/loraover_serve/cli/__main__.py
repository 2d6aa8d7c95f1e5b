"""`python -m loraover_serve.cli`."""

from loraover_serve.cli import main

main()
