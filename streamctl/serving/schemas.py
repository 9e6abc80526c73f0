"""The bodies of requests and answers, and their limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from streamctl.config import MAX_K, MAX_THINK

MAX_HISTORY = 200
MAX_BATCH = 64
MAX_LIST = 10_000  # ids in allow or deny
MAX_FILTERS = 16
MAX_DEADLINE_MS = 60_000

# A surrogate half or a control character has no place in an id, a title or a query.
_CLEAN = r"^[^\x00-\x1f\x7f]*$"
ItemId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_CLEAN)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_CLEAN)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Query(_Strict):
    """A question for recommendations."""

    history: Annotated[list[ItemId], Field(max_length=MAX_HISTORY)] | None = Field(
        None,
        description="Item ids, oldest first. The model reads the latest ones, as many as it was "
        "trained with; the rest count as seen. Empty: the popular items.",
    )
    user_id: ItemId | None = Field(
        None,
        description="A user, instead of a history: of the log or of interactions sent since. If "
        "nothing is known of them the popular items answer, and `note` says why.",
    )
    k: int = Field(10, ge=1, le=MAX_K, description="Items wanted.")
    think: Annotated[int, Field(ge=0, le=MAX_THINK)] | Literal["auto"] = Field(
        "auto",
        description='Pieces of evidence to think of: 0 is the fast way; "auto" as many as the '
        "method is best with. The answer says how many there were.",
    )
    method: Name = Field(
        "auto",
        description='Which of the run\'s methods answers (`/readyz` lists them); "auto" the one '
        "that is served: by default what was best on validation.",
    )
    allow: Annotated[list[ItemId], Field(max_length=MAX_LIST)] | None = Field(
        None, description="Only these items."
    )
    deny: Annotated[list[ItemId], Field(max_length=MAX_LIST)] = Field(
        default_factory=list, description="Not these items; ids that are unknown do no harm."
    )
    filter: Annotated[
        dict[Name, Annotated[list[Text], Field(max_length=1000)]], Field(max_length=MAX_FILTERS)
    ] = Field(
        default_factory=dict,
        description="Catalogue field -> values, of which an item must have one.",
        examples=[{}],
    )
    diversity: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Above 0 the list is re-ranked so that its items are less alike (maximal "
        "marginal relevance over item vectors).",
    )
    exclude_seen: bool = Field(True, description="Leave out what the user took already.")
    explain: bool = Field(False, description="Add the reasoning.")
    deadline_ms: Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS)] | None = Field(
        None, description="An answer later than this is of no use; by default the server's."
    )

    @model_validator(mode="after")
    def _one_of(self) -> Query:
        if (self.history is None) == (self.user_id is None):
            raise ValueError("give either history or user_id")
        return self


class Batch(_Strict):
    """Several questions, answered in their order; all of them or none."""

    requests: Annotated[list[Query], Field(min_length=1, max_length=MAX_BATCH)]


class Named(BaseModel):
    id: str
    title: str


class Ranked(Named):
    score: float = Field(description="Only the order within one answer has a meaning.")


class Step(BaseModel):
    """One piece of evidence that was thought of, and what it changed."""

    text: str = Field(description='In words: "after A, 12 users took B".')
    item: Named | None = Field(None, description="What came to mind.")
    via: Named | None = Field(None, description="The item that it was reached from.")
    hop: str | None = Field(None, description="How it was found: next, alike, others, own ...")
    weight: float | None = Field(None, description="Its share of the weighing.")
    ranking: list[Ranked] = Field(description="The first items if thinking had stopped here.")


class Explanation(BaseModel):
    before: list[Ranked] = Field(description="The ranking without thinking.")
    steps: list[Step]


class Model(BaseModel):
    run: str
    stage: str = Field(description="The stage that the served method comes from.")
    hash: str


class Timing(BaseModel):
    queue_ms: float
    compute_ms: float
    batch: int = Field(description="Requests computed together.")


class Answer(BaseModel):
    items: list[Ranked]
    method: str = Field(description="What answered.")
    think: int = Field(description="Pieces of evidence that were thought of, at most.")
    note: str | None = Field(None, description="Why this is no answer for this user, if it is not.")
    model: Model
    timing: Timing
    explain: Explanation | None = None


class BatchAnswer(BaseModel):
    answers: list[Answer]


class Similar(BaseModel):
    items: list[Ranked] = Field(description="Cosine of their texts as score.")


class NewItem(_Strict):
    """An item that joins the catalogue."""

    id: ItemId
    title: Annotated[str, StringConstraints(min_length=1, max_length=1000, pattern=_CLEAN)]
    text: Text = Field("", description="What the text encoder reads; by default the title.")
    fields: Annotated[dict[Name, Text], Field(max_length=64)] = Field(
        default_factory=dict, description="Other columns of the catalogue.", examples=[{}]
    )


class Taken(_Strict):
    """What a user has taken now."""

    user_id: ItemId = Field(description="A user of the log, or a new one.")
    items: Annotated[list[ItemId], Field(min_length=1, max_length=MAX_HISTORY)] = Field(
        description="Item ids, oldest first."
    )


class Item(BaseModel):
    id: str
    title: str
    fields: dict[str, str]
    codes: list[int]
    added: bool = Field(description="Added through this API, not part of the training data.")


class Found(BaseModel):
    items: list[Item]
    total: int


class User(BaseModel):
    id: str
    history: list[Item] = Field(description="What the model reads of this user, oldest first.")
    interactions: int


class Users(BaseModel):
    users: list[str]
    total: int


class Reload(_Strict):
    """Which run to serve: a name among the folders beside the present one."""

    run: Name | None = Field(None, description="By default the present run, read again.")


class Health(BaseModel):
    status: Literal["ok", "loading", "draining"]
    model: Model | None = None
    method: str | None = Field(None, description="What answers where a query names no method.")
    methods: list[str] = Field(default_factory=list, description="Those that the run has.")
