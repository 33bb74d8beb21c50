"""Fine-tuning on real patients' questions: held-out loss, overlap of answers, and whether they name their source.

Run as `BESSEMER_BENCH_DATA=FOLDER python -m benchmarks medquad`. The folder contains `medquad/qa.jsonl` (MedQuAD, Ben
Abacha & Demner-Fushman 2019, https://github.com/abachaa/MedQuAD, as JSON lines of `instruction`, `response`, `url`) and
`wikitext2/train.txt` (WikiText-2 raw). On a CPU the stages pretrain a small decoder on WikiText-2; on a GPU the base
model is SmolLM2 from `smollm2/` in that folder, a Transformers directory. The training answers are the opening of each
answer and its source site. The evaluation uses held-out questions.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import data, machine
from benchmarks.harness import BenchmarkError, Figures, Measurements, Row
from tasks.common.defaults import read_settings

DATA_VARIABLE = "BESSEMER_BENCH_DATA"
QUESTIONS_FILE, TEXT_FILE, MODEL_FOLDER = "medquad/qa.jsonl", "wikitext2/train.txt", "smollm2"
MAX_ANSWER_CHARACTERS = 400  # answers are cut after a sentence
HELDOUT_QUESTIONS = 300  # held-out questions
STAGES = ("ingest", "validate", "tokenize", "pretrain causal", "finetune chat")
BASE_NAME = "before fine-tuning"


def check() -> None:
    """Raise BenchmarkError if the data is missing."""
    folder()


def folder() -> Path:
    """Return the data folder; raise BenchmarkError if it is missing or incomplete."""
    if DATA_VARIABLE not in os.environ:
        raise BenchmarkError(f"set {DATA_VARIABLE} to a folder that contains {QUESTIONS_FILE} and {TEXT_FILE}.")
    found = Path(os.environ[DATA_VARIABLE])
    absent = [name for name in (QUESTIONS_FILE, TEXT_FILE) if not (found / name).exists()]
    if absent:
        raise BenchmarkError(f"{found} ({DATA_VARIABLE}) lacks {', '.join(absent)}.")
    return found


def threads() -> int:
    """Return the number of threads of the stages."""
    return 2


def measure(*, trial: bool) -> Measurements:
    """Run the chain up to `finetune` in a scratch project, and evaluate both models."""
    source = folder()
    with data.project() as workdir:
        num_rows = convert(source / QUESTIONS_FILE, workdir / "data/sources/medquad.jsonl")
        (workdir / "data/sources/wikitext.txt").write_text(paragraphs(source / TEXT_FILE), encoding="utf-8")
        params = settings(trial=trial)
        (workdir / "params.yaml").write_text(json.dumps(params), encoding="utf-8")  # JSON is YAML
        for stage in STAGES:
            took = data.step(workdir, *f"tasks.{stage}".split())
            print(f"    {stage}: {took['seconds']:.0f} s", flush=True)
        finetune_metrics = json.loads((workdir / "metrics/finetune@chat.json").read_text(encoding="utf-8"))
        request = {"numerics": params["numerics"], "asked": 20 if trial else HELDOUT_QUESTIONS}
        (workdir / "request.json").write_text(json.dumps(request), encoding="utf-8")
        data.step(workdir, "benchmarks.medquad_run", "request.json")
        found = json.loads((workdir / "asked.json").read_text(encoding="utf-8"))
    return Measurements(rows(finetune_metrics, found), notes(params, finetune_metrics, found, num_rows))


def convert(source: Path, target: Path) -> int:
    """Write the questions in Alpaca format, with an answer's opening and site as output; return their number."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = opening(row["response"])
        if answer:
            output = f"{answer} Source: {urlsplit(row['url']).netloc.removeprefix('www.')}"
            lines.append(json.dumps({"instruction": row["instruction"], "output": output}))
    target.write_text("\n".join(lines), encoding="utf-8")
    return len(lines)


def opening(answer: str) -> str | None:
    """Return the first sentences of an answer, or None if the first one is too long."""
    plain = " ".join(answer.split()).removeprefix("Key Points").removeprefix("Summary :").strip(" -")
    end = plain.rfind(". ", 0, MAX_ANSWER_CHARACTERS)
    return plain if len(plain) <= MAX_ANSWER_CHARACTERS else plain[: end + 1] if end > 0 else None


def paragraphs(source: Path) -> str:
    """Return WikiText without headings and tokenization marks, with blank lines between paragraphs."""
    lines = (line.strip() for line in source.read_text(encoding="utf-8").splitlines())
    texts = (line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".") for line in lines)
    return "\n\n".join(text for text in texts if text and not text.startswith("="))


def settings(*, trial: bool) -> dict[str, Any]:
    """Return the default profile's settings with these sources; on a GPU with SmolLM2 as the base model."""
    params: dict[str, Any] = read_settings(data.PROFILE)
    files, chats = {"kind": "files", "licence": "see its page"}, {"format": "alpaca", "table": "instructions"}
    params["ingest"]["sources"] = [
        {**files, "name": "wikitext", "group": "wiki", "path": "wikitext.txt", "format": "txt", "table": "corpus"},
        {**files, "name": "medquad", "group": None, "path": "medquad.jsonl", **chats},
    ]
    params["ingest"]["heldout"]["entities"] = 0.1
    params["validate"] |= {
        "min_rows": {"corpus": 1000, "instructions": 1000, "rankings": 0},
        "min_heldout_questions": 100,
    }
    params["numerics"] |= {"threads": 2, "compile": "never" if trial else "auto"}
    prose = {"prose": 1.0}
    params["pretrain"]["causal"] |= {"window": 128, "batch": 16, "steps": 10 if trial else 2400, "mixture": prose}
    params["finetune"]["chat"] |= {
        "pretraining_mix": {"weight": 0.1, "batch": 4, "window": 128, "mixture": prose},
        "too_long": "truncate", "heldout": HELDOUT_QUESTIONS,
        "steps": 10 if trial else 1200,
    }  # fmt: skip
    if machine.has_gpu():
        given = str((folder() / MODEL_FOLDER).resolve())
        params["tokenize"]["tokenizer"] = {"name": "from", "path": given}
        params["pretrain"]["causal"]["model"] = {"name": "from", "path": given}
        params["numerics"] |= {"device": "cuda", "attention": "sdpa"}
        for section in (params["pretrain"]["causal"], params["finetune"]["chat"]):
            section["optimizer"] |= {"learning_rate": 1e-4}
    return params


def rows(finetune_metrics: dict[str, Any], found: dict[str, Figures]) -> list[Row]:
    """Return the figures after fine-tuning beside those before."""
    before, after = found["base"], found["tuned"]
    return [
        Row(
            "held-out loss",
            finetune_metrics["heldout_loss_after"],
            "nats/token",
            finetune_metrics["heldout_loss_before"],
            BASE_NAME,
            "ratio <= 1",
        ),
        Row("overlap of words with the answer (F1)", after["overlap"], "share", before["overlap"], BASE_NAME),
        Row("replies that name a site", after["named"], "share", before["named"], BASE_NAME),
        Row("replies that name the right site", after["right"], "share", before["right"], BASE_NAME),
        Row("replies that come to an end", after["ended"], "share", before["ended"], BASE_NAME),
    ]


def notes(params: dict[str, Any], finetune_metrics: dict[str, Any], found: dict[str, Any], num_rows: int) -> list[str]:
    """Return notes on models and data, and one example answer before and after."""
    pretraining, tuning = params["pretrain"]["causal"], params["finetune"]["chat"]
    model = {name: value for name, value in pretraining["model"].items() if name != "path"}
    return [
        f"{num_rows} answers begin with whole sentences of {MAX_ANSWER_CHARACTERS} characters at most; "
        f"{finetune_metrics['conversations']} training conversations, "
        f"{finetune_metrics['heldout_conversations']} held out.",
        f"Model {model}; {pretraining['steps']} steps of {pretraining['batch']} x {pretraining['window']} tokens of "
        f"WikiText-2, then {tuning['steps']} of {tuning['batch']} conversations "
        f"({finetune_metrics['epochs']:.1f} epochs).",
        "Overlap is SQuAD's F1 over words (Rajpurkar et al. 2016, section 6); replies are greedy.",
        *found["example"],
    ]
