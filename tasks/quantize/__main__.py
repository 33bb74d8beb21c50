"""`python -m tasks.quantize`: the command of the stage `quantize`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.quantize.stage")
