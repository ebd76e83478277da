BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0011');
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
INSERT INTO "api_keys" VALUES('74298ab9798387cfadba07b56ed61ba532efc6325193854eeb659013058071a8','296b78fcbe1b','the recorded client','sd_7xD4_j',1.79590743707050704957e+09,NULL,NULL,NULL,NULL,0,'[]',0,'[]','[]','[]',NULL);
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
INSERT INTO "deliveries" VALUES('msg_3f4f91e9d0e943d09de4455c11e63327',1,'http://127.0.0.1:45678/hook','296b78fcbe1b http://127.0.0.1:45678','pending',2,1.79590779279206037518e+09,1.79590747811612105365e+09);
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
INSERT INTO "delivery_attempts" VALUES('msg_3f4f91e9d0e943d09de4455c11e63327',1,1.79590747841924643513e+09,1.53547299996716901659e-02,NULL,'not reachable');
INSERT INTO "delivery_attempts" VALUES('msg_3f4f91e9d0e943d09de4455c11e63327',2,1.79590748919394516949e+09,0.00800526500097476,NULL,'not reachable');
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
	heartbeat_at FLOAT, 
	step INTEGER NOT NULL, 
	total_steps INTEGER NOT NULL, 
	run_s FLOAT, 
	flagged JSON, 
	error TEXT, priority INTEGER DEFAULT '0' NOT NULL, turn BIGINT DEFAULT '0' NOT NULL, expired_at FLOAT, fencing_token INTEGER DEFAULT '0' NOT NULL, preview_step INTEGER, submitted_s FLOAT, queued_s FLOAT, 
	CONSTRAINT failed_has_error CHECK ((state = 'failed') = (error IS NOT NULL)), 
	CONSTRAINT running_has_lease CHECK ((state = 'running') = (worker_id IS NOT NULL AND heartbeat_at IS NOT NULL)), 
	CONSTRAINT state_known CHECK (state IN ('queued', 'running', 'finished', 'failed', 'cancelled')), 
	UNIQUE (file_prefix)
);
INSERT INTO "jobs" VALUES(1,'finished','296b78fcbe1b','v3','{"wants_base64": false, "base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 838.3, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}','{"prompt": "a cat DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame", "seed": 7, "negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','05ea4076-22d6-4a21-9f83-378bf2416ce9',57344.0,'http://127.0.0.1:45678/hook','"recorded-1"',1.79590744600810241701e+09,1.79590747638438177112e+09,1.79590747810999464993e+09,1,NULL,NULL,14,14,1.66415201500058174133e+00,'[false]',NULL,0,0,NULL,1,NULL,1.79590744600810623167e+09,30.3960018157959);
INSERT INTO "jobs" VALUES(2,'queued','296b78fcbe1b','v3','{"wants_base64": false, "base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 572.0, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}','{"prompt": "a cat DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame", "seed": 7, "negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','f43d369b-1edf-4d71-a388-0736bfa65032',57344.0,'http://127.0.0.1:45678/hook','"recorded-2"',1.79590748978887033461e+09,NULL,NULL,0,NULL,NULL,0,0,NULL,NULL,NULL,0,1,NULL,0,NULL,1.79590748978887343404e+09,NULL);
INSERT INTO "jobs" VALUES(3,'queued','296b78fcbe1b','native','{"base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.2, "decode_ms": 7.9, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}','{"prompt": "a cat", "seed": 7, "negative_prompt": "", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 4, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}','d6656cad-e447-4c9b-bdd3-fdbf97fd0509',11468.8,NULL,'null',1795907489.89961,NULL,NULL,0,NULL,NULL,0,0,NULL,NULL,NULL,0,2,NULL,0,NULL,1.79590748989961528775e+09,NULL);
CREATE TABLE receipts (
	job_id INTEGER NOT NULL, 
	receipt JSON NOT NULL, 
	PRIMARY KEY (job_id), 
	FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "receipts" VALUES(1,'{"model": {"id": "builtin", "weights_sha256": "8bf5178c49bfcd85544351615fe933bb3d96caf618175dd48f2d7a42700949ca", "device": "cpu", "dtype": "float32"}, "versions": {"server": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"}, "times": {"prepare_ms": 168.6, "denoise_ms": 1391.6, "decode_ms": 63.5, "encode_ms": 7.8, "store_ms": 32.0}, "coverage": 1.0, "box": [0, 0, 64, 64], "pictures": [{"sha256": "e0a5b7b551d3808091df90677da8d5a3a5d8f8a86c5ba8d81b8aa3f94349443b", "seed": 7, "is_flagged": false, "changed_outside": 0, "largest_difference_outside": 0}]}');
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
