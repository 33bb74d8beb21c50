"""Replies from a causal model: batched decoding with a key–value cache, the same for the same seed.

The loop is our own for two reasons: rows that have ended leave the batch, where Transformers' `generate` computes them
until the longest has ended, and it can keep in step with other processes that hold parts of the same model.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.common.modelling import models
from tasks.common.settings import Numerics
from tasks.common.text import chat

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LEAVE = 0.75  # rows leave the batch together, once no more than this share of it goes on: leaving copies the cache


def alone(going: int) -> int:
    """Return how many rows go on where no other process waits for this one."""
    return going


def replies(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    numerics: Numerics,
    batch: int = 128,
    desc: str | None = None,
    most: Callable[[int], int] = alone,
) -> list[list[int]]:
    """Return the reply of each prompt as token ids, the end token included where it was reached.

    `temperature` 0 is greedy. Prompts of like length share a batch, and torch's generator is seeded per batch and put
    back afterwards, so that nothing else in the process changes a reply or is changed by it. A progress bar is shown
    where `desc` names it. `most` returns the most rows that go on in any of the processes which decode in step.
    """
    import torch
    from tqdm import tqdm

    result: list[list[int]] = [[] for _ in prompts]
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        groups = chat.alike(prompts, batch)
        for number, group in enumerate(tqdm(groups, desc=desc, disable=desc is None, mininterval=2)):
            ids, mask = chat.padded([prompts[i] for i in group], tokenizer.pad_token_id, device, left=True)  # (B, P)
            torch.manual_seed(seed * 1_000_003 + number)
            with models.autocast(model, numerics):
                found = _decode(model, ids, mask, max_new_tokens, temperature, tokenizer.eos_token_id, most)
            for i, reply in zip(group, found, strict=True):
                result[i] = reply
    model.train(was_training)
    return result


def _decode(
    model: Any, ids: "torch.Tensor", mask: "torch.Tensor", limit: int, temperature: float, end: int,
    most: Callable[[int], int],
) -> list[list[int]]:  # fmt: skip
    """Return what follows each of the prompts (B, P), which are padded on the left."""
    import torch

    from tasks.common.modelling.growing_cache import growing_cache

    found: list[list[int]] = [[] for _ in ids]
    rows = list(range(len(ids)))  # which reply each row of the batch is
    cache, positions = growing_cache(model.config), (mask.cumsum(1) - 1).clamp(min=0)
    for _ in range(limit):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1].float()  # (B, V)  # fmt: skip
        ids = drawn(logits / temperature) if temperature else logits.argmax(-1, keepdim=True)  # (B, 1)
        for row, token in zip(rows, ids[:, 0].tolist(), strict=True):
            if found[row][-1:] != [end]:
                found[row].append(token)
        going = [place for place, row in enumerate(rows) if found[row][-1:] != [end]]
        if not most(len(going)):
            break
        mask, positions = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), positions[:, -1:] + 1
        if len(going) <= LEAVE * len(rows):
            kept = torch.tensor(going or [0], device=ids.device)  # one stays while other processes go on
            rows = [rows[place] for place in kept.tolist()]
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            cache.batch_select_indices(kept)
    return found


def drawn(logits: "torch.Tensor") -> "torch.Tensor":
    """Return a token of each row's distribution, shape (B, 1), from one uniform number a row.

    Where that falls among the summed shares is the token. `torch.multinomial` draws a number for every token that there
    is instead, which takes a tenth of the time of a small model's step.
    """
    import torch

    shares = torch.softmax(logits.double(), -1).cumsum(-1)  # (B, V)
    at = torch.rand(len(shares), 1, dtype=shares.dtype, device=shares.device) * shares[:, -1:]
    return torch.searchsorted(shares, at, right=True).clamp(max=shares.shape[1] - 1)


def decode(tokenizer: "PreTrainedTokenizerFast", ids: Sequence[int]) -> str:
    """Return a reply's text without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()
