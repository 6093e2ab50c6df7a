"""The sections of the report of a run, in the order of the page: one file and one line here for each."""

from .ablations import Ablations
from .attention import OwnAttention
from .below_float_floor import BelowFloatFloor
from .drops import Drops
from .embeddings import Embeddings
from .heads.ranks import HeadRanks
from .heads.truncation import Truncation
from .importance import Importance
from .massive import MassiveTokens
from .metrics import OtherMetrics
from .paths.chains import Chains
from .paths.paths import Paths
from .residual import Residual
from .section import Section
from .streams import Streams
from .view import View
from .what_if import WhatIf

SECTIONS: tuple[Section[View], ...] = (
    Residual(),
    Streams(),
    Importance(),
    Drops(),
    WhatIf(),
    Embeddings(),
    HeadRanks(),
    Truncation(),
    MassiveTokens(),
    OwnAttention(),
    Ablations(),
    Paths(),
    Chains(),
    BelowFloatFloor(),
    OtherMetrics(),
)
