"""How sure an accuracy is."""

import math

Z = 1.959963984540054  # of 95 %


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's interval (1927) of 95 % for a proportion:

        (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n),    p = correct/total, n = total

    Unlike p ± 1.96 √(p(1 - p)/n) it holds near 0 and 1 and for few problems. ValueError unless 0 <= correct <= total,
    total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"correct is {correct} of {total}, expected 0 <= correct <= total and total > 0")
    p, square = correct / total, Z * Z / total
    middle, half = p + square / 2, Z * math.sqrt(p * (1 - p) / total + square / (4 * total))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return 0.0 if correct == 0 else low, 1.0 if correct == total else high  # exact there, but for rounding
