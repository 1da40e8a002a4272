-- The database of Astera Lite. Read it with: sqlite3 astera_lite.db
--
-- Times are integers: milliseconds since 1970-01-01 UTC. To read one:
--   SELECT datetime(created / 1000, 'unixepoch') FROM jobs;
-- After a jump of the system's clock they are out by `clock.offset` until the database is opened again.
-- Values larger than 256 KiB stand in `pieces`, in order, instead of in their own column, which is then NULL.
-- This file makes version 3 of the schema (PRAGMA user_version). A newer server upgrades an older database when it
-- opens it; an older server refuses a newer one.

-- One row for each asynchronous call.
CREATE TABLE jobs (
    seq             INTEGER PRIMARY KEY, -- first 60 bits of the id (UUIDv7): 48 of time, 12 of a counter
    salt            INTEGER NOT NULL,    -- the other 62 bits of the id: random
    flow            TEXT    NOT NULL,    -- name of the flow
    version         INTEGER NOT NULL,    -- the flow as it was accepted: a key of flows
    status          TEXT    NOT NULL CHECK (status IN ('Running', 'Completed', 'Error')), -- Running: also while queued
    created         INTEGER NOT NULL,    -- when it was accepted
    token           TEXT    NOT NULL,    -- name of the token that submitted it; empty in open mode
    base            TEXT    NOT NULL,    -- base of the URLs handed out, as the submitter saw the server
    attempt         INTEGER NOT NULL DEFAULT 0, -- runs begun that are on record
    started         INTEGER,             -- when the recorded run began; NULL while queued
    due             INTEGER,             -- waits until then without a thread; NULL if it does not wait
    finished        INTEGER,             -- when its result became available
    expires         INTEGER,             -- when its result is forgotten: finished + retention
    idempotency_key TEXT,                -- the client's Idempotency-Key
    fingerprint     BLOB,                -- SHA-256 of what was sent under that key
    callback_url    TEXT,                -- where the result's address is to be posted; NULL: nowhere
    code            INTEGER,             -- status code of the result
    size            INTEGER,             -- bytes of the result's body
    headers         TEXT,                -- headers of the result: JSON, list of [name, value]
    error           TEXT,                -- the problem document of a job that is Error: JSON; of a Running one null (JSON): it is to be cancelled
    trace           TEXT,                -- what became of each step: JSON, list of objects
    request         TEXT    NOT NULL,    -- what was sent: JSON object of method, path, query, headers; trace (W3C Trace Context)
    request_body    BLOB,                -- body that was sent; NULL: none, or in pieces
    result          BLOB                 -- body of the result; NULL: none yet, or in pieces
);

-- Finds unfinished jobs after a restart.
CREATE INDEX jobs_running ON jobs (seq) WHERE status = 'Running';
-- Finds failed jobs among many.
CREATE INDEX jobs_error ON jobs (seq) WHERE status = 'Error';
-- Lists the jobs of one flow.
CREATE INDEX jobs_flow ON jobs (flow, seq);
-- Lists the jobs of one token.
CREATE INDEX jobs_token ON jobs (token, seq) WHERE token <> '';
-- Finds what to purge.
CREATE INDEX jobs_expires ON jobs (expires) WHERE expires IS NOT NULL;
-- Finds the job that a repeated Idempotency-Key belongs to.
CREATE UNIQUE INDEX jobs_key ON jobs (flow, token, idempotency_key) WHERE idempotency_key IS NOT NULL;

-- Values larger than 256 KiB, cut into pieces so that writing one does not hold up other writes.
CREATE TABLE pieces (
    job     INTEGER NOT NULL, -- jobs.seq
    part    TEXT    NOT NULL, -- 'request_body' or 'result'
    attempt INTEGER NOT NULL, -- run that wrote it; 0 for the request
    n       INTEGER NOT NULL, -- position, from 0
    data    BLOB    NOT NULL, -- up to 256 KiB
    PRIMARY KEY (job, part, attempt, n)
) WITHOUT ROWID;

-- Outputs of finished steps of running jobs, from which a job resumes after a crash. Empty for finished jobs.
CREATE TABLE steps (
    job    INTEGER NOT NULL, -- jobs.seq
    path   TEXT    NOT NULL, -- the step's place in the flow: forecast, or each/3/fetch
    until  INTEGER,          -- of a step that waits: until when; NULL for a finished step
    output TEXT,             -- of a finished step: its value as JSON
    PRIMARY KEY (job, path)
) WITHOUT ROWID;

-- Callbacks of finished jobs, written in the transaction that finishes the job.
CREATE TABLE callbacks (
    job         INTEGER PRIMARY KEY, -- jobs.seq
    receiver    TEXT    NOT NULL,    -- host:port, so that one receiver does not hold up the others
    state       TEXT    NOT NULL CHECK (state IN ('pending', 'delivered', 'failed', 'gone')), -- how far it got
    attempts    INTEGER NOT NULL DEFAULT 0, -- deliveries tried since it was last asked for
    last_status INTEGER,             -- status code of the last answer; NULL: no answer
    next        INTEGER,             -- when it is tried next; NULL unless pending
    body        TEXT    NOT NULL     -- what is posted: the status document, frozen when the job finished
);

-- Finds the callbacks that are due.
CREATE INDEX callbacks_due ON callbacks (next, receiver) WHERE state = 'pending';

-- Each try to deliver a callback.
CREATE TABLE attempts (
    job      INTEGER NOT NULL, -- jobs.seq
    n        INTEGER NOT NULL, -- number of the attempt, from 1
    at       INTEGER NOT NULL, -- when it began
    duration INTEGER NOT NULL, -- milliseconds until its answer or failure
    status   INTEGER,          -- status code of the answer; NULL: no answer
    error    TEXT,             -- why there was no answer, or why it was not sent
    PRIMARY KEY (job, n)
) WITHOUT ROWID;

-- The text of every flow that a stored job was accepted with, so that a restart resumes what was begun.
CREATE TABLE flows (
    version INTEGER PRIMARY KEY, -- 63 bits of the SHA-256 of name and text
    name    TEXT    NOT NULL,    -- name of the flow
    text    TEXT    NOT NULL     -- the flow: JSON
);

-- Who may call, where tokens are wanted: made by the command `token`.
CREATE TABLE tokens (
    name    TEXT    PRIMARY KEY,     -- whose it is; jobs.token of the jobs that were submitted with it
    hash    BLOB    NOT NULL,        -- SHA-256 of the token, which is random and stored nowhere; empty: it was revoked
    role    TEXT    NOT NULL CHECK (role IN ('user', 'admin')), -- admin: sees every job, and may deploy
    flows   TEXT,                    -- the flows it may call: JSON list of names; NULL: all of them
    created INTEGER NOT NULL         -- when it was made
) WITHOUT ROWID;

-- How the server's time stands to the system's clock: a row once that has jumped.
CREATE TABLE clock (
    one    INTEGER PRIMARY KEY CHECK (one = 1), -- there is one row at the most
    offset INTEGER NOT NULL                     -- milliseconds that the times in this file are behind it
);
