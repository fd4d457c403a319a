# nemo_cpt on the stack that the figures for GPUs in docs/ were measured with; docs/launching.md says how to use it.
#
#   docker build --tag localhost/nemo-cpt .
#   docker build --tag registry.example/nemo-cpt:1-root --target root .   # SkyPilot installs its own tools as root
#
# hadolint global ignore=DL3008
# (Ubuntu's archive keeps one version of a package: a pin would end the build some day.)

FROM nvidia/cuda:13.0.2-cudnn-devel-ubuntu24.04 AS build
ARG TORCH=2.11.0
ARG TRANSFORMER_ENGINE=2.11.0
# Each job of Transformer Engine's compilation takes some 4 GB of memory.
ARG MAX_JOBS=8
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu130 \
    PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY constraints.txt pyproject.toml ./
# constraints.txt pins the CPU's torch; everything else is the same.
RUN sed "s/^torch==.*/torch==${TORCH}+cu130/" constraints.txt > pins.txt \
    && pip install --constraint pins.txt torch einops ninja packaging pybind11 setuptools wheel
# Its extension is compiled against this torch, hence without isolation.
RUN pip install --constraint pins.txt --no-build-isolation \
    "transformer_engine[core_cu13,pytorch]==${TRANSFORMER_ENGINE}"
# What changes seldom comes before the code, so that a change of the code rebuilds little.
RUN python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > requirements.txt \
    && pip install --constraint pins.txt --requirement requirements.txt
COPY LICENSE README.md ./
COPY executors executors
COPY recipes recipes
COPY nemo_cpt nemo_cpt
RUN pip install --no-deps --no-build-isolation .

FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS root
# gcc and Python's headers: Triton compiles its launchers. CUDA's headers: Transformer Engine compiles kernels when it
# meets a new shape. The verbs' libraries: without them NCCL takes the slow way between nodes that have InfiniBand.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        cuda-cudart-dev-13-0 gcc ibverbs-providers libc6-dev libgomp1 libibverbs1 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

FROM root
# Whoever runs it, as Pyxis and `docker run --user` do, has a home to write caches into and a name for torch to ask for.
RUN install --directory --mode 1777 /home/nemo_cpt
ENV HOME=/home/nemo_cpt USER=nemo_cpt
WORKDIR /home/nemo_cpt
USER 1000
