BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0010');
CREATE TABLE api_keys (
	digest TEXT NOT NULL, 
	key_id TEXT NOT NULL, 
	name TEXT NOT NULL, 
	prefix TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	expires_at FLOAT, 
	revoked_at FLOAT, 
	requests_per_minute INTEGER, 
	max_waiting INTEGER, 
	priority INTEGER NOT NULL, 
	fetch_networks JSON NOT NULL, 
	force_safety_checker BOOLEAN NOT NULL, fetch_hosts JSON, webhook_networks JSON, webhook_hosts JSON, hold_s FLOAT, 
	PRIMARY KEY (digest)
);
CREATE TABLE deliveries (
	id TEXT NOT NULL, 
	job_id INTEGER NOT NULL, 
	url TEXT NOT NULL, 
	host TEXT NOT NULL, 
	state TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	due_at FLOAT NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT state_known CHECK (state IN ('pending', 'delivered', 'dead')), 
	FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE TABLE delivery_attempts (
	delivery_id TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	started_at FLOAT NOT NULL, 
	duration_s FLOAT NOT NULL, 
	status INTEGER, 
	outcome TEXT NOT NULL, 
	PRIMARY KEY (delivery_id, attempt), 
	FOREIGN KEY(delivery_id) REFERENCES deliveries (id) ON DELETE CASCADE
);
CREATE TABLE idempotency_keys (
	key_id TEXT NOT NULL, 
	"key" TEXT NOT NULL, 
	body_sha256 TEXT NOT NULL, 
	file_prefix TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (key_id, "key"), 
	FOREIGN KEY(file_prefix) REFERENCES jobs (file_prefix) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED
);
CREATE TABLE jobs (
	id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	state TEXT NOT NULL, 
	key_id TEXT NOT NULL, 
	dialect TEXT NOT NULL, 
	request JSON NOT NULL, 
	params JSON NOT NULL, 
	file_prefix TEXT NOT NULL, 
	work FLOAT NOT NULL, 
	webhook TEXT, 
	track_id TEXT, 
	created_at FLOAT NOT NULL, 
	started_at FLOAT, 
	finished_at FLOAT, 
	attempt INTEGER NOT NULL, 
	worker_id TEXT, 
	beaten_at FLOAT, 
	step INTEGER NOT NULL, 
	total_steps INTEGER NOT NULL, 
	run_s FLOAT, 
	flagged JSON, 
	error TEXT, priority INTEGER DEFAULT '0' NOT NULL, turn BIGINT DEFAULT '0' NOT NULL, expired_at FLOAT, claim INTEGER DEFAULT '0' NOT NULL, preview_step INTEGER, submitted_s FLOAT, queued_s FLOAT, 
	CONSTRAINT failed_has_error CHECK ((state = 'failed') = (error IS NOT NULL)), 
	CONSTRAINT running_has_lease CHECK ((state = 'running') = (worker_id IS NOT NULL AND beaten_at IS NOT NULL)), 
	CONSTRAINT state_known CHECK (state IN ('queued', 'running', 'finished', 'failed', 'cancelled')), 
	UNIQUE (file_prefix)
);
INSERT INTO "jobs" VALUES(1,'queued','anonymous','v3','{"init_image": "(base64, 208 bytes)", "mask_image": "(base64, 144 bytes)", "wants_base64": false, "base_url": "http://127.0.0.1:45679", "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 200.3, "init_image_sha256": "f0e3b0627c5ec1a9b94f86bcbc051a2238ec305f19117677857d669c8eef2d48", "mask_image_sha256": "6e2223bc6d113c9aa0550cbc8ac73fdf0b3cfc48a6eb15f5cbdd96d1421be9cf", "mask_read_as": "white"}}','{"prompt": "a red circle", "seed": 7, "negative_prompt": "", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": false, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','ab5a1818-09ce-4fb4-bcee-ddd8a7ef7a71',57344.0,'http://127.0.0.1:45678/hook','"old-1"',1.79586943005065584181e+09,NULL,NULL,0,NULL,NULL,0,0,NULL,NULL,NULL,0,0,NULL,0,NULL,1.79586943005065798753e+09,NULL);
INSERT INTO "jobs" VALUES(2,'queued','anonymous','native','{"init_image": "(base64, 208 bytes)", "mask_image": "(base64, 144 bytes)", "base_url": "http://127.0.0.1:45679", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 1.4, "init_image_sha256": "f0e3b0627c5ec1a9b94f86bcbc051a2238ec305f19117677857d669c8eef2d48", "mask_image_sha256": "6e2223bc6d113c9aa0550cbc8ac73fdf0b3cfc48a6eb15f5cbdd96d1421be9cf", "mask_read_as": "white"}}','{"prompt": "a red circle", "seed": 7, "negative_prompt": "", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 4, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": false, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','b1c03780-ae4d-4412-807e-592fcc17bfd6',11468.8,NULL,'null',1.79586943007909059528e+09,NULL,NULL,0,NULL,NULL,0,0,NULL,NULL,NULL,0,1,NULL,0,NULL,1.7958694300790941715e+09,NULL);
CREATE TABLE receipts (
	job_id INTEGER NOT NULL, 
	receipt JSON NOT NULL, 
	PRIMARY KEY (job_id), 
	FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
CREATE TABLE workers (
	id TEXT NOT NULL, 
	device TEXT NOT NULL, 
	model TEXT NOT NULL, 
	state TEXT NOT NULL, 
	detail TEXT NOT NULL, 
	seen_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT state_known CHECK (state IN ('loading', 'ready', 'failed'))
);
CREATE INDEX jobs_by_state ON jobs (state, id);
CREATE INDEX deliveries_by_job ON deliveries (job_id);
CREATE INDEX deliveries_due ON deliveries (state, due_at);
CREATE INDEX jobs_in_order ON jobs (state, priority DESC, turn, id);
CREATE INDEX jobs_of_key ON jobs (key_id, state);
CREATE INDEX jobs_by_turn ON jobs (priority, turn);
CREATE INDEX jobs_by_turn_of_key ON jobs (key_id, priority, turn);
CREATE INDEX jobs_unexpired ON jobs (state, finished_at) WHERE expired_at IS NULL;
CREATE INDEX jobs_by_end ON jobs (finished_at);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_by_job ON idempotency_keys (file_prefix);
CREATE INDEX jobs_by_key ON jobs (key_id, id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('jobs',2);
COMMIT;
