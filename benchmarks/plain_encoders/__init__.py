"""Each encoder in the plainest form of its published layout, for comparison."""
