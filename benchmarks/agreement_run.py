"""Measure the agreement of next-token predictions between the served INT8 model and its FP32 parent.

`benchmarks/serve.py` runs it as `python -m benchmarks.agreement_run FILE`, with texts as rows of token ids.
"""

from pathlib import Path

import numpy as np

from benchmarks import harness
from serving.engine import DecoderLogits
from tasks.common.harness.records import write_json


def main() -> None:
    """Measure the share of positions with the same top-1 token, and the mean KL divergence from FP32 in nats."""
    import torch
    from transformers import AutoModelForCausalLM

    request = harness.read_request()
    rows = np.array(request["rows"], np.int64)
    served = DecoderLogits(Path(request["int8"]), request["threads"])
    model = AutoModelForCausalLM.from_pretrained(request["fp32"], dtype=torch.float32).eval()
    same_top_token, divergence = [], []
    with torch.no_grad():
        for row in rows[:, None]:  # (1, T) each
            ids = torch.from_numpy(row)
            ours, theirs = (
                torch.log_softmax(logits, -1) for logits in (torch.from_numpy(served(row)), model(input_ids=ids).logits)
            )
            same_top_token.append((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
            divergence.append((theirs.exp() * (theirs - ours)).sum(-1).double().mean())
    figures = {
        "same_top_token": float(np.mean(same_top_token)),
        "kl_nats": float(np.mean(divergence)),
        "tokens": rows.size,
    }
    write_json(Path(request["result"]), figures)


if __name__ == "__main__":
    main()
