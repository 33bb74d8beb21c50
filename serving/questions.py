"""The questions whose answers people are asked to rank: one a line in `questions.txt`, in the folder of the store.

The file is read again when it has changed; lines that begin with `#` are comments. A question waits until somebody
has ranked answers to it. Whoever asks gets one of those with the fewest rankings that he neither ranked nor skipped.
"""

import json
from collections.abc import Sequence
from typing import Any

from serving.feedback import Message, Store, now, packed_prompt
from serving.judgements import FeedbackError, check_id

FILE = "questions.txt"

NEXT = """
SELECT questions.prompt FROM questions WHERE
  NOT EXISTS (SELECT 1 FROM rankings
              WHERE withdrawn IS NULL AND rankings.prompt = questions.prompt AND annotator = :annotator)
  AND NOT EXISTS (SELECT 1 FROM skips WHERE skips.prompt = questions.prompt AND annotator = :annotator)
ORDER BY (SELECT count(*) FROM rankings WHERE withdrawn IS NULL AND rankings.prompt = questions.prompt), random()
LIMIT 1
"""
WAITING = """
SELECT count(*) FROM questions WHERE
  NOT EXISTS (SELECT 1 FROM rankings WHERE withdrawn IS NULL AND rankings.prompt = questions.prompt)
"""


class Questions:
    """The queue of questions of one store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.path = store.path.with_name(FILE)
        self._read: tuple[int, int] | None = None  # when the file that was read last had changed, and its size

    def refresh(self) -> None:
        """Take the file's questions over where it has changed; without a file there are none."""
        try:
            state = self.path.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            lines = [] if stamp == self._read else self.path.read_text(encoding="utf-8-sig").splitlines()
        except FileNotFoundError:
            stamp, lines = (0, 0), []
        except (OSError, UnicodeDecodeError) as error:
            raise FeedbackError(f"{self.path} cannot be read as UTF-8 text ({error}): mend or remove it.") from None
        if stamp == self._read:
            return
        asked = (line.strip() for line in lines)
        prompts = dict.fromkeys(
            packed_prompt([{"role": "user", "content": line}]) for line in asked if line and not line.startswith("#")
        )
        with self.store.change() as change:
            change.execute("DELETE FROM questions")
            change.executemany("INSERT INTO questions (prompt) VALUES (?)", ((prompt,) for prompt in prompts))
        self._read = stamp

    def next(self, annotator: str) -> list[dict[str, str]] | None:
        """Return the prompt that this annotator should rank answers to, or None where none is left."""
        check_id("annotator", annotator)
        found = self.store.rows(NEXT, {"annotator": annotator})
        prompt: list[dict[str, str]] | None = json.loads(found[0]["prompt"]) if found else None
        return prompt

    def skip(self, prompt: Sequence[Message], annotator: str) -> None:
        """Never offer a question to this annotator again; one that is not in the file is none to be offered."""
        check_id("annotator", annotator)
        with self.store.change() as change:
            change.execute(
                "INSERT INTO skips SELECT ?, prompt, ? FROM questions WHERE prompt = ? ON CONFLICT DO NOTHING",
                (annotator, now(), packed_prompt(prompt)),
            )

    def progress(self) -> dict[str, Any]:
        """Return how many questions there are and how many wait for their first ranking."""
        [[questions]] = self.store.rows("SELECT count(*) FROM questions")
        [[waiting]] = self.store.rows(WAITING)
        return {"questions": questions, "waiting": waiting}
