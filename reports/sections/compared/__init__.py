"""The sections of the report of several runs, in the order of the page."""

from rc_probe.reports.sections.section import Section
from rc_probe.reports.sections.view import ComparedView

from .ablations import Ablations
from .attention import OwnAttention
from .changes import Changes
from .curves import Curves
from .embeddings import Embeddings
from .failures import Failures
from .importance import Importance
from .key_numbers import KeyNumbers
from .not_alike import NotAlike
from .training import Training
from .what_if import WhatIf

COMPARED_SECTIONS: tuple[Section[ComparedView], ...] = (
    NotAlike(),
    Training(),
    Curves(),
    Changes(),
    KeyNumbers(),
    Embeddings(),
    Importance(),
    OwnAttention(),
    Ablations(),
    WhatIf(),
    Failures(),
)
