"""What is measured of a model: one file for each measurement, all listed here."""

from rc_probe.results.tables import RUN_TABLES, Table

from .ablations import Ablations
from .attention.attention import Attention
from .chains import Chains
from .curves import Curves, Streams
from .drops.drops import Drops
from .embeddings.embeddings import Embeddings
from .floor import Floor
from .heads.spectra import HeadRanks
from .heads.truncation import Truncation
from .importance.importance import Importance
from .massive import Massive
from .measurement import Measurement
from .paths.paths import Paths
from .what_if.what_if import WhatIf

MEASUREMENTS: tuple[Measurement, ...] = (
    Curves(),
    Streams(),
    Massive(),
    Attention(),
    Embeddings(),
    Importance(),
    Drops(),
    WhatIf(),
    HeadRanks(),
    Truncation(),
    Ablations(),
    Floor(),
    Paths(),
    Chains(),
)
TABLES: dict[str, Table] = {table.name: table for each in MEASUREMENTS for table in each.tables} | RUN_TABLES
