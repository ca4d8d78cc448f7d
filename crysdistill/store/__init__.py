"""The store: many crystals in one memory-mapped file, with a description."""
