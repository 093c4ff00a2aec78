"""DETR under its pixel_mask: each image of a batch gets what it gets alone."""

import copy
import pickle

import pytest
import torch

import dynops
from dynops.integrations.transformers import use_pixel_mask

pytest.importorskip("transformers", minversion="5.7")

import transformers

SIZES = (
    (97, 130),
    (64, 75),
    (120, 33),
)  # 75 of 130 in a map of 5: transformers' own mask has a column too many


def detr(kind="Detr", library="transformers"):
    """A small model of random weights, whose frozen norms do something."""
    torch.manual_seed(0)
    if library == "timm":
        backbone = transformers.TimmBackboneConfig(
            backbone="resnet10t", use_pretrained_backbone=False, out_indices=[2, 4]
        )
    else:
        backbone = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32, 32, 64], depths=[1] * 4, out_features=["stage2", "stage4"]
        )
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64), ("attention_heads", 4))}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        backbone_config=backbone, d_model=32, num_queries=5, **sizes
    )
    model = getattr(transformers, f"{kind}ForObjectDetection")(config).eval()
    for module in model.modules():
        if type(module).__name__.endswith("FrozenBatchNorm2d"):
            module.bias.normal_()
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.double()


def batch():
    images = [torch.randn(3, *size, dtype=torch.float64) for size in SIZES]
    x, mask = dynops.ragged(images)
    return images, x, mask.long()


@pytest.mark.parametrize(
    "kind, library",
    [
        ("Detr", "transformers"),
        ("ConditionalDetr", "transformers"),
        ("TableTransformer", "transformers"),
        ("Detr", "timm"),
    ],
)
def test_each_image_gets_what_it_gets_alone(kind, library):
    if library == "timm":
        pytest.importorskip("timm")
    model, (images, x, mask) = detr(kind, library), batch()
    dense = copy.deepcopy(model)
    report = use_pixel_mask(model)
    assert report.sparse_share == 1 and not report.skipped
    with torch.no_grad():
        out, padded = model(x, mask), dense(x, mask)
        for n, image in enumerate(images):
            alone = dense(image[None])
            for name in ("logits", "pred_boxes"):
                torch.testing.assert_close(out[name][n], alone[name][0], rtol=1e-9, atol=1e-9)
            assert (padded.logits[n] - alone.logits[0]).norm() > 1e-3 * alone.logits.norm()
        assert torch.equal(
            model(images[0][None]).logits, model(images[0][None], torch.ones(1, *SIZES[0])).logits
        )


def test_the_backbone_computes_images_alone():
    model, (images, x, mask) = detr(), batch()
    dense = copy.deepcopy(model).model.backbone
    use_pixel_mask(model)
    maps = model.model.backbone(x.requires_grad_(), mask)
    sum(found.square().sum() for found, _ in maps).backward()
    for n, image in enumerate(images):
        every = dense(image.requires_grad_()[None], torch.ones(1, *image.shape[1:]))
        for (found, own), (alone, _) in zip(maps, every, strict=True):
            h, w = alone.shape[2:]
            torch.testing.assert_close(found[n, :, :h, :w], alone[0])
            assert own[n].sum() == h * w and own[n, :h, :w].all()
            assert not found[n][:, ~own[n]].any()
        (grad,) = torch.autograd.grad(sum(alone.square().sum() for alone, _ in every), image)
        torch.testing.assert_close(x.grad[n, :, : image.shape[1], : image.shape[2]], grad)


def test_copies_and_the_way_back():
    model, (_, x, mask) = detr(), batch()
    dense = copy.deepcopy(model)
    use_pixel_mask(model)
    use_pixel_mask(model)
    with torch.no_grad():
        expected = model(x, mask).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(x, mask).logits, expected)
        assert list(model.state_dict()) == list(dense.state_dict())
        dynops.revert_(model)
        assert torch.equal(model(x, mask).logits, dense(x, mask).logits)


def test_errors():
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        use_pixel_mask(3)
    with pytest.raises(TypeError, match="called with a pixel_mask, as DETR's is, got Linear with 0"):
        use_pixel_mask(torch.nn.Linear(1, 1))


def test_hidden_states_are_those_of_the_layers():
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1, 1, 2, 2]}
    config = transformers.SegformerConfig(**sizes, decoder_hidden_size=16)
    model, x = transformers.SegformerForSemanticSegmentation(config).eval(), torch.randn(1, 3, 64, 64)
    dense = copy.deepcopy(model)
    dynops.convert_(model)
    with torch.no_grad():
        with dynops.use_mask(torch.ones(1, 8, 8)):
            out = model(x, output_hidden_states=True)
        expected = dense(x, output_hidden_states=True)
    states = zip(out.hidden_states, expected.hidden_states, strict=True)
    for one, other in ((out.logits, expected.logits), *states):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
