"""Validation: checks of single rows, curation of texts, suites over whole tables, and the pages that tell of them."""
