# The image for Kubernetes and HyperPod, see docs/hyperpod.md: docker build -t REGISTRY/distill:TAG .
# CUDA's libraries are part of PyTorch's packages; the base image adds the settings of NVIDIA's container runtime.
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${CUDA_IMAGE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends build-essential python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /build
# Dependencies first: they are installed again only if their versions change.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src/requirements.txt src/setup.sh src/
COPY src/limbeck src/limbeck
RUN src/setup.sh /opt/limbeck

FROM ${CUDA_IMAGE}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc and Python's headers compile Triton's launchers at run time.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates curl gcc libc6-dev python3 python3-dev \
 && rm -rf /var/lib/apt/lists/*
# EFA: libfabric and the plugin through which NCCL uses it. Empty for networks without EFA.
ARG EFA_VERSION=1.48.0
WORKDIR /tmp/efa
# hadolint ignore=DL3008
RUN if [ -n "${EFA_VERSION}" ]; then \
      curl -fsSL --retry 3 "https://efa-installer.amazonaws.com/aws-efa-installer-${EFA_VERSION}.tar.gz" | tar -xz --strip-components=1 \
      && apt-get update \
      && ./efa_installer.sh -y --skip-kmod --skip-limit-conf --no-verify \
      && rm -rf /tmp/efa/* /var/lib/apt/lists/* \
      && ldconfig; \
    fi
# Some of Ubuntu's images have a user with the id 1000.
RUN (! id -u ubuntu || userdel --remove ubuntu) \
 && useradd --create-home --uid 1000 limbeck
COPY --from=build /opt/limbeck /opt/limbeck
COPY src/distil_logits_cli.py /distillation/
ENV PATH=/opt/limbeck/bin:/opt/amazon/efa/bin:${PATH} \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /distillation
# A GPU that has fallen off the bus makes nvidia-smi fail; without GPUs there is nothing to check. Kubernetes ignores this.
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s \
  CMD ["bash", "-c", "test ! -e /dev/nvidiactl || nvidia-smi -L > /dev/null"]
CMD ["limbeck", "--help"]
