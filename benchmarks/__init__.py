"""Measurements of speed and memory, as ratios to the published programs."""
