import pytest
import torch
from scipy.optimize import minimize

from examples import load_example

pendulum = load_example("pendulum")


def test_the_gradient_through_scipy_is_that_of_finite_differences_of_the_whole_pipeline(
    monkeypatch,
):
    def accurately(*args, options, **settings):
        return minimize(*args, options=options | {"gtol": 1e-8, "ftol": 0.0}, **settings)

    monkeypatch.setattr(pendulum, "minimize", accurately)
    batch = pendulum.systems(2, seed=5)
    at = torch.tensor([0.1, -0.8, 0.5, 2.0, 0.5, 1.0], dtype=torch.float64)  # theta and log lam
    direction = torch.tensor([0.3, -1.0, 0.7, 0.5, 0.8, -0.6], dtype=torch.float64)

    def method(point):
        return pendulum.fitting(point[:3], dict(zip(pendulum.NAMES, point[3:].exp(), strict=True)))

    def outer_objective(point):
        phi = method(point).adapt(batch.support)
        return torch.func.vmap(pendulum.query_loss)(phi, batch.query).mean()

    up, down = (outer_objective(at + h * direction) for h in (1e-3, -1e-3))
    out = method(at).meta_gradient(batch)
    gradient = [
        *out.params.values(),
        *(out.lam[name] * at[3:].exp()[k] for k, name in enumerate(out.lam)),
    ]
    derivative = torch.stack(gradient) @ direction
    assert derivative.item() == pytest.approx((up - down).item() / 2e-3, rel=1e-4)


def test_a_prior_learned_in_three_steps_extrapolates_better_than_no_prior():
    found = pendulum.main(["--small"])
    assert found["learned prior"] < 0.9 * found["no prior (lam 0.001)"]
