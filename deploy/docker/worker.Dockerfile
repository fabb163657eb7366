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
FROM python:3.11.15-slim-trixie AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app

# The list of dependencies alone: the layer with torch is built again only if the list changes, not
# with every change of pyproject.toml.
FROM base AS requirements
COPY pyproject.toml ./
COPY deploy/docker/requirements.py ./
RUN python requirements.py pyproject.toml worker > /requirements.txt

FROM base AS wheel
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY producer producer
COPY worker worker
RUN pip wheel --no-deps --wheel-dir /wheels .

FROM base AS worker
RUN useradd --no-create-home --uid 10001 zlora && install -d -o zlora -g zlora /models /loras /run/zlora
COPY deploy/docker/constraints.txt /constraints.txt
COPY --from=requirements /requirements.txt /requirements.txt
# Another index for torch alone; its dependencies come from PyPI in the pinned versions. Without
# another index pip installs the CUDA wheels.
ARG TORCH_INDEX=""
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX" --no-deps} --constraint /constraints.txt torch \
    && pip install --constraint /constraints.txt --requirement /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels pip install --no-deps /wheels/*.whl
ENV HOME=/tmp ZLORA_HOME=/models HF_HOME=/models/huggingface ZLORA_LORA_CACHE=/loras ZLORA_PROBES=/run/zlora
USER 10001
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["sh", "-c", "test -f /run/zlora/ready && test -n \"$(find /run/zlora/alive -mmin -1)\""]
CMD ["celery", "-A", "zlora_worker.app", "worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle", "-n", "sdxl@%h"]

FROM worker AS baked
ARG MODEL=stabilityai/stable-diffusion-xl-base-1.0
USER 0
# In diffusers' layout, only weights in fp16: a worker loads these on CUDA.
RUN HF_HOME=/tmp/hf hf download "$MODEL" --local-dir /model --include '*.json' --include '*.txt' \
    --include '*.fp16.safetensors' --exclude 'vae_1_0/*' && rm -rf /model/.cache /tmp/hf
USER 10001
ENV ZLORA_MODEL=/model
