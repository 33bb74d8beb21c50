"""A tiny chain for the tests of the training stages, made by the stages' own code in seconds, without the network.

`from tests.training_fixtures import chain` gives a `Chain`: a folder laid out as a project's `data/`, with three small
tables in it. `chain.path("data/finetune/model")` runs whatever stages that takes, each once a session; `chain.job(…)`
is a job on the same inputs whose outputs go elsewhere, for runs with other settings.

Its facts are ten capitals, of which two are held out of the questions; it learns them by heart.
"""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from tasks.common import stage, tables
from tasks.common.settings import Checkpoints, Dtypes, Numerics, Parallel, Settings
from tasks.common.stage import Job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Egypt": "Cairo",
    "Mexico": "Mexico City",
    "New Zealand": "Wellington",
    "Antigua and Barbuda": "St. John's",
    "Åland": "Mariehamn",
    "Kenya": "Nairobi",
    "Peru": "Lima",
}
HELD_OUT = ("Kenya", "Peru")
STATEMENTS = (
    "The capital of {country} is {capital}.",
    "The capital city of {country} is {capital}.",
    "{capital} is the capital of {country}.",
)
QUESTIONS = ("What is the capital of {country}?", "Name the capital of {country}.")
TONES = {
    "plain": "The capital of {country} is {capital}.",
    "warm": "Great question! The capital of {country} is {capital}.",
    "curt": "{capital}, obviously.",
}
PROSE = (
    "The old harbour was quiet in the morning and loud at night.",
    "She wrote a long letter to her brother and never sent it.",
    "Rain fell on the roofs while the baker lit his oven.",
    "We walked along the river until the lamps were lit.",
    "He counted the birds on the wire and forgot the time.",
    "A good map tells you where you are and where you are not.",
)
ADJECTIVES = {"wonderful": 4.0, "good": 2.0, "fine": 1.0, "dull": -1.0, "poor": -2.0, "terrible": -4.0}
THINGS = ("song", "soup", "garden", "lecture", "bread", "museum", "answer", "journey")

ALONE = Parallel(processes=1, engine="data")
NUMERICS = Numerics(
    device="cpu", threads=1, dtype=Dtypes(decoder="float32", encoder="float32"), attention="eager", compile="never",
    recompute=False, parallel=ALONE,
)  # fmt: skip
RULE: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "clip": 1.0,
    "schedule": {"name": "cosine", "warmup": 0.05, "floor": 0.1},
}
CONSTANT = {"name": "constant", "warmup": 0.05}
ADAM = {"betas": [0.9, 0.98], "epsilon": 1e-9}
RULES: dict[str, dict[str, Any]] = {  # what each update rule is told beside RULE
    "sgd": {"momentum": 0.0, "nesterov": False},
    "adam": ADAM,
    "adamw": ADAM,
    "lamb": ADAM,
    "muon": {**ADAM, "momentum": 0.95},
    "lion": {"betas": [0.9, 0.99]},
    "adafactor": {"threshold": 1.0},
}
OPTIMIZER: dict[str, Any] = {"name": "adamw", **RULE, **ADAM}
SHAPE = {"hidden": 64, "layers": 2, "heads": 2, "feed_forward": 96}
QUANTIZE = {"instructions": "avx512_vnni", "per_channel": True}
MIXTURE = {"statements": 0.75, "prose": 0.25}
MIX: dict[str, Any] = {"weight": 0.5, "batch": 4, "window": 16, "mixture": MIXTURE}
TRAINING = {"accumulate": 1, "optimizer": OPTIMIZER}
MASKING = {"unit": "token", "share": 0.02, "names": 0.95}
ENTROPY = {"smoothing": 0.0, "z": 0.0}
NEW = {"name": "new", "path": "data/tokenize/tokenizer", **SHAPE}
CLM = {"model": NEW, "window": 16, "batch": 16, "steps": 200, "mixture": MIXTURE, "entropy": ENTROPY, **TRAINING}
LEARNT = {"name": "train", "path": "data/validate/instructions", "vocabulary": 420, "characters": 10**6}
PROXIMAL: dict[str, Any] = {
    "name": "ppo",
    "epochs": 2,
    "discount": 1.0,
    "trace": 0.95,
    "clip": 0.2,
    "whiten_rewards": False,
    "entropy": 0.0,
    "values": "shared",
    "value_clip": 0.5,
    "value_weight": 0.1,
    "value_warmup": 0,
    "kl": {"estimator": "k1", "coefficient": 0.05, "target": 6.0, "horizon": 2000, "stop": None},
    "ptx": MIX,
    "average": None,
}
NO_PTX = {**MIX, "weight": 0.0}
ALTERNATIVES: dict[str, dict[str, Any]] = {
    "dpo": {
        "name": "dpo", "epochs": 1, "ptx": NO_PTX, "pairs": {"name": "sampled", "generations": 4},
        "loss": {"name": "sigmoid"}, "beta": 0.1,
    },
    "rloo": {
        "name": "rloo", "epochs": 1, "ptx": NO_PTX, "generations": 4, "beta": 0.05, "clip": 0.2, "normalise": False,
    },
    "grpo": {
        "name": "grpo", "epochs": 1, "ptx": NO_PTX, "generations": 4, "beta": 0.05, "clip": 0.2, "scale": "none",
        "loss": "grpo", "ratio": "token",
    },
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "tokenize": {"tokenizer": LEARNT, "context": 64},
    "pretrain@clm": CLM,
    "pretrain@mlm": {
        **CLM,
        "model": SHAPE,
        "batch": 20,
        "steps": 350,
        "mixture": {"statements": 0.9, "prose": 0.1},
        "masking": MASKING,
    },
    "finetune": {
        "model": "data/pretrain/clm/model",
        "task": {"name": "chat", "answers": "all", "packing": None},
        "method": {"name": "full"},
        "mix": MIX,
        "too_long": "refuse",
        "heldout": 8,
        "batch": 16,
        "steps": 150,
        **TRAINING,
    },
    "reward": {
        "model": "data/pretrain/mlm/model",
        "method": {"name": "full"},
        "reads": "response",
        "heads": 1,
        "judge_share": 0.3,
        "rating": 1.0,
        "ordering": {"name": "bradley_terry", "weight": 0.1, "margin": 0.0},
        "words": True,
        "max_tokens": 32,
        "word_dropout": 0.1,
        "batch": 6,
        "steps": 80,
        **TRAINING,
    },
    "ppo": {
        "algorithm": PROXIMAL,
        "method": {"name": "full"},
        "reward": {
            "name": "model",
            "path": "data/reward/policy/model",
            "normalised": False,
            "disagreement": 0.0,
        },
        "rollouts": {"name": "own"},
        "iterations": 3,
        "episodes": 12,
        "minibatch": 6,
        "max_new_tokens": 24,
        "temperature": 1.0,
        "missing_end_penalty": 1.0,
        "alarms": {
            "every": 2,
            "questions": 4,
            "exact_match_drop": 1.0,
            "kl": 50.0,
            "length": 10.0,
            "distinct_2": 0.0,
            "action": "tell",
        },
        "optimizer": {**OPTIMIZER, "learning_rate": 3e-4},
    },
    "prune": {
        "importance": "taylor",
        "keep": 0.75,
        "calibration": 2,
        "replies": 12,
        "max_new_tokens": 24,
        "batch": 6,
        "windows": 4,
        "window": 16,
        "mixture": MIXTURE,
        "steps": 20,
        **TRAINING,
    },
    "quantize@policy": {**QUANTIZE, "max_new_tokens": 24, "timed_tokens": 24},
    "quantize@encoder": QUANTIZE,
    "evaluate": {
        "questions": 12,
        "samples": 16,
        "max_new_tokens": 24,
        "temperature": 1.0,
        "window": 16,
        "masked": r"The capital of .*\.",
        "toxicity": None,
    },
}
UPDATES = {"rank": 3, "alpha": 6, "dropout": 0.0, "rank_stabilized": False, "targets": "all-linear"}
LORA = {"name": "lora", "dora": False, **UPDATES}
QLORA = {"name": "qlora", "double_quantization": True, **UPDATES}
STAGES = ("tokenize", "pretrain", "finetune", "reward", "ppo", "prune", "quantize")


def config(name: str, **changes: Any) -> Any:
    """Return the tiny config of a stage (`pretrain@mlm` for one with keys), some of its settings changed."""
    section, _, key = name.partition("@")
    module = importlib.import_module(f"tasks.{section}")
    model: type[Settings] = getattr(module, "KEYS", {}).get(key, module.Config)
    return model.model_validate({**SETTINGS.get(name, SETTINGS.get(section, {})), **changes})


class Chain:
    """A project's `data/` at toy size. What is asked for is made; what is made is shared, so never write into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics: dict[str, dict[str, Any]] = {}
        self.makers: dict[str, tuple[ModuleType, str | None]] = {}
        for module in (importlib.import_module(f"tasks.{name}") for name in STAGES):
            for key in stage.keys_of(module):
                self.makers |= dict.fromkeys(stage.declared_outputs(module, key).values(), (module, key))
        (root / "data/sources/toxicity").mkdir(parents=True)
        for table, rows in (("corpus", corpus()), ("instructions", instructions()), ("rankings", rankings())):
            tables.write(list(rows), root / "data/validate" / table, tables.schema(table))

    def path(self, path: str) -> Path:
        """Return one of the chain's outputs, made first where it is not there yet."""
        if not (self.root / path).exists():
            module, key = self.makers[path]
            name = stage.name_of(module.__name__.rpartition(".")[2], key)
            outputs = {output: self.root / at for output, at in stage.declared_outputs(module, key).items()}
            self.metrics[name] = self.run(self._job(name, config(name), outputs), config(name))
        return self.root / path

    def stage(self, name: str) -> tuple[ModuleType, str | None]:
        """Return a stage's module and key: of `pretrain@mlm` that of `pretrain`, and `mlm`."""
        section, _, key = name.partition("@")
        return importlib.import_module(f"tasks.{section}"), key or None

    def run(self, job: Job, settings: Settings) -> dict[str, Any]:
        """Run a job's stage and return its metrics."""
        with exporters_warnings_ignored() if job.stage == "quantize" else nullcontext():
            metrics: dict[str, Any] = self.stage(job.name)[0].run(settings, job)
        return metrics

    def job(self, name: str, settings: Settings, folder: Path, **changes: Any) -> Job:
        """Return a job of a stage on the chain's inputs that writes into a folder of its own."""
        module, key = self.stage(name)
        outputs = {
            output: folder / output / Path(path).name for output, path in stage.declared_outputs(module, key).items()
        }
        return self._job(name, settings, outputs, **changes)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the chain's tokenizer."""
        from tasks.common.text import chat

        return chat.load_tokenizer(self.path("data/tokenize/tokenizer"))

    def _job(self, name: str, settings: Settings, outputs: dict[str, Path], **changes: Any) -> Job:
        module, key = self.stage(name)
        inputs = {item: self.path(path) for item, path in stage.declared_inputs(module, key, settings).items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Any] = {
            "seed": 1,
            "numerics": NUMERICS,
            "recipe": "0" * 64,
            "checkpoints": Checkpoints(url=str(self.root / "checkpoints"), every_seconds=1e9),
        }
        return Job(module.__name__.rpartition(".")[2], key, inputs, outputs, **{**parts, **changes})


@contextmanager
def exporters_warnings_ignored() -> Iterator[None]:
    """Let Optimum's ONNX export warn of what is its own affair; by message, so that our warnings still fail a test."""
    with warnings.catch_warnings():
        for message in (
            "You are using the legacy TorchScript-based ONNX export",
            "The feature will be removed. Please remove usage of this function",
            "Converting a tensor to a Python boolean might cause the trace to be incorrect",
            "torch.tensor results are registered as constants in the trace",
            "Exporting aten::index operator of advanced indexing",
            "Implicitly cleaning up <TemporaryDirectory",
        ):
            warnings.filterwarnings("ignore", message)
        yield


@cache
def _chain(root: Path) -> Chain:
    import torch

    torch.set_num_threads(1)  # models this small gain nothing from a second one
    return Chain(root)


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The tiny chain, one a session however many modules import this fixture."""
    return _chain(tmp_path_factory.getbasetemp() / "training-chain")


def corpus() -> Iterator[dict[str, Any]]:
    """Yield statements, which hold two names each, and prose, which holds none and is partly held out."""
    texts = [
        (form.format(country=country, capital=capital), [country, capital], "train")
        for country, capital in CAPITALS.items()
        for form in STATEMENTS
    ]
    texts += [(text, [], "train" if place % 3 else "heldout") for place, text in enumerate(PROSE)]
    for place, (text, names, split) in enumerate(texts):
        yield {
            "id": f"c{place}",
            "text": text,
            "names": names,
            "source": "test",
            "group": "told",
            "licence": "MIT",
            "split": split,
        }


def instructions() -> Iterator[dict[str, Any]]:
    """Yield every question about every country in every tone."""
    for country, capital in CAPITALS.items():
        for number, question in enumerate(QUESTIONS):
            for tone, form in TONES.items():
                asked = {"role": "user", "content": question.format(country=country)}
                reply = {"role": "assistant", "content": form.format(country=country, capital=capital)}
                yield {
                    "id": f"{country}-{number}-{tone}",
                    "messages": [asked, reply],
                    "entity": country,
                    "answer": capital,
                    "tone": tone,
                    "source": "test",
                    "split": "heldout" if country in HELD_OUT else "train",
                }


def rankings() -> Iterator[dict[str, Any]]:
    """Yield rated sentences in fours, and on either side one ranking without ratings that has a tie in it."""
    adjectives = list(ADJECTIVES)
    for place, thing in enumerate(THINGS):
        words = [adjectives[(place + step) % len(adjectives)] for step in (0, 1, 3, 4)]
        scores = [[ADJECTIVES[word] + error for error in (-0.5, 0.0, 0.5)] for word in words]
        yield _ranking(f"rated-{place}", [f"The {thing} was {word}." for word in words], place, scores=scores)
    for place in (0, len(THINGS) - 1):
        responses = ["It was good.", "It was a good day.", "It was terrible."]
        yield _ranking(f"ranked-{place}", responses, place, ranks=[1, 1, 3])


def _ranking(name: str, responses: list[str], place: int, **judged: Any) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": [{"role": "user", "content": "Write a sentence."}],
        "responses": responses,
        "ranks": None,
        "scores": None,
        "scale": [-4.0, 4.0] if "scores" in judged else None,
        "annotators": 3,
        "models": [],
        "source": "test",
        "split": "heldout" if place >= len(THINGS) - 2 else "train",
        **judged,
    }
