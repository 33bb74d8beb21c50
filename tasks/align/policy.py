"""The policy, its reference model and the value function, on as few backbones as possible.

With full fine-tuning the reference is a second model. With LoRA it is the same model with the adapters disabled. With
`top_layers` it is a frozen copy of the trained blocks on the shared blocks below; the states of the shared blocks are
computed once per iteration for the reference, the values and every update. The value head reads the policy's last
hidden states, or those of a model of its own (`values: separate`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tasks.align import estimates
from tasks.align.halves import Halves, frozen_copy
from tasks.common.generation import sampling
from tasks.common.modelling import methods, models
from tasks.common.modelling.methods import Full, Lora, TopLayers
from tasks.common.settings import Numerics
from tasks.common.text import chat
from tasks.common.training.checkpoints import trainable_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Method = Full | TopLayers | Lora
VALUE_HEAD, CRITIC = "value_head", "critic"  # modules added to the model and removed before it is saved


@dataclass
class Policy:
    """A causal model in RL training, its reference and its value head. Tensors are (N, R): N replies of R tokens.

    The value head is a module of `model`, so that a distributed engine shards both together.
    """

    model: Any
    reference: "PreTrainedModel | None"  # None: `model` itself with its adapters disabled
    method: Method
    numerics: Numerics
    temperature: float
    halves: Halves | None = None  # if set, the reference is a copy of the upper half

    @classmethod
    def load(
        cls, path: Path, method: Method, values: Literal["shared", "separate"] | None, numerics: Numerics,
        temperature: float,
    ) -> "Policy":  # fmt: skip
        """Load the tuned model of a folder, and a reference if the method needs one; the value head starts at 0.

        With `values` None there is no value head, and the reference is a whole model, or None with LoRA.
        """
        import torch

        base = models.load_decoder(path, numerics)
        width, device = base.config.hidden_size, base.device
        model: Any = methods.apply(base.eval(), method)
        halves = reference = None
        if isinstance(method, TopLayers):
            # A tied head is frozen with the embeddings: it must not change the frozen states.
            model.get_input_embeddings().requires_grad_(False)
            if values and not numerics.parallel.lockstep:
                halves = Halves.of(model, method.layers)
        if halves:
            reference = frozen_copy(halves.upper)
        elif not isinstance(method, Lora):
            reference = models.load_decoder(path, numerics).eval().requires_grad_(False)
        methods.cast_frozen_to_bfloat16(model, method, numerics.dtype.decoder)
        if values is None:
            return cls(model.eval(), reference, method, numerics, temperature)
        head = torch.nn.Linear(width, 1, device=device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        model.add_module(VALUE_HEAD, head)
        if values == "separate":
            model.add_module(CRITIC, models.load_decoder(path, numerics).base_model)
        # eval: dropout would change the probability ratios
        return cls(model.eval(), reference, method, numerics, temperature, halves)

    def merged_model(self, path: Path, trained: Any) -> "PreTrainedModel":
        """Return a trained model as a plain causal model, adapters merged; `path` is the folder it was loaded from."""
        for name in (VALUE_HEAD, CRITIC):
            if hasattr(trained, name):
                delattr(trained, name)
        return methods.merge(trained, self.method, lambda: models.load_decoder(path, self.numerics))

    def merged_state_dict(self, path: Path) -> "dict[str, torch.Tensor]":
        """Return the current state dict of `merged_model`, tied weights under each of their names.

        The policy does not change. The tensors may share memory with the weights in training.
        """
        plain = methods.merge(self.model, self.method, lambda: models.load_decoder(path, self.numerics))
        added = (f"{VALUE_HEAD}.", f"{CRITIC}.")
        return {name: value for name, value in plain.state_dict().items() if not name.startswith(added)}

    def parts(
        self, ids: "torch.Tensor", mask: "torch.Tensor", width: int, states: "torch.Tensor | None" = None
    ) -> "Iterator[Part]":
        """Yield micro-batches of replies of similar length, trimmed to the padding that they need.

        `ids` and `mask` are (N, P + R): prompts padded on the left, then replies of up to `width` = R tokens. `states`
        is (N, P + R, D), the result of `frozen_states` for them, or None.
        """
        ends = mask.shape[1] - mask.flip(1).long().argmax(1)  # (N,) end position of each reply
        for rows in ends.argsort(stable=True).split(chat.MICROBATCH_ROWS):
            first, end = int(mask[rows].any(0).long().argmax()), int(ends[rows].max())
            part_states = None if states is None else states[rows, first:end]
            yield Part(rows, ids[rows, first:end], mask[rows, first:end], end - (ids.shape[1] - width), part_states)

    def frozen_states(self, ids: "torch.Tensor", mask: "torch.Tensor", width: int) -> "torch.Tensor | None":
        """Return the input states (N, P + R, D) of the trained blocks; None unless all blocks below are frozen."""
        import torch

        if self.halves is None:
            return None
        lower = self.halves.lower
        states_buffer = ids.new_zeros((*ids.shape, self.model.config.hidden_size), dtype=torch.float)
        with torch.no_grad(), models.autocast(self.model, self.numerics):
            for part in self.parts(ids, mask, width):
                end = ids.shape[1] - width + part.width
                states = lower(**part.model_inputs, use_cache=False).last_hidden_state
                states_buffer[part.rows, end - states.shape[1] : end] = states.float()
        return states_buffer

    def forward(self, part: "Part", *, entropy: bool = False) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Return log-probabilities, values and entropies (nats) of a part's reply tokens, each (B, part.width).

        The token at position t is predicted and valued from the state at t - 1, at the sampling temperature.
        Entropies are 0 without `entropy`, values are 0 without a value head.
        """
        import torch

        model, inputs = (self.halves.upper, part.upper_inputs) if self.halves else (self.model, part.model_inputs)
        with models.autocast(self.model, self.numerics):
            out = model(**inputs, logits_to_keep=part.logit_positions, output_hidden_states=True, use_cache=False)
            states = out.hidden_states[-1]
            if hasattr(self.model, CRITIC):
                states = self.model.critic(**part.model_inputs, use_cache=False).last_hidden_state
        states = states[:, part.logit_positions].float()
        values = states.new_zeros(states.shape[:-1])
        if hasattr(self.model, VALUE_HEAD):
            values = self.model.value_head(states)[..., 0]
        logp, token_entropy = self._log_probabilities(out.logits, part, entropy=entropy)
        return logp, values, torch.zeros_like(logp) if token_entropy is None else token_entropy

    def reference_logp(self, part: "Part") -> "torch.Tensor":
        """Return the log-probabilities of a part's reply tokens under the reference, (B, part.width)."""
        model = self.model if self.reference is None else self.reference
        inputs = part.model_inputs if self.halves is None else part.upper_inputs
        with self.adapters_disabled(), models.autocast(model, self.numerics):
            logits = model(**inputs, logits_to_keep=part.logit_positions, use_cache=False).logits
        return self._log_probabilities(logits, part, entropy=False)[0]

    def assemble(
        self, prompts: Sequence[list[int]], replies: Sequence[list[int]], pad_id: int
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Return ids and attention mask (N, P + R), prompts padded left and replies right, and reply mask (N, R)."""
        import torch

        device = next(self.model.parameters()).device
        prompt_ids, prompt_mask = chat.pad_batch(prompts, pad_id, device, left=True)
        reply_ids, reply_mask = chat.pad_batch(replies, pad_id, device)
        return torch.cat([prompt_ids, reply_ids], 1), torch.cat([prompt_mask, reply_mask], 1).bool(), reply_mask.bool()

    def score_rollout(self, ids: "torch.Tensor", mask: "torch.Tensor", reply_mask: "torch.Tensor") -> "RolloutScores":
        """Return the log-probabilities, values and entropies of the replies that `assemble` returned."""
        import torch

        width = reply_mask.shape[1]
        states = self.frozen_states(ids, mask, width)
        logp, values, entropy, reference = (torch.zeros((len(ids), width), device=ids.device) for _ in range(4))
        with torch.no_grad():
            for part in self.parts(ids, mask, width, states):
                part_scores = (*self.forward(part, entropy=True), self.reference_logp(part))
                for scores, part_score in zip((logp, values, entropy, reference), part_scores, strict=True):
                    scores[part.rows, : part.width] = part_score
        return RolloutScores(
            logp * reply_mask, values * reply_mask, entropy * reply_mask, reference * reply_mask, states
        )

    def generate(
        self, tokenizer: "PreTrainedTokenizerFast", prompts: Sequence[list[int]], *, max_new_tokens: int,
        temperature: float, seed: int, max_active: Callable[[int], int] = sampling.single_process,
    ) -> list[list[int]]:  # fmt: skip
        """Return the policy's reply to each prompt (see `sampling.generate_replies`), adapters merged for speed."""
        merged_adapters = (
            nullcontext() if self.numerics.parallel.lockstep else methods.adapters_merged(self.model, self.method)
        )
        with merged_adapters:
            return sampling.generate_replies(
                self.model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                numerics=self.numerics, max_active=max_active,
            )  # fmt: skip

    def weights(self) -> "dict[str, torch.Tensor]":
        """Return a copy of the trainable weights, or of this process's shards of them."""
        return {name: value.clone() for name, value in trainable_weights(self.model).items()}

    def load_weights(self, weights: "dict[str, torch.Tensor]") -> None:
        """Replace the trainable weights."""
        for name, value in trainable_weights(self.model).items():
            value.copy_(weights[name])

    @contextmanager
    def freeze_policy(self) -> Iterator[None]:
        """Freeze the policy's weights, so that an optimizer step moves only the value function.

        Their gradients are set to None: with a gradient of zeros weight decay would still move them.
        """
        frozen = [
            weight for name, weight in self.model.named_parameters()
            if weight.requires_grad and not name.startswith((f"{VALUE_HEAD}.", f"{CRITIC}."))
        ]  # fmt: skip
        for weight in frozen:
            weight.grad = None
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in frozen:
                weight.requires_grad_(True)

    @contextmanager
    def adapters_disabled(self) -> Iterator[None]:
        """Disable the adapters if policy and reference share a backbone."""
        with nullcontext() if self.reference is not None else self.model.disable_adapter():
            yield

    def _log_probabilities(
        self, logits: "torch.Tensor", part: "Part", *, entropy: bool
    ) -> tuple["torch.Tensor", "torch.Tensor | None"]:
        """Return the part's log-probabilities, and with `entropy` the entropies of the distributions, (B, width)."""
        scaled = logits.float()  # (B, width, V)
        if self.temperature != 1:
            scaled = scaled / self.temperature
        return estimates.log_probabilities(scaled, part.ids[:, -part.width :], entropy=entropy)


@dataclass(frozen=True)
class RolloutScores:
    """Scores of an iteration's replies before the update, each (N, R) and 0 at padding."""

    logp: "torch.Tensor"  # log-probability under the policy
    values: "torch.Tensor"
    entropy: "torch.Tensor"  # nats
    reference: "torch.Tensor"  # log-probability under the reference
    states: "torch.Tensor | None"  # (N, P + R, D) from `Policy.frozen_states`


@dataclass(frozen=True)
class Part:
    """A micro-batch of replies without superfluous padding."""

    rows: "torch.Tensor"  # (B,) their indices in the full batch
    ids: "torch.Tensor"  # (B, T)
    mask: "torch.Tensor"  # (B, T)
    width: int  # tokens of the longest of these replies; the last columns of `ids`
    states: "torch.Tensor | None" = None  # (B, T, D) from `Policy.frozen_states`

    @property
    def logit_positions(self) -> "torch.Tensor":
        """The positions (width,) whose logits predict the reply tokens: one before each token.

        Indexing with a tensor makes the selected states contiguous, so the head is one matmul and not one per row.
        """
        import torch

        end = self.ids.shape[1] - 1
        return torch.arange(end - self.width, end, device=self.ids.device)

    @property
    def model_inputs(self) -> dict[str, "torch.Tensor"]:
        """The arguments of a forward pass of the whole model."""
        return {"input_ids": self.ids, **self._position_inputs}

    @property
    def upper_inputs(self) -> dict[str, Any]:
        """The arguments of a forward pass of the upper half."""
        return {"inputs_embeds": self.states, **self._position_inputs}

    @property
    def _position_inputs(self) -> dict[str, "torch.Tensor"]:
        positions = (self.mask.long().cumsum(1) - 1).clamp(min=0)
        return {"attention_mask": self.mask.long(), "position_ids": positions}
