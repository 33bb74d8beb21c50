"""The vLLM sampling process: `.venv-vllm/bin/python -I vllm_worker.py ANSWERS`, in its own environment.

`rollouts.py` starts it. It reads one JSON request per line from standard input and writes one JSON answer per line to
the file descriptor ANSWERS; vLLM's own output goes to standard output and error. A request is `[name, {arguments}]`,
an answer `{"done": ...}` or `{"error": text}`. The process imports nothing of the project and loads only safetensors.
It exits when its standard input closes, even during a request, so it never outlives the stage.

For reproducible replies the engine runs in this process, prefix caching is off, every request has its own seed, and
sizes that vLLM would derive from the machine are set explicitly.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

MAX_SEQUENCES = 256  # decoded concurrently
MAX_BATCHED_TOKENS = 8192  # per scheduler step, mostly prefill
SEED_STEP = 1_000_003  # between the seeds of consecutive prompts
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process schedules requests in order of arrival
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # no pinning: other stages share the cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(answers: TextIO) -> None:
    """Answer requests in order of arrival."""
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(requests,), daemon=True).start()
    sampler = Sampler()
    handlers: dict[str, Callable[..., Any]] = {"load": sampler.load, "sample": sampler.sample}
    while True:
        name, arguments = json.loads(requests.get())
        try:
            answer = {"done": handlers[name](**arguments)}
        except Exception as error:  # the stage reports whatever vLLM raises
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def read_requests(requests: "queue.SimpleQueue[str]") -> None:
    """Queue requests from standard input; exit the process when it closes."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


class Sampler:
    """A model loaded in vLLM."""

    engine: Any

    def load(
        self, model: str, device: str, dtype: str, threads: int, max_length: int, cache_mb: int, seed: int
    ) -> None:
        """Load the model of a folder; a prompt and its reply have up to `max_length` tokens in total."""
        os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(threads))
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
            max_model_len=max_length,
            max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=max(MAX_BATCHED_TOKENS, max_length),
            kv_cache_memory_bytes=cache_mb * 10**6,
            gpu_memory_utilization=0.01,  # only checked at start; kv_cache_memory_bytes sets the real size
            enable_prefix_caching=False,
            enforce_eager=device == "cpu",
            logprobs_mode="processed_logprobs",  # after temperature scaling
        )

    def sample(
        self,
        weights: str,
        prompts: list[list[int]],
        seed: int,
        max_new_tokens: int,
        temperature: float,
        ends: list[int],
    ) -> list[tuple[list[int], list[float]]]:
        """Load the weights of a folder; return each prompt's reply tokens, with the end token, and their log-probs.

        `temperature` 0 is greedy.
        """
        from vllm import SamplingParams

        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": weights})
        settings = [
            SamplingParams(
                temperature=temperature, max_tokens=max_new_tokens, stop_token_ids=ends, ignore_eos=True,
                detokenize=False, seed=(seed + index * SEED_STEP) % 2**63, logprobs=0,
            )
            for index in range(len(prompts))
        ]  # fmt: skip
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.engine.generate(inputs, settings, use_tqdm=False)
        return [tokens_and_logprobs(request.outputs[0]) for request in outputs]


def tokens_and_logprobs(output: Any) -> tuple[list[int], list[float]]:
    """Return a reply's token ids and the log-probability of each."""
    tokens = list(output.token_ids)
    return tokens, [candidates[token].logprob for token, candidates in zip(tokens, output.logprobs, strict=True)]


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # the stage handles these and ends this process
        signal.signal(number, signal.SIG_IGN)
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        main(file)
