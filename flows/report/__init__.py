"""The HTML report that is written after a run."""
