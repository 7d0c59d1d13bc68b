"""VeRA (arXiv 2310.11454): one frozen random pair for the whole model, two trained vectors a layer.

W' = W + diag(b) B diag(d) A        A = down [r, K], B = up [N, r] shared; b [N], d [r] trained
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from tinylora.adapters import noise
from tinylora.adapters.base import Adapter, AdapterConfig, Factors, Numbers, Site, require_number, require_whole


class Vera(Adapter):
    def factors(self) -> Factors:
        down, up = self.shared.down[:, : self.site.K], self.shared.up[: self.site.N]
        return Factors(down, self.d, self.b[:, None] * up)


@dataclass(frozen=True)
class VeraConfig(AdapterConfig):
    """VeRA: N + r numbers a layer. b starts at zero: the base, exactly; every d at `d_initial`.

    r: rank of the shared pair. It is drawn once, Kaiming-uniform, at the largest N and K that occur, and each layer
    takes the first columns and rows that it needs. d_initial: the paper's best is 0.1; 1.0 is worse.
    ValueError on anything else.
    """

    kind: ClassVar[str] = "vera"
    adapter_class: ClassVar[type[Adapter]] = Vera
    r: int = 256
    d_initial: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "r")
        require_number(self, "d_initial")

    def shared(self, sites: Sequence[Site]) -> dict[str, Numbers]:
        N, K = max(s.N for s in sites), max(s.K for s in sites)
        return {
            "down": kaiming(self.seed, "vera.down", self.r, K, trains=False),
            "up": kaiming(self.seed, "vera.up", N, self.r, trains=False),
        }

    def local(self, site: Site) -> dict[str, Numbers]:
        return {"b": Numbers((site.N,)), "d": Numbers((self.r,), self.d_initial)}


def kaiming(seed: int, key: str, rows: int, columns: int, trains: bool) -> Numbers:
    """Kaiming-uniform for what multiplies `columns` numbers: U(-√(6 / columns), √(6 / columns))."""
    return Numbers((rows, columns), partial(noise.uniform, seed, key, (6 / columns) ** 0.5), trains)
