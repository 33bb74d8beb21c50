"""Orchestration: DVC's graph, the Prefect flow that runs it, and the command line. Nothing here imports torch."""
