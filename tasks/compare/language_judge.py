"""A language model as the judge of pairs of replies, behind an OpenAI-compatible endpoint.

Judges prefer the reply in one position (Zheng et al. 2023, "Judging LLM-as-a-Judge", section 3.3), so each pair is
shown in both orders, and the result is their mean. Verdicts are kept in the store of results: a new gate asks nothing
again, and an interrupted stage asks only for what is left.
"""

import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tasks.common.evaluation.judge_model import JudgeModel
from tasks.common.evaluation.results import ResultStore
from tasks.common.harness.job import StageError
from tasks.compare.preferences import Pair

VERDICT = re.compile(r"(?<![A-Za-z])(A|B|TIE)(?![A-Za-z])")
SECOND_WINS = {"A": 0.0, "B": 1.0, "TIE": 0.5}
MAX_UNREADABLE_SHARE = 0.5  # of the answers, above which the judge is of no use
TEMPORARY = (408, 409, 429, 500, 502, 503, 504)
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds
ANSWER_EXCERPT = 120  # characters of an answer in a message


def judge_pairs(judge: JudgeModel, pairs: Sequence[Pair], store: ResultStore) -> list[dict[str, Any]]:
    """Return for each pair the judge's verdicts in both orders and the result: 1 won, 0.5 tied, 0 lost.

    Raises StageError if the endpoint fails, or if most answers contain no verdict.
    """
    prompts = [text for pair in pairs for text in _both_orders(judge, pair)]
    distinct = list(dict.fromkeys(prompts))  # the same question asked twice at once would be stored twice at once
    with ThreadPoolExecutor(judge.parallel) as pool:
        answer_to = dict(zip(distinct, pool.map(lambda prompt: _ask(judge, prompt, store), distinct), strict=True))
    answers = [answer_to[prompt] for prompt in prompts]
    verdicts = [read_verdict(answer) for answer in answers]
    unreadable = [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict is None]
    if len(unreadable) > MAX_UNREADABLE_SHARE * len(answers):
        raise StageError(
            f"the judge {judge.model} gave no verdict in {len(unreadable)} of {len(answers)} answers, such as "
            f"{unreadable[0][:ANSWER_EXCERPT]!r}: change its prompt, raise max_new_tokens, or use another model."
        )
    return [
        {"verdicts": verdicts[at : at + 2], "result": _result(verdicts[at], verdicts[at + 1])}
        for at in range(0, len(verdicts), 2)
    ]


def read_verdict(answer: str) -> str | None:
    """Return the last A, B or TIE of an answer; None if there is none."""
    found = VERDICT.findall(answer)
    return found[-1] if found else None


def _result(first: str | None, swapped: str | None) -> float:
    """Return the mean result of the judged reply, second in the first order; an answer without verdict is a tie."""
    return (SECOND_WINS[first or "TIE"] + 1 - SECOND_WINS[swapped or "TIE"]) / 2


def _both_orders(judge: JudgeModel, pair: Pair) -> list[str]:
    question, before, after = pair.after["question"], pair.before["reply"], pair.after["reply"]
    return [_fill(judge.prompt, question, before, after), _fill(judge.prompt, question, after, before)]


def _fill(prompt: str, question: str, first: str, second: str) -> str:
    """Return the prompt with its fields, in one pass: a reply may itself contain {first}."""
    values = {"{question}": question, "{first}": first, "{second}": second}
    return re.sub(r"\{question\}|\{first\}|\{second\}", lambda match: values[match[0]], prompt)


def _ask(judge: JudgeModel, prompt: str, store: ResultStore) -> str:
    asked = {"url": judge.url, "model": judge.model, "prompt": prompt, "max_new_tokens": judge.max_new_tokens}
    answer: str = store.get(asked, [], lambda: request_answer(judge, prompt))
    return answer


def request_answer(judge: JudgeModel, prompt: str) -> str:
    """Return the endpoint's answer; raise StageError if it refuses, or still fails after all retries."""
    import httpx

    url = f"{judge.url.rstrip('/')}/chat/completions"
    body = {
        "model": judge.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
        "max_tokens": judge.max_new_tokens,
    }  # fmt: skip
    failure = ""
    for attempt in range(judge.retries + 1):
        if attempt:
            time.sleep(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
        try:
            response = httpx.post(url, json=body, headers=_headers(judge), timeout=judge.timeout_seconds)
        except httpx.HTTPError as error:
            failure = f"{type(error).__name__}: {error}"
            continue
        if response.status_code not in TEMPORARY:
            return _read_answer(judge, response)
        failure = f"status {response.status_code}: {response.text[:ANSWER_EXCERPT]}"
    raise StageError(
        f"the judge at {judge.url} did not answer in {judge.retries + 1} attempts ({failure}). Verdicts so far are "
        "kept: start it, or raise evaluations.*.by.retries, and run the stage again."
    )


def _read_answer(judge: JudgeModel, response: Any) -> str:
    if response.status_code in (401, 403):
        remedy = f"check the environment variable {judge.key_variable}" if judge.key_variable else "set key_variable"
        raise StageError(f"the judge at {judge.url} refused the API key ({response.status_code}): {remedy}.")
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if response.status_code != 200 or not isinstance(content, str):
        raise StageError(
            f"the judge at {judge.url} answered {response.status_code} with {response.text[:ANSWER_EXCERPT]!r}; "
            f"expected an OpenAI-compatible chat completion of the model {judge.model}."
        )
    return content


def _headers(judge: JudgeModel) -> dict[str, str]:
    if judge.key_variable is None:
        return {}
    key = os.environ.get(judge.key_variable)
    if not key:
        raise StageError(f"the environment variable {judge.key_variable} with the judge's API key is not set.")
    return {"Authorization": f"Bearer {key}"}
