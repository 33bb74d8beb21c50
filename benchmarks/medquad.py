"""Fine-tuning on real questions of patients: held-out loss, overlap of answers, and whether they name their source.

Run as `BESSEMER_BENCH_DATA=FOLDER python -m benchmarks medquad`. The folder holds `medquad/qa.jsonl` (MedQuAD, Ben
Abacha & Demner-Fushman 2019, https://github.com/abachaa/MedQuAD, as JSON lines of `instruction`, `response`, `url`) and
`wikitext2/train.txt` (WikiText-2 raw). Without a GPU a small decoder of our own is pretrained on the latter by the
stages; on a GPU SmolLM2 is taken from `smollm2/` in that folder, a Transformers directory. Tuning is told the opening
of each answer and the site that it is from; asked are questions that it was not told.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import data, machine
from benchmarks.harness import BenchmarkError, Figures, Measured, Row
from tasks.common.settings import read_params

VARIABLE = "BESSEMER_BENCH_DATA"
QUESTIONS, TEXT, MODEL = "medquad/qa.jsonl", "wikitext2/train.txt", "smollm2"
OPENING = 400  # characters of an answer, cut after a sentence
ASKED = 300  # held-out questions
STAGES = ("ingest", "validate", "tokenize", "pretrain clm", "finetune")
BASE = "before fine-tuning"


def check() -> None:
    """Raise BenchmarkError where the data is not at hand."""
    folder()


def folder() -> Path:
    """Return where the data lies; raise BenchmarkError where it is not at hand."""
    if VARIABLE not in os.environ:
        raise BenchmarkError(f"set {VARIABLE} to a folder that holds {QUESTIONS} and {TEXT}.")
    found = Path(os.environ[VARIABLE])
    absent = [name for name in (QUESTIONS, TEXT) if not (found / name).exists()]
    if absent:
        raise BenchmarkError(f"{found} ({VARIABLE}) lacks {', '.join(absent)}.")
    return found


def threads() -> int:
    """Return the threads that the stages compute with here."""
    return 2


def measure(*, trial: bool) -> Measured:
    """Run the chain as far as `finetune` in a scratch project, and ask both models."""
    source = folder()
    with data.project() as place:
        kept = convert(source / QUESTIONS, place / "data/sources/medquad.jsonl")
        (place / "data/sources/wikitext.txt").write_text(paragraphs(source / TEXT), encoding="utf-8")
        params = settings(trial=trial)
        (place / "params.yaml").write_text(json.dumps(params), encoding="utf-8")  # JSON is YAML
        for stage in STAGES:
            took = data.step(place, *f"tasks.{stage}".split())
            print(f"    {stage}: {took['seconds']:.0f} s", flush=True)
        told = json.loads((place / "metrics/finetune.json").read_text(encoding="utf-8"))
        request = {"numerics": params["numerics"], "asked": 20 if trial else ASKED}
        (place / "request.json").write_text(json.dumps(request), encoding="utf-8")
        data.step(place, "benchmarks.medquad_run", "request.json")
        found = json.loads((place / "asked.json").read_text(encoding="utf-8"))
    return Measured(rows(told, found), notes(params, told, found, kept))


def convert(source: Path, target: Path) -> int:
    """Write the questions in alpaca's columns, each answer's opening and site as its output; return their number."""
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
    """Return the first sentences of an answer, None where the first one is too long or it is a list."""
    plain = " ".join(answer.split()).removeprefix("Key Points").removeprefix("Summary :").strip(" -")
    end = plain.rfind(". ", 0, OPENING)
    return plain if len(plain) <= OPENING else plain[: end + 1] if end > 0 else None


def paragraphs(source: Path) -> str:
    """Return the text without headings and a tokenizer's marks, with blank lines between its paragraphs."""
    lines = (line.strip() for line in source.read_text(encoding="utf-8").splitlines())
    texts = (line.replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".") for line in lines)
    return "\n\n".join(text for text in texts if text and not text.startswith("="))


def settings(*, trial: bool) -> dict[str, Any]:
    """Return the default profile's settings on these sources; on a GPU with SmolLM2 instead of a model of our own."""
    params: dict[str, Any] = read_params(data.PROFILE)
    files, chats = {"kind": "files", "licence": "see its page"}, {"format": "alpaca", "table": "instructions"}
    params["ingest"]["sources"] = [
        {**files, "name": "wikitext", "group": "wiki", "path": "wikitext.txt", "format": "txt", "table": "corpus"},
        {**files, "name": "medquad", "group": None, "path": "medquad.jsonl", **chats},
        # Nothing here reads rankings, but without any `validate` would stop the chain.
        {**files, "name": "ratings", "group": None, "path": "smoke/ratings.csv", "format": "csv", "table": "ratings"},
    ]
    params["ingest"]["heldout"]["entities"] = 0.1
    params["validate"]["refused_share"] = 0.5  # a quarter of the answers are near-duplicates: written to one pattern
    params["validate"] |= {"rows": {"corpus": 1000, "instructions": 1000, "rankings": 1}, "heldout_questions": 100}
    params["numerics"] |= {"threads": 2, "compile": "never" if trial else "auto"}
    prose = {"prose": 1.0}
    params["pretrain"]["clm"] |= {"window": 128, "batch": 16, "steps": 10 if trial else 2400, "mixture": prose}
    params["finetune"] |= {
        "mix": {"weight": 0.1, "batch": 4, "window": 128, "mixture": prose}, "too_long": "truncate", "heldout": ASKED,
        "steps": 10 if trial else 1200,
    }  # fmt: skip
    if machine.has_gpu():
        given = str((folder() / MODEL).resolve())
        params["tokenize"]["tokenizer"] = {"name": "from", "path": given}
        params["pretrain"]["clm"]["model"] = {"name": "from", "path": given}
        params["numerics"] |= {"device": "cuda", "attention": "sdpa"}
        for section in (params["pretrain"]["clm"], params["finetune"]):
            section["optimizer"] |= {"learning_rate": 1e-4}
    return params


def rows(told: dict[str, Any], found: dict[str, Figures]) -> list[Row]:
    """Return what is reached after tuning beside what was before."""
    before, after = found["base"], found["tuned"]
    return [
        Row("held-out loss", told["heldout_loss_after"], "nats/token", told["heldout_loss_before"], BASE, "ratio <= 1"),
        Row("overlap of words with the answer (F1)", after["overlap"], "share", before["overlap"], BASE),
        Row("replies that name a site", after["named"], "share", before["named"], BASE),
        Row("replies that name the right site", after["right"], "share", before["right"], BASE),
        Row("replies that come to an end", after["ended"], "share", before["ended"], BASE),
    ]


def notes(params: dict[str, Any], told: dict[str, Any], found: dict[str, Any], kept: int) -> list[str]:
    """Say what was trained on what, and show one answer before and after."""
    pretraining, tuning = params["pretrain"]["clm"], params["finetune"]
    model = {name: value for name, value in pretraining["model"].items() if name != "path"}
    return [
        f"{kept} answers begin with whole sentences of {OPENING} characters at most; "
        f"{told['conversations']} conversations trained on, {told['heldout_conversations']} held out.",
        f"Model {model}; {pretraining['steps']} steps of {pretraining['batch']} x {pretraining['window']} tokens of "
        f"WikiText-2, then {tuning['steps']} of {tuning['batch']} conversations ({told['epochs']:.1f} epochs).",
        "Overlap is SQuAD's F1 over words (Rajpurkar et al. 2016, section 6); replies are greedy.",
        *found["example"],
    ]
