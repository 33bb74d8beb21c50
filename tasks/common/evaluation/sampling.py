"""Replies from a causal model: batched generation with a key–value cache, the same for the same seed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def replies(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    numerics: Numerics,
    batch: int = 128,
    desc: str | None = None,
) -> list[list[int]]:
    """Return the reply of each prompt as token ids, the end token included where it was reached.

    `temperature` 0 is greedy. Prompts of like length share a batch, and torch's generator is seeded per batch and put
    back afterwards, so that nothing else in the process changes a reply or is changed by it. A progress bar is shown
    where `desc` names it.
    """
    import torch
    from tqdm import tqdm

    result: list[list[int]] = [[] for _ in prompts]
    sample = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    was_training = model.training
    generate: Any = model.generate
    model.eval()
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
        groups = chat.alike(prompts, batch)
        for number, group in enumerate(tqdm(groups, desc=desc, disable=desc is None, mininterval=2)):
            rows = [prompts[i] for i in group]
            ids, mask = chat.padded(rows, tokenizer.pad_token_id, model.device, left=True)  # (B, P)
            torch.manual_seed(seed * 1_000_003 + number)
            with models.autocast(model, numerics):
                out = generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    **sample,
                )
            for i, row in zip(group, out[:, ids.shape[1] :].tolist(), strict=True):
                result[i] = _until(row, tokenizer.eos_token_id)
    model.train(was_training)
    return result


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end) + 1] if end in ids else ids


def decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """Return a reply's text without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()
