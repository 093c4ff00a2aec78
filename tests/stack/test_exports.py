"""torch.export and torch.compile of converted models: every batch, size and mask gives the eager model's values."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import dynops


class Block(nn.Module):
    """A residual block with squeeze-excite; strides make odd sizes. (A pool with a stride narrows them in torch 2.11.)"""

    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, 1, 1),
        )
        self.down, self.gate = nn.Conv2d(channels, 32, 1, 2), nn.Conv2d(32, 32, 1)

    def forward(self, x):
        y = self.body(x)
        return torch.relu(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid() + self.down(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 1, 1)
        )
        self.block, self.head = Block(16), nn.Conv2d(32, 5, 3)

    def forward(self, x):
        return self.head(self.block(self.stem(x)))


class ManyOutputs(Net):
    """Functions that are not zero at zero."""

    def forward(self, x):
        low = torch.sigmoid(self.stem(x))
        high = self.block(low)
        return {"out": self.head(high) + 1, "pooled": low.mean((2, 3))}


class Untraced(ManyOutputs):
    def forward(self, x):
        if x.dtype.is_complex:  # which no trace knows
            raise TypeError
        return super().forward(x)


class Masked(nn.Module):
    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.eval().requires_grad_(True)
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 2)
        self.report = dynops.convert_(net)

    def forward(self, x, mask):
        with dynops.use_mask(mask):
            return self.net(x)


EXAMPLE = torch.randn(2, 3, 64, 96), torch.rand(2, 8, 12) < 0.5
NAMED = {
    "x": dict(enumerate((Dim("n", max=64), Dim.STATIC, Dim("h", min=32, max=999), Dim("w", min=32, max=999))))
}
NAMED["mask"] = {0: NAMED["x"][0], 1: Dim("rows", max=999), 2: Dim("columns", max=999)}
ANY = {"x": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, "mask": {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}}
# batch, image, mask: cells, pixels, a size that is no multiple, finer than the image's last maps
SIZES = [(2, (64, 96), (8, 12)), (3, (70, 101), (70, 101)), (5, (96, 64), (7, 5)), (2, (65, 64), (130, 128))]


@torch.no_grad()
def check(exported, model, sizes=SIZES):
    for n, image, cells in sizes:
        for density in (0, 0.25, 0.6, 1):
            x, mask = torch.randn(n, 3, *image), torch.rand(n, *cells) < density
            expected = model(x, mask)
            for grad in (False, True):
                with torch.set_grad_enabled(grad):
                    torch.testing.assert_close(exported(x, mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shapes, strict", [(NAMED, False), (ANY, True)], ids=["named", "any, strict"])
def test_every_batch_image_and_mask(shapes, strict, fresh_dynamo):
    model = Masked(Net())
    with torch.no_grad():
        program = torch.export.export(model, EXAMPLE, dynamic_shapes=shapes, strict=strict)
    check(program.module(), model)
    made = [str(node.target) for node in program.graph.nodes if "dynops.scatter" in str(node.target)]
    assert (
        strict or len(made) == 2
    )  # for the pool and the result; where it is strict, squeeze-excite is dense too


class Unet(nn.Module):
    """Comes back to sizes that it had, which symbols of sizes do not tell."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1))
        self.up = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Upsample(scale_factor=2))
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x):
        return self.last(self.up(self.down(x)))


def test_a_map_that_is_enlarged_to_its_size_has_its_mask():
    model = Masked(Unet())
    with torch.no_grad():
        program = torch.export.export(model, EXAMPLE, dynamic_shapes=ANY)
    check(program.module(), model, [*SIZES, (1, (64, 32), (64, 32)), (2, (40, 56), (20, 28))])


@pytest.mark.parametrize("shapes", [None, ANY], ids=["fixed", "any"])
@pytest.mark.parametrize("net", [Untraced, ManyOutputs])
def test_a_forward_that_cannot_be_traced_and_one_with_many_outputs(net, shapes):
    model = Masked(net())
    assert ("" in model.report.unfused) == (net is Untraced)
    program = torch.export.export(model, EXAMPLE, dynamic_shapes=shapes)  # with gradients
    check(program.module(), model, SIZES if shapes else SIZES[:1])


def test_one_mask_for_every_sample():
    model, (x, mask) = Masked(Net()), EXAMPLE
    program = torch.export.export(model, (x, mask[:1]), dynamic_shapes={"x": {0: Dim.AUTO}, "mask": None})
    x, mask = torch.randn(3, 3, 64, 96), torch.rand(1, 8, 12) < 0.4
    torch.testing.assert_close(program.module()(x, mask), model(x, mask), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_mode_of_the_export():
    model, (x, mask) = Masked(Net()), EXAMPLE
    with torch.no_grad():
        frozen = torch.export.export(model, EXAMPLE).module()
    weight = frozen.get_parameter("net.stem.0.weight")
    assert torch.autograd.grad(frozen(x, mask).sum(), weight, allow_unused=True) == (None,)
    trained = torch.export.export(model, EXAMPLE).module()
    weight = trained.get_parameter("net.stem.0.weight")
    expected = torch.autograd.grad(model(x, mask).sum(), model.net.stem[0].weight)
    torch.testing.assert_close(
        torch.autograd.grad(trained(x, mask).sum(), weight), expected, rtol=1e-3, atol=1e-4
    )


def test_compiled_it_gives_what_it_gives_eager(fresh_dynamo):
    """The mask inside of the compiled function, and outside of it."""
    model = Masked(ManyOutputs())
    inside, outside = torch.compile(model, backend="eager"), torch.compile(model.net, backend="eager")
    check(inside, model, SIZES[:1])

    def entered(x, mask):
        with dynops.use_mask(mask):
            return outside(x)

    check(entered, model, SIZES[:1])


def test_a_graph_that_must_not_break_names_what_breaks_it(fresh_dynamo):
    many = Masked(ManyOutputs())
    torch.compile(many, backend="eager", fullgraph=True)(*EXAMPLE)
    model = Masked(Untraced())
    with pytest.raises(torch._dynamo.exc.Unsupported, match="forward_that_needs_maps"):
        torch.compile(model, backend="eager", fullgraph=True)(*EXAMPLE)


class Centred(nn.Conv2d):
    """A convolution whose weight is made of its parameters, which is kept where nothing is compiled."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Shuffled(nn.Module):
    """Channels shuffled by a reshape, which has to copy."""

    def __init__(self, channels, last, **options):
        super().__init__()
        self.conv = nn.Conv2d(channels, last, 3, **options)

    def forward(self, x):
        n, c, h, w = x.shape
        return self.conv(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


@pytest.mark.parametrize("layer", [Centred(8, 8, 3, padding=1), Shuffled(8, 8, padding=1)])
def test_an_export_of_what_eager_calls_keep_or_copy(layer):
    model = Masked(nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), layer))
    with torch.no_grad():
        check(torch.export.export(model, EXAMPLE, strict=False).module(), model, SIZES[:1])
