"""The SQLite tables of the feedback store, and the migration of stores from earlier versions."""

from collections.abc import Iterator

VERSION = 2  # of the tables, stored as SQLite's `user_version`; a new file has 0

TABLES = """
CREATE TABLE store (id TEXT NOT NULL);
CREATE TABLE answers (
  id TEXT PRIMARY KEY, prompt TEXT NOT NULL, text TEXT NOT NULL, model TEXT NOT NULL, temperature REAL NOT NULL,
  seed INTEGER, created TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE rankings (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, prompt TEXT NOT NULL, responses TEXT NOT NULL,
  ranks TEXT NOT NULL, models TEXT NOT NULL, answers TEXT NOT NULL, annotator TEXT NOT NULL, created TEXT NOT NULL,
  withdrawn TEXT, export INTEGER
);
CREATE INDEX rankings_by_prompt ON rankings (prompt, annotator) WHERE withdrawn IS NULL;
CREATE TABLE opinions (
  number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, answer TEXT NOT NULL, prompt TEXT NOT NULL,
  response TEXT NOT NULL, model TEXT NOT NULL, opinion TEXT NOT NULL, note TEXT NOT NULL, annotator TEXT NOT NULL,
  created TEXT NOT NULL
);
CREATE TABLE skips (
  annotator TEXT NOT NULL, prompt TEXT NOT NULL, created TEXT NOT NULL, PRIMARY KEY (annotator, prompt)
) WITHOUT ROWID;
CREATE TABLE questions (number INTEGER PRIMARY KEY AUTOINCREMENT, prompt TEXT NOT NULL UNIQUE);
CREATE TABLE exports (number INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL, written TEXT)
"""

# Version 1 stored only the highest row number of an export, so every ranking up to it counts as exported.
MIGRATE_FROM_1 = """
ALTER TABLE rankings ADD COLUMN export INTEGER;
UPDATE rankings SET export = (SELECT min(rowid) FROM exports WHERE through >= rankings.number);
ALTER TABLE exports RENAME TO exports_1;
CREATE TABLE exports (number INTEGER PRIMARY KEY AUTOINCREMENT, created TEXT NOT NULL, written TEXT);
INSERT INTO exports SELECT rowid, created, created FROM exports_1;
DROP TABLE exports_1
"""


def migration_statements(version: int) -> Iterator[str]:
    """Yield the SQL statements that bring a store from `version` to VERSION."""
    if version < VERSION:
        yield from (MIGRATE_FROM_1 if version else TABLES).split(";")
        yield f"PRAGMA user_version = {VERSION}"
