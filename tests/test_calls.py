"""What is read from a parent's source: which children get one tensor, and whose weight it reads."""

import torch
from torch import nn

from tinylora.nn.calls import called_together, only_read


class Straight(nn.Module):
    def forward(self, x, y):
        w = self.l(x)
        x.add_(1)
        w = w + self.m(x)
        torch.neg_(x)
        w = w + self.n(x)
        w = nn.functional.relu(x, inplace=True)
        a = self.a(x) + self.b(x).view(-1) + w
        if a.sum() > 0:
            c = self.c(x)
            d = self.d(x, 1)
        else:
            c, d = self.e(x), 0
        y = self.f(y)
        return self.g(y), self.h(x), c + d, self.i(y) if d else self.j(y), [self.k(z) for z in y]


def test_the_rule_reads_the_parents_forward():
    """One variable, one branch, not assigned in between; nothing that runs only sometimes."""
    assert called_together(Straight) == [["c", "d"], ["a", "b", "h"]]
    assert called_together(nn.Identity) == []  # nothing to find
    made = type("Made", (nn.Module,), {"forward": eval("lambda self, x: self.a(x) + self.b(x)")})
    assert called_together(made) == []  # no source to read


class Reads(nn.Module):
    """As an attention that hands its projections' weights to one function."""

    scale = lambda self: self.k.weight.shape[0]  # noqa: E731
    none = lambda: 1  # noqa: E731

    def __init__(self):
        super().__init__()
        self.q.weight.zero_()

    @staticmethod
    def epsilon():
        return 1e-6

    @staticmethod
    def helper(other):
        return other.o.weight

    def forward(self, x):
        return nn.functional.linear(x, self.out.weight, self.out.bias) + self.q(x) + self.q.weight.sum()


def test_the_children_whose_weight_alone_is_read():
    assert only_read(Reads) == {"out"}
    unread = type("Unread", (Reads,), {"other": eval("lambda self: self.a.weight")})
    assert only_read(unread) == frozenset()  # no source: nothing is known
