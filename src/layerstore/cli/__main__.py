"""``python -m layerstore.cli``."""

from layerstore.cli import main

main()
