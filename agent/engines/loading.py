"""From a model's files to a module in memory: a folder of safetensors, or a GGUF file that was unpacked into one.

Knows transformers and bitsandbytes, not what the model is asked. Nothing is downloaded, no code that comes with a model is
run, and only safetensors are read, since other formats of weights are programs.

Invariant: a module is returned only if every weight of it came from the files. (transformers would fill up with chance.)
"""

import gc
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from agent.catalog import LocalModel
from agent.engines import dequantised, out_of_memory, quantisation
from agent.engines.kv_cache import n_cached_layers
from agent.engines.offline import stay_offline
from agent.engines.quantisation import Device, Needs, Quantisation
from agent.engines.vocabulary import Vocabulary
from agent.errors import EngineError, ModelCorruptError, TabwiseError

log = logging.getLogger(__name__)

_DTYPES = {
    Quantisation.NF4: torch.bfloat16,
    Quantisation.BF16: torch.bfloat16,
    Quantisation.FP32: torch.float32,
}


@dataclass(frozen=True, slots=True)
class LoadedTree:
    """A model in memory."""

    module: torch.nn.Module
    """Frozen, in evaluation mode."""
    vocabulary: Vocabulary
    device: torch.device
    quantisation: Quantisation


def load(model: LocalModel, wanted: str, needs: Needs | None = None) -> LoadedTree:
    """Bring a model into memory.

    Args:
        model: Its files.
        wanted: A `Quantisation`, or "auto".
        needs: What it needs in memory; by its files' headers if None.

    Raises:
        EngineError: The libraries are not installed, or too old for the model.
        UnknownModelError: It keeps states that cannot be taken back.
        ModelCorruptError: Files are missing, cut, or of a kind that transformers does not know.
        MemoryFullError: There is no room for it.
    """
    stay_offline()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tree = _load(model, wanted, needs, device)
    except Exception as error:  # noqa: BLE001 - damaged files show in whatever way their reader stumbles
        told = error.bare() if isinstance(error, TabwiseError) else _told(error, model.name, device)
    else:
        log.info("%s is in memory as %s on %s", model.name, tree.quantisation, device)
        return tree
    # Out of the handler, since the error's traceback holds what was loaded.
    gc.collect()  # module trees refer to themselves
    out_of_memory.return_unused(device)
    raise told


def _load(model: LocalModel, wanted: str, needs: Needs | None, device: torch.device) -> LoadedTree:
    _be_quiet()
    folder = dequantised.folder_of(model) if model.format == "gguf" else model.path
    chosen = quantisation.choose(wanted, _facts_of(device), needs or quantisation.needs_of(folder, device.type))
    module, vocabulary = _read(folder, model.name, chosen, device)
    return LoadedTree(module, vocabulary, device, chosen)


def _told(error: Exception, name: str, device: torch.device) -> TabwiseError:
    if out_of_memory.is_out_of_memory(error):
        return out_of_memory.full(device, f"the model {name}")
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, ImportError):
        return EngineError(f"running {name} needs more packages ({reason:.120}); run: make train-deps")
    return ModelCorruptError(f"transformers cannot load {name}: {reason:.300}; pull or copy the model again")


def _be_quiet() -> None:
    from transformers.utils import logging as theirs

    library: Any = theirs
    library.set_verbosity_error()  # what matters of it is checked here, and told in one line
    library.disable_progress_bar()
    # It tells with each layer of each pass that eight bits are reached by way of sixteen.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _facts_of(device: torch.device) -> Device:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Device("cuda", free)
    return Device("cpu", psutil.virtual_memory().available)


def _read(folder: Path, name: str, chosen: Quantisation, device: torch.device) -> tuple[torch.nn.Module, Vocabulary]:
    import transformers

    library: Any = transformers  # half of it is typed
    options: dict[str, Any] = {
        "dtype": _dtype(chosen, device),
        "device_map": {"": device} if device.type == "cuda" or _is_packed(chosen) else None,
        "quantization_config": _packing(chosen, device),
    }
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    n_cached_layers(
        library.AutoConfig.from_pretrained(str(folder), **where), name
    )  # or it refuses, before weights are read
    module, facts = library.AutoModelForCausalLM.from_pretrained(
        str(folder),
        **where,
        use_safetensors=True,
        output_loading_info=True,
        **{key: value for key, value in options.items() if value is not None},
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if odd := sorted(map(str, facts[kind])):
            raise ModelCorruptError(
                f"{name} lacks {len(odd)} weights, or they are of another size ({odd[0]}, …); pull or copy it again"
            )
    tokenizer = library.AutoTokenizer.from_pretrained(str(folder), **where)
    return module.eval().requires_grad_(False), Vocabulary(tokenizer, name, _end_ids(module))


def _is_packed(chosen: Quantisation) -> bool:
    return chosen in (Quantisation.NF4, Quantisation.INT8)


def _dtype(chosen: Quantisation, device: torch.device) -> torch.dtype:
    if chosen is Quantisation.INT8:
        # bitsandbytes multiplies in float16; CPUs do everything else of that very slowly.
        return torch.float16 if device.type == "cuda" else torch.float32
    return _DTYPES[chosen]


def _packing(chosen: Quantisation, device: torch.device) -> Any:
    if not _is_packed(chosen):
        return None
    import transformers

    packing: Any = transformers.BitsAndBytesConfig
    if chosen is Quantisation.INT8:
        return packing(load_in_8bit=True)
    return packing(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_dtype(chosen, device),
    )


def _end_ids(module: Any) -> list[int]:
    """Return the ids of tokens that end a text, as the model's settings name them: one, several, or none."""
    found: list[int] = []
    for settings in (module.generation_config, module.config):
        named = getattr(settings, "eos_token_id", None)
        found += [] if named is None else [named] if isinstance(named, int) else list(named)
    return found
