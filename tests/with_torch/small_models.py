"""Models with random weights and small tokenizers, made on the spot: no download, and fast.

Imported by tests that have found torch to be there.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agent.catalog import LocalModel

CODE = '''\
def area(width, height):
    """Return the area of a rectangle."""
    return width * height


def volume(width, height, depth):
    """Return the volume of a box."""
    return area(width, height) * depth
'''
WORDS = 400  # of the vocabulary, added tokens included
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SENTINELS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_sep|>", "<|repo_name|>")
"""Not called special in the tokenizer's file, as in Qwen's."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with words of `CODE`, set up as Qwen's is."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    added = len(SPECIAL) + len(SENTINELS)
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS - added, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([CODE], trainer)
    backend.add_special_tokens([AddedToken(word, normalized=False) for word in SPECIAL])
    backend.add_tokens([AddedToken(word, normalized=False, special=False) for word in SENTINELS])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    return made


def small_module(kind: str = "qwen2", *, seed: int = 0, **changes: Any) -> Any:
    """Return a model of that kind with random weights, large enough that no two tokens are nearly as likely."""
    import transformers

    classes = {
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "starcoder2": (transformers.Starcoder2Config, transformers.Starcoder2ForCausalLM),
    }
    sizes: dict[str, Any] = {
        "vocab_size": WORDS + 12,  # more rows than there are words, as models have
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }
    config, model = classes[kind]
    torch.manual_seed(seed)
    return model(config(**(sizes | changes))).eval()


def save(folder: Path, module: Any | None = None) -> LocalModel:
    """Write a model and its tokenizer into a folder, as the hub has them."""
    (module or small_module()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return LocalModel(str(folder), folder, "safetensors", None, 0, "")
