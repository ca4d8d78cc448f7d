"""Many structures to one store: sources, build, reading, splits, overlap."""
