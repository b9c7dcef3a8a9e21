"""How many of a target's layers fit into a memory budget of an accelerator, by bytes.

Pure: sizes go in, a plan comes out. Knows no modules and no devices (`dispatch` moves, `prepare` measures).

First what the draft needs, then the LM head (one copy, shared by draft and target), then as many of the last layers as
fit, each with its share of the cache. The last ones, since a pass then crosses to the device once: first layers there
would bring the hidden states back to the host, while the draft, which reads what leaves the last layer, waits on the
device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GIB, MIB = 1 << 30, 1 << 20
_LOST_SHARE = 64
"""One part in so many of a budget goes to the allocator's rounding."""


@dataclass(frozen=True)
class TargetSizes:
    """A target, in bytes.

    Args:
        layers: weights and buffers of each decoder layer.
        positions: keys and values of one position in each layer's cache.
        tail: what follows the last layer, before the LM head.
        head: the LM head, with its bias.
        embedding: the embedding matrix.
        tied: whether the LM head is the embedding matrix.
        row: most that a pass holds at once within a layer, for one row.
        key: likewise for one position that the rows look at (grouped keys and values, repeated).
        pair: likewise for a row and a position that it looks at (scores of eager attention).
        tail_row: most that is held behind the last layer, for one row.
        logits_row: logits of one row, in the model's precision and in float32.
    """

    layers: tuple[int, ...]
    positions: tuple[int, ...]
    tail: int
    head: int
    embedding: int
    tied: bool
    row: int
    key: int
    pair: int
    tail_row: int
    logits_row: int


@dataclass(frozen=True)
class DraftSizes:
    """A draft, in bytes.

    Args:
        weights: of its own, all blocks included.
        blocks: weights of each block.
        eighth: what its own matrices would take with one byte per weight, in place of what they take now.
        position: keys and values of one position, of all blocks.
        spare_rows: positions that its cache has beyond the context, for a tree.
        extent: its cache comes in multiples of so many positions.
        prompt_row: features that wait, for each position of a prompt.
        working: most that computing its rows and their logits takes.
        shares_embedding: whether it draws on the target's.
    """

    weights: int
    blocks: tuple[int, ...]
    eighth: int
    position: int
    spare_rows: int
    extent: int
    prompt_row: int
    working: int
    shares_embedding: bool

    def cache(self, context: int) -> int:
        """Its cache, for so many positions."""
        return self.position * -(-(context + self.spare_rows) // self.extent) * self.extent

    def with_blocks(self, count: int) -> DraftSizes:
        """The same draft with its first `count` blocks."""
        left_out, position = sum(self.blocks[count:]), self.position * count // len(self.blocks)
        return replace(self, weights=self.weights - left_out, blocks=self.blocks[:count], position=position)

    def in_8_bits(self) -> DraftSizes:
        """The same draft with one byte per weight of its matrices."""
        return replace(self, weights=self.eighth)


@dataclass(frozen=True)
class Limits:
    """What a plan must respect.

    Args:
        budget: bytes of the device that may be used.
        context: positions, prompt and answer together, that caches are planned for.
        nodes: most nodes of a tree.
        headroom: bytes that libraries were measured to take for themselves.
    """

    budget: int
    context: int
    nodes: int
    headroom: int


@dataclass(frozen=True)
class Plan:
    """What goes to the device.

    Args:
        limits: what it was made for.
        layers: how many of the target's last layers; with them goes all that follows.
        of_layers: layers that the target has.
        items: what takes how many bytes, in the order in which it was planned.
    """

    limits: Limits
    layers: int
    of_layers: int
    items: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes planned."""
        return sum(size for _, size in self.items)

    def of(self, *names: str) -> int:
        """Bytes of these items, such as `of(*WEIGHTS)`: what a device's memory grows by when a target is prepared."""
        return sum(size for name, size in self.items if name in names)

    def table(self) -> str:
        """The plan as text, one line for each item, and what is left."""
        budget = self.limits.budget
        rows = [*self.items, ("in all", self.total), ("left of the budget", budget - self.total)]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}} {size / MIB:>10,.1f} MiB {100 * size / budget:>6.1f} %" for name, size in rows]
        rule = "-" * len(lines[0])
        head = f"{self.layers} of {self.of_layers} target layers, {self.limits.context} positions, {shown(budget)}"
        return "\n".join((head, rule, *lines[:-2], rule, *lines[-2:]))


WEIGHTS = ("draft", "embeddings", "LM head", "final norm", "target layers")
"""The items of a plan that are weights; they stay as long as the target is prepared."""


def plan(target: TargetSizes, draft: DraftSizes | None, limits: Limits) -> Plan:
    """The most of a target that fits behind its draft.

    Args:
        target: its sizes.
        draft: of the draft that works on the same device, or None.
        limits: budget, context, nodes and headroom.

    Raises:
        ValueError: if not even the draft and the LM head fit, saying what would.
    """
    best = planned(target, draft, limits, 0)
    if best.total > limits.budget:
        raise ValueError(_too_small(target, draft, limits, best))
    for layers in range(1, len(target.layers) + 1):
        larger = planned(target, draft, limits, layers)
        if larger.total > limits.budget:
            break
        best = larger
    return best


def planned(target: TargetSizes, draft: DraftSizes | None, limits: Limits, layers: int) -> Plan:
    """The plan with the target's last `layers` layers, whether it fits or not."""
    first, context = len(target.layers) - layers, limits.context
    rows = limits.nodes + 1
    items = [("headroom", limits.headroom + limits.budget // _LOST_SHARE)]
    if draft is not None:
        items += [("draft", draft.weights), ("draft's cache", draft.cache(context))]
        if draft.shares_embedding and not target.tied:
            items.append(("embeddings", target.embedding))
    items += [("LM head", target.head), ("final norm", target.tail)]
    if layers:
        items.append(("target layers", sum(target.layers[first:])))
        items.append(("their cache", sum(target.positions[first:]) * (context + rows)))
    items.append(("working space", _working(target, draft, limits, layers)))
    return Plan(limits, layers, len(target.layers), tuple(items))


def _working(target: TargetSizes, draft: DraftSizes | None, limits: Limits, layers: int) -> int:
    """The largest of the passes: the whole prompt through the last layers, a tree through them, the draft's own."""
    context, rows = limits.context, limits.nodes + 1
    prompt = context * target.tail_row
    tree = rows * (target.tail_row + target.logits_row)
    if layers:
        prompt = context * max(target.row + context * target.pair, target.tail_row)
        tree = max(tree, rows * target.row + context * (target.key + rows * target.pair))
    drafting = 0 if draft is None else context * draft.prompt_row + draft.working
    return max(prompt, tree, drafting)


def _too_small(target: TargetSizes, draft: DraftSizes | None, limits: Limits, least: Plan) -> str:
    """What does not fit, and what would."""
    ways = [] if draft is None else _smaller_drafts(target, draft, limits)
    context = _longest_context(target, draft, limits)
    if context:
        ways.append(f"a context of {context} positions")
    what = "the LM head" if draft is None else "the draft, its cache and the LM head"
    names = ", ".join(f"{name} {shown(size)}" for name, size in least.items)
    advice = f"; what would fit: {' or '.join(ways)}" if ways else "; no single change makes it fit"
    return (
        f"vram_budget is {shown(limits.budget)}, but {what} take {shown(least.total)} at a context of "
        f"{limits.context} positions ({names}){advice}"
    )


def _smaller_drafts(target: TargetSizes, draft: DraftSizes, limits: Limits) -> list[str]:
    def fits(smaller: DraftSizes) -> bool:
        return planned(target, smaller, limits, 0).total <= limits.budget

    ways = []
    blocks = [count for count in range(1, len(draft.blocks)) if fits(draft.with_blocks(count))]
    if blocks:
        ways.append(f"a draft of {blocks[-1]} block{'s' if blocks[-1] > 1 else ''} in place of {len(draft.blocks)}")
    if draft.eighth < draft.weights and fits(draft.in_8_bits()):
        ways.append("the draft in int8")
    return ways


def _longest_context(target: TargetSizes, draft: DraftSizes | None, limits: Limits) -> int:
    """The longest context, in steps of 256 positions, with which the least plan fits; 0 if there is none."""
    for context in range((limits.context - 1) // 256 * 256, 0, -256):
        if planned(target, draft, replace(limits, context=context), 0).total <= limits.budget:
            return context
    return 0


def shown(size: int) -> str:
    """Bytes in the unit that suits them."""
    unit, name = (GIB, "GiB") if size >= GIB else (MIB, "MiB")
    return f"{size / unit:.2f} {name}"
