"""Training and pretraining steps on a GPU."""
