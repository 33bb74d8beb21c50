"""Read the folders of a package: JSON, tokenizers and models, each failure told as a sentence that names the file."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import InputError, PackageError

if TYPE_CHECKING:
    import onnxruntime
    import onnxruntime_genai
    from tokenizers import Tokenizer

REMEDY = "Run `bessemer run` to make the package again."
# Without VNNI, x86 adds products of 8-bit numbers up in 16 bits, which overflow: so asked, ONNX Runtime takes unsigned
# weights there, which do not, at the same speed. Elsewhere it changes nothing.
EXACT = {"session.x64quantprecision": "1"}


def available_cores() -> int:
    """Return how many cores this process may use: containers and job schedulers often give fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def useful_threads(model: Path) -> int:
    """Return how many threads suit a model's file: one for each 16 MB of weights, up to the cores there are.

    Below that a thread waits for the others about as long as it computes: at 2 MB two threads answer a quarter faster
    than one on a quiet machine, and at a third of its speed on a busy one (benchmarks/LOG.md).
    """
    return min(available_cores(), max(1, required(model).stat().st_size // 2**24))


def required(path: Path) -> Path:
    """Return the path of a file, or say that the package lacks it."""
    if not path.is_file():
        raise PackageError(f"The package is incomplete: {path} is missing. {REMEDY}")
    return path


def read_json(path: Path) -> Any:
    """Read one of a package's JSON files."""
    try:
        return json.loads(required(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackageError(f"{path} is not valid JSON ({error}). {REMEDY}") from None


def read_key(path: Path, key: str) -> Any:
    """Read one entry of a JSON file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise PackageError(f'{path} has no entry "{key}". {REMEDY}')
    return content[key]


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load a folder's tokenizer.json."""
    from tokenizers import Tokenizer

    path = required(folder / "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # nothing narrower is raised
        raise PackageError(f"{path} cannot be loaded ({error}). {REMEDY}") from None


def refuse_reserved(tokenizer: "Tokenizer", text: str, allowed: str | None = None) -> None:
    """Refuse text that spells a control token: it would open a turn of its own, or close the one it stands in."""
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.special and token.content in text and token.content != allowed:
            raise InputError(
                f"The text contains {token.content}, which is reserved for the model itself. Leave it out."
            )


def load_onnx(path: Path, threads: int | None) -> "onnxruntime.InferenceSession":
    """Load an ONNX model on the CPU, by default on as many threads as suit its size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or useful_threads(path)
    for name, value in EXACT.items():
        options.add_session_config_entry(name, value)
    try:
        return onnxruntime.InferenceSession(str(required(path)), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each kind of failure, and no common one above them
        raise PackageError(f"{path} cannot be loaded ({error}). {REMEDY}") from None


def load_genai(folder: Path, threads: int | None) -> "onnxruntime_genai.Model":
    """Load a folder in onnxruntime-genai's format, by default on as many threads as suit the model's size."""
    import onnxruntime_genai

    required(folder / "genai_config.json")
    options = {"intra_op_num_threads": threads or useful_threads(folder / "model.onnx"), **EXACT}
    try:
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        return onnxruntime_genai.Model(config)
    except RuntimeError as error:
        raise PackageError(f"The model in {folder} cannot be loaded ({error}). {REMEDY}") from None
