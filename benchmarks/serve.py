"""The endpoint: first answer after the start, requests a second, and the INT8 engine against torch FP32.

Run as `make bench-serve` or `python -m benchmarks serve`. It needs the package and the FP32 model that it was made of,
which `bessemer run` leaves. The endpoint's peer is `transformers serve` on that FP32 model, asked on the same route.
Each side of the decoding is a process of its own (`benchmarks/decoding_run.py`), on one thread and on all of them.
"""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import endpoint, harness
from benchmarks.harness import BenchmarkError, Figures, Measured, Row

FP32 = harness.ROOT / "data" / "prune"
QUANTIZED = harness.ROOT / "metrics" / "quantize@policy.json"
TORCH = "torch FP32 generate"
PEER = "transformers serve, FP32"
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
    """Raise BenchmarkError where the package, or the FP32 model that it was made of, is missing."""
    remedy = "run `bessemer run` first."
    harness.needed(FP32 / "model", FP32 / "record.json", QUANTIZED, remedy=remedy)
    provenance = json.loads((endpoint.package_folder() / "provenance.json").read_text(encoding="utf-8"))
    parent = next((record["content"] for record in provenance["stages"] if record["stage"] == "prune"), None)
    if parent != json.loads((FP32 / "record.json").read_text(encoding="utf-8"))["content"]:
        raise BenchmarkError("the package was not made of the model in data/prune: run `bessemer run` first.")
    if find_spec("openai") is None:
        raise BenchmarkError("`transformers serve` needs the package openai: `make bench-serve` installs it.")


def threads() -> int:
    """Return the most threads that a side is measured on: one for every core that this process may use."""
    from serving.folders import available_cores

    return available_cores()


def measure(*, trial: bool) -> Measured:
    """Measure start, load and decoding."""
    from serving.folders import useful_threads

    rounds = 1 if trial else 5
    starts, loads = serving(rounds, requests=32 if trial else 200)
    measured = Measured([*start_rows(starts), *load_rows(loads), size_row()])
    measured.notes += [harness.spread(starts, "seconds"), harness.spread(loads, "requests_per_second")]
    decoded: dict[int, dict[str, list[Figures]]] = {}
    for count in sorted({1, threads()}):
        sides = {side: partial(decoding, side, count) for side in ("int8", "torch")}
        decoded[count] = harness.alternate(sides, rounds)
        measured.notes.append(f"{count} thread(s): {harness.spread(decoded[count], 'tokens_per_second')}")
    measured.rows += decoding_rows(decoded, useful_threads(endpoint.package_folder() / "policy" / "model.onnx"))
    return measured


def serving(rounds: int, requests: int) -> tuple[dict[str, list[Figures]], dict[str, list[Figures]]]:
    """Start each server again and again, and ask it each time: one client, then 16 at once."""
    servers = {
        "bessemer serve": (endpoint.BESSEMER, (endpoint.CHAT, endpoint.GENERATE)),
        "python -m serving.serve": (endpoint.MODULE, ()),
        PEER: ((*endpoint.TRANSFORMERS, "--force-model", str(FP32 / "model")), (endpoint.CHAT,)),
    }
    starts: dict[str, list[Figures]] = {name: [] for name in servers}
    loads: dict[str, list[Figures]] = {}
    for number in range(rounds):
        for name, (command, routes) in servers.items():
            first = endpoint.CHAT if name == PEER else endpoint.GENERATE
            with endpoint.started(command, QUESTIONS[0], first) as (port, seconds):
                starts[name].append({"seconds": seconds})
                print(f"    round {number + 1} of {rounds}, {name}: first answer after {seconds:.2f} s", flush=True)
                for route in routes:
                    endpoint.load(port, route, QUESTIONS, 1, len(QUESTIONS))
                    for clients in (1, 16):
                        found = endpoint.load(port, route, QUESTIONS, clients, requests)
                        loads.setdefault(f"{name}, {route}, {clients} at once", []).append(found)
    return starts, loads


def start_rows(starts: dict[str, list[Figures]]) -> list[Row]:
    """Return the seconds to the first answer; the target is about `make serve`, which is `bessemer serve`."""
    seconds = {name: harness.median(found, "seconds") for name, found in starts.items()}
    return [
        Row("first answer after `bessemer serve`", seconds["bessemer serve"], "s", seconds[PEER], PEER, "<= 5"),
        Row("first answer after `python -m serving.serve`", seconds["python -m serving.serve"], "s"),
    ]


def load_rows(loads: dict[str, list[Figures]]) -> list[Row]:
    """Return rates and waits of one client and of 16, on OpenAI's route (streamed, as the peer does) and on our own."""
    units = {
        "requests_per_second": ("requests", "1/s"),
        "median_ms": ("median wait", "ms"),
        "p95_ms": ("95 % wait", "ms"),
    }
    found: list[Row] = []
    for route in (endpoint.CHAT, endpoint.GENERATE):
        for clients in (1, 16):
            mine, other = (loads.get(f"{name}, {route}, {clients} at once") for name in ("bessemer serve", PEER))
            for figure, (what, unit) in units.items():
                peer = harness.median(other, figure) if other else None
                name = f"{route}, {clients} at once: {what}"
                found.append(Row(name, harness.median(mine or [], figure), unit, peer, PEER if other else None))
    return found


def size_row() -> Row:
    """Return the size of the INT8 file against the FP32 file that it was made of."""
    sizes = json.loads(QUANTIZED.read_text(encoding="utf-8"))
    here = (endpoint.package_folder() / "policy" / "model.onnx").stat().st_size
    if here != sizes["bytes"]:
        raise BenchmarkError(
            f"the packaged policy has {here} bytes, {QUANTIZED.name} says {sizes['bytes']}: run `bessemer run`."
        )
    return Row("size of the policy", here, "bytes", sizes["fp32_bytes"], "FP32 ONNX", target="ratio <= 0.28")


def decoding(side: str, count: int) -> Figures:
    """Measure one side on a number of threads."""
    policy = endpoint.package_folder() / "policy"
    limits: dict[str, int] = json.loads((policy / "limits.json").read_text(encoding="utf-8"))
    request: dict[str, Any] = {
        "side": side,
        "int8": str(policy),
        "fp32": str(FP32 / "model"),
        "threads": count,
        "prompt": prompt(policy),
        "tokens": min(NEW_TOKENS, limits["context"] - PROMPT_TOKENS),
        "longest": limits["max_new_tokens"],
        "questions": QUESTIONS,
    }
    return harness.in_process("benchmarks.decoding_run", request)


def prompt(policy: Path) -> list[int]:
    """Return a prompt of fixed length: the questions' own tokens, cut off."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(policy / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(" ".join(QUESTIONS), add_special_tokens=False).ids
    return ids[:PROMPT_TOKENS]


def decoding_rows(decoded: dict[int, dict[str, list[Figures]]], served_on: int) -> list[Row]:
    """Return INT8 against FP32 on equal threads; the target is about INT8 as served and torch at its best."""
    middle = {
        (side, count, figure): harness.median(rounds, figure)
        for count, sides in decoded.items()
        for side, rounds in sides.items()
        for figure in ("tokens_per_second", "answers_per_second")
    }
    best = max(middle["torch", count, "tokens_per_second"] for count in decoded)
    served = middle["int8", served_on, "tokens_per_second"]
    found = [Row("decoding as served", served, "tokens/s", best, f"{TORCH} at its best", "ratio >= 4")]
    for count in decoded:
        for figure, what, unit in (
            ("tokens_per_second", f"decoding, {NEW_TOKENS} tokens", "tokens/s"),
            ("answers_per_second", "answers, one after the other", "1/s"),
        ):
            mine, other = (middle[side, count, figure] for side in ("int8", "torch"))
            found.append(Row(f"{what}, {count} thread(s)", mine, unit, other, TORCH))
    return found
