"""Runs: Lightning modules, loaders, run directories, inference."""
