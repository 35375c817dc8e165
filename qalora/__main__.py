"""`python -m qalora`."""

from qalora.cli import main

main()
