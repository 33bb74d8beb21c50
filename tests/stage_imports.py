"""What stage_processes.py does before it forks: imports, and the digests of this project's code.

The caches of digests are keyed by the source text, so a stage in a changed copy still computes its own.
"""

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed at import, as `torch_setup.prepare_torch` sets it

import deepspeed.runtime.zero.muon.muon_optimizer  # imported by every engine: its decorators import torch's compiler
import networkx
import peft
import phonenumbers
import torch
import transformers.models.llama.modeling_llama
import transformers.models.modernbert.modeling_modernbert
import trl.trainer.grpo_trainer

from tasks.align import by_trl
from tasks.common.code import stages
from tasks.common.harness.job import module_of
from tasks.common.settings import STAGES
from tests.conftest import ROOT

__all__ = ["by_trl", "deepspeed", "networkx", "peft", "phonenumbers", "torch", "transformers", "trl"]

for stage in STAGES:
    module_of(stage)  # reading params.yaml needs the settings of all
    stages.digest_module(stages.module_of_stage(stage, ROOT), ROOT)

gc.freeze()  # a collection in a forked process would copy the pages of all these objects
