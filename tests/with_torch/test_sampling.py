"""From logits to tokens."""

import pytest

pytest.importorskip("torch", reason="torch is not installed; make train-deps")

import torch

from agent.engines.sampling import choose
from agent.errors import EngineError


def test_the_likeliest_token_with_its_log_probability_and_the_others() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    expected = logits.log_softmax(-1)
    first, second = choose(logits, temperature=0.0, seed=0, position=0, n_alternatives=2)
    assert (first.id, second.id) == (1, 0)
    assert first.logp == pytest.approx(expected[0, 1].item(), abs=1e-6)
    assert [one for one, _ in first.alternatives] == [1, 2]
    assert first.alternatives[1][1] == pytest.approx(expected[0, 2].item(), abs=1e-6)
    assert choose(logits, temperature=0.0, seed=0, position=0, n_alternatives=0)[0].alternatives == ()
    assert len(choose(logits, temperature=0.0, seed=0, position=0, n_alternatives=9)[0].alternatives) == 3
    assert choose(logits[:0], temperature=0.0, seed=0, position=0, n_alternatives=1) == []


def test_chance_follows_the_shares_and_logps_are_those_before_the_temperature() -> None:
    row = torch.tensor([1.0, 0.0, -1.0, 2.0])
    draws = choose(row.repeat(4000, 1), temperature=0.7, seed=5, position=0, n_alternatives=0)
    shares = (row / 0.7).softmax(-1)
    for one in range(4):
        seen = sum(each.id == one for each in draws) / len(draws)
        assert seen == pytest.approx(shares[one].item(), abs=0.03)
    assert draws[0].logp == pytest.approx(row.log_softmax(-1)[draws[0].id].item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-45])
def test_next_to_no_temperature_is_none(temperature: float) -> None:
    logits = torch.tensor([[20.0, 30.0, 29.99], [-5.0, -4.0, -9.0]])
    (first, second), expected = (
        choose(logits, temperature=each, seed=3, position=0, n_alternatives=0) for each in (temperature, 0.0)
    )
    assert [first, second] == expected


def test_chance_belongs_to_the_place_and_the_seed() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))

    def ids(rows: slice, seed: int = 3, position: int = 10) -> list[int]:
        return [
            each.id for each in choose(logits[rows], temperature=1.0, seed=seed, position=position, n_alternatives=0)
        ]

    whole = ids(slice(0, 8))
    assert whole == ids(slice(0, 8))
    assert whole[5:] == ids(slice(5, 8), position=15)
    assert whole != ids(slice(0, 8), seed=4)


def test_a_share_of_nothing_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, float("-inf"), float("-inf"), 0.0, float("-inf")]]).repeat(200, 1)
    assert {each.id for each in choose(logits, temperature=1.0, seed=1, position=0, n_alternatives=0)} == {0, 3}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_no_text(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, float("nan"), 1.0]])
    with pytest.raises(EngineError, match="NaN"):
        choose(logits, temperature=temperature, seed=0, position=0, n_alternatives=2)
