# syntax=docker/dockerfile:1
# Targets: `cpu`; `cuda`, the default; `cluster`, which adds Ray to one of them. All have Debian's
# Python 3.11, the one that the tests run on. torch's wheels bring CUDA's libraries and the host brings
# the driver, so the base image is plain Debian. It may be held by a digest: --build-arg BASE=debian:bookworm-slim@sha256:…
ARG BASE=debian:bookworm-slim
# What `cluster` adds Ray to: `cuda` or `cpu`.
ARG CLUSTER_BASE=cuda

# All but torch and our own code.
FROM ${BASE} AS runtime
# The base image fixes the distribution; its security updates are wanted. openssl makes the
# certificates of `inpaint-server takeover init`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssl python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 inpaint \
    && install --directory --owner inpaint --mode 0700 /data /models-cache

WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Dependencies and torch come before our code, so that a change of the code downloads nothing. From
# the index come only wheels whose digest stands in a lock. Locks are complete, which `pip check` sees
# in the end; --no-deps lets them be installed one by one.
COPY configs/locks/runtime.txt configs/locks/
RUN python3 -m venv .venv \
    && pip install --no-deps --require-hashes --only-binary :all: \
        --requirement configs/locks/runtime.txt

# The server refuses to start here without API keys, as it listens beyond loopback: give
# INPAINT_AUTH__KEYS_FILE, or make one in /data with `inpaint-server keys create`.
ENV INPAINT_HOST=0.0.0.0 INPAINT_DATA_DIR=/data HF_HOME=/models-cache
VOLUME ["/data", "/models-cache"]
EXPOSE 8000
# Whether the process answers: one that downloads a model or drains must not be restarted for it.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["inpaint-server", "health"]
# A held request gets its answer, the picture in hand is finished or handed back.
STOPSIGNAL SIGTERM
CMD ["inpaint-server", "serve"]
LABEL org.opencontainers.image.title="inpaint-server" \
    org.opencontainers.image.description="Self-hosted Stable Diffusion inpainting" \
    org.opencontainers.image.licenses="Apache-2.0"

FROM runtime AS wheel
COPY pyproject.toml LICENSE README.md ./
COPY models models
COPY server server
RUN pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheel .

# Tells the clients of a network that the vendor's hosts are here: compose.yaml's `takeover`.
FROM ${BASE} AS dnsmasq
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends dnsmasq-base \
    && rm -rf /var/lib/apt/lists/*
USER 10001
ENTRYPOINT ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--log-facility=-"]

FROM runtime AS cpu
# Where torch is offered without CUDA. The lock has its digest.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
COPY configs/locks/torch-cpu.txt configs/locks/
# The lock has Triton for the tests' interpreter; without a GPU the server has no use for its 700 MB.
RUN pip install --no-deps --require-hashes --only-binary :all: \
        --requirement configs/locks/torch-cpu.txt \
    && pip uninstall --yes triton
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-index --no-deps /wheel/*.whl && pip check
USER 10001

FROM runtime AS cuda
# Triton compiles a launcher in C for each kernel at its first use. Kernels and launchers fit one kind
# of GPU, and a build has none, so the compiler stays and what it makes is kept in /data/compiled.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY configs/locks/torch.txt configs/locks/
RUN pip install --no-deps --require-hashes --only-binary :all: \
        --requirement configs/locks/torch.txt
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --no-index --no-deps /wheel/*.whl && pip check
# What NVIDIA's container toolkit mounts: the driver's libraries for CUDA, and nvidia-smi.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001

# A node of a Ray cluster, docs/ray.md: `docker build --target cluster --tag inpaint-server:cluster .`
FROM ${CLUSTER_BASE} AS cluster
USER 0
WORKDIR /app
COPY configs/locks/cluster.txt configs/locks/
RUN pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: \
        --requirement configs/locks/cluster.txt \
    && pip check
# Kubernetes and Ray ask their own questions.
HEALTHCHECK NONE
USER 10001

# A build that names no target makes the last one.
FROM cuda
