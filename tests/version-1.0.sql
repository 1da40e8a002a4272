-- A database as version 1.0 wrote it when it was killed: jobs of all states, a callback that is owed, a token.
PRAGMA user_version = 2;
PRAGMA application_id = 1095980081;
BEGIN TRANSACTION;
CREATE TABLE attempts (
    job      INTEGER NOT NULL, -- jobs.seq
    n        INTEGER NOT NULL, -- number of the attempt, from 1
    at       INTEGER NOT NULL, -- when it began
    duration INTEGER NOT NULL, -- milliseconds until its answer or failure
    status   INTEGER,          -- status code of the answer; NULL: no answer
    error    TEXT,             -- why there was no answer, or why it was not sent
    PRIMARY KEY (job, n)
) WITHOUT ROWID;
INSERT INTO "attempts" VALUES(7356010542624768,1,1795901011388,10,NULL,'the connection failed: Connection refused');
CREATE TABLE callbacks (
    job         INTEGER PRIMARY KEY, -- jobs.seq
    receiver    TEXT    NOT NULL,    -- host:port, so that one receiver does not hold up the others
    state       TEXT    NOT NULL CHECK (state IN ('pending', 'delivered', 'failed', 'gone')), -- how far it got
    attempts    INTEGER NOT NULL DEFAULT 0, -- deliveries tried
    last_status INTEGER,             -- status code of the last answer; NULL: no answer
    next        INTEGER,             -- when it is tried next; NULL unless pending
    body        TEXT    NOT NULL     -- what is posted: the status document, frozen when the job finished
);
INSERT INTO "callbacks" VALUES(7356010542624768,'127.0.0.1:9470','pending',1,NULL,1795901016563,'{"id":"01a2240a-b5b7-7000-b2f6-b2057c0bad58","status":"Completed","flow":"done","createdAt":"2026-11-28T21:23:31.383Z","startedAt":"2026-11-28T21:23:31.383Z","finishedAt":"2026-11-28T21:23:31.383Z","expiresAt":"2126-11-04T21:23:31.383Z","attempt":1,"progress":null,"statusUrl":"http://127.0.0.1:9471/api/jobs/01a2240a-b5b7-7000-b2f6-b2057c0bad58/status","resultUrl":"http://127.0.0.1:9471/api/jobs/01a2240a-b5b7-7000-b2f6-b2057c0bad58/result","error":null}');
CREATE TABLE clock (
    one    INTEGER PRIMARY KEY CHECK (one = 1), -- there is one row at the most
    offset INTEGER NOT NULL                     -- milliseconds that the times in this file are behind it
);
CREATE TABLE flows (
    version INTEGER PRIMARY KEY, -- 63 bits of the SHA-256 of name and text
    name    TEXT    NOT NULL,    -- name of the flow
    text    TEXT    NOT NULL     -- the flow: JSON
);
INSERT INTO "flows" VALUES(211670542277908227,'done','{"request":{"method":"GET","resource":"/done","processing":["asynchronous"],"parameters":{"n":{"in":"query","type":"integer","default":1}}},"response":{"body":{"n":"${params.n}"}}}');
INSERT INTO "flows" VALUES(1643311439332222369,'waits','{"request":{"method":"GET","resource":"/waits","processing":["asynchronous"]},"steps":[{"name":"first","run":{"command":["echo","one"]}},{"name":"w","wait":"2s"}],"response":{"body":"${first.stdout}"}}');
INSERT INTO "flows" VALUES(3652870302798417619,'big','{"request":{"method":"GET","resource":"/big","processing":["asynchronous"]},"steps":[{"name":"w","wait":"1ms"}],"response":{"headers":{"Content-Type":"text/plain"},"body":"${''x'' * 300000}"}}');
INSERT INTO "flows" VALUES(3687611628036681594,'busy','{"request":{"method":"GET","resource":"/busy","processing":["asynchronous"]},"steps":[{"name":"first","run":{"command":["echo","one"]}},{"name":"second","run":{"command":["sleep","2"]}}],"response":{"body":"${first.stdout}"}}');
INSERT INTO "flows" VALUES(5520467314763620490,'bad','{"request":{"method":"GET","resource":"/bad","processing":["asynchronous"]},"steps":[{"name":"no","fail":{"status":422,"message":"no"}}]}');
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
    error           TEXT,                -- the problem document of a job that is Error: JSON
    trace           TEXT,                -- what became of each step: JSON, list of objects
    request         TEXT    NOT NULL,    -- what was sent: JSON object of method, path, query, headers; trace (W3C Trace Context)
    request_body    BLOB,                -- body that was sent; NULL: none, or in pieces
    result          BLOB                 -- body of the result; NULL: none yet, or in pieces
);
INSERT INTO "jobs" VALUES(7356010542596096,4538853877972285783,'done',211670542277908227,'Completed',1795901011376,'','http://127.0.0.1:9471',1,1795901011376,NULL,1795901011378,4949501011378,'k1',X'FF603E043CAE0FD9A7C45365B56AB2199D9A382245BC9A604B6344284BE1C619',NULL,200,8,'[["Content-Type","application/json"]]',NULL,NULL,'{"method":"GET","path":"/done","query":"n=7","headers":{}}',X'',X'7B226E223A377D0A');
INSERT INTO "jobs" VALUES(7356010542624768,3672318282792938840,'done',211670542277908227,'Completed',1795901011383,'','http://127.0.0.1:9471',1,1795901011383,NULL,1795901011383,4949501011383,NULL,X'','http://127.0.0.1:9470/hook',200,8,'[["Content-Type","application/json"]]',NULL,NULL,'{"method":"GET","path":"/done","query":"n=8","headers":{}}',X'',X'7B226E223A387D0A');
INSERT INTO "jobs" VALUES(7356010542686208,619423357692714074,'big',3652870302798417619,'Completed',1795901011398,'','http://127.0.0.1:9471',1,1795901011410,NULL,1795901011412,4949501011412,NULL,X'',NULL,200,300000,'[["Content-Type","text/plain; charset=utf-8"]]',NULL,'[{"path":"w","name":"w","kind":"wait","state":"finished","startedAt":"2026-11-28T21:23:31.410Z","finishedAt":"2026-11-28T21:23:31.412Z","size":null,"preview":null}]','{"method":"GET","path":"/big","query":"","headers":{}}',X'',NULL);
INSERT INTO "jobs" VALUES(7356010542718976,2932854233525302165,'bad',5520467314763620490,'Error',1795901011406,'','http://127.0.0.1:9471',1,1795901011406,NULL,1795901011406,4949501011406,NULL,X'',NULL,422,97,'[["Content-Type","application/problem+json"]]','{"type":"about:blank","title":"Unprocessable Entity","status":422,"detail":"no","code":"failed"}','[{"path":"no","name":"no","kind":"fail","state":"failed","startedAt":"2026-11-28T21:23:31.406Z","finishedAt":"2026-11-28T21:23:31.406Z","size":null,"preview":null}]','{"method":"GET","path":"/bad","query":"","headers":{}}',X'',X'7B2274797065223A2261626F75743A626C616E6B222C227469746C65223A22556E70726F6365737361626C6520456E74697479222C22737461747573223A3432322C2264657461696C223A226E6F222C22636F6465223A226661696C6564227D0A');
INSERT INTO "jobs" VALUES(7356010542739456,1167230717573683099,'waits',1643311439332222369,'Running',1795901011411,'','http://127.0.0.1:9471',1,1795901011421,1795901013433,NULL,NULL,NULL,X'',NULL,NULL,NULL,NULL,NULL,'[{"path":"first","name":"first","kind":"run","state":"finished","startedAt":"2026-11-28T21:23:31.421Z","finishedAt":"2026-11-28T21:23:31.433Z","size":39,"preview":"{\"code\": 0, \"stdout\": \"one\\n\", \"stderr\": \"\"}"}]','{"method":"GET","path":"/waits","query":"","headers":{}}',X'',NULL);
INSERT INTO "jobs" VALUES(7356010546884608,2642924467704795726,'busy',3687611628036681594,'Running',1795901012423,'','http://127.0.0.1:9471',1,1795901012429,NULL,NULL,NULL,NULL,X'',NULL,NULL,NULL,NULL,NULL,NULL,'{"method":"GET","path":"/busy","query":"","headers":{}}',X'',NULL);
INSERT INTO "jobs" VALUES(7356010549780480,585698417433437275,'busy',3687611628036681594,'Running',1795901013130,'','http://127.0.0.1:9471',0,NULL,NULL,NULL,NULL,NULL,X'',NULL,NULL,NULL,NULL,NULL,NULL,'{"method":"GET","path":"/busy","query":"","headers":{}}',X'',NULL);
CREATE TABLE pieces (
    job     INTEGER NOT NULL, -- jobs.seq
    part    TEXT    NOT NULL, -- 'request_body' or 'result'
    attempt INTEGER NOT NULL, -- run that wrote it; 0 for the request
    n       INTEGER NOT NULL, -- position, from 0
    data    BLOB    NOT NULL, -- up to 256 KiB
    PRIMARY KEY (job, part, attempt, n)
) WITHOUT ROWID;
INSERT INTO "pieces" VALUES(7356010542686208,'result',1,0,CAST(replace(hex(zeroblob(131072)), '00', 'xx') AS BLOB));
INSERT INTO "pieces" VALUES(7356010542686208,'result',1,1,CAST(replace(hex(zeroblob(18928)), '00', 'xx') AS BLOB));
CREATE TABLE steps (
    job    INTEGER NOT NULL, -- jobs.seq
    path   TEXT    NOT NULL, -- the step's place in the flow: forecast, or each/3/fetch
    until  INTEGER,          -- of a step that waits: until when; NULL for a finished step
    output TEXT,             -- of a finished step: its value as JSON
    PRIMARY KEY (job, path)
) WITHOUT ROWID;
INSERT INTO "steps" VALUES(7356010542739456,'first',NULL,'{"code":0,"stdout":"one\n","stderr":""}');
INSERT INTO "steps" VALUES(7356010542739456,'w',1795901013433,NULL);
INSERT INTO "steps" VALUES(7356010542739456,'w<',NULL,'1795901011433');
INSERT INTO "steps" VALUES(7356010546884608,'first',NULL,'{"code":0,"stdout":"one\n","stderr":""}');
CREATE TABLE tokens (
    name    TEXT    PRIMARY KEY,     -- whose it is; jobs.token of the jobs that were submitted with it
    hash    BLOB    NOT NULL,        -- SHA-256 of the token, which is random and stored nowhere; empty: it was revoked
    role    TEXT    NOT NULL CHECK (role IN ('user', 'admin')), -- admin: sees every job, and may deploy
    flows   TEXT,                    -- the flows it may call: JSON list of names; NULL: all of them
    created INTEGER NOT NULL         -- when it was made
) WITHOUT ROWID;
INSERT INTO "tokens" VALUES('ada',X'18DCE0DD873395B07546E0A7559A09667B1752A3B8B21149C0D176C5F7DE9167','user',NULL,1795901013837);
CREATE INDEX jobs_running ON jobs (seq) WHERE status = 'Running';
CREATE INDEX jobs_error ON jobs (seq) WHERE status = 'Error';
CREATE INDEX jobs_flow ON jobs (flow, seq);
CREATE INDEX jobs_expires ON jobs (expires) WHERE expires IS NOT NULL;
CREATE UNIQUE INDEX jobs_key ON jobs (flow, token, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX callbacks_due ON callbacks (next, receiver) WHERE state = 'pending';
COMMIT;
