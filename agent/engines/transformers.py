"""transformers: a model as a tree of PyTorch modules, in this process, on a GPU or a CPU.

The shell around the decode loop. All that touches the model happens in one worker thread; here, work is handed over and
awaited, one step of a stream at a time, so that nothing is computed that nobody asked for, and a stream that is closed
leaves the thread free. Tokenising happens here, at once: it takes microseconds.

Imports torch only when a model is loaded. Knows nothing of prompts' layouts.
"""

import contextlib
import gc
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from agent.catalog import LocalModel
from agent.config import EngineSettings
from agent.engines.base import Adapter, Event, GenerationRequest, Token
from agent.engines.offline import stay_offline
from agent.engines.quantisation import Needs, Quantisation
from agent.engines.worker import Worker
from agent.errors import EngineError
from agent.types import Chat

if TYPE_CHECKING:
    from agent.engines.decoding import DecodeLoop
    from agent.engines.loading import LoadedTree

T = TypeVar("T")

_CHUNK_TOKENS = {"cuda": 512, "cpu": 64}
"""Prompt tokens in one pass. A cancel waits for one: a third of a second on two cores with the 0.5B (measured), and a GPU is
left idle by small ones (not measured)."""


class TransformersEngine:
    """A model in memory."""

    def __init__(self, worker: Worker, tree: "LoadedTree", loop: "DecodeLoop", twin: Any) -> None:
        """Wrap what was loaded; use `load`."""
        self.quantisation: Quantisation = tree.quantisation
        self.device: str = str(tree.device)
        self.on_gpu: bool = tree.device.type == "cuda"
        self._worker = worker
        self._tree: LoadedTree | None = tree
        self._vocabulary = tree.vocabulary
        self._loop = loop
        self._module: Any = tree.module
        self._twin = twin
        self._switch: Any = None

    @classmethod
    async def load(
        cls, model: LocalModel, settings: EngineSettings, *, needs: Needs | None = None, drafts: bool = True
    ) -> "TransformersEngine":
        """Load a model.

        Args:
            model: A folder of safetensors or a GGUF file.
            settings: How to run it.
            needs: Bytes that it needs in memory, by quantisation; by its files' sizes if None.
            drafts: Whether to guess tokens and check several at once, where that is faster.

        Raises:
            EngineError: The libraries are not installed.
            ModelError: The model's files cannot be used.
            MemoryFullError: It does not fit.
        """
        worker = Worker("engine")
        try:
            tree, loop, twin = await worker.finish(partial(_load, model, settings, needs, drafts=drafts))
        except BaseException:
            worker.end()
            raise
        return cls(worker, tree, loop, twin)

    @property
    def context_tokens(self) -> int:
        """Most tokens of prompt and answer together; shrinks where the memory turns out to be too small."""
        return self._loop.context_tokens

    async def tokenize(self, text: str, *, special: bool = False) -> list[Token]:
        """Return the tokens of `text`."""
        return self._vocabulary.tokenize(text, special=special)

    async def start_ids(self) -> tuple[int, ...]:
        """Return the ids with which every prompt begins."""
        return self._vocabulary.start_ids

    async def chat_ids(self, chat: Chat) -> tuple[int, ...]:
        """Return the prompt for a chat, in the model's own template."""
        return self._vocabulary.chat_ids(chat)

    def held(self, prompt_ids: tuple[int, ...], adapter: str | None = None) -> int:
        """Return how many tokens at the beginning of a completion's prompt are computed already, with this adapter."""
        return self._loop.held(prompt_ids, adapter)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """Continue a prompt."""
        steps = self._loop.stream(request)
        try:
            while (event := await self._worker.run(partial(next, steps, None))) is not None:
                yield event
        finally:
            # Runs behind the step under way: when it is done, the thread is free.
            with contextlib.suppress(EngineError):  # unloaded meanwhile
                await self._worker.finish(partial(_close, steps))

    async def attach(self, adapters: Sequence[Adapter]) -> None:
        """Serve these adapters, and no others."""
        await self._worker.finish(partial(self._attach, tuple(adapters)))

    def _attach(self, adapters: tuple[Adapter, ...]) -> None:
        if self._switch is None:
            if not adapters:
                return
            from agent.engines.lora import AdapterSwitch

            self._switch = AdapterSwitch(self._module)
        self._switch.attach(adapters)
        self._loop.serve(self._switch.names, self._switch.select)

    async def with_model(self, work: Callable[[Any], T]) -> T:
        """Return what `work` makes of the module tree, in the worker thread."""
        return await self._worker.finish(lambda: work(self._module))

    async def twin(self) -> Any:
        """Return another module tree over the same weights, for training; a new one each time."""
        return await self._worker.finish(self._new_twin)

    def _new_twin(self) -> Any:
        from agent.engines.twin import twin_of

        return twin_of(self._twin)

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return self._vocabulary.end_ids

    def without_drafts(self) -> "TransformersEngine":
        """Return another engine over the same model, in the same thread, with caches of its own and no drafts.

        For measurements. It ends with this one, and must not be closed by itself.
        """
        if self._tree is None:
            raise EngineError("the model was unloaded; ask again")
        return TransformersEngine(self._worker, self._tree, self._loop.without_drafts(), self._twin)

    async def generate_from_scratch(self, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], float]:
        """Return what transformers' own loop writes, and the seconds that it took; for measurements."""
        from agent.engines import reference

        return await self.with_model(lambda module: reference.generate(module, prompt, new_tokens, self.end_ids))

    async def close(self) -> None:
        """Free the model's memory. Streams still open end with an error."""
        with contextlib.suppress(EngineError):  # closed before
            await self._worker.finish(self._free)
        self._worker.end()

    def _free(self) -> None:
        self._loop.let_go()
        self._module = self._twin = self._switch = self._tree = None
        gc.collect()  # module trees refer to themselves
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()


def _close(steps: Any) -> None:
    steps.close()


def _load(
    model: LocalModel, settings: EngineSettings, needs: Needs | None, *, drafts: bool
) -> "tuple[LoadedTree, DecodeLoop, Any]":
    stay_offline()
    try:
        import torch

        from agent.engines import loading
        from agent.engines.decoding import DecodeLoop
        from agent.engines.kv_cache import Shelf, n_cached_layers
        from agent.engines.twin import twin_of
    except ImportError as error:
        raise EngineError(
            f"running {model.name} in transformers needs more packages ({error}); run: make train-deps, "
            "or choose a GGUF file in model.name"
        ) from None
    # Holds for the thread that sets it.
    torch.set_num_threads(settings.threads or psutil.cpu_count(logical=False) or 1)
    tree = loading.load(model, settings.quantisation, needs)
    facts: Any = tree.module.config
    longest = getattr(facts.get_text_config(decoder=True), "max_position_embeddings", settings.context_tokens)
    loop = DecodeLoop(
        tree.module,
        tree.vocabulary,
        Shelf(n_cached_layers(facts, model.name), settings.completion_slots),
        tree.device,
        context_tokens=min(settings.context_tokens, longest),
        chunk_tokens=settings.batch_tokens or _CHUNK_TOKENS[tree.device.type],
        drafts=drafts,
    )
    # Made now, while the tree is as it was loaded: adapters will wrap it.
    return tree, loop, twin_of(tree.module)
