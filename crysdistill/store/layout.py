"""What a store calls itself; apart from `store.py`, so that a build needs no torch."""

FORMAT = "crysdistill-store"
SCHEMA = 2
STRUCTURES_READABLE = (1, SCHEMA)
"""Schemas whose structures and labels are laid out as today: `build` migrates them."""
