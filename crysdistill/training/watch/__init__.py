"""How fast a run is, what it waits for, and whether it still learns."""
