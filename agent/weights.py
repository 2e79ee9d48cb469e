"""How many weights a model has, by its sizes: the kinds that memory treats differently are counted apart.

Pure arithmetic over `catalog.Dimensions`; knows no bytes but those of a GGUF file, which mixes kinds.
"""

from agent.catalog import Dimensions

_Q4_K_M_BITS = 4.85
"""Of linear layers in the catalogue's GGUF files: Q4_K (4.5 bits), and Q6_K (6.56) for half of the values' and down matrices."""
_Q4_K_BITS, _Q6_K_BITS = 4.5, 6.5625
"""Of embeddings, and of the head: Qwen's files hold both, though they are the same numbers (llama.cpp's block formats)."""


def q_width(size: Dimensions) -> int:
    """Return the width of all queries together; not always that of the layers."""
    return size.heads * size.head_dim


def kv_width(size: Dimensions) -> int:
    """Return the width of all keys together, or of all values."""
    return size.kv_heads * size.head_dim


def linear_parameters(size: Dimensions) -> int:
    """Return the weights of the blocks' linear layers, the ones that are quantised."""
    attention = 2 * size.hidden * (q_width(size) + kv_width(size))
    return size.layers * (attention + size.mlp_matrices * size.hidden * size.mlp)


def small_parameters(size: Dimensions) -> int:
    """Return what a model has besides matrices: biases, and the norms' weights, two a block and one at the end."""
    qkv = q_width(size) + 2 * kv_width(size)
    rest = size.hidden + size.hidden + (size.mlp_matrices - 1) * size.mlp
    biases = {"none": 0, "qkv": qkv, "all": qkv + rest}[size.biases]
    return size.layers * (biases + 2 * size.hidden) + size.hidden


def parameters(size: Dimensions) -> int:
    """Return how many weights a model has."""
    table = size.vocabulary * size.hidden
    return linear_parameters(size) + small_parameters(size) + table * (1 if size.tied else 2)


def lora_parameters(size: Dimensions, rank: int) -> int:
    """Return the weights of an adapter on all linear layers of the blocks."""
    attention = 2 * size.hidden + 2 * (q_width(size) + kv_width(size)) + 2 * size.hidden
    return rank * size.layers * (attention + size.mlp_matrices * (size.hidden + size.mlp))


def gguf_bytes(size: Dimensions) -> int:
    """Return about how large the model's Q4_K_M file is: within 3 % for sizes that 256 divides, and too little for others."""
    table = size.vocabulary * size.hidden * (_Q4_K_BITS + _Q6_K_BITS)
    return round((linear_parameters(size) * _Q4_K_M_BITS + table + 32 * small_parameters(size)) / 8)
