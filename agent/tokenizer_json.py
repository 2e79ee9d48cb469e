"""The words of a model folder's vocabulary, from its tokenizer.json: enough to tell which format of prompts it knows.

Knows the file's layout, not how text becomes tokens. Needs no tokenizers library, which belongs to training.
"""

import json
from pathlib import Path
from typing import Any

from agent.errors import ModelCorruptError


def vocabulary(folder: Path) -> frozenset[str]:
    """Return all words, those that were added included; none where the folder has no such file.

    Raises:
        ModelCorruptError: The file cannot be read.
    """
    file = folder / "tokenizer.json"
    try:
        facts: Any = json.loads(file.read_bytes())
        words = facts["model"]["vocab"]  # by word, or as pairs of word and score
        pieces = words if isinstance(words, dict) else [pair[0] for pair in words]
        return frozenset((*pieces, *(each["content"] for each in facts.get("added_tokens", ()))))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "not the file of a tokenizer"
        raise ModelCorruptError(f"{file} cannot be read ({reason}); pull or copy the model again") from None
