"""Names in a store's file; apart from `store.py`, so that a build needs no torch."""

FORMAT = "crysdistill-store"
SCHEMA = 2
STRUCTURES_READABLE = (1, SCHEMA)
"""Schemas whose structures and labels have today's layout, so `build` migrates them."""

MADE_UP = "structures/material_ids_made_up"
"""The array that marks ids made up by the program; absent if there are none."""
