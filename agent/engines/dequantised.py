"""GGUF files for transformers: unpacked once into a folder of safetensors, which is kept.

The folder's name is the hash of the file it was made from (`catalog.dequantised_dir`), so that another file never finds
it; it appears under that name only whole, and only this user can enter it. Unpacking is transformers' own. Weights are
kept in sixteen bits, a finer grid than the one that they were quantised to; a file with matrices of thirty-two bits keeps
those. Vectors (norms and biases) stay as they are in the file, to the bit: adapters know their base by them.
"""

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent import catalog, paths
from agent.catalog import LocalModel
from agent.errors import ModelCorruptError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def folder_of(model: LocalModel) -> Path:
    """Return the folder with the weights of a GGUF file, which is made where it is missing.

    Raises:
        ModelCorruptError: transformers cannot read the file.
    """
    folder = catalog.dequantised_dir(model.sha256 or catalog.sha256_of(model.path))
    if folder.is_dir():
        return folder
    parent = paths.private_dir(folder.parent)
    # mkdtemp makes it for this user alone.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name[:12]}-", dir=parent))
    try:
        log.info("unpacking %s once for transformers, into %s", model.name, folder)
        _unpack(model.path, unfinished)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # and not: another process was faster
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _unpack(file: Path, folder: Path) -> None:
    import transformers

    library: Any = transformers  # half of it is typed
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        module, facts = library.AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=_kept_dtype(file),
            quantization_config=library.GgufConfig(dequantize=True),
            output_loading_info=True,
            **where,
        )
        tokenizer = library.AutoTokenizer.from_pretrained(str(file.parent), **where)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file shows in whatever way the reader stumbles
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelCorruptError(
            f"transformers cannot unpack {file}: {reason:.200}; run it in llama.cpp, or give the model's own folder"
        ) from None
    if missing := sorted(facts["missing_keys"]):
        raise ModelCorruptError(f"{file} lacks {len(missing)} tensors ({missing[0]}, …); pull or copy it again")
    _put_vectors(file, module)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _put_vectors(file: Path, module: "torch.nn.Module") -> None:
    """Have the vectors in thirty-two bits again, where transformers did nothing to them but round them."""
    import numpy as np
    import torch
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFReader, get_tensor_name_map

    reader = GGUFReader(file)
    field = reader.get_field("general.architecture")
    kinds = [kind for kind, name in MODEL_ARCH_NAMES.items() if field is not None and name == field.contents()]
    settings: Any = module.config
    names = get_tensor_name_map(kinds[0], settings.num_hidden_layers) if kinds else None
    wide = {each.name: each for each in reader.tensors if each.tensor_type == GGMLQuantizationType.F32}
    for name, parameter in module.named_parameters():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias")) if names and parameter.dim() == 1 else None
        if theirs in wide:
            values = torch.from_numpy(np.array(wide[theirs].data))
            if torch.equal(values.to(parameter.dtype), parameter):
                parameter.data = values


def _kept_dtype(file: Path) -> "torch.dtype":
    import torch
    from gguf import GGMLQuantizationType, GGUFReader

    kinds = {each.tensor_type for each in GGUFReader(file).tensors if len(each.shape) > 1}
    if GGMLQuantizationType.F32 in kinds:
        return torch.float32
    return torch.bfloat16 if GGMLQuantizationType.BF16 in kinds else torch.float16
