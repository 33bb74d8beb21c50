"""The process that logs to one tracking service: `python -P services.py SERVICE FOLDER FIRST_STEP NAME RUN_ID`.

`tracking.py` starts it beside a stage and writes one JSON line per point to its standard input,
`[step, {metric: value}]`. The process exits at the end of its input, also when the stage was killed. It is a process
and not a thread because a service's imports (0.5 to 5 s, 100 MB) would hold the GIL and slow down the training. It
imports nothing of the project and does not affect any result.

FIRST_STEP is the step that the stage resumes after (0 for a new run), NAME the run's name, and RUN_ID an id that does
not change when the run is resumed.
"""

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Log = Callable[[int, dict[str, float]], object]

PROJECT_NAME = "bessemer"  # project in Weights & Biases, experiment in MLflow
QUIET_ENVIRONMENT = {  # no telemetry, no messages in the stage's log
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
}


@contextmanager
def dvclive(folder: Path, first_step: int, name: str, run_id: str) -> Iterator[Log]:
    """Log to DVCLive's TSV files and `metrics.json`, without a DVC experiment or a dvc.yaml of its own."""
    from dvclive import Live

    for path in (folder / "plots").rglob("*.tsv"):
        truncate(path, first_step)
    live = Live(str(folder), resume=first_step > 0, save_dvc_exp=False, dvcyaml=False)

    def log(step: int, metrics: dict[str, float]) -> None:
        live.step = step
        for figure, value in metrics.items():
            live.log_metric(figure, value)
        live.sync()

    yield log
    live.end()


def truncate(path: Path, last_step: int) -> None:
    """Delete the rows after `last_step` from one of DVCLive's files: a resumed run logs these steps again."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    kept = [row for row in rows if int(row[header.index("step")]) <= last_step]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *kept])


@contextmanager
def tensorboard(folder: Path, first_step: int, name: str, run_id: str) -> Iterator[Log]:
    """Log to an event file, by TensorBoard's own writer: torch's would import torch in this process."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    session_start = SessionLog(status=SessionLog.START)  # the reader discards later steps of earlier files
    writer.add_event(Event(wall_time=time.time(), step=first_step + 1, session_log=session_start))

    def log(step: int, metrics: dict[str, float]) -> None:
        values = [Summary.Value(tag=figure, simple_value=value) for figure, value in metrics.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        writer.flush()

    yield log
    writer.close()


@contextmanager
def wandb(folder: Path, first_step: int, name: str, run_id: str) -> Iterator[Log]:
    """Log to a Weights & Biases file for `wandb sync`, or to its server if WANDB_MODE is `online`."""
    import wandb

    run = wandb.init(
        project=PROJECT_NAME, name=name, id=run_id, resume="allow", dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings={"silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_stats": True},
    )  # fmt: skip
    yield lambda step, metrics: run.log(metrics, step=step)
    run.finish()


@contextmanager
def mlflow(folder: Path, first_step: int, name: str, run_id: str) -> Iterator[Log]:
    """Log to an SQLite database in the run's folder, or to the server in MLFLOW_TRACKING_URI."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db")
    existing = client.get_experiment_by_name(PROJECT_NAME)
    experiment = existing.experiment_id if existing else client.create_experiment(PROJECT_NAME)
    runs = client.search_runs([experiment], f"tags.resumable = '{run_id}'", max_results=1) if first_step else []
    run = runs[0] if runs else client.create_run(experiment, run_name=name, tags={"resumable": run_id})
    client.update_run(run.info.run_id, status="RUNNING")

    def log(step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run.info.run_id, [Metric(figure, value, now, step) for figure, value in metrics.items()])

    yield log
    client.set_terminated(run.info.run_id)


def main(service: str, folder: str, first_step: str, name: str, run_id: str) -> None:
    """Log each point as it arrives. Errors of the service end this process and not the stage."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage handles these signals and then sends its last points
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for variable, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    open_log = {"dvclive": dvclive, "tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}[service]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open_log(Path(folder), int(first_step), name, run_id) as log:
        for line in sys.stdin:
            step, metrics = json.loads(line)
            log(step, metrics)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"live logging to {sys.argv[1]} has failed ({error}); the stage continues without it")
