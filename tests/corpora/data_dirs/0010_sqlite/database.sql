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
INSERT INTO "api_keys" VALUES('302c2696ec89031069ba49afd4a79258249ed317fa0c52f40bdc468f6b6bb571','9988ba0f3e45','the recorded client','sd_huUxCt',1.7959073358750302792e+09,NULL,NULL,NULL,NULL,0,'[]',0,'[]','[]','[]',NULL);
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
INSERT INTO "deliveries" VALUES('msg_f8a3d9d9a4054777a38606604209412f',1,'http://127.0.0.1:45678/hook','9988ba0f3e45 http://127.0.0.1:45678','pending',2,1.79590772071614122387e+09,1.79590736317353916163e+09);
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
INSERT INTO "delivery_attempts" VALUES('msg_f8a3d9d9a4054777a38606604209412f',1,1.79590736334807658195e+09,7.89247899956535547971e-03,NULL,'not reachable');
INSERT INTO "delivery_attempts" VALUES('msg_f8a3d9d9a4054777a38606604209412f',2,1.79590737473487210276e+09,2.45695150006213225424e-02,NULL,'not reachable');
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
INSERT INTO "jobs" VALUES(1,'finished','9988ba0f3e45','v3','{"wants_base64": false, "base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 123.5, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}','{"prompt": "a cat DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame", "seed": 7, "negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','3489afb6-a951-4a0a-9de0-ace35587f51a',57344.0,'http://127.0.0.1:45678/hook','"recorded-1"',1.79590734124921655653e+09,1.7959073612368226051e+09,1.79590736315695953364e+09,1,NULL,NULL,14,14,1.90699098099867114797e+00,'[false]',NULL,0,0,NULL,1,NULL,1.79590734124923419954e+09,1.9989572763442993164e+01);
INSERT INTO "jobs" VALUES(2,'queued','9988ba0f3e45','v3','{"wants_base64": false, "base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 187.1, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}','{"prompt": "a cat DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame", "seed": 7, "negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','a89c0b07-9bb4-4415-a1e5-747784cbb0ca',57344.0,'http://127.0.0.1:45678/hook','"recorded-2"',1.79590737491166591638e+09,NULL,NULL,0,NULL,NULL,0,0,NULL,NULL,NULL,0,1,NULL,0,NULL,1.79590737491167116166e+09,NULL);
INSERT INTO "jobs" VALUES(3,'queued','9988ba0f3e45','native','{"base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 4.9, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}','{"prompt": "a cat", "seed": 7, "negative_prompt": "", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 4, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','c9846d87-f77f-4631-9495-c59d20915555',11468.8,NULL,'null',1.79590737496953845022e+09,NULL,NULL,0,NULL,NULL,0,0,NULL,NULL,NULL,0,2,NULL,0,NULL,1.7959073749695427418e+09,NULL);
CREATE TABLE receipts (
	job_id INTEGER NOT NULL, 
	receipt JSON NOT NULL, 
	PRIMARY KEY (job_id), 
	FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "receipts" VALUES(1,'{"model": {"id": "builtin", "weights_sha256": "8bf5178c49bfcd85544351615fe933bb3d96caf618175dd48f2d7a42700949ca", "device": "cpu", "dtype": "float32"}, "versions": {"server": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"}, "times": {"prepare_ms": 154.0, "denoise_ms": 1607.4, "decode_ms": 100.1, "encode_ms": 6.6, "store_ms": 38.4}, "coverage": 1.0, "box": [0, 0, 64, 64], "pictures": [{"sha256": "e0a5b7b551d3808091df90677da8d5a3a5d8f8a86c5ba8d81b8aa3f94349443b", "seed": 7, "is_flagged": false, "changed_outside": 0, "largest_difference_outside": 0}]}');
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
INSERT INTO "sqlite_sequence" VALUES('jobs',3);
COMMIT;
