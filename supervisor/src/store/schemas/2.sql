-- A database of schema 2, as `sqlite3 factory.db .dump` printed it.
PRAGMA user_version = 2;
BEGIN TRANSACTION;
CREATE TABLE events (
        n INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        worker TEXT NOT NULL,
        slot TEXT NOT NULL,
        job TEXT,
        phase TEXT NOT NULL,
        note TEXT
    ) STRICT;
INSERT INTO "events" VALUES(1,5,'00000000000000000000000007','bench-1','01HZX3N8Q4J5K6M7P8R9S0T1V2','broken','it broke');
CREATE TABLE workers (
        id TEXT PRIMARY KEY NOT NULL,
        slot TEXT NOT NULL,
        target TEXT NOT NULL,
        job TEXT,
        bootstrap TEXT,
        phase TEXT NOT NULL,
        lines_sent INTEGER NOT NULL,
        since INTEGER NOT NULL,
        waiting_since INTEGER NOT NULL,
        associated INTEGER NOT NULL,
        hold INTEGER NOT NULL,
        gone INTEGER NOT NULL,
        remakes INTEGER NOT NULL,
        failure TEXT,
        trouble TEXT,
        hold_since INTEGER
    ) STRICT;
INSERT INTO "workers" VALUES('00000000000000000000000007','bench-1','00000000000000000000000008','01HZX3N8Q4J5K6M7P8R9S0T1V2','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','broken',12,5,4,1,1,0,2,'it broke',NULL,3);
CREATE TABLE drained (
        -- Empty: all slots.
        slot TEXT PRIMARY KEY NOT NULL
    ) STRICT;
INSERT INTO "drained" VALUES('bench-1');
COMMIT;
