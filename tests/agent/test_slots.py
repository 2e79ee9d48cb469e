from agent.engines.slots import Slots, common


def test_typing_on_stays_in_its_slot() -> None:
    slots = Slots(3)
    first, held = slots.choose((1, 2, 3, 4), ahead=False)
    assert held == 0
    slots.read(first, 4)
    assert slots.choose((1, 2, 3, 4, 5), ahead=False) == (first, 4)
    assert slots.choose((1, 2, 3, 9), ahead=False) == (first, 3)


def test_another_place_takes_the_slot_that_was_used_longest_ago() -> None:
    slots = Slots(2)
    one, _ = slots.choose((1, 1, 1), ahead=False)
    other, _ = slots.choose((2, 2, 2), ahead=False)
    assert one != other
    assert slots.choose((1, 1, 1, 1), ahead=False)[0] == one
    assert slots.choose((3, 3, 3), ahead=False)[0] == other


def test_documents_do_not_share_a_slot_for_the_token_with_which_all_prompts_begin() -> None:
    slots = Slots(4)
    prompts = [(0, 0, *[document] * 10) for document in range(1, 5)]
    for prompt in prompts:
        slot, _ = slots.choose(prompt, ahead=False)
        slots.read(slot, len(prompt))
    assert [slots.choose((*prompt, 7), ahead=False)[1] for prompt in prompts] == [12] * 4


def test_work_in_advance_leaves_the_prompt_in_use_alone() -> None:
    slots = Slots(2)
    used, _ = slots.choose((1, 2, 3, 4, 5, 6), ahead=False)
    assert slots.choose((1, 2, 3, 9, 9, 9), ahead=True)[0] != used  # another anchor under the same text
    assert slots.choose((1, 2, 3, 4, 5, 6, 7), ahead=True)[0] == used  # the continuation of what is on screen
    assert slots.choose((1, 2, 3, 9, 9, 9, 9), ahead=False)[0] != used  # and what was read is found


def test_a_prompt_that_was_read_in_part_is_gone_on_with_in_its_slot() -> None:
    slots = Slots(2)
    slots.choose((1, 2, 3, 4), ahead=False)
    long = (5, 6, 7, 8, 9, 10)
    slot, held = slots.choose(long, ahead=True)
    assert held == 0
    slots.read(slot, 2)
    assert slots.choose((1, 2, 3, 4, 5), ahead=False)[0] != slot
    assert slots.choose(long, ahead=True) == (slot, 2)
    slots.read(slot, 6)
    assert slots.choose((*long, 11), ahead=False) == (slot, 6)


def test_what_is_held_of_a_prompt() -> None:
    slots = Slots(2)
    assert slots.held((1, 2)) == 0
    slot, _ = slots.choose((1, 2, 3, 4), ahead=False)
    assert slots.held((1, 2, 3)) == 0  # nothing of it is computed yet
    slots.read(slot, 3)
    assert slots.held((1, 2, 3, 4, 5)) == 3
    assert slots.held((1, 9)) == 1


def test_what_another_adapter_computed_is_of_no_use() -> None:
    slots = Slots(2)
    first, _ = slots.choose((1, 2, 3, 4), "a", ahead=False)
    slots.read(first, 4)
    assert slots.held((1, 2, 3, 4), "a") == 4
    assert slots.held((1, 2, 3, 4), "b") == slots.held((1, 2, 3, 4)) == 0
    second, held = slots.choose((1, 2, 3, 4, 5), "b", ahead=False)
    assert (second != first, held) == (True, 0)
    slots.read(second, 5)
    assert slots.choose((1, 2, 3, 4, 5), None, ahead=False) == (first, 0)  # the one that was used longest ago
    assert slots.choose((1, 2, 3, 4, 5, 6), "b", ahead=False) == (second, 5)
    assert slots.held((1, 2, 3, 4), "a") == 0


def test_common() -> None:
    assert common((), (1,)) == 0
    assert common((1, 2, 3), (1, 2)) == 2
    assert common((1, 2, 3), (1, 9, 3)) == 1
