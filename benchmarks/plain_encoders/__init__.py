"""Each encoder in the plainest honest form of its published layout, for comparison."""
