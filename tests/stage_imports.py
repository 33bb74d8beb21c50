"""What stage_processes.py imports before it forks: the heavy libraries, and the stages that train."""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed at import, as `torch_setup.prepare_torch` sets it

import deepspeed
import peft
import torch
import transformers.models.llama.modeling_llama
import transformers.models.modernbert.modeling_modernbert
import trl.trainer.grpo_trainer

from tasks.align import by_trl
from tasks.align import stage as align
from tasks.finetune import stage as finetune
from tasks.pretrain import stage as pretrain
from tasks.reward import stage as reward

__all__ = ["align", "by_trl", "deepspeed", "finetune", "peft", "pretrain", "reward", "torch", "transformers", "trl"]

gc.freeze()  # a collection in a forked process would copy the pages of all these objects
