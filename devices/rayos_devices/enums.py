"""Enums whose members are words to people and numbers to counters."""

from __future__ import annotations

from enum import Enum
from typing import Self


class IndexedEnum(Enum):
    """A member's `index` is its place among the others, from 0."""

    index: int

    def __new__(cls, value: str) -> Self:
        member = object.__new__(cls)
        member._value_ = value
        member.index = len(cls.__members__)
        return member
