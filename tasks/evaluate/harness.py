"""Tasks of lm-evaluation-harness (Gao et al.), by name, from task files on disk; `lm-eval` is an optional package.

A Transformers folder runs in the harness's own class for such models, in float32, and an export of `quantize` behind
the same class (`harness_model.py`). So tokenization, truncation and the encoding of contexts are the harness's, and the
figures are those that `lm_eval --model hf` gives for the same folder.
"""

import importlib.metadata
import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tasks.common.harness.job import StageError
from tasks.evaluate.evaluation import Evaluation, Facts, Result, Row, Rows

if TYPE_CHECKING:
    from tasks.evaluate.subject import Subject

FOLDER = Path("data/sources/evaluation")
PACKAGE = "lm_eval"
BOOTSTRAP_ITERATIONS = 1000  # for the standard error of figures that are no means
CORRECT = ("acc", "exact_match")  # per-document figures that say whether an answer is right


class Harness(Evaluation):
    """Tasks of lm-evaluation-harness."""

    KIND: ClassVar[str] = "harness"
    APPLIES_TO: ClassVar[str] = "Causal models, exported ones included, and any task whose files are on disk."
    INPUTS: ClassVar[tuple[str, ...]] = ("evaluation",)

    kind: Literal["harness"] = Field(description="Kind of evaluation")
    tasks: list[str] = Field(description="Names of tasks", min_length=1)
    include: str | None = Field(
        default=None,
        description="Folder in data/sources/evaluation with the tasks' YAML files and data; null: the package's own "
        "tasks only",
    )
    shots: int | None = Field(default=None, description="Examples in the prompt; null: what each task says", ge=0)
    limit: int | None = Field(default=None, description="Documents of each task; null: all", ge=1)
    batch: int = Field(
        default=1, description="Requests in one forward pass of a Transformers model; an export takes one", ge=1
    )
    chat: bool = Field(default=False, description="Whether prompts are rendered with the model's chat template")
    download: bool = Field(
        default=False, description="Whether tasks may download their data; it is not part of the identity then"
    )

    @field_validator("kind")
    @classmethod
    def _validate_package(cls, kind: str) -> str:
        """Reject the kind if its package is missing, which would fail only when models are trained."""
        if importlib.util.find_spec(PACKAGE) is None:
            raise ValueError("lm-eval is not installed: `pip install -c requirements.lock lm-eval`")
        return kind

    @field_validator("include")
    @classmethod
    def _validate_include(cls, include: str | None) -> str | None:
        if include is None:
            return None
        if Path(include).is_absolute() or ".." in Path(include).parts:
            raise ValueError(f"the path must be relative to {FOLDER}/ and inside it, so that DVC tracks the files")
        if not any((FOLDER / include).rglob("*.yaml")):
            raise ValueError(f"{FOLDER / include} should contain the tasks' .yaml files, found none")
        return include

    @model_validator(mode="after")
    def _validate_tasks(self) -> "Harness":
        """Report unknown tasks and missing data files now: the stage runs only after all models are trained."""
        if self.include is None:
            return self
        known = read_task_files(FOLDER / self.include)
        for task in self.tasks:
            if task not in known and not self.download:
                raise ValueError(
                    f"{FOLDER / self.include} has no task {task!r}; its tasks are {', '.join(sorted(known)) or 'none'}"
                )
            for file in _data_files(known.get(task, {})):
                if "://" not in file and not Path(file).exists():
                    raise ValueError(f"the task {task} reads {file}, which does not exist (relative to the project)")
        return self

    def possible_figures(self, facts: Facts) -> tuple[str, ...]:
        """Return the metrics of each task, as far as its file says them."""
        known = read_task_files(FOLDER / self.include) if self.include is not None else {}
        return tuple(name for task in self.tasks for name in _possible(task, known.get(task)))

    def versions(self) -> dict[str, str]:
        """Return the version of the optional package."""
        return {PACKAGE: importlib.metadata.version("lm-eval")}

    def measure(self, subject: "Subject") -> Result:
        """Run the tasks."""
        from tasks.evaluate.harness_model import open_model

        logging.getLogger(PACKAGE).setLevel(logging.ERROR)  # it warns of its own defaults
        with _offline(self.download):
            found = self._run(open_model(subject, self.batch), subject)
        figures = {task: _figures(values) for task, values in found["results"].items()}
        rows = [row for task, samples in found["samples"].items() for row in _rows(task, samples)]
        details = {
            "versions": {**self.versions(), **_plain(found["versions"])},
            "shots": _plain(found["n-shot"]), "limit": self.limit, "chat": self.chat,
        }  # fmt: skip
        return Result(figures, rows, details=details)

    def _run(self, model: Any, subject: "Subject") -> Mapping[str, Any]:
        """Run the harness with its default seeds, as its command does."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        include = None if self.include is None else subject.job.inputs["evaluation"] / self.include
        own = include is not None and set(self.tasks) <= set(read_task_files(include))
        # The package has thousands of task files; reading them takes ten seconds.
        manager = TaskManager(include_path=None if include is None else str(include), include_defaults=not own)
        unknown = [task for task in self.tasks if task not in manager.all_tasks]
        if unknown:
            raise StageError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; see `lm_eval ls tasks`.")
        try:
            found: Mapping[str, Any] | None = simple_evaluate(
                model=model, tasks=list(self.tasks), num_fewshot=self.shots, limit=self.limit, task_manager=manager,
                apply_chat_template=self.chat, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=True,
            )  # fmt: skip
        except (OSError, ValueError, AssertionError) as error:
            raise StageError(f"lm-evaluation-harness stopped in {', '.join(self.tasks)}: {error}") from error
        if found is None:
            raise StageError("lm-evaluation-harness returned no results: run the stage in one process.")
        return found


def read_task_files(folder: Path) -> dict[str, Row]:
    """Return the settings of every task and group file in a folder, by name; a file without a name is a base."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: dict[str, Row] = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            content = YAML(typ="rt").load(path.read_text(encoding="utf-8"))  # which keeps tags such as !function
        except (YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML in UTF-8: {error}") from error
        for key in ("task", "group", "tag"):
            names = content.get(key) if isinstance(content, Mapping) else None
            for name in [names] if isinstance(names, str) else names if key == "tag" and names else ():
                found.setdefault(str(name), dict(content) if key == "task" else {})
    return found


def _data_files(task: Mapping[str, Any]) -> Iterator[str]:
    files = (task.get("dataset_kwargs") or {}).get("data_files") or ()
    for value in files.values() if isinstance(files, Mapping) else [files]:
        yield from [value] if isinstance(value, str) else value


def _possible(task: str, settings: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield patterns of the figures that a task can give."""
    listed = (settings or {}).get("metric_list")
    if not listed:
        yield f"{task}.*"
        return
    for one in listed:
        yield f"{task}.{one['metric']}*"


def _figures(values: Mapping[str, Any]) -> Row:
    """Return a task's figures with their standard errors; a filter other than the default is part of the name."""
    found: Row = {}
    for key, value in values.items():
        metric, _, name = key.partition(",")
        if not isinstance(value, int | float) or isinstance(value, bool) or key == "alias":
            continue
        found[metric if name in ("", "none") else f"{metric}_{name.replace('-', '_')}"] = round(float(value), 6)
    return found


def _rows(task: str, samples: Sequence[Mapping[str, Any]]) -> Rows:
    """Return the documents of a task: prompt, replies or scores, and target."""
    rows = []
    for sample in samples:
        correct = next((sample[name] for name in CORRECT if isinstance(sample.get(name), int | float | bool)), None)
        rows.append({
            "id": f"{task}-{sample['doc_id']}", "entity": task, "split": "heldout", "kind": "harness",
            "question": str(sample["arguments"][0][0]), "reply": str(sample["filtered_resps"]),
            "reference": str(sample["target"]), "correct": None if correct is None else bool(correct),
        })  # fmt: skip
    return rows


def _plain(values: Mapping[str, Any]) -> Row:
    return {name: value if isinstance(value, int | float) else str(value) for name, value in values.items()}


@contextmanager
def _offline(download: bool) -> Iterator[None]:
    """Keep the data sets' caches in a temporary folder and, unless tasks may download, forbid connections."""
    import datasets
    from huggingface_hub import constants

    # Both read the environment when they are imported, which was long ago.
    wanted: list[tuple[Any, str, Any]] = [
        (constants, "HF_HUB_OFFLINE", not download),
        (datasets.config, "HF_HUB_OFFLINE", not download),
    ]
    with tempfile.TemporaryDirectory() as folder:
        wanted.append((datasets.config, "HF_DATASETS_CACHE", Path(folder)))
        before = [getattr(owner, name) for owner, name, _ in wanted]
        for owner, name, value in wanted:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for (owner, name, _), value in zip(wanted, before, strict=True):
                setattr(owner, name, value)
