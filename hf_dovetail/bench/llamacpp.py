"""Rows of llama.cpp on the same target, prompts and threads, through `llama-cpp-python` and `gguf` (both optional).

The target is written as GGUF in half precision and quantised by llama.cpp itself, so that every matrix has the type
that llama.cpp gives it; token ids are fed directly, and the file's vocabulary holds placeholders.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from .rows import PLAIN, Answer

TYPES = ("Q8_0", "Q4_0")
LOOKUP = "lookup-10"
ROW_NAMES = (PLAIN, LOOKUP)
"""Plain greedy decoding, and llama-cpp-python's own prompt lookup of 10 tokens (n-grams of at most 2)."""

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def why_not(model: PreTrainedModel) -> str | None:
    """Why llama.cpp cannot be measured with this target, or None."""
    missing = [name for name in ("llama_cpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install llama-cpp-python gguf)"
    if type(model) is not LlamaForCausalLM:
        return f"this target is a {type(model).__name__}; the GGUF file is written for LlamaForCausalLM only"
    rope = (model.config.rope_parameters or {}).get("rope_type", "default")
    if rope != "default" or model.config.attention_bias or model.config.mlp_bias:
        return f"the GGUF file is written for plain RoPE without biases only, not for rope_type {rope!r}"
    return None


def write_files(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """Write the target to `folder` in each of `TYPES`; the paths by type. Needs `why_not` to be None."""
    half = folder / "half.gguf"
    _write_half(model, half)
    paths = {kind: _quantised(half, kind) for kind in TYPES}
    half.unlink()
    return paths


def _write_half(model: PreTrainedModel, path: Path) -> None:
    """The target's weights as float16, its norms as float32, with the sizes that llama.cpp asks for."""
    from gguf import GGUFWriter, TokenType

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{token}>".encode() for token in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([TokenType.NORMAL] * config.vocab_size)
    for name, array in _tensors(model):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays as llama.cpp wants them."""
    config = model.config
    yield "token_embd.weight", _half(model.get_input_embeddings().weight)
    yield "output_norm.weight", model.model.norm.weight.detach().float().numpy()
    if not config.tie_word_embeddings:
        yield "output.weight", _half(model.get_output_embeddings().weight)
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in _NAMES.items():
            weight = layer.get_submodule(ours).weight.detach()
            if ours in heads:
                weight = _interleaved(weight, heads[ours])
            yield f"blk.{index}.{theirs}.weight", _half(weight) if weight.ndim == 2 else weight.float().numpy()


def _half(weight: Tensor) -> np.ndarray:
    return weight.detach().to(torch.float16).numpy()


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """The rows of each head from transformers' RoPE order (halves) to llama.cpp's (pairs)."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _quantised(half: Path, kind: str) -> Path:
    import llama_cpp

    path = half.with_name(f"{kind}.gguf")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.nthread = torch.get_num_threads()
    with _quiet():
        status = llama_cpp.llama_model_quantize(str(half).encode(), str(path).encode(), parameters)
    if status != 0:
        raise OSError(f"llama.cpp could not write {path} (status {status}); is the disk full?")
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """llama.cpp logs every tensor; keep errors only."""
    import ctypes

    import llama_cpp

    @llama_cpp.llama_log_callback
    def errors_only(level: int, text: bytes, data: Any) -> None:
        if level == 4:  # GGML_LOG_LEVEL_ERROR
            print(text.decode(errors="replace"), end="")

    llama_cpp.llama_log_set(errors_only, ctypes.c_void_p(0))
    try:
        yield
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, ctypes.c_void_p(0))


class LlamaCpp:
    """One GGUF file, opened once for each row.

    Args:
        path: the file.
        positions: longest prompt and answer together.

    Attributes:
        file_bytes: the file's size, which is what a token reads, but for the vocabulary.
    """

    def __init__(self, path: Path, positions: int) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        options = {
            "model_path": str(path),
            "n_ctx": positions,
            "n_threads": threads,
            "n_threads_batch": threads,
            "verbose": False,
        }
        self.file_bytes = path.stat().st_size
        self._lookup = _counting_lookup()
        self._models = {PLAIN: Llama(**options), LOOKUP: Llama(**options, draft_model=self._lookup)}

    def answer(self, row: str, prompt: Tensor, new_tokens: int) -> Answer:
        """Decode greedily from the (1, n) prompt, timed."""
        model, tokens = self._models[row], []
        model.reset()
        self._lookup.calls = 0
        begin = time.perf_counter()
        for token in model.generate(prompt[0].tolist(), temp=0.0, repeat_penalty=1.0):
            if not tokens:
                first = time.perf_counter()
            tokens.append(int(token))
            if len(tokens) == new_tokens:
                break
        end = time.perf_counter()
        return Answer(
            tokens=tuple(tokens),
            wall_ms=1e3 * (end - begin),
            decode_ms=1e3 * (end - first),
            decoded=new_tokens - 1,
            rounds=self._lookup.calls if row == LOOKUP else new_tokens - 1,
        )

    def close(self) -> None:
        """Free the models' memory."""
        for model in self._models.values():
            model.close()
        self._models.clear()
        gc.collect()


def _counting_lookup() -> Any:
    """llama-cpp-python's prompt lookup, which counts its calls: one for each forward pass after the prompt's."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    class CountingLookup(LlamaPromptLookupDecoding):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return super().__call__(*args, **kwargs)

    return CountingLookup(max_ngram_size=2, num_pred_tokens=10)
