"""Every mode of differentiation: second derivatives, forward mode, and what has none raises."""

import pytest
import torch
from mode_cases import REFUSING, Maker, cases, differentiable_ops, of_tensors, overload
from torch.autograd import gradcheck, gradgradcheck

CASES = cases(Maker(torch.float64))


def test_every_op_with_a_derivative_has_a_case():
    assert differentiable_ops() == {name.partition("/")[0] for name in CASES} | REFUSING


@pytest.mark.parametrize("name", CASES)
def test_first_and_second_derivatives_in_both_modes(name):
    run, tensors = of_tensors(name, CASES[name])
    tensors = [t.clone().requires_grad_() for t in tensors]
    checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert gradcheck(run, tensors, fast_mode=True, **checks)
    assert gradgradcheck(run, tensors, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_an_op_without_a_derivative_raises():
    z = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="expert_activation_grad: has no derivative"):
        overload("expert_activation_grad")(torch.randn(4, 3), z, "silu", True, False, 1.7, 7.0, "")
