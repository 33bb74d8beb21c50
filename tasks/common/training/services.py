"""The process that writes one service's curves: `python -P services.py SERVICE FOLDER FIRST NAME ID`.

`tracking.py` starts it beside a stage and writes to its standard input one JSON line a point,
`[step, {figure: value}]`; where that ends, so does the process, also where the stage was killed outright. It is a
process and no thread, because what a service imports (half a second to five, a hundred MB) would take Python's lock
from the training. It knows nothing of the project, and no part of it bears on a result.

FIRST is the step that the stage goes on after (0 for a new run), NAME what the run is called, and ID a name for it that
is the same when it is resumed.
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

PROJECT = "bessemer"  # its name in Weights & Biases, and the experiment's in MLflow
QUIET = {  # nobody calls home about how it is used, or fills the stage's log
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "WANDB_ERROR_REPORTING": "false",
}


@contextmanager
def dvclive(folder: Path, first: int, name: str, run_id: str) -> Iterator[Log]:
    """Write TSV files and `metrics.json`; neither an experiment nor a dvc.yaml, for the pipeline's is the only one."""
    from dvclive import Live

    for path in (folder / "plots").rglob("*.tsv"):
        cut(path, first)
    live = Live(str(folder), resume=first > 0, save_dvc_exp=False, dvcyaml=False)

    def log(step: int, figures: dict[str, float]) -> None:
        live.step = step
        for figure, value in figures.items():
            live.log_metric(figure, value)
        live.sync()

    yield log
    live.end()


def cut(path: Path, last: int) -> None:
    """Drop the rows beyond a step from one of DVCLive's files: the steps after the checkpoint are done again."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    kept = [row for row in rows if int(row[header.index("step")]) <= last]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *kept])


@contextmanager
def tensorboard(folder: Path, first: int, name: str, run_id: str) -> Iterator[Log]:
    """Write an event file. TensorBoard's own writer, as torch's would load torch once more."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    began = SessionLog(status=SessionLog.START)  # its reader then drops the steps of earlier files from here on
    writer.add_event(Event(wall_time=time.time(), step=first + 1, session_log=began))

    def log(step: int, figures: dict[str, float]) -> None:
        values = [Summary.Value(tag=figure, simple_value=value) for figure, value in figures.items()]
        writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        writer.flush()

    yield log
    writer.close()


@contextmanager
def wandb(folder: Path, first: int, name: str, run_id: str) -> Iterator[Log]:
    """Write Weights & Biases' file, which `wandb sync` sends; its server is asked where WANDB_MODE says so."""
    import wandb

    run = wandb.init(
        project=PROJECT, name=name, id=run_id, resume="allow", dir=str(folder),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings={"silent": True, "console": "off", "disable_git": True, "save_code": False, "x_disable_stats": True},
    )  # fmt: skip
    yield lambda step, figures: run.log(figures, step=step)
    run.finish()


@contextmanager
def mlflow(folder: Path, first: int, name: str, run_id: str) -> Iterator[Log]:
    """Write a database of the run's own, or to the server that MLFLOW_TRACKING_URI names."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db")
    known = client.get_experiment_by_name(PROJECT)
    experiment = known.experiment_id if known else client.create_experiment(PROJECT)
    found = client.search_runs([experiment], f"tags.resumable = '{run_id}'", max_results=1) if first else []
    run = found[0] if found else client.create_run(experiment, run_name=name, tags={"resumable": run_id})
    client.update_run(run.info.run_id, status="RUNNING")

    def log(step: int, figures: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        client.log_batch(run.info.run_id, [Metric(figure, value, now, step) for figure, value in figures.items()])

    yield log
    client.set_terminated(run.info.run_id)


def main(service: str, folder: str, first: str, name: str, run_id: str) -> None:
    """Write each point as it comes. Raises whatever the service does; the stage goes on without it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and an orderly stop are the stage's: its last points come yet
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    opening = {"dvclive": dvclive, "tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow}[service]
    Path(folder).mkdir(parents=True, exist_ok=True)
    with opening(Path(folder), int(first), name, run_id) as log:
        for line in sys.stdin:
            step, figures = json.loads(line)
            log(step, figures)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Exception as error:
        sys.exit(f"live logging to {sys.argv[1]} has ended ({error}); the stage goes on")
