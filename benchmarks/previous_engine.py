"""The peer onnxruntime-genai, the inference engine before OpenVINO GenAI, in a separate environment.

Its packages take 1.5 GB and are installed once, under `data/.cache/peers`.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Figures

PEER = "onnxruntime-genai 0.18, dynamic INT8"
PINS = (
    "torch==2.13.0", "transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0", "onnx==1.23.2",
    "onnxruntime==1.32.0", "onnxruntime-genai==0.18.0", "numpy<3",
)  # fmt: skip
ENVIRONMENT = harness.ROOT / "data" / ".cache" / "peers" / "onnxruntime-genai"


def install() -> None:
    """Create the environment if it does not exist; raise BenchmarkError if that fails."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "installed"
    if done.exists():
        return
    for command in (
        [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [str(python), "-m", "pip", "install", "-qq", *PINS],
    ):
        completed = subprocess.run(command, capture_output=True, text=True, check=False)
        if completed.returncode:
            raise BenchmarkError(f"the peer {PEER} could not be installed:\n{completed.stderr[-2000:]}")
    done.touch()


def measure_decoding(fp32: Path, folder: Path, prompt: Sequence[int], tokens: int, threads: int) -> Figures:
    """Return the tokens/s of one request; the FP32 model is exported to `folder` first if necessary."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bessemer-bench-") as scratch:
        request_file, result = Path(scratch, "request.json"), Path(scratch, "result.json")
        request = {
            "fp32": str(fp32), "folder": str(folder), "prompt": list(prompt), "tokens": tokens, "threads": threads,
            "result": str(result),
        }  # fmt: skip
        request_file.write_text(json.dumps(request), encoding="utf-8")
        script = Path(__file__).with_name("previous_engine_run.py")
        done = subprocess.run(
            [str(ENVIRONMENT / "bin" / "python"), str(script), str(request_file)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise BenchmarkError(f"the peer {PEER} failed:\n{done.stderr[-3000:]}")
        figures: Figures = json.loads(result.read_text(encoding="utf-8"))
        return figures
