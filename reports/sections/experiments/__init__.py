"""The sections of the report of an experiment, in the order of the page. Each shows a table, where it is there."""

from rc_probe.reports.sections.section import Section

from .circle import Circle
from .claims import Claims
from .equilibria import Equilibria
from .lengths import Lengths
from .nearest import Nearest
from .view import ExperimentView

EXPERIMENT_SECTIONS: tuple[Section[ExperimentView], ...] = (
    Claims(),
    Lengths(),
    Circle(),
    Nearest(),
    Equilibria(),
)
