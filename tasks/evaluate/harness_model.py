"""Models under test as lm-evaluation-harness takes them.

The harness accepts an opened Transformers model. An export of `quantize` is given to it as an object with what it uses
of one: `config`, `device`, a call that returns logits, and `generate`.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tasks.evaluate.models_under_test import EngineDecoder, TorchDecoder

if TYPE_CHECKING:
    import torch

    from tasks.evaluate.subject import Subject


def open_model(subject: "Subject", batch: int) -> Any:
    """Return the harness's model for a subject; an export runs one request at a time."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    decoder = subject.decoder
    if isinstance(decoder, TorchDecoder):
        tokenizer = AutoTokenizer.from_pretrained(subject.path)  # as the harness's command loads it
        return HFLM(pretrained=decoder.model, tokenizer=tokenizer, batch_size=batch)
    assert isinstance(decoder, EngineDecoder)
    return HFLM(pretrained=ExportedModel(decoder), tokenizer=decoder.tokenizer, batch_size=1)


class ExportedModel:
    """An export of `quantize` with the interface of a Transformers model that the harness uses."""

    def __init__(self, decoder: EngineDecoder) -> None:
        import torch
        from transformers import AutoConfig

        from serving.engine import DecoderLogits

        self.decoder = decoder
        self.config = AutoConfig.from_pretrained(Path(decoder.path))
        self.device = torch.device("cpu")
        self.name_or_path = decoder.path.name
        self._logits = DecoderLogits(decoder.path, decoder.threads)

    def __call__(self, input_ids: "torch.Tensor") -> Any:
        """Return an object whose `logits` are (N, T, V) for ids (N, T)."""
        import torch

        return SimpleNamespace(logits=torch.from_numpy(self._logits(input_ids.numpy())))

    def generate(self, input_ids: "torch.Tensor", max_length: int, **settings: Any) -> "torch.Tensor":
        """Return prompt and new tokens of one row (1, T); stop texts are cut off by the harness afterwards."""
        import torch

        from serving.decoding import Sampling
        from serving.engine import PreparedPrompt

        prompt = input_ids[0].tolist()
        room = max_length - len(prompt)
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0
        sampling = Sampling(room, temperature, float(settings.get("top_p", 1.0)), seed=0)
        [request] = self.decoder.engine.submit_all([PreparedPrompt(prompt, sampling, room)])
        return torch.tensor([[*prompt, *request.take(whole=True)]])
