"""`python -m tasks.evaluate`: the command of the stage `evaluate`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.evaluate.stage")
