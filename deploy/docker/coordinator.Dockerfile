# The coordinator and the auditor: no torch. Build from the root of the repository:
#   docker build -f deploy/docker/coordinator.Dockerfile -t veilsum-coordinator .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY coordinator coordinator
COPY participant participant
COPY privacy privacy
RUN python3 -m venv /opt/veilsum \
    && /opt/veilsum/bin/pip install --no-cache-dir -c constraints.txt .

FROM ${BASE}
COPY --from=build /opt/veilsum /opt/veilsum
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /data --shell /usr/sbin/nologin veilsum \
    && install --directory --owner=veilsum --mode=0700 /data
USER veilsum
WORKDIR /data
ENV PATH=/opt/veilsum/bin:$PATH VEILSUM_COORDINATOR=/data PYTHONUNBUFFERED=1
VOLUME /data
EXPOSE 7443 7444
# Says why not on standard output, which `docker inspect` keeps.
HEALTHCHECK --interval=60s --timeout=40s --start-period=60s CMD ["veilsum-coordinator", "doctor"]
ENTRYPOINT ["veilsum-coordinator"]
CMD ["serve", "--json-logs"]
