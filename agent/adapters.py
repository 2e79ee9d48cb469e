"""LoRA adapters on disk: whether a folder holds one that is whole, and that was made for the model that is loaded.

A folder is as PEFT saves it, with a record of ours beside the weights (`tabwise.json`): which base, tokenizer and prompt
format it was trained on. That is checked first. Then everything that could be served wrongly or not at all: settings
outside of a short list, halves that are missing, shapes that do not fit together, numbers that are none. Weights are read
as safetensors and nothing else, since a pickle runs code. Knows no engine, no torch and no base model's shapes: whoever
attaches an adapter holds it against the model's own.

Source of the method: LoRA, arXiv 2106.09685; of the scaling by the root of the rank: rsLoRA, arXiv 2312.03732.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from agent.engines.base import Adapter
from agent.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix = NDArray[np.float32]

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""What an adapter may change in each layer: the matrices that both PEFT and llama.cpp adapt in the same way. Embeddings,
heads and norms differ between the two."""

_CONFIG, _WEIGHTS, _MANIFEST = "adapter_config.json", "adapter_model.safetensors", "tabwise.json"
_RECORD_BYTES = 1 << 18  # a configuration has 2 KB; one that names 200 modules by their paths has 20
_WEIGHTS_BYTES = 1 << 30  # rank 64 on all matrices of a 7B model has 0.65 GB in float32
_MAX_RANK = 256  # adapters for one user's habits have 8 to 64
_MAX_ALPHA = 1e6  # a few times the rank is usual; JSON has whole numbers that no float can hold
_NAME_CHARS = 40  # of the folder's name; the hash behind it tells adapters apart
_HASH_CHARS = 12
_KEY = re.compile(r"base_model\.model\.(?P<module>model\.layers\.\d+\.(?P<kind>\w+\.\w+))\.lora_(?P<half>[AB])\.weight")

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # The others change the base's weights at the start of training, and an adapter is nothing without that base.
    "init_lora_weights": (True, False, "gaussian"),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
}
"""Settings of PEFT's with a value that means nothing out of the ordinary."""
_WITHOUT_EFFECT = frozenset(
    "base_model_name_or_path revision peft_version task_type inference_mode lora_dropout auto_mapping exclude_modules "
    "layers_to_transform layers_pattern".split()
)
"""Settings that change nothing in what a trained adapter computes: which modules it has, its tensors tell."""
_READ = frozenset("peft_type r lora_alpha target_modules use_rslora".split())


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What an adapter was trained on, or what a loaded model is: they must be equal."""

    base: str
    """Identity of the base model's weights, the same for all quantisations of them."""
    tokenizer: str
    prompt_format: str
    """Name and version of the prompts' layout."""


@dataclass(frozen=True, slots=True)
class Halves:
    """The two matrices of one module: what it computes grows by `scaling * up @ down @ input`."""

    down: "Matrix"
    """(rank, inputs), float32; PEFT calls it A."""
    up: "Matrix"
    """(outputs, rank), float32; PEFT calls it B."""


@dataclass(frozen=True, slots=True)
class Lora:
    """The contents of an adapter."""

    rank: int
    alpha: float
    is_rank_stabilised: bool
    modules: Mapping[str, Halves]
    """By the module's path in transformers' model, "model.layers.0.self_attn.q_proj" for example."""

    @property
    def scaling(self) -> float:
        """Factor of the product of the two halves."""
        return self.alpha / (math.sqrt(self.rank) if self.is_rank_stabilised else self.rank)


@dataclass(frozen=True, slots=True)
class _Settings:
    rank: int
    alpha: float
    is_rank_stabilised: bool
    targets: tuple[str, ...]


def inspect(folder: Path, facts: BaseFacts) -> Adapter:
    """Return the adapter in `folder`, after looking at all of it.

    Args:
        folder: As PEFT saves one, with our record of what it was trained on.
        facts: What the loaded model is.

    Raises:
        AdapterError: It is damaged, incomplete, of an unknown kind, or was made for another model; the message names
            the folder.
    """
    folder = folder.absolute()
    _check_manifest(folder, facts)
    name, _ = _read(folder)
    return Adapter(name, folder)


def load(adapter: Adapter) -> Lora:
    """Return the contents of an adapter.

    Raises:
        AdapterError: It is not what it was when it was inspected.
    """
    name, lora = _read(adapter.folder)
    if name != adapter.name:
        raise AdapterError(
            f"the adapter {adapter.folder} was changed: it is {name} now and was {adapter.name}; serve it anew"
        )
    return lora


def write_manifest(folder: Path, facts: BaseFacts) -> None:
    """Record beside an adapter's weights what it was trained on."""
    temporary = folder / f".{_MANIFEST}.tmp"
    temporary.write_text(json.dumps(asdict(facts), indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / _MANIFEST)


def _check_manifest(folder: Path, facts: BaseFacts) -> None:
    try:
        made_for = TypeAdapter(BaseFacts).validate_python(_json(folder, _MANIFEST))
    except ValidationError:
        raise _refusal(
            folder, f"{_MANIFEST} is no record of an adapter", "write it with adapters.write_manifest"
        ) from None
    for what, wanted, seen in (
        ("base model", facts.base, made_for.base),
        ("tokenizer", facts.tokenizer, made_for.tokenizer),
        ("prompt format", facts.prompt_format, made_for.prompt_format),
    ):
        if wanted != seen:
            raise _refusal(
                folder,
                f"made for the {what} {seen[:40]!r}, loaded is {wanted[:40]!r}",
                "choose the model it was made for",
            )


def _read(folder: Path) -> tuple[str, Lora]:
    settings = _settings(folder)
    raw = _bytes(folder, _WEIGHTS, _WEIGHTS_BYTES)
    # The same matrices with another scaling are another adapter.
    digest = hashlib.sha256(f"{settings.rank} {settings.alpha!r} {settings.is_rank_stabilised}\n".encode())
    digest.update(raw)
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-")[:_NAME_CHARS] or "adapter"
    modules = _modules(folder, settings, raw)
    lora = Lora(settings.rank, settings.alpha, settings.is_rank_stabilised, modules)
    return f"{plain}-{digest.hexdigest()[:_HASH_CHARS]}", lora


def _settings(folder: Path) -> _Settings:
    raw = _json(folder, _CONFIG)
    if raw.get("peft_type") != "LORA":
        raise _refusal(folder, f"peft_type is {raw.get('peft_type')!r}, LORA is known", "train a LoRA adapter")
    for key, value in raw.items():
        ordinary = key in _READ or key in _WITHOUT_EFFECT or value in _DEFAULTS.get(key, ())
        # Settings that a newer PEFT has are off while they are empty.
        if not ordinary and value:
            raise _refusal(folder, f"{key} is {str(value)[:60]!r}, which cannot be served", "train without it")
    rank, alpha, targets = raw.get("r"), raw.get("lora_alpha"), raw.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MAX_RANK:
        raise _refusal(folder, f"r is {rank!r}, it must be from 1 to {_MAX_RANK}", "train with another rank")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= _MAX_ALPHA:
        # llama.cpp takes 0 for "no scaling at all".
        raise _refusal(
            folder,
            f"lora_alpha is {str(alpha)[:60]}, it must be above 0, and {_MAX_ALPHA:.0f} at most",
            "train with another one",
        )
    if not isinstance(targets, list) or not targets or not all(isinstance(each, str) for each in targets):
        raise _refusal(folder, f"target_modules is {str(targets)[:60]!r}", "give it as a list of modules' names")
    return _Settings(rank, float(alpha), raw.get("use_rslora") is True, tuple(targets))


def _modules(folder: Path, settings: _Settings, raw: bytes) -> dict[str, Halves]:
    halves: dict[str, dict[str, Matrix]] = {}
    for key, matrix in _matrices(folder, raw):
        found = _KEY.fullmatch(key)
        if found is None or found["kind"] not in MODULES:
            raise _refusal(folder, f"the tensor {key[:80]!r} cannot be served", f"train on {', '.join(MODULES)} alone")
        halves.setdefault(found["module"], {})[found["half"]] = matrix
    if not halves:
        raise _refusal(folder, f"{_WEIGHTS} holds no tensors", "save it again")
    for module, both in halves.items():
        _check_module(folder, settings, module, both)
    for target in settings.targets:
        if not any(_is_target(target, module) for module in halves):
            raise _refusal(folder, f"the target module {target[:60]!r} has no tensors", "save it again")
    return {module: Halves(both["A"], both["B"]) for module, both in halves.items()}


def _check_module(folder: Path, settings: _Settings, module: str, both: "dict[str, Matrix]") -> None:
    import numpy as np

    if missing := {"A", "B"} - both.keys():
        raise _refusal(folder, f"{module} has no lora_{missing.pop()}", "save it again")
    down, up = both["A"].shape, both["B"].shape
    if down[0] != settings.rank or up[1] != settings.rank:
        raise _refusal(folder, f"{module} has shapes {down} and {up}, r is {settings.rank}", "save it again")
    if not any(_is_target(target, module) for target in settings.targets):
        raise _refusal(folder, f"{module} has tensors and is none of target_modules", "save it again")
    for half, matrix in both.items():
        if not np.isfinite(matrix).all():
            raise _refusal(folder, f"lora_{half} of {module} has values that are no finite numbers", "train it again")


def _is_target(target: str, module: str) -> bool:
    return module == target or module.endswith("." + target)


def _matrices(folder: Path, raw: bytes) -> "list[tuple[str, Matrix]]":
    try:
        import numpy as np
        from safetensors import SafetensorError, deserialize
    except ImportError as error:
        raise AdapterError(
            f"adapters need the package {error.name}, which is not installed; run: make train-deps"
        ) from None
    try:
        tensors = deserialize(raw)  # type: ignore[no-untyped-call]  # of Rust, without types
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise _refusal(folder, f"{_WEIGHTS} is cut or damaged ({reason[:100]})", "copy or save it again") from None
    found = []
    for key, tensor in tensors:
        kind, shape, data = tensor["dtype"], tensor["shape"], tensor["data"]
        if len(shape) != 2 or 0 in shape:
            raise _refusal(folder, f"the tensor {key[:80]!r} has the shape {tuple(shape)}", "save it again")
        if kind == "F32":
            values = np.frombuffer(data, "<f4")
        elif kind == "F16":
            values = np.frombuffer(data, "<f2").astype("f4")
        elif kind == "BF16":  # the upper half of a float32, which numpy does not know by itself
            values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            raise _refusal(folder, f"the tensor {key[:80]!r} is {kind}", "save it as float32, float16 or bfloat16")
        found.append((key, values.reshape(shape)))
    return found


def _json(folder: Path, name: str) -> dict[str, Any]:
    raw = _bytes(folder, name, _RECORD_BYTES)
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise _refusal(folder, f"{name} is no JSON object", "save it again")
    return fields


def _bytes(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    try:
        if not folder.is_dir():
            raise _refusal(folder, "no such folder", "check the path")
        if not path.is_file():
            mend = "was it saved by PEFT, as safetensors?" if name != _MANIFEST else "was it trained by Tabwise?"
            raise _refusal(folder, f"it has no {name}", mend)
        size = path.stat().st_size
        if size > limit:
            raise _refusal(folder, f"{name} has {size} bytes, at most {limit} are read", "train with a smaller rank")
        return path.read_bytes()
    except OSError as error:
        raise _refusal(folder, f"{name} cannot be read ({error.strerror})", "check its permissions") from None


def _refusal(folder: Path, what: str, mend: str) -> AdapterError:
    return AdapterError(f"the adapter {folder} is refused: {what}; {mend}")
