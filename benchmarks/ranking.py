"""Durability of rankings: 200 concurrent rankers while the server is killed; each confirmed ranking is stored once.

Run as `make bench-ranking` or `python -m benchmarks ranking`. It needs the package, an output of `bessemer run`. Each
ranker is a thread with its own connection that requests answers and ranks them for a minute, without pauses. Halfway
all processes of the server get SIGKILL, and it is restarted on the same port. A ranker without a reply sends the same
ranking again under the same id, as the page does. At the end the store is read by another process.
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
from benchmarks.harness import BenchmarkError, Measurements, Row
from benchmarks.serve import QUESTIONS

NUM_RANKERS, SECONDS = 200, 60.0
TRIAL_RANKERS, TRIAL_SECONDS = 20, 15.0
ANSWERS_PER_RANKING = 3
ONE_ANSWER_STATUS = 409  # all samples are equal, so there is nothing to rank
PAUSE_SECONDS = 0.2  # before a ranker retries
SERVER = (sys.executable, "-m", "serving.serve")


@dataclass
class Ranker:
    """One ranker: the ids sent, the ids acknowledged with their times, and the latencies in seconds."""

    number: int
    sent: list[str] = field(default_factory=list)
    acknowledged: list[tuple[str, float]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    repeats: int = 0
    problem: str | None = None

    def run(self, port: int, until: float) -> None:
        """Rank until `until`, and until the last sent ranking is acknowledged."""
        name = f"bench-ranker-{self.number}"
        try:
            for turn in count(self.number):
                if time.monotonic() >= until:
                    return
                question = QUESTIONS[turn % len(QUESTIONS)]
                body = {"annotator": name, "question": question, "count": ANSWERS_PER_RANKING, "temperature": 1.2}
                sampled = self._post(port, "samples", body, until)
                if sampled is None:
                    return
                if "answers" not in sampled:
                    continue
                answers = [answer["id"] for answer in sampled["answers"]]
                ranking = {"id": uuid.uuid4().hex, "answers": answers, "ranks": list(range(1, len(answers) + 1))}
                self.sent.append(str(ranking["id"]))
                began = time.monotonic()
                reply = self._post(port, "rankings", {**ranking, "annotator": name}, until + endpoint.TIMEOUT_SECONDS)
                if reply is None:
                    self.problem = "a ranking was not acknowledged in time"
                    return
                now = time.monotonic()
                self.acknowledged.append((reply["saved"]["id"], now))
                self.waits.append(now - began)
        except BenchmarkError as error:
            self.problem = str(error)

    def _post(self, port: int, route: str, body: dict[str, Any], until: float) -> Any:
        """Post until there is a reply; return None if there is none by `until`."""
        while time.monotonic() < until:
            connection = http.client.HTTPConnection(endpoint.HOST, port, timeout=endpoint.TIMEOUT_SECONDS)
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
            if response.status in (200, ONE_ANSWER_STATUS):
                return content
            if response.status >= 500:
                time.sleep(PAUSE_SECONDS)
                continue
            raise BenchmarkError(f"/feedback/{route} answered {response.status}: {content}")
        return None


def check() -> None:
    """Raise BenchmarkError if there is no package."""
    endpoint.package_folder()


def threads() -> int:
    """Return the number of cores that the server and the rankers share."""
    from serving.folders import available_cores

    return available_cores()


def measure(*, trial: bool) -> Measurements:
    """Run the rankers, kill the server halfway, and count the stored rankings."""
    number, seconds = (TRIAL_RANKERS, TRIAL_SECONDS) if trial else (NUM_RANKERS, SECONDS)
    with tempfile.TemporaryDirectory(prefix="bessemer-ranking-") as scratch:
        folder = Path(scratch)
        rankers, killed, again = run_rankers(number, seconds, folder)
        if problems := [ranker.problem for ranker in rankers if ranker.problem]:
            raise BenchmarkError(f"{len(problems)} of {number} rankers gave up: {problems[0]}")
        stored = Counter(stored_ids(folder))
    return Measurements(rows(rankers, stored, killed, again, seconds), notes(rankers, killed))


def run_rankers(number: int, seconds: float, folder: Path) -> tuple[list[Ranker], float, float]:
    """Run the rankers; return them, the time of the kill and the time of the restarted server's first answer."""
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
            endpoint.stop_server(server)
    return rankers, killed, again


def start(port: int, folder: Path, log: Any) -> "subprocess.Popen[bytes]":
    """Start the server and wait for its first answer."""
    environment = {**os.environ, **harness.OFFLINE, "BESSEMER_FEEDBACK": str(folder)}
    server = subprocess.Popen(
        [*SERVER, str(port)], cwd=harness.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        endpoint.first_answer(server, port, QUESTIONS[0], endpoint.GENERATE_ROUTE, time.perf_counter(), log)
    except BaseException:
        endpoint.stop_server(server)
        raise
    return server


def kill(server: "subprocess.Popen[bytes]") -> None:
    """Kill a server and all its workers with SIGKILL, so that none can clean up."""
    import psutil

    parent = psutil.Process(server.pid)
    for process in [parent, *parent.children(recursive=True)]:
        process.kill()
    server.wait()


def stored_ids(folder: Path) -> list[str]:
    """Return the ids of the rankings in the store, in order."""
    from serving.feedback.store import Store

    store = Store(folder)
    try:
        return [ranking.id for ranking in store.rankings()]
    finally:
        store.close()


def rows(rankers: list[Ranker], stored: Counter[str], killed: float, again: float, seconds: float) -> list[Row]:
    """Return the counts of lost and duplicated rankings, which must be 0, and the rates and latencies."""
    acknowledged = [identifier for ranker in rankers for identifier, _ in ranker.acknowledged]
    sent = {identifier for ranker in rankers for identifier in ranker.sent}
    waits = [wait for ranker in rankers for wait in ranker.waits]
    after = [when for ranker in rankers for _, when in ranker.acknowledged if when > killed]
    return [
        Row("rankings acknowledged", len(acknowledged), "rankings", target=">= 1"),
        Row("acknowledged and not there", sum(stored[one] == 0 for one in acknowledged), "rankings", target="<= 0"),
        Row("there twice", sum(times > 1 for times in stored.values()), "rankings", target="<= 0"),
        Row("there and never sent", sum(one not in sent for one in stored), "rankings", target="<= 0"),
        Row("acknowledged after the kill", len(after), "rankings", target=">= 1"),
        Row("sent again after a lost connection", sum(ranker.repeats for ranker in rankers), "posts"),
        Row("rankings a second, answers drawn for each", len(acknowledged) / seconds, "1/s"),
        Row("median wait for the acknowledgement", 1e3 * statistics.median(waits), "ms"),
        Row("95 % wait for the acknowledgement", 1e3 * statistics.quantiles(waits, n=20)[-1], "ms"),
        Row("from the kill to the first answer of the new server", again - killed, "s"),
    ]


def notes(rankers: list[Ranker], killed: float) -> list[str]:
    """Return a note on the distribution over rankers."""
    each = [len(ranker.acknowledged) for ranker in rankers]
    before = sum(when <= killed for ranker in rankers for _, when in ranker.acknowledged)
    return [
        f"{len(rankers)} rankers, {ANSWERS_PER_RANKING} answers per ranking; {min(each)} to {max(each)} rankings each; "
        f"{before} were acknowledged before the kill. Latencies of requests during the restart include it."
    ]
