"""`python -m tasks.compare`: the command of the stage `compare`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.compare.stage")
