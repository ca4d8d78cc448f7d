"""Small-data property predictors from crystal encoders pretrained without labels."""

__version__ = "0.1.0"
