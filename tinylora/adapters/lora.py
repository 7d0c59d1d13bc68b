"""LoRA (arXiv 2106.09685) and rsLoRA (arXiv 2312.03732): both thin factors trained, no core.

W' = W + s · B A        A = down [r, K], B = up [N, r]; s = alpha / r, or alpha / √r for rsLoRA
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from tinylora.adapters import noise
from tinylora.adapters.base import (
    Adapter,
    AdapterConfig,
    Factors,
    Numbers,
    Site,
    require,
    require_number,
    require_whole,
)


class Lora(Adapter):
    fp32_buffers = ("core",)

    def factors(self) -> Factors:
        return Factors(self.down, self._buffers.get("core"), self.up)


@dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """LoRA: r (N + K) numbers a layer. up starts at zero: the base, exactly; down ~ U(-1/√K, 1/√K) as in PEFT.

    r:      rank, 1 or more
    alpha:  the update is scaled by alpha / r
    rslora: scale by alpha / √r instead

    Where the scale is not 1 it stands in the core, on its diagonal: applied at rank r, on the way.
    ValueError on anything else.
    """

    kind: ClassVar[str] = "lora"
    adapter_class: ClassVar[type[Adapter]] = Lora
    r: int = 8
    alpha: float = 16.0
    rslora: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "r")
        require_number(self, "alpha", above=0)
        require(self, "rslora", self.rslora in (True, False, None), "True or False")
        object.__setattr__(self, "rslora", bool(self.rslora))

    @property
    def scale(self) -> float:
        return self.alpha / (self.r**0.5 if self.rslora else self.r)

    def local(self, site: Site) -> dict[str, Numbers]:
        down = Numbers((self.r, site.K), partial(noise.uniform, self.seed, f"{site.name}.down", site.K**-0.5))
        core = {} if self.scale == 1 else {"core": Numbers((self.r,), self.scale, trains=False)}
        return {"down": down, "up": Numbers((site.N, self.r))} | core
