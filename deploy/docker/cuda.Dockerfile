# syntax=docker/dockerfile:1
# asyncrl for NVIDIA GPUs, with SGLang; drivers for CUDA 13 on the hosts. SGLang compiles kernels when it starts, for which nvcc and
# headers stay in the image: it is large, some 25 GB.
#
#     docker build -f deploy/docker/cuda.Dockerfile -t asyncrl:cuda .

ARG BASE=nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

FROM ${BASE} AS python
ENV DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008  # versions of a distribution's packages go from its mirrors with the next fix
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked --mount=type=cache,target=/var/lib/apt/lists,sharing=locked \
    apt-get update && apt-get install -y --no-install-recommends \
    build-essential libibverbs1 libnuma1 librdmacm1 ninja-build python3 python3-dev python3-venv

FROM python AS build
ENV PATH=/opt/asyncrl/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/asyncrl
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install torch==2.13.0 transformers==5.12.1 sglang==0.5.20
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# What it depends on first, with an empty package: a change of the code leaves this layer as it is.
# hadolint ignore=DL3013  # their versions stand in pyproject.toml
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir -p asyncrl/report/web && touch asyncrl/__init__.py asyncrl/report/web/uPlot.LICENSE && \
    pip install ".[sglang,math,lora,agents,sentinels]" "ray[default]==2.60.0" && \
    rm -rf asyncrl build
COPY asyncrl asyncrl
RUN pip install --no-deps --no-cache-dir --force-reinstall . && asyncrl --version

FROM python
# The image of Ubuntu brings a user of this number.
RUN userdel --remove ubuntu && useradd --uid 1000 --create-home asyncrl && install -d -o 1000 -g 1000 /runs && \
    echo "export PATH=/opt/asyncrl/bin:\$PATH" > /etc/profile.d/asyncrl.sh
COPY --from=build /opt/asyncrl /opt/asyncrl
COPY --chown=1000:1000 recipes /home/asyncrl/recipes
COPY --chown=1000:1000 deploy /home/asyncrl/deploy
ENV PATH=/opt/asyncrl/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/asyncrl
CMD ["asyncrl", "doctor"]
