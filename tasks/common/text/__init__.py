"""Text as models read it: chat templates, token shards, packed rows, masks."""
