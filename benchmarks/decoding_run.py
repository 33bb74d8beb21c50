"""Decoding in a process of its own: the packaged INT8 policy on its engine, or the same model in torch FP32.

`benchmarks/serve.py` starts it as `python -m benchmarks.decoding_run FILE`. Measured are the tokens/s of a continuation
of fixed length, and the answers a second to questions asked one after the other, each as long as the model makes it.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from tasks.common.stage import write_json

REPEATS = 3
Answer = Callable[[str], int]


def int8(request: dict[str, Any]) -> tuple[Callable[[], None], Answer]:
    """Return what decodes a fixed number of tokens, and what answers a question, on the engine that serves."""
    import numpy as np
    import onnxruntime_genai

    from serving import folders
    from serving.engine import TextEngine

    folder, threads = Path(request["int8"]), request["threads"]
    engine, model = TextEngine(folder, threads), folders.load_genai(folder, threads)
    prompt, tokens = np.array([request["prompt"]], np.int32), request["tokens"]
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = prompt.shape[1] + tokens
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)

    def decode() -> None:
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(prompt)
        for _ in range(tokens):
            generator.generate_next_token()
            generator.get_next_tokens()

    return decode, lambda question: engine.generate([{"role": "user", "content": question}]).completion_tokens


def torch_fp32(request: dict[str, Any]) -> tuple[Callable[[], None], Answer]:
    """Return the same two for `generate` of the model that was exported."""
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


def timed(call: Callable[[], object]) -> float:
    """Return the median seconds of a call, after one that warms up."""
    call()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def main() -> None:
    """Measure the side that was asked for."""
    request = harness.read_request()
    decode, answer = {"int8": int8, "torch": torch_fp32}[request["side"]](request)
    questions = request["questions"]
    figures = {
        "tokens_per_second": request["tokens"] / timed(decode),
        "answers_per_second": len(questions) / timed(lambda: [answer(question) for question in questions]),
    }
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
