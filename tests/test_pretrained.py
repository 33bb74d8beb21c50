"""Pretraining that goes on from a given model: where it begins, what is refused, and what can be done with it."""

import copy
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
from tasks import evaluate, finetune, pretrain, prune, reward, tokenize
from tasks.common.consistency import REWARD
from tasks.common.modelling import models, pretrained
from tasks.common.modelling.pretrained import From
from tasks.common.settings import SettingsError, check, read_params
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.masking import Vocabulary
from tasks.common.text.shards import Split
from tasks.common.training.loop import Share
from tests.conftest import ROOT
from tests.foreign_fixtures import POSITIONS, foreign_model, foreign_tokenizer, write_foreign
from tests.training_fixtures import LORA, NUMERICS, SETTINGS, Chain, chain, config

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)
CONTEXT = 96


class Foreign(Chain):
    """The tiny chain, made from a given model as far as the stages that it is asked for."""

    def __init__(self, root: Path, model: Path) -> None:
        super().__init__(root)
        given = {"name": "from", "path": str(model)}
        clm = {"model": given, "steps": 4, "window": 24, "batch": 4}
        self.changes: dict[str, dict[str, Any]] = {
            "tokenize": {"tokenizer": given, "context": CONTEXT},
            "pretrain@clm": clm,
            "finetune": {"method": LORA, "steps": 2, "batch": 4, "mix": {**SETTINGS["finetune"]["mix"], "window": 24}},
            **{name: {"model": "data/finetune/model", "steps": 2, "word_dropout": 0.0} for name in REWARD},
        }
        self.model = model

    def settings(self, name: str) -> Any:
        """Return a stage's settings."""
        return config(name, **self.changes.get(name, {}))

    def path(self, path: str) -> Path:
        """Return an output, made first with this chain's settings; a path of another kind is a given folder."""
        if path == str(self.model):
            return self.model
        if not (self.root / path).exists():
            module, key = self.makers[path]
            name = module.__name__.rpartition(".")[2] + (f"@{key}" if key else "")
            settings = self.settings(name)
            outputs = {item: self.root / at.format(key=key) for item, at in module.OUTPUTS.items()}
            self.metrics[name] = self.run(self._job(name, settings, outputs), settings)
        return self.root / path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """A chain that starts from a model that others made."""
    root = tmp_path_factory.mktemp("foreign")
    return Foreign(root / "project", write_foreign(root / "given"))


def test_training_begins_at_the_loss_of_the_given_model(foreign: Foreign, tmp_path: Path) -> None:
    """The first point of the curve is what Transformers says of the first batch."""
    import torch
    from transformers import AutoModelForCausalLM

    settings = foreign.settings("pretrain@clm")
    split = Split.open(foreign.path("data/tokenize/shards") / "train")
    model: Any = AutoModelForCausalLM.from_pretrained(foreign.model, dtype=torch.float32).eval()
    causal = pretrain.Causal(settings, foreign.job("pretrain@clm", settings, tmp_path), model, split)
    ids = causal.draw(0, Share()).content
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=ids).loss.item()
    with (foreign.path("data/pretrain/clm/model").parent / "history.csv").open(newline="") as file:
        first, *_, last = [float(row["loss"]) for row in csv.DictReader(file)]
    assert first == pytest.approx(wanted, rel=1e-5)
    assert last < first


def test_a_model_with_another_cut_of_the_same_weights_would_not_pass(foreign: Foreign) -> None:
    """What was trained is the given model: same shape, other weights, and its tokenizer with its template."""
    import torch

    model: Any = models.load_decoder(foreign.path("data/pretrain/clm/model"), NUMERICS)
    given: Any = foreign_model(foreign_tokenizer())
    assert model.config.vocab_size == given.config.vocab_size
    assert not torch.equal(model.get_input_embeddings().weight, given.get_input_embeddings().weight)
    assert torch.allclose(model.get_input_embeddings().weight, given.get_input_embeddings().weight, atol=0.02)
    tokenizer = chat.load_tokenizer(foreign.path("data/pretrain/clm/model"))
    ends = (model.config.eos_token_id, model.config.pad_token_id, model.generation_config.eos_token_id)
    assert ends == (tokenizer.eos_token_id,) * 3
    assert tokenizer.model_max_length == CONTEXT
    assert "<|im_start|>assistant\n" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True
    )


def test_the_chain_goes_on_to_the_sheet(foreign: Foreign, tmp_path: Path) -> None:
    """Pretrained, tuned by LoRA, a reward model made of it, and put before the questions, all in its own language."""
    settings = config("evaluate")
    job = foreign.job("evaluate@tuned", settings, tmp_path)
    figures = evaluate.run(settings, job)
    assert figures["exact_match_tuned"] is not None
    assert figures["parameters"] == models.parameters(foreign_model(foreign_tokenizer()))
    assert 1 < figures["bits_per_byte"] < 20
    assert foreign.metrics["pretrain@clm"]["bits_per_byte"] > 1
    assert foreign.metrics["finetune"]["conversations"] == 48


def test_ppo_pruning_and_int8_take_it_too(foreign: Foreign) -> None:
    """They know no tokenizer of their own: what would be served writes a conversation as the model's template does."""
    before = models.parameters(models.load_decoder(foreign.path("data/ppo/model"), NUMERICS))
    assert models.parameters(models.load_decoder(foreign.path("data/prune/model"), NUMERICS)) < before
    served = TextEngine(foreign.path("data/quantize/policy/model"), 1)
    asked = [{"role": "user", "content": "What is the capital of Peru?"}]
    tokenizer = chat.load_tokenizer(foreign.model)
    assert served.encode(asked) == chat.encode_prompt(tokenizer, asked)
    assert served.generate(asked, Sampling(4, 0.0, seed=1)).text is not None


def test_layers_of_another_make_cannot_be_pruned() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(StageError, match="a GPT2LMHeadModel has none"):
        prune.refuse_other_layers(model)


# What is refused


def spoil(folder: Path, **changes: Any) -> None:
    """Change entries of a folder's config."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(*names: str) -> Callable[[Path], None]:
    """Return what removes files of a folder."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def pickled(folder: Path) -> None:
    """Leave weights that only a pickle holds."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    """Leave an index of which one file is missing."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (without("config.json"), r"with a config\.json, which could not be read"),
        (without("model.safetensors"), r"Expected weights in model\.safetensors, found none"),
        (without("tokenizer.json"), r"holds no tokenizer\.json"),
        (pickled, r"found pytorch_model\.bin, which is pickled: a pickle runs code"),
        (sharded, r"model-00002-of-00002\.safetensors is missing"),
        (lambda folder: spoil(folder, auto_map={"AutoModel": "a.B"}), r"code of its own \(auto_map\), which is never"),
        (lambda folder: spoil(folder, architectures=["LlamaModel"]), "that is LlamaForCausalLM, found LlamaModel"),
        (lambda folder: spoil(folder, model_type="bert", architectures=["BertForMaskedLM"]), "found BertForMaskedLM"),
        (lambda folder: spoil(folder, quantization_config={"bits": 4}), "Its weights are quantized"),
        (lambda folder: spoil(folder, vocab_size=9), "embedding has 9 rows, fewer than the 330 tokens"),
        (lambda folder: spoil(folder, max_position_embeddings=64), "knows 64 positions, and tokenize.context is 96"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_told(
    harm: Callable[[Path], None], sentence: str, foreign: Foreign, tmp_path: Path
) -> None:
    """Each with what was found, and none by opening a pickle or running code."""
    folder = tmp_path / "spoilt"
    shutil.copytree(foreign.model, folder)
    harm(folder)
    with pytest.raises(StageError, match=sentence) as failure:
        opened(folder, foreign)
    assert str(failure.value).startswith("pretrain.clm.model.path: given cannot be trained on.")


def opened(folder: Path, foreign: Foreign) -> Any:
    """Open a folder as pretraining does."""
    tokenizer = chat.load_tokenizer(foreign.path("data/tokenize/tokenizer"))
    return pretrained.open_decoder(From(name="from", path="given"), folder, tokenizer, 24, NUMERICS)


def test_weights_that_a_config_lacks_are_not_drawn_anew(foreign: Foreign, tmp_path: Path) -> None:
    folder = tmp_path / "spoilt"
    shutil.copytree(foreign.model, folder)
    spoil(folder, num_hidden_layers=3)
    with pytest.raises(StageError, match=r"9 are missing or of another shape, model\.layers\.2\."):
        opened(folder, foreign)


def test_another_tokenizer_is_refused_by_name(foreign: Foreign, chain: Chain) -> None:
    """Other tokens, the same tokens cut by another rule, and another end."""
    ours, theirs = chain.tokenizer(), foreign_tokenizer()
    assert pretrained.difference(theirs, chat.load_tokenizer(foreign.model)) is None
    assert pretrained.difference(theirs, chat.load_tokenizer(foreign.path("data/tokenize/tokenizer"))) is None
    with pytest.raises(StageError, match=r"439 tokens have other ids, the first is '<\|endoftext\|>' \(none in the"):
        pretrained.open_decoder(From(name="from", path="given"), foreign.model, ours, 16, NUMERICS)
    cut = copy.deepcopy(json.loads(theirs.backend_tokenizer.to_str()))
    cut["pre_tokenizer"] = cut["pre_tokenizer"]["pretokenizers"][1]
    other = foreign_tokenizer()
    other.backend_tokenizer.pre_tokenizer = type(other.backend_tokenizer).from_str(json.dumps(cut)).pre_tokenizer
    assert pretrained.difference(theirs, other) == (
        "the tokens are the same, but the pre-tokenizer that makes them of a text differs"
    )
    other = foreign_tokenizer()
    other.eos_token = "<|endoftext|>"
    assert pretrained.difference(theirs, other) == "its eos_token is '<|endoftext|>' and not '<|im_end|>'"


def test_what_needs_a_mask_token_says_so(foreign: Foreign, tmp_path: Path) -> None:
    """The encoder, and a reward model that hides words."""
    with pytest.raises(StageError, match="masked pretraining hides tokens behind a mask token"):
        Vocabulary.of(foreign_tokenizer())
    settings = foreign.settings("reward@policy").model_copy(update={"word_dropout": 0.1})
    with pytest.raises(StageError, match=r"reward\.word_dropout is 0\.1, but the model's tokenizer has no mask token"):
        reward.run(settings, foreign.job("reward@policy", settings, tmp_path))


@pytest.fixture
def params(foreign: Foreign) -> dict[str, Any]:
    """The default profile's settings with a given model."""
    params = copy.deepcopy(read_params(ROOT / "profiles/default.yaml"))
    given = {"name": "from", "path": str(foreign.model)}
    params["pretrain"]["clm"]["model"] = params["tokenize"]["tokenizer"] = given
    params["tokenize"]["context"] = params["evaluate"]["window"] = POSITIONS
    return params


def test_settings_know_the_size_of_a_given_model(params: dict[str, Any]) -> None:
    """From its config, where it lies already; a folder that a stage is still to make is left to the stages."""
    check(params)
    params["finetune"]["method"] = {**LORA, "rank": 33}
    params["tokenize"]["context"] = POSITIONS + 1
    with pytest.raises(SettingsError) as failure:
        check(params)
    _, *found = str(failure.value).splitlines()
    assert [line.strip() for line in found] == [
        "finetune.method.rank: found 33, but it should be at most pretrain.clm.model.hidden, which is 32: a matrix of "
        "the model's width has no higher rank",
        "tokenize.context: found 97, but it should be at most pretrain.clm.model.positions, which is 96: the model "
        "that training goes on from knows no more",
    ]
    params["pretrain"]["clm"]["model"]["path"] = "data/no/such/folder"
    check(params)


def test_a_given_model_needs_a_given_tokenizer(params: dict[str, Any]) -> None:
    params["tokenize"]["tokenizer"] = read_params(ROOT / "profiles/default.yaml")["tokenize"]["tokenizer"]
    with pytest.raises(SettingsError, match=r"model\.name: found 'from', which needs tokenize\.tokenizer\.name to be"):
        check(params)


def test_the_given_folder_is_an_input(foreign: Foreign, tmp_path: Path) -> None:
    """So its hash is in the recipe."""
    job: Job = foreign.job("pretrain@clm", foreign.settings("pretrain@clm"), tmp_path)
    assert job.inputs["start"] == foreign.model
    assert pretrain.OUTPUTS["model"].format(key="clm") == finetune.DECODER
    assert tokenize.INPUTS["source"] == "{config.tokenizer.path}"


def test_every_example_of_the_page_is_sound() -> None:
    """Every YAML block of docs/checkpoint.md is a part of the section that it is told of."""
    from ruamel.yaml import YAML

    from tests.data_fixtures import ingest_config

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/checkpoint.md").read_text(encoding="utf-8"), re.S)
    made: dict[str, Callable[..., Any]] = {
        "model": partial(config, "pretrain@clm"), "tokenizer": partial(config, "tokenize"), "checkpoint": ingest_config,
    }  # fmt: skip
    parts = [YAML(typ="safe", pure=True).load(block) for block in blocks]
    for part in parts:
        assert made[next(iter(part))](**part)
    assert parts[-1]["checkpoint"] == read_params(ROOT / "profiles/smollm2.yaml")["ingest"]["checkpoint"]
