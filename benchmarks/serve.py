"""The endpoint: time to the first answer, requests per second, and the INT8 engine against torch FP32.

Run as `make bench-serve` or `python -m benchmarks serve`. It needs the package and its FP32 parent model, both outputs
of `bessemer run`. The endpoint's peer is `transformers serve` with the FP32 model, on the same route. Each side of the
decoding is a subprocess (`benchmarks/decoding_run.py`), on one thread and on all cores.
"""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import endpoint, harness, previous_engine
from benchmarks.harness import BenchmarkError, Figures, Measurements, Row
from serving.folders import WEIGHTS_FILE

FP32_FOLDER = harness.ROOT / "data" / "prune" / "pruned"
QUANTIZE_METRICS = harness.ROOT / "metrics" / "quantize@chat.json"
TORCH_NAME = "torch FP32 generate"
PEER_NAME = "transformers serve, FP32"
QUESTIONS = (
    "What is the capital of France?",
    "What is the symbol for gold?",
    "Which continent is Peru in?",
    "What is the capital of Japan?",
    "Which currency does Italy use?",
    "What is the atomic number of oxygen?",
    "What is the capital of New Zealand?",
    "What are the people of Iceland called?",
)
PROMPT_TOKENS, NEW_TOKENS = 16, 96


def check() -> None:
    """Raise BenchmarkError if the package or its FP32 parent is missing, or if they do not match."""
    remedy = "run `bessemer run` first."
    harness.require_paths(FP32_FOLDER / "model", FP32_FOLDER / "record.json", QUANTIZE_METRICS, remedy=remedy)
    provenance = json.loads((endpoint.package_folder() / "provenance.json").read_text(encoding="utf-8"))
    parent = next((record["content"] for record in provenance["stages"] if record["stage"] == "prune@pruned"), None)
    if parent != json.loads((FP32_FOLDER / "record.json").read_text(encoding="utf-8"))["content"]:
        raise BenchmarkError("the package was not made from the model in data/prune/pruned: run `bessemer run` first.")
    previous_engine.install()
    if find_spec("openai") is None:
        raise BenchmarkError("`transformers serve` needs the package openai: `make bench-serve` installs it.")


def threads() -> int:
    """Return the largest number of threads of a side: the available cores."""
    from serving.folders import available_cores

    return available_cores()


def measure(*, trial: bool) -> Measurements:
    """Measure startup, load and decoding."""
    from serving.folders import useful_threads

    rounds = 1 if trial else 5
    starts, loads = measure_servers(rounds, requests=32 if trial else 200)
    measured = Measurements(
        [*start_rows(starts), *load_rows(loads), *batching_rows(loads), size_row(), *agreement_rows()]
    )
    measured.notes += [harness.spread(starts, "seconds"), harness.spread(loads, "requests_per_second")]
    decoded: dict[int, dict[str, list[Figures]]] = {}
    for count in sorted({1, threads()}):
        sides = {side: partial(measure_decoding, side, count) for side in ("int8", "torch")}
        sides["previous"] = partial(measure_previous, count)
        decoded[count] = harness.alternate(sides, rounds)
        measured.notes.append(f"{count} thread(s): {harness.spread(decoded[count], 'tokens_per_second')}")
    measured.rows += decoding_rows(decoded, useful_threads(endpoint.package_folder() / "chat" / WEIGHTS_FILE))
    return measured


def measure_servers(rounds: int, requests: int) -> tuple[dict[str, list[Figures]], dict[str, list[Figures]]]:
    """Start each server once per round, and load it with one client, then with 16 concurrent ones."""
    servers = {
        "bessemer serve": (endpoint.BESSEMER_COMMAND, (endpoint.CHAT_ROUTE, endpoint.GENERATE_ROUTE)),
        "python -m serving.serve": (endpoint.MODULE_COMMAND, ()),
        PEER_NAME: ((*endpoint.TRANSFORMERS_COMMAND, str(FP32_FOLDER / "model")), (endpoint.CHAT_ROUTE,)),
    }
    starts: dict[str, list[Figures]] = {name: [] for name in servers}
    loads: dict[str, list[Figures]] = {}
    for number in range(rounds):
        for name, (command, routes) in servers.items():
            first = endpoint.CHAT_ROUTE if name == PEER_NAME else endpoint.GENERATE_ROUTE
            with endpoint.run_server(command, QUESTIONS[0], first) as (port, seconds):
                starts[name].append({"seconds": seconds})
                print(f"    round {number + 1} of {rounds}, {name}: first answer after {seconds:.2f} s", flush=True)
                for route in routes:
                    endpoint.load(port, route, QUESTIONS, 1, len(QUESTIONS))
                    for clients in (1, 16):
                        found = endpoint.load(port, route, QUESTIONS, clients, requests)
                        loads.setdefault(f"{name}, {route}, {clients} at once", []).append(found)
    return starts, loads


def start_rows(starts: dict[str, list[Figures]]) -> list[Row]:
    """Return the seconds to the first answer; the target applies to `bessemer serve`, which `make serve` runs."""
    seconds = {name: harness.median(found, "seconds") for name, found in starts.items()}
    return [
        Row(
            "first answer after `bessemer serve`", seconds["bessemer serve"], "s", seconds[PEER_NAME], PEER_NAME, "<= 5"
        ),
        Row("first answer after `python -m serving.serve`", seconds["python -m serving.serve"], "s"),
    ]


def load_rows(loads: dict[str, list[Figures]]) -> list[Row]:
    """Return rates and latencies of 1 and 16 clients, on OpenAI's route (streamed, as by the peer) and on our own."""
    units = {
        "requests_per_second": ("requests", "1/s"),
        "median_ms": ("median wait", "ms"),
        "p95_ms": ("95 % wait", "ms"),
    }
    found: list[Row] = []
    for route in (endpoint.CHAT_ROUTE, endpoint.GENERATE_ROUTE):
        for clients in (1, 16):
            mine, other = (loads.get(f"{name}, {route}, {clients} at once") for name in ("bessemer serve", PEER_NAME))
            for figure, (what, unit) in units.items():
                peer = harness.median(other, figure) if other else None
                name = f"{route}, {clients} at once: {what}"
                found.append(Row(name, harness.median(mine or [], figure), unit, peer, PEER_NAME if other else None))
    return found


def batching_rows(loads: dict[str, list[Figures]]) -> list[Row]:
    """Return the rate of 16 concurrent requests, which share a batch, against sequential requests."""
    rates = [
        harness.median(loads[f"bessemer serve, {endpoint.GENERATE_ROUTE}, {clients} at once"], "requests_per_second")
        for clients in (16, 1)
    ]
    what = f"{endpoint.GENERATE_ROUTE}, 16 at once against one after the other"
    return [Row(what, rates[0], "1/s", rates[1], "one at a time", "ratio >= 2")]


def agreement_rows() -> list[Row]:
    """Return the served model's agreement with FP32 on held-out prose."""
    chat_folder = endpoint.package_folder() / "chat"
    request = {
        "int8": str(chat_folder),
        "fp32": str(FP32_FOLDER / "model"),
        "threads": 1,
        "rows": heldout_rows(chat_folder),
    }
    found = harness.run_module("benchmarks.agreement_run", request)
    return [
        Row(
            f"same likeliest token as FP32, of {found['tokens']:.0f}",
            found["same_top_token"],
            "share",
            target=">= 0.98",
        ),
        Row("mean KL divergence from FP32", found["kl_nats"], "nats", target="<= 0.01"),
    ]


def heldout_rows(chat_folder: Path) -> list[list[int]]:
    """Return held-out prose of the corpus as rows of 64 token ids."""
    from tokenizers import Tokenizer

    from tasks.common import tables

    tokenizer = Tokenizer.from_file(str(chat_folder / "tokenizer.json"))
    rows = tables.read(harness.ROOT / "data" / "validate" / "corpus", "heldout").column("text").to_pylist()
    ids: list[int] = tokenizer.encode("\n".join(rows[:400]), add_special_tokens=False).ids
    width = 64
    return [ids[at : at + width] for at in range(0, min(len(ids), 200 * width) - width + 1, width)]


def size_row() -> Row:
    """Return the size of the INT8 weights beside that of the FP32 weights."""
    sizes = json.loads(QUANTIZE_METRICS.read_text(encoding="utf-8"))
    here = (endpoint.package_folder() / "chat" / WEIGHTS_FILE).stat().st_size
    if here != sizes["bytes"]:
        raise BenchmarkError(
            f"the chat model has {here} bytes, but {QUANTIZE_METRICS.name} says {sizes['bytes']}: run `bessemer run`."
        )
    return Row("size of the chat model", here, "bytes", sizes["fp32_bytes"], "FP32", target="ratio <= 0.28")


def measure_decoding(side: str, count: int) -> Figures:
    """Measure the decoding of one side with `count` threads."""
    chat_folder = endpoint.package_folder() / "chat"
    limits: dict[str, int] = json.loads((chat_folder / "limits.json").read_text(encoding="utf-8"))
    request: dict[str, Any] = {
        "side": side,
        "int8": str(chat_folder),
        "fp32": str(FP32_FOLDER / "model"),
        "threads": count,
        "prompt": prompt(chat_folder),
        "tokens": min(NEW_TOKENS, limits["context"] - PROMPT_TOKENS),
        "longest": limits["max_new_tokens"],
        "questions": QUESTIONS,
    }
    return harness.run_module("benchmarks.decoding_run", request)


def measure_previous(count: int) -> Figures:
    """Measure the previous engine with `count` threads; answers are not measured."""
    chat_folder = endpoint.package_folder() / "chat"
    export_folder = harness.ROOT / "data" / ".cache" / "peers" / "previous-engine-export"
    found = previous_engine.measure_decoding(
        FP32_FOLDER / "model", export_folder, prompt(chat_folder), NEW_TOKENS, count
    )
    return {**found, "answers_per_second": float("nan")}


def prompt(chat_folder: Path) -> list[int]:
    """Return a prompt of PROMPT_TOKENS tokens from the questions."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(chat_folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(" ".join(QUESTIONS), add_special_tokens=False).ids
    return ids[:PROMPT_TOKENS]


def decoding_rows(decoded: dict[int, dict[str, list[Figures]]], served_on: int) -> list[Row]:
    """Return INT8 beside FP32 by number of threads; the target compares INT8 as served with torch at its best."""
    middle = {
        (side, count, figure): harness.median(rounds, figure)
        for count, sides in decoded.items()
        for side, rounds in sides.items()
        for figure in ("tokens_per_second", "answers_per_second")
    }
    best = max(middle["torch", count, "tokens_per_second"] for count in decoded)
    served = middle["int8", served_on, "tokens_per_second"]
    before = max(middle["previous", count, "tokens_per_second"] for count in decoded)
    found = [
        Row("decoding as served", served, "tokens/s", best, f"{TORCH_NAME} at its best", "ratio >= 4"),
        Row("one request as served", served, "tokens/s", before, previous_engine.PEER, "ratio >= 0.8"),
    ]
    for count in decoded:
        for figure, what, unit in (
            ("tokens_per_second", f"decoding, {NEW_TOKENS} tokens", "tokens/s"),
            ("answers_per_second", "answers, one after the other", "1/s"),
        ):
            mine, other = (middle[side, count, figure] for side in ("int8", "torch"))
            found.append(Row(f"{what}, {count} thread(s)", mine, unit, other, TORCH_NAME))
    return found
