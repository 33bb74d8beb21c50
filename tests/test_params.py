"""`bessemer params`: every setting with its origin; and the reference that is generated from the settings classes."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flows import params, settings_reference
from tasks.common.defaults import read_settings
from tasks.common.raw_params import read_params
from tasks.common.settings import SettingsError
from tests.conftest import ROOT


def print_params(*wanted: str, only_different: bool = False) -> str:
    """Return the output for some sections of the project's settings."""
    out = Console(width=100, soft_wrap=True, highlight=False, force_terminal=False)
    with out.capture() as captured:
        params.show(out, ROOT, wanted, only_different=only_different)
    return captured.get()


def leaves(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the single values of nested settings by their paths."""
    if isinstance(value, dict) and path[-1:] not in (("mixture",), ("columns",), ("languages",)):
        return {key: leaf for name, item in value.items() for key, leaf in leaves(item, (*path, name)).items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return leaves({str(number): item for number, item in enumerate(value)}, path)
    return {".".join(path): value}


def test_params_json_holds_every_resolved_setting_once() -> None:
    values = {name: item["value"] for name, item in json.loads(params.as_json(ROOT, [])).items()}
    assert values == leaves(read_settings(ROOT / "params.yaml"))


def test_params_origin_is_the_file_exactly_for_its_values() -> None:
    settings = json.loads(params.as_json(ROOT, []))
    written = leaves(read_params(ROOT / "params.yaml"))
    assert {name for name, item in settings.items() if item["origin"] == "params.yaml"} == set(written)
    assert settings["finetune.chat.optimizer.betas"] == {"value": [0.9, 0.98], "origin": "default of AdamW"}
    assert settings["finetune.chat.too_long"]["origin"] == "default of finetune.Config"
    assert settings["align.policy.algorithm.gamma"]["origin"] == "default of Ppo"


def test_params_of_a_section_prints_it_like_yaml() -> None:
    lines = print_params("finetune.chat.optimizer", "tokenize").splitlines()
    assert [line.split("#")[0].rstrip() for line in lines[:2]] == ["tokenize:", "  tokenizer:"]
    assert any(line.split() == ["learning_rate:", "0.003", "#", "params.yaml"] for line in lines)
    assert any(line.split() == ["weight_decay:", "0.01", "#", "default", "of", "AdamW"] for line in lines)
    assert not any(line.startswith(("pretrain:", "  pretraining_mix:")) for line in lines)


def test_params_diff_prints_values_other_than_defaults(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("{action: rollback}", "{action: warn, every: 5}")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    settings = json.loads(params.as_json(tmp_path, ["align.policy.alarms"], only_different=True))
    assert settings == {"align.policy.alarms.every": {"value": 5, "origin": "params.yaml"}}
    assert "gamma" not in print_params("align", only_different=True)
    assert "rollouts" not in print_params("align", only_different=True)  # no heading without a line beneath it


def test_params_of_an_unknown_section_lists_the_sections() -> None:
    with pytest.raises(
        SettingsError, match=r"There is no setting finetune\.optimiser\. The sections are base, numerics"
    ):
        print_params("finetune.optimiser")


def test_reference_is_current() -> None:
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_reference.markdown(), "run `make docs`"


def test_reference_describes_every_setting() -> None:
    """Each has a description, or is a group with a description of its own."""
    rows = [line for line in settings_reference.markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 250
    assert [row for row in rows if row.endswith("|  |")] == []
