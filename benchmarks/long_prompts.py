"""Long prompts on the CPU and streamed through the accelerator: layers of a 7 B target's shape with random weights.

    python benchmarks/long_prompts.py                    # 4 layers, prompts of 64 to 4,096 tokens
    python benchmarks/long_prompts.py --layers 32        # the whole target, 14 GB

Every prompt is computed in turn on the CPU and streamed, whether that pays or not, so that the measured threshold can
be judged. Writes results/long_prompts.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import common
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_dovetail import prefill, prepare_target
from hf_dovetail.anatomy import CACHE, decoder_layers
from hf_dovetail.prefill.measure import measure
from hf_dovetail.prefill.passes import Streaming
from hf_dovetail.prefill.switch import switch_on
from hf_dovetail.prefill.threshold import least_rows


def target(layers: int, hidden: int, vocabulary: int) -> PreTrainedModel:
    """A Llama in bf16 on the engine of `prepare_target`, its prompts on the CPU."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=8192,
    )  # fmt: skip
    model = prepare_target(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval())
    prefill.remove(model)
    return model


@torch.no_grad()
def prompt_ms(model: PreTrainedModel, ids: Tensor) -> float:
    """Time of one pass over a prompt."""
    begin = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1, **{CACHE: DynamicCache(config=model.config)})
    return 1e3 * (time.perf_counter() - begin)


def compared(model: PreTrainedModel, device: torch.device, rows: int, repeats: int) -> dict[str, Any]:
    """Medians of both ways, in turn, after one of each."""
    ids = torch.randint(model.config.vocab_size, (1, rows))
    decoder, spent = model.get_decoder(), {"cpu_ms": [], "streamed_ms": []}
    for _ in range(repeats + 1):
        spent["cpu_ms"].append(prompt_ms(model, ids))
        streaming = Streaming(device, 1)
        switch_on(decoder, decoder_layers(decoder), streaming)
        spent["streamed_ms"].append(prompt_ms(model, ids))
        prefill.remove(model)
        if streaming.failed:
            sys.exit(f"a prompt of {rows} tokens could not be streamed, see the warning")
    row = {"tokens": rows, **{name: round(statistics.median(times[1:]), 2) for name, times in spent.items()}}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096, help="width; 7 B: 4096")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        sys.exit("there is no accelerator on this machine")
    torch.manual_seed(0)
    device = torch.device(kind.type, torch.accelerator.current_device_index())
    model = target(arguments.layers, arguments.hidden, 32000)
    times = measure(model, device)
    print(times, "->", least_rows(times), flush=True)
    rows = [compared(model, device, count, arguments.repeats) for count in arguments.tokens]
    shape = {"layers": arguments.layers, "hidden": arguments.hidden}
    layer = {"upload_ms": times.upload_ms, "device": times.device, "host": times.host}
    common.write("long_prompts", {"shape": shape, "layer": layer, "least_rows": least_rows(times), "prompts": rows})


if __name__ == "__main__":
    main()
