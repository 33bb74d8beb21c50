"""`python -m tasks.finetune`: the command of the stage `finetune`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.finetune.stage")
