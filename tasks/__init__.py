"""The stages, a package or a module each; `python -m tasks.STAGE [ENTRY]` runs one. They share `tasks.common`."""
