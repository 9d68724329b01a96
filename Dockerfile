# One image for both: `operator`, which needs no rights at all, and `shim`, which the DaemonSet runs as root.
# `make image` builds it, with or without Docker (docs/decisions/0010-image.md).

# A digest, so that the same commit gives the same base. A base of your own: --build-arg BASE=...
ARG BASE=docker.io/library/debian:bookworm-slim@sha256:7b140f374b289a7c2befc338f42ebe6441b7ea838a042bbd5acbfca6ec875818

FROM ${BASE} AS python
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends ca-certificates python3 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

FROM python AS build
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends python3-venv
RUN python3 -m venv /opt/sandkeeper && python3 -m venv /opt/sbom
# pip's own setting: the CA of a mirror, where one stands between.
ARG PIP_CERT
ENV PATH=/opt/sandkeeper/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_QUIET=1
WORKDIR /src
COPY requirements.lock requirements-dev.lock requirements-sbom.lock ./
RUN sed -n '/^setuptools==/,/# via/p' requirements-dev.lock >build.lock \
 && pip install --require-hashes -r requirements.lock -r build.lock \
 && /opt/sbom/bin/pip install --require-hashes -r requirements-sbom.lock
COPY pyproject.toml README.md LICENSE ./
COPY operator operator
RUN pip install --no-deps --no-build-isolation . \
 && pip uninstall -y setuptools pip

FROM python AS programs
# What the oci engine drives (docs/decisions/0005-tools-for-images-and-processes.md).
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
      catatonit conmon crun golang-github-containers-common runc skopeo umoci \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

FROM programs AS sbom
COPY --from=build /opt /opt
COPY hack/sbom.py /opt/
RUN /opt/sbom/bin/python /opt/sbom.py /opt/sandkeeper >/opt/sbom.cdx.json

FROM programs
COPY --from=build /opt/sandkeeper /opt/sandkeeper
# Of Python's distributions and Debian's packages, with their versions.
COPY --from=sbom /opt/sbom.cdx.json /usr/share/sandkeeper/sbom.cdx.json
ENV PATH=/opt/sandkeeper/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["sandkeeper"]
CMD ["operator"]
ARG VERSION=0.1.0
# The commit, and where it can be had; `make image` gives them. Last, for they change with every commit.
ARG REVISION
ARG SOURCE
LABEL org.opencontainers.image.title=sandkeeper \
      org.opencontainers.image.version=${VERSION} \
      org.opencontainers.image.revision=${REVISION} \
      org.opencontainers.image.source=${SOURCE} \
      org.opencontainers.image.licenses=Apache-2.0
