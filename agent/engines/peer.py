"""`python -m agent.engines.peer MODEL SOCKET THREADS CONTEXT`: llama.cpp's own server, which Tabwise is measured against.

Set up as its presets for completion do, but for the batch. It is a process of its own, so that its CPU time can be told
apart, says "ready" when it answers, and ends with its standard input. Knows nothing of who drives it.
"""

import sys
from pathlib import Path

import xllamacpp

BATCH_TOKENS = 512
"""`/infill` takes three quarters of a batch as prefix and one as suffix. The presets' 1024 are for a GPU: on a CPU, a cold
prompt of that size takes ten seconds, which would be no fair comparison."""
_REUSED_CHUNK_TOKENS = 256  # as in llama.cpp's presets for completion
_QUIET = -1


def main(model: str, socket: str, threads: str, context: str) -> None:
    """Serve until standard input ends."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = [socket]
    params.n_parallel = 1
    params.n_ctx = int(context)
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.n_cache_reuse = _REUSED_CHUNK_TOKENS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.ui = False
    params.endpoint_slots = False
    params.fit_params = False
    params.verbosity = _QUIET
    server = xllamacpp.Server(params)
    Path(socket).chmod(0o600)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main(*sys.argv[1:])
