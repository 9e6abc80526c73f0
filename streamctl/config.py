"""Configuration: a frozen dataclass a stage; defaults < --config FILE < --set < flags."""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from streamctl.errors import TYPED, StreamctlError, UsageError, close_matches

Size = Literal["tiny", "small", "paper"]
OPTIONS = "options"  # where a value given as an option, or by a Python caller, comes from
# Prefixes that a search keeps where a method answers, or k if that is more; `eval` has a setting.
BEAM = 20
MAX_K, MAX_THINK = 1000, 64  # items, and pieces of evidence, that an answer may be asked for
# Of the pretrain stage and of TIGER, by size. At tiny, 3e-3 reached a fifth more validation ndcg@10
# than 1e-3 in the same epochs (amazon-2018-scientific).
LEARNING_RATES = {"tiny": 3e-3, "small": 2e-3, "paper": 1e-3}


@dataclass(frozen=True)
class DataConfig:
    """What `data prepare` keeps of a log and in which order."""

    section: ClassVar[str] = "data"
    source: str = ""
    format: str = "auto"
    items: str = ""  # the file that describes the items; "": the one beside the interactions
    # role=NAME of columns with unusual names; roles: user, item, time, rating, event
    columns: tuple[str, ...] | None = None
    skip_bad: float = 0.0  # share of a file's lines that may be bad and are then left out
    # How ids are compared: as they are written, or `number`: 7, 7.0, 007 and " 7" are the same
    ids: Literal["exact", "number"] = "exact"
    since: str = ""  # times to keep: a date, or a number in the log's own unit
    until: str = ""
    min_rating: float | None = None  # a lower rating, or none, is no interaction
    events: str = ""  # kinds to keep: view,cart,buy, or with weights view=0.1,cart=0.3,buy=1
    described: bool = False  # keep only the items that the items file describes
    # Of rows that repeat: keep all; drop those equal in user, item and time; keep the first or
    # the last of each (user, item)
    repeats: Literal["keep", "drop", "first", "last"] = "keep"
    max_per_user: int | None = None  # the latest interactions that are kept of a user
    # None: 5 for a log with times; a log in order only has been cut already and is left as it is.
    min_user: int | None = None  # interactions a user needs; never fewer than 3 for leave-one-out
    min_item: int | None = None  # interactions an item needs; 0 keeps items nobody took
    # auto: the source's own parts, else leave-one-out; or the moment where test begins, and before
    # it that where validation does: 2024-01-01, or 80%,90% of the interactions
    split: str = "auto"
    history: int = 20  # items of history that a model sees
    # Equal times: input order, or a seeded shuffle; "runs", for a log in order only, shuffles
    # every run of ascending item ids, in which interactions of one time have been sorted by id.
    ties: Literal["keep", "shuffle", "runs"] = "keep"
    seed: int = 0


@dataclass(frozen=True)
class TokenizeConfig:
    """Item text -> vectors -> Semantic IDs (Eqs. 4-8)."""

    section: ClassVar[str] = "tokenize"
    encoder: str = "sentence-transformers/all-MiniLM-L6-v2"  # or "tfidf", or a local folder
    text_batch: int = 64  # texts that the encoder reads at once
    vectors: str = ""  # .npy or .parquet of item vectors, in the place of texts
    semantic_ids: str = ""  # LC-Rec's index.json of codes, in the place of a quantizer
    dim: int = 128  # PCA to this width
    method: Literal["rqvae", "rqkmeans"] = "rqvae"
    levels: int = 4  # m of the paper
    codes: int = 256  # K: codewords a level
    collisions: Literal["reassign", "dedup"] = "reassign"
    latent: int = 32  # width of the RQ-VAE's latent vector
    hidden: tuple[int, ...] = (512, 256, 128)  # widths of the RQ-VAE's MLP encoder
    beta: float = 0.25  # commitment weight of Eq. 6
    epochs: int = 300
    batch: int = 1024
    lr: float = 1e-3
    kmeans_iterations: int = 25
    neighbours: int = 50  # text neighbours kept for each item
    # Weight of who-took-what vectors beside the text's in what is quantized; 0: text alone (Eq. 4)
    collaborative: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class PretrainConfig:
    """Stage 1 (Eqs. 9-11), and the shape of the model that all later stages train."""

    section: ClassVar[str] = "pretrain"
    size: Size = "tiny"
    history: Literal["codes", "items"] = "items"  # encoder positions: m an item, or one an item
    # What a thought is made of: the evidence of the user's history, or the paper's think tokens
    thoughts: Literal["evidence", "vocabulary"] = "evidence"
    # Eq. 9's retrieved items; None: those that the history brings to mind, or alike to the target
    # with thoughts of the vocabulary, as the paper has it, though these cannot be had when serving
    retrieve: Literal["history", "target"] | None = None
    hops: tuple[int, ...] = ()  # most pieces of each hop; (): 32, and own where items are repeated
    positions: int | None = (
        None  # the latest training targets of each user to learn from; None: all
    )
    hold: int = 1  # last training targets of each user that only SFT sees: there codes are unsure
    think_codebook: int = 0  # tokens that only thoughts use; 0: thoughts use the codes' tokens
    # What an item's codes are normalised over: Eq. 11's vocabulary, or the catalogue's own codes
    softmax: Literal["catalogue", "vocabulary"] = "catalogue"
    neighbours: int | None = None  # retrieved items (Eq. 9); None: 8, or 2 of the target's
    temperature: float = 1.0  # tau of Eq. 11
    direct_weight: float = 1.0  # weight of the direct decoder's loss on the shared encoder
    dropout: float = 0.1
    epochs: int = 40
    patience: int = 10
    batch: int = 256
    lr: float | None = None  # None: what suits the size, `LEARNING_RATES`
    weight_decay: float = 0.05
    warmup: float = 0.05
    seed: int = 0

    def settled(self) -> PretrainConfig:
        """The same with what the thoughts are read from, and a learning rate.

        Raises:
            UsageError: settings that do not go together.
        """
        read = "history" if self.thoughts == "evidence" else "target"
        if self.retrieve not in (None, read):
            raise UsageError(
                f"retrieve={self.retrieve} does not go with thoughts={self.thoughts}, which reads "
                f"what is retrieved by the {read}",
                run=f"the same command with --set pretrain.retrieve={read}, or other thoughts",
            )
        if self.thoughts == "evidence" and self.hops and not any(self.hops):
            raise UsageError(
                "hops are all 0: a thought needs one that brings items",
                run="pretrain.hops with the size of each, such as 32,32,32,16,32,0",
            )
        rate = LEARNING_RATES[self.size] if self.lr is None else self.lr
        count = (2 if read == "target" else 8) if self.neighbours is None else self.neighbours
        return dataclasses.replace(self, retrieve=read, lr=rate, neighbours=count)


@dataclass(frozen=True)
class AnnotateConfig:
    """Iterative inference (Sec. 2.3.1, Eqs. 12-13)."""

    section: ClassVar[str] = "annotate"
    # vocabulary: whose weights the slow decoder begins with, in annotation and SFT
    start: Literal["direct", "pretrain"] = "direct"
    length: int = 4  # l: think tokens, or pieces of evidence that are labelled
    positions: int = 5  # evidence: the last training targets of each user that SFT learns from
    mode: Literal["normalised", "literal"] = "normalised"
    fit_epochs: int = 1  # epochs that fit MLP_s and MLP_r on the frozen backbone before labelling
    batch: int = 512
    lr: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class SftConfig:
    """Stage 2 (Eqs. 14-19): rounds of annotation and training."""

    section: ClassVar[str] = "sft"
    rounds: int = 3  # vocabulary: annotation and training in turn
    epochs: int | None = None  # None: 12 in all with evidence, 4 a round with a vocabulary
    weigh_weight: float = 1.0  # evidence: the weights' own cross-entropy beside -log P(target)
    label_weight: float = 0.0  # evidence: cross-entropy of annotate's labels
    patience: int = 2  # rounds without a better validation ndcg@10 before stopping
    dpo_weight: float = 0.1  # lambda of Eq. 19
    quant_weight: float = 0.25  # mu of Eq. 19
    state_weight: float = 0.1  # delta of Eq. 19
    direct_weight: float = 1.0  # the direct decoder goes on training beside the slow one
    dpo_beta: float = 0.1
    quant_beta: float = 0.25  # beta of Eq. 15
    state_temperature: float = 0.07
    corrupt: float = 0.2  # probability that a think token is replaced in training
    own: float = 0.5  # vocabulary: share of examples answered after the policy's own thought
    dropout: float | None = None  # None: 0 for the weighing of evidence, 0.1 for a decoder
    batch: int = 256
    lr: float | None = None  # None: 1e-2 for the weighing of evidence, 5e-4 for a decoder
    weight_decay: float = 0.05
    warmup: float = 0.05
    seed: int = 0

    def settled(self, thoughts: str) -> SftConfig:
        """The same with what is left open as suits what is trained."""
        own = {"lr": 1e-2, "epochs": 12, "dropout": 0.0}
        if thoughts != "evidence":
            own = {"lr": 5e-4, "epochs": 4, "dropout": 0.1}
        left = {key: value for key, value in own.items() if getattr(self, key) is None}
        return dataclasses.replace(self, **left)


@dataclass(frozen=True)
class RlConfig:
    """Stage 3: GRPO (Eq. 20) with the rewards of Eqs. 21-27."""

    section: ClassVar[str] = "rl"
    steps: int = 100
    group: int = 16  # G: rollouts a user
    batch: int = 128  # users a step
    temperature: float = 1.0
    # `free` is the paper's letter. Most of a weak model's rollouts then spell no item, and GRPO
    # learns to spell: 100 steps took validation ndcg@10 from .060 to .055, inside the catalogue
    # to .064 (amazon-2018-scientific, tiny).
    rollouts: Literal["catalogue", "free"] = "catalogue"
    clip: float = 0.2  # epsilon of Eq. 20
    kl_weight: float = 1e-3  # beta of Eq. 20 (k3 estimator)
    ratio: Literal["sequence", "token"] = "sequence"  # Eq. 20's letter, or a ratio for each token
    updates: int = 1  # gradient steps on one batch of rollouts
    anchor_weight: float = (
        0.1  # cross-entropy of the target kept beside GRPO; 0 is the paper's letter
    )
    format_weight: float = 1.0
    exact_weight: float = 1.0
    similarity_weight: float = 1.0
    likelihood_weight: float = 1.0
    ranking_weight: float = 1.0
    negatives: int = 50  # K of Eq. 27
    think: int = 8  # evidence: l, pieces a thought samples
    validate_every: int = 25
    patience: int = 3  # validations below the best before rolling back and stopping
    lr: float | None = None  # None: 3e-4 for the weighing of evidence, 1e-4 for a policy
    weight_decay: float = 0.0
    seed: int = 0

    def settled(self, thoughts: str) -> RlConfig:
        """The same with the learning rate of what is trained."""
        rate = (3e-4 if thoughts == "evidence" else 1e-4) if self.lr is None else self.lr
        return dataclasses.replace(self, lr=rate)


@dataclass(frozen=True)
class BaselineConfig:
    """A baseline trained by the same loop on the same split.

    None stands for the method's own default (`Baseline.defaults`; for tiger the pretrain stage's
    settings) and is filled in before work starts. A value for something that the method does not
    have is refused.
    """

    section: ClassVar[str] = "baseline"
    name: str = "tiger"
    size: Size | None = None  # tiger
    history: Literal["codes", "items"] | None = None  # tiger
    softmax: Literal["catalogue", "vocabulary"] | None = None  # tiger
    positions: int | None = None  # tiger: the latest training targets of each user; None: all
    loss: Literal["bce", "ce"] | None = None
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    mask: float | None = None  # bert4rec: share of positions hidden
    repeat: bool | None = None  # learn a bias for items that the user had already
    dropout: float | None = None
    epochs: int | None = None
    patience: int | None = None
    batch: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class RerankConfig:
    """A learned ranker (LightGBM's LambdaRank) over the candidates of other methods."""

    section: ClassVar[str] = "rerank"
    methods: tuple[str, ...] = ()  # whose candidates; empty: each method of the run by itself
    depth: int = 100  # candidates of each method, beside those that the hops bring
    users: int = 5000  # validation users who teach and judge, by folds; 0: everyone
    trees: int = 100
    lr: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class RefitConfig:
    """The winner on everything."""

    section: ClassVar[str] = "refit"
    method: str = ""  # "": what won on validation


@dataclass(frozen=True)
class EvalConfig:
    """Full-catalogue evaluation."""

    section: ClassVar[str] = "eval"
    split: Literal["valid", "test"] = "test"
    methods: tuple[str, ...] = ()  # rows to evaluate; empty: every method and control of the run
    beam: int = 50
    batch: int = 256
    users: int = 0  # 0: every user; otherwise a sample of so many, the same for every seed
    bootstrap: int = 2000  # resamples of the paired intervals
    seed: int = 0


STAGES: tuple[type, ...] = (
    DataConfig, TokenizeConfig, PretrainConfig, AnnotateConfig, SftConfig, RlConfig,
    BaselineConfig, RerankConfig, EvalConfig, RefitConfig,
)  # fmt: skip

# Least and most of every number, by the setting's name.
BOUNDS: dict[str, tuple[float, float]] = {
    name: (least, most)
    for names, least, most in (
        ("clip corrupt dropout mask warmup", 0, 0.95),
        ("own", 0, 1),
        ("lr", 1e-12, 10),
        ("state_temperature temperature", 1e-6, 100),
        ("beta collaborative dpo_beta quant_beta weight_decay", 0, 100),
        ("anchor_weight direct_weight dpo_weight exact_weight format_weight kl_weight", 0, 1000),
        ("label_weight weigh_weight", 0, 1000),
        ("hold hops", 0, 4096),
        ("positions think", 1, 4096),
        ("likelihood_weight quant_weight ranking_weight similarity_weight state_weight", 0, 1000),
        ("levels", 1, 16),
        ("codes", 2, 2**16),
        ("heads layers length", 1, 256),
        ("beam dim hidden history latent", 1, 2**14),
        ("group", 2, 10**4),  # a group of one has no advantage over itself
        ("negatives neighbours rounds updates", 1, 10**4),
        ("fit_epochs kmeans_iterations patience", 0, 10**4),
        ("batch depth epochs steps text_batch trees validate_every", 1, 10**6),
        ("bootstrap", 2, 10**6),
        ("think_codebook", 0, 2**20),
        ("min_item min_user users", 0, 2**31 - 1),
        ("max_per_user", 1, 2**31 - 1),
        ("min_rating", -1e9, 1e9),
        ("skip_bad", 0, 1),
        ("seed", 0, 2**63 - 1),
    )
    for name in names.split()
}


def _check_range(setting: str, name: str, value: Any, where: str | None) -> None:
    """Refuse a number outside of its setting's bounds; `name` is what the user calls it."""
    if isinstance(value, tuple):
        for part in value:
            _check_range(setting, name, part, where)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most = BOUNDS[setting]
    if not least <= value <= most:
        raise UsageError(f"{name} is {value}; it must be {least} to {most}", where=where)


def _convert(name: str, value: Any, kind: Any, where: str | None) -> Any:
    """`value` as the field's type; text (from --set) is parsed, TOML values are checked."""
    origin = typing.get_origin(kind)
    try:
        if origin is Literal:
            if value in typing.get_args(kind):
                return value
            choices = ", ".join(str(choice) for choice in typing.get_args(kind))
            raise UsageError(
                f"{name} is {value!r}; it takes one of {choices}",
                where=where,
                run=f"{name} with one of them",
            )
        if origin in (types.UnionType, typing.Union):
            inner = [part for part in typing.get_args(kind) if part is not type(None)]
            none = value is None or value == "none"
            return None if none else _convert(name, value, inner[0], where)
        if origin is tuple:
            parts = value.split(",") if isinstance(value, str) and value else value
            inner = typing.get_args(kind)[0]
            return tuple(_convert(name, part, inner, where) for part in parts)
        if kind is bool:
            if isinstance(value, str) and value.lower() in ("true", "false"):
                return value.lower() == "true"
            if isinstance(value, bool):
                return value
            raise ValueError
        if kind is int and (isinstance(value, bool) or (isinstance(value, float) and value % 1)):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, OverflowError) as error:
        name_of_kind = getattr(kind, "__name__", str(kind))
        raise UsageError(
            f"{name} is {value!r}, which is not of type {name_of_kind}", where=where
        ) from error


def as_text(value: Any) -> str:
    """A setting's value as `--set` takes it."""
    if isinstance(value, list | tuple):
        return ",".join(map(as_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _apply(cls: type, values: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for name, value in new.items():
        if name not in names:
            raise UsageError(
                f"unknown key {name!r} of [{cls.section}]; {close_matches(name, names)}",
                where=where,
            )
        full, place = f"{cls.section}.{name}", where
        option = f"--{name.replace('_', '-')}"
        if where == OPTIONS and any(word.partition("=")[0] == option for word in TYPED.get()):
            full, place = option, None
        values[name] = _convert(full, value, hints[name], place)
        _check_range(name, full, values[name], place)


def resolve(
    cls: type,
    *,
    base: Mapping[str, Any] | None = None,
    file: Path | None = None,
    sets: Sequence[str] = (),
    **flags: Any,
) -> Any:
    """One stage's configuration from its four sources, later ones winning.

    Args:
        cls: the stage's dataclass.
        base: values that replace the defaults, as a manifest records them.
        file: a TOML file with a table for each stage it changes (`[pretrain]`, `[sft]`, ...).
        sets: `key=value` or `stage.key=value` texts of `--set`; those of other stages are ignored.
        flags: values given as options; `None` means not given.

    Raises:
        UsageError: an unknown table or key (with close matches), or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    _apply(cls, values, base or {}, "manifest.json")
    sections = [stage.section for stage in STAGES]
    if file is not None:
        try:
            with open(file, "rb") as handle:
                tables = tomllib.load(handle)
        except OSError as error:
            raise StreamctlError(
                "the configuration cannot be read",
                where=file,
                run="--config with the path of a TOML file",
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise StreamctlError(
                f"not a TOML file: {error}",
                where=file,
                run="lines `key = value` below a line `[stage]`, as docs/config.md shows",
            ) from error
        for table, content in tables.items():
            if table not in sections or not isinstance(content, dict):
                raise UsageError(
                    f"unknown table [{table}]; {close_matches(table, sections)}", where=file
                )
        for stage in STAGES:  # a typing mistake in any table is refused by every command
            _apply(stage, {}, tables.get(stage.section, {}), str(file))
        _apply(cls, values, tables.get(cls.section, {}), str(file))
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(
                f"--set takes key=value, not {text!r}",
                run=f"--set {text}=VALUE; docs/config.md lists the keys and their values",
            )
        section, dot, name = key.strip().rpartition(".")
        if dot and section not in sections:
            raise UsageError(
                f"unknown stage {section!r} in --set {text}; {close_matches(section, sections)}"
            )
        if not dot or section == cls.section:
            _apply(cls, values, {name if dot else key.strip(): value.strip()}, f"--set {text}")
    given = {name: value for name, value in flags.items() if value is not None}
    _apply(cls, values, given, OPTIONS)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain TOML and JSON values."""
    return {
        field.name: list(value) if isinstance(value, tuple) else value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) is not None
    }
