"""Compiled twins of hot loops, each behind one function and never the only form."""
