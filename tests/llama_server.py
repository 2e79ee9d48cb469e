"""`python -m tests.llama_server MODEL PORT SLOTS CONTEXT`: llama.cpp's own server, on a port of loopback.

The key that it wants is the first line of its standard input, so that no list of processes shows it. Says "ready" when it
answers, and ends with its standard input.
"""

import sys

import xllamacpp


def main(model: str, port: str, slots: str, context: str) -> None:
    """Serve until standard input ends."""
    key = sys.stdin.readline().strip()
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.api_keys = [key]
    params.n_parallel = int(slots)
    params.n_ctx = int(slots) * int(context)
    # As in our own engine: other batches sum in another order, and the two are compared.
    params.n_batch = params.n_ubatch = 7
    params.no_extra_bufts = True
    params.ui = False
    params.fit_params = False
    params.cache_ram_mib = 0
    params.verbosity = -1
    server = xllamacpp.Server(params)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main(*sys.argv[1:])
