"""Teachers: whoever answers for the atoms or crystals of a batch."""
