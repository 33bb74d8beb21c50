"""The toy project's stages: `python steps.py STAGE`. Each obeys its section of params.yaml and writes one file.

`meet: other` waits until the stage `other` is under way too; `fail: sentence` ends badly; `hang: true` starts a process
in a session of its own and sleeps, with half of its output written.
"""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from ruamel.yaml import YAML

NEEDS = {
    "source": ["data/source.txt"],
    "left": ["data/source/out.txt"],
    "right": ["data/source/out.txt"],
    "join": ["data/left/out.txt", "data/right/out.txt"],
}


def main(stage: str) -> None:
    """Run one stage."""
    name = os.environ.get("DVC_STAGE", stage)
    settings = YAML(typ="safe").load(Path("params.yaml"))[stage]
    Path("marks").mkdir(exist_ok=True)
    Path("marks", stage).write_text(str(os.getpid()))
    if settings["meet"]:
        meet(stage, settings["meet"])
    for percent in (10, 50, 100):
        print(f"{name}: {percent:3}%|###   | {percent}/100", end="\r", file=sys.stderr, flush=True)
    print(f"{name} says {settings['text']}", flush=True)
    if settings["fail"]:
        sys.exit(f"{name}: {settings['fail']}")
    folder = Path("data", stage)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path("marks", f"{stage}.half")
    scratch.write_text(settings["text"])
    if settings["hang"]:
        hang(stage)
    scratch.write_text("\n".join([settings["text"], *(Path(path).read_text() for path in NEEDS[stage])]))
    scratch.replace(folder / "out.txt")
    (folder / "record.json").write_text(json.dumps({"stage": name, "recipe": "a" * 64, "content": "b" * 64}))
    note_run(name)


def meet(stage: str, other: str) -> None:
    """Wait until the other stage is under way as well: two stages that wait for each other must overlap."""
    for _ in range(600):
        if Path("marks", other).exists():
            return
        time.sleep(0.1)
    sys.exit(f"{stage}: {other} did not start beside me")


def hang(stage: str) -> None:
    """Sleep, with a grandchild that no signal to our group would reach."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path("marks", f"{stage}.pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def note_run(name: str) -> None:
    """Write what was measured, as the real stages do."""
    folder = Path("runs", os.environ.get("BESSEMER_RUN_ID", "manual"))
    folder.mkdir(parents=True, exist_ok=True)
    log = {"stage": name, "seconds": 1.5, "started": datetime.now(UTC).isoformat(), "peak_memory_bytes": 1000}
    (folder / f"{name}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    main(sys.argv[1])
