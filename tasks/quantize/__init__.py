"""Export to the serving engine with 8-bit weights."""
