"""The draft network: a fusion and decoder blocks (`blocks`), or any small causal LM in their place.

Knows weights and one forward step; knows nothing of trees, rounds, checkpoints or generation. Embeddings and the LM
head are the target's own (`SharedWeights`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .anatomy import CACHE
from .attention import BranchingMask
from .blocks import KeyValueStore, RMSNorm, RotaryTable, Rotation, finish_logits, fold_mask, make_blocks, make_fusion
from .cache import GrowingCache, num_cache_layers
from .config import DovetailConfig
from .eight_bits import EightBitMatrix, look_up, multiply
from .levels import likeliest
from .recast import RecastLM
from .rows import Pool, RowBuffer
from .weights import SharedWeights, check_own_precision


class DraftNetwork(PreTrainedModel):
    """What computes a draft's rows; `modeling.DovetailAssistantModel` is the whole draft.

    Args:
        config: of the draft.
        lm: the causal LM that stands in the network's place with `fusion="none"`.

    Attributes:
        weight_bits: 8 if its matrices are in 8 bits, else None.
    """

    config_class = DovetailConfig
    base_model_prefix = "draft"
    main_input_name = "input_ids"
    best = staticmethod(likeliest)
    _no_split_modules = ["DecoderBlock", "PairBlock"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: DovetailConfig, lm: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.weight_bits: int | None = None
        self.pool = Pool()
        self._shared: SharedWeights | None = None
        self._recast: RecastLM | None = None
        self.known_tokens = config.vocab_size
        if config.fusion == "none":
            self.lm = lm
        else:
            self.fusion, self.layers = make_fusion(config), make_blocks(config)
            self.rotary = RotaryTable(config)
            self._add_own_weights()

    def _add_own_weights(self) -> None:
        """What the draft does not share with its target."""
        config = self.config
        if config.own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.embed_tokens.weight.requires_grad_(False)  # as in all published training code
        if config.fusion == "eagle3":
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.own_head:
            self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size or config.vocab_size, bias=False)
            if config.draft_vocab_size:
                self.register_buffer("vocabulary", torch.full((config.draft_vocab_size,), -1))

    def _init_weights(self, module: nn.Module) -> None:
        """Weights that nothing has set yet are NaN, so that a draft that was never loaded cannot draft."""
        for parameter in module.parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                nn.init.constant_(parameter, float("nan"))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start values for training: the last feature passes the fusion, the token adds little (DGF: by half)."""
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif parameter.ndim == 1 or name.endswith("W_z"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        if self.config.fusion == "dgf":
            nn.init.eye_(self.fusion.W_1)
        else:
            nn.init.eye_(self.fusion.fc.weight[:, -self.config.hidden_size :])

    @property
    def reads_features(self) -> bool:
        """Whether drafting needs the target's features."""
        return self.config.fusion != "none"

    @property
    def predicts_features(self) -> bool:
        """Whether its hidden states imitate the target's features; EAGLE-3's are free."""
        return self.config.fusion in ("dgf", "eagle")

    @property
    def network(self) -> DraftNetwork | RecastLM | None:
        """What computes a session's rows, a `steps.Network`; None where a wrapped LM's own layers must do it."""
        return self if self.reads_features else self._recast

    @property
    def input_size(self) -> int:
        """Width of what a row reads beside its token: an encoded feature, or the hidden state of the row before."""
        return self.config.hidden_size

    def train(self, mode: bool = True) -> DraftNetwork:
        """As for any module.

        Raises:
            ValueError: if the weights are in 8 bits, which cannot be trained.
        """
        if mode:
            check_own_precision(self.weight_bits, "trained")
        return super().train(mode)

    @property
    def target_ids(self) -> Tensor | None:
        """(draft_vocab_size,) int64: the target's ids of what `logits` ranks; None: the places are the ids."""
        return self.vocabulary if self.config.draft_vocab_size else None

    def new_cache(self, capacity: int) -> GrowingCache:
        """An empty cache for one drafting session of a wrapped causal LM."""
        return GrowingCache(num_cache_layers(self.lm.config), capacity)

    def new_rows(self, capacity: int) -> RowBuffer:
        """Empty buffers for one drafting session of the network's own blocks."""
        config = self.config
        return RowBuffer(
            len(self.layers), config.num_key_value_heads, config.head_dim, capacity, self.device, self.dtype
        )

    def mask_builder(self) -> BranchingMask:
        """Builds the masks that `forward` takes."""
        return BranchingMask(self.lm if self.config.fusion == "none" else self)

    def addresses(self) -> tuple:
        """Where all weights that drafting reads lie in memory, the target's included; graphs hold on to these."""
        tensors = (*self.parameters(), *self.buffers(), *self._weights.tensors)
        return tuple((t.data_ptr(), t.dtype) for t in tensors)

    def shared_tensors(self) -> list[Tensor]:
        """What it has taken from the target that it met last."""
        return [] if self._shared is None else self._shared.tensors

    def encode(self, features: Tensor) -> Tensor:
        """(B, T, f) features of the target -> (B, T, h), what `forward` reads: EAGLE-3 makes one of several."""
        return self.fusion.encode(features) if self.config.fusion == "eagle3" else features

    def forward(
        self,
        input_ids: Tensor,
        features: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        cache: KeyValueStore | None = None,
    ) -> Tensor:
        """One step of the draft.

        Args:
            input_ids: (B, T) tokens t+1 (with `fusion="none"`: the tokens themselves).
            features: (B, T, h) features of tokens t: the target's, through `encode`, or the draft's own; None with
                `fusion="none"`.
            position_ids: (B, T); by default 0..T-1.
            attention_mask: from `mask_builder()`, or None for plain causal attention over these rows alone.
            cache: with keys and values of earlier rows; with `fusion="none"` the session's.

        Returns:
            (B, T, h): the predicted features, or the LM's hidden states; `logits` maps both to the vocabulary.
        """
        rows = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(rows, device=input_ids.device).unsqueeze(0)
        if self.config.fusion == "none":
            decoder = self.lm.get_decoder()
            return decoder(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
                **{CACHE: cache},
            ).last_hidden_state
        if attention_mask is None:
            attention_mask = torch.ones(1, 1, rows, rows, dtype=torch.bool, device=input_ids.device).tril()
        rotation = self.rotary.at(position_ids, features.dtype)
        return self.step(input_ids, features, rotation, attention_mask, cache)

    def step(
        self,
        tokens: Tensor,
        features: Tensor,
        rotation: Rotation,
        mask: Tensor | None = None,
        store: KeyValueStore | None = None,
    ) -> Tensor:
        """`forward` for fusion drafts, with all that depends on positions and branches made by the caller.

        Args:
            tokens: (B, T). features: (B, T, h).
            rotation: of the rows' positions, from `rotary`.
            mask: (B or 1, 1, T, K) bool, or to be added, in the network's precision; None: all keys for all rows.
            store: earlier rows' keys and values.
        """
        hidden = self.fusion(self.embed(tokens), features)
        if mask is not None:
            mask = fold_mask(mask, self.config.num_attention_heads // self.config.num_key_value_heads)
        for layer in self.layers:
            hidden = layer(hidden, rotation, mask, store)
        return self.finish(hidden)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks behind the fusion."""
        return self.layers

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) tokens to (B, T, h), what the fusion reads beside the features."""
        return look_up(tokens, self._embedding, self.dtype)

    def finish(self, hidden: Tensor) -> Tensor:
        """(B, T, h) of the last block, as the next level reads them."""
        return self.norm(hidden) if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V) float32 logits of (B, T, h) hidden states, through the target's LM head.

        EAGLE-3 has a norm of its own, and mostly a head, which ranks the tokens of `target_ids`.
        """
        if self.config.fusion == "eagle3" and not self.config.norm_output:
            hidden = self.norm(hidden)
        if self.config.fusion == "none":
            logits = self.lm.get_output_embeddings()(hidden)[..., : self.known_tokens].float()
        elif self.config.own_head:
            logits = self.lm_head(hidden).float()
        else:
            logits = multiply(hidden, self._weights.head, self._weights.bias).float()
        return finish_logits(logits, self.config.logit_scale, self.config.final_logit_softcapping)

    @property
    def _weights(self) -> SharedWeights:
        if self._shared is None:
            raise RuntimeError("this draft has not met its target yet; call draft.meet(target) first")
        return self._shared

    @property
    def _embedding(self) -> Tensor | EightBitMatrix:
        if not self.config.own_embeddings:
            return self._weights.embedding
        return self.embed_tokens if isinstance(self.embed_tokens, EightBitMatrix) else self.embed_tokens.weight

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the target's weights behind; they are shared again at the next meeting."""
        return {**self.__dict__, "_shared": None, "_recast": None}
