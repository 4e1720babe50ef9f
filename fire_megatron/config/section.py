"""What every section of a recipe is made of: frozen pydantic models.

One description of a field, its type hint (``Annotated[float, Gt(0)]``), serves loading, validation, error messages and
the reference page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from annotated_types import Len, MinLen
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError, model_validator
from typing_extensions import Doc

from fire_megatron.config.errors import RecipeProblem, RecipeProblems, join_key
from fire_megatron.config.messages import kind_of, problems, unquoted_key

K, T, S = TypeVar("K"), TypeVar("T"), TypeVar("S", bound="Section")


def plain(value: Any, key: str = "") -> Any:
    """Plain values (mappings, lists, scalars) that :func:`build` turns back into an equal section; a copy.

    Raises:
        RecipeProblems: a value of another type at ``key`` or below, or a key that is no string.
    """
    if isinstance(value, (Section, Mapping)):
        odd = [name for name in dict(value) if not isinstance(name, str)]
        if odd:
            raise RecipeProblems(unquoted_key(key, name) for name in odd)
        return {name: plain(item, join_key(key, name)) for name, item in dict(value).items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, join_key(key, str(i))) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise RecipeProblems([RecipeProblem(key, f"{value!r} is {kind_of(value)}; give a value that YAML can write")])


def build(section: type[S], values: Any) -> S:
    """Make a section from plain values, as read from YAML.

    Raises:
        RecipeProblems: everything wrong with the keys, types and ranges, in one error.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise RecipeProblems(problems(error, section)) from None


def _or_empty(values: Any) -> Any:
    """Null stands for a section or mapping whose keys are all left out."""
    return {} if values is None else values


class Section(BaseModel):
    """Base of every section: checks types, ranges and keys.

    Raises:
        RecipeProblems: with keys relative to the section.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    variants: ClassVar[Mapping[str, type[Section]]] = {}
    """Sections whose keys are written among this one's, by its ``name``."""

    def __init__(self, *args: Any, **values: Any) -> None:
        """Fields in order, or by name."""
        assert len(args) <= len(type(self).model_fields), args
        values |= dict(zip(type(self).model_fields, args, strict=False))
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeProblems(problems(error, type(self))) from None

    __init__.__pydantic_base_init__ = True  # pydantic makes inner sections without it, so that all problems add up

    _null = model_validator(mode="before")(_or_empty)

    def model_post_init(self, _: Any) -> None:
        """Checks across fields, when each of them is in range."""
        found = list(self._problems())
        if found:
            raise RecipeProblems(found)

    def _problems(self) -> Iterator[RecipeProblem]:
        """What a section checks beyond the range of each field."""
        yield from ()

    def is_default(self, key: str) -> bool:
        """Whether a key holds its default."""
        return getattr(self, key) == type(self).model_fields[key].default

    def _idle(self, keys: Iterable[str], why: str, fix: str = "") -> Iterator[RecipeProblem]:
        """Problems of keys that have no effect, where they do not hold their default.

        Args: keys: of the section; why: to follow "has no effect"; fix: another way than to leave them out.
        """
        for key in keys:
            if not self.is_default(key):
                yield RecipeProblem(key, f"has no effect {why}; leave it out{f', or {fix}' if fix else ''}")

    def replace(self, **changes: Any) -> Self:
        """The same section with other values, checked again."""
        return type(self)(**dict(self) | changes)


List = Annotated[tuple[T, ...], Strict(False)]
"""A tuple, from YAML's list."""
FilledList = Annotated[List[T], MinLen(1), Doc("not empty")]
Pair = Annotated[List[T], Len(2, 2), Doc("2 entries long")]
FilledDict = Annotated[dict[K, T], MinLen(1), Doc("not empty"), BeforeValidator(_or_empty)]
Plain = Annotated[Any, AfterValidator(plain)]
"""Any plain value, which others check."""
Options = Annotated[dict[str, Plain], BeforeValidator(_or_empty)]
