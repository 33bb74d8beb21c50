"""Kind, size and context length of the graph's models, inferred from settings before any model exists.

For a folder of the user's they come from its config.json. If that is missing or incomplete they are unknown, and the
stage that reads the folder reports the problem.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.common import model_folder
from tasks.common.model_graph import Params, entries_of, lookup
from tasks.common.settings import ENTRY_STAGES

CONFIG_KEYS = {  # a size, and its keys in a Transformers config.json
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
}
HEAD_TASKS = ("classification", "regression")  # of finetune


@dataclass(frozen=True)
class Producer:
    """The entry that produces a folder."""

    stage: str
    key: str
    settings: Mapping[str, Any]

    @property
    def where(self) -> str:
        """The path of its settings: `finetune.chat`."""
        return f"{self.stage}.{self.key}"


@dataclass(frozen=True)
class ModelKinds:
    """Kinds and sizes of models by their folders, for given settings."""

    params: Params

    def producer(self, folder: Any) -> Producer | None:
        """Return the entry that produces a folder; None if no entry does."""
        parts = str(folder).split("/")
        if len(parts) != 4 or parts[0] != "data" or parts[3] != "model" or parts[1] not in ENTRY_STAGES[:-1]:
            return None
        entry = entries_of(self.params, parts[1]).get(parts[2])
        return Producer(parts[1], parts[2], entry) if isinstance(entry, Mapping) else None

    def chain(self, folder: Any) -> list[Producer]:
        """Return the entry that produces a folder and its ancestors, the first ancestor last."""
        found: list[Producer] = []
        while (producer := self.producer(folder)) and producer not in found:
            found.append(producer)
            folder = parent_of(producer)
        return found

    def root(self, folder: Any) -> str:
        """Return the folder of the user's that a model descends from; "" if it is trained from scratch."""
        lineage = self.chain(folder)
        if not lineage:
            return str(folder)
        new = lineage[-1].stage == "pretrain" and lookup(lineage[-1].settings, "model.name") == "new"
        return "" if new else str(parent_of(lineage[-1]))

    def kind(self, folder: Any) -> str | None:
        """Return a model's kind: causal, masked, classification, regression, reward or engine; None if unknown."""
        for producer in self.chain(folder):
            if producer.stage in ("reward", "quantize"):
                return {"reward": "reward", "quantize": "engine"}[producer.stage]
            if producer.stage == "pretrain":
                return str(lookup(producer.settings, "objective"))
            if (task := lookup(producer.settings, "task.name")) in HEAD_TASKS:
                return str(task)
        return _kind_of(self.root(folder))

    def gives_replies(self, folder: Any) -> bool:
        """Return whether a model, exported or not, may answer conversations: it has no head and is not masked."""
        root, chain = self.root(folder), self.chain(folder)
        if any(lookup(producer.settings, "task.name") in HEAD_TASKS for producer in chain):
            return False
        kind = model_folder.kind_of(config_of_folder(root)) if root else lookup(chain[-1].settings, "objective")
        return kind not in ("masked", "classifier")

    def size(self, folder: Any, name: str) -> tuple[str, Any]:
        """Return the setting of a model's size and its value; the value is None if unknown."""
        root = self.root(folder)
        if root:
            config = config_of_folder(root)
            if name == "positions":
                found = model_folder.context_length(config)
            else:
                found = next((config[key] for key in CONFIG_KEYS[name] if key in config), None)
            return f"{name} in {root}/config.json", found
        producer = self.chain(folder)[-1]
        return f"{producer.where}.model.{name}", lookup(producer.settings, f"model.{name}")

    def has_mask_token(self, folder: Any) -> bool | None:
        """Return whether the tokenizer of a model has a mask token; None if unknown."""
        root = "" if folder == "data/tokenize/tokenizer" else self.root(folder)
        if not root and lookup(self.params, "tokenize.tokenizer.name") == "train":
            return True  # the project's own tokenizers have one
        return _has_mask_token(root or str(lookup(self.params, "tokenize.tokenizer.path")))

    def context(self, folder: Any) -> tuple[str, Any]:
        """Return the setting of a model's context length and its value in tokens; the value is None if unknown."""
        pretrained = any(producer.stage == "pretrain" for producer in self.chain(folder))
        return (
            ("tokenize.context", lookup(self.params, "tokenize.context"))
            if pretrained
            else self.size(folder, "positions")
        )


def parent_of(producer: Producer) -> Any:
    """Return the folder that an entry's model starts from."""
    return lookup(producer.settings, "model.path" if producer.stage == "pretrain" else "model")


def _kind_of(folder: str) -> str | None:
    """Return causal or masked for a language model in a folder of the user's; None for any other, and if unknown."""
    kind = model_folder.kind_of(config_of_folder(folder))
    return kind if kind in ("causal", "masked") else None


def _has_mask_token(folder: str) -> bool | None:
    """Return whether a folder's tokenizer names a mask token; None if its files name no special token.

    Then it has those of its class in Transformers, as BERT's folder on the Hugging Face hub.
    """
    named = model_folder.special_tokens(Path(folder))
    return bool(named.get("mask_token")) if named else None


def config_of_folder(folder: str) -> dict[str, Any]:
    """Return a folder's config.json, an adapter's from its base model; {} if it is missing or unreadable."""
    return model_folder.read_json(model_folder.base_of(Path(folder)) / model_folder.CONFIG) if folder else {}
