"""Align the tuned model with a reward, by proximal policy optimization, or by DPO, RLOO or GRPO in its place.

Run as `python -m tasks.ppo`. PPO is `tasks/common/alignment/proximal.py`, the others are `by_trl.py` beside it; here
are their settings, what they are given, how they are taken up again, and what stops them. A checkpoint lies between
two iterations, whose draws are all pure functions of the iteration, so that a resumed run ends with the bytes of one
that was not interrupted.
"""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tasks.common import stage, tables
from tasks.common.alignment import by_trl, pairs, rewards, rollouts
from tasks.common.alignment.alarms import Alarms, Sheet, Watch
from tasks.common.alignment.alternatives import Dpo, Grpo, Ranked, Rloo
from tasks.common.alignment.learner import Learner, Sampler
from tasks.common.alignment.policy import Method, Policy
from tasks.common.alignment.proximal import Proximal, Trainer
from tasks.common.alignment.ptx import Term
from tasks.common.alignment.rewards import Reward
from tasks.common.alignment.rollouts import Rollouts
from tasks.common.evaluation import sampling
from tasks.common.modelling import models
from tasks.common.settings import Settings
from tasks.common.stage import Job, StageError
from tasks.common.text import chat
from tasks.common.text.chat import Question
from tasks.common.text.shards import Split
from tasks.common.training import tracking
from tasks.common.training.checkpoints import Kept, Store
from tasks.common.training.loop import History
from tasks.common.training.optimizers import Optimizer, rate_at
from tasks.common.training.parallel import World
from tasks.common.training.updates import begun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INPUTS = {
    "model": "data/finetune/model",
    "reward": "{config.reward.path}",
    "instructions": "data/validate/instructions",
    "rankings": "data/validate/rankings",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/ppo/model", "history": "data/ppo/history.csv"}
PARALLEL = True


class Config(Settings):
    """Settings of the alignment."""

    algorithm: Annotated[Proximal | Dpo | Rloo | Grpo, Field(discriminator="name", description="How it learns")]
    method: Annotated[Method, Field(discriminator="name", description="What of the model is trained")]
    reward: Reward
    rollouts: Rollouts
    iterations: int = Field(description="Times that replies are sampled and learnt from", ge=1)
    episodes: int = Field(description="Replies an iteration", ge=2)
    minibatch: int = Field(description="Replies an update", ge=1)
    max_new_tokens: int = Field(description="Longest reply, in tokens", ge=1)
    temperature: float = Field(description="Temperature of the sampled replies", gt=0)
    missing_end_penalty: float = Field(description="Reward taken from a reply that does not end", ge=0)
    alarms: Alarms
    optimizer: Optimizer


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the policy and return its first and last reward, KL and entropy."""
    from tqdm import tqdm

    models.prepare_torch(job.numerics, job.seed)
    world = World.join(job.numerics)
    tokenizer = chat.load_tokenizer(job.inputs["model"])
    history = History(every=1)
    store = Store.of(job, world)
    values = config.algorithm.values if isinstance(config.algorithm, Proximal) else None
    policy = Policy.load(job.inputs["model"], config.method, values, job.numerics, config.temperature)
    checkpoint = store.resume(policy.model, history)
    first = checkpoint.step if checkpoint else 0
    trained = world.spread(policy.model)
    table = tables.read(job.inputs["instructions"]).to_pylist()
    run = Run(config, job, tokenizer, world, trainer_of(config, job, tokenizer, policy, world, table), table)
    if checkpoint:
        run.trainer.updates.load(checkpoint)
        run.load(checkpoint.kept)
    del checkpoint
    began, rounds = time.perf_counter(), range(first, config.iterations + 1)
    bar = tqdm(rounds, desc=job.name, initial=first, total=len(rounds) + first, mininterval=2, disable=world.rank > 0)
    longest = max(len(prompt.ids) for prompt in run.trainer.prompts) + config.max_new_tokens
    with (
        rollouts.opened(config.rollouts, job, policy, longest) as engine,
        tracking.opened(job, first=first, earlier=history.rows, every=1) as tracker,
    ):
        if isinstance(run.trainer, Trainer):
            run.trainer.engine = engine
        for iteration in bar:
            try:
                figures = run.iterate(iteration)
            except (rewards.RewardError, rollouts.RolloutError):  # before anything was learnt in this iteration
                store.keep(iteration, run.trainer.updates, history, run.kept(), now=True)
                raise
            history.add(iteration, figures)
            tracker.log(iteration + 1, figures, round(figures["length"] * config.episodes))
            if run.over:
                break
            store.keep(iteration + 1, run.trainer.updates, history, run.kept())
    done = (len(history.rows) - first) * config.episodes
    job.measured(episodes_per_second=round(done / (time.perf_counter() - began), 2), resumed_at_step=first)
    run.trainer.updates.end(trained)
    world.leave()
    models.save(policy.plain(job.inputs["model"], trained), tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return summary(history, run)


def trainer_of(
    config: Config, job: Job, tokenizer: "PreTrainedTokenizerFast", policy: Policy, world: World,
    table: list[dict[str, Any]],
) -> Learner:  # fmt: skip
    """Return what trains a policy on the training questions."""
    algorithm, split = config.algorithm, Split.open(job.inputs["shards"] / "train")
    term, sampler = Term.of(algorithm.ptx, split, job.seed, world), sampler_of(config, job.seed)
    updates = begun(config.optimizer, policy.model, world)
    judge = rewards.open_judge(config.reward, job.inputs["reward"], job.numerics)
    judged_by, prompts = rewards.called(config.reward), questions_of(tokenizer, table, config.max_new_tokens)
    if isinstance(algorithm, Proximal):
        return Trainer(algorithm, sampler, policy, updates, tokenizer, judge, judged_by, prompts, term, world)
    ranked = []
    if isinstance(algorithm, Dpo) and isinstance(algorithm.pairs, Ranked):
        ranked = pairs.of_rankings(tokenizer, tables.read(job.inputs["rankings"]).to_pylist(), algorithm.pairs)
    return by_trl.Learner(
        algorithm, sampler, policy, updates, tokenizer, judge, judged_by, prompts, term, ranked,
        str(job.outputs["model"]),
    )  # fmt: skip


def questions_of(tokenizer: "PreTrainedTokenizerFast", table: list[dict[str, Any]], reply: int) -> list[Question]:
    """Return the training questions that leave room for a reply of so many tokens; raise StageError without any."""
    found = chat.questions(tokenizer, [row for row in table if row["split"] == "train"])
    if not found:
        raise StageError("the instructions hold no training question to reply to; give `ingest.sources` some.")
    return chat.with_room(tokenizer, found, reply)


def sampler_of(config: Config, seed: int) -> Sampler:
    """Return how replies are sampled."""
    return Sampler(
        config.episodes, config.minibatch, config.max_new_tokens, config.temperature, config.missing_end_penalty, seed
    )


@dataclass
class Run:
    """One run of the stage: the trainer, the watch over it, and whether it is over before its time."""

    config: Config
    job: Job
    tokenizer: "PreTrainedTokenizerFast"
    world: World
    trainer: Learner
    table: list[dict[str, Any]]
    watch: Watch = field(init=False)
    sheet: Sheet = field(init=False)
    over: bool = False

    def __post_init__(self) -> None:
        self.watch = Watch(self.config.alarms)
        self.sheet = Sheet.of(self.table, self.config.alarms.questions, self._fits)

    def _fits(self, row: dict[str, Any]) -> bool:
        prompt = chat.encode_prompt(self.tokenizer, row["messages"][:-1])
        return len(prompt) + self.config.max_new_tokens <= self.tokenizer.model_max_length

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, look whether all is well, and learn, but for the last time; return the iteration's figures."""
        config, trainer = self.config, self.trainer
        last = iteration == config.iterations
        if last and trainer.average:
            trainer.policy.take_up(trainer.average)  # what is kept is what is looked at
        rollout, figures = trainer.sample(iteration)
        if self.watch.due(iteration, config.iterations):
            self._look(iteration, figures)
        if last or self.over:
            return figures
        rate = rate_at(config.optimizer, iteration, config.iterations)
        return {**figures, **trainer.iterate(rollout, iteration, rate, figures["kl"]), "learning_rate": rate}

    def _look(self, iteration: int, figures: dict[str, float]) -> None:
        """Put the policy before its part of the held-out sheet, and act where an alarm goes off."""
        asked = [chat.encode_prompt(self.tokenizer, turns) for turns in self.sheet.questions]
        if asked:
            replies = self.trainer.policy.replies(
                self.tokenizer, asked, max_new_tokens=self.config.max_new_tokens, temperature=0.0, seed=self.job.seed,
                most=self.world.most,
            )  # fmt: skip
            figures["exact_match"] = self.sheet.right([sampling.decode(self.tokenizer, reply) for reply in replies])
        wrong = self.watch.look(iteration, figures, self.trainer.policy.weights)
        if not wrong:
            return
        told = (
            f"alarm at iteration {iteration}: reward {self.watch.first['reward']:.2f} → {figures['reward']:.2f}, but "
            f"{', '.join(wrong)}"
        )
        if self.config.alarms.action == "stop":
            price = f"ppo.algorithm.{'kl.coefficient' if isinstance(self.config.algorithm, Proximal) else 'beta'}"
            raise StageError(
                f"{told}. The reward is being gamed: lower ppo.optimizer.learning_rate or ppo.iterations, or raise "
                f"{price}; ppo.alarms says what else can be done (rollback, tell)."
            )
        if self.config.alarms.action == "rollback":
            self.trainer.policy.take_up(self.watch.best)
            self.over = True
            told += f". The policy goes back to that of iteration {self.watch.best_iteration}, and training ends"
        if not self.world.rank:
            print(told, flush=True)

    def kept(self) -> Kept:
        """Return what a checkpoint holds beside the weights and the optimizers."""
        watch, trainer = self.watch, self.trainer
        notes = {
            "beta": trainer.beta, "steps": trainer.steps, "first": watch.first, "reward": watch.best_reward,
            "iteration": watch.best_iteration,
        }  # fmt: skip
        return Kept({"best": watch.best, "average": trainer.average}, notes)

    def load(self, kept: Kept) -> None:
        """Take up what a checkpoint held."""
        watch, trainer, notes = self.watch, self.trainer, kept.notes
        trainer.beta, trainer.steps = notes["beta"], notes["steps"]
        watch.first, watch.best_reward, watch.best_iteration = notes["first"], notes["reward"], notes["iteration"]
        watch.best = kept.placed("best", trainer.policy.weights())
        trainer.average = kept.placed("average", trainer.policy.weights())


def summary(history: History, run: Run) -> dict[str, Any]:
    """Return the stage's metrics."""
    first, last = history.rows[0], history.rows[-1]
    if run.over:  # the policy that is left is not the last one looked at
        last = history.rows[run.watch.best_iteration]
    ends = {f"{name}_{when}": row[name] for when, row in (("first", first), ("last", last)) for name in FIGURES}
    return {
        "algorithm": run.config.algorithm.name, "updates": run.trainer.steps,
        "rolled_back_to": run.watch.best_iteration if run.over else None, **ends,
    }  # fmt: skip


FIGURES = ("reward", "kl", "entropy", "length", "distinct_2")

if __name__ == "__main__":
    stage.main("tasks.ppo")
