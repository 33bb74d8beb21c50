"""What a folder's files rule out is reported by the settings check, before any stage runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tasks.common import model_folder
from tasks.common.harness import execution
from tasks.rules import consistency
from tasks.rules.user_models import check_user_models
from tasks.rules.user_tokenizers import check_user_tokenizers
from tests.family_fixtures import write_family


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of a few families."""
    root = tmp_path_factory.mktemp("folders")
    for family in ("llama", "gemma2", "olmo2"):
        write_family(family, root / family)
    return root


def problems(**entries: dict[str, Any]) -> list[str]:
    """Return the problems of settings with one entry `x` in each of the given sections."""
    return list(check_user_models({section: {"x": entry} for section, entry in entries.items()}))


def test_damaged_folder_is_reported_once_with_its_setting(folders: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    found = problems(finetune={"model": str(folder)}, evaluate={"model": str(folder)})
    where = f"finetune.x.model: {folder} cannot be used as a model: it"
    assert found == [
        f"{where} has no weights (model.safetensors): download the folder again",
        f"{where} has no tokenizer (tokenizer.json): save the model's tokenizer there with save_pretrained",
    ]
    assert problems(finetune={"model": str(folders / "llama")}) == []


def test_family_that_cannot_be_served_is_reported_with_its_descendants(folders: Path) -> None:
    params = {
        "finetune": {"chat": {"model": str(folders / "gemma2")}},
        "quantize": {"chat": {"model": "data/finetune/chat/model"}},
    }
    [problem] = check_user_models(params)
    assert problem.startswith("quantize.chat.model: a gemma2 model caps its attention's logits")
    assert problem in list(consistency.check_settings(params))


@pytest.mark.parametrize(
    ("section", "entry"), [("reward", {}), ("finetune", {"task": {"name": "classification"}})], ids=["reward", "head"]
)
def test_family_without_a_head_is_reported(section: str, entry: dict[str, Any], folders: Path) -> None:
    [problem] = problems(**{section: {"model": str(folders / "olmo2"), **entry}})
    assert problem.startswith(f"{section}.x.model: Transformers has no class with a classification head for a olmo2")
    assert problems(finetune={"model": str(folders / "olmo2"), "task": {"name": "chat"}}) == []


def test_families_without_a_head_are_those_of_transformers() -> None:
    """Of the decoders that the matrix runs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as WITH_HEAD

    from tests.family_fixtures import DECODERS

    assert set(model_folder.WITHOUT_HEAD).isdisjoint(WITH_HEAD)
    for family in DECODERS.values():
        assert (family.model_type in model_folder.WITHOUT_HEAD) != (family.model_type in WITH_HEAD)


def test_families_without_gated_layers_are_reported() -> None:
    """The matrix's page says which families cannot be pruned or packed; the settings check agrees with it."""
    from tests.family_fixtures import DECODERS
    from tests.test_architectures import documented

    for name, family in DECODERS.items():
        config = {"model_type": family.model_type}
        assert bool(list(model_folder.layer_problems(config))) == (documented()[name, "prune"] == "no")
        assert bool(list(model_folder.packing_problems(config))) == (documented()[name, "packing"] == "no")


def test_shards_of_another_tokenizer_are_refused(folders: Path) -> None:
    """The ids in the shards would mean other tokens to the model."""
    entry = {"model": str(folders / "llama"), "pretraining_mix": {"weight": 0.5}}
    params: dict[str, Any] = {"finetune": {"chat": entry}, "tokenize": {"tokenizer": {"name": "train", "path": "data"}}}
    [problem] = check_user_models(params)
    assert problem.startswith(
        "finetune.chat.pretraining_mix.weight: found 0.5, but the token shards hold the ids of an"
    )
    for path in (folders / "olmo2", folders / "gemma2"):
        params["tokenize"]["tokenizer"] = {"name": "from", "path": str(path)}
        assert len(list(check_user_models(params))) == 1
    params["tokenize"]["tokenizer"]["path"] = str(folders / "llama")
    assert list(check_user_models(params)) == []
    params["tokenize"]["tokenizer"] = {"name": "train", "path": "data"}
    entry["pretraining_mix"] = {"weight": 0.0}
    assert list(check_user_models(params)) == []


def test_base_of_an_adapter_is_an_input(folders: Path, tmp_path: Path) -> None:
    """So that its hash is in the recipe and its files are in the lineage."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folders / "llama")}))
    inputs = execution.add_adapter_bases({"model": tmp_path, "instructions": folders})
    assert inputs == {"model": tmp_path, "instructions": folders, "base of model": folders / "llama"}


@pytest.fixture
def copy(folders: Path, tmp_path: Path) -> Path:
    """A folder of the Llama family to change."""
    return Path(shutil.copytree(folders / "llama", tmp_path / "copy"))


def tokenizer_problems(**sections: Any) -> list[str]:
    """Return the problems of tokenizers, of settings with these sections."""
    return list(check_user_tokenizers(sections))


def change(path: Path, **entries: Any) -> None:
    """Change entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **entries}), encoding="utf-8")


def test_model_without_a_chat_template_needs_one_by_name(copy: Path) -> None:
    """An entry further up may have named it; for what trains no conversations it is not needed."""
    change(copy / "tokenizer_config.json", chat_template=None)
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    chat = {"model": str(copy)}
    [problem] = tokenizer_problems(finetune={"chat": chat})
    assert problem.startswith(
        f"finetune.chat.chat_template: found none, and {copy} has no chat template: set it to one"
    )
    named = {**chat, "chat_template": "plain"}
    later = {"model": "data/finetune/chat/model"}
    assert tokenizer_problems(finetune={"chat": named}, align={"policy": later}) == []
    assert tokenizer_problems(quantize={"chat": chat}) == []
    (copy / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert tokenizer_problems(finetune={"chat": chat}) == []


def test_name_of_a_chat_template_is_checked_against_the_tokenizer(copy: Path) -> None:
    unknown, lacking = (
        tokenizer_problems(finetune={"chat": {"model": str(copy), "chat_template": name}})
        for name in ("alpaca", "phi3")
    )
    assert unknown[0].startswith("finetune.chat.chat_template: found 'alpaca', but it should be one of chatml, llama3")
    assert f"the tokenizer in {copy} lacks <|assistant|>, <|end|>, <|user|>" in lacking[0]
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    change(
        copy / "tokenizer_config.json",
        chat_template=[{"name": "tool", "template": "a"}, {"name": "rag", "template": "b"}],
    )
    [several] = tokenizer_problems(evaluate={"start": {"model": str(copy)}})
    assert several.endswith("has several chat templates: set it to one of tool, rag")


def test_tokenizer_without_an_end_token_is_refused_for_tokenize(copy: Path) -> None:
    tokenize = {"tokenizer": {"name": "from", "path": str(copy)}}
    assert tokenizer_problems(tokenize=tokenize) == []
    change(copy / "tokenizer_config.json", eos_token=None, sep_token=None)
    (copy / "special_tokens_map.json").unlink(missing_ok=True)
    [problem] = tokenizer_problems(tokenize=tokenize)
    assert problem.startswith(f"tokenize.tokenizer.path: {copy} cannot be used: its tokenizer names no end token (eos")
