from dataclasses import replace

import pytest

from agent import architecture, catalog, fitting, memory, weights
from agent.memory import GIB, Device, Optimizer, Quantisation, Training, Workload

SEVEN = architecture.of("qwen2.5-coder-7b")
THIRTEEN = architecture.of("codellama-13b")


def test_what_fits_is_left_alone() -> None:
    found = fitting.fit(SEVEN, Workload(training=Training()), 12 * GIB)
    assert found.fits
    assert found.changes == ()
    assert found.changed is None


@pytest.mark.parametrize("gib", [6, 7, 8, 9, 10, 11, 12, 13])
@pytest.mark.parametrize(
    "training", [None, Training(), Training(pairs=4, checkpointing=False, optimizer=Optimizer.ADAM)]
)
def test_what_is_named_does_fit_and_needs_all_of_it(gib: int, training: Training | None) -> None:
    workload = Workload(training=training)
    found = fitting.fit(THIRTEEN, workload, gib * GIB, [SEVEN])
    if found.fits:
        return
    if found.changed is None:
        assert gib <= 6, "a 7B with everything lowered takes less"
        return
    assert found.changed.total_bytes <= gib * GIB < found.plan.total_bytes
    by_text = {change.text: change for change in fitting.changes_for(workload)}
    is_other = found.changes[0].startswith("qwen2.5-coder-7b in place of codellama-13b")
    named = found.changes[1:] if is_other else found.changes
    subject = SEVEN if is_other else THIRTEEN
    for left_out in named:
        rest = workload
        for text in named:
            rest = rest if text == left_out else by_text[text].apply(rest)
        assert fitting.plan_of(subject, rest).total_bytes > gib * GIB, f"{left_out} is not needed"


def test_time_is_spent_before_quality() -> None:
    generous = Training(pairs=4, checkpointing=False, optimizer=Optimizer.ADAM)
    texts = [change.text for change in fitting.changes_for(Workload(quantisation=Quantisation.BF16, training=generous))]
    assert texts == [
        "gradient checkpointing",
        "one pair at a time, gradients of 4 accumulated",
        "an 8-bit optimizer",
        "the optimizer's state in the CPU's memory",
        "1 key-value cache (what does not fit into it is read anew)",
        "the base in nf4",
        "a context of 2048 tokens",
        "training rows of 384 tokens",
        "training rows of 256 tokens",
        "training rows of 128 tokens",
        "rank 8",
        "rank 4",
        "a context of 1024 tokens",
    ]


def test_each_change_saves_something() -> None:
    generous = Training(pairs=4, checkpointing=False, optimizer=Optimizer.ADAM)
    at = Workload(quantisation=Quantisation.BF16, training=generous)
    before = memory.plan(SEVEN.dimensions, at).total_bytes
    for change in fitting.changes_for(at):
        at = change.apply(at)
        after = memory.plan(SEVEN.dimensions, at).total_bytes
        assert after < before, change.text
        before = after


def test_a_13b_on_12_gib_is_told_what_would_make_it_fit() -> None:
    found = fitting.fit(THIRTEEN, Workload(training=Training()), 12 * GIB)
    assert not found.fits
    assert found.changes == ("1 key-value cache (what does not fit into it is read anew)", "a context of 2048 tokens")


def test_another_model_is_the_last_resort() -> None:
    smaller = [architecture.of("codellama-7b"), SEVEN]
    found = fitting.fit(THIRTEEN, Workload(training=Training()), 8 * GIB, smaller)
    assert found.changes[0] == "codellama-7b in place of codellama-13b"
    assert found.changed is not None
    assert found.changed.parameters == weights.parameters(smaller[0].dimensions)


def test_a_smaller_model_gets_no_longer_context_than_it_has() -> None:
    short = replace(architecture.of("qwen2.5-coder-1.5b"), context_tokens=1000)
    found = fitting.fit(SEVEN, Workload(context_tokens=32_768), 3 * GIB, [short])
    assert found.changed is not None
    assert found.changed.workload.context_tokens == 1000


def test_where_nothing_helps_nothing_is_named() -> None:
    found = fitting.fit(THIRTEEN, Workload(), GIB)
    assert not found.fits
    assert found.changes == ()
    assert found.changed is None


def test_llamacpp_has_slots_and_context_to_give() -> None:
    workload = Workload(quantisation=Quantisation.GGUF, device=Device.CPU, caches=7, served_rank=0)
    texts = [change.text for change in fitting.changes_for(workload)]
    assert texts[0].startswith("3 key-value caches")
    assert texts[-1] == "a context of 1024 tokens"
    assert not any("nf4" in text for text in texts)


def test_every_model_of_the_catalogue_can_be_planned() -> None:
    for entry in catalog.entries().values():
        found = fitting.fit(architecture.of(entry.name), Workload(training=Training(), context_tokens=2048), 24 * GIB)
        assert found.fits, entry.name
