"""The sections of the report of two models, in the order of the page."""

from rc_probe.reports.sections.section import Section

from .answers import Answers
from .changes import Changes
from .models import Models
from .parts import Parts
from .streams import Streams
from .view import DiffView

DIFF_SECTIONS: tuple[Section[DiffView], ...] = (Streams(), Parts(), Answers(), Changes(), Models())
