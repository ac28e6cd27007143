# Two images: `--target operator` (no torch) and `--target trainer`. images/build.sh builds both; docs/images.md
# tells what may be set.
#
# BASE_IMAGE: Debian bookworm or newer, or a relative of it, with Python 3.11 or newer as `python3`.
# This one is python:3.11-slim-bookworm (Python 3.11.16) of 2026-09-19.
ARG BASE_IMAGE=python@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

# uv and what builds a wheel; nothing of it is shipped. The secret `ca` is a bundle of certificates to trust
# meanwhile, where the package index is behind a company's own authority.
FROM ${BASE_IMAGE} AS tools
COPY images/tools.sh images/trust.sh images/packages.sh requirements/uv.txt requirements/dev.txt /build/
RUN --mount=type=secret,id=ca sh /build/tools.sh
# Mounted below, buildah 1.28 lacks the last step of a stage that it has in its cache.
WORKDIR /build

# Our own code, as a wheel, in the folders it has in the image.
FROM tools AS code
WORKDIR /source
COPY images/code.sh /build/
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
COPY trainer trainer
RUN sh /build/code.sh

# What both images stand on: Python with an empty environment, and nothing that installs or raises privileges.
FROM ${BASE_IMAGE} AS base
COPY images/base_cleanup.sh /tmp/
RUN sh /tmp/base_cleanup.sh && rm /tmp/base_cleanup.sh && python3 -m venv --without-pip /opt/venv
# A user id of the cluster's choice has no name and no home in the image.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    USER=qlora \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# Locked dependencies: layers that a change of our code leaves as they are. What they are made from is copied
# rather than mounted, since not every builder looks for changes in what is mounted.
FROM base AS operator-dependencies
COPY images/trust.sh images/install.sh images/drop_unused.py requirements/operator.txt /opt/install/
RUN --mount=type=secret,id=ca --mount=type=bind,from=tools,source=/build,target=/build \
    sh /opt/install/install.sh operator.txt

FROM base AS trainer-dependencies
ARG TORCH_INDEX_URL=
COPY images/trust.sh images/install.sh images/drop_unused.py images/packages.sh /opt/install/
# The launcher preloads it into the ranks. Another base may have another version: `--build-arg JEMALLOC=libjemalloc2`.
ARG JEMALLOC=libjemalloc2=5.3.0-1
RUN sh /opt/install/packages.sh "$JEMALLOC"
COPY requirements/trainer.txt requirements/torch.txt /opt/install/
RUN --mount=type=secret,id=ca --mount=type=bind,from=tools,source=/build,target=/build \
    sh /opt/install/install.sh trainer.txt torch.txt

# The backends ccl and mpi, compiled for the very torch and Python of the image, and the kernel library. Of our code
# only what compiles them is copied, so that another change of it leaves this as it is; of this stage only /image is
# shipped.
FROM trainer-dependencies AS backends
COPY images/backends.sh requirements/backends.txt /opt/install/
RUN --mount=type=secret,id=ca --mount=type=bind,from=tools,source=/build,target=/build \
    sh /opt/install/backends.sh
COPY images/compile.sh /opt/install/
COPY trainer/qlora_trainer/__init__.py /source/qlora_trainer/
COPY trainer/qlora_trainer/native /source/qlora_trainer/native
COPY trainer/qlora_trainer/distributed/backends/csrc /source/qlora_trainer/distributed/backends/csrc
COPY trainer/qlora_trainer/kernels/__init__.py trainer/qlora_trainer/kernels/build.py /source/qlora_trainer/kernels/
COPY trainer/qlora_trainer/kernels/csrc /source/qlora_trainer/kernels/csrc
RUN sh /opt/install/compile.sh

FROM operator-dependencies AS operator
COPY --from=code /image/ /
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="qlora-operator" \
      org.opencontainers.image.description="The operator that runs QLoRAJobs on a Kubernetes cluster" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
USER 1000:1000
CMD ["python", "-m", "qlora_operator", "--help"]

FROM trainer-dependencies AS trainer
COPY --from=backends /image/ /
COPY --from=code /image/ /
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="qlora-trainer" \
      org.opencontainers.image.description="The trainer of QLoRAJobs: quantised LoRA fine-tuning on CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
USER 1000:1000
CMD ["qlora", "--help"]
