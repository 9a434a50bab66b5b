"""``python -m sun``."""

from .cli import main

main()
