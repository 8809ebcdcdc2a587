"""What the published quantizers that we compare with have in common as codecs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from commvq_core.codecs.base import Codec, FitData, SideSpec


class RivalCodec(Codec):
    """A codec of `width` bits a code, beside the scales and the like that its method stores.

    `widths` are those that it is offered in; `needs_calibration` says whether `make` learns from
    data. Most methods don't, and have no tensors.
    """

    before_rope: ClassVar[bool] = False
    needs_calibration: ClassVar[bool] = False
    widths: ClassVar[tuple[int, ...]]

    def __init__(self, spec: SideSpec, width: int) -> None:
        if width not in self.widths:
            raise ValueError(f"width is {width!r}, not one of {list(self.widths)}")
        self.spec, self.width = spec, width

    @classmethod
    def make(cls, spec: SideSpec, width: int, data: FitData | None) -> RivalCodec:
        """The codec of one side of a layer; `data` holds all its heads, if it needs any."""
        return cls(spec, width)

    def tensors(self) -> dict[str, Tensor]:
        return {}

    @property
    def resident(self) -> tuple[Tensor, ...]:
        """What stays loaded; codecs of several layers may hold the same tensor."""
        return tuple(self.tensors().values())

    @property
    def resident_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.resident)

    def config(self) -> dict[str, Any]:
        return {"width": self.width, **self.settings()}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the method leaves open and was chosen here, as JSON; results record it."""

    @classmethod
    def from_tensors(
        cls, spec: SideSpec, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> RivalCodec:
        width = config.get("width")
        if not isinstance(width, int):
            raise ValueError(f"width is {width!r}, not a whole number")
        return cls(spec, width)

    def to(self, device: Any) -> RivalCodec:
        return self
