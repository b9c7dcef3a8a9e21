"""The planner: bytes against arithmetic done by hand, the most that fits and not a byte more, and what it says else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf_dovetail.placement import GIB, MIB, DraftSizes, Limits, TargetSizes, plan, planned

WIDTH, INNER, VOCAB, LAYERS = 4096, 11008, 32000, 32
LAYER = 2 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)
HEAD = 2 * VOCAB * WIDTH
FUSION = 2 * (4 * WIDTH * WIDTH + WIDTH)
POSITION = 2 * 32 * 128 * 2  # keys and values, 32 heads of 128, bf16

LLAMA_2_7B = TargetSizes(
    layers=(LAYER,) * LAYERS,
    positions=(POSITION,) * LAYERS,
    tail=2 * WIDTH,
    head=HEAD,
    embedding=HEAD,
    tied=False,
    row=2 * 3 * (WIDTH + INNER),
    key=0,
    pair=0,
    tail_row=12 * WIDTH,
    logits_row=6 * VOCAB,
)
FIRST_BLOCK = LAYER - 2 * WIDTH  # no norm before its attention
DRAFT = DraftSizes(
    weights=FUSION + FIRST_BLOCK + 4 * LAYER,
    blocks=(FIRST_BLOCK, *(LAYER,) * 4),
    eighth=(FUSION + FIRST_BLOCK + 4 * LAYER) // 2,
    position=5 * POSITION,
    spare_rows=190,
    extent=256,
    prompt_row=2 * 2 * WIDTH,
    working=256 * 2 * 3 * (WIDTH + INNER) + 120 * VOCAB,
    shares_embedding=True,
)
LIMITS = Limits(budget=7 * GIB, context=2048, nodes=31, headroom=96 * MIB)


def test_a_7_b_target_in_7_gib_by_hand() -> None:
    made = plan(LLAMA_2_7B, DRAFT, LIMITS)
    cache = 5 * 16384 * 2304  # 2048 + 190 positions, in steps of 256
    prompt = 2048 * 90624  # the MLP of the whole prompt is the largest pass
    fixed = 96 * MIB + 7 * GIB // 64 + 2_158_051_328 + cache + 2 * 262_144_000 + 8192 + prompt
    per_layer = 404_766_720 + 16384 * (2048 + 32)
    assert made.layers == (7 * GIB - fixed) // per_layer == 9
    assert made.total == fixed + 9 * per_layer <= 7 * GIB
    assert dict(made.items) == {
        "headroom": 96 * MIB + 7 * GIB // 64,
        "draft": 2_158_051_328,
        "draft's cache": cache,
        "embeddings": 262_144_000,
        "LM head": 262_144_000,
        "final norm": 8192,
        "target layers": 9 * 404_766_720,
        "their cache": 9 * 16384 * 2080,
        "working space": prompt,
    }


def test_the_papers_3_gib_hold_its_draft_and_no_layer() -> None:
    """Five blocks with embeddings and LM head need 2.95 GiB in the paper."""
    made = plan(LLAMA_2_7B, DRAFT, replace(LIMITS, budget=3 * GIB))
    assert made.layers == 0
    assert 2.7 * GIB < made.total < 3 * GIB
    assert made.of("working space") == 2048 * 12 * WIDTH  # the last norm of the prompt


@pytest.mark.parametrize("draft", [DRAFT, None])
@pytest.mark.parametrize("layers", [1, 2, 17, LAYERS])
def test_the_plan_is_the_most_that_fits(layers: int, draft: DraftSizes | None) -> None:
    without_rounding = planned(LLAMA_2_7B, draft, replace(LIMITS, budget=0), layers).total
    least = without_rounding * 64 // 63 - 2
    while least - least // 64 < without_rounding:  # one part in 64 is the allocator's
        least += 1
    made, smaller = (plan(LLAMA_2_7B, draft, replace(LIMITS, budget=size)) for size in (least, least - 1))
    assert (made.layers, made.total) == (layers, least)
    assert smaller.layers == layers - 1


def test_layers_are_counted_from_the_last_each_with_its_own_size() -> None:
    """Guards mixtures with a dense first layer, and caches that differ between layers."""
    uneven = replace(LLAMA_2_7B, layers=(GIB, 5 * MIB, 6 * MIB), positions=(4096, 0, 512))
    limits = replace(LIMITS, budget=GIB)
    made = plan(uneven, None, limits)
    assert made.layers == 2
    assert made.of("target layers") == 11 * MIB
    assert made.of("their cache") == 512 * (2048 + 32)
    assert plan(uneven, None, replace(limits, budget=3 * GIB)).of("target layers") == GIB + 11 * MIB


def test_shared_weights_are_counted_once() -> None:
    tied = plan(replace(LLAMA_2_7B, tied=True), DRAFT, LIMITS)
    assert tied.of("embeddings") == 0
    assert tied.of("LM head") == HEAD
    own = plan(LLAMA_2_7B, replace(DRAFT, shares_embedding=False), LIMITS)
    assert own.of("embeddings") == 0
    assert plan(LLAMA_2_7B, None, LIMITS).of("embeddings", "draft", "draft's cache") == 0


def test_eager_attention_and_repeated_keys_take_room() -> None:
    limits = replace(LIMITS, budget=40 * GIB)
    eager = plan(replace(LLAMA_2_7B, pair=32 * 8), DRAFT, limits)
    assert eager.of("working space") == 2048 * (90624 + 2048 * 32 * 8)
    repeated = plan(replace(LLAMA_2_7B, key=1 << 20), DRAFT, limits)
    assert repeated.of("working space") == 2048 * (1 << 20) + 32 * 90624


def test_too_small_a_budget_says_what_would_fit() -> None:
    limits = replace(LIMITS, budget=9 * GIB // 4)
    with pytest.raises(
        ValueError, match=r"vram_budget is 2\.25 GiB, but the draft, its cache and the LM head"
    ) as error:
        plan(LLAMA_2_7B, DRAFT, limits)
    said = str(error.value)
    assert "draft 2.01 GiB" in said
    assert "what would fit: a draft of 3 blocks in place of 5 or the draft in int8" in said
    assert "or a context" not in said  # 2.65 GiB without a single position
    for fits, draft in ((True, DRAFT.with_blocks(3)), (False, DRAFT.with_blocks(4)), (True, DRAFT.in_8_bits())):
        assert (planned(LLAMA_2_7B, draft, limits, 0).total <= limits.budget) is fits
    with pytest.raises(ValueError, match=r"what would fit: .* or a context of (\d+) positions") as error:
        plan(LLAMA_2_7B, DRAFT, replace(LIMITS, budget=28 * GIB // 10))
    context = int(str(error.value).split()[-2])
    for longer, fits in ((0, True), (256, False)):
        tried = replace(LIMITS, budget=28 * GIB // 10, context=context + longer)
        assert (planned(LLAMA_2_7B, DRAFT, tried, 0).total <= tried.budget) is fits
    with pytest.raises(ValueError, match="no single change makes it fit"):
        plan(LLAMA_2_7B, DRAFT, replace(LIMITS, budget=GIB // 2))
    with pytest.raises(ValueError, match="but the LM head take"):
        plan(LLAMA_2_7B, None, replace(LIMITS, budget=GIB // 8))


def test_the_table_adds_up() -> None:
    made = plan(LLAMA_2_7B, DRAFT, LIMITS)
    lines = made.table().splitlines()
    assert lines[0] == "9 of 32 target layers, 2048 positions, 7.00 GiB"
    assert lines[-2].split()[2] == f"{made.total / MIB:,.1f}"
    shares = [float(line.split()[-2]) for line in lines if line.endswith("%")]
    assert sum(shares[:-2]) == pytest.approx(shares[-2], abs=0.5)
    assert sum(shares[-2:]) == pytest.approx(100, abs=0.11)
    assert len({len(line) for line in lines[1:]}) == 1
