"""Inputs of a reward model, the split of rankings between roles, ensembles of heads, and normalized rewards."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common import tables
from tasks.common.harness.job import StageError
from tasks.common.modelling import head_models, models
from tasks.common.reward import agreement
from tasks.common.reward.lexicon import Lexicon
from tasks.common.reward.rankings import read_ranking, rows_for_role
from tasks.common.reward.scoring import Scorer, encode_reply
from tasks.common.text import chat
from tasks.common.training.loop import Shard
from tasks.reward import stage as reward
from tests.training_fixtures import NUMERICS, Chain, chain, config, rankings

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # the first test builds the chain

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was the soup?"}]

# Inputs


def test_encode_reply_puts_it_after_the_templated_prompt(chain: Chain) -> None:
    """The input is the prompt's ids, then the reply with a leading space, with one BOS and one EOS."""
    tokenizer = chain.tokenizer()
    ids = encode_reply(tokenizer, "It was good.", 60, ASKED)
    assert ids == [*chat.encode_prompt(tokenizer, ASKED), *chat.encode_text(tokenizer, " It was good.")[1:]]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert encode_reply(tokenizer, "It was good.", 60) == chat.encode_text(tokenizer, " It was good.")


def test_long_prompt_is_cut_on_the_left_and_long_reply_on_the_right(chain: Chain) -> None:
    """The reply is kept first; the prompt is truncated on the left, so its last turn stays."""
    tokenizer = chain.tokenizer()
    prompt, reply = chat.encode_prompt(tokenizer, ASKED), chat.encode_text(tokenizer, " It was good.")
    room = len(reply) + 5
    assert encode_reply(tokenizer, "It was good.", room, ASKED) == [reply[0], *prompt[-5:], *reply[1:]]
    for longest in range(1, len(reply) + 1):
        assert encode_reply(tokenizer, "It was good.", longest, ASKED) == reply[:longest]


def test_score_depends_on_the_prompt_only_with_conversation_input(chain: Chain) -> None:
    """The same weights score a reply alone, or after a prompt that changes its score."""
    scorer = Scorer.load(chain.path("data/reward/train/model"), NUMERICS)
    two = [(ASKED, "It was good."), ([], "It was good.")]
    # One at a time: rows of one matrix product may be rounded differently.
    assert scorer.score(two[:1]) == scorer.score(two[1:])
    hearing = replace(scorer, input="conversation")
    assert len(set(hearing.score(two))) == 2
    assert hearing.score(two[1:]) == pytest.approx(scorer.score(two[1:]), abs=1e-6)


def test_folder_with_the_field_names_of_earlier_versions_loads(chain: Chain, tmp_path: Path) -> None:
    folder = shutil.copytree(chain.path("data/reward/train/model"), tmp_path / "model")
    text = (folder / "config.json").read_text()
    for new, old in (("input", "reads"), ("score_mean_std", "normal")):
        assert f'"bessemer_{new}"' in text
        text = text.replace(f'"bessemer_{new}"', f'"bessemer_{old}"')
    (folder / "config.json").write_text(text)
    scorer, saved = (Scorer.load(path, NUMERICS) for path in (folder, chain.path("data/reward/train/model")))
    assert (scorer.input, scorer.score_mean_std) == (saved.input, saved.score_mean_std)


def test_a_reward_model_learns_which_reply_fits_its_prompt(chain: Chain, tmp_path: Path) -> None:
    """People prefer different replies to two questions; a model that reads only the reply cannot learn this."""
    base = next(rankings())
    ranks_by_question = {"What is warm?": [1, 2], "What is cold?": [2, 1]}
    rows = [
        {**base, "id": f"{number}-{split}", "prompt": [{"role": "user", "content": question}],
         "responses": ["The soup.", "The garden."], "ranks": ranks, "scores": None, "scale": None, "split": split}
        for number, (question, ranks) in enumerate(ranks_by_question.items()) for split in ("train", "heldout")
    ]  # fmt: skip
    accuracies = {}
    for reads in ("response", "conversation"):
        settings = config("reward", input=reads, mse_weight=0.0, word_dropout=0.0, steps=60, judge_share=1e-6)
        job = chain.job("reward@train", settings, tmp_path / reads)
        job.inputs["rankings"] = tmp_path / reads / "table"
        tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
        accuracies[reads] = chain.run(job, settings)["ranked_only"]["model"]
    assert accuracies == {"response": 0.5, "conversation": 1.0}


# Roles


def rows_of(responses: Sequence[Sequence[str]], prompts: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return rankings with these responses, all to one prompt if no others are given."""
    questions = prompts or ["Write a sentence."] * len(responses)
    return [
        {"id": str(number), "prompt": [{"role": "user", "content": prompt}], "responses": list(texts)}
        for number, (prompt, texts) in enumerate(zip(questions, responses, strict=True))
    ]


def test_rows_for_role_roles_are_disjoint() -> None:
    """About `judge_share` of the rows are the judge's, in any order of the rows."""
    rows = rows_of([[f"a{n}", f"b{n}"] for n in range(2000)])
    policys, judges = (rows_for_role(rows, key, 0.3, "response") for key in ("train", "judge"))
    assert len(policys) + len(judges) == 2000
    assert len(judges) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard deviations
    again = rows_for_role(rows[::-1], "judge", 0.3, "response")
    assert {row["id"] for row in judges} == {row["id"] for row in again}
    assert {row["id"] for row in judges}.isdisjoint(row["id"] for row in policys)


def test_rows_for_role_conversation_input_splits_by_prompt() -> None:
    """All rankings of a prompt have the same role, whatever their replies."""
    rows = rows_of([[f"a{n}", f"b{n}"] for n in range(400)], [f"Question {n % 40}?" for n in range(400)])
    sides = [{row["prompt"][0]["content"] for row in rows_for_role(rows, key, 0.3, "conversation")}
             for key in ("train", "judge")]  # fmt: skip
    assert sides[0].isdisjoint(sides[1])
    assert all(sides)
    assert len(sides[0] | sides[1]) == 40


def test_rows_for_role_response_input_splits_by_response() -> None:
    """Equal replies in another order have the same role; the judge skips rankings with a reply of the train role."""
    rows = rows_of([[f"a{n}", f"b{n}"] for n in range(300)] + [[f"b{n}", f"a{n + 1}"] for n in range(300)])
    policys, judges = (rows_for_role(rows, key, 0.3, "response") for key in ("train", "judge"))
    replies = [{text for row in role_rows for text in row["responses"]} for role_rows in (policys, judges)]
    assert replies[0].isdisjoint(replies[1])
    assert judges
    twice = rows_of([["x", "y"], ["y", "x"]])
    assert len(rows_for_role(twice, "train", 0.5, "response")) in (0, 2)


@pytest.mark.parametrize(
    ("key", "share", "remedy"), [("train", 1 - 1e-9, "Lower judge_share"), ("judge", 1e-9, "Raise judge_share")]
)
def test_role_without_rankings_is_an_error(key: str, share: float, remedy: str, chain: Chain, tmp_path: Path) -> None:
    settings = config(f"reward@{key}", judge_share=share)
    with pytest.raises(StageError, match=rf"none of the 7 training rankings is assigned to reward@{key}, .* {remedy}"):
        chain.run(chain.job(f"reward@{key}", settings, tmp_path), settings)


def test_judge_steps_are_proportional_to_its_rankings(chain: Chain) -> None:
    """With one ranking instead of six there are a sixth of the steps, but at least one."""
    for key, steps in (("train", 80), ("judge", 13)):
        chain.path(f"data/reward/{key}/model")
        rows = (chain.root / f"data/reward/{key}/history.csv").read_text().splitlines()
        assert int(rows[-1].split(",")[0]) == steps
    assert reward.scale_judge_steps(config("reward"), 1000, 1).steps == 1


# Heads


def test_a_new_head_begins_small_and_without_dropout(chain: Chain) -> None:
    """Weights have standard deviation 1/sqrt(d + 1) and biases are 0; heads differ, and dropout is off."""
    import torch

    torch.manual_seed(0)
    for path in ("data/pretrain/masked/model", "data/finetune/chat/model"):
        model: Any = head_models.new_scorer(chain.path(path), NUMERICS, 40)
        head = model.classifier if hasattr(model, "classifier") else model.score
        width = model.config.hidden_size
        assert head.weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.06)  # four standard deviations
        assert len({round(row[0].item(), 6) for row in head.weight}) == 40
        assert head.bias is None or not head.bias.any()


def test_dropout_is_off(chain: Chain, tmp_path: Path) -> None:
    """Dropout is off even for a model that was pretrained with it: equal tokens have equal scores in training mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = chain.tokenizer()
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2))
    models.save(gpt2, tokenizer, tmp_path)
    model = head_models.new_scorer(tmp_path, NUMERICS, 1).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    one, other = (head_models.head_outputs(model, tokenizer, [[1, 5, 6, 7]], NUMERICS, 1).item() for _ in range(2))
    assert one == other
    assert gpt2.config.resid_pdrop > 0


def test_heads_learn_from_rankings_drawn_with_replacement() -> None:
    """Each head gets its own bootstrap sample of the same size; a single head uses every ranking once."""
    counts = np.array(reward.bootstrap_counts(500, 3, 1))
    assert counts.shape == (500, 3)
    assert counts.sum(0).tolist() == [500] * 3
    assert (counts == 0).mean() == pytest.approx(1 / math.e, abs=0.05)
    assert not np.array_equal(counts[:, 0], counts[:, 1])
    assert reward.bootstrap_counts(500, 3, 1) == counts.tolist() != reward.bootstrap_counts(500, 3, 2)
    assert reward.bootstrap_counts(4, 1, 1) == [[1]] * 4


def test_head_loss_weighs_rankings_by_bootstrap_count(chain: Chain, tmp_path: Path) -> None:
    """Loss sums and target counts of all heads equal those of each head and ranking separately."""
    rows = [row for row in rankings() if row["scores"]][:3]
    examples = [read_ranking(row, chain.tokenizer(), 32, "response") for row in rows]
    model = head_models.new_scorer(chain.path("data/pretrain/masked/model"), NUMERICS, 2).eval()
    bases, counts = [[0.5] * 4, [0.0] * 4, [-0.5] * 4], [[0, 2], [1, 0], [3, 1]]
    settings = config("reward", heads=2, batch=3, word_dropout=0.0)
    job = chain.job("reward@train", settings, tmp_path)
    judgements = reward.RankingObjective(settings, job, model, chain.tokenizer(), examples, bases)
    judgements.items = list(zip(examples, bases, counts, strict=True))
    batch = judgements.draw(0, Shard())
    sums = {name: value.item() for name, value in judgements.loss_sums(batch).items()}
    rating_loss = order_loss = 0.0
    for ranking, base, often in judgements.items:
        scores = head_models.head_outputs(model, chain.tokenizer(), ranking.ids, NUMERICS, 4) + base[0]  # (4, 2)
        for head, count in enumerate(often):
            own = scores[:, head].tolist()
            rating_loss += count * sum((a - b) ** 2 for a, b in zip(own, ranking.ratings or (), strict=True))
            order_loss += count * sum(
                math.log1p(math.exp(own[worse] - own[better])) for better, worse, _ in ranking.pairs
            )
    assert sums == pytest.approx({"rating": rating_loss, "ordering": order_loss}, rel=1e-4)
    often_in_all = [sum(item[2]) for item in judgements.items]
    assert batch.target_counts == {
        "rating": sum(count * 4 for count in often_in_all),
        "ordering": sum(count * len(ranking.pairs) for count, ranking in zip(often_in_all, examples, strict=True)),
    }


def test_ensemble_score_is_the_mean_with_the_std_of_its_heads(chain: Chain, tmp_path: Path) -> None:
    """Compared with the heads' outputs; a saved ensemble loads with all heads, and a single head has deviation 0."""
    settings = config("reward", heads=3, steps=30)
    job = chain.job("reward@train", settings, tmp_path)
    metrics = chain.run(job, settings)
    scorer = Scorer.load(job.outputs["model"], NUMERICS)
    texts = ["The soup was wonderful.", "Peru.", "The bread was poor."]
    scores, stds = scorer.score_with_std([([], text) for text in texts])
    rows = [encode_reply(scorer.tokenizer, text, 32) for text in texts]
    plain = head_models.head_outputs(scorer.model, scorer.tokenizer, rows, NUMERICS, 1).detach().numpy()
    assert plain.shape == (3, 3)
    assert stds == pytest.approx(plain.std(1).tolist(), abs=1e-5)
    assert min(stds) > 0
    sums = plain.mean(1) + np.array(scorer.lexicon.score(texts))
    assert scores == pytest.approx(np.clip(sums, -4, 4).tolist(), abs=1e-5)
    assert metrics["disagreement"] > 0
    single = Scorer.load(chain.path("data/reward/train/model"), NUMERICS)
    assert single.score_with_std([([], text) for text in texts])[1] == [0.0] * 3


# Normalized rewards


def test_normalized_rewards_have_mean_0_and_variance_1_on_the_training_responses(chain: Chain) -> None:
    """The statistics are saved in the folder; scores are on the raters' scale unless `normalized` is set."""
    scorer = Scorer.load(chain.path("data/reward/train/model"), NUMERICS)
    rows = rows_for_role([row for row in rankings() if row["split"] == "train"], "train", 0.3, "response")
    exchanges: list[chat.Exchange] = [(row["prompt"], text) for row in rows for text in row["responses"]]
    plain, scaled = scorer.score(exchanges), scorer.score(exchanges, normalized=True)
    assert np.mean(scaled) == pytest.approx(0, abs=1e-4)
    assert np.var(scaled) == pytest.approx(1, abs=1e-4)
    mean, deviation = np.mean(plain), np.std(plain)
    assert scaled == pytest.approx([(value - mean) / deviation for value in plain], abs=1e-4)
    ensemble = replace(scorer, score_mean_std=[1.0, 0.5], lexicon=Lexicon(0.0, {}))
    assert ensemble.score(exchanges[:1], normalized=True)[0] == pytest.approx(
        (ensemble.score(exchanges[:1])[0] - 1) / 0.5
    )


def test_score_statistics_equal_scores_have_deviation_1(chain: Chain) -> None:
    """A deviation of 0 would give infinite rewards."""

    class Same(Scorer):
        def score(
            self,
            exchanges: Sequence[chat.Exchange],
            batch_size: int = 128,
            *,
            normalized: bool = False,
            desc: str | None = None,
        ) -> list[float]:
            return [2.0] * len(exchanges)

    (ranking,) = [read_ranking(next(rankings()), chain.tokenizer(), 32, "response")]
    scorer: Any = Same.__new__(Same)
    assert reward.score_statistics(scorer, [ranking]) == [2.0, 1.0]


# Length


def test_length_bias_of_scores_and_ratings() -> None:
    """Correlations equal numpy's; the shares of pairs with the longer response first are counted by hand."""
    lengths, scores = np.array([1.0, 2.0, 3.0, 4.0, 4.0]), np.array([0.0, 1.0, 1.0, 3.0, -1.0])
    ratings, pairs = [(0, 1.0), (1, -1.0), (3, 2.0)], [(1, 0), (0, 3), (3, 4), (2, 4)]
    bias = agreement.length_bias(scores, lengths, ratings, pairs)
    assert bias["correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-4)
    assert bias["correlation_of_raters"] == pytest.approx(np.corrcoef([1, -1, 2], [1, 2, 4])[0, 1], abs=1e-4)
    assert bias["longer_first"] == pytest.approx(2 / 3, abs=1e-4)  # of three pairs of unequal length
    assert bias["longer_first_by_people"] == pytest.approx(1 / 3, abs=1e-4)


def test_correlation_of_constant_values_is_none() -> None:
    same = np.ones(4)
    assert agreement.correlation(same, np.arange(4.0)) is None
    assert agreement.correlation(np.arange(4.0), same) is None
    assert agreement.length_bias(same, same, [], [(0, 1)]) == {
        "correlation": None, "correlation_of_raters": None, "longer_first": None, "longer_first_by_people": None,
    }  # fmt: skip
