"""`python -m tasks.ingest`: the command of the stage `ingest`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.ingest.stage")
