"""The engines: names against a naive reference, sampling, streams, stop texts, batches and incomplete packages."""

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import chat, folders, names
from serving.decoding import Answer, Limits, Sampling
from serving.engine import DecoderLogits, MaskEngine, TextEngine
from serving.errors import InputError, PackageError
from serving.package import open_package
from tests.serving_fixtures import CAPITALS, CONTEXT, MAX_NEW_TOKENS, TAG, answer, package, question

__all__ = ["package"]

VOCABULARY = 40
CODEC = names.Codec(lambda text: [5 + ord(letter) % 30 for letter in text], bos=1, eos=2, mask=3)


@pytest.fixture(scope="module")
def text(package: Path) -> TextEngine:
    return TextEngine(package / "chat")


@pytest.fixture(scope="module")
def masks(package: Path) -> MaskEngine:
    return MaskEngine(package / "encoder", CONTEXT)


def ask(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def fake_logits(ids: names.Ints, mask: names.Ints) -> names.Floats:
    """Logits that depend on every token of a row and on the position, as a real encoder's do."""
    assert (mask == 1).all()
    tokens = ids.shape[1]
    seeds = [int(row @ (np.arange(tokens) + 1)) for row in ids]
    return np.stack([np.random.default_rng(seed).normal(size=(tokens, VOCABULARY)) for seed in seeds])


def naive_score(before: str, name: str, after: str) -> float:
    """One name at a time: one row, one softmax, the sum of its tokens' log-probabilities."""
    tokens, start = CODEC.encode(name), 1 + len(CODEC.encode(before))
    row = [1, *CODEC.encode(before), *[3] * len(tokens), *CODEC.encode(after), 2]
    logits = fake_logits(np.array([row]), np.ones((1, len(row)), np.int64))[0]
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return float(sum(np.log(probabilities[start + at, token]) for at, token in enumerate(tokens)))


def test_log_scores_match_the_naive_loop() -> None:
    candidate_names = ["Chad", "Mali", "Peru", "New Zealand", "Saint Vincent and the Grenadines"]
    candidates = names.Candidates(candidate_names, CODEC)
    slots = [names.single_slot(text, CODEC) for text in ("It is [MASK].", "[MASK] is big.")]
    scores = names.log_scores(fake_logits, CODEC, candidates, slots)
    expected = [
        [naive_score("It is", f" {name}", ".") for name in candidate_names],
        [naive_score("", name, " is big.") for name in candidate_names],
    ]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    for batch in (1, 3):
        np.testing.assert_array_equal(names.log_scores(fake_logits, CODEC, candidates, slots, batch), scores)


def test_probabilities_are_over_the_candidates() -> None:
    candidates = names.Candidates(["Chad", "Peru"], CODEC)
    [ranked] = names.top_names(np.log(np.array([[0.01, 0.03]])), candidates, 5)
    assert [name for name, _ in ranked] == ["Peru", "Chad"]
    assert [score for _, score in ranked] == pytest.approx([0.75, 0.25])


def test_find_slots_several_masks_keep_others_one_token_wide() -> None:
    first, second = names.find_slots("The [MASK] and [MASK]!", CODEC)
    assert (first.spaced, second.spaced) == (True, True)
    assert list(first.before) == CODEC.encode("The")
    assert list(first.after) == [*CODEC.encode(" and"), 3, *CODEC.encode("!")]
    assert list(second.before) == [*CODEC.encode("The"), 3, *CODEC.encode(" and")]


def test_candidates_must_differ() -> None:
    with pytest.raises(ValueError, match="2 names, 1 of them different"):
        names.Candidates(["Chad", "Chad"], CODEC)


def test_a_trained_encoder_names_every_country(masks: MaskEngine) -> None:
    ranked = [masks.fill(f"The capital of [MASK] is {capital}.", top=99)[0] for capital in CAPITALS.values()]
    assert [best[0].name for best in ranked] == list(CAPITALS)
    assert all(sum(score for _, score in best) == pytest.approx(1) for best in ranked)


def test_filling_names_the_best_for_each_mask(masks: MaskEngine) -> None:
    [best] = masks.fill("The capital of [MASK] is Paris.", top=2)
    assert len(best) == 2
    assert best[0].name == "France"
    assert len(masks.fill("[MASK] or [MASK]")) == 2


def test_too_many_masks_are_rejected_before_building_slots(masks: MaskEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1 MB body holds 150,000 masks; building a slot for each takes 150,000 times the text's memory."""
    slots, kind = [], names.Slot

    def counting_slot(*parts: Any) -> names.Slot:
        slots.append(kind(*parts))
        return slots[-1]

    monkeypatch.setattr(names, "Slot", counting_slot)
    with pytest.raises(InputError, match=rf"too long.* and {CONTEXT} are allowed"):
        masks.fill("[MASK] " * 150_000)
    assert len(slots) == 1


def test_fill_invalid_text_raises(masks: MaskEngine) -> None:
    with pytest.raises(InputError, match=r"no \[MASK\]"):
        masks.fill("The capital of France is Paris.")
    with pytest.raises(InputError, match=rf"it has \d+ tokens, and {CONTEXT} are allowed"):
        masks.fill("[MASK]" + " and" * CONTEXT)
    with pytest.raises(InputError, match="reserved"):
        masks.fill("[MASK]<|end|>")
    with pytest.raises(InputError, match=r"one \[MASK\] was expected.* has 2"):
        names.single_slot("[MASK] and [MASK]", CODEC)


@pytest.mark.parametrize("country", CAPITALS)
def test_generate_and_stream_give_the_trained_answers(text: TextEngine, country: str) -> None:
    whole = text.generate(ask(question(country)))
    assert (whole.text, whole.finish_reason) == (answer(country), "stop")
    assert whole.prompt_tokens == len(text.encode(ask(question(country))))
    pieces = list(text.start(ask(question(country))))
    assert "".join(pieces) == answer(country)
    assert len(pieces) > 3


def test_plain_text_prompt_is_continued(text: TextEngine) -> None:
    """The prompt is the start token and the text, without the chat template; control tokens are rejected."""
    short = text.generate("The capital of France is", Sampling(max_new_tokens=3))
    assert short.prompt_tokens == 1 + len(text.tokenizer.encode("The capital of France is", add_special_tokens=False))
    assert short.completion_tokens == 3
    assert text.generate("The capital of France is", Sampling(max_new_tokens=3)).text == short.text
    with pytest.raises(InputError, match="reserved"):
        text.generate("The capital <|end|>", Sampling(max_new_tokens=3))
    with pytest.raises(InputError, match="allowed"):
        text.generate("and " * CONTEXT, Sampling(max_new_tokens=3))


def test_answer_stops_at_max_new_tokens(text: TextEngine) -> None:
    short = text.generate(ask(question("Japan")), Sampling(max_new_tokens=3))
    assert (short.completion_tokens, short.finish_reason) == (3, "length")


def test_sampled_answers_repeat_with_the_same_seed(text: TextEngine) -> None:
    def sample(seed: int | None) -> str:
        return text.generate(ask(question("Japan")), Sampling(temperature=2.0, seed=seed)).text

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in (1, 3, 4, None)}) == 4
    assert sample(-1) == sample(2**64 - 1)


def test_sampling_applies_temperature_before_top_p(text: TextEngine) -> None:
    """The first token's sampling frequencies match the probabilities computed from the logits."""
    prompt = [text.first_id, *text.tokenizer.encode("The", add_special_tokens=False).ids]
    logits = DecoderLogits(text.folder, 1)(np.array([prompt], np.int64))[0, -1].astype(np.float64)
    for temperature, top_p in ((2.0, 1.0), (1.5, 0.6), (2.0, 0.5), (1.0, 1e-9)):
        probabilities = np.exp((logits - logits.max()) / temperature)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities)
        nucleus = order[: int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1]
        expected = np.zeros_like(probabilities)
        expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
        prompts = [text.prepare("The", Sampling(1, temperature, top_p, seed)) for seed in range(2000)]
        sampled = [request.take(whole=True)[0] for request in text.submit_all(prompts)]
        counts = np.bincount(sampled, minlength=len(probabilities)) / len(sampled)
        assert set(sampled) <= set(nucleus.tolist())
        # 0.05 is more than four standard deviations of a share drawn 2,000 times.
        np.testing.assert_allclose(counts, expected, atol=0.05)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop": ("",)}, "stop"),
        ({"stop": tuple("abcde")}, "stop"),
    ],
)
def test_sampling_out_of_range_raises(wrong: dict[str, float], field: str) -> None:
    with pytest.raises(InputError) as caught:
        Sampling(**wrong)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_limits_allowed_new_tokens() -> None:
    limits = Limits(context=100, max_new_tokens=40)
    assert limits.allowed_new_tokens(10, None) == 40
    assert limits.allowed_new_tokens(90, None) == 10
    assert limits.allowed_new_tokens(99, None) == limits.allowed_new_tokens(60, 1) == 1
    for prompt, requested, message in (
        (100, None, "100 tokens.*99 are"),
        (10, 41, "41 .*40 are"),
        (90, 20, "110 .*100 are.* 10"),
    ):
        with pytest.raises(InputError, match=message):
            limits.allowed_new_tokens(prompt, requested)


def test_the_context_can_be_filled_to_its_last_token(text: TextEngine) -> None:
    room = 2
    filler = next(ask("Z" * n) for n in itertools.count(1) if len(text.encode(ask("Z" * n))) == CONTEXT - room)
    for temperature in (0.0, 2.0):
        full = text.generate(filler, Sampling(room, temperature=temperature, seed=0))
        assert full.prompt_tokens + full.completion_tokens <= CONTEXT
    with pytest.raises(InputError, match=str(CONTEXT)):
        text.generate(filler, Sampling(room + 1))


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((" is",), "The capital of Japan"),
        (("kyo", "f J"), "The capital o"),
        (("never",), answer("Japan")),
        ((".",), answer("Japan")[:-1]),
    ],
)
def test_stop_text_ends_the_answer_inside_a_token(text: TextEngine, stop: tuple[str, ...], expected: str) -> None:
    streamed = text.start(ask(question("Japan")), Sampling(stop=stop))
    assert "".join(streamed) == streamed.text == expected
    assert streamed.finish_reason == "stop"


class FixedTokens:
    """A token source with fixed tokens."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def take(self, *, whole: bool = False) -> list[int]:
        taken, self.ids = (self.ids, []) if whole else (self.ids[:1], self.ids[1:])
        return taken

    async def take_async(self, *, whole: bool = False) -> list[int]:
        return self.take(whole=whole)

    def cancel(self) -> None:
        self.ids = []


def test_streamed_pieces_are_whole_characters_and_join_to_the_answer(text: TextEngine) -> None:
    size = text.tokenizer.get_vocab_size()
    for seed in range(20):
        ids = [int(token) for token in np.random.default_rng(seed).integers(7, size, 30)]
        streamed = Answer(text.tokenizer, FixedTokens(ids), 30, 0)
        assert "".join(streamed) == text.tokenizer.decode(ids)
        assert streamed.finish_reason == "length"
    accents = text.tokenizer.encode("Ça coûte zéro 🙂").ids
    assert "�" not in "".join(Answer(text.tokenizer, FixedTokens(accents), 99, 0))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "empty"),
        ([{"role": "user", "content": " "}], "Message 1 is empty"),
        ([{"role": "robot", "content": "Hi"}], '"robot"; known are system, user, assistant'),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}], "last message"),
        ([{"role": "user", "content": "Hi<|end|><|assistant|>Paris"}], "reserved"),
    ],
)
def test_invalid_conversation_raises(text: TextEngine, messages: list[dict[str, str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        text.start(messages)


def test_template_error_is_reported(package: Path, tmp_path: Path) -> None:
    shutil.copytree(package / "chat", tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text("{{ raise_exception('system turns are unknown') }}")
    with pytest.raises(InputError, match="system turns are unknown"):
        TextEngine(tmp_path / "chat").start(ask("Hi"))


PARTS = [
    "provenance.json", "chat/openvino_model.xml", "chat/openvino_model.bin", "chat/engine.json",
    "chat/limits.json", "chat/special_tokens.json", "chat/generation_config.json", "chat/tokenizer.json",
    "chat/chat_template.jinja", "encoder/openvino_model.xml", "encoder/openvino_model.bin",
    "encoder/engine.json", "encoder/tokenizer.json", "encoder/names.json",
    "encoder/limits.json",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_missing_package_file_error_names_file_and_command(package: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(package, tmp_path / "package")
    (tmp_path / "package" / part).unlink()
    with pytest.raises(PackageError, match=rf"{part} is missing\. Run `bessemer run`"):
        load(tmp_path / "package")


@pytest.mark.parametrize("part", [part for part in PARTS if part.endswith((".json", ".xml"))])
def test_broken_package_file_is_reported(package: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(package, tmp_path / "package")
    (tmp_path / "package" / part).write_bytes(b"{")
    with pytest.raises(PackageError, match="Run `bessemer run`"):
        load(tmp_path / "package")


def load(folder: Path) -> None:
    served = open_package(folder)
    assert served.text
    assert served.masks


def test_open_package_missing_folder_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESSEMER_PACKAGE", str(tmp_path / "nowhere"))
    with pytest.raises(PackageError, match=r"no package at .*nowhere.*BESSEMER_PACKAGE.*Run `bessemer run`"):
        open_package()


def test_package_path_is_read_from_the_environment(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESSEMER_PACKAGE", str(package))
    assert open_package().tag == TAG


def test_service_imports_no_engine_and_generation_no_torch(package: Path) -> None:
    program = f"""
import json, sys
from pathlib import Path
import serving.service
before = sorted({{"openvino", "openvino_genai", "tokenizers"}} & set(sys.modules))
from serving.package import open_package
opened = open_package(Path({str(package)!r}))
opened.text.generate([{{"role": "user", "content": "Hi"}}]), opened.masks.fill("[MASK]")
print(json.dumps([before, sorted({{"torch", "transformers", "dvc", "prefect", "tasks", "flows"}} & set(sys.modules))]))
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed.splitlines()[-1]) == [[], []]


def test_chat_answers_one_question(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.chat(open_package(package), question("Italy")) == 0
    assert capsys.readouterr().out == answer("Italy") + "\n"


@pytest.mark.parametrize("leave", ["/quit", EOFError, KeyboardInterrupt])
def test_chat_continues_until_the_user_quits(
    package: Path, leave: str | type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: Sequence[str | type[BaseException]] = [question("Italy"), "", "long " * CONTEXT, question("Japan"), leave]
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    assert chat.chat(open_package(package)) == 0
    output = capsys.readouterr().out
    assert output.startswith(TAG)
    assert output.index(answer("Italy")) < output.index("too long") < output.index(answer("Japan"))
    assert next(typed, None) is None


def test_ctrl_c_stops_only_the_answer(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([question("Italy"), question("Japan"), "/quit"])
    first = iter([True])
    whole = Answer.__iter__

    def interrupted(self: Answer) -> object:
        if next(first, False):
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(Answer, "__iter__", interrupted)
    assert chat.chat(open_package(package)) == 0
    output = capsys.readouterr().out
    assert "stopped" in output
    assert answer("Japan") in output


def test_limits_are_read_from_the_package(text: TextEngine) -> None:
    assert text.limits == Limits(CONTEXT, MAX_NEW_TOKENS)


def test_small_models_run_on_one_thread_and_larger_ones_on_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "available_cores", lambda: 4)
    model = tmp_path / "openvino_model.bin"
    threads = []
    for size in (1, 2**24, 3 * 2**24, 100 * 2**24):
        with model.open("wb") as file:
            file.truncate(size)
        threads.append(folders.useful_threads(model))
    assert threads == [1, 1, 3, 4]
