"""Inference on the exported models, without torch: `TextEngine` answers conversations, `MaskEngine` fills in names.

Each loads one folder of the package (`chat/`, `encoder/`). The service, the terminal chat and the pipeline's evaluation
all use these classes, so the evaluation measures the served models.

Concurrent requests share one batch (`serving.batching`). Prompts are tokenized by `tokenizers`, as in training.
"""

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from serving import folders, names
from serving.batching import Batch, Request
from serving.decoding import Answer, Limits, Sampling
from serving.errors import InputError
from serving.templates import ChatTemplate

if TYPE_CHECKING:
    from openvino import InferRequest
    from openvino_genai import GenerationConfig

Message = Mapping[str, str]
Prompt = Sequence[Message] | str  # a conversation to answer, or plain text to continue
ROLES = ("system", "user", "assistant")


class PreparedPrompt(NamedTuple):
    """A prompt's token ids, its sampling settings, and the maximum number of new tokens."""

    ids: list[int]
    sampling: Sampling
    max_tokens: int


class TextEngine:
    """A causal model in OpenVINO's format, with its tokenizer and chat template.

    `cache_blocks` is the size of the KV cache in blocks, by default the export's.
    """

    def __init__(self, folder: Path, threads: int | None = None, cache_blocks: int | None = None) -> None:
        self.folder = folder
        limits = folder / "limits.json"
        self.limits = Limits(folders.read_key(limits, "context"), folders.read_key(limits, "max_new_tokens"))
        self.tokenizer = folders.load_tokenizer(folder)
        eos = folders.read_key(folder / "generation_config.json", "eos_token_id")
        self.eos_ids: tuple[int, ...] = tuple(eos) if isinstance(eos, list) else (eos,)
        self.first_id: int = folders.read_key(folder / folders.SPECIAL_TOKENS_FILE, "first")
        self.template = read_template(folder)
        self.batch = Batch(partial(folders.load_pipeline, folder, threads, cache_blocks))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids: the conversation rendered by the chat template, with the generation prompt."""
        if self.template is None:
            raise InputError(
                "The model has no chat template, so it answers no conversations: POST a text to /v1/completions, or "
                "export the model with a chat_template.",
                field="messages", code="no_chat_template",
            )  # fmt: skip
        check_messages(messages)
        for message in messages:
            folders.check_reserved_tokens(self.tokenizer, message["content"])
        text = self.template.render(messages)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def start(self, prompt: Prompt, sampling: Sampling | None = None) -> Answer:
        """Validate a prompt and start to answer it; iterate over the result for pieces of text."""
        [answer] = self.start_all([self.prepare(prompt, sampling or Sampling())])
        return answer

    def prepare(self, prompt: Prompt, sampling: Sampling) -> PreparedPrompt:
        """Validate and tokenize a prompt; raise InputError if it is invalid or too long."""
        ids = self._encode_text(prompt) if isinstance(prompt, str) else self.encode(prompt)
        return PreparedPrompt(ids, sampling, self.limits.allowed_new_tokens(len(ids), sampling.max_new_tokens))

    def start_all(self, prompts: Sequence[PreparedPrompt]) -> list[Answer]:
        """Start to answer prompts in one batch."""
        return [
            Answer(self.tokenizer, request, prompt.max_tokens, len(prompt.ids), prompt.sampling.stop, self.eos_ids)
            for request, prompt in zip(self.submit_all(prompts), prompts, strict=True)
        ]

    def submit_all(self, prompts: Sequence[PreparedPrompt]) -> list[Request]:
        """Submit prompts to the batch and return their requests."""
        return self.batch.add([(prompt.ids, self._config(prompt.sampling, prompt.max_tokens)) for prompt in prompts])

    def generate(self, prompt: Prompt, sampling: Sampling | None = None) -> Answer:
        """Return the complete answer to a prompt."""
        return self.start(prompt, sampling).finish()

    def decode(self, prompt: Sequence[int], tokens: int) -> list[int]:
        """Return exactly `tokens` greedy tokens after a prompt, ignoring end tokens. For benchmarks."""
        config = self._config(Sampling(), tokens)
        config.ignore_eos, config.stop_token_ids = True, set()
        [request] = self.batch.add([(prompt, config)])
        return request.take(whole=True)

    def _encode_text(self, text: str) -> list[int]:
        """Return the token ids of a plain text to continue."""
        folders.check_reserved_tokens(self.tokenizer, text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [self.first_id, *ids]

    def _config(self, sampling: Sampling, max_tokens: int) -> "GenerationConfig":
        """Return the engine's config. Temperature is applied before `top_p`, as in OpenAI's API and Transformers."""
        from openvino_genai import GenerationConfig

        config = GenerationConfig()
        config.max_new_tokens, config.apply_chat_template = max_tokens, False
        config.eos_token_id, config.stop_token_ids = self.eos_ids[0], set(self.eos_ids)
        if sampling.temperature:
            config.do_sample, config.rng_seed = True, sampling.resolve_seed()
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
        return config


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InputError if a conversation is not one that ends with a user message."""
    if not messages:
        raise InputError("The conversation is empty: send at least one user message.", field="messages")
    for at, message in enumerate(messages, 1):
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise InputError(f'Message {at} has the role "{message["role"]}"; known are {known}.', field="messages")
        # The model's own answer may be empty: a stop sequence can match at its start.
        if not message["content"].strip() and message["role"] != "assistant":
            raise InputError(f"Message {at} is empty: add some text.", field="messages")
    if messages[-1]["role"] != "user":
        raise InputError("The last message must be the user's: it is the one that gets answered.", field="messages")


def read_template(folder: Path) -> ChatTemplate | None:
    """Return a folder's chat template; None if it has none and only completes texts."""
    tokens = folders.read_key(folder / folders.SPECIAL_TOKENS_FILE, "template")
    if tokens is None:
        return None
    return ChatTemplate(folders.require_file(folder / folders.TEMPLATE_FILE).read_text(encoding="utf-8"), tokens)


class MaskEngine:
    """A masked language model in OpenVINO's format, with its candidate names."""

    def __init__(self, folder: Path, context: int, threads: int | None = None) -> None:
        self.tokenizer = folders.load_tokenizer(folder)
        self.context = context  # in tokens
        self.codec = names.make_codec(self.tokenizer, folders.read_json(folder / folders.SPECIAL_TOKENS_FILE))
        self.candidates = names.Candidates(folders.read_json(folder / "names.json"), self.codec)
        self.logits = EncoderLogits(folder, threads)

    def fill(self, text: str, top: int = 5) -> list[list[names.NameScore]]:
        """Return the `top` best names for each [MASK] of a text, in order."""
        folders.check_reserved_tokens(self.tokenizer, text, allowed=names.MASK)  # whatever the model's own is called
        slots = []
        for slot in names.find_slots(text, self.codec):
            self._check_length(slot)  # checked before the next slot is built: each is as long as the text
            slots.append(slot)
        return names.top_names(names.log_scores(self.logits, self.codec, self.candidates, slots), self.candidates, top)

    def _check_length(self, slot: names.Slot) -> None:
        found = len(slot.row(self.codec, self.candidates.max_tokens(slot.spaced)))
        if found > self.context:
            raise InputError(
                f"The input is too long: with room for the longest name it has {found} tokens, and {self.context} are "
                "allowed. Shorten it.",
                code="context_length_exceeded",
            )


class EncoderLogits:
    """A model without a cache as a function: ids and attention mask, both (rows, tokens) -> logits.

    Logits of a masked model are (rows, tokens, vocabulary), those of a classifier (rows, labels).
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self._model = folders.load_model(folder, threads)
        self.threads = int(self._model.get_property("INFERENCE_NUM_THREADS"))
        self._inputs = {name for entry in self._model.inputs for name in entry.names}
        self._per_thread = threading.local()

    def __call__(self, ids: names.Ints, mask: names.Ints) -> names.Floats:
        """Run the model."""
        feeds = {
            "input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids),
            "position_ids": np.tile(np.arange(ids.shape[1], dtype=np.int64), (len(ids), 1)),
        }  # fmt: skip
        found = self._request.infer({name: feeds[name] for name in feeds if name in self._inputs})
        return np.array(found["logits"])

    @property
    def _request(self) -> "InferRequest":
        """This thread's infer request; a request is not thread-safe."""
        if not hasattr(self._per_thread, "request"):
            self._per_thread.request = self._model.create_infer_request()
        request: InferRequest = self._per_thread.request
        return request


class DecoderLogits:
    """An exported causal model as a function: ids (rows, tokens) -> logits (rows, tokens, vocabulary)."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        model = folders.load_model(folder, threads)
        self._inputs = {name for entry in model.inputs for name in entry.names}
        self._request = model.create_infer_request()

    def __call__(self, ids: names.Ints) -> names.Floats:
        """Run the decoder on whole texts; the KV cache is reset before each call."""
        rows, tokens = ids.shape
        feeds = {
            "input_ids": ids, "attention_mask": np.ones_like(ids), "beam_idx": np.arange(rows, dtype=np.int32),
            "position_ids": np.tile(np.arange(tokens, dtype=np.int64), (rows, 1)),
        }  # fmt: skip
        self._request.reset_state()
        found = self._request.infer({name: feeds[name] for name in feeds if name in self._inputs})
        return np.array(found["logits"])
