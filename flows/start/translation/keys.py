"""Reads another tool's configuration key by key, and keeps count of the keys that were read."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flows.start.translation.result import Line

Reason = tuple[str, str]  # why a key is not translated, and what to do instead
Table = Mapping[str, Reason]  # by key; a name that ends with `_` stands for all keys that begin with it
OTHER_METHOD: Reason = ("this variant of the method is not available", "train without it")
OTHER_LOSS: Reason = ("this loss is not available", "leave it out")
OWN_WEIGHTS: Reason = ("a checkpoint's weights are kept", "use pretrain with model: {name: new}")
OWN_LAYERS: Reason = ("layers beside the low-rank updates are not trained", "use method full or top_layers")
QUANTIZED: Reason = ("a quantized checkpoint is not trained", "start from the full-precision checkpoint")
HELD_OUT: Reason = ("rows are held out by a hash of their own", "list the file as a source, with a column split")
ALL_STEPS: Reason = ("training runs for its steps", "set steps")
PROCESSES: Reason = (
    "how many processes share a model depends on your machine",
    "set numerics.parallel (docs/guides/distributed.md)",
)
_FLOAT8: Reason = ("there is no training in float8", "numerics.dtype.decoder: bfloat16 is used")
UNSUPPORTED_BY_BOTH: Table = {  # keys that LLaMA-Factory and axolotl share
    "trust_remote_code": ("code of a checkpoint is never run", "use a checkpoint that Transformers knows"),
    "rope_scaling": ("the positions of a checkpoint stay as they are", "change its config.json first"),
    "loraplus_": OTHER_METHOD,
    "dpo_label_smoothing": ("this is cDPO's loss", "loss: {name: robust, flipped: ...} is the nearest"),
    "simpo_gamma": OTHER_LOSS,
    "kto_": OTHER_LOSS,
    "neftune_": ("noise on embeddings is not available", "leave it out"),
    "label_smoothing_factor": ("fine-tuning has no label smoothing", "leave it out"),
    "fp8": _FLOAT8,
    "fp8_": _FLOAT8,
    "load_best_model_at_end": ("the weights of the last step are saved", "set steps"),
    "deepspeed": PROCESSES,
    "fsdp": PROCESSES,
    "fsdp_": PROCESSES,
}
WITHOUT_EFFECT_IN_BOTH = (
    "output_dir", "save_", "eval_steps", "eval_strategy", "metric_for_best_model", "greater_is_better", "swanlab_",
    "use_swanlab", "trackio_", "hub_", "low_cpu_mem_usage", "torch_compile", "tf32", "remove_unused_columns",
    "dataloader_", "ddp_", "profiler_", "resume_from_checkpoint", "streaming",
)  # fmt: skip
# YAML 1.1, which the tools use, reads these words as truth values.
TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Keys:
    """The keys of a mapping. What is taken counts as translated; the rest is sorted by `leave`."""

    def __init__(self, content: Mapping[str, Any], where: str = "") -> None:
        self.content, self.where = content, where
        self.untranslated: list[Line] = []
        self.without_effect: list[str] = []
        self.problems: list[str] = []
        self._taken: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default where it is absent or null."""
        self._taken.add(key)
        value = self.content.get(key)
        return default if value is None else value

    def number(self, key: str, default: float, *, positive: bool = False) -> float:
        """Return a number; any other value is a problem."""
        return self._check_sign(key, float(self._convert(key, default, _to_float, "a number")), default, positive)

    def integer(self, key: str, default: int, *, positive: bool = False) -> int:
        """Return a whole number; any other value is a problem."""
        value = int(self._convert(key, default, _to_integer, "a whole number"))
        return int(self._check_sign(key, value, default, positive))

    def _check_sign(self, key: str, value: float, default: float, positive: bool) -> float:
        if positive and value <= 0:
            self.report(key, f"found {value:g}, expected a number above 0")
            return default
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false; any other value is a problem."""
        return bool(self._convert(key, default, _to_flag, "true or false"))

    def text(self, key: str, default: str | None = None) -> str | None:
        """Return a text; a list or a mapping is a problem."""
        value: str | None = self._convert(key, default, _to_text, "a text")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping, empty where the key is absent; any other value is a problem."""
        found: dict[str, Any] = self._convert(key, {}, _to_mapping, "settings by name")
        return found

    def _convert(self, key: str, default: Any, convert: Callable[[Any], Any], expected: str) -> Any:
        value = self.take(key)
        if value is None:
            return default
        try:
            return convert(value)
        except (TypeError, ValueError, KeyError, OverflowError):
            self.report(key, f"found {value!r}, expected {expected}")
            return default

    def report(self, key: str, text: str) -> None:
        """Add a problem with a key."""
        self.problems.append(f"{self.where}{key}: {text}")

    def refuse(self, key: str, why: str, instead: str) -> None:
        """Name a key as not translated."""
        self._taken.add(key)
        self.untranslated.append(Line(f"{self.where}{key}", self.content.get(key), why, instead))

    def leave(self, without_effect: Iterable[str], unsupported: Table) -> None:
        """Sort the keys that were not taken; an entry that ends with `_` stands for all keys that begin with it."""
        effectless = tuple(without_effect)
        for key, value in self._unread():
            reason = next((text for name, text in unsupported.items() if _covers(name, key)), None)
            switched_off = value is None or (reason is not None and value in (False, "", 0, [], {}))
            if switched_off or any(_covers(name, key) for name in effectless):
                self.without_effect.append(f"{self.where}{key}")
            elif reason is not None:
                self.refuse(key, *reason)
            else:
                self.refuse(key, "this setting is unknown here", "see docs/reference/settings.md for what there is")

    def adopt(self, nested: "Keys") -> None:
        """Take over what was found in a mapping within this one."""
        self.untranslated += nested.untranslated
        self.without_effect += nested.without_effect
        self.problems += nested.problems

    def _unread(self) -> Iterator[tuple[str, Any]]:
        return ((key, value) for key, value in self.content.items() if key not in self._taken)


def _covers(name: str, key: str) -> bool:
    return key == name or (name.endswith("_") and key.startswith(name))


def _to_float(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError
    return number


def _to_integer(value: Any) -> int:
    number = _to_float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _to_flag(value: Any) -> bool:
    return value if isinstance(value, bool) else TRUTHS[str(value).lower()]


def _to_mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise TypeError
    return value


def _to_text(value: Any) -> str:
    if isinstance(value, list | dict):
        raise TypeError
    return str(value)
