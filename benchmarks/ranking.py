"""Two hundred people rank at once while the server is killed: every acknowledged ranking is there afterwards, once.

Run as `make bench-ranking` or `python -m benchmarks ranking`. It needs the package, which `bessemer run` leaves. Each
ranker is a thread with a connection of its own that asks for answers and ranks them, without a pause, for a minute. In
the middle of it the server gets `kill -9`, all its processes at once, and is started again at the same address. A
ranker that got no reply sends the same ranking again under the same id, as the page does. What is in the store at the
end is read by another process than the one that wrote it.
"""

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks import endpoint, harness
from benchmarks.harness import BenchmarkError, Measured, Row
from benchmarks.serve import QUESTIONS

RANKERS, SECONDS = 200, 60.0
TRIAL_RANKERS, TRIAL_SECONDS = 20, 15.0
ANSWERS = 3
ALIKE = 409  # the answers drawn all said the same: nothing to rank
PAUSE_SECONDS = 0.2  # before a ranker knocks again at a server that is down
SERVER = (sys.executable, "-m", "serving.serve")


@dataclass
class Ranker:
    """One person: which rankings were sent, which were acknowledged and when, and how long each was waited for."""

    number: int
    sent: list[str] = field(default_factory=list)
    acknowledged: list[tuple[str, float]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    repeats: int = 0
    problem: str | None = None

    def run(self, port: int, until: float) -> None:
        """Rank until the time is over, and until the last ranking that was sent is acknowledged."""
        name = f"bench-ranker-{self.number}"
        try:
            for turn in count(self.number):
                if time.monotonic() >= until:
                    return
                question = QUESTIONS[turn % len(QUESTIONS)]
                asked = {"annotator": name, "question": question, "count": ANSWERS, "temperature": 1.2}
                drawn = self._post(port, "samples", asked, until)
                if drawn is None:
                    return
                if "answers" not in drawn:
                    continue
                answers = [answer["id"] for answer in drawn["answers"]]
                ranking = {"id": uuid.uuid4().hex, "answers": answers, "ranks": list(range(1, len(answers) + 1))}
                self.sent.append(str(ranking["id"]))
                began = time.monotonic()
                kept = self._post(port, "rankings", {**ranking, "annotator": name}, until + endpoint.PATIENCE_SECONDS)
                if kept is None:
                    self.problem = "a ranking was not acknowledged in time"
                    return
                now = time.monotonic()
                self.acknowledged.append((kept["saved"]["id"], now))
                self.waits.append(now - began)
        except BenchmarkError as error:
            self.problem = str(error)

    def _post(self, port: int, route: str, body: dict[str, Any], until: float) -> Any:
        """Send until there is a reply; None where none came in time."""
        while time.monotonic() < until:
            connection = http.client.HTTPConnection(endpoint.HOST, port, timeout=endpoint.PATIENCE_SECONDS)
            try:
                connection.request("POST", f"/feedback/{route}", json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError):
                self.repeats += route == "rankings"
                time.sleep(PAUSE_SECONDS)
                continue
            finally:
                connection.close()
            if response.status in (200, ALIKE):
                return content
            if response.status >= 500:
                time.sleep(PAUSE_SECONDS)
                continue
            raise BenchmarkError(f"/feedback/{route} answered {response.status}: {content}")
        return None


def check() -> None:
    """Raise BenchmarkError where there is no package to ask."""
    endpoint.package_folder()


def threads() -> int:
    """Return the cores that the server shares with the rankers."""
    from serving.folders import available_cores

    return available_cores()


def measure(*, trial: bool) -> Measured:
    """Let people rank, kill the server in the middle, and count what is there at the end."""
    number, seconds = (TRIAL_RANKERS, TRIAL_SECONDS) if trial else (RANKERS, SECONDS)
    with tempfile.TemporaryDirectory(prefix="bessemer-ranking-") as scratch:
        folder = Path(scratch)
        rankers, killed, again = people(number, seconds, folder)
        if problems := [ranker.problem for ranker in rankers if ranker.problem]:
            raise BenchmarkError(f"{len(problems)} of {number} rankers gave up: {problems[0]}")
        kept = Counter(stored(folder))
    return Measured(rows(rankers, kept, killed, again, seconds), notes(rankers, killed))


def people(number: int, seconds: float, folder: Path) -> tuple[list[Ranker], float, float]:
    """Run the rankers; return them, the moment of the kill and the moment at which the server answered again."""
    rankers = [Ranker(at) for at in range(number)]
    port = endpoint.free_port()
    with (folder / "log").open("w+b") as log:
        server = start(port, folder, log)
        try:
            until = time.monotonic() + seconds
            crowd = [threading.Thread(target=ranker.run, args=(port, until)) for ranker in rankers]
            for thread in crowd:
                thread.start()
            time.sleep(seconds / 2)
            kill(server)
            killed = time.monotonic()
            server = start(port, folder, log)
            again = time.monotonic()
            for thread in crowd:
                thread.join()
        finally:
            endpoint.end(server)
    return rankers, killed, again


def start(port: int, folder: Path, log: Any) -> "subprocess.Popen[bytes]":
    """Start the server and return when it answers."""
    environment = {**os.environ, **harness.OFFLINE, "BESSEMER_FEEDBACK": str(folder)}
    server = subprocess.Popen(
        [*SERVER, str(port)], cwd=harness.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        endpoint.first_answer(server, port, QUESTIONS[0], endpoint.GENERATE, time.perf_counter(), log)
    except BaseException:
        endpoint.end(server)
        raise
    return server


def kill(server: "subprocess.Popen[bytes]") -> None:
    """End a server and all its workers with SIGKILL, so that nothing of it can tidy up."""
    import psutil

    parent = psutil.Process(server.pid)
    for process in [parent, *parent.children(recursive=True)]:
        process.kill()
    server.wait()


def stored(folder: Path) -> list[str]:
    """Return the ids of the rankings in the store, in order."""
    from serving.feedback import Store

    store = Store(folder)
    try:
        return [ranking.id for ranking in store.rankings()]
    finally:
        store.close()


def rows(rankers: list[Ranker], kept: Counter[str], killed: float, again: float, seconds: float) -> list[Row]:
    """Return what was lost or doubled, which must be nothing, and how fast it went."""
    acknowledged = [identifier for ranker in rankers for identifier, _ in ranker.acknowledged]
    sent = {identifier for ranker in rankers for identifier in ranker.sent}
    waits = [wait for ranker in rankers for wait in ranker.waits]
    after = [when for ranker in rankers for _, when in ranker.acknowledged if when > killed]
    return [
        Row("rankings acknowledged", len(acknowledged), "rankings", target=">= 1"),
        Row("acknowledged and not there", sum(kept[one] == 0 for one in acknowledged), "rankings", target="<= 0"),
        Row("there twice", sum(times > 1 for times in kept.values()), "rankings", target="<= 0"),
        Row("there and never sent", sum(one not in sent for one in kept), "rankings", target="<= 0"),
        Row("acknowledged after the kill", len(after), "rankings", target=">= 1"),
        Row("sent again after a lost connection", sum(ranker.repeats for ranker in rankers), "posts"),
        Row("rankings a second, answers drawn for each", len(acknowledged) / seconds, "1/s"),
        Row("median wait for the acknowledgement", 1e3 * statistics.median(waits), "ms"),
        Row("95 % wait for the acknowledgement", 1e3 * statistics.quantiles(waits, n=20)[-1], "ms"),
        Row("from the kill to the first answer of the new server", again - killed, "s"),
    ]


def notes(rankers: list[Ranker], killed: float) -> list[str]:
    """Tell how even it was."""
    each = [len(ranker.acknowledged) for ranker in rankers]
    before = sum(when <= killed for ranker in rankers for _, when in ranker.acknowledged)
    return [
        f"{len(rankers)} rankers, {ANSWERS} answers each time; {min(each)} to {max(each)} rankings each; {before} were "
        "acknowledged before the kill. The wait includes the restart for those whom it met."
    ]
