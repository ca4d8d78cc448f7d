"""The sections of the report, one subject each."""
