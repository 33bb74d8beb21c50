"""Continued pretraining from a given model: where the loss starts, what is rejected, and which stages support it."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serving.decoding import Sampling
from serving.engine import TextEngine
from tasks import prune
from tasks.common.defaults import read_settings
from tasks.common.harness.job import Job, StageError, stage_name, stage_of
from tasks.common.modelling import models
from tasks.common.params_file import check
from tasks.common.reward.rankings import ROLES
from tasks.common.settings import SettingsError
from tasks.common.text import chat
from tasks.common.text.shards import Split
from tasks.common.training.loop import Shard
from tasks.evaluate import stage as evaluate
from tasks.pretrain import pretrained
from tasks.pretrain import stage as pretrain
from tasks.pretrain.masking import Vocabulary
from tasks.pretrain.pretrained import From
from tasks.reward import stage as reward
from tasks.tokenize import stage as tokenize
from tests.conftest import ROOT
from tests.family_fixtures import write_family
from tests.foreign_fixtures import POSITIONS, foreign_model, foreign_tokenizer, write_foreign
from tests.training_fixtures import LORA, NUMERICS, PRETRAINING_MIX, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)
CONTEXT = 96


class Foreign(Chain):
    """The toy chain made from a given model; stages are run on demand."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root)
        source = {"name": "from", "path": str(model)}
        clm = {"model": source, "steps": 4, "window": 24, "batch": 4}
        self.changes: dict[str, dict[str, Any]] = {
            "tokenize": {"tokenizer": source, "context": CONTEXT},
            "pretrain@causal": clm,
            "finetune@chat": {
                "method": LORA,
                "steps": 2,
                "batch": 4,
                "pretraining_mix": {**PRETRAINING_MIX, "window": 24},
            },
            **{
                f"reward@{role}": {"model": "data/finetune/chat/model", "steps": 2, "word_dropout": 0.0}
                for role in ROLES
            },
        }
        self.model = model

    def settings(self, name: str) -> Any:
        """Return a stage's settings."""
        return config(name, **self.changes.get(name, {}))

    def path(self, path: str) -> Path:
        """Return an output, made on demand with this chain's settings, or the given model's own folder."""
        if path == str(self.model):
            return self.model
        if not (self.root / path).exists():
            module, key = self.makers[path]
            name = stage_name(stage_of(module), key)
            settings = self.settings(name)
            outputs = {item: self.root / at.format(key=key) for item, at in module.OUTPUTS.items()}
            self.metrics[name] = self.run(self._job(name, settings, outputs), settings)
        return self.root / path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """The toy chain from a model of another project."""
    root = tmp_path_factory.mktemp("foreign")
    return Foreign(root / "project", write_foreign(root / "given"))


def test_training_begins_at_the_loss_of_the_given_model(foreign: Foreign, tmp_path: Path) -> None:
    """The first loss of the history is that of Transformers on the first batch."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = foreign.settings("pretrain@causal")
    split = Split.open(foreign.path("data/tokenize/shards") / "train")
    model: Any = AutoModelForCausalLM.from_pretrained(foreign.model, dtype=torch.float32).eval()
    causal = pretrain.CausalObjective(settings, foreign.job("pretrain@causal", settings, tmp_path), model, split)
    ids = causal.draw(0, Shard()).inputs
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss.item()
    with (foreign.path("data/pretrain/causal/model").parent / "history.csv").open(newline="") as file:
        first, *_, last = [float(row["loss"]) for row in csv.DictReader(file)]
    assert first == pytest.approx(wanted, rel=1e-5)
    assert last < first


def test_the_trained_model_is_the_given_model(foreign: Foreign) -> None:
    """It has the same shape, other weights, and the model's tokenizer and template."""
    import torch

    model: Any = models.load_decoder(foreign.path("data/pretrain/causal/model"), NUMERICS)
    original: Any = foreign_model(foreign_tokenizer())
    assert model.config.vocab_size == original.config.vocab_size
    assert not torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    assert torch.allclose(model.get_input_embeddings().weight, original.get_input_embeddings().weight, atol=0.02)
    tokenizer = chat.load_tokenizer(foreign.path("data/pretrain/causal/model"))
    ends = (model.config.eos_token_id, model.config.pad_token_id, model.generation_config.eos_token_id)
    assert ends == (tokenizer.eos_token_id,) * 3
    assert tokenizer.model_max_length == CONTEXT
    assert "<|im_start|>assistant\n" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )


def test_the_pipeline_runs_up_to_the_evaluation(foreign: Foreign, tmp_path: Path) -> None:
    """Pretraining, LoRA fine-tuning, reward model and evaluation, with the given model's tokenizer."""
    settings = config("evaluate@tuned")
    job = foreign.job("evaluate@tuned", settings, tmp_path)
    figures = evaluate.run(settings, job)
    assert figures["exact_match_seen"] is not None
    assert figures["parameters"] == models.parameter_count(foreign_model(foreign_tokenizer()))
    assert 1 < figures["bits_per_byte"] < 20
    assert foreign.metrics["pretrain@causal"]["bits_per_byte"] > 1
    assert foreign.metrics["finetune@chat"]["conversations"] == 48


def test_given_model_supports_ppo_pruning_and_int8(foreign: Foreign) -> None:
    """The served model formats a conversation by the given model's template."""
    before = models.parameter_count(models.load_decoder(foreign.path("data/align/policy/model"), NUMERICS))
    assert models.parameter_count(models.load_decoder(foreign.path("data/prune/pruned/model"), NUMERICS)) < before
    served = TextEngine(foreign.path("data/quantize/chat/model"), 1)
    messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    tokenizer = chat.load_tokenizer(foreign.model)
    assert served.encode(messages) == chat.encode_prompt(tokenizer, messages)
    assert served.generate(messages, Sampling(4, 0.0, seed=1)).text is not None


def test_models_without_gated_layers_cannot_be_pruned() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(StageError, match="a GPT2LMHeadModel has none"):
        prune.check_gated_layers(model)


# Rejected folders


def change_config(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def remove_files(*names: str) -> Callable[[Path], None]:
    """Return a function that removes files of a folder."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def pickle_weights(folder: Path) -> None:
    """Rename the weights to a pickle."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def write_incomplete_index(folder: Path) -> None:
    """Write an index of two files of which one is missing."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (remove_files("config.json"), r"contains no config\.json, so it is no model of Transformers"),
        (remove_files("model.safetensors"), r"has no weights \(model\.safetensors\): download"),
        (remove_files("tokenizer.json"), r"contains no tokenizer\.json"),
        (pickle_weights, r"no model\.safetensors but pytorch_model\.bin, which is pickled, and a pickle runs code"),
        (write_incomplete_index, r"model-00002-of-00002\.safetensors is missing"),
        (
            lambda folder: change_config(folder, auto_map={"AutoModel": "a.B"}),
            r"code of its own \(auto_map\), which is never run",
        ),
        (
            lambda folder: change_config(folder, architectures=["LlamaModel"]),
            "that is LlamaForCausalLM, found LlamaModel",
        ),
        (
            lambda folder: change_config(folder, model_type="bert", architectures=["BertForMaskedLM"]),
            "found BertForMaskedLM",
        ),
        (lambda folder: change_config(folder, quantization_config={"bits": 4}), "Its weights are quantized"),
        (
            lambda folder: change_config(folder, max_position_embeddings=64),
            "has 64 positions, but tokenize.context is 96",
        ),
    ],
)
def test_an_unusable_folder_is_rejected(
    harm: Callable[[Path], None], sentence: str, foreign: Foreign, tmp_path: Path
) -> None:
    """The message has what was found; no pickle is opened and no code is run."""
    folder = tmp_path / "spoilt"
    shutil.copytree(foreign.model, folder)
    harm(folder)
    with pytest.raises(StageError, match=sentence) as failure:
        open_model(folder, foreign)
    assert str(failure.value).startswith("model.path: given cannot be trained on.")


def open_model(folder: Path, foreign: Foreign) -> Any:
    """Open a folder as pretraining does."""
    tokenizer = chat.load_tokenizer(foreign.path("data/tokenize/tokenizer"))
    return pretrained.open_decoder(From(name="from", path="given"), folder, tokenizer, 24, NUMERICS)


def test_missing_weights_are_not_initialized_randomly(foreign: Foreign, tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(foreign.model, folder)
    change_config(folder, num_hidden_layers=3)
    with pytest.raises(StageError, match=r"9 are missing, among them model\.layers\.2\."):
        open_model(folder, foreign)


def test_weights_of_another_shape_are_rejected(foreign: Foreign, tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(foreign.model, folder)
    change_config(folder, vocab_size=9)
    with pytest.raises(StageError, match=r"another shape, among them model\.embed_tokens\.weight"):
        open_model(folder, foreign)


def test_other_tokenizer_is_rejected_by_name(foreign: Foreign, chain: Chain) -> None:
    """Other tokens, another pre-tokenizer, and another end token."""
    ours, theirs = chain.tokenizer(), foreign_tokenizer()
    assert pretrained.tokenizer_difference(theirs, chat.load_tokenizer(foreign.model)) is None
    assert pretrained.tokenizer_difference(theirs, chat.load_tokenizer(foreign.path("data/tokenize/tokenizer"))) is None
    with pytest.raises(StageError, match=r"439 tokens have other ids, the first is '<\|endoftext\|>' \(none in the"):
        pretrained.open_decoder(From(name="from", path="given"), foreign.model, ours, 16, NUMERICS)
    cut = json.loads(theirs.backend_tokenizer.to_str())
    cut["pre_tokenizer"] = cut["pre_tokenizer"]["pretokenizers"][1]
    other = foreign_tokenizer()
    other.backend_tokenizer.pre_tokenizer = type(other.backend_tokenizer).from_str(json.dumps(cut)).pre_tokenizer
    assert pretrained.tokenizer_difference(theirs, other) == ("the tokens are the same, but the pre-tokenizer differs")
    other = foreign_tokenizer()
    other.eos_token = "<|endoftext|>"
    assert pretrained.tokenizer_difference(theirs, other) == "its eos_token is '<|endoftext|>' and not '<|im_end|>'"


def test_masking_without_a_mask_token_is_rejected(foreign: Foreign, tmp_path: Path) -> None:
    """The encoder, and a reward model with word dropout."""
    with pytest.raises(StageError, match="masked pretraining needs a mask token"):
        Vocabulary.of(foreign_tokenizer())
    settings = foreign.settings("reward@train").model_copy(update={"word_dropout": 0.1})
    with pytest.raises(StageError, match=r"reward\.word_dropout is 0\.1, but the model's tokenizer has no mask token"):
        reward.run(settings, foreign.job("reward@train", settings, tmp_path))


class TestEncoder:
    """A given encoder, which masked pretraining continues."""

    @pytest.fixture
    def encoder(self, tmp_path: Path) -> Path:
        return write_family("bert", tmp_path / "bert")

    def open(self, folder: Path, tokenizer: Any) -> Any:
        return pretrained.open_encoder(From(name="from", path="given"), folder, tokenizer, 24, NUMERICS)

    def test_its_weights_are_loaded(self, encoder: Path) -> None:
        from transformers import AutoModelForMaskedLM

        model = self.open(encoder, chat.load_tokenizer(encoder))
        expected = AutoModelForMaskedLM.from_pretrained(encoder).state_dict()
        assert all(torch_equal(weight, expected[name]) for name, weight in model.state_dict().items())

    def test_another_tokenizer_or_kind_of_model_is_rejected(self, encoder: Path, foreign: Foreign) -> None:
        with pytest.raises(StageError, match="Its tokenizer is not the one that encoded the shards"):
            self.open(encoder, chat.load_tokenizer(foreign.model))
        with pytest.raises(StageError, match="Expected a masked language model that Transformers knows, found Llama"):
            self.open(foreign.model, chat.load_tokenizer(foreign.model))

    def test_another_pad_token_than_the_configs_is_rejected(self, encoder: Path) -> None:
        change_config(encoder, pad_token_id=7)
        with pytest.raises(StageError, match=r"pad_token_id of its config\.json is 7, but its tokenizer's is 0"):
            self.open(encoder, chat.load_tokenizer(encoder))

    def test_settings_without_a_mask_token_are_rejected(self, params: dict[str, Any], encoder: Path) -> None:
        source = {"name": "from", "path": str(encoder)}
        params["pretrain"]["masked"]["model"] = params["tokenize"]["tokenizer"] = source
        settings = json.loads((encoder / "tokenizer_config.json").read_text(encoding="utf-8"))
        del settings["mask_token"]
        (encoder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        with pytest.raises(SettingsError, match="found 'masked', but the tokenizer has no mask token"):
            check(params)


def torch_equal(left: Any, right: Any) -> bool:
    import torch

    return torch.equal(left, right)


@pytest.fixture
def params(foreign: Foreign, tmp_path: Path) -> dict[str, Any]:
    """The default profile's settings with a given model, whose tokenizer has a mask token for the encoder."""
    params: dict[str, Any] = json.loads(json.dumps(read_settings(ROOT / "profiles/default.yaml")))
    folder = shutil.copytree(foreign.model, tmp_path / "given")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer["mask_token"] = "<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    source = {"name": "from", "path": str(folder)}
    params["pretrain"]["causal"]["model"] = params["tokenize"]["tokenizer"] = source
    params["tokenize"]["context"] = POSITIONS
    params["evaluations"], params["compare"]["gates"] = {}, []
    params["quantize"]["chat"]["max_new_tokens"] = POSITIONS // 2
    return params


def test_settings_know_the_size_of_a_given_model(params: dict[str, Any]) -> None:
    """Read from its config if the folder exists; otherwise the stages check it."""
    check(params)
    params["finetune"]["chat"]["method"] = {**LORA, "rank": 33}
    params["tokenize"]["context"] = POSITIONS + 1
    folder = params["pretrain"]["causal"]["model"]["path"]
    with pytest.raises(SettingsError) as failure:
        check(params)
    _, *messages = str(failure.value).splitlines()
    assert [line.strip() for line in messages] == [
        f"tokenize.context: found 97, but it should be at most positions in {folder}/config.json, which is 96: the "
        "model that training starts from has no more positions",
        f"finetune.chat.method.rank: found 33, but it should be at most hidden in {folder}/config.json, which is 32: "
        "the rank of a matrix is at most the model's width",
    ]
    params["pretrain"]["causal"]["model"]["path"] = "no/such/folder"
    check(params)


def test_a_given_model_needs_a_given_tokenizer(params: dict[str, Any]) -> None:
    params["tokenize"]["tokenizer"] = read_settings(ROOT / "profiles/default.yaml")["tokenize"]["tokenizer"]
    with pytest.raises(SettingsError, match=r"model\.name: found 'from', which needs tokenize\.tokenizer\.name to be"):
        check(params)


def test_the_given_folder_is_an_input(foreign: Foreign, tmp_path: Path) -> None:
    """Its hash is therefore part of the recipe."""
    job: Job = foreign.job("pretrain@causal", foreign.settings("pretrain@causal"), tmp_path)
    assert job.inputs["start"] == foreign.model
    assert tokenize.INPUTS["source"] == "{config.tokenizer.path}"


def test_examples_of_the_guide_are_valid() -> None:
    """Every YAML block of docs/guides/checkpoint.md is valid in its section."""
    from ruamel.yaml import YAML

    from tests.data_fixtures import ingest_config

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/guides/checkpoint.md").read_text(encoding="utf-8"), re.S)
    checks: dict[str, Callable[..., Any]] = {
        "model": partial(config, "pretrain@causal"), "tokenizer": partial(config, "tokenize"),
        "checkpoint": ingest_config,
        "finetune": lambda finetune: [config("finetune@chat", **entry) for entry in finetune.values()],
        "quantize": lambda quantize, package: [config("quantize@chat", **entry) for entry in quantize.values()],
    }  # fmt: skip
    parts = [YAML(typ="safe", pure=True).load(block) for block in blocks]
    for part in parts:
        assert checks[next(iter(part))](**part)
    assert parts[-1]["checkpoint"] == read_settings(ROOT / "profiles/chat.yaml")["ingest"]["checkpoint"]
