"""Scores to decisions: hard in the forward pass, soft in the backward pass.

Every function takes scores of any shape and returns a :class:`Decision` of that shape and dtype. They compute
in float32 at least. Without noise they are functions of their arguments alone. A score that is NaN gives a
mask that is NaN, which plans refuse. None reads a value back to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_broadcasts, check_floating, check_int, check_noise, check_number, wide

SURROGATES = ("sigmoid", "identity", "clipped")


class Decision(NamedTuple):
    """The decision of a gate.

    ``mask``: float, nonzero where the gate is open. It is 0 or 1 with the gradient of a soft function, unless
    the gate says that its mask is soft. Detached, it is what plans take. ``score``: the soft value, in [0, 1]
    unless the gate says otherwise; without noise.
    """

    mask: Tensor
    score: Tensor


def _hard(is_open: Tensor, soft: Tensor) -> Tensor:
    """0 or 1 with the gradient of ``soft``; NaN where that is.

    Exact: ``soft - soft`` is zero, where ``1 - soft + soft`` may not be 1.
    """
    return is_open.to(soft.dtype) + (soft - soft.detach())


def _decision(mask: Tensor, score: Tensor, like: Tensor) -> Decision:
    return Decision(mask.to(like.dtype), score.to(like.dtype))


def straight_through(logits: Tensor, threshold: float = 0.0, surrogate: str = "sigmoid") -> Decision:
    """``mask = logits > threshold``, with the gradient of a surrogate.

    Args:
        logits: floating, any shape.
        threshold: a number; 0.5 with ``surrogate="identity"`` for scores that are probabilities.
        surrogate: the soft function, and the score:
            "sigmoid": ``sigmoid(logits - threshold)`` (SkipNet);
            "identity": ``logits``, a gradient of 1 (Bengio et al., Skip RNN), but none where they are infinite;
            "clipped": ``clip((logits - threshold + 1) / 2, 0, 1)``, the hard sigmoid of BinaryNet: a gradient of
            1/2 within 1 of the threshold, none further away.

    Returns:
        Decision: the mask is hard.

    Raises:
        TypeError: logits that are no floating tensor. ValueError: another surrogate, a threshold that is not
            finite.

    Papers: Bengio et al., Estimating or propagating gradients through stochastic neurons (arXiv 2013); Hubara
    et al., Binarized neural networks (NIPS 2016); Wang et al., SkipNet (ECCV 2018).
    """
    check_floating("logits", logits)
    check_number("threshold", threshold)
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate: expected one of {', '.join(SURROGATES)}, got {surrogate!r}")
    x = wide(logits)
    if surrogate == "sigmoid":
        soft = score = torch.sigmoid(x - threshold)
    elif surrogate == "clipped":
        soft = score = ((x - threshold + 1) / 2).clamp(0, 1)
    else:
        soft, score = _without_infinite(x), x
    return _decision(_hard(x > threshold, soft), score, logits)


def _without_infinite(x: Tensor) -> Tensor:
    """Zero, without a gradient, where x is infinite: ``inf - inf`` would be NaN."""
    return x.masked_fill(x.isinf(), 0.0)


def gumbel_sigmoid(
    logits: Tensor,
    temperature: float = 1.0,
    hard: bool = True,
    training: bool = True,
    noise: bool | None = None,
) -> Decision:
    """Samples of independent gates, open with probability ``sigmoid(logits)``, with the relaxation's gradient.

    ``soft = sigmoid((logits + L) / temperature)`` with logistic noise L, the difference of two Gumbel
    variables, and ``mask = soft > 0.5`` with the gradient of soft. The probability that a gate is open does
    not depend on the temperature.

    Args:
        logits: floating, any shape.
        temperature: above 0; lower is closer to hard and has a gradient of greater variance.
        hard: False: the mask is soft itself.
        training: False: no noise.
        noise: None: as ``training`` has it. True: in evaluation too. False: none (DynConv's last epochs).

    Returns:
        Decision: the mask, and ``sigmoid(logits)``, the probability that the gate is open, as score.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Maddison et al., The concrete distribution; Jang et al., Categorical reparameterization with
    Gumbel-softmax (both ICLR 2017); Verelst and Tuytelaars, Dynamic convolutions (CVPR 2020).
    """
    check_floating("logits", logits)
    check_number("temperature", temperature, above=0)
    check_noise(noise)
    x = wide(logits)
    score = torch.sigmoid(x)
    noisy = x
    if training if noise is None else noise:
        # One uniform number does for two Gumbel ones; at the edges logit is infinite.
        noisy = x + torch.logit(torch.rand_like(x), eps=torch.finfo(x.dtype).eps)
    soft = torch.sigmoid(noisy / temperature)
    return _decision(_hard(noisy > 0, soft) if hard else soft, score, logits)


def gumbel_softmax(
    logits: Tensor,
    temperature: float = 1.0,
    hard: bool = True,
    training: bool = True,
    dim: int = -1,
    noise: bool | None = None,
) -> Decision:
    """A one-hot sample of a choice with probabilities ``softmax(logits)``, with the relaxation's gradient.

    ``soft = softmax((logits + G) / temperature)`` with Gumbel noise G, and ``mask`` is one at its largest,
    with the gradient of soft.

    Args:
        logits: floating ``[..., K, ...]``, the choices along ``dim``; K at least 1.
        temperature, hard, training, noise: as in :func:`gumbel_sigmoid`. Without noise it is the choice of
            the largest logit.
        dim: the dimension of the choices.

    Returns:
        Decision: the mask, and ``softmax(logits)`` as score.

    Raises:
        TypeError, ValueError: an argument that does not fit. IndexError: no such dimension.

    Papers: those of :func:`gumbel_sigmoid`; Veit and Belongie, ConvNet-AIG (ECCV 2018).
    """
    check_floating("logits", logits)
    check_number("temperature", temperature, above=0)
    check_noise(noise)
    x = wide(logits)
    score = torch.softmax(x, dim)
    noisy = x
    if training if noise is None else noise:
        noisy = x - torch.empty_like(x).exponential_().log()
    soft = torch.softmax(noisy / temperature, dim)
    if not hard:
        return _decision(soft, score, logits)
    chosen = torch.zeros_like(x).scatter(dim, noisy.argmax(dim, keepdim=True), 1.0)
    return _decision(_hard(chosen, soft), score, logits)


def saturating_sigmoid(x: Tensor) -> Tensor:
    """``clip(1.2 sigmoid(x) - 0.1, 0, 1)``: exactly 0 or 1, without a gradient, further from 0 than log(11)."""
    return (1.2 * torch.sigmoid(x) - 0.1).clamp(0, 1)


def improved_semhash(logits: Tensor, training: bool = True, noise_std: float = 1.0) -> Decision:
    """Improved semantic hashing: noise before a saturating sigmoid, and half of the samples discrete.

    ``soft = saturating_sigmoid(logits + noise_std * N(0, 1))``. In training a fair coin for each sample
    (index of dimension 0) says whether the mask is soft or ``logits + noise > 0``; both have the gradient of
    soft. So a training mask is not all 0 and 1. In evaluation it is: ``logits > 0``.

    Args:
        logits: floating ``[N, ...]``.
        training: noise and coins.
        noise_std: the standard deviation; the papers' is 1. The probability of an open gate is then
            Phi(logits).

    Returns:
        Decision: the mask, and ``saturating_sigmoid(logits)`` as score.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Papers: Kaiser and Bengio, Discrete autoencoders for sequence models (arXiv 2018); Chen et al., You look
    twice: GaterNet (CVPR 2019).
    """
    check_floating("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits: expected [N, ...], got a tensor without dimensions")
    check_number("noise_std", noise_std)
    if noise_std < 0:
        raise ValueError(f"noise_std: expected it at least 0, got {noise_std!r}")
    x = wide(logits)
    score = saturating_sigmoid(x)
    if not training:
        return _decision(_hard(x > 0, score), score, logits)
    noisy = x + noise_std * torch.randn_like(x)
    soft = saturating_sigmoid(noisy)
    coin = torch.rand([x.shape[0]] + [1] * (x.dim() - 1), device=x.device)
    return _decision(torch.where(coin < 0.5, _hard(noisy > 0, soft), soft), score, logits)


def relu_tanh(logits: Tensor) -> Decision:
    """``mask = score = max(0, tanh(logits))``: a soft gate that is zero exactly for logits up to 0.

    It has no gradient there, so a closed gate stays closed until its input changes: start with logits well
    above 0 (the paper's bias is 1.5).

    Args:
        logits: floating, any shape.

    Raises:
        TypeError: logits that are no floating tensor.

    Paper: Li et al., Learning dynamic routing for semantic segmentation (CVPR 2020).
    """
    check_floating("logits", logits)
    mask = torch.relu(torch.tanh(logits))
    return Decision(mask, mask)


def top_k(score: Tensor, k: int, dim: int = -1) -> Decision:
    """``mask``: one at the k largest scores along ``dim``, with the gradient of all scores, the dropped too.

    Where the scores are weights too, what is dropped gets no gradient: ``mask.detach() * score``.

    Args:
        score: floating ``[..., K, ...]``.
        k: 1 to K. Ties are broken so that exactly k are kept.
        dim: the dimension of the choices.

    Returns:
        Decision: the mask is hard, the score is the argument. An infinite score has no gradient.

    Raises:
        TypeError, ValueError: an argument that does not fit. IndexError: no such dimension.
    """
    kept = _kept(score, k, dim, "score")
    return Decision(_hard(kept, _without_infinite(score)), score)


def _kept(score: Tensor, k: int, dim: int, name: str) -> Tensor:
    """One at the k largest along dim."""
    check_floating(name, score)
    check_int("k", k)
    if score.dim() == 0 or k > score.shape[dim]:
        size = 0 if score.dim() == 0 else score.shape[dim]
        raise ValueError(f"k: expected at most the {size} of dimension {dim} of {name}, got {k}")
    index = score.detach().topk(k, dim).indices
    return torch.zeros_like(score).scatter(dim, index, 1.0)


def noisy_top_k(logits: Tensor, noise_std: float | Tensor, k: int, training: bool = True) -> Decision:
    """Noisy top-k: the softmax over the k largest of ``logits + noise_std * N(0, 1)``, zeros elsewhere.

    For experts use ``nn.TopKRouter(noise=True)``: it learns ``noise_std`` and estimates each expert's load.

    Args:
        logits: floating ``[..., K]``.
        noise_std: the standard deviations, a number or a tensor that broadcasts with logits, with a gradient.
        k: 1 to K.
        training: False: no noise.

    Returns:
        Decision: the mask is soft: the weights, which sum to 1, k of them above 0. The score is
            ``softmax(logits)``.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Shazeer et al., Outrageously large neural networks (ICLR 2017).
    """
    check_floating("logits", logits)
    x = noisy = wide(logits)
    if not isinstance(noise_std, Tensor):
        check_number("noise_std", noise_std)
    else:
        check_broadcasts("noise_std", noise_std, x.shape)
    if training:
        noisy = x + torch.randn_like(x) * noise_std
    kept = _kept(noisy, k, -1, "logits")
    mask = torch.softmax(noisy.masked_fill(kept == 0, -torch.inf), -1)
    return _decision(mask, torch.softmax(x, -1), logits)


def threshold(score: Tensor, threshold: float | Tensor = 0.0, slope: float = 1.0) -> Decision:
    """``mask = score > threshold``, with the gradient of ``sigmoid(slope * (score - threshold))`` for both.

    Args:
        score: floating, any shape.
        threshold: a number, or a tensor that broadcasts to score's shape: a learned one gets a gradient.
        slope: above 0; CGNet's is 2.

    Returns:
        Decision: the mask is hard; the score is that sigmoid.

    Raises:
        TypeError, ValueError: an argument that does not fit, with what was expected and what came.

    Paper: Hua et al., Channel gating neural networks (NeurIPS 2019).
    """
    check_floating("score", score)
    check_number("slope", slope, above=0)
    if not isinstance(threshold, Tensor):
        check_number("threshold", threshold)
    else:
        check_broadcasts("threshold", threshold, score.shape)
    excess = wide(score) - threshold
    soft = torch.sigmoid(slope * excess)
    return _decision(_hard(excess > 0, soft), soft, score)


def annealed_temperature(start: float, end: float, progress: float) -> float:
    """``start * (end / start) ** progress``: from start to end while progress goes from 0 to 1."""
    check_number("start", start, above=0)
    check_number("end", end, above=0)
    check_number("progress", progress)
    return start * (end / start) ** min(max(progress, 0.0), 1.0)
