"""The policy, the model that it must stay near, and the value function, on as few backbones as may be.

Where all weights are trained the reference is a second model. Where low-rank updates are (LoRA), it is the same one
with the updates switched off, and nothing is held twice. Where the last blocks are, it is a copy of these on top of the
same blocks below, whose states are worked out once an iteration for reference, values and every update. The value head
sits on the policy's last states, or on a model of its own (`values: separate`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.common.alignment import estimates
from tasks.common.evaluation import sampling
from tasks.common.modelling import methods, models
from tasks.common.modelling.halves import Halves, twin
from tasks.common.modelling.methods import Full, Lora, Top
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.common.training.checkpoints import trained_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Method = Full | Top | Lora
HEAD, CRITIC = "value_head", "critic"  # what is added to the model, and taken off before it is saved


@dataclass
class Policy:
    """A causal model in training, with what PPO asks of it. Tensors of it are (N, R): replies by their tokens.

    `model` carries the value head, so that whatever shares a model out among processes shares out both.
    """

    model: Any
    reference: "PreTrainedModel | None"  # None: the model itself, its updates switched off
    method: Method
    numerics: Numerics
    temperature: float
    halves: Halves | None = None  # the reference is then one of the upper half

    @classmethod
    def load(
        cls, path: Path, method: Method, values: Literal["shared", "separate"] | None, numerics: Numerics,
        temperature: float,
    ) -> "Policy":  # fmt: skip
        """Load the tuned model of a folder, as often as the method needs it; its value head foretells 0.

        Without `values` there is none, and the reference is a whole model, or None.
        """
        import torch

        base = models.load_decoder(path, numerics)
        width, device = base.config.hidden_size, base.device
        model: Any = methods.apply(base.eval(), method)
        halves = reference = None
        if isinstance(method, Top):
            model.get_input_embeddings().requires_grad_(False)  # nor a head that is tied to them: the states below stay
            if values and not numerics.parallel.in_step:
                halves = Halves.of(model, method.layers)
        if halves:
            reference = twin(halves.upper)
        elif not isinstance(method, Lora):
            reference = models.load_decoder(path, numerics).eval().requires_grad_(False)
        methods.store_as_computed(model, method, numerics.dtype.decoder)
        if values is None:
            return cls(model.eval(), reference, method, numerics, temperature)
        head = torch.nn.Linear(width, 1, device=device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        model.add_module(HEAD, head)
        if values == "separate":
            model.add_module(CRITIC, models.load_decoder(path, numerics).base_model)
        return cls(model.eval(), reference, method, numerics, temperature, halves)  # dropout would change every ratio

    def plain(self, path: Path, trained: Any) -> "PreTrainedModel":
        """Return the plain causal model that a trained one stands for; `path` holds the one that it began as."""
        for name in (HEAD, CRITIC):
            if hasattr(trained, name):
                delattr(trained, name)
        return methods.merge(trained, self.method, lambda: models.load_decoder(path, self.numerics))

    def plain_weights(self, path: Path) -> "dict[str, torch.Tensor]":
        """Return the weights that `plain` would have now, tied ones under each name, and leave the policy as it is.

        They may be those in training themselves.
        """
        plain = methods.merge(self.model, self.method, lambda: models.load_decoder(path, self.numerics))
        added = (f"{HEAD}.", f"{CRITIC}.")
        return {name: value for name, value in plain.state_dict().items() if not name.startswith(added)}

    def parts(
        self, ids: "torch.Tensor", mask: "torch.Tensor", width: int, states: "torch.Tensor | None" = None
    ) -> "Iterator[Part]":
        """Yield replies of like length together, without the padding that none of them needs.

        `ids` and `mask` are (N, P + R): prompts padded on the left, then replies of up to `width` = R tokens; `states`
        are those that `below` found of them.
        """
        ends = mask.shape[1] - mask.flip(1).long().argmax(1)  # (N,) where each reply ends
        for rows in ends.argsort(stable=True).split(chat.TOGETHER):
            first, end = int(mask[rows].any(0).long().argmax()), int(ends[rows].max())
            below = None if states is None else states[rows, first:end]
            yield Part(rows, ids[rows, first:end], mask[rows, first:end], end - (ids.shape[1] - width), below)

    def below(self, ids: "torch.Tensor", mask: "torch.Tensor", width: int) -> "torch.Tensor | None":
        """Return the states (N, P + R, D) on which the trained blocks begin, where all below them is frozen."""
        import torch

        if self.halves is None:
            return None
        lower, found = self.halves.lower, ids.new_zeros((*ids.shape, self.model.config.hidden_size), dtype=torch.float)
        with torch.no_grad(), models.autocast(self.model, self.numerics):
            for part in self.parts(ids, mask, width):
                end = ids.shape[1] - width + part.width
                states = lower(**part.given, use_cache=False).last_hidden_state
                found[part.rows, end - states.shape[1] : end] = states.float()
        return found

    def forward(self, part: "Part", *, entropy: bool = False) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Return log-probability, value and entropy (nats) of a part's reply tokens, each (B, part.width).

        The token at position t is predicted, and valued, from the state at t - 1. The temperature is the sampler's.
        Without `entropy` that is 0, and without a head the values are.
        """
        import torch

        model, given = (self.halves.upper, part.above) if self.halves else (self.model, part.given)
        with models.autocast(self.model, self.numerics):
            out = model(**given, logits_to_keep=part.before, output_hidden_states=True, use_cache=False)
            states = out.hidden_states[-1]
            if hasattr(self.model, CRITIC):
                states = self.model.critic(**part.given, use_cache=False).last_hidden_state
        states = states[:, part.before].float()
        values = states.new_zeros(states.shape[:-1])
        if hasattr(self.model, HEAD):
            values = self.model.value_head(states)[..., 0]
        logp, uncertain = self._log_probabilities(out.logits, part, entropy=entropy)
        return logp, values, torch.zeros_like(logp) if uncertain is None else uncertain

    def reference_logp(self, part: "Part") -> "torch.Tensor":
        """Return the log-probability of a part's reply tokens under the tuned model, (B, part.width)."""
        model = self.model if self.reference is None else self.reference
        given = part.given if self.halves is None else part.above
        with self.switched_off(), models.autocast(model, self.numerics):
            logits = model(**given, logits_to_keep=part.before, use_cache=False).logits
        return self._log_probabilities(logits, part, entropy=False)[0]

    def assemble(
        self, prompts: Sequence[list[int]], replies: Sequence[list[int]], fill: int
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return ids and mask (N, P + R), prompts padded on the left, replies on the right, and replied (N, R)."""
        import torch

        device = next(self.model.parameters()).device
        asked, prompted = chat.padded(prompts, fill, device, left=True)
        said, replied = chat.padded(replies, fill, device)
        return torch.cat([asked, said], 1), torch.cat([prompted, replied], 1).bool(), replied.bool()

    def looks(self, ids: "torch.Tensor", mask: "torch.Tensor", replied: "torch.Tensor") -> "Looks":
        """Return what the policy, the value function and the tuned model say of what `assemble` put together."""
        import torch

        width = replied.shape[1]
        states = self.below(ids, mask, width)
        logp, values, entropy, reference = (torch.zeros((len(ids), width), device=ids.device) for _ in range(4))
        with torch.no_grad():
            for part in self.parts(ids, mask, width, states):
                seen = (*self.forward(part, entropy=True), self.reference_logp(part))
                for whole, piece in zip((logp, values, entropy, reference), seen, strict=True):
                    whole[part.rows, : part.width] = piece
        return Looks(logp * replied, values * replied, entropy * replied, reference * replied, states)

    def replies(
        self, tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[list[int]], *, max_new_tokens: int,
        temperature: float, seed: int, most: Callable[[int], int] = sampling.alone,
    ) -> list[list[int]]:  # fmt: skip
        """Return what the policy replies to each prompt, as `sampling.replies` does, as fast as a plain model."""
        folded = nullcontext() if self.numerics.parallel.in_step else methods.folded(self.model, self.method)
        with folded:
            return sampling.replies(
                self.model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                numerics=self.numerics, most=most,
            )  # fmt: skip

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return a copy of the weights that are trained, or of this process's parts of them."""
        return {name: value.clone() for name, value in trained_weights(self.model).items()}

    def take_up(self, weights: "dict[str, torch.Tensor]") -> None:
        """Go on with other trained weights."""
        for name, value in trained_weights(self.model).items():
            value.copy_(weights[name])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within this a step moves the value function alone.

        What else is trained loses its gradient, even of zeros, which would leave it to weight decay.
        """
        still = [
            weight for name, weight in self.model.named_parameters()
            if weight.requires_grad and not name.startswith((f"{HEAD}.", f"{CRITIC}."))
        ]  # fmt: skip
        for weight in still:
            weight.grad = None
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in still:
                weight.requires_grad_(True)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Within this, the model is the tuned one again where the two share a backbone."""
        with nullcontext() if self.reference is not None else self.model.disable_adapter():
            yield

    def _log_probabilities(
        self, logits: "torch.Tensor", part: "Part", *, entropy: bool
    ) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        """Return the part's log-probabilities, and the distributions' entropies where asked for."""
        scaled = logits.float()  # (B, width, V)
        if self.temperature != 1:
            scaled = scaled / self.temperature
        return estimates.log_probabilities(scaled, part.ids[:, -part.width :], entropy=entropy)


@dataclass(frozen=True)
class Looks:
    """What is said of an iteration's replies before anything is learnt from them; (N, R), 0 beside their own tokens."""

    logp: "torch.Tensor"  # log-probability under the policy
    values: "torch.Tensor"
    entropy: "torch.Tensor"  # nats
    reference: "torch.Tensor"  # log-probability under the tuned model
    states: "torch.Tensor | None"  # (N, P + R, D) those of `Policy.below`


@dataclass(frozen=True)
class Part:
    """Some of the replies, cut to what they need."""

    rows: "torch.Tensor"  # (B,) their places among all
    ids: "torch.Tensor"  # (B, T)
    mask: "torch.Tensor"  # (B, T)
    width: int  # tokens of the longest of these replies, which are the last ones
    states: "torch.Tensor | None" = None  # (B, T, D) below the trained blocks, where they are known

    @property
    def before(self) -> "torch.Tensor":
        """The places (width,) whose states foretell the replies' tokens: each one's is the place before it.

        Picked by number, states lie together in memory, and the head is one product instead of one a row.
        """
        import torch

        end = self.ids.shape[1] - 1
        return torch.arange(end - self.width, end, device=self.ids.device)

    @property
    def given(self) -> dict[str, "torch.Tensor"]:
        """What a model is called with."""
        return {"input_ids": self.ids, **self._places}

    @property
    def above(self) -> dict[str, Any]:
        """What an upper half is called with."""
        return {"inputs_embeds": self.states, **self._places}

    @property
    def _places(self) -> dict[str, "torch.Tensor"]:
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.mask.long(), "position_ids": positions}
