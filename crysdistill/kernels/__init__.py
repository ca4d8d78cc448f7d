"""Compiled versions of hot loops, each behind one function with a plain version."""
