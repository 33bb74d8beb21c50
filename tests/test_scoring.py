"""What a reward model reads, what of people's rankings it may learn from, ensembles of heads, normalised rewards."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import reward
from tasks.common import tables
from tasks.common.evaluation import agreement
from tasks.common.evaluation.rankings import read_ranking, share_of
from tasks.common.evaluation.scoring import Scorer, encode
from tasks.common.modelling import models
from tasks.common.modelling.lexicon import Lexicon
from tasks.common.stage import StageError
from tasks.common.text import chat
from tasks.common.training.loop import Share
from tests.training_fixtures import NUMERICS, Chain, chain, config, rankings

__all__ = ["chain"]

pytestmark = pytest.mark.timeout(300)  # whichever comes first makes the chain

ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was the soup?"}]

# What is read


def test_a_reply_is_read_after_its_prompt_as_the_template_writes_it(chain: Chain) -> None:
    """The prompt's ids up to where the reply begins, the reply with its space, one start and one end token."""
    tokenizer = chain.tokenizer()
    found = encode(tokenizer, "It was good.", 60, ASKED)
    assert found == [*chat.encode_prompt(tokenizer, ASKED), *chat.encode_text(tokenizer, " It was good.")[1:]]
    assert found.count(tokenizer.bos_token_id) == 1
    assert encode(tokenizer, "It was good.", 60) == chat.encode_text(tokenizer, " It was good.")


def test_a_long_prompt_loses_its_beginning_and_a_long_reply_its_end(chain: Chain) -> None:
    """The reply comes first: the prompt has the room that is left, of which the last turn is nearest to the reply."""
    tokenizer = chain.tokenizer()
    prompt, reply = chat.encode_prompt(tokenizer, ASKED), chat.encode_text(tokenizer, " It was good.")
    room = len(reply) + 5
    assert encode(tokenizer, "It was good.", room, ASKED) == [reply[0], *prompt[-5:], *reply[1:]]
    for longest in range(1, len(reply) + 1):
        assert encode(tokenizer, "It was good.", longest, ASKED) == reply[:longest]


def test_only_who_reads_the_conversation_tells_prompts_apart(chain: Chain) -> None:
    """The same weights score a reply alone, or after a prompt that bears on its score."""
    scorer = Scorer.load(chain.path("data/reward/policy/model"), NUMERICS)
    two = [(ASKED, "It was good."), ([], "It was good.")]
    assert scorer.score(two[:1]) == scorer.score(two[1:])  # one at a time: rows of one product may round apart
    hearing = replace(scorer, reads="conversation")
    assert len(set(hearing.score(two))) == 2
    assert hearing.score(two[1:]) == pytest.approx(scorer.score(two[1:]), abs=1e-6)


def test_a_reward_model_learns_which_reply_fits_its_prompt(chain: Chain, tmp_path: Path) -> None:
    """People want another reply to each of two questions; a model that reads the reply alone cannot tell."""
    base = next(rankings())
    asked = {"What is warm?": [1, 2], "What is cold?": [2, 1]}
    rows = [
        {**base, "id": f"{number}-{split}", "prompt": [{"role": "user", "content": question}],
         "responses": ["The soup.", "The garden."], "ranks": ranks, "scores": None, "scale": None, "split": split}
        for number, (question, ranks) in enumerate(asked.items()) for split in ("train", "heldout")
    ]  # fmt: skip
    found = {}
    for reads in ("response", "conversation"):
        settings = config("reward", reads=reads, rating=0.0, word_dropout=0.0, steps=60, judge_share=1e-6)
        job = chain.job("reward@policy", settings, tmp_path / reads)
        job.inputs["rankings"] = tmp_path / reads / "table"
        tables.write(rows, job.inputs["rankings"], tables.schema("rankings"))
        found[reads] = chain.run(job, settings)["ranked_only"]["model"]
    assert found == {"response": 0.5, "conversation": 1.0}


# Shares


def rows_of(responses: Sequence[Sequence[str]], prompts: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return rankings with these responses, all to one prompt if no others are given."""
    asked = prompts or ["Write a sentence."] * len(responses)
    return [
        {"id": str(number), "prompt": [{"role": "user", "content": prompt}], "responses": list(texts)}
        for number, (prompt, texts) in enumerate(zip(asked, responses, strict=True))
    ]


def test_no_ranking_is_in_both_shares() -> None:
    """About the asked share is the judge's, whatever the order of the rows."""
    rows = rows_of([[f"a{n}", f"b{n}"] for n in range(2000)])
    policys, judges = (share_of(rows, key, 0.3, "response") for key in ("policy", "judge"))
    assert len(policys) + len(judges) == 2000
    assert len(judges) / 2000 == pytest.approx(0.3, abs=0.04)  # four standard deviations
    again = share_of(rows[::-1], "judge", 0.3, "response")
    assert {row["id"] for row in judges} == {row["id"] for row in again}
    assert {row["id"] for row in judges}.isdisjoint(row["id"] for row in policys)


def test_a_prompt_is_on_one_side_where_it_is_read() -> None:
    """Whatever the replies to it."""
    rows = rows_of([[f"a{n}", f"b{n}"] for n in range(400)], [f"Question {n % 40}?" for n in range(400)])
    sides = [{row["prompt"][0]["content"] for row in share_of(rows, key, 0.3, "conversation")}
             for key in ("policy", "judge")]  # fmt: skip
    assert sides[0].isdisjoint(sides[1])
    assert all(sides)
    assert len(sides[0] | sides[1]) == 40


def test_a_response_is_on_one_side_where_it_is_read_alone() -> None:
    """The same replies in another order go together; a ranking of the judge's with one of the policy's is left out."""
    rows = rows_of([[f"a{n}", f"b{n}"] for n in range(300)] + [[f"b{n}", f"a{n + 1}"] for n in range(300)])
    policys, judges = (share_of(rows, key, 0.3, "response") for key in ("policy", "judge"))
    told = [{text for row in found for text in row["responses"]} for found in (policys, judges)]
    assert told[0].isdisjoint(told[1])
    assert judges
    twice = rows_of([["x", "y"], ["y", "x"]])
    assert len(share_of(twice, "policy", 0.5, "response")) in (0, 2)


@pytest.mark.parametrize(("key", "share", "remedy"), [("policy", 1 - 1e-9, "Lower it"), ("judge", 1e-9, "Raise it")])
def test_a_model_without_a_share_says_so(key: str, share: float, remedy: str, chain: Chain, tmp_path: Path) -> None:
    settings = config("reward", judge_share=share)
    with pytest.raises(StageError, match=rf"none of the 7 rankings to train on falls to reward@{key} .* {remedy}"):
        chain.run(chain.job(f"reward@{key}", settings, tmp_path), settings)


def test_the_judge_reads_its_rankings_as_often_as_the_policys_model(chain: Chain) -> None:
    """One ranking instead of six: a sixth of the steps, and never none."""
    for key, steps in (("policy", 80), ("judge", 13)):
        chain.path(f"data/reward/{key}/model")
        rows = (chain.root / f"data/reward/{key}/history.csv").read_text().splitlines()
        assert int(rows[-1].split(",")[0]) == steps
    assert reward.as_often_read(config("reward"), 1000, 1).steps == 1


# Heads


def test_a_new_head_begins_small_and_without_dropout(chain: Chain) -> None:
    """Weights of a standard deviation of 1/sqrt(d + 1), biases of 0; each head its own, and no dropout anywhere."""
    import torch

    torch.manual_seed(0)
    for path in ("data/pretrain/mlm/model", "data/finetune/model"):
        model: Any = models.new_scorer(chain.path(path), NUMERICS, 40)
        head = model.classifier if hasattr(model, "classifier") else model.score
        width = model.config.hidden_size
        assert head.weight.std().item() == pytest.approx((width + 1) ** -0.5, rel=0.06)  # four standard deviations
        assert len({round(row[0].item(), 6) for row in head.weight}) == 40
        assert head.bias is None or not head.bias.any()


def test_dropout_is_off(chain: Chain, tmp_path: Path) -> None:
    """Of a model that was trained with it, too: the same tokens have the same score while the model learns."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = chain.tokenizer()
    given = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2))
    models.save(given, tokenizer, tmp_path)
    model = models.new_scorer(tmp_path, NUMERICS, 1).train()
    model.config.pad_token_id = tokenizer.pad_token_id
    one, other = (models.head_outputs(model, tokenizer, [[1, 5, 6, 7]], NUMERICS, 1).item() for _ in range(2))
    assert one == other
    assert given.config.resid_pdrop > 0


def test_heads_learn_from_rankings_drawn_with_replacement() -> None:
    """As many for each head as there are, the others' not; a single head learns from every one, once."""
    counts = np.array(reward.bootstrapped(500, 3, 1))
    assert counts.shape == (500, 3)
    assert counts.sum(0).tolist() == [500] * 3
    assert (counts == 0).mean() == pytest.approx(1 / math.e, abs=0.05)
    assert not np.array_equal(counts[:, 0], counts[:, 1])
    assert reward.bootstrapped(500, 3, 1) == counts.tolist() != reward.bootstrapped(500, 3, 2)
    assert reward.bootstrapped(4, 1, 1) == [[1]] * 4


def test_a_ranking_weighs_in_a_heads_loss_as_often_as_it_was_drawn(chain: Chain, tmp_path: Path) -> None:
    """Sums and targets of all heads, against each head and ranking by itself."""
    rows = [row for row in rankings() if row["scores"]][:3]
    found = [read_ranking(row, chain.tokenizer(), 32, "response") for row in rows]
    model = models.new_scorer(chain.path("data/pretrain/mlm/model"), NUMERICS, 2).eval()
    bases, counts = [[0.5] * 4, [0.0] * 4, [-0.5] * 4], [[0, 2], [1, 0], [3, 1]]
    settings = config("reward", heads=2, batch=3, word_dropout=0.0)
    job = chain.job("reward@policy", settings, tmp_path)
    judgements = reward.Judgements(settings, job, model, chain.tokenizer(), found, bases)
    judgements.items = list(zip(found, bases, counts, strict=True))
    drawn = judgements.draw(0, Share())
    sums = {name: value.item() for name, value in judgements.sums(drawn).items()}
    rated = ordered = 0.0
    for ranking, base, often in judgements.items:
        scores = models.head_outputs(model, chain.tokenizer(), ranking.ids, NUMERICS, 4) + base[0]  # (4, 2)
        for head, count in enumerate(often):
            own = scores[:, head].tolist()
            rated += count * sum((a - b) ** 2 for a, b in zip(own, ranking.ratings or (), strict=True))
            ordered += count * sum(math.log1p(math.exp(own[worse] - own[better])) for better, worse, _ in ranking.pairs)
    assert sums == pytest.approx({"rating": rated, "ordering": ordered}, rel=1e-4)
    often_in_all = [sum(item[2]) for item in judgements.items]
    assert drawn.targets == {
        "rating": sum(count * 4 for count in often_in_all),
        "ordering": sum(count * len(ranking.pairs) for count, ranking in zip(often_in_all, found, strict=True)),
    }


def test_an_ensemble_tells_its_mean_and_how_far_its_heads_lie_apart(chain: Chain, tmp_path: Path) -> None:
    """Against the heads' own numbers; a saved ensemble comes back with all its heads, and one head is always sure."""
    settings = config("reward", heads=3, steps=30)
    job = chain.job("reward@policy", settings, tmp_path)
    metrics = chain.run(job, settings)
    scorer = Scorer.load(job.outputs["model"], NUMERICS)
    texts = ["The soup was wonderful.", "Peru.", "The bread was poor."]
    scores, apart = scorer.judge([([], text) for text in texts])
    rows = [encode(scorer.tokenizer, text, 32) for text in texts]
    plain = models.head_outputs(scorer.model, scorer.tokenizer, rows, NUMERICS, 1).detach().numpy()
    assert plain.shape == (3, 3)
    assert apart == pytest.approx(plain.std(1).tolist(), abs=1e-5)
    assert min(apart) > 0
    sums = plain.mean(1) + np.array(scorer.lexicon.score(texts))
    assert scores == pytest.approx(np.clip(sums, -4, 4).tolist(), abs=1e-5)
    assert metrics["disagreement"] > 0
    single = Scorer.load(chain.path("data/reward/policy/model"), NUMERICS)
    assert single.judge([([], text) for text in texts])[1] == [0.0] * 3


# Normalised rewards


def test_normalised_rewards_have_mean_0_and_variance_1_on_the_training_responses(chain: Chain) -> None:
    """As the folder keeps it; the raters' scale stays what a score is on unless the other is asked for."""
    scorer = Scorer.load(chain.path("data/reward/policy/model"), NUMERICS)
    rows = share_of([row for row in rankings() if row["split"] == "train"], "policy", 0.3, "response")
    exchanges: list[chat.Exchange] = [(row["prompt"], text) for row in rows for text in row["responses"]]
    plain, scaled = scorer.score(exchanges), scorer.score(exchanges, normalised=True)
    assert np.mean(scaled) == pytest.approx(0, abs=1e-4)
    assert np.var(scaled) == pytest.approx(1, abs=1e-4)
    mean, deviation = np.mean(plain), np.std(plain)
    assert scaled == pytest.approx([(value - mean) / deviation for value in plain], abs=1e-4)
    ensemble = replace(scorer, normal=[1.0, 0.5], lexicon=Lexicon(0.0, {}))
    assert ensemble.score(exchanges[:1], normalised=True)[0] == pytest.approx(
        (ensemble.score(exchanges[:1])[0] - 1) / 0.5
    )


def test_scores_that_are_all_alike_are_divided_by_nothing(chain: Chain) -> None:
    """A deviation of 0 would make rewards of infinity."""

    class Same(Scorer):
        def score(
            self, exchanges: Sequence[chat.Exchange], together: int = 128, *, normalised: bool = False
        ) -> list[float]:
            return [2.0] * len(exchanges)

    (ranking,) = [read_ranking(next(rankings()), chain.tokenizer(), 32, "response")]
    scorer: Any = Same.__new__(Same)
    assert reward.normal(scorer, [ranking]) == [2.0, 1.0]


# Length


def test_what_length_has_to_do_with_scores_and_with_ratings() -> None:
    """Correlations against numpy's, of all scores and of what was rated; who puts the longer one first how often."""
    lengths, scores = np.array([1.0, 2.0, 3.0, 4.0, 4.0]), np.array([0.0, 1.0, 1.0, 3.0, -1.0])
    rated, pairs = [(0, 1.0), (1, -1.0), (3, 2.0)], [(1, 0), (0, 3), (3, 4), (2, 4)]
    found = agreement.length(scores, lengths, rated, pairs)
    assert found["correlation"] == pytest.approx(np.corrcoef(scores, lengths)[0, 1], abs=1e-4)
    assert found["correlation_of_raters"] == pytest.approx(np.corrcoef([1, -1, 2], [1, 2, 4])[0, 1], abs=1e-4)
    assert found["longer_first"] == pytest.approx(2 / 3, abs=1e-4)  # of three pairs of unequal length
    assert found["longer_first_by_people"] == pytest.approx(1 / 3, abs=1e-4)


def test_what_does_not_vary_has_no_correlation() -> None:
    same = np.ones(4)
    assert agreement.correlation(same, np.arange(4.0)) is None
    assert agreement.correlation(np.arange(4.0), same) is None
    assert agreement.length(same, same, [], [(0, 1)]) == {
        "correlation": None, "correlation_of_raters": None, "longer_first": None, "longer_first_by_people": None,
    }  # fmt: skip
