"""Train or load a tokenizer and write packed token shards."""
