-- The state of a server as schema version 5 had it. Never changed: servers in the field have it.
BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('5');
CREATE TABLE ledgers (
	member VARCHAR NOT NULL, 
	number INTEGER NOT NULL, 
	head BLOB NOT NULL, 
	PRIMARY KEY (member), 
	FOREIGN KEY(member) REFERENCES members (name)
);
INSERT INTO "ledgers" VALUES('anna',1,X'6868686868686868686868686868686868686868686868686868686868686868');
CREATE TABLE matching (
	epoch INTEGER NOT NULL, 
	member VARCHAR NOT NULL, 
	setup BLOB, 
	PRIMARY KEY (epoch, member), 
	FOREIGN KEY(member) REFERENCES members (name)
);
INSERT INTO "matching" VALUES(1,'anna',X'7365747570');
CREATE TABLE members (
	name VARCHAR NOT NULL, 
	fingerprint VARCHAR NOT NULL, 
	instance_id VARCHAR NOT NULL, 
	expert_id VARCHAR NOT NULL, 
	taking_part BOOLEAN NOT NULL, serial VARCHAR DEFAULT '' NOT NULL, not_after DOUBLE DEFAULT 0 NOT NULL, 
	PRIMARY KEY (name), 
	UNIQUE (expert_id)
);
INSERT INTO "members" VALUES('anna','aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa','instance-anna','id-anna',1,'',0.0);
INSERT INTO "members" VALUES('bert','bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb','instance-bert','id-bert',1,'',0.0);
INSERT INTO "members" VALUES('cleo','cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc','instance-cleo','id-cleo',0,'',0.0);
CREATE TABLE messages (
	round INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	member VARCHAR NOT NULL, 
	message BLOB NOT NULL, 
	PRIMARY KEY (round, step, member), 
	FOREIGN KEY(round) REFERENCES rounds (number), 
	FOREIGN KEY(member) REFERENCES members (name)
);
INSERT INTO "messages" VALUES(2,1,'anna',X'6D657373616765206F6620726F756E642032');
CREATE TABLE meta (
	id INTEGER NOT NULL, 
	federation_id VARCHAR NOT NULL, 
	plan_json VARCHAR NOT NULL, 
	version INTEGER NOT NULL, 
	PRIMARY KEY (id), 
	CHECK (id = 1)
);
INSERT INTO "meta" VALUES(1,'1f3e2faea93ac5ae1aa88b6f04499cea','{"backbone":{"model":"tiny-clip","pretrained":"embedded","text_digest":null,"text_width":3},"class_names":["cat","dog"],"matching":{"clip":2.0,"delta":1e-05,"dimension":64,"epsilon":null},"method":"pfedmoap","mixture":{"attention_scale":10.0,"experts":2,"form":"paper","gate_heads":8,"gate_width":128,"lambda":0.5},"name":"upgraded","privacy":{"batch_size":32,"clip":0.3,"gate_lr":0.05,"mechanism":"feature-space","prompt_lr":0.01,"steps":30},"prompt":{"context_init":"","context_length":2,"max_norm":100.0},"protection":{"aggregation":"plain","experts":"plain","matching":"plain","metrics":false},"rounds":{"count":3,"deadline_seconds":600.0,"heartbeat_seconds":5.0,"minimum_cohort":2,"participation":1.0,"start_clients":null,"step_seconds":60.0},"secure_aggregation":{"assumed_corrupt":0.2,"assumed_dropout":0.3,"clip":4.0,"complete_up_to":64,"max_weight":10000,"precision":0.002},"seed":1,"training":{"batch_size":32,"gate_lr":0.01,"local_epochs":5,"momentum":0.9,"prompt_lr":0.002,"weight_decay":0.0005}}',8);
CREATE TABLE parts (
	round INTEGER NOT NULL, 
	member VARCHAR NOT NULL, 
	step INTEGER NOT NULL, 
	message_digest BLOB, 
	counted BOOLEAN NOT NULL, 
	expert BLOB, 
	sketch BLOB, 
	epoch INTEGER NOT NULL, 
	publication_digest BLOB, 
	bytes_received INTEGER NOT NULL, 
	bytes_sent INTEGER NOT NULL, 
	PRIMARY KEY (round, member), 
	FOREIGN KEY(round) REFERENCES rounds (number), 
	FOREIGN KEY(member) REFERENCES members (name)
);
INSERT INTO "parts" VALUES(1,'anna',1,X'F8D7125A608404838DFDA028B350D31F0D399B6C38041170B9CDF20635B800E4',1,NULL,NULL,1,X'6464646464646464646464646464646464646464646464646464646464646464',170,10);
INSERT INTO "parts" VALUES(1,'bert',1,X'4EAB2D9457D1E98C9E72BF025CAEE87B44CCA4AD86289A237B6285E888A741BC',1,NULL,NULL,1,X'6464646464646464646464646464646464646464646464646464646464646464',170,10);
INSERT INTO "parts" VALUES(2,'anna',1,X'72759FDA300518ACD294882B8ECDE1E14D58E91795A07DE458A8349DC7B4C832',1,NULL,NULL,0,NULL,120,7);
INSERT INTO "parts" VALUES(2,'bert',0,NULL,0,NULL,NULL,0,NULL,0,0);
CREATE TABLE pool (
	member VARCHAR NOT NULL, 
	round INTEGER NOT NULL, 
	expert BLOB NOT NULL, 
	sketch BLOB NOT NULL, 
	epoch INTEGER NOT NULL, 
	digest BLOB NOT NULL, 
	PRIMARY KEY (member), 
	FOREIGN KEY(member) REFERENCES members (name), 
	FOREIGN KEY(round) REFERENCES rounds (number)
);
INSERT INTO "pool" VALUES('anna',1,X'657870657274206F6620616E6E61',X'736B65746368',1,X'6464646464646464646464646464646464646464646464646464646464646464');
INSERT INTO "pool" VALUES('bert',1,X'657870657274206F662062657274',X'736B65746368',1,X'6464646464646464646464646464646464646464646464646464646464646464');
CREATE TABLE reports (
	author VARCHAR NOT NULL, 
	reporter VARCHAR NOT NULL, 
	PRIMARY KEY (author, reporter), 
	FOREIGN KEY(author) REFERENCES members (name), 
	FOREIGN KEY(reporter) REFERENCES members (name)
);
INSERT INTO "reports" VALUES('anna','bert');
CREATE TABLE rounds (
	number INTEGER NOT NULL, 
	opened_at DOUBLE NOT NULL, 
	step INTEGER NOT NULL, 
	deadline DOUBLE NOT NULL, 
	outcome VARCHAR NOT NULL, 
	closed_at DOUBLE, 
	global_prompt BLOB, 
	metrics JSON NOT NULL, 
	PRIMARY KEY (number), 
	CHECK (outcome IN ('open', 'closed', 'abandoned')), 
	CHECK ((outcome = 'open') = (closed_at IS NULL)), 
	CHECK ((outcome = 'closed') = (global_prompt IS NOT NULL))
);
INSERT INTO "rounds" VALUES(1,100.0,1,160.0,'closed',130.5,X'676C6F62616C2070726F6D7074','{}');
INSERT INTO "rounds" VALUES(2,200.0,1,260.0,'open',NULL,NULL,'{}');
CREATE UNIQUE INDEX one_open_round ON rounds (outcome) WHERE outcome = 'open';
COMMIT;
