"""Align a model with a reward, or with people's rankings: by PPO, DPO, RLOO or GRPO.

Run as `python -m tasks.align ENTRY`. PPO is in `tasks/align/proximal.py`, the others are in `by_trl.py` beside it; this
module has the stage's settings, its training loop, checkpoints and alarms. A checkpoint is written between two
iterations. All randomness is a pure function of the iteration, so a resumed run produces the same bytes as an
uninterrupted one.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tasks.align import by_trl, pairs, rewards, rollouts
from tasks.align.alarms import AlarmMonitor, Alarms, Scorecard
from tasks.align.alternatives import Dpo, Grpo, Rloo
from tasks.align.learner import Learner, SamplingConfig
from tasks.align.pairs import Pair, RankedPairs
from tasks.align.policy import Method, Policy
from tasks.align.proximal import Ppo, PpoTrainer
from tasks.align.ptx import PtxTerm
from tasks.align.rewards import Reward
from tasks.align.rollouts import Local, Rollouts
from tasks.common import tables
from tasks.common.evaluation.nll import answers_mean_nll
from tasks.common.generation import sampling
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import models, torch_setup
from tasks.common.modelling.methods import Full
from tasks.common.random_streams import Stream, derive_seed
from tasks.common.settings import Settings
from tasks.common.text import chat
from tasks.common.text.chat import Question
from tasks.common.text.shards import Split
from tasks.common.training import tracking
from tasks.common.training.checkpoints import CheckpointStore, ExtraState
from tasks.common.training.loop import History
from tasks.common.training.optimizers import Optimizer, learning_rate_at
from tasks.common.training.parallel import World
from tasks.common.training.updates import make_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INPUTS = {
    "model": "{config.model}",
    "reward": "{config.reward.path}",
    "instructions": "data/validate/instructions",
    "shards": "data/tokenize/shards",
}
OUTPUTS = {"model": "data/align/{key}/model", "history": "data/align/{key}/history.csv"}
PARALLEL = True


class Config(Settings):
    """Settings of alignment."""

    model: str = Field(description="Folder of the model to align: an entry's, or your own", min_length=1)
    chat_template: chat.TemplateName = None
    sources: tables.SourceNames = None
    algorithm: Annotated[Ppo | Dpo | Rloo | Grpo, Field(discriminator="name", description="Training algorithm")]
    method: Annotated[Method, Field(discriminator="name", description="Which weights are trained")] = Full(name="full")
    reward: Reward
    rollouts: Rollouts = Local(name="local")
    iterations: int = Field(description="Rounds of sampling and training", ge=1)
    episodes: int = Field(description="Replies per iteration", ge=2)
    minibatch: int = Field(description="Replies per update", ge=1)
    max_new_tokens: int = Field(description="Longest reply (tokens)", ge=1)
    temperature: float = Field(default=1.0, description="Sampling temperature", gt=0)
    missing_eos_penalty: float = Field(
        default=1.0, description="Reward deducted from a reply without an end token", ge=0
    )
    alarms: Alarms = Alarms()
    optimizer: Optimizer


def run(config: Config, job: Job) -> dict[str, Any]:
    """Train the policy and return the metrics of its first and last iteration."""
    from tqdm import tqdm

    torch_setup.prepare_torch(job.numerics, job.seed)
    world = World.join(job.numerics)
    tokenizer = chat.load_tokenizer(job.inputs["model"], config.chat_template)
    history = History(every_steps=1)
    store = CheckpointStore.for_job(job, world)
    values = config.algorithm.values if isinstance(config.algorithm, Ppo) else None
    policy = Policy.load(job.inputs["model"], config.method, values, job.numerics, config.temperature)
    checkpoint = store.resume(policy.model, history)
    first = checkpoint.step if checkpoint else 0
    trained = world.shard(policy.model)
    table = tables.read(job.inputs["instructions"], sources=config.sources).to_pylist()
    ranked, prompt_rows = RankedPairs(), table
    if isinstance(config.reward, rewards.Rankings):
        rankings = tables.read(job.inputs["reward"]).to_pylist()
        ranked = pairs.from_rankings(tokenizer, rankings, config.reward)
        prompt_rows = [{**row, "messages": [*row["prompt"], {"role": "assistant", "content": ""}]} for row in rankings]
    learner = make_learner(config, job, tokenizer, policy, world, prompt_rows, ranked.pairs)
    run = Run(config, job, tokenizer, world, learner, table)
    if checkpoint:
        run.trainer.train_engine.load(checkpoint)
        run.load(checkpoint.extra)
    del checkpoint
    start_time, rounds = time.perf_counter(), range(first, config.iterations + 1)
    bar = tqdm(rounds, desc=job.name, initial=first, total=len(rounds) + first, mininterval=2, disable=world.rank > 0)
    max_length = max(len(prompt.ids) for prompt in run.trainer.prompts) + config.max_new_tokens
    with (
        rollouts.open_engine(config.rollouts, job, policy, max_length) as engine,
        tracking.open_tracker(job, first_step=first, earlier_rows=history.rows, every=1) as tracker,
    ):
        run.trainer.rollout_engine = engine
        for iteration in bar:
            try:
                figures = run.iterate(iteration)
            except (rewards.RewardError, rollouts.RolloutError):  # raised before this iteration's update
                store.save(iteration, run.trainer.train_engine, history, run.extra_state(), force=True)
                raise
            history.add(iteration, figures)
            tracker.log(iteration + 1, figures, round(figures["length"] * config.episodes))
            if run.ended_early:
                break
            store.save(iteration + 1, run.trainer.train_engine, history, run.extra_state())
    done = (len(history.rows) - first) * config.episodes
    job.log_figures(episodes_per_second=round(done / (time.perf_counter() - start_time), 2), resumed_at_step=first)
    run.trainer.train_engine.gather_into(trained)
    world.shutdown()
    models.save(policy.merged_model(job.inputs["model"], trained), tokenizer, job.outputs["model"])
    history.write(job.outputs["history"])
    return summary(history, run) | ranked.figures


def make_learner(
    config: Config, job: Job, tokenizer: "PreTrainedTokenizerFast", policy: Policy, world: World,
    prompt_rows: list[dict[str, Any]], ranked_pairs: Sequence[Pair],
) -> Learner:  # fmt: skip
    """Return the learner of the algorithm; its prompts are the training questions of these rows."""
    algorithm, split = config.algorithm, Split.open(job.inputs["shards"] / "train")
    ptx_term, sampler = PtxTerm.of(algorithm.ptx, split, job.seed, world), make_sampler(config, job.seed)
    train_engine = make_engine(config.optimizer, policy.model, world)
    reward_fn = rewards.open_reward(config.reward, job.inputs["reward"], job.numerics, job.timeouts.reward_seconds)
    reward_name, prompts = (
        rewards.name_of(config.reward),
        training_questions(tokenizer, prompt_rows, config.max_new_tokens),
    )
    if isinstance(algorithm, Ppo):
        return PpoTrainer(
            algorithm, sampler, policy, train_engine, tokenizer, reward_fn, reward_name, prompts, ptx_term, world
        )
    return by_trl.TrlLearner(
        algorithm, sampler, policy, train_engine, tokenizer, reward_fn, reward_name, prompts, ptx_term, world,
        ranked_pairs, str(job.outputs["model"]), job.activation_checkpointing,
    )  # fmt: skip


def training_questions(
    tokenizer: "PreTrainedTokenizerFast", table: list[dict[str, Any]], max_new_tokens: int
) -> list[Question]:
    """Return the training questions that leave room for `max_new_tokens` tokens; raise StageError if there are none."""
    questions = chat.unique_questions(tokenizer, [row for row in table if row["split"] == "train"])
    if not questions:
        raise StageError("the instructions contain no training question; add some to `ingest.sources`.")
    return chat.drop_too_long(tokenizer, questions, max_new_tokens)


def make_sampler(config: Config, seed: int) -> SamplingConfig:
    """Return the sampling settings."""
    return SamplingConfig(
        config.episodes, config.minibatch, config.max_new_tokens, config.temperature, config.missing_eos_penalty, seed
    )


@dataclass
class Run:
    """State of a run of the stage: the learner, its alarms, and whether a rollback ended the run early."""

    config: Config
    job: Job
    tokenizer: "PreTrainedTokenizerFast"
    world: World
    trainer: Learner
    table: list[dict[str, Any]]
    monitor: AlarmMonitor = field(init=False)
    scorecard: Scorecard = field(init=False)
    references: list[tuple[list[int], list[bool]]] = field(init=False)  # encoded conversations, with loss masks
    ended_early: bool = False

    def __post_init__(self) -> None:
        self.monitor = AlarmMonitor(self.config.alarms)
        self.scorecard = Scorecard.of(self.table, self.config.alarms.questions, self._has_room)
        encoded = [chat.encode_chat(self.tokenizer, row["messages"]) for row in self.scorecard.references]
        self.references = [one for one in encoded if chat.fits_context(self.tokenizer, one[0], 0)]

    def _has_room(self, row: dict[str, Any]) -> bool:
        if chat.spells_control_token(chat.control_tokens(self.tokenizer), row["messages"][:-1]):
            return False
        prompt = chat.encode_prompt(self.tokenizer, row["messages"][:-1])
        return chat.fits_context(self.tokenizer, prompt, self.config.max_new_tokens)

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, check the alarms and update (not in the last iteration); return the iteration's metrics."""
        config, trainer = self.config, self.trainer
        last = iteration == config.iterations
        if last and trainer.ema_weights:
            trainer.policy.load_weights(trainer.ema_weights)  # the last iteration evaluates the weights that are saved
        rollout, figures = trainer.sample(iteration)
        if self.monitor.due(iteration, config.iterations):
            self._evaluate(iteration, figures)
        if last or self.ended_early:
            return figures
        rate = learning_rate_at(config.optimizer, iteration, config.iterations)
        return {**figures, **trainer.iterate(rollout, iteration, rate, figures["kl"]), "learning_rate": rate}

    def _evaluate(self, iteration: int, figures: dict[str, float]) -> None:
        """Let the policy answer the alarms' held-out questions; print, stop or roll back if an alarm is raised."""
        prompts = [chat.encode_prompt(self.tokenizer, turns) for turns in self.scorecard.questions]
        if prompts:
            replies = self.trainer.policy.generate(
                self.tokenizer, prompts, max_new_tokens=self.config.max_new_tokens, temperature=0.0,
                seed=derive_seed(self.job.seed, Stream.ALARM_REPLIES), max_active=self.world.max,
            )  # fmt: skip
            figures["exact_match"] = self.scorecard.accuracy(
                [sampling.decode_reply(self.tokenizer, reply) for reply in replies]
            )
        model, pad_id = self.trainer.policy.model, self.tokenizer.pad_token_id
        loss = answers_mean_nll(model, self.references, pad_id, self.job.numerics)
        if loss is not None:
            figures["answer_loss"] = loss
        alarms = self.monitor.check(iteration, figures, self.trainer.policy.weights)
        if not alarms:
            return
        message = (
            f"alarm at iteration {iteration}: reward {self.monitor.baseline['reward']:.2f} → {figures['reward']:.2f}, "
            f"but {', '.join(alarms)}"
        )
        if self.config.alarms.action == "stop":
            penalty_setting = (
                f"align.algorithm.{'kl.coefficient' if isinstance(self.config.algorithm, Ppo) else 'beta'}"
            )
            raise StageError(
                f"{message}. The policy exploits the reward: lower align.optimizer.learning_rate or align.iterations, "
                f"or raise {penalty_setting}; align.alarms.action has alternatives (rollback, warn)."
            )
        if self.config.alarms.action == "rollback":
            self.trainer.policy.load_weights(self.monitor.best_weights)
            self.ended_early = True
            message += f". Rolled back to the policy of iteration {self.monitor.best_iteration}; training ends"
        if not self.world.rank:
            print(message, flush=True)

    def extra_state(self) -> ExtraState:
        """Return the checkpoint's state beside weights and optimizers: alarms, moving average, beta, step count."""
        monitor, trainer = self.monitor, self.trainer
        notes = {
            "beta": trainer.beta, "steps": trainer.steps, "first": monitor.baseline, "reward": monitor.best_reward,
            "iteration": monitor.best_iteration,
        }  # fmt: skip
        return ExtraState({"best": monitor.best_weights, "average": trainer.ema_weights}, notes)

    def load(self, state: ExtraState) -> None:
        """Restore the state of `extra_state` from a checkpoint."""
        monitor, trainer, notes = self.monitor, self.trainer, state.metadata
        trainer.beta, trainer.steps = notes["beta"], notes["steps"]
        monitor.baseline, monitor.best_reward, monitor.best_iteration = (
            notes["first"],
            notes["reward"],
            notes["iteration"],
        )
        monitor.best_weights = state.sharded_like("best", trainer.policy.weights())
        trainer.ema_weights = state.sharded_like("average", trainer.policy.weights())


def summary(history: History, run: Run) -> dict[str, Any]:
    """Return the stage's metrics."""
    first, last = history.rows[0], history.rows[-1]
    if run.ended_early:  # after a rollback the saved policy is that of an earlier iteration
        last = history.rows[run.monitor.best_iteration]
    ends = {f"{name}_{when}": row[name] for when, row in (("first", first), ("last", last)) for name in SUMMARY_METRICS}
    return {
        "algorithm": run.config.algorithm.name, "updates": run.trainer.steps,
        "rolled_back_to": run.monitor.best_iteration if run.ended_early else None, **ends,
    }  # fmt: skip


SUMMARY_METRICS = ("reward", "kl", "entropy", "length", "distinct_2")
