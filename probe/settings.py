"""How to measure: every option of the command and of `rc_probe.probe`. No torch here: `rc-probe --help` reads it."""

from rc_probe.common_options import CommonOptions
from rc_probe.measures import MEASUREMENTS
from rc_probe.measures.measurement import settings_type

Settings: type[CommonOptions] = settings_type(*MEASUREMENTS)
