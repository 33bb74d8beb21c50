"""Export to ONNX and quantize to INT8 with Optimum: the policy for onnxruntime-genai, the encoder for ONNX Runtime.

Run as `python -m tasks.quantize policy` or `python -m tasks.quantize encoder`. Every use of Optimum is in this module:
`optimum-onnx` holds Transformers back and has had no release since (docs/decisions.md), so it can be replaced here.
Dynamic INT8: weights are 8-bit, one scale a column; activations are scaled as they come.
"""

import shutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from serving.folders import load_genai
from tasks.common import stage
from tasks.common.modelling import models
from tasks.common.settings import Dtypes, Numerics, Settings
from tasks.common.stage import Job
from tasks.common.text import chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INPUTS: dict[str, str] = {}
KEY_INPUTS = {"policy": {"model": "data/prune/model"}, "encoder": {"model": "data/pretrain/mlm/model"}}
OUTPUTS = {"model": "data/quantize/{key}/model"}


class Config(Settings):
    """Settings of quantization."""

    instructions: Literal["avx512_vnni", "avx2", "arm64"] = Field(
        description="Processor instructions that the scheme suits"
    )
    per_channel: bool = Field(description="One scale a column of a matrix instead of one a matrix")


class PolicyConfig(Config):
    """Settings of the served decoder."""

    max_new_tokens: int = Field(description="Most tokens that a request to the endpoint may ask for", ge=1)
    timed_tokens: int = Field(description="Tokens decoded to measure INT8's speed against torch's in FP32", ge=8)


KEYS = {"policy": PolicyConfig, "encoder": Config}


def run(config: Config, job: Job) -> dict[str, Any]:
    """Write the INT8 folder of the job's model and return its size against FP32's."""
    numerics = on_cpu(job.numerics)
    models.prepare_torch(numerics, job.seed)
    target = job.outputs["model"]
    model, fp32_bytes = write_folder(config, job.inputs["model"], target, numerics)
    if isinstance(config, PolicyConfig):
        job.measured(**speeds(model, target, config.timed_tokens, job.numerics.threads))
    size = (target / "model.onnx").stat().st_size
    return {"bytes": size, "fp32_bytes": fp32_bytes, "ratio": round(size / fp32_bytes, 4)}


def on_cpu(numerics: Numerics) -> Numerics:
    """Return the numerics of an export: INT8 runs on the CPU, whatever the chain computes on.

    So does torch beside it, with its faster attention.
    """
    plain = Dtypes(decoder="float32", encoder="float32")
    return numerics.model_copy(update={"device": "cpu", "attention": "sdpa", "dtype": plain})


def write_folder(config: Config, source: Path, target: Path, numerics: Numerics) -> tuple["PreTrainedModel", int]:
    """Write the folder that serves a Transformers model in INT8: a decoder's where `config` is a policy's.

    Returns the model in torch and the bytes of its export in FP32.
    """
    decoder = isinstance(config, PolicyConfig)
    target.mkdir()
    model = (models.load_decoder if decoder else models.load_encoder)(source, numerics)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fp32 = export(source, Path(scratch), decoder=decoder)
        quantize(fp32, target / "model.onnx", config)
        fp32_bytes = fp32.stat().st_size
    shutil.copy(source / "tokenizer.json", target)
    stage.write_json(target / "size.json", {"parameters": models.parameters(model)})
    if isinstance(config, PolicyConfig):
        tokenizer = chat.load_tokenizer(source)
        (target / "chat_template.jinja").write_text(str(tokenizer.chat_template), encoding="utf-8")
        context = tokenizer.model_max_length
        stage.write_json(target / "limits.json", {"context": context, "max_new_tokens": config.max_new_tokens})
        stage.write_json(target / "genai_config.json", engine_config(model, context))
    return model, fp32_bytes


def export(source: Path, scratch: Path, *, decoder: bool) -> Path:
    """Export a Transformers folder to ONNX in FP32 and return the file."""
    from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForMaskedLM

    kind = ORTModelForCausalLM if decoder else ORTModelForMaskedLM
    # Pages of the tracer's, and notes on what Optimum itself calls; what they warn of, the INT8 sheet would show.
    with warnings.catch_warnings(record=True), models.quiet("transformers", "optimum"):
        kind.from_pretrained(source, export=True).save_pretrained(scratch)
    return scratch / "model.onnx"


def quantize(fp32: Path, target: Path, config: Config) -> None:
    """Quantize an ONNX file's weights, and what is multiplied by them, to dynamic INT8."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    scheme = getattr(AutoQuantizationConfig, config.instructions)(
        is_static=False, per_channel=config.per_channel, nodes_to_exclude=weightless_products(fp32)
    )
    quantizer = ORTQuantizer.from_pretrained(fp32.parent, file_name=fp32.name)
    with models.quiet("transformers"):  # it reads a tokenizer that nobody uses here
        quantizer.quantize(save_dir=fp32.parent / "int8", quantization_config=scheme)
    shutil.move(fp32.parent / "int8" / "model_quantized.onnx", target)


def weightless_products(path: Path) -> list[str]:
    """Return the names of an ONNX file's products of two activations.

    Those are attention's, and the rotary angles', of which 8 bits would leave a position of 500 known to two.
    """
    import onnx

    graph = onnx.load(path).graph
    fixed = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in the order of computation
        if node.op_type in ("Constant", "Transpose") and fixed.issuperset(node.input):
            fixed.update(node.output)
    return [node.name for node in graph.node if node.op_type == "MatMul" and fixed.isdisjoint(node.input)]


def engine_config(model: "PreTrainedModel", context: int) -> dict[str, Any]:
    """Return the `genai_config.json` by which onnxruntime-genai runs Optimum's export, inputs and outputs named."""
    config = model.config
    return {
        "model": {
            "type": "llama",
            "vocab_size": config.vocab_size,
            "context_length": context,
            "bos_token_id": config.bos_token_id,
            "eos_token_id": config.eos_token_id,
            "pad_token_id": config.pad_token_id,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": "model.onnx",
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": context, "past_present_share_buffer": False, "do_sample": False},
    }


def speeds(model: "PreTrainedModel", path: Path, tokens: int, threads: int) -> dict[str, float]:
    """Return decode tokens/s of torch in FP32 and of the INT8 engine, both on `threads`, in turn, best of three."""
    import onnxruntime_genai as og
    import torch

    prompt = np.random.default_rng(0).integers(len(chat.SPECIAL_TOKENS), model.config.vocab_size, size=(1, 16))
    ids = torch.from_numpy(prompt)
    length = prompt.shape[1] + tokens
    engine = load_genai(path, threads)
    parameters = og.GeneratorParams(engine)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)

    generate: Any = model.generate

    def in_torch() -> None:
        with torch.no_grad():
            generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
                do_sample=False, pad_token_id=model.config.pad_token_id,
            )  # fmt: skip

    def in_int8() -> None:
        generator = og.Generator(engine, parameters)
        generator.append_tokens(prompt.astype(np.int32))
        while not generator.is_done():
            generator.generate_next_token()

    best = {"torch_fp32": 0.0, "int8": 0.0}
    for _ in range(3):
        for name, call in (("torch_fp32", in_torch), ("int8", in_int8)):
            start = time.perf_counter()
            call()
            best[name] = max(best[name], tokens / (time.perf_counter() - start))
    figures = {f"{name}_tokens_per_second": round(value, 1) for name, value in best.items()}
    return {**figures, "int8_speedup": round(best["int8"] / best["torch_fp32"], 2)}


if __name__ == "__main__":
    stage.main("tasks.quantize")
