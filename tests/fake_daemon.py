"""`python -m tests.fake_daemon`: the real daemon process, with a FakeEngine in place of llama.cpp."""

import sys

from agent import serve
from tests.fakes import load_fake

if __name__ == "__main__":
    sys.exit(serve.main(load_fake))
