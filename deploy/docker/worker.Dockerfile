# syntax=docker/dockerfile:1
# The GPU worker. The root may be read-only; /models, /loras, /run/zlora and /tmp are written.
#
#   docker build -f deploy/docker/worker.Dockerfile --target worker -t z-image-lora/worker:0.1.0 .
#
# worker   downloads the model into /models at the first start, or has it mounted
#          (ZLORA_MODEL=/models/<folder>)
# baked    has the model in the image, under /model; needs build arg MODEL, and the network at build only
#
# Size. Measured where the tests run: the 73 packages of '.[worker]' have 1,151 MB, 647 of them torch
# for CPUs. Estimated: torch 2.13 for CUDA 13 and the 19 packages that it needs are 2.7 GB of wheels by
# pip's logs, and take about 5 GB (1.8 times as much, as measured with CUDA 12); the base image has
# 0.13 GB, SDXL in fp16 7 GB.
#   worker, CPU torch    1.3 GB
#   worker, CUDA torch   5.6 GB, 3.0 GB to pull
#   baked, CUDA torch    12.6 GB
# By digest: --build-arg PYTHON=python:3.11.15-slim-trixie@sha256:..., see docs/operations.md.
ARG PYTHON=python:3.11.15-slim-trixie
FROM ${PYTHON} AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app

FROM base AS wheel
COPY deploy/docker/build.lock /build.lock
RUN pip install --require-hashes --no-deps --requirement /build.lock
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
COPY worker worker
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base AS worker
RUN useradd --no-create-home --uid 10001 zlora && install -d -o zlora -g zlora /models /loras /run/zlora
COPY deploy/docker/worker.lock /worker.lock
# Another index for torch alone, without CUDA's packages and without a hash: its wheels of the same
# version differ. All else is compared with the hashes of the list.
ARG TORCH_INDEX=""
RUN if [ -n "$TORCH_INDEX" ]; then \
        pip install --index-url "$TORCH_INDEX" --no-deps "$(grep -o '^torch==[^ ]*' /worker.lock)" \
        && sed -E -e '/^nvidia-ml-py=/b' -e '/^(torch|triton|nvidia-|cuda-)/d' /worker.lock > /tmp/packages.lock; \
    else cp /worker.lock /tmp/packages.lock; fi \
    && pip install --require-hashes --no-deps --requirement /tmp/packages.lock \
    && rm /tmp/packages.lock
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl && pip check
ENV HOME=/tmp ZLORA_HOME=/models HF_HOME=/models/huggingface ZLORA_LORA_CACHE=/loras ZLORA_PROBES=/run/zlora
USER 10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["sh", "-c", "test -f /run/zlora/ready && test -n \"$(find /run/zlora/alive -mmin -1)\""]
CMD ["celery", "-A", "zlora_worker.app", "worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle", "-n", "sdxl@%h"]

FROM worker AS baked
ARG MODEL=stabilityai/stable-diffusion-xl-base-1.0
# Another model needs its own commit, or `main`.
ARG REVISION=462165984030d82259a11f4367a4eed129e94a7b
USER 0
# In diffusers' layout, only weights in fp16: a worker loads these on CUDA.
RUN HF_HOME=/tmp/hf hf download "$MODEL" --revision "$REVISION" --local-dir /model --include '*.json' --include '*.txt' \
    --include '*.fp16.safetensors' --exclude 'vae_1_0/*' && rm -rf /model/.cache /tmp/hf
USER 10001
ENV ZLORA_MODEL=/model
