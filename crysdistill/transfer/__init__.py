"""From an encoder to properties: targets, heads, freezing, losses, weights files."""
