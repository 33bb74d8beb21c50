"""`python -m tasks.pretrain`: the command of the stage `pretrain`."""

from tasks.common.harness import execution

if __name__ == "__main__":
    execution.main("tasks.pretrain.stage")
