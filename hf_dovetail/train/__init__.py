"""Training a draft: data, the target's features, losses, the loop, and validation by real decoding."""

from .capture import StoredFeatures, capture_features
from .features import LiveFeatures, capture
from .loop import Extras, train_draft
from .losses import draft_loss
from .own_text import Answering, answerable, continue_stream, regenerate
from .records import Skipped, read_records
from .text import Windows, hold_out, load_windows, pack, read_texts, token_stream
from .validate import load_prompts, validate

__all__ = [
    "Answering",
    "Extras",
    "LiveFeatures",
    "Skipped",
    "StoredFeatures",
    "Windows",
    "answerable",
    "capture",
    "capture_features",
    "continue_stream",
    "draft_loss",
    "hold_out",
    "load_prompts",
    "load_windows",
    "pack",
    "read_records",
    "read_texts",
    "regenerate",
    "token_stream",
    "train_draft",
    "validate",
]
