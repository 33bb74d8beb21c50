"""Everything that replaces code of torch or Transformers; an upgrade should mostly delete files here.

Each module says what it replaces, the release that it was written against, and when it can be deleted.
"""
