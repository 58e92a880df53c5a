"""`python -m phased_dmd`: the command without its script."""

from phased_dmd.cli import main

main()
