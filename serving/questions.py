"""The queue of questions for ranking: one per line in `questions.txt`, in the folder of the store.

The file is read again when it changes; lines that start with `#` are comments. While it has no question, the queue has
prompts of the project's own data. A question is waiting until it has a ranking. An annotator gets a question with the
fewest rankings that they have not ranked or skipped: one of the first few, so that several people begin with different
ones.
"""

import json
from collections.abc import Sequence
from typing import Any

from serving.feedback.judgements import FeedbackError, check_id
from serving.feedback.store import Message, Store, canonical_prompt, now

FILE = "questions.txt"
BATCH = 10  # questions that are drawn from at random, before the next ones

NEXT_QUERY = """
SELECT questions.prompt FROM questions WHERE
  NOT EXISTS (SELECT 1 FROM rankings
              WHERE withdrawn IS NULL AND rankings.prompt = questions.prompt AND annotator = :annotator)
  AND NOT EXISTS (SELECT 1 FROM skips WHERE skips.prompt = questions.prompt AND annotator = :annotator)
ORDER BY (SELECT count(*) FROM rankings WHERE withdrawn IS NULL AND rankings.prompt = questions.prompt),
  (number - (SELECT min(number) FROM questions)) / :batch, random()
LIMIT 1
"""
WAITING_QUERY = """
SELECT count(*) FROM questions WHERE
  NOT EXISTS (SELECT 1 FROM rankings WHERE withdrawn IS NULL AND rankings.prompt = questions.prompt)
"""


class Questions:
    """The queue of questions of one store."""

    def __init__(self, store: Store, defaults: Sequence[Sequence[Message]] = ()) -> None:
        self.store, self.defaults = store, defaults
        self.path = store.path.with_name(FILE)
        self._last_stamp: tuple[int, int] | None = None  # mtime in ns and size of the file when it was last read

    def refresh(self) -> None:
        """Reload the file if it changed; without a question in it the queue has the default prompts."""
        try:
            state = self.path.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            lines = [] if stamp == self._last_stamp else self.path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            stamp, lines = (0, 0), []
        except (OSError, UnicodeDecodeError) as error:
            raise FeedbackError(f"{self.path} cannot be read as UTF-8 text ({error}): fix or remove it.") from None
        if stamp == self._last_stamp:
            return
        written = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
        asked = [[{"role": "user", "content": line}] for line in written] or self.defaults
        prompts = dict.fromkeys(map(canonical_prompt, asked))
        with self.store.transaction() as connection:
            connection.execute("DELETE FROM questions")
            connection.executemany("INSERT INTO questions (prompt) VALUES (?)", ((prompt,) for prompt in prompts))
        self._last_stamp = stamp

    def next(self, annotator: str) -> list[dict[str, str]] | None:
        """Return the next prompt for an annotator, or None if none is left."""
        check_id("annotator", annotator)
        found = self.store.fetch_all(NEXT_QUERY, {"annotator": annotator, "batch": BATCH})
        prompt: list[dict[str, str]] | None = json.loads(found[0]["prompt"]) if found else None
        return prompt

    def skip(self, prompt: Sequence[Message], annotator: str) -> None:
        """Never offer a question to this annotator again. Questions that are not in the queue are ignored."""
        check_id("annotator", annotator)
        with self.store.transaction() as connection:
            connection.execute(
                "INSERT INTO skips SELECT ?, prompt, ? FROM questions WHERE prompt = ? ON CONFLICT DO NOTHING",
                (annotator, now(), canonical_prompt(prompt)),
            )

    def progress(self) -> dict[str, Any]:
        """Return the number of questions and of those without a ranking."""
        [[questions]] = self.store.fetch_all("SELECT count(*) FROM questions")
        [[waiting]] = self.store.fetch_all(WAITING_QUERY)
        return {"questions": questions, "waiting": waiting}
