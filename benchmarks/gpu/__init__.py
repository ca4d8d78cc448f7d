"""Steps of training and pretraining on a GPU."""
