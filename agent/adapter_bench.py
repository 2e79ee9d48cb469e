"""Benchmark of sameness: whether llama.cpp, given the export of an adapter, serves what PEFT serves.

The base is the configured GGUF model, unpacked to sixteen bits for both sides: transformers computes with it in float32
(the reference), llama.cpp from a GGUF file of these sixteen bits, and from the quantised file itself, as it is served. At
places in Python's own library, llama.cpp writes greedily. The reference reads each text in one pass: it would have written
the same one if each token is its own likeliest, and so that pass gives both the verdict and its log-probabilities.

`python -m agent.adapter_bench`: a process of its own, since it loads torch; `tabwise bench adapter` starts it.
"""

import argparse
import asyncio
import json
import os
import random
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import adapters, base_facts, catalog, config, fim
from agent.adapters import MODULES
from agent.catalog import LocalModel
from agent.engines.base import Adapter, Decoded, Finished, GenerationRequest
from agent.engines.llamacpp import LlamaCppEngine
from agent.errors import InputError, TabwiseError
from agent.loaded import LoadedModel, prepare

_TOKENS = 16  # of each text: a line
_PREFIX_CHARS, _SUFFIX_CHARS = 320, 120  # 130 tokens or so: the reference reads them in a second on two cores
_BATCH_TOKENS = 64  # in float16, where sizes of batches make no difference that would be seen here
_NEAR_NATS = 0.05  # between the two likeliest tokens where texts part: neither side is wrong
_RANK, _ALPHA = 16, 32
_SHARE = 0.05  # of a matrix's norm that the random adapter adds to it: enough to change many texts, and not all sense


@dataclass(frozen=True, slots=True)
class Text:
    """What llama.cpp wrote."""

    ids: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool
    exact: bool


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a text compares with the reference."""

    same: bool
    near_tie: bool
    """Whether it parts from the reference where that found two tokens about as likely."""
    gaps: tuple[float, ...]
    """Between the log-probabilities of each token, in nats."""


class Reference:
    """The base in transformers and float32, with PEFT."""

    def __init__(self, model: LocalModel) -> None:
        """Unpack a GGUF model into memory."""
        import torch
        import transformers

        library: Any = transformers  # half of it is typed
        self.module = library.AutoModelForCausalLM.from_pretrained(
            str(model.path.parent),
            gguf_file=model.path.name,
            dtype=torch.float16,
            quantization_config=library.GgufConfig(dequantize=True),
            local_files_only=True,
        )
        self.module = self.module.float().eval().requires_grad_(False)
        self._switch: Any = None

    def attach(self, adapter: Adapter) -> None:
        """Have an adapter at hand."""
        from agent.engines.lora import AdapterSwitch

        self._switch = AdapterSwitch(self.module)
        self._switch.attach([adapter])

    def judge(self, prompt_ids: tuple[int, ...], text: Text, stop_ids: frozenset[int], adapter: str | None) -> Verdict:
        """Tell whether this is what the reference writes, and how far apart the log-probabilities are."""
        import torch

        self._switch.select(adapter)
        ids = torch.tensor([[*prompt_ids, *text.ids]])
        with torch.inference_mode():
            logits = self.module(ids, logits_to_keep=len(text.ids) + 1, use_cache=False).logits[0]
        logps = torch.log_softmax(logits, dim=-1)  # (T + 1, V)
        likeliest = logps.argmax(dim=-1).tolist()
        part = next((place for place, one in enumerate(text.ids) if likeliest[place] != one), None)
        # The token at which a text ends is mostly one of its ids already.
        told = not text.ended or (text.ids and text.ids[-1] in stop_ids)
        if part is None and not told and likeliest[-1] not in stop_ids:
            part = len(text.ids)
        first, second = logps[part or 0].topk(2).values.tolist()
        gaps = [abs(float(logps[place, one]) - text.logps[place]) for place, one in enumerate(text.ids)]
        return Verdict(
            part is None, part is not None and first - second < _NEAR_NATS, tuple(gaps if text.exact else ())
        )


def write_float16(source: Path, target: Path) -> None:
    """Write a GGUF model's matrices anew, unpacked to float16; its vectors stay in float32."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    fields = dict(reader.fields)
    writer = gguf.GGUFWriter(target, str(fields.pop("general.architecture").contents()))
    for name, field in fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_random_adapter(module: Any, folder: Path, seed: int) -> None:
    """Save an adapter with random weights in all layers of a model, as PEFT would."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, matrix in module.named_modules():
        if not path.endswith(MODULES):
            continue
        down = torch.randn(_RANK, matrix.in_features, generator=generator)
        up = torch.randn(matrix.out_features, _RANK, generator=generator)
        # The norm of a product of such matrices is the root of the number of all its numbers times the rank.
        norm = (_RANK * matrix.in_features * matrix.out_features) ** 0.5 * _ALPHA / _RANK
        up *= _SHARE * matrix.weight.norm() / norm
        weights |= {f"base_model.model.{path}.lora_{half}.weight": each for half, each in (("A", down), ("B", up))}
    targets = [path.rpartition(".")[2] for path in MODULES]
    LoraConfig(r=_RANK, lora_alpha=_ALPHA, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors")


async def run(folder: Path | None, prompts: int, skip: int, seed: int) -> dict[str, Any]:
    """Compare.

    Args:
        folder: The adapter; None for one of random weights.
        prompts: How many places.
        skip: How many places to leave out first.
        seed: Chooses the places, and the random weights.

    Raises:
        AdapterError: The adapter is refused.
        ModelError: The model cannot be loaded.
        EngineError: The engine broke or refused.
    """
    began = time.perf_counter()
    settings = config.load()
    model = catalog.find(settings.model.name)
    if model.format != "gguf":
        raise InputError(f"model.name is {settings.model.name}, no GGUF model; choose one")
    with tempfile.TemporaryDirectory(prefix="tabwise-") as temporary:
        root = Path(temporary)
        reference = Reference(model)
        write_float16(model.path, root / "f16.gguf")
        quantised = await LlamaCppEngine.load(model.path, settings.engine, root)
        # Not as it is served, so that it may be read faster.
        large = settings.engine.model_copy(update={"batch_tokens": _BATCH_TOKENS})
        plain = await LlamaCppEngine.load(root / "f16.gguf", large, root)
        try:
            loaded = await prepare(model, quantised)
            facts = base_facts.of(model, loaded.fim)
            if folder is None:
                write_random_adapter(reference.module, root, seed)
                adapters.write_manifest(root, facts)
            adapter = adapters.inspect(folder or root, facts)
            reference.attach(adapter)
            places = [await _prompt(loaded, *place) for place in _places(skip + prompts, seed)[skip:]]
            found = await _compare(reference, loaded, quantised, plain, adapter, places)
        finally:
            await quantised.close()
            await plain.close()
    made = "random weights" if folder is None else adapter.name
    took = round(time.perf_counter() - began)
    return {
        "model": model.name,
        "adapter": made,
        "prompts": len(places),
        "skipped": skip,
        "seed": seed,
        **found,
        "s": took,
    }


async def _compare(
    reference: Reference,
    loaded: LoadedModel,
    quantised: LlamaCppEngine,
    plain: LlamaCppEngine,
    adapter: Adapter,
    places: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    before = [await _write(quantised, ids, None) for ids in places]  # no adapter is loaded at all
    await quantised.attach([adapter])
    await plain.attach([adapter])
    counts = dict.fromkeys(
        ("changed_texts", "f16_same", "f16_near_ties", "q4_same", "q4_same_bare", "scale_0_exact"), 0
    )
    gaps: list[float] = []
    for number, (ids, bare) in enumerate(zip(places, before, strict=True), 1):
        exact = await _write(plain, ids, adapter.name)
        served = await _write(quantised, ids, adapter.name)
        verdict = reference.judge(ids, exact, loaded.stop_ids, adapter.name)
        gaps += verdict.gaps
        counts["changed_texts"] += served.ids != bare.ids
        counts["f16_same"] += verdict.same
        counts["f16_near_ties"] += verdict.near_tie
        if (served.ids, served.ended) != (exact.ids, exact.ended):
            verdict = reference.judge(ids, served, loaded.stop_ids, adapter.name)
        counts["q4_same"] += verdict.same
        counts["q4_same_bare"] += reference.judge(ids, bare, loaded.stop_ids, None).same
        counts["scale_0_exact"] += await _write(quantised, ids, None) == bare
        sys.stderr.write(f"\r{number} of {len(places)} places")
    sys.stderr.write("\n")
    return {**counts, "f16_mean_gap_nats": round(sum(gaps) / max(1, len(gaps)), 5), "tokens": len(gaps)}


async def _write(engine: LlamaCppEngine, prompt_ids: tuple[int, ...], adapter: str | None) -> Text:
    ids: list[int] = []
    logps: list[float] = []
    ended, exact = False, True
    # Computed anew each time: what stands in caches was cut into other batches.
    request = GenerationRequest(prompt_ids, _TOKENS, adapter=adapter, cached=False)
    async with aclosing(engine.generate(request)) as stream:
        async for event in stream:
            if isinstance(event, Decoded):
                ids += event.ids
                logps += event.logps
                exact = exact and event.exact
            elif isinstance(event, Finished):
                ended = event.ended
    return Text(tuple(ids), tuple(logps), ended, exact)


def _places(count: int, seed: int) -> list[tuple[str, str]]:
    """Return the texts around random places in the modules of Python's own library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    rng = random.Random(seed)
    found: list[tuple[str, str]] = []
    while len(found) < count:
        text = rng.choice(files).read_text(encoding="utf-8", errors="replace")
        cursor = rng.randrange(max(1, len(text)))
        head, suffix = text[max(0, cursor - _PREFIX_CHARS) : cursor], text[cursor : cursor + _SUFFIX_CHARS]
        if (
            len(head) == _PREFIX_CHARS and (head + suffix).isascii()
        ):  # tokens within a character have no log-probabilities
            found.append((head, suffix))
    return found


async def _prompt(loaded: LoadedModel, head: str, suffix: str) -> tuple[int, ...]:
    line = head.rfind("\n") + 1
    return await loaded.ids(fim.render(loaded.fim, head=head[:line], live=head[line:], suffix=suffix))


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(prog="agent.adapter_bench")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    # No hub is asked, and none is told, whatever the user's shell says.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        found = asyncio.run(run(given.adapter, given.prompts, given.skip, given.seed))
    except ImportError as error:
        sys.exit(f"tabwise: this benchmark needs {error.name}, which is not installed; run: make train-deps")
    except TabwiseError as error:
        sys.exit(f"tabwise: {error}")
    with suppress(BrokenPipeError):
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
