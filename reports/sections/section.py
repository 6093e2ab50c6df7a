"""What a section of a page is, and what it shows. The sections of a run and of a comparison are listed in tuples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rc_probe.reports.figures.panels import Figure
from rc_probe.reports.table_cells import Table

Seen_contra = TypeVar(
    "Seen_contra", contravariant=True
)  # what a section reads: a View of one run, or a Compared


@dataclass(frozen=True)
class Folded:
    """Tables behind one line that opens them."""

    summary: str
    tables: Sequence[Table]

    @classmethod
    def of(cls, summary: str, *tables: Table | None) -> "list[Folded]":
        """One, of the tables that there are; none where there are none."""
        there = [table for table in tables if table]
        return [cls(summary, there)] if there else []


@dataclass(frozen=True)
class Shown:
    """What a section shows, in the order of the page.

    lead: what this is about. finding: what was found, in one sentence that a reader can repeat
    reasons: sentences above the figures; after: below them
    tables: open; folded: behind a line each
    warning: the section is marked as one
    """

    lead: str = ""
    finding: str = ""
    reasons: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    after: Sequence[str] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Folded] = ()
    warning: bool = False


class Section(Protocol[Seen_contra]):
    """A section. measurement: the name of the one whose numbers it shows."""

    measurement: str
    title: str

    def show(self, seen: Seen_contra, /) -> Shown | None:
        """What it shows; None where there is nothing, and the page leaves it out."""


def shown(sections: Sequence[Section[Seen_contra]], seen: Seen_contra) -> list[tuple[str, Shown]]:
    """The sections that have something to show, with their titles: what a page loops over."""
    found = [(section.title, section.show(seen)) for section in sections]
    return [(title, part) for title, part in found if part]
