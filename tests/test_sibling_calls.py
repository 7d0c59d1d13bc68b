"""Which calls of a sibling the group answers: whoever calls it, in whatever order, graph or mode."""

import pytest
import torch
from sibling_models import Pair, groups, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import tinylora
from tinylora import TinyLoraConfig

pytestmark = pytest.mark.usefixtures("side_by_side")


def change(x):
    x.add_(1)


def test_a_sibling_alone_twice_and_with_another_tensor(calls):
    class Odd(Pair):
        def forward(self, x):
            if self.plan == "ab":
                return self.a(x) + self.b(x)
            first = self.a(x)
            if self.plan == "alone":
                return first
            if self.plan == "twice":
                return first + self.a(x) + self.b(x)
            if self.plan == "another":
                return first + self.b(x + 1)
            change(x)  # the same tensor, other numbers
            return first + self.b(x)

    for plan in ("ab", "alone", "twice", "another", "in place"):
        results = []
        for siblings in (True, False):
            model = train(tinylora.apply(Odd(), TinyLoraConfig(target_modules=["a", "b"]), siblings=siblings))
            assert len(groups(model)) == siblings
            parameters = tinylora.adapter_parameters(model)
            model.plan = plan
            x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
            y = model(x.clone())
            y.sum().backward()
            # Of one that was not called: nothing, or in a group zeros
            results.append([y, *(p.grad.sum() if p.grad is not None else torch.tensor(0.0) for p in parameters)])
            for m in (model.a, model.b):  # outside the parent
                results[-1].append(m(x))
            if siblings:
                assert next(iter(m.siblings for m in (model.a, model.b))).shares is None
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_an_error_inside_the_parent_leaves_nothing_behind():
    class Fails(Pair):
        def forward(self, x):
            a = self.a(x)
            if self.plan == "fail":
                raise RuntimeError("in between")
            return a + self.b(x)

    model = train(tinylora.apply(Fails(), TinyLoraConfig(target_modules=["a", "b"])))
    model.plan = "fail"
    with pytest.raises(RuntimeError, match="in between"):
        model(torch.zeros(3, 16))
    assert model.a.siblings.shares is None and not model.a.siblings.running


def both_ways(make, run):
    """What `run` gives of a model whose siblings compute together, and of one whose do not."""
    return [
        run(train(tinylora.apply(make(), TinyLoraConfig(target_modules=["a", "b"]), siblings=s))) for s in (True, False)
    ]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("around", ["reentrant", "no_reentrant", "no_grad"])
def test_one_sibling_in_another_graph(around, compiled):
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            if around == "no_grad":
                with torch.no_grad():
                    return self.layer(x)
            return checkpoint(self.layer, x, use_reentrant=around == "reentrant")

    def run(model):
        model.a = Wrapper(model.a)
        torch._dynamo.reset()
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        (torch.compile(model, backend="aot_eager") if compiled else model)(x).square().sum().backward()
        trains = tinylora.adapter_parameters(model)
        return [x.grad, *(torch.zeros_like(p) if p.grad is None else p.grad for p in trains)]

    together, alone = both_ways(Pair, run)
    torch.testing.assert_close(together, alone)
    assert together[-1].norm() > 0


def test_what_a_layers_own_hook_does_to_its_weight_is_seen_in_the_same_call(calls):
    """Pruning and weight_norm compute it there, ZeRO-3 gathers it."""

    def double(layer, inputs):
        layer.weight.data.mul_(2)

    def run(model):
        model(torch.zeros(1, 16))
        model.b.register_forward_pre_hook(double)
        return model(torch.ones(3, 16))

    torch.testing.assert_close(*both_ways(Pair, run))
    assert calls["group"] == 1


def test_an_x_that_the_parent_changes_in_place_is_another():
    """Where no version tells: in inference mode, and in compiled graphs. The parent's source does."""

    class Item(Pair):
        def forward(self, x):
            first = self.a(x)
            x[:, 0] = 0
            return first + self.b(x)

    class Out(Pair):
        def forward(self, x):
            first = self.a(x)
            torch.neg(x, out=x)
            return first + self.b(x)

    class Part(Pair):
        def forward(self, x):
            first = self.a(x)
            x.data[0] = 1
            return first + self.b(x)

    class View(Pair):
        def forward(self, x):
            flat = x.view(-1)
            first = self.a(x)
            flat.mul_(2)
            return first + self.b(x)

    class ViewOf(Pair):
        def forward(self, x):
            y = x[:]
            first = self.a(y)
            x += 1
            return first + self.b(y)

    for kind in (Item, Out, Part, View, ViewOf):
        with torch.inference_mode():
            torch.testing.assert_close(*both_ways(kind, lambda model: model(torch.ones(3, 16))))


def test_a_compiled_sibling_s_output_may_be_changed_in_place():
    class InPlace(Pair):
        def forward(self, x):
            return self.a(x).mul_(2) * self.b(x).add_(1)

    def run(model):
        torch._dynamo.reset()
        x = torch.ones(3, 16, requires_grad=True)
        torch.compile(model, backend="aot_eager")(x).sum().backward()
        return x.grad

    torch.testing.assert_close(*both_ways(InPlace, run))


def test_a_thawed_factor_and_a_wider_bias_compute_alone(calls):
    model = train(tinylora.apply(Pair(), TinyLoraConfig(target_modules=["a", "b"])))
    model.a.adapters.default.down.requires_grad_()
    model(torch.ones(3, 16)).sum().backward()
    assert calls["group"] == 0 and model.a.adapters.default.down.grad.norm() > 0
    model = train(tinylora.apply(Pair().bfloat16(), TinyLoraConfig(target_modules=["a", "b"])))
    for layer in (model.a, model.b):
        layer.bias.data = layer.bias.data.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.ones(3, 16)).dtype == torch.bfloat16
