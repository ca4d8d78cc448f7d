"""The store: many crystals in one memory-mapped file, and what it says of itself."""
