"""Periodic neighbours, the batch of crystals, and the verbs that models are written in."""
