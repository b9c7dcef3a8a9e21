"""Writes a published draft in this package's own format: safetensors, configuration, the target's tokenizer, a card.

Knows the draft network and its target's files; never loads the target.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from .config import DovetailConfig, describe_head, describe_target, public_name
from .formats import FORMATS, read_config, read_tensors
from .loading import load_tokenizer
from .modeling import DovetailAssistantModel
from .weights import check_fits_config, feature_layers


def convert_draft(source: str, out: Path, target: str | None = None) -> str:
    """Convert a draft; say in a line what it is.

    Args:
        source: folder or name of a draft that `DovetailAssistantModel.from_pretrained` loads.
        out: folder for the result.
        target: folder or name of its target. With it, the fit is checked, the layers that an EAGLE-3 draft reads are
            settled, embeddings that are the target's own are left out, and its tokenizer is added.

    Raises:
        ValueError: if `out` holds a model, the source is a draft of this package, or the draft does not fit the target.
        OSError: if files are missing or damaged, or the result cannot be written.
    """
    out = Path(out)
    if (out / "config.json").exists():
        raise ValueError(f"{out} holds a model; choose another folder")
    if read_config(source, {}).get("model_type") == DovetailConfig.model_type:
        raise ValueError(f"{source} is a draft of this package; there is nothing to convert")
    draft = DovetailAssistantModel.from_pretrained(source)
    tokenizer = None
    if target is not None:
        _settle(draft, AutoConfig.from_pretrained(target), target)
        tokenizer = load_tokenizer("--target", target)
    summary = _summary(draft.config)
    _write(draft, tokenizer, _card(draft.config, summary, public_name(source)), out)
    return summary


def _write(draft: DovetailAssistantModel, tokenizer: PreTrainedTokenizerBase | None, card: str, out: Path) -> None:
    """Write everything beside `out`, then move it there, the configuration last: where that is, all is there.

    Raises:
        OSError: if it cannot be written; `out` is as it was.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as folder:
        fresh = Path(folder)
        try:
            if tokenizer is not None:
                tokenizer.save_pretrained(fresh)
            draft.save_pretrained(fresh)
            (fresh / "README.md").write_text(card, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OSError(f"could not write the draft to {out} ({error}); free some space, convert again") from error
        out.mkdir(exist_ok=True)
        for path in sorted(fresh.iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(out / path.name)


def _settle(draft: DovetailAssistantModel, target: PreTrainedConfig, name: str) -> None:
    """Enter the target into the draft's configuration, and leave out what is the target's own."""
    config = draft.config
    check_fits_config(config, target, name)
    fields = {**describe_target(target), **describe_head(target, config.own_head)}
    if config.fusion == "eagle3":
        fields["feature_layers"] = list(feature_layers(config, target))
    for field, value in fields.items():
        setattr(config, field, value)
    if config.own_embeddings and _are_embeddings_of(name, draft.embed_tokens.weight):
        config.own_embeddings = False
        del draft.embed_tokens


def _are_embeddings_of(target: str, own: torch.Tensor) -> bool:
    """Whether (V, h) embeddings are the target's, in the target's precision."""
    found = read_tensors(target, {}, wanted=lambda name: name.endswith("embed_tokens.weight"))
    return len(found) == 1 and all(torch.equal(own.to(theirs.dtype), theirs) for theirs in found.values())


def _summary(config: DovetailConfig) -> str:
    """What a draft is, in a line."""
    if config.fusion == "none":
        return f"a {config.causal_lm['model_type']} language model of {config.vocab_size} tokens"
    kind = next(each.name for each in FORMATS if each.fusion == config.fusion)
    parts = [f"{kind}, {config.num_hidden_layers} block(s)", f"hidden size {config.hidden_size}"]
    if config.draft_vocab_size:
        parts.append(f"{config.draft_vocab_size} of the target's {config.vocab_size} tokens")
    if config.fusion == "eagle3":
        layers = config.feature_layers
        parts.append(f"reads the inputs of layers {'2, n // 2, n - 3' if layers is None else str(layers)[1:-1]}")
    parts.append("embeddings of its own" if config.own_embeddings else "the target's embeddings")
    if config.fusion == "eagle3" and not config.own_head:
        parts.append("the target's LM head")
    return ", ".join(parts)


def _card(config: DovetailConfig, summary: str, source: str | None) -> str:
    """The model card; its licence is the source's, which only its author can state."""
    base = "" if config.target_name is None else f"base_model: {config.target_name}\n"
    return f"""---
library_name: transformers
{base}tags:
- hf_dovetail
- speculative-decoding
---

# Draft for {config.target_name or "its target"}

Converted from {source} by `hf-dovetail convert`: {summary}. All rights and the licence are those of the source.

```python
import hf_dovetail
from transformers import AutoModelForCausalLM

draft = AutoModelForCausalLM.from_pretrained("this folder")
out = target.generate(**inputs, assistant_model=draft)
```
"""
