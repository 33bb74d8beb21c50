"""Load the files of a package: JSON, tokenizers and models. Errors name the file and the remedy."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.errors import InputError, PackageError

if TYPE_CHECKING:
    from openvino import CompiledModel
    from openvino_genai import ContinuousBatchingPipeline
    from tokenizers import Tokenizer

REMEDY = "Run `bessemer run` to make the package again."
GRAPH_FILE, WEIGHTS_FILE = "openvino_model.xml", "openvino_model.bin"
# Written by `tasks.quantize`: inference settings, the tokens around a text and in a template, the chat template.
ENGINE_FILE, SPECIAL_TOKENS_FILE, TEMPLATE_FILE = "engine.json", "special_tokens.json", "chat_template.jinja"
LABELS_FILE = "labels.json"  # of a classifier: its labels in the order of the outputs, or null for a number
MAX_BATCH_REQUESTS = 16  # in one batch; further requests wait
# Activations and KV cache in float32 on every CPU. Otherwise an answer would depend on the other rows of its batch.
FLOAT32_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}


def available_cores() -> int:
    """Return the number of cores that this process may use; containers and job schedulers often restrict it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def useful_threads(model: Path) -> int:
    """Return the number of threads for a model file: one per 16 MB of weights, up to the available cores.

    Smaller models lose more to synchronization than they gain: at 2 MB, two threads are a quarter faster than one on an
    idle machine and run at a third of its speed on a busy one (benchmarks/LOG.md).
    """
    return min(available_cores(), max(1, require_file(model).stat().st_size // 2**24))


def require_file(path: Path) -> Path:
    """Return the path of a file; raise PackageError if it does not exist."""
    if not path.is_file():
        raise PackageError(f"The package is incomplete: {path} is missing. {REMEDY}")
    return path


def read_json(path: Path) -> Any:
    """Read a JSON file of a package; raise PackageError if it is missing or invalid."""
    try:
        return json.loads(require_file(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackageError(f"{path} is not valid JSON ({error}). {REMEDY}") from None


def read_key(path: Path, key: str) -> Any:
    """Return one entry of a JSON file that contains an object; raise PackageError if there is none."""
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise PackageError(f'{path} has no entry "{key}". {REMEDY}')
    return content[key]


def load_tokenizer(folder: Path) -> "Tokenizer":
    """Load a folder's tokenizer.json."""
    from tokenizers import Tokenizer

    path = require_file(folder / "tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises plain Exception
        raise PackageError(f"{path} cannot be loaded ({error}). {REMEDY}") from None


def check_reserved_tokens(tokenizer: "Tokenizer", text: str, allowed: str | None = None) -> None:
    """Raise InputError if a text contains a control token, which could open or close a chat turn."""
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.special and token.content in text and token.content != allowed:
            raise InputError(f"The text contains {token.content}, which is reserved for the model itself. Remove it.")


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports the import to Google Analytics."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # its import fails, and OpenVINO uses a stub
    return importlib.import_module("openvino")


def load_model(folder: Path, threads: int | None) -> "CompiledModel":
    """Compile an exported model for the CPU, by default on `useful_threads` threads."""
    path, options = require_file(folder / GRAPH_FILE), openvino_options(folder, threads)
    try:
        model: CompiledModel = import_openvino().compile_model(str(path), "CPU", options)
    except RuntimeError as error:
        raise _load_error(folder, error) from None
    return model


def load_pipeline(folder: Path, threads: int | None, cache_blocks: int | None) -> "ContinuousBatchingPipeline":
    """Load a decoder on the CPU, by default on `useful_threads` threads.

    The KV cache has `cache_blocks` blocks, by default the number in the export's engine.json.
    """
    options = openvino_options(folder, threads)
    import_openvino()
    from openvino_genai import ContinuousBatchingPipeline, SchedulerConfig

    config = SchedulerConfig()
    config.max_num_seqs, config.cache_size = MAX_BATCH_REQUESTS, 0
    config.num_kv_blocks = cache_blocks or read_key(folder / ENGINE_FILE, "cache_blocks")
    config.enable_prefix_caching = False  # otherwise an answer would depend on earlier requests
    try:
        return ContinuousBatchingPipeline(str(folder), config, "CPU", options)
    except RuntimeError as error:
        raise _load_error(folder, error) from None


def openvino_options(folder: Path, threads: int | None) -> dict[str, Any]:
    """Return OpenVINO's properties: the number of threads and, if the export asks for it, float32 throughout."""
    options = {
        "INFERENCE_NUM_THREADS": threads or useful_threads(require_file(folder / WEIGHTS_FILE)),
        "ENABLE_CPU_PINNING": False,
    }
    return options | (FLOAT32_OPTIONS if read_key(folder / ENGINE_FILE, "exact") else {})


def _load_error(folder: Path, error: RuntimeError) -> PackageError:
    return PackageError(f"The model in {folder} cannot be loaded ({error}). {REMEDY}")
