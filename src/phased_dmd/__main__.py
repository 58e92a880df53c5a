"""`python -m phased_dmd`, for torchrun."""

from phased_dmd.cli import main

main()
