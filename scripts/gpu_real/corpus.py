"""Step 1: Python source of the installed packages, as tokens, and the tokenizer trained on it.

Permissive licences only (`PACKAGES`); packages that are not installed are left out. One file in 25 is held out by its
name, as in `demo_corpus`. A file with the longest line of a HumanEval prompt is left out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from demo_corpus import MAX_LINE_CHARS, SKIPPED_FOLDERS, is_held_out
from train_demo_target import train_tokenizer
from transformers import PreTrainedTokenizerFast

from .plan import MAX_POSITIONS, Size, Work, read_json, write_json

PROMPTS = Path(__file__).resolve().parents[2] / "tests" / "data" / "humaneval_prompts.jsonl"
FOREIGN_FOLDERS = {"_vendor", "vendor", "_vendored", "vendored", "externals", "third_party", "extern", "dist-packages"}
MAX_FILE_BYTES = 400_000
TELLING_CHARS = 40  # the longest line of a prompt tells it apart if it is at least so long
FILES_AT_A_TIME = 512

STANDARD_LIBRARY = "python"
PACKAGES = (  # distribution, top-level module, licence of its Python source
    ("networkx", "networkx", "BSD-3-Clause"),
    ("sympy", "sympy", "BSD-3-Clause"),
    ("mpmath", "mpmath", "BSD-3-Clause"),
    ("numpy", "numpy", "BSD-3-Clause"),
    ("scipy", "scipy", "BSD-3-Clause"),
    ("pandas", "pandas", "BSD-3-Clause"),
    ("scikit-learn", "sklearn", "BSD-3-Clause"),
    ("scikit-image", "skimage", "BSD-3-Clause"),
    ("statsmodels", "statsmodels", "BSD-3-Clause"),
    ("seaborn", "seaborn", "BSD-3-Clause"),
    ("patsy", "patsy", "BSD-2-Clause"),
    ("formulaic", "formulaic", "MIT"),
    ("matplotlib", "matplotlib", "Matplotlib (PSF-based)"),
    ("torch", "torch", "BSD-3-Clause"),
    ("torchvision", "torchvision", "BSD-3-Clause"),
    ("torchaudio", "torchaudio", "BSD-2-Clause"),
    ("torch-geometric", "torch_geometric", "MIT"),
    ("torchmetrics", "torchmetrics", "Apache-2.0"),
    ("torchdiffeq", "torchdiffeq", "MIT"),
    ("triton", "triton", "MIT"),
    ("transformers", "transformers", "Apache-2.0"),
    ("accelerate", "accelerate", "Apache-2.0"),
    ("peft", "peft", "Apache-2.0"),
    ("timm", "timm", "Apache-2.0"),
    ("sentence-transformers", "sentence_transformers", "Apache-2.0"),
    ("huggingface_hub", "huggingface_hub", "Apache-2.0"),
    ("lightning", "lightning", "Apache-2.0"),
    ("botorch", "botorch", "MIT"),
    ("gpytorch", "gpytorch", "MIT"),
    ("linear-operator", "linear_operator", "MIT"),
    ("e3nn", "e3nn", "MIT"),
    ("jax", "jax", "Apache-2.0"),
    ("flax", "flax", "Apache-2.0"),
    ("optax", "optax", "Apache-2.0"),
    ("chex", "chex", "Apache-2.0"),
    ("diffrax", "diffrax", "Apache-2.0"),
    ("equinox", "equinox", "Apache-2.0"),
    ("lineax", "lineax", "Apache-2.0"),
    ("optimistix", "optimistix", "Apache-2.0"),
    ("numpyro", "numpyro", "Apache-2.0"),
    ("treescope", "treescope", "Apache-2.0"),
    ("etils", "etils", "Apache-2.0"),
    ("absl-py", "absl", "Apache-2.0"),
    ("opt_einsum", "opt_einsum", "MIT"),
    ("einops", "einops", "MIT"),
    ("numba", "numba", "BSD-2-Clause"),
    ("llvmlite", "llvmlite", "BSD-2-Clause"),
    ("cupy-cuda13x", "cupy", "MIT"),
    ("xarray", "xarray", "Apache-2.0"),
    ("pyarrow", "pyarrow", "Apache-2.0"),
    ("h5py", "h5py", "BSD-3-Clause"),
    ("onnx", "onnx", "Apache-2.0"),
    ("onnxscript", "onnxscript", "MIT"),
    ("sacrebleu", "sacrebleu", "Apache-2.0"),
    ("fonttools", "fontTools", "MIT"),
    ("pillow", "PIL", "MIT-CMU"),
    ("imageio", "imageio", "BSD-2-Clause"),
    ("tifffile", "tifffile", "BSD-3-Clause"),
    ("joblib", "joblib", "BSD-3-Clause"),
    ("fsspec", "fsspec", "BSD-3-Clause"),
    ("cloudpickle", "cloudpickle", "BSD-3-Clause"),
    ("toolz", "toolz", "BSD-3-Clause"),
    ("narwhals", "narwhals", "MIT"),
    ("aiohttp", "aiohttp", "Apache-2.0"),
    ("requests", "requests", "Apache-2.0"),
    ("urllib3", "urllib3", "MIT"),
    ("werkzeug", "werkzeug", "BSD-3-Clause"),
    ("anyio", "anyio", "MIT"),
    ("rich", "rich", "MIT"),
    ("click", "click", "BSD-3-Clause"),
    ("jinja2", "jinja2", "BSD-3-Clause"),
    ("pygments", "pygments", "BSD-2-Clause"),
    ("cython", "Cython", "Apache-2.0"),
    ("coverage", "coverage", "Apache-2.0"),
    ("pytest", "_pytest", "MIT"),
    ("setuptools", "setuptools", "MIT"),
    ("packaging", "packaging", "Apache-2.0 or BSD-2-Clause"),
    ("pip", "pip", "MIT"),
)


@dataclass
class Part:
    """What one package gives: its version and licence, and the texts of each split."""

    name: str
    version: str
    licence: str
    training: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)


def package_roots() -> Iterator[tuple[Part, Path]]:
    """The packages that are installed here, each with its folder; nothing is imported."""
    yield Part(STANDARD_LIBRARY, platform.python_version(), "PSF-2.0"), Path(sysconfig.get_paths()["stdlib"])
    for name, module, licence in PACKAGES:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            continue
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        yield Part(name, version, licence), Path(next(iter(spec.submodule_search_locations)))


def telling_lines(prompts: Path = PROMPTS) -> set[str]:
    """The longest line of each HumanEval prompt, stripped."""
    texts = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    longest = (max((line.strip() for line in text.splitlines()), key=len) for text in texts)
    return {line for line in longest if len(line) >= TELLING_CHARS}


def read_parts(max_files: int | None) -> tuple[list[Part], dict[str, int]]:
    """The texts of every package, each text once, and how many files were left out and why."""
    parts, seen, forbidden = [], set(), telling_lines()
    left_out = {"unreadable or long lines": 0, "same text as another": 0, "contains a HumanEval prompt": 0}
    count = 0
    for part, root in package_roots():
        parts.append(part)
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if (SKIPPED_FOLDERS | FOREIGN_FOLDERS).intersection(relative.parts):
                continue
            if max_files is not None and count >= max_files:
                return parts, left_out
            text = _text(path)
            if text is None:
                left_out["unreadable or long lines"] += 1
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if digest in seen:
                left_out["same text as another"] += 1
                continue
            if forbidden.intersection(line.strip() for line in text.splitlines()):
                left_out["contains a HumanEval prompt"] += 1
                continue
            seen.add(digest)
            count += 1
            held_out = is_held_out(f"{root.name}/{relative.as_posix()}")
            (part.held_out if held_out else part.training).append(text)
    return parts, left_out


def _text(path: Path) -> str | None:
    """The file's text, if it is source that a person may have written."""
    if path.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text if text.strip() and max(map(len, text.splitlines())) <= MAX_LINE_CHARS else None


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one uint16 stream, each opened by the separator; on all cores."""
    backend, opening = tokenizer.backend_tokenizer, np.array([tokenizer.eos_token_id], dtype=np.uint16)
    pieces = [np.empty(0, dtype=np.uint16)]
    for begin in range(0, len(texts), FILES_AT_A_TIME):
        for encoding in backend.encode_batch_fast(texts[begin : begin + FILES_AT_A_TIME], add_special_tokens=False):
            pieces += [opening, np.array(encoding.ids, dtype=np.uint16)]
    return np.concatenate(pieces)


def make_corpus(work: Work, size: Size) -> dict[str, Any]:
    """Write `train.npy`, `held_out.npy` (uint16), the tokenizer and `corpus.json`; return the latter's content.

    Raises:
        ValueError: if the vocabulary does not fit uint16.
    """
    done = work.corpus / "corpus.json"
    if done.exists():
        print(f"{done} is there already", flush=True)
        return read_json(done)
    if size.vocab_size > 1 << 16:
        raise ValueError(f"vocab_size is {size.vocab_size}; tokens are kept as uint16, so at most {1 << 16}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    begin = time.perf_counter()
    parts, left_out = read_parts(size.max_files)
    parts = [part for part in parts if part.training or part.held_out]
    texts = [text for part in parts for text in part.training]
    print(f"{len(texts):,} files, {sum(map(len, texts)):,} characters, {_since(begin)}", flush=True)
    every = max(1, round(sum(map(len, texts)) / size.tokenizer_bytes))  # about `tokenizer_bytes` are read
    tokenizer = train_tokenizer(texts[::every], size.vocab_size, MAX_POSITIONS)
    print(f"tokenizer of {len(tokenizer):,} tokens, {_since(begin)}", flush=True)
    work.corpus.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(work.corpus)
    record: dict[str, Any] = {"packages": [], "left_out_files": left_out, "vocab_size": len(tokenizer)}
    streams: dict[str, list[np.ndarray]] = {"train": [], "held_out": []}
    for part in parts:
        streams["train"].append(encode(tokenizer, part.training))
        streams["held_out"].append(encode(tokenizer, part.held_out))
        record["packages"].append(
            {
                "name": part.name,
                "version": part.version,
                "licence": part.licence,
                "files": len(part.training) + len(part.held_out),
                "tokens": len(streams["train"][-1]),
                "held_out_tokens": len(streams["held_out"][-1]),
            }
        )
    for split, pieces in streams.items():
        stream = np.concatenate(pieces)
        np.save(work.corpus / f"{split}.npy", stream)
        record[f"{split}_tokens"] = len(stream)
    record["characters_per_token"] = round(sum(map(len, texts)) / record["train_tokens"], 3)
    record["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(done, record)
    print(f"{record['train_tokens']:,} tokens, {record['held_out_tokens']:,} held out, {_since(begin)}", flush=True)
    return record


def _since(begin: float) -> str:
    return f"{time.perf_counter() - begin:.1f} s"
