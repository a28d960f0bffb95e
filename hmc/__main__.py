"""`python -m hmc` is `hmc`."""

from hmc.cli import main

main()
