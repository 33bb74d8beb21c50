"""Decoding speed of the packaged INT8 chat model on its engine, or of the same model in torch FP32.

`benchmarks/serve.py` runs it as `python -m benchmarks.decoding_run FILE`. It measures tokens/s of a continuation of
fixed length, and answers/s to sequential questions, where each answer ends at its end token.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common.harness.records import write_json

REPEATS = 3
Answer = Callable[[str], int]


def int8(request: dict[str, Any]) -> tuple[Callable[[], None], Answer]:
    """Return two functions on the serving engine: decode a fixed number of tokens, and answer a question."""
    from serving.engine import TextEngine

    engine = TextEngine(Path(request["int8"]), request["threads"])

    def decode() -> None:
        engine.decode(request["prompt"], request["tokens"])

    return decode, lambda question: engine.generate([{"role": "user", "content": question}]).completion_tokens


def torch_fp32(request: dict[str, Any]) -> tuple[Callable[[], None], Answer]:
    """Return the same two functions with `generate` of the FP32 model."""
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.common.text import chat

    torch.set_num_threads(request["threads"])
    tokenizer = chat.load_tokenizer(Path(request["fp32"]))
    model: Any = AutoModelForCausalLM.from_pretrained(request["fp32"], dtype=torch.float32).eval()
    prompt, tokens = torch.tensor([request["prompt"]]), request["tokens"]
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "do_sample": False}

    @torch.no_grad()
    def generate(ids: Any, most: int, least: int) -> int:
        mask = torch.ones_like(ids)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=most, min_new_tokens=least, **ends
        )  # fmt: skip
        return int(out.shape[1] - ids.shape[1])

    def answer(question: str) -> int:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return generate(ids, int(request["longest"]), 1)

    def decode() -> None:
        generate(prompt, tokens, tokens)

    return decode, answer


def median_seconds(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after one warm-up call."""
    call()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Measure the requested side."""
    request = harness.read_request()
    decode, answer = {"int8": int8, "torch": torch_fp32}[request["side"]](request)
    questions = request["questions"]
    figures = {
        "tokens_per_second": request["tokens"] / median_seconds(decode),
        "answers_per_second": len(questions) / median_seconds(lambda: [answer(question) for question in questions]),
    }
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
