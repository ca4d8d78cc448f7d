"""One crystal: checked arrays, readers, symmetry, element tables. Needs no torch."""
