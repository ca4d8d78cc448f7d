"""Periodic neighbours, the batch of crystals, and the verbs of models."""
