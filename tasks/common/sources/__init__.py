"""Sources: what is read from archives, files, datasets and object storage, and how it becomes rows of the tables."""
