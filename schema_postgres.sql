-- The database of Astera Lite where several servers share it. Read it with: psql
--
-- Tables and columns are those of schema.sql, which a single server uses, and what several owners need. Times are
-- integers: milliseconds since 1970-01-01 UTC by the clock of the database. To read one:
--   SELECT to_timestamp(created / 1000.0) FROM jobs;
-- Values larger than 256 KiB stand in `pieces`, in order, instead of in their own column, which is then NULL.
-- This file makes version 1 of the schema (table astera_lite). A newer server upgrades an older database when it opens
-- it; an older server refuses a newer one.

-- One row: whose tables these are.
CREATE TABLE astera_lite (
    version integer NOT NULL -- version of the schema
);

-- The servers that use this database: a row for each start, deleted at its end or when its lease has run out.
CREATE TABLE nodes (
    start       bigint      PRIMARY KEY GENERATED ALWAYS AS IDENTITY, -- what owns: never used twice, unlike a name
    number      smallint    NOT NULL UNIQUE CHECK (number BETWEEN 0 AND 63), -- last bits of `seq` of the jobs it accepts
    name        text        NOT NULL, -- setting `node`
    since       timestamptz NOT NULL DEFAULT now(), -- when it started
    lease_until timestamptz NOT NULL, -- after that others take its jobs
    jobs        bigint      NOT NULL DEFAULT 0, -- unfinished jobs that it has in hand, as of some seconds ago
    flows       text        NOT NULL DEFAULT '[]', -- names of the flows it serves: JSON list
    progress    text        NOT NULL DEFAULT '{}' -- how far its runs are: JSON, by `seq` [step, done, total]
);

-- One row for each asynchronous call.
CREATE TABLE jobs (
    seq             bigint  PRIMARY KEY, -- first 60 bits of the id (UUIDv7): 48 of time, 12 of a counter
    salt            bigint  NOT NULL,    -- the other 62 bits of the id: random
    flow            text    NOT NULL,    -- name of the flow
    version         bigint  NOT NULL,    -- the flow as it was accepted: a key of flows
    status          text    NOT NULL CHECK (status IN ('Running', 'Completed', 'Error')), -- Running: also while queued
    created         bigint  NOT NULL,    -- when it was accepted
    token           text    NOT NULL,    -- name of the token that submitted it; empty in open mode
    base            text    NOT NULL,    -- base of the URLs handed out, as the submitter saw the server
    attempt         integer NOT NULL DEFAULT 0, -- runs begun that are on record
    started         bigint,              -- when the recorded run began; NULL while queued
    due             bigint,              -- waits until then without a thread; NULL if it does not wait
    finished        bigint,              -- when its result became available
    expires         bigint,              -- when its result is forgotten: finished + retention
    owner           bigint  REFERENCES nodes ON DELETE SET NULL, -- server that has it in hand; NULL: nobody has
    cancel          boolean NOT NULL DEFAULT false, -- its owner is asked to cancel it
    idempotency_key text,                -- the client's Idempotency-Key
    fingerprint     bytea,               -- SHA-256 of what was sent under that key
    callback_url    text,                -- where the result's address is to be posted; NULL: nowhere
    code            integer,             -- status code of the result
    size            bigint,              -- bytes of the result's body
    headers         text,                -- headers of the result: JSON, list of [name, value]
    error           text,                -- the problem document of a job that is Error: JSON
    trace           text,                -- what became of each step: JSON, list of objects
    request         text    NOT NULL,    -- what was sent: JSON object of method, path, query, headers; trace (W3C Trace Context)
    request_body    bytea,               -- body that was sent; NULL: none, or in pieces
    result          bytea                -- body of the result; NULL: none yet, or in pieces
) WITH (
    fillfactor = 50, -- the start of a run finds room in the page, and so changes no index
    autovacuum_vacuum_scale_factor = 0.02, -- early and quick, for every job leaves two rows that are dead
    autovacuum_vacuum_cost_delay = 0
);

-- Finds what nobody has in hand and what does not wait.
CREATE INDEX jobs_free ON jobs (seq, flow) WHERE status = 'Running' AND owner IS NULL AND due IS NULL;
-- Finds what nobody has in hand and waits until then.
CREATE INDEX jobs_waiting ON jobs (due, flow) WHERE status = 'Running' AND owner IS NULL AND due IS NOT NULL;
-- Finds what a server has in hand.
CREATE INDEX jobs_owned ON jobs (owner, flow) WHERE owner IS NOT NULL;
-- Finds what a server is asked to cancel.
CREATE INDEX jobs_cancel ON jobs (owner) WHERE cancel;
-- Finds unfinished jobs among many.
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

-- Synchronous calls of flows that have a limit: a row for each that runs or waits for its turn, deleted at its end.
CREATE TABLE calls (
    owner  bigint NOT NULL REFERENCES nodes ON DELETE CASCADE, -- server that has it
    number bigint NOT NULL, -- what that server calls it
    flow   text   NOT NULL, -- name of the flow
    place  bigint NOT NULL GENERATED ALWAYS AS IDENTITY, -- order in which calls of a flow run
    PRIMARY KEY (owner, number)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- Finds the calls of a flow, in their order.
CREATE INDEX calls_flow ON calls (flow, place);

-- Values larger than 256 KiB, cut into pieces.
CREATE TABLE pieces (
    job     bigint  NOT NULL, -- jobs.seq
    part    text    NOT NULL, -- 'request_body' or 'result'
    attempt integer NOT NULL, -- run that wrote it; 0 for the request
    n       integer NOT NULL, -- position, from 0
    data    bytea   NOT NULL, -- up to 256 KiB
    PRIMARY KEY (job, part, attempt, n)
);
ALTER TABLE pieces ALTER COLUMN data SET STORAGE EXTERNAL;

-- Outputs of finished steps of running jobs, from which a job resumes after a crash. Empty for finished jobs.
CREATE TABLE steps (
    job    bigint NOT NULL, -- jobs.seq
    path   text   NOT NULL, -- the step's place in the flow: forecast, or each/3/fetch
    until  bigint,          -- of a step that waits: until when; NULL for a finished step
    output text,            -- of a finished step: its value as JSON
    PRIMARY KEY (job, path)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- Callbacks of finished jobs, written in the transaction that finishes the job.
CREATE TABLE callbacks (
    job         bigint  PRIMARY KEY, -- jobs.seq
    receiver    text    NOT NULL,    -- host:port, so that one receiver does not hold up the others
    state       text    NOT NULL CHECK (state IN ('pending', 'delivered', 'failed', 'gone')), -- how far it got
    attempts    integer NOT NULL DEFAULT 0, -- deliveries tried since it was last asked for
    last_status integer,             -- status code of the last answer; NULL: no answer
    next        bigint,              -- when it is tried next; NULL unless pending
    body        text    NOT NULL,    -- what is posted: the status document, frozen when the job finished
    owner       bigint  REFERENCES nodes ON DELETE SET NULL -- server that delivers it now; NULL: none does
);

-- Finds the callbacks that are due.
CREATE INDEX callbacks_due ON callbacks (next, receiver) WHERE state = 'pending';
-- Finds the callbacks that a server delivers.
CREATE INDEX callbacks_owned ON callbacks (owner) WHERE owner IS NOT NULL;

-- Each try to deliver a callback.
CREATE TABLE attempts (
    job      bigint  NOT NULL, -- jobs.seq
    n        integer NOT NULL, -- number of the attempt, from 1
    at       bigint  NOT NULL, -- when it began
    duration bigint  NOT NULL, -- milliseconds until its answer or failure
    status   integer,          -- status code of the answer; NULL: no answer
    error    text,             -- why there was no answer, or why it was not sent
    PRIMARY KEY (job, n)
);

-- The text of every flow that a stored job was accepted with, so that any server resumes what another began.
CREATE TABLE flows (
    version bigint      PRIMARY KEY, -- 63 bits of the SHA-256 of name and text
    name    text        NOT NULL,    -- name of the flow
    text    text        NOT NULL,    -- the flow: JSON
    used    timestamptz NOT NULL DEFAULT now() -- when a server last accepted jobs with it, to some minutes
);

-- The flows that were put into service over HTTP, for all servers.
CREATE TABLE deployments (
    name    text        PRIMARY KEY, -- name of the flow
    text    text        NOT NULL,    -- the flow as it was sent: JSON
    changed timestamptz NOT NULL DEFAULT now() -- when it was put into service
);

-- Who may call, where tokens are wanted: made by the command `token`.
CREATE TABLE tokens (
    name    text   PRIMARY KEY,     -- whose it is; jobs.token of the jobs that were submitted with it
    hash    bytea  NOT NULL,        -- SHA-256 of the token, which is random and stored nowhere; empty: it was revoked
    role    text   NOT NULL CHECK (role IN ('user', 'admin')), -- admin: sees every job, and may deploy
    flows   text,                   -- the flows it may call: JSON list of names; NULL: all of them
    created bigint NOT NULL         -- when it was made
);
