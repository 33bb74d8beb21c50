"""The peer of `tokenize`: the same tokenizer and corpus in a standard `datasets` pipeline.

`benchmarks/data.py` runs it in its scratch project as `python -m benchmarks.datasets_tokenize VOCABULARY`. It maps over
batches in one process and writes Arrow files. Unlike `tokenize`, it does not verify the round trip or mark names.
"""

import sys
from pathlib import Path
from typing import Any

WINDOW = 64


def main() -> None:
    """Train, encode, pack and save."""
    from datasets import Dataset, disable_progress_bars, load_dataset
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    disable_progress_bars()

    def table(name: str) -> Dataset:
        files = str(Path("data/validate", name, "*.parquet"))
        return load_dataset("parquet", data_files=files, split="train", cache_dir=str(Path("data/peer").resolve()))

    corpus, instructions = table("corpus"), table("instructions")
    train_tables = [
        table.filter(lambda split: split == "train", input_columns="split") for table in (corpus, instructions)
    ]
    turns = [turn["content"] for messages in train_tables[1]["messages"] for turn in messages]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        [*train_tables[0]["text"], *turns],
        vocab_size=int(sys.argv[1]),
        special_tokens=["<|bos|>", "<|end|>"],
        show_progress=False,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<|bos|>", eos_token="<|end|>")

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer([f"<|bos|>{text}<|end|>" for text in batch["text"]])["input_ids"]
        return {"input_ids": ids}

    def pack(batch: dict[str, Any]) -> dict[str, Any]:
        stream = [token for ids in batch["input_ids"] for token in ids]
        last = len(stream) // WINDOW * WINDOW
        return {"input_ids": [stream[at : at + WINDOW] for at in range(0, last, WINDOW)]}

    encoded = corpus.map(encode, batched=True, remove_columns=corpus.column_names, load_from_cache_file=False)
    encoded.map(pack, batched=True, load_from_cache_file=False).save_to_disk("data/peer/packed")
    tokenizer.save_pretrained("data/peer/tokenizer")


if __name__ == "__main__":
    main()
