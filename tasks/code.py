"""The stage `code`: digests of each stage's code in `data/code/STAGE.json` (`python -m tasks.code`).

Every other stage depends on its digest file instead of its source files, so an edit of a comment or a message reruns
only this stage. A stage run by hand does not read its file but computes the digests from the current code.
"""

import time
from datetime import UTC, datetime
from pathlib import Path

from tasks.common.code import stages
from tasks.common.harness.records import run_folder, write_json
from tasks.common.settings import STAGES

NAME = "code"


def write(root: Path = Path()) -> None:
    """Write the digest file of every stage."""
    for stage in STAGES:
        text = stages.to_json(stages.digest_module(stages.module_of_stage(stage, root), root))
        path = root / stages.digest_file(stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    """Write the digest files and a log."""
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        write()
    except SyntaxError as error:
        raise SystemExit(f"{NAME}: {error.filename}, line {error.lineno}: {error.msg}") from error
    log = {"stage": NAME, "started": started.isoformat(timespec="seconds"), "seconds": time.perf_counter() - clock}
    write_json(run_folder(started) / f"{NAME}.json", log)


if __name__ == "__main__":
    main()
