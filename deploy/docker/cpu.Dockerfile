# syntax=docker/dockerfile:1
# asyncrl without GPUs: small models on the embedded engine; or the head of a cluster, whose driver and store need no GPU.
#
#     docker build -f deploy/docker/cpu.Dockerfile -t asyncrl:cpu .

ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
# torch without CUDA has an index of its own: from PyPI the image would be five times as large.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/opt/asyncrl/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/asyncrl
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --index-url "$TORCH_INDEX" torch==2.13.0
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# What it depends on first, with an empty package: a change of the code leaves this layer as it is.
# hadolint ignore=DL3013  # their versions stand in pyproject.toml
RUN --mount=type=cache,target=/root/.cache/pip \
    mkdir -p asyncrl/report/web && touch asyncrl/__init__.py asyncrl/report/web/uPlot.LICENSE && \
    pip install ".[math,lora,agents,sentinels]" "ray[default]==2.60.0" transformers==5.12.1 && \
    rm -rf asyncrl build
COPY asyncrl asyncrl
RUN pip install --no-deps --no-cache-dir --force-reinstall . && asyncrl --version

FROM ${BASE}
RUN useradd --uid 1000 --create-home asyncrl && install -d -o 1000 -g 1000 /runs && \
    echo "export PATH=/opt/asyncrl/bin:\$PATH" > /etc/profile.d/asyncrl.sh
COPY --from=build /opt/asyncrl /opt/asyncrl
COPY --chown=1000:1000 recipes /home/asyncrl/recipes
COPY --chown=1000:1000 deploy /home/asyncrl/deploy
ENV PATH=/opt/asyncrl/bin:$PATH PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /home/asyncrl
CMD ["asyncrl", "doctor"]
