"""The states of networks with exits: what all samples share, rows, caches, trees."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from dynops.nn import (
    Cascade,
    EarlyExit,
    MaxSoftmax,
    TokenExit,
    TokenSequential,
)
from dynops.testing import random_tensor


def same(a, b) -> bool:
    """Whether a value went on as it is: none of its rows left."""
    return torch.equal(a, b) if isinstance(b, torch.Tensor) else a is b


class First(nn.Module):
    """Logits from the first tensor of a state, which must fit the others."""

    def forward(self, state):
        return state[0].flatten(1)[:, :4]


def exits_of(x):
    """Every second sample leaves at the first exit."""
    return lambda logits, exit, state: state[0].flatten(1)[:, 0] > 0


def states(check):
    class Stage(nn.Module):
        def forward(self, state):
            check(state)
            return (state[0] + 1, *state[1:])

    return [Stage(), Stage()]


def some(n, *shape):
    x = random_tensor(n, *shape)
    x.flatten(1)[:, 0] = torch.where(torch.arange(n) % 2 == 0, 3.0, -3.0)
    return x


SHARED = {
    "[1, T]": lambda n, t: torch.rand(1, t),
    "scalar": lambda n, t: torch.tensor(3.0),
    "[T, T]": lambda n, t: torch.ones(t, t),
    "[1, 1, T, T]": lambda n, t: torch.rand(1, 1, t, t) > 0.5,
    "[T, C]": lambda n, t: torch.rand(t, 8),
    "None": lambda n, t: None,
    "3": lambda n, t: 3,
}


@pytest.mark.parametrize("name", SHARED)
def test_what_all_samples_share_goes_on_as_it_is(name):
    value = SHARED[name](8, 5)
    model = EarlyExit(states(lambda s: seen.append(s[1])), [First()] * 2, exits_of(None)).eval()
    seen = []
    out = model((some(8, 5, 8), value))
    assert out.exits.tolist() == [0, 1] * 4 and all(same(each, value) for each in seen) and len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_pairs_is_not_cut_where_its_size_is_the_batch(dtype):
    mask, ids, seen = torch.ones(8, 8).tril().to(dtype), torch.arange(64).view(8, 8), []
    model = EarlyExit(states(lambda s: seen.append(s)), [First()] * 2, exits_of(None)).eval()
    x = some(8, 8, 8)
    with pytest.warns(UserWarning, match=r"state\[1\]: a tensor \[8, 8\] with 8 samples is taken as a mask"):
        model((x, mask, ids))
    assert same(seen[1][1], mask)
    assert torch.equal(seen[1][2], ids[1::2])  # ids are no mask
    for shared, rows in (({1: True}, slice(None)), ({1: False}, slice(1, None, 2)), ((1,), slice(None))):
        model.shared, seen[:] = (
            EarlyExit(states(None), [First()] * 2, exits_of(None), shared=shared).shared,
            [],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model((x, mask, ids))
        assert torch.equal(seen[1][1], mask[rows])


def test_a_name_in_shared_that_nothing_has_is_told():
    state = (some(8, 4), {"mask": torch.ones(8, 4)})
    model = EarlyExit([nn.Identity()] * 2, [First()] * 2, exits_of(None), shared=["msk"]).eval()
    with pytest.warns(UserWarning, match="^shared: no state of this call has 'msk' in it"):
        model(state)


def test_a_second_state_like_the_first_has_rows():
    seen = []
    model = EarlyExit(states(lambda s: seen.append(s)), [First()] * 2, exits_of(None)).eval()
    h, c = some(8, 8), random_tensor(8, 8)  # the states of an LSTM with as many units as samples
    model((h, c))
    assert torch.equal(seen[1][1], c[1::2])


def test_what_was_shared_stays_so_where_the_batch_comes_to_its_size():
    table, seen = torch.rand(4, 8), []
    model = EarlyExit(
        [*states(lambda s: seen.append(s)), *states(lambda s: seen.append(s))],
        [First()] * 4,
        lambda z, e, s: torch.arange(len(z)) >= len(z) // 2,
    ).eval()
    model((random_tensor(8, 5, 8), table))
    assert [len(s[0]) for s in seen] == [8, 4, 2, 1] and all(same(s[1], table) for s in seen)


@dataclasses.dataclass(frozen=True)
class State:
    hidden: torch.Tensor
    rest: dict


def test_states_of_every_make():
    class Stage(nn.Module):
        def forward(self, s):
            n = len(s.hidden)
            assert s.rest["maps"][0].shape == (n, 2, 3) and s.rest["maps"][1] is None
            assert (
                s.rest["again"] is s.rest["maps"][0] and s.rest["scale"].dim() == 0 and s.rest["kind"] == "x"
            )
            return dataclasses.replace(s, hidden=s.hidden + 1)

    class Head(nn.Module):
        def forward(self, s):
            return s.hidden

    maps = random_tensor(8, 2, 3)
    state = State(some(8, 4), {"maps": [maps, None], "again": maps, "scale": torch.tensor(2.0), "kind": "x"})
    model = EarlyExit([Stage(), Stage()], [Head()] * 2, lambda z, e, s: z[:, 0] > 0).eval()
    out = model(state)
    assert out.exits.tolist() == [0, 1] * 4
    assert torch.equal(out.logits[1::2], state.hidden[1::2] + 1 + 1)

    class Holder:
        def __init__(self):
            self.rows = maps

    plain = EarlyExit(states(lambda s: None), [First()] * 2, exits_of(None)).eval()
    with pytest.raises(TypeError, match=r"^state\[1\]: expected tensors, .* got Holder, which holds"):
        plain((state.hidden, Holder()))
    with pytest.raises(TypeError, match=r"^state\[1\]: expected padded sequences .* got a PackedSequence"):
        plain((state.hidden, nn.utils.rnn.pack_sequence([torch.ones(2, 3)] * 8)))
    with pytest.raises(TypeError, match=r"^shared: expected names"):
        EarlyExit([nn.Identity()], [First()], MaxSoftmax(0.5), shared="mask")


def test_heads_of_different_sizes_are_named():
    x = some(8, 8)
    heads, alike = [nn.Linear(8, 4), nn.Linear(8, 5)], lambda z, e, s: s[:, 0] > 0
    model = EarlyExit([nn.Identity()] * 2, heads, alike)
    assert [each.shape[1] for each in model(x)] == [4, 5]  # in training each has its own loss
    with pytest.raises(
        ValueError, match=r"^heads\[1\]: expected logits \[n, 4\], as heads\[0\] has them, got \[n, 5\]"
    ):
        model.eval()(x)
    with pytest.raises(ValueError, match=r"^models\[1\]: expected logits \[n, 4\], as models\[0\] has them"):
        Cascade(heads, alike).eval()(x)
    tokens = TokenExit([TokenSequential(nn.Linear(8, 8))] * 2, heads, MaxSoftmax(2.0)).eval()
    with pytest.raises(ValueError, match=r"^heads\[1\]: expected logits"):
        tokens(random_tensor(2, 3, 8))


def caches():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3
    )
    static = transformers.StaticCache(config=config, max_cache_len=16)
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    return {"dynamic": transformers.DynamicCache(), "static": static, "encoder, decoder": both}


@pytest.mark.parametrize("name", ["dynamic", "static", "encoder, decoder"])
def test_caches_lose_the_rows_of_those_who_left(name):
    class Attention(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.key, self.value = layer, nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, state):
            x, cache = state
            own = getattr(cache, "self_attention_cache", cache)
            k, v = (f(x).unflatten(2, (2, 4)).transpose(1, 2) for f in (self.key, self.value))
            k, v = own.update(k, v, self.layer)
            length = int(own.get_seq_length(self.layer))
            query = x.unflatten(2, (2, 4)).transpose(1, 2)
            out = nn.functional.scaled_dot_product_attention(query, k[:, :, :length], v[:, :, :length])
            if own is not cache:
                cross = cache.cross_attention_cache.layers[self.layer]
                out = out + nn.functional.scaled_dot_product_attention(query, cross.keys, cross.values)
            return x + out.transpose(1, 2).flatten(2), cache

    stages = [Attention(i) for i in range(3)]
    model = EarlyExit(stages, [First()] * 3, lambda z, e, s: torch.arange(len(z)) % 2 == e).eval()
    x = random_tensor(8, 3, 8)
    prefix = [random_tensor(2, 8, 2, 4, 4) for _ in range(3)]
    outs = []
    with torch.no_grad():
        for every in (True, False):
            cache = caches()[name]
            own = getattr(cache, "self_attention_cache", cache)
            for layer, (k, v) in enumerate(prefix):
                own.update(k, v, layer)
                if own is not cache:
                    cache.cross_attention_cache.update(v, k, layer)
            outs.append(model((x, cache), all_exits=every))
    every, out = torch.stack(outs[0]), outs[1]
    assert len(set(out.exits.tolist())) == 3
    torch.testing.assert_close(out.logits, every[out.exits, torch.arange(8)])
    assert all(layer.keys.shape[0] == 8 for layer in own.layers)  # the caller's cache keeps all rows
    assert int(own.layers[0].get_seq_length()) == 7  # four of before, three of this call
