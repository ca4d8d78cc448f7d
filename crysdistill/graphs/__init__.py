"""Periodic neighbours, the batch of crystals, and the operations of models."""
