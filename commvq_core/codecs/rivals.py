"""The published quantizers that an evaluation can run beside ours, by name: "kivi-2".

They are codecs like any other, but only evaluations make them; artifacts never hold one.
"""

from __future__ import annotations

from dataclasses import dataclass

from commvq_core.codecs.hadamard_int import HadamardIntCodec
from commvq_core.codecs.kivi import KiviKeyCodec, KiviValueCodec
from commvq_core.codecs.kvquant import KVQuantKeyCodec, KVQuantValueCodec
from commvq_core.codecs.rival import RivalCodec
from commvq_core.codecs.turboquant import TurboQuantCodec


@dataclass(frozen=True)
class Method:
    """A published method: its codecs of keys and values, the same for every layer."""

    key: type[RivalCodec]
    value: type[RivalCodec]

    @property
    def needs_calibration(self) -> bool:
        """Whether it learns from a calibration."""
        return self.key.needs_calibration or self.value.needs_calibration


METHODS: dict[str, Method] = {
    "kivi": Method(KiviKeyCodec, KiviValueCodec),
    "int": Method(HadamardIntCodec, HadamardIntCodec),
    "kvquant": Method(KVQuantKeyCodec, KVQuantValueCodec),
    "turboquant": Method(TurboQuantCodec, TurboQuantCodec),
}

# "kivi-2" -> its method and width.
RIVALS: dict[str, tuple[Method, int]] = {
    f"{name}-{width}": (method, width)
    for name, method in METHODS.items()
    for width in method.key.widths
}
