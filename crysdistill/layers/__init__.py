"""Layers that several encoders share: basis functions, norms, pooling."""
