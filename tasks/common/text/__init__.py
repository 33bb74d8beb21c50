"""Model inputs: the chat template, token shards and batches of windows or documents."""
