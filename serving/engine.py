"""Run the exported models: `TextEngine` answers conversations, `MaskEngine` fills in names. No torch, no transformers.

Both read one plain folder of the package (`policy/`, `encoder/`). The service, the terminal chat and the chain's
evaluation all use these classes, so what is measured is what answers.

Every request has a generator of its own: with dynamic INT8 the activations of a whole batch share one scale, so that
an answer worked out in a batch could depend on its neighbours. onnxruntime-genai keeps Python's lock during a step;
requests that run at once therefore take turns, token by token, each step on all the threads that suit the model.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serving import folders, names
from serving.decoding import Answer, Limits, Sampling
from serving.errors import InputError

if TYPE_CHECKING:
    import onnxruntime_genai

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")


class TextEngine:
    """A causal model in onnxruntime-genai's format, with its tokenizer and chat template."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        config = folders.read_key(folder / "genai_config.json", "model")
        limits = folder / "limits.json"
        self.limits = Limits(folders.read_key(limits, "context"), folders.read_key(limits, "max_new_tokens"))
        self.tokenizer = folders.load_tokenizer(folder)
        ends = config["eos_token_id"]
        self.ends = tuple(ends) if isinstance(ends, list) else (ends,)
        self.begin: int = config["bos_token_id"]
        self._template = folders.required(folder / "chat_template.jinja").read_text(encoding="utf-8")
        self._model = folders.load_genai(folder, threads)

    @cached_property
    def _render(self) -> Callable[..., str]:
        """The chat template, compiled as Transformers compiles it."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse_turns
        environment.globals["bos_token"] = self.tokenizer.id_to_token(self.begin)
        environment.globals["eos_token"] = self.tokenizer.id_to_token(self.ends[0])
        return environment.from_string(self._template).render

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's token ids: the conversation as the chat template writes it, open for an answer."""
        check_messages(messages)
        for message in messages:
            folders.refuse_reserved(self.tokenizer, message["content"])
        text = self._render(messages=list(messages), add_generation_prompt=True)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def start(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Answer:
        """Check a conversation and begin to answer it; iterate over the result for pieces of text as they come."""
        return self._begun(self.encode(messages), sampling or Sampling())

    def go_on(self, text: str, sampling: Sampling) -> Answer:
        """Go on with a text that is no conversation, and return when that is complete."""
        folders.refuse_reserved(self.tokenizer, text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self._begun([self.begin, *ids], sampling).finish()

    def _begun(self, prompt: Sequence[int], sampling: Sampling) -> Answer:
        room = self.limits.room(len(prompt), sampling.max_new_tokens)
        tokens = self._greedy(prompt, room) if sampling.temperature == 0 else self._drawn(prompt, room, sampling)
        return Answer(self.tokenizer, self._until_end(tokens), room, len(prompt), sampling.stop)

    def generate(self, messages: Sequence[Message], sampling: Sampling | None = None) -> Answer:
        """Answer a conversation and return when the answer is complete."""
        return self.start(messages, sampling).finish()

    def _generator(self, prompt: Sequence[int], room: int) -> "onnxruntime_genai.Generator":
        import onnxruntime_genai

        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(max_length=len(prompt) + room, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, params)
        generator.append_tokens(np.array([prompt], np.int32))
        return generator

    def _greedy(self, prompt: Sequence[int], room: int) -> Iterator[int]:
        generator = self._generator(prompt, room)
        for _ in range(room):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def _drawn(self, prompt: Sequence[int], room: int, sampling: Sampling) -> Iterator[int]:
        generator, draw = self._generator(prompt, room), sampling.generator()
        for left in range(room, 0, -1):
            logits = np.asarray(generator.get_logits())
            token = sampling.pick(logits.reshape(-1, logits.shape[-1])[-1], draw)
            yield token
            if left > 1:
                generator.append_tokens(np.array([token], np.int32))

    def _until_end(self, tokens: Iterator[int]) -> Iterator[int]:
        """Yield tokens up to the end of the answer."""
        for token in tokens:
            if token in self.ends:
                return
            yield token


def check_messages(messages: Sequence[Message]) -> None:
    """Refuse a conversation that no answer can follow."""
    if not messages:
        raise InputError("The conversation is empty: send at least one user message.", field="messages")
    for at, message in enumerate(messages, 1):
        if message["role"] not in ROLES:
            known = ", ".join(ROLES)
            raise InputError(f'Message {at} has the role "{message["role"]}"; known are {known}.', field="messages")
        if not message["content"].strip():
            raise InputError(f"Message {at} is empty: write something in it.", field="messages")
    if messages[-1]["role"] != "user":
        raise InputError("The last message must be the user's: it is the one that gets answered.", field="messages")


def _refuse_turns(message: str) -> None:
    """What chat templates call when they cannot write a conversation."""
    raise InputError(f"The model's chat template refuses this conversation: {message}", field="messages")


class MaskEngine:
    """A masked model in ONNX format and the names that it may put in the place of a mask."""

    def __init__(self, folder: Path, context: int, threads: int | None = None) -> None:
        self.tokenizer = folders.load_tokenizer(folder)
        self.context = context  # in tokens; the tokenizer's, which policy and encoder share
        self.codec = names.codec_of(self.tokenizer)
        self.candidates = names.Candidates(folders.read_json(folder / "names.json"), self.codec)
        self._session = folders.load_onnx(folder / "model.onnx", threads)
        self._inputs = [entry.name for entry in self._session.get_inputs()]

    def logits(self, ids: names.Ints, mask: names.Ints) -> names.Floats:
        """Run the encoder: (rows, tokens) -> (rows, tokens, vocabulary)."""
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        return np.asarray(self._session.run(["logits"], {name: feeds[name] for name in self._inputs})[0])

    def fill(self, text: str, top: int = 5) -> list[list[names.NameScore]]:
        """Return, for each [MASK] of a text in order, the `top` best names."""
        folders.refuse_reserved(self.tokenizer, text, allowed=names.MASK)
        places = []
        for place in names.slots(text, self.codec):
            self._check_length(place)  # before the next one is made: each is as long as the text
            places.append(place)
        return names.best(names.log_scores(self.logits, self.codec, self.candidates, places), self.candidates, top)

    def _check_length(self, place: names.Slot) -> None:
        found = len(place.row(self.codec, self.candidates.longest(place.spaced)))
        if found > self.context:
            raise InputError(
                f"The input is too long: with room for the longest name it has {found} tokens, and {self.context} are "
                "allowed. Shorten it.",
                code="context_length_exceeded",
            )
