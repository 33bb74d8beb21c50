"""`python -m tasks.reward`: the command of the stage `reward`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.reward.stage")
