"""The store of finished evaluations: only new ones are measured, a stopped stage resumes, the bytes are the same."""

from pathlib import Path
from typing import Any

import pytest

from tasks.common import identity
from tasks.common.harness.job import Job
from tasks.common.settings import Checkpoints
from tasks.evaluate.models_under_test import TorchDecoder
from tasks.evaluate.replies import Diversity
from tasks.evaluate.subject import Subject
from tests.training_fixtures import NUMERICS, Chain, chain, config, evaluations

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the model and of the reward models, in order."""
    found: list[str] = []

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            found.append(what if what != "reply" else str(arguments[-1]).rpartition(" ")[2])
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, counted)

    count(TorchDecoder, "reply", "reply")
    count(TorchDecoder, "negative_log_likelihood", "nll")
    count(Subject, "scorer", "scorer")
    return found


def make_job(chain: Chain, folder: Path, store: Path, **changes: Any) -> Job:
    """Return a job whose results are stored in `store`; `reward` changes the reward model's hash."""
    reward = changes.pop("reward", "")
    job = chain.job(
        "evaluate@tuned", config("evaluate@tuned"), folder, sections={"evaluations": evaluations(**changes)},
        checkpoints=Checkpoints(url=str(store)),
    )  # fmt: skip
    hashes = {str(path): identity.tree_hash(path) for path in job.inputs.values()}
    hashes[str(job.inputs["train"])] += reward
    job.parts.update(code="c", numerics=NUMERICS.model_dump(mode="json"), seed=1, lock="l", inputs=hashes)
    return job


def run(chain: Chain, job: Job) -> tuple[dict[str, Any], dict[str, str]]:
    """Run a job to its end; return its figures and the hashes of its outputs."""
    figures = chain.run(job, config("evaluate@tuned"))
    for call in job.when_complete:
        call()
    return figures, identity.file_hashes(job.outputs["answers"])


def test_stored_results_give_the_same_bytes(chain: Chain, tmp_path: Path, calls: list[str]) -> None:
    """With an empty store, with a full one and without any; a full one runs no model."""
    first = run(chain, make_job(chain, tmp_path / "a", tmp_path / "store"))
    assert calls
    calls.clear()
    assert run(chain, make_job(chain, tmp_path / "b", tmp_path / "store")) == first
    assert calls == []
    plain = chain.job("evaluate@tuned", config("evaluate@tuned"), tmp_path / "c")
    assert run(chain, plain) == first


def test_a_new_evaluation_measures_nothing_else(chain: Chain, tmp_path: Path, calls: list[str]) -> None:
    """Neither does one that is removed, nor one of the same kind with another name."""
    store = tmp_path / "store"
    run(chain, make_job(chain, tmp_path / "a", store, text=None))
    calls.clear()
    figures, _ = run(chain, make_job(chain, tmp_path / "b", store))
    assert set(calls) == {"nll"}
    calls.clear()
    named, _ = run(chain, make_job(chain, tmp_path / "c", store, text=None, wide={"kind": "text", "window": 16}))
    assert named["wide"] == {name: figures[name] for name in ("perplexity", "bits_per_byte")}
    assert "perplexity" not in named
    assert calls == []


def test_other_reward_models_repeat_only_their_evaluations(chain: Chain, tmp_path: Path, calls: list[str]) -> None:
    """The replies that they score are kept."""
    run(chain, make_job(chain, tmp_path / "a", tmp_path / "store"))
    calls.clear()
    run(chain, make_job(chain, tmp_path / "b", tmp_path / "store", reward="other"))
    assert calls == ["scorer"]


def test_a_stopped_stage_resumes(
    chain: Chain, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured before the stop is not measured again; the bytes are those of an uninterrupted run."""
    whole = run(chain, make_job(chain, tmp_path / "a", tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(Diversity, "measure", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(chain, make_job(chain, tmp_path / "b", tmp_path / "store"))
    calls.clear()
    assert run(chain, make_job(chain, tmp_path / "c", tmp_path / "store")) == whole
    assert set(calls) == {"nll"}


def test_a_damaged_result_is_measured_again(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And only results of the last complete run are kept."""
    store = tmp_path / "store"
    first = run(chain, make_job(chain, tmp_path / "a", store))
    files = sorted((store / "evaluations/evaluate@tuned").iterdir())
    for file in files:
        file.write_bytes(b"not a result")
    assert run(chain, make_job(chain, tmp_path / "b", store)) == first
    assert "is damaged" in capsys.readouterr().out
    run(chain, make_job(chain, tmp_path / "c", store, exact_match=None, text=None))
    assert len(list((store / "evaluations/evaluate@tuned").iterdir())) == 5  # size, samples, reward, judge, diversity
