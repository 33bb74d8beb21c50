"""Orchestration: what DVC says is to be done, how Prefect runs it, and the command line. Nothing here knows torch."""
