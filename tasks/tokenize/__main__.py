"""`python -m tasks.tokenize`: the command of the stage `tokenize`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.tokenize.stage")
