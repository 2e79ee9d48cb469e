"""Writes constraints.txt anew: resolves all extras in a fresh environment and freezes what came."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"  # has a CPU build; raised by hand
HEAD = """\
# The versions that are installed and tested, for all extras. Regenerate with: make pins
# torch is pinned to a release that has a CPU build; TORCH=… replaces it (see README).
"""


def main() -> None:
    """Resolve, freeze, write."""
    with tempfile.TemporaryDirectory() as folder:
        venv.EnvBuilder(with_pip=True).create(folder)
        python = str(Path(folder) / "bin" / "python")
        pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "install", TORCH, f"{ROOT}[dev,train]"], check=True)
        frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout.splitlines()
    pins = sorted(line.lower() for line in frozen if "==" in line and not line.startswith(("tabwise", "torch==")))
    (ROOT / "constraints.txt").write_text(HEAD + "\n".join([*pins, TORCH]) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(pins) + 1} pins written\n")


if __name__ == "__main__":
    main()
