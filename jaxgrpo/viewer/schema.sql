CREATE TABLE files (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, mtime INTEGER NOT NULL,
    done INTEGER NOT NULL, mark INTEGER NOT NULL, episodes INTEGER NOT NULL, fault TEXT NOT NULL
);
CREATE TABLE episodes (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    file INTEGER NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    split TEXT NOT NULL, step INTEGER NOT NULL, task TEXT NOT NULL, sample INTEGER NOT NULL,
    labels TEXT NOT NULL, reward REAL, passed INTEGER, stop_reason TEXT NOT NULL, failure TEXT NOT NULL,
    turns INTEGER NOT NULL, tokens INTEGER NOT NULL, calls INTEGER NOT NULL, tools TEXT NOT NULL,
    advantage REAL, repetition REAL NOT NULL, parts TEXT NOT NULL, preview TEXT NOT NULL
);
CREATE INDEX episodes_place ON episodes (split, step, task, sample);
CREATE INDEX episodes_task ON episodes (task, split, step);
CREATE INDEX episodes_failure ON episodes (failure, split, step);
CREATE INDEX episodes_stop ON episodes (stop_reason, split, step);
CREATE INDEX episodes_file ON episodes (file);
CREATE TABLE tasks (task TEXT PRIMARY KEY, labels TEXT NOT NULL, truth INTEGER, query TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE cells (
    split TEXT NOT NULL, task TEXT NOT NULL, step INTEGER NOT NULL,
    n INTEGER NOT NULL, passed INTEGER NOT NULL, reward REAL, PRIMARY KEY (split, task, step)
) WITHOUT ROWID;
CREATE TABLE kinds (
    split TEXT NOT NULL, step INTEGER NOT NULL, failure TEXT NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (split, step, failure)
) WITHOUT ROWID;
CREATE TABLE metrics (
    split TEXT NOT NULL, key TEXT NOT NULL, step INTEGER NOT NULL, value REAL, PRIMARY KEY (split, key, step)
) WITHOUT ROWID;
CREATE TABLE state (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE VIRTUAL TABLE said USING fts5(words, content='', detail=full, tokenize="unicode61 tokenchars '_'");
INSERT INTO said (said, rank) VALUES ('automerge', 16);
