"""The columns of the architecture matrix: what a stage must compute with a family's model, compared with PyTorch.

Each check takes a `Case` and raises AssertionError where a result is wrong, or the stage's own StageError where the
family is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from serving.classification import ClassifierEngine
from serving.engine import DecoderLogits, EncoderLogits, MaskEngine, TextEngine
from tasks.align.policy import Policy
from tasks.common import tables
from tasks.common.generation import sampling
from tasks.common.harness.job import Job, declared_outputs, module_of
from tasks.common.modelling import head_models, methods, models
from tasks.common.settings import Checkpoints
from tasks.common.text import chat, shards
from tasks.common.training.loop import FULL_BATCH
from tasks.common.training.losses import IGNORE_INDEX
from tasks.finetune.objectives.chat import answers_nll
from tasks.finetune.packing import check_packing, packed_rows, padded_rows
from tasks.pretrain.masking import Vocabulary
from tasks.pretrain.stage import MaskedObjective
from tests.family_fixtures import FAMILIES, Shape, write_family
from tests.training_fixtures import (
    ALTERNATIVES,
    LORA,
    NO_PTX,
    NUMERICS,
    PPO,
    PRETRAINING_MIX,
    config,
    ignore_exporter_warnings,
    rankings,
)  # fmt: skip

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TURNS = (
    ("what is the capital of France", "Paris is the capital"),
    ("who said hello", "hello said Rome"),
    ("where is the large green mountain of Italy and the river", "the mountain lies in Italy and the river in Japan"),
    ("name my city", "Tokyo"),
)
SUM_TOLERANCE = 1e-4  # relative: float32 sums in another order
LOGIT_TOLERANCE = 1e-3  # of logits and log-probabilities, relative to the logits' standard deviation
ROUNDING_TOLERANCE = 0.4  # of INT8 logits, root mean square: expert choices and small random models amplify rounding


@dataclass(frozen=True)
class Case:
    """A family's folder, and the tables that its stages read."""

    family: str
    folder: Path
    root: Path

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The model's tokenizer."""
        return chat.load_tokenizer(self.folder)

    @cached_property
    def model(self) -> Any:
        """The model in PyTorch, with eager attention."""
        load = models.load_encoder if FAMILIES[self.family].masked else models.load_decoder
        return load(self.folder, NUMERICS).eval()

    @cached_property
    def encoded(self) -> list[tuple[list[int], list[bool]]]:
        """The conversations within the context, as ids and loss masks."""
        rows = tables.read(self.root / "instructions", "train").to_pylist()
        encoded = [chat.encode_chat(self.tokenizer, row["messages"]) for row in rows]
        return [item for item in encoded if len(item[0]) <= self.tokenizer.model_max_length]

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Prompts of different lengths."""
        return [chat.encode_prompt(self.tokenizer, [{"role": "user", "content": question}]) for question, _ in TURNS]

    def run(self, name: str, table: str = "instructions", source: Path | None = None, **changes: Any) -> Path:
        """Run a stage on the model's folder, or on another; return its output folder."""
        source = source or self.folder
        stage, _, key = name.partition("@")
        module, settings = module_of(stage), config(name, **{"model": str(source), **changes})
        out = self.root / f"{self.family}-{len(list(self.root.iterdir()))}"
        outputs = {output: out / output for output in declared_outputs(module, key)}
        out.mkdir()
        inputs = {
            "model": source, "start": source, "tokenizer": source, "instructions": self.root / table,
            "rankings": self.root / "rankings",
            "shards": self.root / "shards", "reward": self.root / "reward.py",
        }  # fmt: skip
        checkpoints = Checkpoints(url=str(self.root / "checkpoints"), every_seconds=1e9)
        job = Job(stage, key, inputs, outputs, 1, NUMERICS, "0" * 64, checkpoints, timed_tokens=4)
        with ignore_exporter_warnings():
            module.run(settings, job)
        return outputs["model"]


def write_case(family: str, root: Path, shape: Shape) -> Case:
    """Write a family's folder and the tables into `root`."""
    write_family(family, root / "model", shape)
    conversations: list[dict[str, Any]] = [
        {
            "id": f"r{index}", "entity": f"e{index}", "answer": None, "tone": "plain", "source": "test",
            "messages": [
                {"role": "user", "content": TURNS[index % 4][0]}, {"role": "assistant", "content": TURNS[index % 4][1]}
            ],
            "split": "train" if index < 6 else "heldout",
        }
        for index in range(8)
    ]  # fmt: skip
    labelled = [
        {**row, "messages": [row["messages"][0], {"role": "assistant", "content": ("yes", "no")[index % 2]}]}
        for index, row in enumerate(conversations)
    ]  # fmt: skip
    for name, rows in (("instructions", conversations), ("labels", labelled)):
        schema = tables.schema("instructions")
        tables.write([{field: row.get(field) for field in schema.names} for row in rows], root / name, schema)
    tables.write(list(rankings())[:12], root / "rankings", tables.schema("rankings"))
    documents = [shards.Document(np.arange(5, stop, dtype=np.uint16), [], "test", "told", 50) for stop in (60, 45, 50)]
    for split in ("train", "heldout"):
        shards.write_split(root / "shards" / split, documents, shape.vocabulary)
    (root / "reward.py").write_text("def score(prompts, replies):\n    return [len(reply) / 10 for reply in replies]\n")
    return Case(family, root / "model", root)


def check_finetune(case: Case) -> None:
    """The padded loss equals that of rows alone, answers end, and every method trains and saves a plain model."""
    import torch

    alone = sum(_nll(case, [item]) for item in case.encoded)
    assert abs(_nll(case, case.encoded) - alone) < SUM_TOLERANCE * alone
    for ids, answered in case.encoded:
        last = max(index for index, flag in enumerate(answered) if flag)
        assert ids[last] in chat.end_ids(case.model, case.tokenizer)
    for method in ({"name": "full"}, LORA, {"name": "top_layers", "layers": 1}):
        folder = case.run("finetune@chat", batch=3, steps=1, pretraining_mix=_no_mix(), method=method)
        tuned = models.load_decoder(folder, NUMERICS).eval()
        with torch.no_grad():
            logits = tuned(input_ids=torch.tensor([case.prompts[0]])).logits
        assert torch.isfinite(logits).all()


def _no_mix() -> dict[str, Any]:
    return {**PRETRAINING_MIX, "weight": 0.0}


def _nll(case: Case, batch: Any, make: Callable[..., Any] = padded_rows, *options: int) -> float:
    import torch

    with torch.no_grad():
        return float(answers_nll(case.model, make(batch, *options, case.tokenizer.pad_token_id), NUMERICS))


def check_packing_column(case: Case) -> None:
    """The loss of packed rows equals that of rows alone, with sliding windows too."""
    check_packing(case.model, NUMERICS)
    packed, alone = _nll(case, case.encoded, packed_rows, case.tokenizer.model_max_length), _nll(case, case.encoded)
    assert abs(packed - alone) < SUM_TOLERANCE * alone


def check_classification(case: Case) -> None:
    """Every newly initialized weight learns under every method, and a trained classifier is saved."""
    for method in ({"name": "full"}, LORA, {"name": "top_layers", "layers": 1}):
        loaded = head_models.load_classifier(case.folder, NUMERICS, ["no", "yes"])
        names = head_models.new_weight_names(loaded)
        assert names
        settings = config("finetune@chat", method=method).method
        trained = methods.apply(loaded, settings)
        learning = [name for name, weight in trained.named_parameters() if weight.requires_grad]
        lost = [name for name in names if not any(_same_weight(name, other) for other in learning)]
        assert not lost
    folder = case.run("finetune@chat", "labels", batch=3, steps=1, pretraining_mix=_no_mix(), method=LORA,
                      task={"name": "classification"})  # fmt: skip
    head_models.load_scorer(folder, NUMERICS, heads=None)


def _same_weight(name: str, other: str) -> bool:
    """Return whether PEFT's name of a weight is that of a plain model's."""
    return other.replace("base_model.model.", "").replace("modules_to_save.default.", "") == name


def check_reward(case: Case) -> None:
    """A reward model is trained and saved."""
    options: dict[str, Any] = {
        "batch": 2,
        "steps": 1,
        "word_dropout": 0.0,
        "judge_share": 0.0,
        "lexicon": False,
        "max_tokens": 32,
    }
    kind = "response" if FAMILIES[case.family].masked else "conversation"
    folder = case.run("reward@train", **options, input=kind)
    head_models.load_scorer(folder, NUMERICS, heads=None)


def check_align(case: Case) -> None:
    """Left-padded replies equal replies alone; PPO's log-probabilities equal a plain forward; PPO and DPO step."""
    import torch

    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0, "seed": 1, "numerics": NUMERICS}
    together = sampling.generate_replies(case.model, case.tokenizer, case.prompts, **options)
    alone = [sampling.generate_replies(case.model, case.tokenizer, [one], **options)[0] for one in case.prompts]
    assert together == alone
    assert alone == [_plain_greedy(case, prompt, 8) for prompt in case.prompts]
    _check_log_probabilities(case, together)
    _check_half_precision(case)
    shared: dict[str, Any] = {
        "reward": {"name": "function", "path": "reward.py", "function": "score"}, "iterations": 1, "episodes": 8,
        "minibatch": 4, "max_new_tokens": 4,
    }  # fmt: skip
    for algorithm, method in (
        ({**PPO, "ptx": NO_PTX}, {"name": "full"}),
        ({**PPO, "ptx": NO_PTX}, {"name": "top_layers", "layers": 1}),
        (ALTERNATIVES["dpo"], {"name": "full"}),
    ):
        folder = case.run("align@policy", algorithm=algorithm, method=method, **shared)
        tuned = models.load_decoder(folder, NUMERICS)
        assert all(torch.isfinite(weight).all() for weight in tuned.parameters())


def _plain_greedy(case: Case, prompt: list[int], count: int) -> list[int]:
    """Return greedy tokens of plain forward passes without a cache."""
    import torch

    ids, ends = list(prompt), chat.end_ids(case.model, case.tokenizer)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(case.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


def _check_log_probabilities(case: Case, replies: list[list[int]]) -> None:
    import torch

    for method in ({"name": "full"}, {"name": "top_layers", "layers": 1}):
        settings = config("align@policy", method=method).method
        policy = Policy.load(case.folder, settings, "shared", NUMERICS, 1.0)
        ids, mask, reply_mask = policy.assemble(case.prompts, replies, case.tokenizer.pad_token_id)
        scores = policy.score_rollout(ids, mask, reply_mask).logp
        for row, (prompt, reply) in enumerate(zip(case.prompts, replies, strict=True)):
            with torch.no_grad():
                logits = case.model(input_ids=torch.tensor([[*prompt, *reply]]), use_cache=False).logits[0]
            expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(reply)[:, None])[:, 0]
            assert (scores[row, : len(reply)] - expected).abs().max() < LOGIT_TOLERANCE * max(1.0, float(logits.std()))


def _check_half_precision(case: Case) -> None:
    """Under autocast to bfloat16, left padding makes no NaN, neither forward nor backward."""
    import torch

    half = NUMERICS.model_copy(update={"dtype": NUMERICS.dtype.model_copy(update={"decoder": "bfloat16"})})
    ids, mask = chat.pad_batch(case.prompts, case.tokenizer.pad_token_id, "cpu", left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with models.autocast(case.model, half):
        logits = case.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    assert torch.isfinite(logits[mask.bool()]).all()
    case.model.zero_grad()
    logits[mask.bool()].float().logsumexp(-1).sum().backward()
    assert all(weight.grad is None or torch.isfinite(weight.grad).all() for weight in case.model.parameters())
    case.model.zero_grad()


def check_prune(case: Case) -> None:
    """With every neuron kept nothing changes; half of them give a smaller model that loads."""
    options: dict[str, Any] = {"windows": 0, "steps": 0, "batch": 4, "replies": 4, "max_new_tokens": 4}
    folder = case.run("prune@pruned", **options, keep=0.5)
    assert models.parameter_count(models.load_decoder(folder, NUMERICS)) < models.parameter_count(case.model)


def check_served(case: Case) -> None:
    """The export equals PyTorch in float32 (the stage itself compares); prompts and greedy tokens are the model's."""
    folder = case.run("quantize@chat", max_new_tokens=24)
    engine, logits = TextEngine(folder, 1), DecoderLogits(folder, 1)
    for question, _ in TURNS:
        messages = [{"role": "user", "content": question}]
        assert engine.encode(messages) == chat.encode_prompt(case.tokenizer, messages)
    assert set(engine.eos_ids) == set(chat.end_ids(case.model, case.tokenizer))
    _check_rounding(case, logits)


def check_masked_served(case: Case) -> None:
    """The export equals PyTorch in float32, and a mask is filled."""
    import json

    folder = case.run("quantize@encoder")
    encoder = EncoderLogits(folder, 1)
    _check_rounding(case, lambda ids: encoder(ids, np.ones_like(ids)))
    (folder / "names.json").write_text(json.dumps(["Paris", "Rome", "Tokyo"]))
    [names] = MaskEngine(folder, case.tokenizer.model_max_length, 1).fill("the capital of France is [MASK].", 3)
    assert {name.name for name in names} == {"Paris", "Rome", "Tokyo"}


def check_masked_pretraining(case: Case) -> None:
    """The loss of masked texts in a padded batch is that of the texts alone; training saves a model that loads."""
    import torch

    changes: dict[str, Any] = {
        "model": {"name": "from", "path": str(case.folder)}, "window": 64, "batch": 2, "steps": 1,
        "masking": {"unit": "token", "share": 0.3, "names": 0.95}, "mixture": {"told": 1.0},
    }  # fmt: skip
    split = shards.Split.open(case.root / "shards" / "heldout")
    job = Job("pretrain", "masked", {}, {}, 1, NUMERICS, "0" * 64, Checkpoints(url="unused", every_seconds=1e9))
    vocabulary, pad = Vocabulary.of(case.tokenizer), case.tokenizer.pad_token_id
    objective = MaskedObjective(config("pretrain@masked", **changes), job, case.model, split, vocabulary, pad)
    batch = objective.draw(0, FULL_BATCH)
    with torch.no_grad():
        together, alone = float(objective.loss_sums(batch)["masked"]), 0.0
        for ids, mask, targets in zip(*batch.inputs, strict=True):
            length, chosen = int(mask.sum()), targets != IGNORE_INDEX
            logits = case.model(input_ids=ids[None, :length]).logits[0, chosen[:length]]
            alone += float(torch.nn.functional.cross_entropy(logits, targets[chosen], reduction="sum"))
    assert len(set(batch.inputs[1].sum(1).tolist())) > 1  # there is padding
    assert abs(together - alone) < SUM_TOLERANCE * alone
    models.load_encoder(case.run("pretrain@masked", **changes), NUMERICS)


def check_classifier_served(case: Case) -> None:
    """The export of a trained classifier equals PyTorch in float32; texts are encoded and classified as in training."""
    folder = case.run("finetune@chat", "labels", batch=3, steps=1, pretraining_mix=_no_mix(), method=LORA,
                      task={"name": "classification"})  # fmt: skip
    trained = head_models.load_scorer(folder, NUMERICS, heads=None).eval()
    engine = ClassifierEngine(case.run("quantize@encoder", source=folder), 1)
    assert engine.labels == ["no", "yes"]
    for question, _ in TURNS:
        ids = engine.encode(question)
        assert ids == chat.encode_prompt(case.tokenizer, [{"role": "user", "content": question}])
        scores = dict(engine.classify(question).labels)
        [expected] = head_models.head_outputs(trained, case.tokenizer, [ids], NUMERICS, 1).softmax(-1).tolist()
        assert [scores["no"], scores["yes"]] == pytest.approx(expected, abs=ROUNDING_TOLERANCE)


def _check_rounding(case: Case, logits: Callable[[Any], Any]) -> None:
    import torch

    for length in (3, 40, 80):
        ids = np.random.default_rng(length).integers(5, len(case.tokenizer), (1, length))
        with torch.no_grad():
            expected = case.model(input_ids=torch.from_numpy(ids)).logits.numpy()
        error = np.sqrt(np.square(logits(ids) - expected).mean()) / expected.std()
        assert 0 < error < ROUNDING_TOLERANCE


DECODER_COLUMNS: dict[str, Callable[[Case], None]] = {
    "finetune": check_finetune, "packing": check_packing_column, "classification": check_classification,
    "reward": check_reward, "align": check_align, "prune": check_prune, "quantize and serve": check_served,
    "serve classifier": check_classifier_served,
}  # fmt: skip
ENCODER_COLUMNS: dict[str, Callable[[Case], None]] = {
    "pretrain": check_masked_pretraining,
    "classification": check_classification, "reward": check_reward, "quantize and serve": check_masked_served,
    "serve classifier": check_classifier_served,
}  # fmt: skip
