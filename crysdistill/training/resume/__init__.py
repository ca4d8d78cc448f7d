"""Stopping a run at any moment, and resuming it there."""
