"""The package: whole and true, or refused with a sentence."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tasks import package
from tasks.common import identity, stage, tables
from tasks.common.settings import STAGES, Checkpoints, Dtypes, Numerics, Parallel
from tasks.common.stage import Job, StageError


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Everything that the stage reads, in miniature; all gates passed."""
    found: dict[str, Path] = {}
    for name in ("policy", "encoder"):
        found[name] = tmp_path / "in" / name
        found[name].mkdir(parents=True)
        (found[name] / "model.onnx").write_bytes(name.encode())
    row = {"id": "1", "text": "The capital of France is Paris.", "names": ["France", "Paris"], "split": "train"}
    found["corpus"] = tmp_path / "in" / "corpus"
    tables.write([row], found["corpus"], tables.schema("corpus"))
    found["sources"] = write(tmp_path / "in" / "sources.json", [{"name": "facts"}])
    found["evaluation"] = write(tmp_path / "in" / "evaluate.json", evaluation(passed=True))
    for name in package.RECORDS:
        record = {"stage": name.replace("/", "@"), "recipe": f"r {name}", "content": f"c {name}"}
        found[f"record of {name}"] = write(tmp_path / "in" / f"{name.replace('/', '-')}.json", record)
    return found


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def evaluation(passed: bool) -> dict[str, Any]:
    return {"models": [], "gates": [{"name": "masked_names_min", "value": 0.5, "limit": 0.9, "passed": passed}]}


def run(inputs: dict[str, Path], out: Path, refuse: bool = True) -> dict[str, Any]:
    out.mkdir(parents=True)
    numerics = Numerics(
        device="cpu",
        threads=1,
        dtype=Dtypes(decoder="float32", encoder="float32"),
        attention="eager",
        compile="never",
        recompute=False,
        parallel=Parallel(processes=1, engine="data"),
    )
    outputs = {name: out / name for name in package.OUTPUTS}
    job = Job("package", None, inputs, outputs, 1, numerics, "", Checkpoints(url="checkpoints", every_seconds=60.0))
    return package.run(package.Config(refuse_failed_gates=refuse), job)


def test_it_holds_both_models_the_names_and_every_record(inputs: dict[str, Path], tmp_path: Path) -> None:
    metrics = run(inputs, tmp_path / "out")
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert [record["stage"] for record in provenance["stages"]] == [name.replace("/", "@") for name in package.RECORDS]
    assert json.loads((tmp_path / "out" / "encoder" / "names.json").read_text()) == ["France", "Paris"]
    assert (tmp_path / "out" / "policy" / "model.onnx").read_bytes() == b"policy"
    assert provenance["model"] == metrics["model"] == identity.tag(provenance["recipe"], provenance["content"])


def test_the_records_are_those_of_every_stage_before_it() -> None:
    modules = {name: importlib.import_module(f"tasks.{name}") for name in STAGES if name != "package"}
    every = {stage.name_of(name, key) for name, module in modules.items() for key in stage.keys_of(module)}
    assert {name.replace("/", "@") for name in package.RECORDS} == every
    assert len(package.RECORDS) == len(every)


def test_names_are_those_of_the_training_text_once_and_in_order(inputs: dict[str, Path], tmp_path: Path) -> None:
    texts = [(["Rome", "Italy"], "train"), (["Italy"], "train"), (["Atlantis"], "heldout"), ([], "train")]
    rows = [{"id": str(n), "text": "…", "names": names, "split": split} for n, (names, split) in enumerate(texts)]
    (inputs["corpus"] / "part-00000.parquet").unlink()
    tables.write(rows, inputs["corpus"], tables.schema("corpus"))
    assert run(inputs, tmp_path / "out")["names"] == 2
    assert json.loads((tmp_path / "out" / "encoder" / "names.json").read_text()) == ["Italy", "Rome"]


@pytest.mark.parametrize("part", ["recipe", "content"])
@pytest.mark.parametrize("served", ["quantize/policy", "quantize/encoder"])
def test_recipe_and_bytes_of_both_served_models_are_in_the_tag(
    served: str, part: str, inputs: dict[str, Path], tmp_path: Path
) -> None:
    first = run(inputs, tmp_path / "one")["model"]
    record = json.loads(inputs[f"record of {served}"].read_text())
    write(inputs[f"record of {served}"], {**record, part: "another"})
    assert run(inputs, tmp_path / "two")["model"] != first


def test_what_was_measured_is_told_and_is_not_in_the_tag(inputs: dict[str, Path], tmp_path: Path) -> None:
    first = run(inputs, tmp_path / "one")["model"]
    sheet = evaluation(passed=True) | {"models": [{"model": "int8", "perplexity": 3.0}]}
    write(inputs["evaluation"], sheet)
    write(inputs["sources"], [{"name": "facts"}, {"name": "more"}])
    assert run(inputs, tmp_path / "two")["model"] == first
    provenance = json.loads((tmp_path / "two" / "provenance.json").read_text())
    assert provenance["evaluation"] == sheet
    assert [source["name"] for source in provenance["sources"]] == ["facts", "more"]


def test_a_corpus_without_names_packs_no_encoder_that_could_name_nothing(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    row = {"id": "1", "text": "It rained.", "names": [], "split": "train"}
    inputs["corpus"] = tmp_path / "prose"
    tables.write([row], inputs["corpus"], tables.schema("corpus"))
    with pytest.raises(StageError, match="no text of the corpus holds a name"):
        run(inputs, tmp_path / "out")


def test_a_refusal_names_every_failed_gate_and_writes_nothing(inputs: dict[str, Path], tmp_path: Path) -> None:
    gates = [
        {"name": "a_min", "value": 0.1, "limit": 0.2, "passed": False},
        {"name": "b_min", "value": 0.9, "limit": 0.2, "passed": True},
        {"name": "c_max", "value": None, "limit": 0.3, "passed": False},
    ]
    write(inputs["evaluation"], {"models": [], "gates": gates})
    with pytest.raises(StageError) as told:
        run(inputs, tmp_path / "out")
    assert "2 of 3 gates failed" in str(told.value)
    assert "a_min: 0.1 against a limit of 0.2; c_max: None against a limit of 0.3" in str(told.value)
    assert "b_min" not in str(told.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_gate_refuses_with_name_value_and_limit(inputs: dict[str, Path], tmp_path: Path) -> None:
    write(inputs["evaluation"], evaluation(passed=False))
    with pytest.raises(StageError, match=r"1 of 1 gates failed.*masked_names_min: 0\.5 against a limit of 0\.9"):
        run(inputs, tmp_path / "out")
    assert run(inputs, tmp_path / "anyway", refuse=False)["gates_failed"] == 1
