"""Stopping at any moment, and going on there."""
