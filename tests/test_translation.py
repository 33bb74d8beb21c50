"""Translation of configurations of LLaMA-Factory and axolotl; keys and values are those of the tools' examples."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from ruamel.yaml import YAML

from flows.start.translated import amounts
from flows.start.translation import files
from flows.start.translation.result import CHECKPOINT, Translation
from flows.start.translation.translate import translate
from tasks.common import params_file
from tasks.common.settings import ENTRY_STAGES, SettingsError
from tasks.ingest.reading import Reading
from tasks.ingest.settings import Config
from tasks.ingest.source_reading import read_source

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Add", "input": "1 and 2", "output": "3"},
]
SHAREGPT = [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}]
OPENAI = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}]
TURN = {"from": "human", "value": "Which is better?"}
CHOSEN, REJECTED = {"from": "gpt", "value": "A."}, {"from": "gpt", "value": "B."}
PAIRS = [{"conversations": [TURN], "chosen": CHOSEN, "rejected": REJECTED}]
ADDED = {"kind": "files", "path": "added.jsonl", "table": "instructions"}  # where the file names none that is here
INFO: dict[str, Any] = {
    "plain": {"file_name": "plain.json"},
    "turns": {"file_name": "turns.jsonl", "formatting": "sharegpt"},
    "pairs": {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt"},
    "text": {"file_name": "text.jsonl", "columns": {"prompt": "body"}},
    "remote": {"hf_hub_url": "owner/remote"},
}
LORA = {
    "model_name_or_path": "base", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
    "lora_target": "all", "dataset": "plain, turns", "template": "qwen3_nothink", "cutoff_len": 1024,
    "preprocessing_num_workers": 16, "output_dir": "saves/x", "logging_steps": 10, "plot_loss": True,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": "1.0e-4",
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True,
}  # fmt: skip
AXOLOTL = {
    "base_model": "base", "datasets": [{"path": "alpaca.jsonl", "type": "alpaca"}], "val_set_size": 0.05,
    "adapter": "lora", "sequence_len": 512, "sample_packing": True, "lora_r": 16, "lora_alpha": 32,
    "lora_dropout": 0.05, "lora_target_linear": True, "wandb_project": None, "micro_batch_size": 2,
    "gradient_accumulation_steps": 4, "num_epochs": 2, "optimizer": "adamw_torch", "lr_scheduler": "cosine",
    "learning_rate": 0.0002, "bf16": "auto", "tf32": False, "warmup_steps": 10, "weight_decay": 0.1,
}  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder as both tools are started in, with a model and data; the current folder is another one."""
    root, elsewhere = tmp_path / "tool", tmp_path / "elsewhere"
    for path in (root / "base", root / "data", root / "examples", elsewhere):
        path.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    (root / "data/dataset_info.json").write_text(json.dumps(INFO), encoding="utf-8")
    (root / "data/plain.json").write_text(json.dumps(ALPACA), encoding="utf-8")
    (root / "data/pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    write_lines(root / "data/turns.jsonl", SHAREGPT)
    write_lines(root / "data/text.jsonl", [{"body": "A document."}])
    write_lines(root / "alpaca.jsonl", ALPACA)
    write_lines(root / "openai.jsonl", OPENAI)
    return root


def translated(folder: Path, content: Any, *absent: str, **changes: Any) -> Translation:
    """Return the translation of settings with changes, as a file in a folder below."""
    path = folder / "examples/run.yaml"
    kept = {key: value for key, value in {**content, **changes}.items() if key not in absent}
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(kept, file)
    return translate(path)


def copy_sources(translation: Translation, target: Path) -> None:
    """Do with the sources what `bessemer init` does: copy and write their files."""
    for source in translation.sources:
        for name, file in source.copies.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(file.read_bytes())
        for name, text in source.texts.items():
            (target / name).write_text(text, encoding="utf-8")


def read_rows(translation: Translation, target: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the tables that `ingest` reads from the translation's sources; no row may be rejected."""
    copy_sources(translation, target)
    config = Config.model_validate({"sources": [dict(source.settings) for source in translation.sources]})
    tables: dict[str, list[dict[str, Any]]] = {}
    for source in config.sources:
        reading = Reading(source.name, source.licence)
        read_source(source, target, reading)
        assert reading.rejections == 0, reading.rejected
        found: dict[str, Any] = {**reading.rows, "prose": [{"text": text} for text in cast(list[str], reading.prose)]}
        for table, rows in found.items():
            tables.setdefault(table, []).extend(rows)
    return tables


def checked(translation: Translation, amount: int = 1000) -> dict[str, Any]:
    """Return the sections with steps, after the checks of `params.yaml`: with every other section in its short form."""
    sections = translation.with_steps(dict.fromkeys(translation.entries, amount))
    shortest: dict[str, Any] = {
        name: {} for name in ("base", "numerics", "placement", "validate", "compare", "evaluations", *ENTRY_STAGES)
    }
    made = [entry for entry in translation.entries if not entry.startswith("reward")]
    served = f"data/{made[-1].replace('.', '/')}/model" if made else CHECKPOINT
    sources = [dict(source.settings) for source in translation.sources]
    params = {
        **shortest,
        "quantize": {"chat": {"model": served, "max_new_tokens": sections["tokenize"]["context"] // 2}},
        "evaluate": {"chat": {"model": "data/quantize/chat/model", "max_new_tokens": 64}},
        "package": {"chat": "data/quantize/chat/model"},
        **sections,
        "ingest": {**sections.get("ingest", {}), "sources": sources or [ADDED]},
    }
    params_file.check(params)
    return sections


def names_of(translation: Translation) -> set[str]:
    return {line.setting for line in translation.untranslated}


def test_lora_fine_tuning_of_llamafactory_is_translated_whole(folder: Path) -> None:
    result = translated(folder, LORA)
    sections = checked(result)
    assert (result.tool, result.checkpoint, result.template) == ("llamafactory", folder / "base", "qwen3_nothink")
    assert result.untranslated == ()
    assert set(result.without_effect) == {"preprocessing_num_workers", "output_dir", "logging_steps", "plot_loss"}
    assert sections["tokenize"] == {"tokenizer": {"name": "from", "path": CHECKPOINT}, "context": 1024}
    assert sections["finetune"]["chat"] == {
        "model": CHECKPOINT, "method": {"name": "lora", "rank": 8, "alpha": 16}, "max_tokens": 1024,
        "too_long": "truncate", "batch": 8, "gradient_accumulation_steps": 8, "steps": 375,
        "optimizer": {"name": "adamw", "learning_rate": 1e-4, "weight_decay": 0.0, "betas": [0.9, 0.999],
                      "epsilon": 1e-8, "schedule": {"name": "cosine", "warmup": 0.1, "floor": 0.0}},
    }  # fmt: skip


def test_data_sets_of_llamafactory_are_read_by_ingest(folder: Path, tmp_path: Path) -> None:
    rows = read_rows(translated(folder, LORA), tmp_path / "sources")["instructions"]
    assert [row["messages"][-1]["content"] for row in rows] == ["Blue.", "3", "Hello."]


def test_documents_of_llamafactory_are_read_by_ingest(folder: Path, tmp_path: Path) -> None:
    result = translated(folder, LORA, stage="pt", dataset="text", finetuning_type="full")
    assert read_rows(result, tmp_path / "sources")["prose"] == [{"text": "A document."}]
    assert checked(result, amount=81920)["pretrain"]["causal"]["steps"] == 30  # 3 epochs x 81,920 / (8 x 1024)


def test_sections_of_every_stage_of_llamafactory_are_accepted(folder: Path) -> None:
    reward = checked(translated(folder, LORA, stage="rm", dataset="pairs"))["reward"]["train"]
    assert (reward["max_tokens"], reward["batch"], reward["steps"]) == (1024, 8, 375)
    dpo = checked(translated(folder, LORA, stage="dpo", dataset="pairs", pref_loss="ipo", pref_beta=0.3))
    policy = dpo["align"]["policy"]
    assert policy["algorithm"] == {"name": "dpo", "beta": 0.3, "loss": {"name": "ipo"}}
    assert (policy["minibatch"], policy["episodes"], policy["iterations"]) == (16, 64, 94)  # 3 x 1000 / 32 pairs
    ppo = checked(translated(folder, LORA, stage="ppo", reward_model="rewards", ppo_buffer_size=2))
    assert (ppo["align"]["policy"]["episodes"], ppo["align"]["policy"]["iterations"]) == (16, 188)
    assert ppo["align"]["policy"]["reward"]["path"] == "data/reward/train/model"


def test_reward_model_of_llamafactory_is_named_with_the_remedy(folder: Path) -> None:
    (line,) = translated(folder, LORA, stage="ppo", reward_model="rewards").untranslated
    assert line.setting == "reward_model"
    assert "--preferences" in str(line)


def test_pairs_of_llamafactory_are_read_by_ingest(folder: Path, tmp_path: Path) -> None:
    (row,) = read_rows(translated(folder, LORA, stage="dpo", dataset="pairs"), tmp_path / "sources")["rankings"]
    assert (row["responses"], row["ranks"]) == (["A.", "B."], [1, 2])


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"finetuning_type": "full"}, None),  # the default
        ({"finetuning_type": "freeze", "freeze_trainable_layers": 3}, {"name": "top_layers", "layers": 3}),
        ({"lora_target": "q_proj,k_proj,v_proj,o_proj"},
         {"name": "lora", "rank": 8, "alpha": 16, "targets": "attention"}),
        ({"lora_alpha": 4, "use_dora": True}, {"name": "lora", "rank": 8, "alpha": 4, "dora": True}),
        ({"quantization_bit": 4}, {"name": "qlora", "rank": 8, "alpha": 16}),
    ],
)  # fmt: skip
def test_methods_of_llamafactory(folder: Path, changes: dict[str, Any], method: dict[str, Any] | None) -> None:
    result = translated(folder, LORA, **changes)
    assert checked(result)["finetune"]["chat"].get("method") == method
    assert result.untranslated == ()
    assert result.sections["numerics" if "quantization_bit" in changes else "tokenize"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora_target": "q_proj,v_proj"}, "lora_target"),
        ({"quantization_bit": 8}, "quantization_bit"),
        ({"use_galore": True}, "use_galore"),
        ({"optim": "rmsprop"}, "optim"),
        ({"optim": "adamw_8bit"}, "optim"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        ({"max_samples": 100}, "max_samples"),
        ({"deepspeed": "ds_z3.json"}, "deepspeed"),
        ({"fp16": True, "bf16": False}, "fp16"),
        ({"enable_thinking": False}, "enable_thinking"),
        ({"eval_dataset": "plain"}, "eval_dataset"),
        ({"misspelt": 1}, "misspelt"),
        ({"finetuning_type": "oft"}, "finetuning_type"),
        ({"model_name_or_path": "owner/model"}, "model_name_or_path"),
        ({"dataset": "plain,remote"}, "dataset"),
    ],
)
def test_untranslated_settings_of_llamafactory_are_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    result = translated(folder, LORA, **changes)
    assert names_of(result) == {named}
    assert all(line.why and line.instead for line in result.untranslated)
    checked(result)


def test_settings_of_another_stage_have_no_effect(folder: Path) -> None:
    result = translated(folder, LORA, pref_beta=0.1, ppo_epochs=4, freeze_trainable_layers=2, use_galore=False)
    assert {"pref_beta", "ppo_epochs", "freeze_trainable_layers", "use_galore"} <= set(result.without_effect)
    assert result.untranslated == ()


def test_steps_and_warmup_steps_are_kept(folder: Path) -> None:
    result = translated(folder, LORA, "warmup_ratio", max_steps=200, warmup_steps=50)
    chat = checked(result)["finetune"]["chat"]
    assert result.epochs == {}
    assert (chat["steps"], chat["optimizer"]["schedule"]["warmup"]) == (200, 0.25)


@pytest.mark.parametrize(("size", "share"), [(0.2, 0.2), (50, 0.05)])
def test_validation_set_becomes_a_share(folder: Path, size: float, share: float) -> None:
    assert checked(translated(folder, LORA, val_size=size))["ingest"] == {"heldout": {"entities": share}}


def test_fine_tuning_of_axolotl_is_translated_whole(folder: Path, tmp_path: Path) -> None:
    result = translated(folder, AXOLOTL)
    chat = checked(result)["finetune"]["chat"]
    assert (result.tool, result.checkpoint, result.untranslated) == ("axolotl", folder / "base", ())
    assert set(result.without_effect) == {"wandb_project", "tf32"}
    assert result.sections["ingest"] == {"heldout": {"entities": 0.05}}
    assert chat["method"] == {"name": "lora", "dropout": 0.05}
    assert chat["task"] == {"name": "chat", "packing": 512}
    assert (chat["batch"], chat["steps"]) == (8, 250)
    assert chat["optimizer"]["schedule"] == {"name": "cosine", "warmup": 0.04, "floor": 0.0}  # 10 of 250 steps
    assert len(read_rows(result, tmp_path / "sources")["instructions"]) == 2


CHAT_TYPES: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"type": "chat_template"}, OPENAI),
    ({"type": "sharegpt"}, SHAREGPT),
    (
        {"type": "chat_template", "field_messages": "conversations",
         "message_property_mappings": {"role": "from", "content": "value"}},
        SHAREGPT,
    ),
    (
        {"type": "chat_template", "field_messages": "dialogue", "message_field_role": "who",
         "message_field_content": "says", "roles": {"user": ["customer"], "assistant": ["agent"]}},
        [{"dialogue": [{"who": "customer", "says": "Hi"}, {"who": "agent", "says": "Hello."}]}],
    ),
    ({"type": "alpaca_chat.load_qa"}, [{"question": "Hi", "answer": "Hello.", "input": "not read"}]),
    ({"type": {"field_instruction": "ask", "field_output": "reply"}}, [{"ask": "Hi", "reply": "Hello."}]),
]  # fmt: skip


@pytest.mark.parametrize(("data", "rows"), CHAT_TYPES)
def test_conversations_of_axolotl_are_read_by_ingest(
    folder: Path, tmp_path: Path, data: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    write_lines(folder / "rows.jsonl", rows)
    result = translated(folder, AXOLOTL, datasets=[{"path": "rows.jsonl", "ds_type": "json", **data}])
    (row,) = read_rows(result, tmp_path / "sources")["instructions"]
    assert [(turn["role"], turn["content"]) for turn in row["messages"]] == [("user", "Hi"), ("assistant", "Hello.")]
    assert result.untranslated == ()
    checked(result)


ROLE = {"role": "user", "content": "Hi"}
PAIR_TYPES: list[tuple[Any, dict[str, Any]]] = [
    ("chat_template.default", {"messages": [ROLE], "chosen": {"role": "assistant", "content": "A"},
                               "rejected": {"role": "assistant", "content": "B"}}),
    ("chat_template.argilla", {"chosen": [ROLE, {"role": "assistant", "content": "A"}],
                               "rejected": [ROLE, {"role": "assistant", "content": "B"}]}),
    ("chatml.intel", {"question": "Hi", "chosen": "A", "rejected": "B"}),
    ("llama3.argilla", {"instruction": "Hi", "chosen_response": "A", "rejected_response": "B"}),
    ("chatml", {"input": "Hi", "chosen": "A", "rejected": "B"}),
    ({"field_prompt": "ask", "field_chosen": "good", "field_rejected": "bad"}, {"ask": "Hi", "good": "A", "bad": "B"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row"), PAIR_TYPES)
def test_pairs_of_axolotl_are_read_by_ingest(folder: Path, tmp_path: Path, kind: Any, row: dict[str, Any]) -> None:
    write_lines(folder / "rows.jsonl", [row])
    result = translated(folder, AXOLOTL, rl="ipo", rl_beta=0.2, datasets=[{"path": "rows.jsonl", "type": kind}])
    (read,) = read_rows(result, tmp_path / "sources")["rankings"]
    assert (read["prompt"], read["responses"]) == ([ROLE], ["A", "B"])
    assert checked(result)["align"]["policy"]["algorithm"] == {"name": "dpo", "beta": 0.2, "loss": {"name": "ipo"}}


def test_reward_model_and_pretraining_of_axolotl_are_translated(folder: Path, tmp_path: Path) -> None:
    write_lines(folder / "rows.jsonl", [{"input": "Hi", "chosen": "A", "rejected": "B"}])
    data = [{"path": "rows.jsonl", "type": "bradley_terry.chat_template"}]
    result = translated(folder, AXOLOTL, reward_model=True, datasets=data)
    assert checked(result)["reward"]["train"]["max_tokens"] == 512
    assert len(read_rows(result, tmp_path / "rewards")["rankings"]) == 1
    pages = [{"path": "json", "data_files": ["data/text.jsonl"], "text_column": "body"}]
    result = translated(folder, AXOLOTL, "datasets", "adapter", pretraining_dataset=pages, max_steps=7)
    assert checked(result)["pretrain"]["causal"]["steps"] == 7
    assert read_rows(result, tmp_path / "pages")["prose"] == [{"text": "A document."}]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"datasets": [{"path": "tatsu-lab/alpaca", "type": "alpaca"}]}, "datasets.0.path"),
        ({"datasets": [{"path": "alpaca.jsonl", "type": "metharme"}]}, "datasets.0.type"),
        ({"datasets": [{"path": "alpaca.jsonl", "type": "alpaca", "shards": 4}]}, "datasets.0.shards"),
        ({"datasets": [{"path": "alpaca.jsonl", "type": {"format": "Q: {instruction}"}}]}, "datasets.0.type.format"),
        ({"base_model": "owner/model"}, "base_model"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"special_tokens": {"eos_token": "<|end|>"}}, "special_tokens"),
        ({"train_on_inputs": True}, "train_on_inputs"),
        ({"lora_modules_to_save": ["embed_tokens"]}, "lora_modules_to_save"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs.power"),
    ],
)
def test_untranslated_settings_of_axolotl_are_named(folder: Path, changes: dict[str, Any], named: str) -> None:
    result = translated(folder, AXOLOTL, **changes)
    assert names_of(result) == {named}
    checked(result)


def test_qlora_of_axolotl_needs_a_gpu(folder: Path) -> None:
    result = translated(folder, AXOLOTL, adapter="qlora", load_in_4bit=True)
    assert result.sections["numerics"]["device"] == "cuda"
    assert checked(result)["finetune"]["chat"]["method"]["name"] == "qlora"


def test_adapter_folder_is_reported(folder: Path) -> None:
    (folder / "lora").mkdir()
    assert translated(folder, AXOLOTL, lora_model_dir="lora").adapter == folder / "lora"


def test_data_folder_of_another_kind_in_the_current_folder_is_passed_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere/data").mkdir()
    (source,) = translated(folder, LORA).sources
    assert source.copies["llamafactory/dataset_info.json"] == folder / "data/dataset_info.json"


def test_rows_are_counted_whatever_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    write_lines(path, [{"dialogue": [{"who": "customer", "says": f"Question {number:04}"}]} for number in range(5000)])
    assert files.count_rows(path) == 5000
    monkeypatch.setattr(files, "ROWS_COUNTED", 2000)
    assert files.count_rows(path) == pytest.approx(5000, rel=0.2)


def test_epochs_are_of_all_rows_whatever_their_columns(folder: Path) -> None:
    data, rows = CHAT_TYPES[3]
    write_lines(folder / "rows.jsonl", rows * 80)
    result = translated(folder, AXOLOTL, datasets=[{"path": "rows.jsonl", **data}])
    assert amounts(result) == {"finetune.chat": 80}


def test_files_in_the_current_folder_come_first(folder: Path, tmp_path: Path) -> None:
    write_lines(tmp_path / "elsewhere/alpaca.jsonl", ALPACA[:1])
    (source,) = translated(folder, AXOLOTL).sources
    assert list(source.copies.values()) == [tmp_path / "elsewhere/alpaca.jsonl"]


@pytest.mark.parametrize(
    ("content", "changes", "expected"),
    [
        (LORA, {"stage": "kto"}, "collect answers to the same prompt in pairs"),
        (LORA, {"stage": "sftt"}, "stage: found 'sftt', expected one of pt, sft, rm, ppo, dpo, kto"),
        (LORA, {"pref_loss": "simpo", "stage": "dpo", "dataset": "pairs"}, "pref_loss: found 'simpo'"),
        (LORA, {"dataset": "absent"}, "has no data set absent"),
        (LORA, {"dataset": "pairs"}, "pairs has rankings (ranking in dataset_info.json), but stage sft needs"),
        (LORA, {"dataset_dir": "nowhere"}, "dataset_dir: found nowhere, expected a folder with dataset_info.json"),
        (LORA, {"model_name_or_path": "./absent"}, "model_name_or_path: found ./absent, expected the folder"),
        (LORA, {"learning_rate": "fast"}, "learning_rate: found 'fast', expected a number"),
        (LORA, {"val_size": float("nan")}, "val_size: found nan, expected a number"),
        (LORA, {"dataset_dir": "x" * 5000}, "expected a folder with dataset_info.json"),
        (AXOLOTL, {"rl": ["dpo"]}, "rl: found ['dpo'], expected one of dpo, ipo"),
        (AXOLOTL, {"datasets": [{"path": "openai.jsonl", "type": "sharegpt", "roles": ["user"]}]},
         "datasets.0.roles: found ['user'], expected settings by name"),
        (LORA, {"per_device_train_batch_size": 0}, "per_device_train_batch_size: found 0, expected a number above 0"),
        (AXOLOTL, {"rl": "kto"}, "rl: found 'kto', which learns from single answers"),
        (AXOLOTL, {"rl": "orpo"}, "rl: found 'orpo', which learns from pairs without a reference model"),
        (AXOLOTL, {"datasets": [{"path": "absent.jsonl", "type": "alpaca"}]}, "datasets.0.path: found absent.jsonl"),
        (AXOLOTL, {"datasets": ["text"]}, "datasets.0.path: found text"),
        (AXOLOTL, {"processor_type": "AutoProcessor"}, "processor_type: images or sound cannot be trained"),
        ({"train_dataset": "x.yaml", "model": "base"}, {}, "for version 1 of LLaMA-Factory"),
        ({"model_name_or_path": "base", "template": "x"}, {}, "it has neither stage nor dataset"),
        ({"base_model": "base", "adapter": "lora"}, {}, "datasets: this key is missing"),
        ({"model": "base"}, {}, "found none of their keys"),
        ({"stage": "sft", "base_model": "base"}, {}, "found stage of LLaMA-Factory and base_model of axolotl"),
    ],
)  # fmt: skip
def test_unusable_configurations_are_refused(
    folder: Path, content: Any, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(SettingsError) as error:
        translated(folder, content, **changes)
    assert expected in str(error.value)


def test_all_problems_are_reported_at_once(folder: Path) -> None:
    with pytest.raises(SettingsError, match="3 problems") as error:
        translated(folder, LORA, dataset="absent", learning_rate="fast", model_name_or_path="./absent")
    assert all(name in str(error.value) for name in ("no data set absent", "learning_rate", "./absent"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a: [1", "expected YAML in UTF-8"), ("- a\n", "expected settings by name, found list"), ("", "found NoneType")],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError, match=expected):
        translate(tmp_path / "run.yaml")
    with pytest.raises(SettingsError, match="found no file"):
        translate(tmp_path / "absent.yaml")


@pytest.mark.parametrize("content", [LORA, AXOLOTL])
def test_value_of_a_wrong_type_never_ends_in_a_traceback(folder: Path, content: dict[str, Any]) -> None:
    """Each is a problem of the file, is named as not translated, or means the default."""
    for key in content:
        for value in (None, -1, True, "", [[1]], {"a": [1]}):
            with suppress(SettingsError):
                result = translated(folder, content, **{key: value})
                assert result.with_steps(dict.fromkeys(result.entries, 10)), (key, value)
