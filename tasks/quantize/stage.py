"""Export to OpenVINO with 8-bit weights through Optimum: a decoder for OpenVINO GenAI, an encoder or a classifier.

Run as `python -m tasks.quantize ENTRY`; the model's kind decides which. Weights are 8-bit and symmetric, with one scale
per output channel; activations are not quantized. The float32 export is compared with PyTorch before its weights are
rounded, and a decoder's export with the serving engine (`verification`). A folder that is exported already is copied
and gets the files that serving needs.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from serving import folders
from tasks.common import model_folder
from tasks.common.harness import records
from tasks.common.harness.job import Job, StageError
from tasks.common.modelling import head_models, labels, loading, models, torch_setup
from tasks.common.random_streams import Stream, generator
from tasks.common.settings import Dtypes, Numerics, Settings
from tasks.common.text import chat
from tasks.quantize import openvino_export, prompts, verification

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

INPUTS = {"model": "{config.model}"}
OUTPUTS = {"model": "data/quantize/{key}/model"}

CACHE_BLOCK_TOKENS = 32  # block size of OpenVINO GenAI's KV cache on a CPU
MAX_CACHE_BYTES = 2 * 2**30  # KV cache of all concurrent requests; further requests wait


class Config(Settings):
    """Settings of quantization."""

    model: str = Field(
        description="Folder of the model to export: an entry's, or your own; one that is in OpenVINO's format already "
        "is served as it is",
        min_length=1,
    )
    chat_template: chat.TemplateName = None
    weights: Literal["int8"] = Field(default="int8", description="Storage type of the weights")
    exact: bool = Field(
        default=True,
        description="Compute activations in float32, so that concurrent requests hardly ever change an answer; false "
        "uses the processor's fastest type, with which they often do",
    )
    max_new_tokens: int = Field(default=128, description="Largest max_new_tokens of a request, for a decoder", ge=1)


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the folder to serve; return the size of its weights and, of an export, its ratio to FP32 and difference."""
    numerics, source, target = cpu_numerics(job.numerics), job.inputs["model"], job.outputs["model"]
    torch_setup.prepare_torch(numerics, job.seed)
    if (source / folders.GRAPH_FILE).is_file():
        adopt_folder(config, source, target)
        return {"bytes": (target / folders.WEIGHTS_FILE).stat().st_size}
    model, difference = write_folder(config, source, target, numerics)
    if models.model_kind(source) == "causal":
        job.log_figures(**measure_decode_speed(model, target, job.timed_tokens, job.numerics.threads))
    size, fp32 = (target / folders.WEIGHTS_FILE).stat().st_size, 4 * models.parameter_count(model)
    return {"bytes": size, "fp32_bytes": fp32, "ratio": round(size / fp32, 4), "fp32_difference": difference}


def cpu_numerics(numerics: Numerics) -> Numerics:
    """Return the numerics of an export: CPU, float32 and SDPA attention, whatever device the pipeline uses.

    The INT8 model runs on the CPU, and so does the PyTorch model that it is compared with.
    """
    plain = Dtypes(decoder="float32", encoder="float32")
    return numerics.model_copy(update={"device": "cpu", "attention": "sdpa", "dtype": plain})


def write_folder(
    config: Config, source: Path, target: Path, numerics: Numerics
) -> "tuple[PreTrainedModel, float]":  # fmt: skip
    """Write the INT8 folder for serving a causal model, a masked model or a classifier of Transformers.

    Returns the model in PyTorch and the largest difference of the float32 export's logits from it
    (`verification.check_float32`). Raises StageError for another kind of model, or if the export computes other logits.
    """
    kind = _check_source(source)
    tokenizer = chat.load_tokenizer(source, config.chat_template)
    if kind != "masked":
        prompts.check_template(tokenizer, source)
    model = LOADERS[kind](source, numerics).eval()
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        plain, float32 = Path(scratch, "plain"), Path(scratch, "float32")
        models.save(model, tokenizer, plain)  # in the format of this release of Transformers
        openvino_export.export_float32(plain, float32, kind)
        difference = _compare(model, float32, tokenizer, kind)
        openvino_export.compress(float32, target, kind, config.weights)
        shutil.copy(plain / "tokenizer.json", target)
    records.write_json(target / "size.json", {"parameters": models.parameter_count(model)})
    _write_serving_files(config, tokenizer, model.config, target, kind)
    if kind == "causal" and config.exact:
        verification.check_engine(target, numerics.threads, int(tokenizer.model_max_length), len(tokenizer))
    return model, difference


def _load_head(source: Path, numerics: Numerics) -> "PreTrainedModel":
    return head_models.load_scorer(source, numerics, heads=None)


LOADERS = {"causal": models.load_decoder, "masked": models.load_encoder, "classifier": _load_head}


def _check_source(source: Path) -> str:
    """Return the kind of a folder's model, one of LOADERS; raise StageError if it cannot be exported."""
    kind = models.model_kind(source)
    config = model_folder.read_json(model_folder.base_of(source) / model_folder.CONFIG)
    if kind is None or (kind == "classifier" and not labels.is_text_classifier(config)):
        raise StageError(
            f"expected a causal model, a masked model or a classifier or regressor of texts in {source}, found "
            f"{(kind and 'another model with a head') or 'no model that Transformers knows'}; set another folder in "
            "quantize."
        )
    for problem in model_folder.export_problems(config):
        raise StageError(f"{source} cannot be exported: {problem}.")
    return kind


def _compare(model: "PreTrainedModel", folder: Path, tokenizer: "PreTrainedTokenizerFast", kind: str) -> float:
    """Return the largest difference of a float32 export's logits from PyTorch's."""
    import numpy as np

    from serving.engine import DecoderLogits, EncoderLogits

    records.write_json(folder / folders.ENGINE_FILE, {"exact": True})
    context = int(tokenizer.model_max_length)
    if kind == "causal":
        return verification.check_float32(model, DecoderLogits(folder, 1), context, len(tokenizer))
    encoder = EncoderLogits(folder, 1)
    texts = verification.CLASSIFIER_TEXTS if kind == "classifier" else 1
    return verification.check_float32(
        model, lambda ids: encoder(ids, np.ones_like(ids)), context, len(tokenizer), texts
    )


def adopt_folder(config: Config, source: Path, target: Path) -> None:
    """Copy a folder in OpenVINO's format, and add what serving needs beside the graph.

    Raises StageError if the folder has no tokenizer or no config, or if its kind is unknown.
    """
    kind = models.model_kind(source)
    model_config = model_folder.read_json(source / model_folder.CONFIG)
    if kind is None or (kind == "classifier" and not labels.is_text_classifier(model_config)):
        raise StageError(
            f"{source} has no config.json of a causal model, a masked model or a classifier beside its OpenVINO graph."
        )
    tokenizer = chat.load_tokenizer(source, config.chat_template)
    if kind != "masked":
        prompts.check_template(tokenizer, source)
    shutil.copytree(source, target, dirs_exist_ok=True)
    if (source / "limits.json").is_file():  # an export of this stage
        return
    if not (target / "tokenizer.json").is_file():
        tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
    if not (target / "size.json").is_file():
        records.write_json(target / "size.json", {"parameters": openvino_export.count_weights(target)})
    _write_serving_files(config, tokenizer, loading.read_config(source), target, kind)


def _write_serving_files(
    config: Config, tokenizer: "PreTrainedTokenizerFast", model_config: Any, target: Path, kind: str
) -> None:
    """Write what the serving engine reads beside the graph: prompts, limits, end tokens, settings."""
    context = int(tokenizer.model_max_length)
    prompts.write(tokenizer, target, conversations=kind != "masked")
    limits: dict[str, Any] = {"context": context}
    engine: dict[str, Any] = {"exact": config.exact}
    if kind == "classifier":
        records.write_json(target / folders.LABELS_FILE, labels.labels_of(model_config.to_dict()))
    if kind == "causal":
        if not (target / "openvino_tokenizer.xml").is_file():
            openvino_export.convert_tokenizer(tokenizer, target)
        _list_end_tokens(tokenizer, target / "generation_config.json")
        limits |= {"max_new_tokens": min(config.max_new_tokens, context)}
        engine |= {"cache_blocks": cache_blocks(model_config, context)}
    records.write_json(target / "limits.json", limits)
    records.write_json(target / folders.ENGINE_FILE, engine)


def _list_end_tokens(tokenizer: "PreTrainedTokenizerFast", path: Path) -> None:
    """Have a generation config list every token that ends a reply, the one that ends a turn too."""
    content = model_folder.read_json(path)
    ends = chat.end_ids(SimpleNamespace(config=SimpleNamespace(**content)), tokenizer)
    known = content.get("eos_token_id")
    if not set(ends) <= set(known if isinstance(known, list) else [known]):
        records.write_json(path, content | {"eos_token_id": list(ends)})


def cache_blocks(config: Any, context: int) -> int:
    """Return the number of KV cache blocks: a full context per concurrent request, limited by MAX_CACHE_BYTES."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    block_bytes = CACHE_BLOCK_TOKENS * config.num_hidden_layers * heads * width * 2 * 4  # bytes, in float32
    blocks_per_request: int = -(-context // CACHE_BLOCK_TOKENS) + 1
    return max(
        blocks_per_request, min(folders.MAX_BATCH_REQUESTS * blocks_per_request, int(MAX_CACHE_BYTES // block_bytes))
    )


def measure_decode_speed(model: "PreTrainedModel", path: Path, tokens: int, threads: int) -> dict[str, float]:
    """Return the decoding speed (tokens/s) of PyTorch in FP32 and of the INT8 engine on `threads`; best of three."""
    import torch

    from serving.engine import TextEngine

    context = json.loads((path / "limits.json").read_text(encoding="utf-8"))["context"]
    width = min(16, context - 1)
    prompt = generator(0, Stream.SPEED_PROMPT).integers(model.config.get_text_config().vocab_size, size=(1, width))
    ids = torch.from_numpy(prompt)
    tokens = min(tokens, context - prompt.shape[1])
    engine = TextEngine(path, threads)
    generate: Any = model.generate

    def run_torch() -> None:
        with torch.no_grad():
            generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

    best = {"torch_fp32": 0.0, "int8": 0.0}
    for _ in range(3):
        for name, call in (("torch_fp32", run_torch), ("int8", lambda: engine.decode(prompt[0].tolist(), tokens))):
            start = time.perf_counter()
            call()
            best[name] = max(best[name], tokens / (time.perf_counter() - start))
    figures = {f"{name}_tokens_per_second": round(value, 1) for name, value in best.items()}
    return {**figures, "int8_speedup": round(best["int8"] / best["torch_fp32"], 2)}
