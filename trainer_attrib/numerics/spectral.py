"""What training leaves of a force on the weights, by the curvature along it."""

from __future__ import annotations

from torch import Tensor


def proximal_response(curvature_K: Tensor, decay: float = 0.0) -> Tensor:
    """1 / (a + d + 1): where a unit force moves a weight, of where it would without curvature and decay.

    ``a`` is curvature times the distance that training moved a weight per unit of constant gradient: the sum of
    learning rates, over the root of Adam's second moments. In these units the damping of the inverse Hessian is 1: what training
    did not have the time to learn, it does not respond to (Bae et al. 2022, "If influence functions are the answer,
    then what is the question?", for the proximal problem that this solves; Ali et al. 2019, "A continuous-time view of
    early stopping for least squares regression", theorem 1, for stopping after a time t as a proximity of 1 / t).

    Args:
        curvature_K: a; what rounding put below 0 counts as 0.
        decay: d, the sum of learning rate times weight decay.
    """
    return 1 / (curvature_K.clamp_min(0) + decay + 1)
