"""The whole model: an encoder of histories, a slow and a direct decoder, and the thinker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from streamctl.errors import StreamctlError
from streamctl.model import checkpoint, frozen
from streamctl.model.backbone import BackboneConfig, Decoder, Encoder, Memory, initialise
from streamctl.model.frozen import Branches
from streamctl.model.legal import LegalCodes
from streamctl.model.past import Past
from streamctl.model.thinker import Thinker
from streamctl.model.weighing import Weighing
from streamctl.tokenizer.tokens import Tokens

DecoderName = Literal["slow", "direct"]
Softmax = Literal["vocabulary", "catalogue"]
Thoughts = Literal["evidence", "vocabulary"]
# Layers of the encoder and of each decoder, d_model, heads, d_kv, d_ff.
SIZES = {
    "tiny": (2, 2, 64, 4, 16, 256),
    "small": (2, 2, 128, 4, 32, 512),
    "paper": (4, 4, 256, 4, 64, 1024),
}
IGNORED = -100  # a label that counts nothing


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of a policy.

    Attributes:
        softmax: what an item's codes are normalised over: the "vocabulary" (Eq. 11), or the codes
            that continue a prefix of the "catalogue", so that items alone have probability.
        thoughts: what a thought is made of: the user's "evidence", weighed, or tokens of the
            "vocabulary" (the paper's letter).
    """

    sizes: tuple[int, ...]  # codes of each level of an item, a de-duplication digit included
    layers: int = 2
    decoder_layers: int = 2
    d_model: int = 64
    heads: int = 4
    d_kv: int = 16
    d_ff: int = 256
    history: Literal["codes", "items"] = "items"  # encoder positions: m an item, or one
    dropout: float = 0.1
    think_codebook: int = 0  # tokens that only thoughts use; 0: they use those of the item codes
    softmax: Softmax = "vocabulary"
    dedup: bool = False  # whether the last level is a de-duplication digit
    thoughts: Thoughts = "vocabulary"

    @classmethod
    def of_size(cls, size: str, sizes: tuple[int, ...], **others) -> PolicyConfig:
        """The shape named tiny, small or paper (DESIGN, Commands)."""
        names = ("layers", "decoder_layers", "d_model", "heads", "d_kv", "d_ff")
        return cls(tuple(sizes), **dict(zip(names, SIZES[size], strict=True)), **others)

    @property
    def tokens(self) -> Tokens:
        """The vocabulary."""
        return Tokens(tuple(self.sizes), self.think_codebook, self.dedup)

    @property
    def backbone(self) -> BackboneConfig:
        """The shape of the encoder and the decoders."""
        return BackboneConfig(
            vocabulary=self.tokens.size,
            d_model=self.d_model,
            d_kv=self.d_kv,
            heads=self.heads,
            d_ff=self.d_ff,
            layers=self.layers,
            decoder_layers=self.decoder_layers,
            dropout=self.dropout,
        )


@dataclass
class Encoded:
    """Users as the decoders see them."""

    states: torch.Tensor  # (B, S, d), the encoder's output
    mask: torch.Tensor | None  # (B, S) bool, True where real; None when nothing is padded
    # Cross-attention keys and values by decoder, gradient mode and autocast, computed once.
    memories: dict[tuple[str, bool, bool], Memory] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.states)

    def mean(self) -> torch.Tensor:
        """d_0 (B, d) float32: the mean of the states over real positions."""
        if self.mask is None:
            return self.states.float().mean(1)
        weight = self.mask[..., None].float()
        return (self.states * weight).sum(1) / weight.sum(1)

    def detach(self) -> Encoded:
        """The same without gradients."""
        return Encoded(self.states.detach(), self.mask)

    def rows(self, index: torch.Tensor) -> Encoded:
        """Some users only, or users repeated: index (B',) int64."""
        memories = {
            key: [(k[index], v[index]) for k, v in memory]
            if isinstance(memory, list)
            else memory.rows(index)
            for key, memory in self.memories.items()
        }
        mask = None if self.mask is None else self.mask[index]
        return Encoded(self.states[index], mask, memories)


class Policy(nn.Module):
    """P(thought, item | history).

    Attributes:
        config: its shape. tokens: its vocabulary.
        item_tokens: (N, m) int64 buffer, the tokens of every item.
    """

    item_tokens: torch.Tensor

    def __init__(self, config: PolicyConfig, item_tokens: torch.Tensor):
        """An uninitialised policy; see `build` and `load`."""
        super().__init__()
        self.config, self.tokens = config, config.tokens
        shape = config.backbone
        self.shared = nn.Embedding(shape.vocabulary, shape.d_model)
        self.encoder = Encoder(shape)
        self.decoder = Decoder(shape)
        self.direct = Decoder(shape)
        self.thinker = Thinker(shape.d_model)
        if config.thoughts == "evidence":
            self.weighing = Weighing(shape.d_model, config.dropout)
        items = torch.as_tensor(item_tokens, dtype=torch.int64)
        if items.ndim != 2 or items.shape[1] != len(config.sizes):
            wanted = f"(N, {len(config.sizes)})"
            raise StreamctlError(f"item tokens have shape {tuple(items.shape)}, not {wanted}")
        self.register_buffer("item_tokens", items, persistent=False)
        self._legal: LegalCodes | None = None

    @classmethod
    def build(cls, config: PolicyConfig, item_tokens: torch.Tensor, seed: int) -> Policy:
        """A new policy with T5's initial weights; the direct decoder begins as the slow one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = cls(config, item_tokens)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(policy.shared.weight, generator=generator)
        initialise(policy.encoder, config.backbone, generator)
        initialise(policy.decoder, config.backbone, generator)
        policy.direct.load_state_dict(policy.decoder.state_dict())
        return policy

    @property
    def legal(self) -> LegalCodes:
        """The codes that continue each prefix of the catalogue, made when first asked for."""
        if self._legal is None or self._legal.item_tokens is not self.item_tokens:
            self._legal = LegalCodes(self.item_tokens, self.tokens)
        return self._legal

    @property
    def device(self) -> torch.device:
        return self.item_tokens.device

    def stack(self, decoder: DecoderName) -> Decoder:
        """The slow or the direct decoder."""
        return self.decoder if decoder == "slow" else self.direct

    def embed_history(self, history: torch.Tensor) -> torch.Tensor:
        """(B, H) items -> encoder inputs (B, S, d); S is H, or H * m with code positions.

        One position an item is the sum of its code embeddings over sqrt(m), so that it has the
        variance of one embedding.
        """
        tokens = self.item_tokens[history.clamp(min=0)]  # (B, H, m)
        if self.config.history == "codes":
            return self.shared(tokens.flatten(1))
        return self.shared(tokens).sum(2) * tokens.shape[2] ** -0.5

    def encode(self, history: torch.Tensor) -> Encoded:
        """(B, H) int64 item indexes, -1 on the right, to encoder states."""
        mask = history >= 0
        padded = not bool(mask.all())
        if padded and self.config.history == "codes":
            mask = mask.repeat_interleave(self.item_tokens.shape[1], 1)
        mask = mask if padded else None
        return Encoded(self.encoder(self.embed_history(history), mask), mask)

    def memory(self, encoded: Encoded, decoder: DecoderName) -> Memory:
        """Cross-attention keys and values of every layer, computed once for each `Encoded`."""
        half = torch.is_autocast_enabled(encoded.states.device.type)
        key = (decoder, torch.is_grad_enabled(), half)
        if key not in encoded.memories:
            encoded.memories[key] = self.stack(decoder).memory(encoded.states, encoded.mask)
        return encoded.memories[key]

    def extend(
        self,
        encoded: Encoded,
        tokens: torch.Tensor,
        decoder: DecoderName = "slow",
        past: Past | Branches | None = None,
        *,
        last_only: bool = False,
    ) -> tuple[torch.Tensor, Past | Branches]:
        """Run T more tokens of W branches of each user: the step of every incremental decode.

        Args:
            tokens: (B, W, T) int64, or (B, W, T, d) vectors in their place.
            past: what an earlier call returned, if any.
            last_only: only the last token's state is wanted.

        Returns:
            hidden (B, W, T or 1, d), and the past with these tokens.
        """
        memory = self.memory(encoded, decoder)
        return self.stack(decoder)(self.embed(tokens), memory, encoded.mask, past, last_only)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Decoder inputs of tokens (...) int64; vectors (..., d) are inputs already."""
        return tokens if tokens.is_floating_point() else self.shared(tokens)

    def decode(
        self, encoded: Encoded, tokens: torch.Tensor, decoder: DecoderName = "slow", repeat: int = 1
    ) -> torch.Tensor:
        """Teacher-forced hidden states (B * repeat, T, d) of tokens (B * repeat, T) or vectors.

        The `repeat` rows of a user lie side by side and share the user's cross-attention keys.
        """
        branches = tokens.view(len(encoded), repeat, *tokens.shape[1:])
        return self.extend(encoded, branches, decoder)[0].flatten(0, 1)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V), by the tied embedding."""
        return frozen.scores(self.shared, hidden * self.config.d_model**-0.5)

    def answer_logprobs(
        self, hidden: torch.Tensor, items: torch.Tensor, *, first: int = 0, temperature: float = 1.0
    ) -> torch.Tensor:
        """log P(each code of an item | history, thought, the codes before it), fp32.

        Args:
            hidden: (..., m - first, d), the states that predict codes first..m-1.
            items: (...) int64.
            first: codes before this one are not scored.
            temperature: tau of Eq. 11.

        Returns:
            (..., m - first), normalised over what `config.softmax` names.
        """
        codes = self.item_tokens[items][..., first:]
        if self.config.softmax == "vocabulary":
            scores = self.logits(hidden).float() / temperature
            logprobs = F.cross_entropy(scores.flatten(0, -2), codes.flatten(), reduction="none")
            return -logprobs.view(codes.shape)
        shape, codes, items = codes.shape, codes.flatten(0, -2), items.flatten()
        hidden = hidden.flatten(0, -3) * self.config.d_model**-0.5
        logprobs = []
        for place, level in enumerate(range(first, self.tokens.levels)):
            low, high = self.tokens.level_range(level)
            scores = F.linear(hidden[:, place], self.shared.weight[low:high]).float() / temperature
            legal = self.legal.after(self.legal.prefix[items, level], high - low)
            scores = scores.masked_fill(~legal, -torch.inf)
            logprobs.append(-F.cross_entropy(scores, codes[:, place] - low, reduction="none"))
        return torch.stack(logprobs, -1).view(shape)

    def first_logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        """log P(each token as an item's first code) of the logits at `bos`: (..., V) fp32."""
        scores = logits.float()
        if self.config.softmax == "catalogue":
            scores = scores.where(self.legal.first, -torch.inf)
        return torch.log_softmax(scores, -1)

    def target_inputs(
        self, items: torch.Tensor, think: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder inputs and labels of `[think, o_1..o_l, bos, c_1..c_m]`, or `[bos, c_1..c_m]`.

        Args:
            items: (B,) int64, the targets.
            think: (B, l) int64 think tokens; None or l = 0 for the layout without a thought,
                which is also the direct decoder's.

        Returns:
            inputs (B, T) and labels (B, T), T = l + 1 + m with a thought and m without. Position i
            predicts token i + 1; `bos` is given and never predicted: its label is -100.
        """
        codes = self.item_tokens[items]
        think = codes[:, :0] if think is None else think
        inputs = torch.cat([self.around(think), codes[:, :-1]], 1)
        if not think.shape[1]:
            return inputs, codes
        return inputs, torch.cat([think, torch.full_like(codes[:, :1], IGNORED), codes], 1)

    def prompt(
        self,
        encoded: Encoded,
        think: torch.Tensor | None = None,
        decoder: DecoderName = "slow",
    ) -> tuple[torch.Tensor, Past | Branches]:
        """Run `[think, o_1..o_l, bos]` (or `[bos]`), after which an item's codes follow.

        Args:
            think: (B, l) int64 tokens, (B, l, d) vectors, or None.

        Returns:
            the state at `bos` (B, 1, d), and a past that all branches of a user share.
        """
        if think is None:
            think = torch.empty(len(encoded), 0, dtype=torch.int64, device=encoded.states.device)
        think = self.around(think)[:, None]
        hidden, past = self.extend(encoded, think, decoder, last_only=True)
        return hidden[:, 0], past.share()

    def around(self, think: torch.Tensor) -> torch.Tensor:
        """`[think, o_1..o_l, bos]` of tokens (..., l), or `[bos]`; or of vectors (..., l, d)."""
        if not think.is_floating_point():
            begin = think.new_full((*think.shape[:-1], 1), Tokens.BOS)
            start = torch.full_like(begin, Tokens.THINK)
            return torch.cat([start, think, begin], -1) if think.shape[-1] else begin
        start, begin = (
            self.shared.weight[token].to(think.dtype).expand_as(think[..., :1, :])
            for token in (Tokens.THINK, Tokens.BOS)
        )
        return torch.cat([start, think, begin], -2)

    def piece_vectors(self, items: torch.Tensor, hops: torch.Tensor) -> torch.Tensor:
        """Decoder inputs (..., l, d) of a thought's items (..., l), -1 for none, and their hops.

        Each is the sum of the item's code embeddings over sqrt(m), plus the hop's.
        """
        tokens = self.item_tokens[items.clamp(min=0)]
        vectors = self.shared(tokens).sum(-2) * tokens.shape[-1] ** -0.5
        return vectors * (items >= 0)[..., None] + self.weighing.hop(hops)

    def target_logprob(
        self,
        encoded: Encoded,
        items: torch.Tensor,
        think: torch.Tensor | None = None,
        decoder: DecoderName = "slow",
    ) -> torch.Tensor:
        """log P(the item's m codes | history, thought), the thought not scored.

        Args:
            items: (B,) or (B, K) int64. K items of a user share the thought, `bos` and the
                distribution of the first code.

        Returns:
            float32 of the shape of `items`.
        """
        prompt = self.prompt(encoded, think, decoder)
        return self.items_logprob(encoded, items, *prompt, decoder)

    def items_logprob(
        self,
        encoded: Encoded,
        items: torch.Tensor,
        hidden: torch.Tensor,
        past: Past | Branches,
        decoder: DecoderName = "slow",
    ) -> torch.Tensor:
        """The same after a `prompt`, whose hidden and past these are."""
        codes = self.item_tokens[items.view(len(items), -1)]  # (B, K, m)
        total = self.first_logprobs(self.logits(hidden[:, 0])).gather(1, codes[..., 0])
        if codes.shape[2] > 1:
            later, _ = self.extend(encoded, codes[..., :-1], decoder, past)
            some = items.view(len(items), -1)
            total = total + self.answer_logprobs(later, some, first=1).sum(-1)
        return total.view(items.shape)

    def item_vectors(self, items: torch.Tensor) -> torch.Tensor:
        """t: (...) items -> (..., d), the mean of the learned levels' code embeddings."""
        learned = len(self.config.sizes) - self.config.dedup
        return self.shared(self.item_tokens[items][..., :learned]).mean(-2)

    def states(self, encoded: Encoded, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """s_0..s_l (B, l + 1, d) from d_0 and the decoder's states at o_1..o_l (B, l, d)."""
        return self.thinker.states(encoded.mean(), hidden)

    def save(self, folder: str | Path) -> list[str]:
        """Write the policy; see `streamctl.model.checkpoint`. Returns the files' names."""
        return checkpoint.save(self.state_dict(), self.config, self.config.backbone, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, item_tokens: torch.Tensor) -> Policy:
        """A saved policy, in evaluation mode on the CPU.

        Raises:
            StreamctlError: a file is missing, damaged, or of another shape.
        """
        folder = Path(folder)
        values, weights = checkpoint.load(folder)
        try:
            config = PolicyConfig(**{**values, "sizes": tuple(values["sizes"])})
        except (TypeError, KeyError) as error:
            raise StreamctlError(
                f"not a policy: {error}",
                where=folder / "policy.json",
                run="the command that makes this stage, with --force",
            ) from error
        policy = cls(config, item_tokens)
        try:
            policy.load_state_dict(weights)
        except RuntimeError as error:
            problem = str(error).splitlines()[-1].strip()
            raise StreamctlError(
                f"weights do not fit: {problem}",
                where=folder,
                run="the command that makes this stage, with --force",
            ) from error
        return policy.eval()
