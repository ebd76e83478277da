CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.api_keys (
    digest text NOT NULL,
    key_id text NOT NULL,
    name text NOT NULL,
    prefix text NOT NULL,
    created_at double precision NOT NULL,
    expires_at double precision,
    revoked_at double precision,
    requests_per_minute integer,
    max_waiting integer,
    priority integer NOT NULL,
    fetch_networks json NOT NULL,
    force_safety_checker boolean NOT NULL,
    fetch_hosts json,
    webhook_networks json,
    webhook_hosts json,
    hold_s double precision
);
CREATE TABLE public.deliveries (
    id text NOT NULL,
    job_id bigint NOT NULL,
    url text NOT NULL,
    host text NOT NULL,
    state text NOT NULL,
    attempt integer NOT NULL,
    due_at double precision NOT NULL,
    created_at double precision NOT NULL,
    CONSTRAINT state_known CHECK ((state = ANY (ARRAY['pending'::text, 'delivered'::text, 'dead'::text])))
);
CREATE TABLE public.delivery_attempts (
    delivery_id text NOT NULL,
    attempt integer NOT NULL,
    started_at double precision NOT NULL,
    duration_s double precision NOT NULL,
    status integer,
    outcome text NOT NULL
);
CREATE TABLE public.idempotency_keys (
    key_id text NOT NULL,
    key text NOT NULL,
    body_sha256 text NOT NULL,
    file_prefix text NOT NULL,
    created_at double precision NOT NULL
);
CREATE TABLE public.jobs (
    id bigint NOT NULL,
    state text NOT NULL,
    key_id text NOT NULL,
    dialect text NOT NULL,
    request json NOT NULL,
    params json NOT NULL,
    file_prefix text NOT NULL,
    work double precision NOT NULL,
    webhook text,
    track_id text,
    created_at double precision NOT NULL,
    started_at double precision,
    finished_at double precision,
    attempt integer NOT NULL,
    worker_id text,
    heartbeat_at double precision,
    step integer NOT NULL,
    total_steps integer NOT NULL,
    run_s double precision,
    flagged json,
    error text,
    priority integer DEFAULT 0 NOT NULL,
    turn bigint DEFAULT '0'::bigint NOT NULL,
    expired_at double precision,
    fencing_token integer DEFAULT 0 NOT NULL,
    preview_step integer,
    submitted_s double precision,
    queued_s double precision,
    CONSTRAINT failed_has_error CHECK (((state = 'failed'::text) = (error IS NOT NULL))),
    CONSTRAINT running_has_lease CHECK (((state = 'running'::text) = ((worker_id IS NOT NULL) AND (heartbeat_at IS NOT NULL)))),
    CONSTRAINT state_known CHECK ((state = ANY (ARRAY['queued'::text, 'running'::text, 'finished'::text, 'failed'::text, 'cancelled'::text])))
);
CREATE SEQUENCE public.jobs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.jobs_id_seq OWNED BY public.jobs.id;
CREATE TABLE public.receipts (
    job_id bigint NOT NULL,
    receipt json NOT NULL
);
CREATE TABLE public.workers (
    id text NOT NULL,
    device text NOT NULL,
    model text NOT NULL,
    state text NOT NULL,
    detail text NOT NULL,
    seen_at double precision NOT NULL,
    CONSTRAINT state_known CHECK ((state = ANY (ARRAY['loading'::text, 'ready'::text, 'failed'::text])))
);
ALTER TABLE ONLY public.jobs ALTER COLUMN id SET DEFAULT nextval('public.jobs_id_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('0011');
INSERT INTO public.api_keys VALUES ('73dc322a235121c4e1d902261285a9b3d524048710ac37bf1859a16593a4486d', 'f90337309aec', 'the recorded client', 'sd_mwzbTT', 1795907502.7161345, NULL, NULL, NULL, NULL, 0, '[]', false, '[]', '[]', '[]', NULL);
INSERT INTO public.deliveries VALUES ('msg_faebf506f24d469cb8395eeaa7326c9f', 1, 'http://127.0.0.1:45678/hook', 'f90337309aec http://127.0.0.1:45678', 'pending', 2, 1795907834.3110092, 1795907556.182812);
INSERT INTO public.delivery_attempts VALUES ('msg_faebf506f24d469cb8395eeaa7326c9f', 1, 1795907556.8132567, 0.005139460998179857, NULL, 'not reachable');
INSERT INTO public.delivery_attempts VALUES ('msg_faebf506f24d469cb8395eeaa7326c9f', 2, 1795907561.6028233, 0.010483695004950278, NULL, 'not reachable');
INSERT INTO public.jobs VALUES (1, 'finished', 'f90337309aec', 'v3', '{"wants_base64": false, "base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 598.7, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}', '{"prompt": "a cat DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame", "seed": 7, "negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}', '44c713f8-85ac-4bbe-b817-8b5fffdaaa61', 57344, 'http://127.0.0.1:45678/hook', '"recorded-1"', 1795907511.8198256, 1795907554.5750213, 1795907556.1759546, 1, NULL, NULL, 14, 14, 1.5167907909999485, '[false]', NULL, 0, 0, NULL, 1, NULL, 1795907511.8231237, 42.80775809288025);
INSERT INTO public.jobs VALUES (2, 'queued', 'f90337309aec', 'v3', '{"wants_base64": false, "base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.1, "decode_ms": 570.2, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}', '{"prompt": "a cat DSLR photography, sharp focus, Unreal Engine 5, Octane Render, Redshift, ((cinematic lighting)), f/1.4, ISO 200, 1/160s, 8K, RAW, unedited, symmetrical balance, in-frame", "seed": 7, "negative_prompt": " ((out of frame)), ((extra fingers)), mutated hands, ((poorly drawn hands)), ((poorly drawn face)), (((mutation))), (((deformed))), (((tiling))), ((naked)), ((tile)), ((fleshpile)), ((ugly)), (((abstract))), blurry, ((bad anatomy)), ((bad proportions)), ((extra limbs)), cloned face, glitchy, ((extra breasts)), ((double torso)), ((extra arms)), ((extra hands)), ((mangled fingers)), ((missing breasts)), (missing lips), ((ugly face)), ((fat)), ((extra legs))", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 20, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}', 'f162e2a0-09b4-41cf-8f02-40557a27277a', 57344, 'http://127.0.0.1:45678/hook', '"recorded-2"', 1795907571.6838057, NULL, NULL, 0, NULL, NULL, 0, 0, NULL, NULL, NULL, 0, 1, NULL, 0, NULL, 1795907571.6906464, NULL);
INSERT INTO public.jobs VALUES (3, 'queued', 'f90337309aec', 'native', '{"base_url": "http://pictures.example", "init_image": "(base64, 226 bytes)", "mask_image": "(base64, 226 bytes)", "previews": false, "warnings": [], "intake": {"fetch_ms": 0.2, "decode_ms": 10.5, "init_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_image_sha256": "7d48f8dfc304a4e2c7e57290c9821c0ca69738968d5ed11651610f8f267bb2ef", "mask_read_as": "white"}}', '{"prompt": "a cat", "seed": 7, "negative_prompt": "", "width": 64, "height": 64, "samples": 1, "num_inference_steps": 4, "guidance_scale": 7.5, "strength": 0.7, "scheduler": null, "clip_skip": 0, "model": null, "safety_check": true, "must_be_checked": false, "invert_mask": false, "soft_mask": false, "mask_grow": 0, "only_masked": false, "only_masked_padding": 32, "mask_blur": 0, "match_colours": false}', 'e8962b6d-18ae-4a85-b9ba-697f093321d6', 11468.8, NULL, 'null', 1795907572.7883034, NULL, NULL, 0, NULL, NULL, 0, 0, NULL, NULL, NULL, 0, 2, NULL, 0, NULL, 1795907572.7843416, NULL);
INSERT INTO public.receipts VALUES (1, '{"model": {"id": "builtin", "weights_sha256": "8bf5178c49bfcd85544351615fe933bb3d96caf618175dd48f2d7a42700949ca", "device": "cpu", "dtype": "float32"}, "versions": {"server": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.42.1"}, "times": {"prepare_ms": 162.6, "denoise_ms": 1262.5, "decode_ms": 61.7, "encode_ms": 8.1, "store_ms": 18.5}, "coverage": 1.0, "box": [0, 0, 64, 64], "pictures": [{"sha256": "e0a5b7b551d3808091df90677da8d5a3a5d8f8a86c5ba8d81b8aa3f94349443b", "seed": 7, "is_flagged": false, "changed_outside": 0, "largest_difference_outside": 0}]}');
SELECT pg_catalog.setval('public.jobs_id_seq', 3, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (digest);
ALTER TABLE ONLY public.deliveries
    ADD CONSTRAINT deliveries_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.delivery_attempts
    ADD CONSTRAINT delivery_attempts_pkey PRIMARY KEY (delivery_id, attempt);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (key_id, key);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_file_prefix_key UNIQUE (file_prefix);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.receipts
    ADD CONSTRAINT receipts_pkey PRIMARY KEY (job_id);
ALTER TABLE ONLY public.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (id);
CREATE INDEX deliveries_by_job ON public.deliveries USING btree (job_id);
CREATE INDEX deliveries_due ON public.deliveries USING btree (state, due_at);
CREATE INDEX idempotency_keys_by_age ON public.idempotency_keys USING btree (created_at);
CREATE INDEX idempotency_keys_by_job ON public.idempotency_keys USING btree (file_prefix);
CREATE INDEX jobs_by_end ON public.jobs USING btree (finished_at);
CREATE INDEX jobs_by_key ON public.jobs USING btree (key_id, id);
CREATE INDEX jobs_by_state ON public.jobs USING btree (state, id);
CREATE INDEX jobs_by_turn ON public.jobs USING btree (priority, turn);
CREATE INDEX jobs_by_turn_of_key ON public.jobs USING btree (key_id, priority, turn);
CREATE INDEX jobs_in_order ON public.jobs USING btree (state, priority DESC, turn, id);
CREATE INDEX jobs_of_key ON public.jobs USING btree (key_id, state);
CREATE INDEX jobs_unexpired ON public.jobs USING btree (state, finished_at) WHERE (expired_at IS NULL);
ALTER TABLE ONLY public.deliveries
    ADD CONSTRAINT deliveries_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.delivery_attempts
    ADD CONSTRAINT delivery_attempts_delivery_id_fkey FOREIGN KEY (delivery_id) REFERENCES public.deliveries(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_file_prefix_fkey FOREIGN KEY (file_prefix) REFERENCES public.jobs(file_prefix) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED;
ALTER TABLE ONLY public.receipts
    ADD CONSTRAINT receipts_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id) ON DELETE CASCADE;
