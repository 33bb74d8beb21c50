"""The process that samples by vLLM: `.venv-vllm/bin/python -I vllm_worker.py ANSWERS`, in an environment of its own.

`rollouts.py` starts it. It reads one JSON request a line from standard input and writes one JSON answer a line to the
file descriptor ANSWERS; what vLLM has to say goes to standard output and error. A request is `[name, {given}]`, an
answer `{"done": ...}` or `{"error": text}`. It knows nothing of the project, loads safetensors alone, and ends where
its standard input does, also in the midst of its work: it never outlives the stage.

The engine runs in this process and without a cache of prefixes, a request has a seed of its own, and the sizes that
vLLM would otherwise take from the machine are given, so that the same requests get the same replies.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

SEQUENCES = 256  # decoded together, at most
TOGETHER = 8192  # tokens of prompts that are read together, at most
SEEDS = 1_000_003  # between those of two calls
SURROUNDINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, in which requests are scheduled in the order they came
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # to cores that other stages use too
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(answers: TextIO) -> None:
    """Answer each request as it comes."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(requests,), daemon=True).start()
    sampler = Sampler()
    known: dict[str, Callable[..., Any]] = {"load": sampler.load, "sample": sampler.sample}
    while True:
        name, given = json.loads(requests.get())
        try:
            answer = {"done": known[name](**given)}
        except Exception as error:  # whatever vLLM raises is told by the stage
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def listen(requests: "queue.SimpleQueue[str]") -> None:
    """Pass requests on, and end the process where there will be no more."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


class Sampler:
    """A model in vLLM."""

    engine: Any

    def load(self, model: str, device: str, dtype: str, threads: int, longest: int, cache_mb: int, seed: int) -> None:
        """Load the model of a folder, for prompts and replies of up to `longest` tokens together."""
        os.environ.update(SURROUNDINGS, OMP_NUM_THREADS=str(threads))
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.device_type != device:
            raise RuntimeError(f"this build of vLLM computes on {current_platform.device_type}, not on {device}")
        self.engine = LLM(
            model,
            skip_tokenizer_init=True,
            load_format="safetensors",
            generation_config="vllm",
            dtype=dtype,
            seed=seed,
            max_model_len=longest,
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=max(TOGETHER, longest),
            kv_cache_memory_bytes=cache_mb * 10**6,
            gpu_memory_utilization=0.01,  # it must be free when vLLM starts; what is taken is the line above
            enable_prefix_caching=False,
            enforce_eager=device == "cpu",
            logprobs_mode="processed_logprobs",  # at the temperature
        )

    def sample(
        self, weights: str, prompts: list[list[int]], seed: int, max_new_tokens: int, temperature: float, end: int
    ) -> list[tuple[list[int], list[float]]]:
        """Take up the weights of a folder and return the reply of each prompt, its end token included.

        Beside it, the log-probability of each of its tokens. `temperature` 0 is greedy.
        """
        from vllm import SamplingParams

        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": weights})
        settings = [
            SamplingParams(
                temperature=temperature, max_tokens=max_new_tokens, stop_token_ids=[end], ignore_eos=True,
                detokenize=False, seed=seed * SEEDS + place, logprobs=0,
            )
            for place in range(len(prompts))
        ]  # fmt: skip
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self.engine.generate(asked, settings, use_tqdm=False)
        return [reply_of(request.outputs[0]) for request in found]


def reply_of(output: Any) -> tuple[list[int], list[float]]:
    """Return a reply's tokens and their log-probabilities."""
    tokens = list(output.token_ids)
    return tokens, [seen[token].logprob for token, seen in zip(tokens, output.logprobs, strict=True)]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the stage's, which ends this process with it
        signal.signal(number, signal.SIG_IGN)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        main(file)
