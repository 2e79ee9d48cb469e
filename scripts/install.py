"""Installs Tabwise into an environment of its own: `python scripts/install.py [--extra dev] [--extra train]`.

Needs nothing but Python's standard library, 3.11 or newer. Uses pip as the user has configured it. Says how much a CUDA
build of torch would download, and how to avoid it, before it does so on a machine that has no use for it.

Tabwise's packages are called `agent`, `lsp` and `rlhf`. Names as common as these must not meet others: this script
installs only into environments that it made itself.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "tabwise-environment"
"""File in an environment that says that this script made it; holds a hash of what is installed."""
HEAD_S = 5  # for the index to tell one file's size


class InstallError(Exception):
    """The installation cannot go on; the message says what to do."""


def main() -> int:
    """Install, unless what is wanted is there already."""
    parser = argparse.ArgumentParser(description="Install Tabwise into an environment of its own.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extra", action="append", default=[], choices=["dev", "train"])
    parser.add_argument(
        "--torch", default="", help="a requirement or the path of a wheel, in place of the pinned torch"
    )
    parser.add_argument("--cuda", action="store_true", help="download CUDA packages although there is no GPU")
    options = parser.parse_args()
    try:
        install(options.venv.absolute(), sorted(set(options.extra)), options.torch, cuda=options.cuda)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


def install(environment: Path, extras: list[str], torch: str, *, cuda: bool) -> None:
    """Make the environment where it is missing, and have the wanted extras in it."""
    if sys.version_info < (3, 11):
        raise InstallError(
            f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try: make PYTHON=python3.12 …"
        )
    mark = environment / MARK
    made = _make(environment, mark)
    before = {} if made else _installed(mark)
    already = before.get("extras", [])
    extras = sorted({*extras, *(already if isinstance(already, list) else [])})
    torch = torch or str(before.get("torch", ""))  # chosen once, kept
    state = {"extras": extras, "torch": torch, "hash": _hash(torch)}
    if state == before:
        return
    python = environment / ("Scripts" if os.name == "nt" else "bin") / "python"
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        constraints.write_text("\n".join(line for line in lines if not (torch and line.startswith("torch=="))) + "\n")
        if "train" in extras:
            wanted = torch or next(line for line in lines if line.startswith("torch=="))
            if not cuda and not shutil.which("nvidia-smi"):
                _refuse_cuda(python, wanted)
            _pip(python, "install", "-c", str(constraints), wanted)
        target = str(ROOT) + (f"[{','.join(extras)}]" if extras else "")
        print(f"installing tabwise{target.removeprefix(str(ROOT))} into {environment} …", flush=True)
        _pip(python, "install", "-c", str(constraints), "-e", target)
    mark.write_text(json.dumps(state), encoding="utf-8")


def _make(environment: Path, mark: Path) -> bool:
    if environment.exists():
        if not mark.exists():
            raise InstallError(
                f"{environment} was not made by this script, and Tabwise wants an environment of its own; "
                "remove it, or choose another: make VENV=path …"
            )
        return False
    print(f"making an environment in {environment} …", flush=True)
    try:
        venv.EnvBuilder(with_pip=True, symlinks=os.name != "nt").create(environment)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(environment, ignore_errors=True)
        raise InstallError(
            f"cannot make an environment ({error}); on Debian and Ubuntu: apt install python3-venv"
        ) from None
    mark.write_text("{}", encoding="utf-8")
    return True


def _installed(mark: Path) -> dict[str, object]:
    try:
        state = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _hash(torch: str) -> str:
    digest = hashlib.sha256(f"{torch}|{ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def _pip(python: Path, *arguments: str) -> None:
    done = subprocess.run([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments], check=False)
    if done.returncode != 0:
        raise InstallError(f"pip failed (see above); to see more, run: {python} -m pip {' '.join(arguments)}")


def _refuse_cuda(python: Path, wanted: str) -> None:
    """Stop where torch would bring CUDA packages to a machine without a GPU, and say how large they are."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip(python, "install", "--dry-run", "--report", str(report), wanted)
        items = json.loads(report.read_text(encoding="utf-8"))["install"]
    names = {item["metadata"]["name"]: item["download_info"]["url"] for item in items}
    cuda = [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    if not cuda:
        return
    sizes = [_size(names[name]) for name in (*cuda, "torch") if name in names]
    known = sum(size for size in sizes if size)
    gigabytes = f"{known / 1e9:.1f} GB" if known and all(sizes) else "about 3 GB"
    raise InstallError(
        f"{wanted} would download {gigabytes} of CUDA packages ({len(cuda)} of them), and this machine has no NVIDIA GPU. "
        "Take a CPU build instead: make train-deps TORCH='/path/to/torch-…+cpu-….whl', or point pip at PyTorch's index "
        "for the CPU and repeat; to have them all the same: make train-deps CUDA=yes"
    )


def _size(url: str) -> int | None:
    if url.startswith("file:"):
        path = Path(urllib.request.url2pathname(url.removeprefix("file://")))
        return path.stat().st_size if path.exists() else None
    try:
        request = urllib.request.Request(url, method="HEAD")
        with urllib.request.urlopen(request, timeout=HEAD_S) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None  # the figure is a courtesy; without it the message says what was last measured


if __name__ == "__main__":
    sys.exit(main())
