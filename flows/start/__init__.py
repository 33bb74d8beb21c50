"""`bessemer init`: a project of one's own from a checkpoint, data files, or another tool's configuration."""
