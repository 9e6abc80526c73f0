"""The bodies of requests and answers, and their limits."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_HISTORY = 200
MAX_K = 100
MAX_THINK = 8
MAX_BATCH = 64
MAX_LIST = 10_000  # ids in allow or deny
MAX_FILTERS = 16
MAX_DEADLINE_MS = 60_000

# A surrogate half or a control character has no place in an id, a title or a query.
_CLEAN = r"^[^\x00-\x1f\x7f]*$"
ItemId = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_CLEAN)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=_CLEAN)]
Mode = Literal["greedy", "joint", "marginal"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Query(_Strict):
    """A question for recommendations."""

    history: Annotated[list[ItemId], Field(max_length=MAX_HISTORY)] | None = Field(
        None,
        description="Item ids, oldest first. The model reads the latest ones, as many as it was "
        "trained with; the rest count as seen.",
    )
    user_id: ItemId | None = Field(
        None,
        description="A user of the log or of interactions sent since, instead of a history.",
    )
    k: int = Field(10, ge=1, le=MAX_K, description="Items wanted.")
    think: Annotated[int, Field(ge=0, le=MAX_THINK)] | Literal["auto"] = Field(
        "auto",
        description='Think tokens: 0 is the fast way; "auto" as many as it was trained with. The '
        "answer says how many there were.",
    )
    mode: Mode = Field("greedy", description="How thoughts are chosen.")
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


class Ranked(BaseModel):
    id: str
    title: str
    score: float = Field(
        description="Log-probability of the item given history and thought; only its order within "
        "one answer has a meaning."
    )


class CodeItem(BaseModel):
    id: str
    title: str


class Step(BaseModel):
    """One step of the reasoning and what it changed."""

    title: str = Field(description="What kind of step this is, in words.")
    words: list[str] = Field(description="What it stands for, most telling first.")
    items: list[CodeItem] = Field(description="The items that it stands for or rests on.")
    ranking: list[Ranked] = Field(description="The first items if thinking had stopped here.")
    token: int | None = Field(None, description="The think token; none for other kinds of steps.")
    level: int | None = Field(None, description="Level of the code that the token is, if it is.")
    code: int | None = None
    moved: float | None = Field(None, description="Distance the state moved, if it did.")


class Explanation(BaseModel):
    before: list[Ranked] = Field(description="The ranking without thinking.")
    steps: list[Step]


class Model(BaseModel):
    run: str
    stage: str
    hash: str


class Timing(BaseModel):
    queue_ms: float
    compute_ms: float
    batch: int = Field(description="Requests computed together.")


class Answer(BaseModel):
    items: list[Ranked]
    think: int
    mode: Mode
    model: Model
    timing: Timing
    explain: Explanation | None = None


class BatchAnswer(BaseModel):
    answers: list[Answer]


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
    think: int = Field(0, description='Think tokens where a query says "auto".')
    most: int = Field(0, description="More think tokens than these are not made.")


RunReport = dict[str, Any]
