"""Models: building, loading and saving them, and the methods by which they are tuned."""
