"""Grids of runs, their statistics, and the pages that show them."""
