"""The gated sum over neighbours, compiled where it can be."""
