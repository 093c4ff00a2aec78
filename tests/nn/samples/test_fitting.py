"""Thresholds for a budget, temperatures, losses of exits, and the criteria's own arguments."""

import math

import pytest
import torch
import torch.nn.functional as F
from exit_cases import replay_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dynops.nn.samples.criteria import Entropy, IDKClass, LearnedExit, Margin, MaxSoftmax, Patience
from dynops.nn.samples.losses import (
    GradientRescale,
    distillation_loss,
    exit_cost,
    exit_probabilities,
    gradient_rescale,
    learned_exit_loss,
    self_distillation_loss,
    weighted_exit_loss,
)
from dynops.nn.samples.thresholds import confidences, fit_temperature, fit_thresholds
from dynops.testing import random_tensor

E, N, C = 4, 300, 5
COSTS = [1.0, 2.0, 4.0, 7.0]


def validation(dtype=torch.float32, exits: int = E, samples: int = N) -> tuple[Tensor, Tensor]:
    """Logits that are better at later exits, ``[E, N, C]``, and labels."""
    labels = torch.randint(0, C, (samples,))
    right = F.one_hot(labels, C).to(dtype)
    skill = (
        torch.linspace(0.8, 2.5, exits, dtype=dtype)[:, None, None] * torch.rand(samples, 1, dtype=dtype) * 2
    )
    return skill * right + torch.randn(exits, samples, C, dtype=dtype), labels


def deployed(criterion, logits: Tensor, labels: Tensor, costs=COSTS) -> tuple[float, float, Tensor]:
    """Accuracy, cost and exits of an EarlyExit with this criterion on these logits."""
    out = replay_model(criterion, len(logits))(logits.transpose(0, 1))
    accuracy = (out.logits.argmax(1) == labels).double().mean()
    return float(accuracy), float(torch.tensor(costs).double()[out.exits].mean()), out.exits


@pytest.mark.parametrize("budget", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "criterion", [MaxSoftmax(0), Entropy(0), Entropy(0, normalize=True), Margin(0), MaxSoftmax(0, [0.5, 1, 2, 3])], ids=repr
)  # fmt: skip
def test_fitted_thresholds_do_what_they_say(criterion, budget, dtype):
    """On its own samples a deployed model has exactly the expected accuracy, cost and shares."""
    logits, labels = validation(dtype)
    fitted = fit_thresholds(logits, labels, budget, COSTS, criterion)
    assert fitted.threshold.shape == (E - 1,) and fitted.threshold.dtype == torch.float64
    criterion.set_threshold(fitted.threshold)
    accuracy, cost, exits = deployed(criterion, logits, labels)
    assert (accuracy, cost) == pytest.approx((fitted.accuracy, fitted.cost), abs=1e-12)
    assert (torch.bincount(exits, minlength=E).double() / N - fitted.shares).abs().max() < 1e-12
    assert cost <= budget
    if dtype != torch.bfloat16:  # there ties let more leave than asked for
        assert cost >= min(budget, COSTS[-1]) - COSTS[-1] * E / N


def test_is_the_authors_procedure():
    """MSDNet's loops, with the ratio that the search found."""
    logits, labels = validation()
    fitted = fit_thresholds(logits, labels, 3.0, COSTS)
    q = float(fitted.shares[1] / fitted.shares[0])
    shares = torch.tensor([q**k for k in range(1, E + 1)], dtype=torch.float64)
    shares = shares / shares.sum()
    confidence = logits.softmax(2).max(2).values
    order = confidence.sort(dim=1, descending=True).indices
    gone, thresholds = torch.zeros(N, dtype=torch.bool), []
    for k in range(E - 1):
        out, count, threshold = round(N * float(shares[k])), 0, 1e8
        for i in order[k].tolist():
            if not gone[i]:
                count += 1
                if count == out:
                    threshold = float(confidence[k][i])
                    break
        gone |= confidence[k] >= threshold
        thresholds.append(threshold)
    assert fitted.threshold.tolist() == pytest.approx(thresholds, abs=5e-3)
    ratio = fitted.shares[1:] / fitted.shares[:-1]
    assert (ratio - q).abs().max() < 0.1  # geometric


@settings(max_examples=30, deadline=None)
@given(data=st.data(), exits=st.integers(1, 4), samples=st.integers(1, 12))
def test_any_confidences_ties_and_nan(data, exits, samples):
    values = st.sampled_from([0.1, 0.5, 0.9, math.nan])
    row = st.lists(values, min_size=samples, max_size=samples)
    confidence = [torch.tensor(data.draw(row)) for _ in range(exits - 1)]
    costs = sorted(data.draw(st.lists(st.integers(1, 9), min_size=exits, max_size=exits)))
    budget = data.draw(st.floats(costs[0], costs[-1] + 1))
    logits, labels = validation(exits=exits, samples=samples)
    try:
        fitted = fit_thresholds(logits, labels, budget, costs, confidence=confidence)
    except ValueError as error:  # only where NaN holds samples back
        assert "no thresholds meet" in str(error) and any(bool(c.isnan().any()) for c in confidence)
        return
    assert not fitted.threshold.isnan().any()
    exits_of = []
    for i in range(samples):
        leaves = [e for e in range(exits - 1) if confidence[e][i] >= fitted.threshold[e]]
        exits_of.append(leaves[0] if leaves else exits - 1)
    assert (
        sum(costs[e] for e in exits_of) / samples == pytest.approx(fitted.cost)
        and fitted.cost <= budget + 1e-12
    )
    right = sum(int(logits[e, i].argmax() == labels[i]) for i, e in enumerate(exits_of))
    assert fitted.accuracy == pytest.approx(right / samples)


def test_a_nan_confidence_holds_only_its_own_sample_back():
    logits, labels = validation(exits=2, samples=10)
    confidence = torch.rand(10)
    confidence[4] = math.nan
    fitted = fit_thresholds(logits, labels, 2.0, [1.0, 11.0], confidence=[confidence])
    assert fitted.cost == 2.0 and fitted.shares.tolist() == [0.9, 0.1]
    with pytest.raises(ValueError, match=r"^budget: no thresholds meet 1.9; the cheapest ones cost 2.0"):
        fit_thresholds(logits, labels, 1.9, [1.0, 11.0], confidence=[confidence])


def test_patience_and_learned_exits_are_fitted_too():
    logits, labels = validation()
    patience = Patience(1)
    fitted = fit_thresholds(logits, labels, 5.0, COSTS, patience)
    patience.set_threshold(fitted.threshold)
    accuracy, cost, _ = deployed(patience, logits, labels)
    assert (accuracy, cost) == pytest.approx((fitted.accuracy, fitted.cost)) and cost <= 5.0
    learned = LearnedExit([nn.Linear(C, 1) for _ in range(E - 1)], reads="logits")
    with torch.no_grad():
        fitted = fit_thresholds(logits, labels, 3.0, COSTS, learned)
        learned.set_threshold(fitted.threshold)
        accuracy, cost, _ = deployed(learned, logits, labels)
    assert (accuracy, cost) == pytest.approx((fitted.accuracy, fitted.cost)) and 2.8 < cost <= 3.0
    of_state = LearnedExit([nn.Linear(C, 1) for _ in range(E - 1)])
    with pytest.raises(ValueError, match=r"^state: expected the network's, as LearnedExit reads it"):
        fit_thresholds(logits, labels, 3.0, COSTS, of_state)
    given = [torch.rand(N) for _ in range(E - 1)]
    assert fit_thresholds(logits, labels, 3.0, COSTS, of_state, confidence=given).cost <= 3.0


def test_a_list_of_logits_and_one_exit():
    logits, labels = validation()
    a = fit_thresholds(logits, labels, 3.0, COSTS)
    b = fit_thresholds(list(logits), labels, 3.0, torch.tensor(COSTS))
    assert torch.equal(a.threshold, b.threshold) and a[1:3] == b[1:3]
    one = fit_thresholds(logits[:1], labels, 1.0, [1.0])
    assert one.threshold.shape == (0,) and one.shares.tolist() == [1.0] and one.cost == 1.0


def test_confidences_replay_memory():
    logits, _ = validation()
    counts = confidences(Patience(1), logits)
    same = logits[:-1].argmax(2)
    assert torch.equal(counts[0], torch.zeros(N)) and torch.equal(counts[1], (same[1] == same[0]).float())
    expected = torch.where(same[2] == same[1], counts[1] + 1, 0)
    assert torch.equal(counts[2], expected)


def test_bad_arguments_of_fits_are_named():
    logits, labels = validation()
    with pytest.raises(
        ValueError, match=r"^budget: expected at least the cost of the first exit, 1.0, got 0.5"
    ):
        fit_thresholds(logits, labels, 0.5, COSTS)
    with pytest.raises(ValueError, match=r"^budget: expected at least"):
        fit_thresholds(logits, labels, math.nan, COSTS)
    with pytest.raises(ValueError, match=r"^costs: expected 4 numbers that do not fall"):
        fit_thresholds(logits, labels, 3.0, COSTS[::-1])
    with pytest.raises(ValueError, match=r"^costs: expected 4 numbers"):
        fit_thresholds(logits, labels, 3.0, COSTS[:3])
    with pytest.raises(ValueError, match=r"^labels: expected a tensor \[300\]"):
        fit_thresholds(logits, labels[:3], 3.0, COSTS)
    with pytest.raises(TypeError, match=r"^criterion: expected a Criterion, got function"):
        fit_thresholds(logits, labels, 3.0, COSTS, lambda z, e, s: z)
    with pytest.raises(TypeError, match=r"^logits: expected \[E, N, C\] or a list"):
        fit_thresholds("logits", labels, 3.0, COSTS)
    with pytest.raises(ValueError, match=r"^logits: expected \[N, C\] with N > 0"):
        fit_thresholds(logits[:, :0], labels[:0], 3.0, COSTS)
    with pytest.raises(ValueError, match=r"^confidence: expected \[300\] for each of 3 exits"):
        fit_thresholds(logits, labels, 3.0, COSTS, confidence=[torch.rand(N)])
    with pytest.raises(ValueError, match=r"^labels: expected one for each row"):
        fit_temperature(logits[0], labels[:3])
    with pytest.raises(ValueError, match=r"^logits: expected finite numbers"):
        fit_temperature(logits[0] * math.inf, labels)


def test_temperature_minimises_the_cross_entropy():
    logits, labels = validation(torch.float64)
    logits = logits * 3  # overconfident
    fitted = fit_temperature(logits, labels)
    assert fitted.dtype == torch.float64 and fitted.shape == (E,) and (fitted > 1).all()
    for z, best in zip(logits, fitted.tolist(), strict=True):
        least = F.cross_entropy(z / best, labels)
        for factor in (0.01, 0.5, 1 - 1e-4, 1 + 1e-4, 2.0, 10.0):
            assert F.cross_entropy(z / (best * factor), labels) > least
    assert float(fit_temperature(logits[1], labels)) == float(fitted[1])
    criterion = MaxSoftmax(0.5)
    criterion.set_temperature(fitted)
    assert torch.allclose(criterion.measure(logits[2], 2)[0], (logits[2] / fitted[2]).softmax(1).amax(1))


def test_weighted_exit_loss():
    logits, labels = validation(torch.float64)
    each = [F.cross_entropy(z, labels) for z in logits]
    assert torch.allclose(weighted_exit_loss(logits, labels), sum(each))
    weighted = weighted_exit_loss(list(logits), labels, [1.0, 0.5, 0.25, 0.1])
    assert torch.allclose(weighted, each[0] + each[1] / 2 + each[2] / 4 + each[3] / 10)
    values = weighted_exit_loss(logits, logits[0], loss=F.mse_loss)
    assert torch.allclose(values, sum(F.mse_loss(z, logits[0]) for z in logits))
    half = weighted_exit_loss([z.bfloat16() for z in logits], labels)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reverse", [False, True])
def test_distillation(temperature, reverse):
    student, teacher = (random_tensor(7, C, dtype=torch.float64).requires_grad_() for _ in range(2))
    p, q = (F.softmax(z / temperature, 1) for z in (student, teacher))
    a, b = (p, q) if reverse else (q, p)
    expected = temperature**2 * (a * (a.log() - b.log())).sum() / 7
    loss = distillation_loss(student, teacher, temperature, reverse=reverse)
    assert torch.allclose(loss, expected, rtol=1e-12)
    loss.backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    target = teacher.detach()
    assert torch.autograd.gradcheck(
        lambda s: distillation_loss(s, target, temperature, reverse=reverse), student
    )


def test_distillation_of_masked_classes_maps_and_nothing():
    z = random_tensor(3, C)
    z[:, 1] = -math.inf
    student = random_tensor(3, C).requires_grad_()
    loss = distillation_loss(student, z)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    maps = [random_tensor(2, C, 3, 3) for _ in range(2)]
    flat = [m.movedim(1, 3).reshape(-1, C) for m in maps]
    assert torch.allclose(distillation_loss(*maps), distillation_loss(*flat), rtol=1e-5)
    assert float(distillation_loss(torch.zeros(0, C), torch.zeros(0, C))) == 0
    with pytest.raises(
        ValueError, match=r"^teacher: expected the student's \[N, C, ...\] \(3, 5\), got \(2, 5\)"
    ):
        distillation_loss(z, z[:2])
    with pytest.raises(ValueError, match=r"^temperature: expected a number > 0"):
        distillation_loss(z, z, 0.0)


def test_self_distillation():
    logits = [random_tensor(6, C, dtype=torch.float64).requires_grad_() for _ in range(3)]
    one, two = (distillation_loss(z, logits[2], 2.0) for z in logits[:2])
    assert torch.allclose(self_distillation_loss(logits, 2.0), one + two)
    loss = self_distillation_loss(logits, 2.0, [0.1, 0.7])
    assert torch.allclose(loss, 0.1 * one + 0.7 * two)
    loss.backward()
    assert logits[2].grad is None and logits[0].grad is not None
    assert float(self_distillation_loss(logits[:1]).detach()) == 0


def test_exit_probabilities_cost_and_learned_loss():
    confidence = [torch.rand(6, dtype=torch.float64).requires_grad_() for _ in range(2)]
    a, b = confidence
    expected = torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)])
    chance = exit_probabilities(confidence)
    assert torch.allclose(chance, expected) and torch.allclose(chance.sum(0), torch.ones(6).double())
    costs = [1.0, 3.0, 10.0]
    cost = exit_cost(confidence, costs)
    assert torch.allclose(cost, (expected[0] + 3 * expected[1] + 10 * expected[2]).mean())
    logits = [random_tensor(6, C, dtype=torch.float64).requires_grad_() for _ in range(3)]
    labels = torch.arange(6) % C
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    loss = learned_exit_loss(logits, labels, confidence, costs, penalty=0.3)
    assert torch.allclose(loss, (expected * losses).sum(0).mean() + 0.3 * cost)
    assert torch.autograd.gradcheck(
        lambda a, b, *z: learned_exit_loss(z, labels, [a, b], costs, 0.3), (a, b, *logits)
    )
    with pytest.raises(
        ValueError, match=r"^confidence: expected one for each of 2 exits but the last, got 2"
    ):
        learned_exit_loss(logits[:2], labels, confidence, costs)
    with pytest.raises(ValueError, match=r"^costs: expected one for each of 3 exits, got 2"):
        exit_cost(confidence, costs[:2])


def test_gradient_rescale():
    x = random_tensor(4, 3, dtype=torch.float64).requires_grad_()
    y = gradient_rescale({"maps": [x * 1], "depth": 3, "count": torch.arange(4)}, 0.25)
    assert y["depth"] == 3 and torch.equal(y["count"], torch.arange(4)) and torch.equal(y["maps"][0], x)
    y["maps"][0].square().sum().backward()
    assert torch.equal(x.grad, 0.25 * 2 * x.detach())
    layer = GradientRescale(2.0)
    (grad,) = torch.autograd.grad((layer(x) ** 3).sum(), x, create_graph=True)
    assert torch.allclose(grad, 2 * 3 * x**2)
    (again,) = torch.autograd.grad(grad.sum(), x)
    assert torch.allclose(again, 2 * 2 * 6 * x)  # on its way back once more
    assert torch.allclose(
        torch.func.grad(lambda v: layer(v).sum())(x.detach()), torch.full((4, 3), 2.0).double()
    )
    assert "scale=2.0" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_confidences_are_computed_in_float32(dtype):
    z = random_tensor(8, C, dtype=dtype) * 3
    for criterion in (MaxSoftmax(0.5), Entropy(0.5), Margin(0.5), IDKClass(0)):
        confidence = criterion(z, 0).confidence
        assert confidence.dtype == torch.float32
        assert torch.equal(confidence, criterion(z.float(), 0).confidence)


def test_a_sample_at_the_threshold_leaves():
    z = random_tensor(6, C)
    for criterion in (MaxSoftmax(0), Entropy(0), Margin(0), IDKClass(2)):
        confidence = criterion(z, 0).confidence
        criterion.set_threshold(criterion.to_threshold(confidence[3]))
        leave = criterion(z, 0).leave
        assert torch.equal(leave, confidence >= confidence[3]) and leave[3]


def test_bad_arguments_of_criteria_are_named():
    with pytest.raises(TypeError, match=r"^threshold: expected a number or a sequence of them, got 'high'"):
        MaxSoftmax("high")
    for bad in (math.nan, [], [[0.5]]):
        with pytest.raises(ValueError, match=r"^threshold: expected a number or one for each exit"):
            MaxSoftmax(bad)
    with pytest.raises(ValueError, match=r"^temperature: expected numbers > 0"):
        MaxSoftmax(0.5, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"^patience: expected 1 or more exits, got 0"):
        Patience(0)
    with pytest.raises(ValueError, match=r"^tolerance: expected a number > 0 or None, got 0"):
        Patience(1, 0)
    with pytest.raises(ValueError, match=r"^reads: expected 'state' or 'logits', got 'x'"):
        LearnedExit([], reads="x")
    with pytest.raises(TypeError, match=r"^index: expected an int, got 1.5"):
        IDKClass(1.5)
    with pytest.raises(
        ValueError, match=r"^logits: expected \[n, C\] with C >= 2 for Margin, got shape \(3, 1\)"
    ):
        Margin(0.5)(torch.rand(3, 1), 0)
    with pytest.raises(TypeError, match=r"^logits: expected a floating tensor, got torch.int64"):
        MaxSoftmax(0.5)(torch.zeros(3, 2, dtype=torch.int64), 0)
    with pytest.raises(
        ValueError, match=r"^threshold: expected a number or one for each exit, got 1 at exit 1"
    ):
        MaxSoftmax([0.5])(torch.rand(3, 2), 1)
    with pytest.raises(ValueError, match=r"^heads: expected \[3\] or \[3, 1\] of head 0, got \(3, 2\)"):
        LearnedExit([nn.Linear(2, 2)], reads="logits")(torch.rand(3, 2), 0)
    with pytest.raises(TypeError, match=r"^logits: expected a list of tensors, one for each exit"):
        weighted_exit_loss(torch.rand(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^weights: expected one for each of 2 exits, got 1"):
        weighted_exit_loss(torch.rand(2, 3, 4), torch.zeros(3, dtype=torch.int64), [1.0])
