"""The stages of the chain, one module each; `python -m tasks.STAGE [KEY]` runs one. They share `tasks.common`."""
