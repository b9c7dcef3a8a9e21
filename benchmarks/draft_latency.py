"""How long a draft takes for a round: the pair's own, drafts of a 7 B target's shape, and a small LM of 0.5 B.

    python benchmarks/draft_latency.py           # on the accelerator, if there is one; else the pair's draft only
    python benchmarks/draft_latency.py --big     # the large drafts on the CPU too: some 6 GB of memory

A round commits four rows and grows a tree of 16 nodes, depth 7, top-k 10. "issue" is the time until `grow` returns,
"total" until the tree is on the host. On CUDA every case runs with graphs and without. Random weights make trees that
are as wide as they can be; the pair's draft follows real text. The LM runs in lean blocks, and for comparison
with transformers' layers, which no graph holds. Writes results/draft_latency.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import common
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hf_dovetail import DovetailAssistantModel, TreeShape
from hf_dovetail.demo import demo_prompts, load_pair
from hf_dovetail.draft import DraftSession

SHAPE, ROWS, WARM_UP = TreeShape(nodes=16, depth=7, top_k=10), 4, 5
Case = tuple[str, DovetailAssistantModel, Tensor, Tensor | None]


@torch.no_grad()
def pair_case(rounds: int) -> Case:
    """The pair's draft over an answer of its target."""
    target, draft, tokenizer = load_pair()
    device = draft.meet(target)
    ids = tokenizer(demo_prompts()[0], return_tensors="pt").input_ids
    ids = target.generate(ids, min_new_tokens=ROWS * rounds, max_new_tokens=ROWS * rounds, do_sample=False)
    features = target(ids, output_hidden_states=True).hidden_states[-1]
    return "pair", draft, ids.to(device), features.to(device)


@torch.no_grad()
def big_cases(rounds: int, contexts: list[int], draft_device: str) -> Iterator[Case]:
    """Drafts of one and of five blocks in the shape of a 7 B Llama, bf16; of five also with weights in 8 bits."""
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, dtype="bfloat16",
    )  # fmt: skip
    target = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for blocks, bits in ((1, None), (5, None), (5, 8)):
        draft = DovetailAssistantModel.from_target(target, num_hidden_layers=blocks)
        if bits:
            draft._quantise(bits, "this draft")
        draft.draft_device = draft_device
        device = draft.meet(target)
        for context in contexts:
            length = context + ROWS * rounds
            ids = torch.randint(config.vocab_size, (1, length), device=device)
            features = torch.randn(1, length, config.hidden_size, device=device, dtype=torch.bfloat16)
            name = f"7B shape, {blocks} blocks, {context} rows" + (f", {bits} bits" if bits else "")
            yield name, draft, ids, features


@torch.no_grad()
def lm_cases(rounds: int, contexts: list[int], draft_device: str) -> Iterator[Case]:
    """A small LM in the shape of Qwen 2.5 0.5 B, bf16."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    lm = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    for lean in (True, False):
        draft = DovetailAssistantModel.from_causal_lm(lm)
        draft.draft_device = draft_device
        device = draft.meet(draft_target(config))
        if not lean:
            draft._recast = None
        for context in contexts:
            ids = torch.randint(config.vocab_size, (1, context + ROWS * rounds), device=device)
            yield f"0.5B LM, {context} rows" + ("" if lean else ", transformers' layers"), draft, ids, None


def draft_target(config: Qwen2Config) -> Qwen2ForCausalLM:
    """The least target with an LM's vocabulary."""
    small = Qwen2Config(
        vocab_size=config.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1,
    )  # fmt: skip
    return Qwen2ForCausalLM(small).eval()


def measure(case: Case, rounds: int, graphs: bool) -> dict[str, Any]:
    """Medians of one case, in ms."""
    name, draft, ids, features = case
    issue_ms, total_ms = [], []
    session = DraftSession(draft, ids.shape[1] + 128)
    if draft.pool.bench is not None:  # on an accelerator
        draft.pool.bench.captures = graphs
        draft.pool.bench.graphs.clear()
    session.begin(ids[:, :1], 0)
    known = ids.shape[1] - ROWS * rounds
    session.commit(ids[:, 1:known], None if features is None else features[:, : known - 1])
    session.grow(SHAPE).cpu()
    for first in range(known, ids.shape[1], ROWS):
        begin = time.perf_counter()
        new = None if features is None else features[:, first - 1 : first + ROWS - 1]
        session.commit(ids[:, first : first + ROWS], new)
        packed = session.grow(SHAPE)
        issue_ms.append(1e3 * (time.perf_counter() - begin))
        packed.cpu()
        total_ms.append(1e3 * (time.perf_counter() - begin))
    issue, total = (round(statistics.median(times[WARM_UP:]), 3) for times in (issue_ms, total_ms))
    row = {"case": name, "graphs": graphs, "rounds": rounds, "issue_ms": issue, "total_ms": total}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="rounds of a case")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024], help="rows before the first round")
    parser.add_argument("--big", action="store_true", help="the drafts of a 7 B target's shape on the CPU too")
    parser.add_argument("--graphs", choices=["both", "on", "off"], default="both", help="CUDA graphs")
    parser.add_argument("--threads", type=int, help="threads of torch; by default its own choice")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cuda, rows = torch.cuda.is_available(), []
    modes = {"both": [False, True], "on": [True], "off": [False]}[arguments.graphs] if cuda else [False]
    rows += [measure(case, arguments.rounds, graphs) for case in [pair_case(arguments.rounds)] for graphs in modes]
    if arguments.big or torch.accelerator.is_available():
        sizes = arguments.rounds, arguments.contexts, "auto"
        for case in itertools.chain(lm_cases(*sizes), big_cases(*sizes)):
            rows += [measure(case, arguments.rounds, graphs) for graphs in modes]
    shape = {"nodes": SHAPE.nodes, "depth": SHAPE.depth, "top_k": SHAPE.top_k}
    common.write("draft_latency", {"shape": shape, "rows_per_round": ROWS, "cases": rows})


if __name__ == "__main__":
    main()
