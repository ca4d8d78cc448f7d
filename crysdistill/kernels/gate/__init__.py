"""The gated sum over the neighbours of an atom, compiled for the CPU."""
