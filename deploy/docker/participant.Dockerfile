# A site: training with torch. BASE may be an image with CUDA and Python 3.11 or newer with venv:
#   docker build -f deploy/docker/participant.Dockerfile -t veilsum-participant --build-arg BASE=... .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
# Extras of the distribution; "gguf" for base models in GGUF files, "quantized" for those in 4 bits, "fast" for masks on VAES instructions.
ARG EXTRAS=participant,gguf,fast
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY coordinator coordinator
COPY participant participant
COPY privacy privacy
RUN python3 -m venv /opt/veilsum \
    && /opt/veilsum/bin/pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"

FROM ${BASE}
COPY --from=build /opt/veilsum /opt/veilsum
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin veilsum \
    && install --directory --owner=veilsum --mode=0700 /data
USER veilsum
WORKDIR /data
ENV PATH=/opt/veilsum/bin:$PATH VEILSUM_PARTICIPANT=/data HOME=/data HF_HOME=/data/hub PYTHONUNBUFFERED=1
VOLUME /data
ENTRYPOINT ["veilsum-participant"]
CMD ["run", "--json-logs"]
