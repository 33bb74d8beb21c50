"""The previous inference engine: Optimum's ONNX export in dynamic INT8, run by onnxruntime-genai.

`benchmarks/previous_engine.py` runs it as a script in a separate environment without this project, because its packages
require Transformers 4.57. It exports a Transformers folder and measures the decoding speed.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np


def export(source: str, target: Path) -> None:
    """Export a model to a folder for onnxruntime-genai."""
    from optimum.onnxruntime import ORTModelForCausalLM, ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    warnings.simplefilter("ignore")
    ORTModelForCausalLM.from_pretrained(source, export=True).save_pretrained(target / "fp32")
    scheme = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True)
    ORTQuantizer.from_pretrained(target / "fp32", file_name="model.onnx").quantize(scheme, target)
    (target / "model_quantized.onnx").rename(target / "model.onnx")
    config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    (target / "genai_config.json").write_text(json.dumps(engine_config(config)), encoding="utf-8")


def engine_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the `genai_config.json` for Optimum's input and output names."""
    heads = config["num_attention_heads"]
    pairs = {f"past_{kind}_names": f"past_key_values.%d.{kind}" for kind in ("key", "value")}
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads", heads),
        "num_hidden_layers": config["num_hidden_layers"],
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")} | pairs,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    marks = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = config["max_position_embeddings"]
    model = {"type": "llama", "vocab_size": config["vocab_size"], "context_length": length, **marks, "decoder": decoder}
    return {"model": model, "search": {"max_length": length, "past_present_share_buffer": False, "do_sample": False}}


def speed(folder: Path, prompt: list[int], tokens: int, threads: int) -> float:
    """Return the tokens/s of a continuation of fixed length, the median of three after one warm-up run."""
    import onnxruntime_genai

    options = {"intra_op_num_threads": threads, "session.x64quantprecision": "1"}
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    model = onnxruntime_genai.Model(config)
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = len(prompt) + tokens
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt], np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            generator.get_next_tokens()
        seconds.append(time.perf_counter() - began)
    return tokens / statistics.median(seconds[1:])


def main() -> None:
    """Export the model if necessary, and measure its decoding speed."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(request["folder"])
    if not (folder / "genai_config.json").exists():
        export(request["fp32"], folder)
    rate = speed(folder, request["prompt"], request["tokens"], request["threads"])
    Path(request["result"]).write_text(json.dumps({"tokens_per_second": rate}), encoding="utf-8")


if __name__ == "__main__":
    main()
