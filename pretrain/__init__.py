"""Recipes: published ways of pretraining, one script each."""
