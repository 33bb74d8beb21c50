"""The pipeline for what the user brings: entries of `params.yaml` with sizes that fit the data and this machine.

Rates and batches are the usual ones of the literature for models of these sizes; steps are as many as the data has
epochs for, but no more than fit into `STAGE_MINUTES` on this machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from flows.start import gates
from flows.start.brought import CHARACTERS_PER_TOKEN, Brought, Table
from flows.start.checkpoint import Checkpoint
from flows.start.machine import Machine
from tasks.common.settings import BessemerError
from tasks.common.source_names import fill_names
from tasks.ingest.settings import Heldout
from tasks.reward.stage import MAX_NORMALIZATION_RESPONSES

# The options of the command, and the table that each fills.
OPTIONS = {"text": "corpus", "conversations": "instructions", "preferences": "rankings", "labels": "labels"}
STAGE_MINUTES = 10  # of one training stage on this machine, at most, as init proposes it
EPOCHS = {"pretrain": 8.0, "continue": 1.0, "finetune": 3.0, "labels": 3.0, "reward": 2.0, "dpo": 1.0}
LARGE_MODEL = 30_000_000  # parameters above which low-rank updates are trained instead of all weights
SHAPES = (  # most characters of the corpus, and the shape of a new model: hidden, layers, heads, vocabulary, window
    (3e6, (192, 4, 4, 4096, 64)),
    (3e7, (256, 6, 4, 8192, 128)),
    (float("inf"), (384, 8, 6, 16384, 256)),
)
HELDOUT_LARGE = 32  # held-out conversations whose loss a large model reports before and after fine-tuning
HELDOUT_ROWS = 10  # rows of a table that are held out of training at least, if that is at most MAX_HELDOUT_SHARE
MAX_HELDOUT_SHARE = 0.25
CLASSIFIERS = ("labels", "classifier")  # in the scorecard: models with a head, before and after export
JUDGE_STEPS = 3 / 7  # of the reward model's: it learns from three in ten rankings by default
MAX_TOKENS = 512  # of a conversation in training, where the checkpoint allows more


@dataclass
class Design:
    """Sections of `params.yaml`, what to know about them, and the estimated seconds of each stage."""

    sections: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Designer:
    """Builds the graph step by step; the folders are those of the last models so far."""

    def __init__(self, brought: Brought, machine: Machine) -> None:
        self.brought, self.machine, self.design = brought, machine, Design()
        self.model = self.encoder = self.classifier = ""
        self.parameters = 0
        self.context = 0

    @property
    def low_rank(self) -> bool:
        """Whether low-rank updates are trained instead of all weights."""
        return self.parameters > LARGE_MODEL

    def add(self, section: str, name: str, entry: dict[str, Any]) -> str:
        """Add an entry and return the folder of its model."""
        self.design.sections.setdefault(section, {})[name] = entry
        return f"data/{section}/{name}/model"

    def steps(self, stage: str, epochs: float, table: Table, batch: int, tokens_per_row: float) -> int:
        """Return the steps of some epochs, or fewer if they would take longer than STAGE_MINUTES."""
        wanted = max(1, ceil(table.rows * epochs / batch))
        frozen = self.low_rank
        per_step = self.machine.training_seconds(self.parameters, batch * tokens_per_row, frozen=frozen)
        affordable = max(10, int(STAGE_MINUTES * 60 / max(per_step, 1e-9)))
        steps = min(wanted, affordable)
        self.design.seconds[stage] = steps * per_step
        if steps < wanted:
            self.design.notes.append(
                f"{stage} takes {steps:,} steps, {steps * batch / table.rows:.2g} epochs, to end within about "
                f"{STAGE_MINUTES} minutes here; {epochs:g} epoch{'s' * (epochs != 1)} would be {wanted:,} steps"
            )
        return steps

    def optimizer(self, full: float, low_rank: float) -> dict[str, Any]:
        """Return AdamW with the rate for full training, or for low-rank updates."""
        return {"name": "adamw", "learning_rate": low_rank if self.low_rank else full}

    def method(self) -> dict[str, Any]:
        """Return the setting `method`, where it is not the default."""
        return {"method": {"name": "lora"}} if self.low_rank else {}

    def template(self, model: str) -> dict[str, Any]:
        """Return the setting `chat_template` for training a model that comes from a causal checkpoint without one."""
        checkpoint = self.brought.checkpoint
        trained = model.startswith(("data/finetune/", "data/align/"))  # it has one by now
        without = checkpoint is not None and checkpoint.kind == "causal" and not checkpoint.chat_template
        return {"chat_template": "plain"} if without and not trained else {}

    def sources(self, table: str) -> dict[str, Any]:
        """Return the setting `sources` that tells conversations from labelled texts, where the project has both."""
        tables = self.brought.tables
        if not {"instructions", "labels"} <= tables.keys():
            return {}
        named = iter(fill_names([source for one in tables.values() for source in one.sources]))
        names = {name: [next(named)["name"] for _ in one.sources] for name, one in tables.items()}
        return {"sources": names[table]}

    def evaluation_template(self) -> dict[str, Any]:
        """Return the setting `chat_template` with which the model before training is compared with the trained one."""
        entries = [self.design.sections.get(section, {}) for section in ("finetune", "align")]
        templates = [entry["chat_template"] for one in entries for entry in one.values() if "chat_template" in entry]
        return {"chat_template": templates[0]} if templates else {}

    def start_from_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Take the user's checkpoint as the model so far."""
        folder = checkpoint.folder
        if checkpoint.archive:
            self.design.sections["ingest"]["checkpoint"] = dict(checkpoint.archive)
        self.parameters, self.context = checkpoint.parameters, checkpoint.context
        if checkpoint.kind == "masked":
            self.encoder = folder
        elif checkpoint.kind == "classifier":
            self.classifier = folder
        else:
            self.model = folder
        context = min(checkpoint.context, MAX_TOKENS)
        self.design.sections["tokenize"] = {"tokenizer": {"name": "from", "path": folder}, "context": context}

    def pretrain(self, corpus: Table) -> None:
        """Train a new model on the corpus, or continue the checkpoint's training."""
        start = self.model or self.encoder
        if start:
            window = min(self.context, 256)
            model: dict[str, Any] = {"name": "from", "path": start}
            rate, epochs, batch = 5.0e-5, EPOCHS["continue"], 8
        else:
            characters = corpus.rows * corpus.mean_characters
            hidden, layers, heads, vocabulary, window = next(shape for most, shape in SHAPES if characters <= most)
            self.context = 256
            tokenizer = {"name": "train", "path": "data/validate/instructions", "vocabulary": vocabulary}
            self.design.sections["tokenize"] = {"tokenizer": tokenizer, "context": self.context}
            shape = {"hidden": hidden, "layers": layers, "heads": heads, "feed_forward": 4 * hidden}
            model = {"name": "new", "path": "data/tokenize/tokenizer", **shape}
            self.parameters = vocabulary * hidden + layers * (4 * hidden**2 + 3 * hidden * 4 * hidden)
            rate, epochs, batch = 2.0e-3, EPOCHS["pretrain"], 32
        objective = "masked" if self.encoder or (self.brought.encoder and not self.model) else "causal"
        windows = Table(ceil(corpus.tokens / window), window * CHARACTERS_PER_TOKEN, 0, ())
        entry = {
            "objective": objective, "model": model, "window": window, "batch": batch,
            "steps": self.steps(f"pretrain@{objective}", epochs, windows, batch, window), "mixture": {"prose": 1.0},
            "optimizer": {"name": "adamw", "learning_rate": rate},
        }  # fmt: skip
        folder = self.add("pretrain", objective, entry)
        if objective == "masked":
            self.encoder = folder
        else:
            self.model = folder

    def finetune(self, conversations: Table) -> None:
        """Fine-tune the causal model on the conversations."""
        longest = min(self.context, MAX_TOKENS)
        tokens = min(conversations.mean_characters / CHARACTERS_PER_TOKEN, longest)
        entry = {
            "model": self.model, **self.sources("instructions"), **self.template(self.model), **self.method(),
            "max_tokens": longest,
            "too_long": "truncate", **({"heldout": HELDOUT_LARGE} if self.low_rank else {}), "batch": 8,
            "steps": self.steps("finetune@chat", EPOCHS["finetune"], conversations, 8, tokens),
            "optimizer": self.optimizer(3.0e-4, 2.0e-4),
        }  # fmt: skip
        self.model = self.add("finetune", "chat", entry)

    def classify(self, labels: Table, model: str) -> None:
        """Train a classifier of the labels on a model without a head."""
        tokens = min(labels.mean_characters / CHARACTERS_PER_TOKEN, self.context, MAX_TOKENS)
        entry = {
            "model": model, **self.sources("labels"), **self.template(model), "task": dict(labels.task),
            **self.method(),
            "max_tokens": min(self.context, MAX_TOKENS), "too_long": "truncate", "batch": 16,
            "steps": self.steps("finetune@labels", EPOCHS["labels"], labels, 16, tokens),
            "optimizer": self.optimizer(1.0e-4, 5.0e-4),
        }  # fmt: skip
        self.classifier = self.add("finetune", "labels", entry)

    def align_by_ppo(self, rankings: Table) -> None:
        """Train a reward model and a judge, and optimize the policy with PPO."""
        longest = min(self.context, MAX_TOKENS)
        tokens = 2 * min(rankings.mean_characters / CHARACTERS_PER_TOKEN, longest)
        reward = {
            "role": "train", "model": self.model, **self.method(), "max_tokens": longest, "batch": 8,
            "steps": self.steps("reward@train", EPOCHS["reward"], rankings, 8, tokens),
            "optimizer": self.optimizer(1.0e-4, 2.0e-4),
        }  # fmt: skip
        path = self.add("reward", "train", reward)
        self.add("reward", "judge", {**reward, "role": "judge"})
        scored = min(MAX_NORMALIZATION_RESPONSES, 2 * rankings.rows) + 2 * rankings.rows * Heldout().rankings
        scoring = self.machine.scoring_seconds(self.parameters, scored * tokens / 2)
        training = self.design.seconds["reward@train"]
        self.design.seconds["reward@train"] = training + scoring
        self.design.seconds["reward@judge"] = training * JUDGE_STEPS + scoring
        episodes, new_tokens = 32, min(64, self.context // 2)
        per_iteration = episodes * (
            self.machine.sampling_seconds(self.parameters, new_tokens)
            + self.machine.training_seconds(self.parameters, 4 * longest / 2, frozen=self.low_rank)
        )
        iterations = max(4, min(30, int(STAGE_MINUTES * 60 / per_iteration)))
        self.design.seconds["align@policy"] = iterations * per_iteration
        entry = {
            "model": self.model, **self.sources("instructions"), "algorithm": {"name": "ppo", "epochs": 2},
            **self.method(),
            "reward": {"name": "model", "path": path, "normalized": True}, "iterations": iterations,
            "episodes": episodes, "minibatch": 16, "max_new_tokens": new_tokens,
            "optimizer": self.optimizer(1.0e-5, 1.0e-4),
        }  # fmt: skip
        self.model = self.add("align", "policy", entry)

    def align_by_dpo(self, rankings: Table) -> None:
        """Train the policy on the preference pairs themselves."""
        tokens = 2 * min(rankings.mean_characters / CHARACTERS_PER_TOKEN, self.context)
        pairs = 16
        updates = self.steps("align@policy", EPOCHS["dpo"], rankings, pairs, 2 * tokens)
        entry = {
            "model": self.model, **self.sources("instructions"), **self.template(self.model),
            "algorithm": {"name": "dpo"}, **self.method(),
            "reward": {"name": "rankings", "path": "data/validate/rankings", "judge_share": 0.0},
            "iterations": updates, "episodes": 2 * pairs, "minibatch": 2 * pairs,
            "max_new_tokens": min(64, self.context // 2), "optimizer": self.optimizer(5.0e-6, 5.0e-5),
        }  # fmt: skip
        self.model = self.add("align", "policy", entry)


def design(brought: Brought, machine: Machine) -> Design:
    """Return the pipeline for what the user brings. Raises BessemerError if nothing can be made of it."""
    _check(brought)
    builder, tables = Designer(brought, machine), brought.tables
    builder.design.sections["ingest"] = {
        **heldout_shares(tables),
        "sources": [source for table in tables.values() for source in table.sources],
    }
    if brought.checkpoint:
        builder.start_from_checkpoint(brought.checkpoint)
    if "corpus" in tables:
        builder.pretrain(tables["corpus"])
    evaluated = {"start": builder.model or builder.encoder or builder.classifier}
    if "instructions" in tables:
        builder.finetune(tables["instructions"])
        evaluated["tuned"] = builder.model
    if "rankings" in tables:
        by_ppo = brought.align == "ppo" and "instructions" in tables
        (builder.align_by_ppo if by_ppo else builder.align_by_dpo)(tables["rankings"])
        evaluated["policy"] = builder.model
    parts = {"chat": builder.model, "encoder": builder.encoder, "classifier": builder.classifier}
    if not tables:
        evaluated = {}  # a given model is exported and served as it is
    if "labels" in tables:
        builder.classify(tables["labels"], builder.encoder or evaluated["start"])
        # Whoever brings labels asks for a classifier; the model that it starts from is served if it learnt to answer.
        if tables.keys().isdisjoint(("instructions", "rankings")):
            parts, evaluated = {}, {}
        parts, evaluated = parts | {"classifier": builder.classifier}, evaluated | {"labels": builder.classifier}
    parts = {part: folder for part, folder in parts.items() if folder}
    builder.design.sections |= shared_sections(machine)
    builder.design.sections |= ending(evaluated, parts, builder.context, large=builder.low_rank)
    for name, entry in builder.design.sections["evaluate"].items():
        entry |= builder.sources("labels" if name in CLASSIFIERS else "instructions")
        entry |= builder.evaluation_template() if name == "start" else {}
    proposed = []
    if "chat" in parts:
        builder.design.seconds["evaluate"] = sum(
            machine.sampling_seconds(builder.parameters, 2 * entry["samples"] * entry["max_new_tokens"])
            for entry in builder.design.sections["evaluate"].values()
            if "samples" in entry
        )
        rows = {name: table.rows for name, table in tables.items()}
        models = [name for name in evaluated if name != "labels"]
        dpo = "rankings" in tables and "reward" not in builder.design.sections
        proposed += gates.propose(rows, models, dpo=dpo)
    if "labels" in tables:
        proposed += gates.propose_for_labels(tables["labels"].rows, str(tables["labels"].task.get("name")))
    builder.design.sections["compare"] = {"gates": proposed}
    return builder.design


def heldout_shares(tables: Mapping[str, Table]) -> dict[str, Any]:
    """Return the setting `heldout` where the default share would hold out less than about `HELDOUT_ROWS` rows."""
    fields = {"corpus": "prose", "instructions": "entities", "labels": "entities", "rankings": "rankings"}
    defaults = Heldout()
    shares = {
        fields[name]: min(MAX_HELDOUT_SHARE, ceil(100 * HELDOUT_ROWS / table.rows) / 100)
        for name, table in tables.items()
        if table.rows * getattr(defaults, fields[name]) < HELDOUT_ROWS
    }
    return {"heldout": shares} if shares else {}


def shared_sections(machine: Machine) -> dict[str, Any]:
    """Return the sections that do not depend on the data."""
    return {"base": {"seed": 1}, "numerics": {"device": machine.device, "threads": machine.cores}}


def ending(evaluated: Mapping[str, str], parts: Mapping[str, str], context: int, *, large: bool) -> dict[str, Any]:
    """Return the sections that export, evaluate and package models.

    `evaluated` has the folders of the models before the export by their names in the scorecard, `parts` those to
    package. A large model takes long to answer on a CPU, so it answers fewer questions. An export with nothing to
    compare it with has no scorecard.
    """
    reply = {"max_new_tokens": min(MAX_TOKENS, context // 2)}
    exported = {part: f"data/quantize/{part}/model" for part in parts}
    models = {**evaluated, **exported} if evaluated else {}
    items = 100 if large else 300
    size = {"questions": items, "samples": items, "max_new_tokens": min(64, context // 2)} if "chat" in parts else {}
    return {
        "quantize": {part: {"model": parts[part], **(reply if part == "chat" else {})} for part in parts},
        "evaluate": {
            name: {"model": folder, **({} if name in CLASSIFIERS else size)} for name, folder in models.items()
        },
        "package": exported,
    }


def _check(brought: Brought) -> None:
    """Raise BessemerError if no model can be made of what there is."""
    checkpoint, tables = brought.checkpoint, brought.tables
    if not checkpoint and "corpus" not in tables:
        named = ", ".join(f"--{name}" for name in OPTIONS if OPTIONS[name] in tables)
        if not named:
            raise BessemerError(
                "Nothing to start from is named: add --checkpoint (a Transformers folder), --text, --conversations, "
                "--preferences or --labels (your files), or --from (a configuration of another tool)."
            )
        raise BessemerError(
            f"{named} alone gives no model to start from: add --checkpoint (a Transformers folder), or "
            "--text to train a new model."
        )
    if checkpoint and checkpoint.kind == "masked" and not {"instructions", "rankings"}.isdisjoint(tables):
        raise BessemerError(
            f"{checkpoint.path} is a masked model, which cannot answer conversations: use a causal model, or leave "
            "out --conversations and --preferences."
        )
    if checkpoint and checkpoint.kind == "classifier" and tables:
        raise BessemerError(
            f"{checkpoint.path} is a classifier already, which is served as it is: leave out the data, or start from "
            "the encoder or the causal model that it was trained from."
        )
