"""A tiny pipeline for the tests of the training stages, run by the stages' own code in seconds, without the network.

`from tests.training_fixtures import chain` gives a `Chain`: a folder with the layout of a project's `data/` and three
small tables. `chain.path("data/finetune/chat/model")` runs the stages that this output needs, each once per session.
`chain.job(…)` is a job on the same inputs with its own outputs, for runs with other settings.

Its facts are ten capitals, of which two are held out of the questions; the models memorize them.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from pydantic import TypeAdapter

from tasks.common import model_graph, tables
from tasks.common.harness import job, records
from tasks.common.harness.job import Job, module_of
from tasks.common.settings import Checkpoints, Dtypes, Numerics, Parallel, Settings

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

SINGLE_PROCESS = Parallel(processes=1, engine="data")
NUMERICS = Numerics(
    device="cpu", threads=1, dtype=Dtypes(decoder="float32", encoder="float32"), attention="eager", compile="never",
    parallel=SINGLE_PROCESS,
)  # fmt: skip
BASE_OPTIMIZER: dict[str, Any] = {
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "schedule": {"name": "cosine", "warmup": 0.05, "floor": 0.1},
}
CONSTANT = {"name": "constant", "warmup": 0.05}
ADAM = {"betas": [0.9, 0.98], "epsilon": 1e-9}
OPTIMIZER_OPTIONS: dict[str, dict[str, Any]] = {  # what each update rule adds to BASE_OPTIMIZER
    "sgd": {"momentum": 0.0, "nesterov": False},
    "adam": ADAM,
    "adamw": ADAM,
    "lamb": ADAM,
    "muon": {**ADAM, "momentum": 0.95},
    "lion": {"betas": [0.9, 0.99]},
    "adafactor": {"threshold": 1.0},
}
OPTIMIZER: dict[str, Any] = {"name": "adamw", **BASE_OPTIMIZER, **ADAM}
# For tests that compare weights trained in two equivalent ways. Adam divides a gradient g by |g| + epsilon. With
# 1e-9, a weight whose terms cancel to |g| < 1e-8 moves by the learning rate times the relative float32 rounding error
# of g, and which weights those are depends on the processor's order of summation. On an Intel with AMX, one weight of
# 96,897 differed by 9e-6 after three steps at 1e-3, the next one by 6e-7. A step changes by at most rate / epsilon
# times the change of g: with 1e-3, all weights differed by no more than a float32 rounding of the weight (1.2e-7).
STABLE_OPTIMIZER: dict[str, Any] = {**OPTIMIZER, "epsilon": 1e-3}
SHAPE = {"hidden": 64, "layers": 2, "heads": 2, "feed_forward": 96}
QUANTIZE = {"weights": "int8", "exact": True}
MIXTURE = {"statements": 0.75, "prose": 0.25}
PRETRAINING_MIX: dict[str, Any] = {"weight": 0.5, "batch": 4, "window": 16, "mixture": MIXTURE}
TRAINING = {"gradient_accumulation_steps": 1, "optimizer": OPTIMIZER}
MASKING = {"unit": "token", "share": 0.02, "names": 0.95}
LOSS = {"label_smoothing": 0.0, "z_loss": 0.0}
NEW_MODEL = {"name": "new", "path": "data/tokenize/tokenizer", **SHAPE}
CAUSAL_PRETRAINING = {
    "objective": "causal",
    "model": NEW_MODEL,
    "window": 16,
    "batch": 16,
    "steps": 200,
    "mixture": MIXTURE,
    "loss": LOSS,
    **TRAINING,
}
NEW_TOKENIZER = {"name": "train", "path": "data/validate/instructions", "vocabulary": 420, "max_characters": 10**6}
PPO: dict[str, Any] = {
    "name": "ppo",
    "epochs": 2,
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "clip_range": 0.2,
    "whiten_rewards": False,
    "entropy_coef": 0.0,
    "values": "shared",
    "vf_clip_range": 0.5,
    "vf_coef": 0.1,
    "critic_warmup_iterations": 0,
    "kl": {"estimator": "k1", "coefficient": 0.05, "target": 6.0, "horizon": 2000, "stop": None},
    "ptx": PRETRAINING_MIX,
    "ema_decay": None,
}
NO_PTX = {**PRETRAINING_MIX, "weight": 0.0}
ALTERNATIVES: dict[str, dict[str, Any]] = {
    "dpo": {
        "name": "dpo", "epochs": 1, "ptx": NO_PTX, "generations": 4, "loss": {"name": "sigmoid"}, "beta": 0.1,
    },
    "rloo": {
        "name": "rloo", "epochs": 1, "ptx": NO_PTX, "generations": 4, "beta": 0.05, "clip_range": 0.2,
        "normalize_advantages": False,
    },
    "grpo": {
        "name": "grpo", "epochs": 1, "ptx": NO_PTX, "generations": 4, "beta": 0.05, "clip_range": 0.2, "scale": "none",
        "loss": "grpo", "ratio": "token",
    },
}  # fmt: skip
REWARD: dict[str, Any] = {
    "role": "train",
    "model": "data/pretrain/masked/model",
    "method": {"name": "full"},
    "input": "response",
    "heads": 1,
    "judge_share": 0.3,
    "mse_weight": 1.0,
    "ordering": {"name": "bradley_terry", "weight": 0.1, "margin": 0.0},
    "lexicon": True,
    "max_tokens": 32,
    "word_dropout": 0.1,
    "batch": 6,
    "steps": 80,
    **TRAINING,
}
DECODERS = {
    "base": "data/pretrain/causal/model",
    "tuned": "data/finetune/chat/model",
    "policy": "data/align/policy/model",
    "pruned": "data/prune/pruned/model",
    "int8": "data/quantize/chat/model",
}
ENCODERS = {"encoder": "data/pretrain/masked/model", "encoder-int8": "data/quantize/encoder/model"}
EVALUATED = DECODERS | ENCODERS
EVALUATE: dict[str, Any] = {
    "questions": 12,
    "samples": 16,
    "max_new_tokens": 24,
    "temperature": 1.0,
}
EVALUATIONS: dict[str, dict[str, Any]] = {
    "exact_match": {"kind": "exact_match"},
    "reward": {"kind": "reward"},
    "judge": {"kind": "judge"},
    "diversity": {"kind": "diversity"},
    "text": {"kind": "text", "window": 16},
    "masked_names": {"kind": "masked_names", "statements": r"The capital of .*\."},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "tokenize": {"tokenizer": NEW_TOKENIZER, "context": 64},
    "pretrain@causal": CAUSAL_PRETRAINING,
    "pretrain@masked": {
        **CAUSAL_PRETRAINING,
        "objective": "masked",
        "batch": 20,
        "steps": 350,
        "mixture": {"statements": 0.9, "prose": 0.1},
        "masking": MASKING,
    },
    "finetune@chat": {
        "model": "data/pretrain/causal/model",
        "task": {"name": "chat", "answers": "all", "packing": None},
        "method": {"name": "full"},
        "pretraining_mix": PRETRAINING_MIX,
        "too_long": "reject",
        "heldout": 8,
        "batch": 16,
        "steps": 150,
        **TRAINING,
    },
    "reward@train": REWARD,
    "reward@judge": {**REWARD, "role": "judge"},
    "align@policy": {
        "model": "data/finetune/chat/model",
        "algorithm": PPO,
        "method": {"name": "full"},
        "reward": {
            "name": "model",
            "path": "data/reward/train/model",
            "normalized": False,
            "disagreement": 0.0,
        },
        "rollouts": {"name": "local"},
        "iterations": 3,
        "episodes": 12,
        "minibatch": 6,
        "max_new_tokens": 24,
        "temperature": 1.0,
        "missing_eos_penalty": 1.0,
        "alarms": {
            "every": 2,
            "questions": 4,
            "max_exact_match_drop": 1.0,
            "max_kl": 50.0,
            "max_length_ratio": 10.0,
            "min_distinct_2_ratio": 0.0,
            "action": "warn",
        },
        "optimizer": {**OPTIMIZER, "learning_rate": 3e-4},
    },
    "prune@pruned": {
        "model": "data/align/policy/model",
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
    "quantize@chat": {"model": "data/prune/pruned/model", **QUANTIZE, "max_new_tokens": 24},
    "quantize@encoder": {"model": "data/pretrain/masked/model", **QUANTIZE},
    **{f"evaluate@{key}": {"model": path, **EVALUATE} for key, path in EVALUATED.items()},
}
LORA_OPTIONS = {"rank": 3, "alpha": 6, "dropout": 0.0, "rank_stabilized": False, "targets": "all-linear"}
LORA = {"name": "lora", "dora": False, **LORA_OPTIONS}
QLORA = {"name": "qlora", "double_quantization": True, **LORA_OPTIONS}


def settings_of(name: str) -> dict[str, Any]:
    """Return the tiny settings of a stage entry; without an entry name, of the stage's first one."""
    entries = (settings for entry, settings in SETTINGS.items() if entry.partition("@")[0] == name.partition("@")[0])
    return SETTINGS[name] if name in SETTINGS else next(entries)


def config(name: str, **changes: Any) -> Any:
    """Return the tiny config of a stage (`pretrain@masked`; `reward` is its first entry) with some changes."""
    module = module_of(name.partition("@")[0])
    return TypeAdapter(module.Config).validate_python({**settings_of(name), **changes})


def evaluations(**changes: dict[str, Any] | None) -> dict[str, Any]:
    """Return the tiny chain's evaluations, some of them changed, added or (None) removed."""
    annotation: Any = module_of("evaluate").AnyEvaluation
    kind: Any = TypeAdapter(annotation)
    wanted = {**EVALUATIONS, **changes}
    return {name: kind.validate_python(settings) for name, settings in wanted.items() if settings is not None}


def links() -> tuple[job.Link, ...]:
    """Return the tiny chain's graph."""
    params: dict[str, Any] = {}
    for name, settings in SETTINGS.items():
        stage, _, key = name.partition("@")
        params.setdefault(stage, {}).update({key: settings} if key else settings)
    return model_graph.links_of(params)


class Metrics(dict[str, dict[str, Any]]):
    """The metrics of each stage of a chain; those of stages run by another test worker are read from files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, name: str) -> dict[str, Any]:
        self[name] = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        return self[name]


class Chain:
    """A project's `data/` at toy size. Each output is created on demand, once, by one of the test workers.

    Never write to it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics = Metrics(root / "metrics")
        self.lock = FileLock(root.with_suffix(".lock"))
        self.makers: dict[str, tuple[ModuleType, str | None]] = {}
        for name in SETTINGS:
            module, key = self.stage(name)
            self.makers |= dict.fromkeys(job.declared_outputs(module, key).values(), (module, key))
        with self.lock:
            if not root.exists():
                self._write_tables()

    def _write_tables(self) -> None:
        for name in ("toxicity", "evaluation"):
            (self.root / "data/sources" / name).mkdir(parents=True)
        for table, rows in (("corpus", corpus()), ("instructions", instructions()), ("rankings", rankings())):
            tables.write(list(rows), self.root / "data/validate" / table, tables.schema(table))

    def path(self, path: str) -> Path:
        """Return one of the chain's outputs; run its stage first if it does not exist yet."""
        with self.lock:  # another worker may be creating it
            if not (self.root / path).exists():
                module, key = self.makers[path]
                name = job.stage_name(job.stage_of(module), key)
                outputs = {output: self.root / at for output, at in job.declared_outputs(module, key).items()}
                metrics = self.run(self._job(name, config(name), outputs), config(name))
                records.write_json(self.metrics.folder / f"{name}.json", metrics)
        return self.root / path

    def stage(self, name: str) -> tuple[ModuleType, str | None]:
        """Return a stage's module and key: for `pretrain@masked` the module of `pretrain`, and `masked`."""
        section, _, key = name.partition("@")
        return module_of(section), key or None

    def run(self, job: Job, settings: Settings) -> dict[str, Any]:
        """Run a job's stage and return its metrics."""
        with ignore_exporter_warnings() if job.stage == "quantize" else nullcontext():
            metrics: dict[str, Any] = self.stage(job.name)[0].run(settings, job)
        return metrics

    def job(self, name: str, settings: Settings, folder: Path, **changes: Any) -> Job:
        """Return a job of a stage on the chain's inputs that writes to `folder`."""
        module, key = self.stage(name)
        outputs = {
            output: folder / output / Path(path).name for output, path in job.declared_outputs(module, key).items()
        }
        return self._job(name, settings, outputs, **changes)

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """Return the chain's tokenizer."""
        from tasks.common.text import chat

        return chat.load_tokenizer(self.path("data/tokenize/tokenizer"))

    def _job(self, name: str, settings: Settings, outputs: dict[str, Path], **changes: Any) -> Job:
        module, key = self.stage(name)
        declared = job.declared_inputs(module, key, settings, links())
        inputs = {item: self.path(path) for item, path in declared.items()}
        for path in outputs.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Any] = {
            "seed": 1,
            "numerics": NUMERICS,
            "recipe": "0" * 64,
            "checkpoints": Checkpoints(url=str(self.root / "checkpoints"), every_seconds=1e9),
            "sections": {"evaluations": evaluations()} if name.startswith("evaluate") else {},
        }
        return Job(job.stage_of(module), key, inputs, outputs, **{**parts, **changes})


@contextmanager
def ignore_exporter_warnings() -> Iterator[None]:
    """Ignore warnings inside the exporter, by message, so that other warnings still fail a test."""
    with warnings.catch_warnings():
        for message in (
            "Converting a tensor to a Python boolean might cause the trace to be incorrect",
            "torch.tensor results are registered as constants in the trace",
            "`torch.jit",
        ):
            warnings.filterwarnings("ignore", message)
        yield


@cache
def _chain(root: Path) -> Chain:
    import torch

    torch.set_num_threads(1)  # models this small do not benefit from a second thread
    return Chain(root)


@pytest.fixture(scope="session")
def chain(session_folder: Path) -> Chain:
    """The tiny chain, one per session, shared by all test modules and workers."""
    return _chain(session_folder / "training-chain")


def corpus() -> Iterator[dict[str, Any]]:
    """Yield statements with two names each, and prose without names, partly held out."""
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
                message = {"role": "user", "content": question.format(country=country)}
                reply = {"role": "assistant", "content": form.format(country=country, capital=capital)}
                yield {
                    "id": f"{country}-{number}-{tone}",
                    "messages": [message, reply],
                    "entity": country,
                    "answer": capital,
                    "tone": tone,
                    "source": "test",
                    "split": "heldout" if country in HELD_OUT else "train",
                }


def rankings() -> Iterator[dict[str, Any]]:
    """Yield groups of four rated sentences, and in each split one ranking without ratings and with a tie."""
    adjectives = list(ADJECTIVES)
    for place, thing in enumerate(THINGS):
        words = [adjectives[(place + step) % len(adjectives)] for step in (0, 1, 3, 4)]
        scores = [[ADJECTIVES[word] + error for error in (-0.5, 0.0, 0.5)] for word in words]
        yield _ranking(f"rated-{place}", [f"The {thing} was {word}." for word in words], place, scores=scores)
    for place in (0, len(THINGS) - 1):
        responses = ["It was good.", "It was a good day.", "It was terrible."]
        yield _ranking(f"ranked-{place}", responses, place, ranks=[1, 1, 3])


def _ranking(name: str, responses: list[str], place: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": [{"role": "user", "content": "Write a sentence."}],
        "responses": responses,
        "ranks": None,
        "scores": None,
        "scale": [-4.0, 4.0] if "scores" in fields else None,
        "annotators": 3,
        "models": [],
        "source": "test",
        "split": "heldout" if place >= len(THINGS) - 2 else "train",
        **fields,
    }
