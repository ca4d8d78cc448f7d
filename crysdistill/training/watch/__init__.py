"""Watches a run: its speed, its waiting times, and whether it still learns."""
