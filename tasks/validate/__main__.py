"""`python -m tasks.validate`: the command of the stage `validate`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.validate.stage")
