"""`python -m tasks.align`: the command of the stage `align`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.align.stage")
