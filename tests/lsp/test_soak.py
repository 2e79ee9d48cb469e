"""How the memory of some processes grew."""

from lsp.keystrokes.soak import growth

MIB = 1 << 20


def test_growth_is_from_when_memory_had_settled_to_the_end() -> None:
    samples = [(float(at), {1: (50 if at < 10 else 100 if at < 55 else 103) * MIB, 2: 200 * MIB}) for at in range(60)]
    assert growth(samples, 60) == {"memory_growth": 0.01, "worst_growth": 0.03, "memory_mib": 303.0}


def test_processes_that_came_or_went_are_left_out() -> None:
    samples = [(float(at), {1: 100 * MIB} | ({3: MIB} if at > 50 else {4: MIB})) for at in range(60)]
    assert growth(samples, 60)["memory_growth"] == 0.0
    assert growth([], 60)["memory_growth"] is None
