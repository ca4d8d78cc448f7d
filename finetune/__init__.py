"""Recipes: published experiments on top of pretrained weights, one script each."""
