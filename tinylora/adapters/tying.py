"""Which modules share one v."""

from collections.abc import Sequence

from tinylora.adapters.base import Site

TYINGS = ("tiled", "structured")


def tie_groups(sites: Sequence[Site], n_tie: int, tying: str) -> list[int]:
    """The group of every site, 0 to groups - 1; contiguous, `n_tie` sites to a group, the last one the rest.

    "tiled" ties neighbours in depth order, whatever their type: ceil(modules / n_tie) groups. "structured" ties
    neighbours of the same type (q_proj with the next layers' q_proj): the sum over types of ceil(count / n_tie).
    arXiv 2602.04118, section 6.5; its counts (13 for 196 modules at 16) fit only a ceiling, with one short group.
    """
    if tying == "tiled":
        return [i // n_tie for i in range(len(sites))]
    place: list[tuple[str, int]] = []  # (type, group within the type) of every site
    seen: dict[str, int] = {}
    for site in sites:
        place.append((site.type, seen.setdefault(site.type, 0) // n_tie))
        seen[site.type] += 1
    numbers: dict[tuple[str, int], int] = {}
    types = list(seen)
    order = {kind: i for i, kind in enumerate(types)}
    for key in sorted(set(place), key=lambda k: (order[k[0]], k[1])):
        numbers[key] = len(numbers)
    return [numbers[key] for key in place]
