# syntax=docker/dockerfile:1
# CUDA's own libraries come with the torch wheel; the base image adds what the driver needs to find.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# The base image fixes the distribution; its security updates are wanted. Triton builds its kernels'
# launchers with a C compiler at their first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --create-home --uid 10001 inpaint \
    && install --directory --owner inpaint --mode 0700 /data /models-cache

WORKDIR /app
ENV PATH=/app/.venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# Dependencies first, so that a change of our code does not download torch again. From the index come
# only wheels whose digest stands in a lock.
COPY configs/locks/runtime.txt configs/locks/torch.txt configs/locks/
RUN python3 -m venv .venv \
    && pip install --require-hashes --only-binary :all: \
        --requirement configs/locks/runtime.txt --requirement configs/locks/torch.txt
COPY pyproject.toml LICENSE README.md ./
RUN mkdir models server && touch models/__init__.py server/__init__.py \
    && pip install --no-index --no-deps --no-build-isolation --editable . \
    && pip check
COPY models models
COPY server server
COPY configs configs

USER 10001
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
