from __future__ import annotations

import pytest
import torch

from behavior_pipeline.contracts import MASK_ID, NUM_SPECIAL_IDS, PAD_ID
from behavior_pipeline.encoder.masking import (
    Masking,
    chosen_places,
    draw_hidden,
    mask_events,
)

NUM_USERS, NUM_ACTIONS = 1500, 12
TOKEN, EVENT, TYPE = (
    Masking(level_shares=shares) for shares in ((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0))
)


def flat_events(seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Events of users of 1 to 60 events, then filling that belongs to the last user."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 61, (NUM_USERS,), generator=generator)
    users = torch.repeat_interleave(torch.arange(NUM_USERS), lengths)
    count = len(users)
    ids = {
        "action": torch.randint(NUM_SPECIAL_IDS, NUM_ACTIONS, (count,), generator=generator),
        "item": torch.randint(NUM_SPECIAL_IDS, 5000, (count,), generator=generator),
        "category": torch.randint(NUM_SPECIAL_IDS, 40, (count,), generator=generator),
    }
    ids["item"][torch.rand(count, generator=generator) < 0.3] = PAD_ID
    filling = torch.zeros(500, dtype=torch.long)
    ids = {name: torch.cat((values, filling)) for name, values in ids.items()}
    return ids, torch.cat((users, filling + NUM_USERS - 1))


def hidden_of(masking: Masking, seed: int = 1) -> dict[str, torch.Tensor]:
    ids, users = flat_events()
    generator = torch.Generator().manual_seed(seed)
    return draw_hidden(ids, users, NUM_USERS, NUM_ACTIONS, masking, generator)


@pytest.mark.parametrize("masking", [TOKEN, EVENT, TYPE, Masking(), Masking(share=0.4)])
def test_the_share_of_every_field_is_hidden_and_no_padding(masking):
    ids, _ = flat_events()
    for name, hidden in hidden_of(masking).items():
        present = ids[name] != PAD_ID
        assert not (hidden & ~present).any()
        share = hidden.sum() / present.sum()
        assert share.item() == pytest.approx(masking.share, abs=0.015)


def test_tokens_are_hidden_each_by_itself():
    ids, _ = flat_events()
    hidden = hidden_of(TOKEN)
    both = ids["action"] != PAD_ID
    together = (hidden["action"] & hidden["category"])[both].float().mean()
    assert together.item() == pytest.approx(0.15**2, abs=0.004)


def test_an_event_is_hidden_with_all_its_fields():
    ids, _ = flat_events()
    hidden = hidden_of(EVENT)
    assert torch.equal(hidden["action"], hidden["category"])
    has_item = ids["item"] != PAD_ID
    assert torch.equal(hidden["item"], hidden["action"] & has_item)


def test_a_type_is_hidden_in_all_events_of_its_user():
    ids, users = flat_events()
    hidden = hidden_of(TYPE)
    real = ids["action"] != PAD_ID
    pairs = (users * NUM_ACTIONS + ids["action"])[real]
    shown = torch.zeros(NUM_USERS * NUM_ACTIONS, dtype=torch.bool)
    covered = shown.clone()
    covered[pairs[hidden["action"][real]]] = True
    shown[pairs[~hidden["action"][real]]] = True
    assert not (covered & shown).any()
    assert torch.equal(hidden["action"], hidden["category"])
    # Every action is hidden for some users and shown for others.
    by_action = covered.view(NUM_USERS, NUM_ACTIONS)[:, NUM_SPECIAL_IDS:].float().mean(0)
    assert (by_action > 0.05).all()


def test_levels_are_dealt_to_users_in_their_shares():
    ids, users = flat_events()
    masking = Masking(share=1.0, level_shares=(0.0, 1.0, 0.0))
    assert torch.equal(hidden_of(masking)["action"], ids["action"] != PAD_ID)
    hidden = hidden_of(Masking(share=0.5, level_shares=(0.5, 0.5, 0.0)))
    real = ids["action"] != PAD_ID
    differs = (hidden["action"] != hidden["category"]) & real
    by_user = torch.zeros(NUM_USERS).index_add(0, users, differs.float()) > 0
    long = torch.bincount(users[real]) >= 10
    assert by_user[long].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_what_is_hidden_is_masked_swapped_or_kept_in_berts_shares():
    ids, users = flat_events()
    generator = torch.Generator().manual_seed(3)
    masked = mask_events(ids, users, NUM_USERS, NUM_ACTIONS, Masking(share=0.5), generator)
    chosen = masked.targets["category"] != PAD_ID
    before, after = ids["category"][chosen], masked.ids["category"][chosen]
    assert (after == MASK_ID).float().mean().item() == pytest.approx(0.8, abs=0.01)
    # A swap takes another event's value, which is the same one time in 36; filling changes nothing.
    assert (after == before).float().mean().item() == pytest.approx(0.105, abs=0.01)
    assert torch.equal(masked.ids["category"][~chosen], ids["category"][~chosen])
    assert torch.equal(masked.targets["category"][chosen], before)
    assert ((masked.ids["item"] != PAD_ID) == (ids["item"] != PAD_ID)).all()
    some = torch.stack([values != PAD_ID for values in masked.targets.values()]).any(0)
    assert torch.equal(masked.is_hidden, some)


def test_a_generator_decides_everything():
    ids, users = flat_events()
    runs = [
        mask_events(
            ids, users, NUM_USERS, NUM_ACTIONS, Masking(), torch.Generator().manual_seed(seed)
        )
        for seed in (5, 5, 6)
    ]
    for name in ids:
        assert torch.equal(runs[0].ids[name], runs[1].ids[name])
        assert not torch.equal(runs[0].ids[name], runs[2].ids[name])


def test_the_first_chosen_places_come_in_a_fixed_shape():
    chosen = torch.tensor([False, True, True, False, True])
    places, is_chosen = chosen_places(chosen, 2)
    assert places.tolist() == [1, 2]
    assert is_chosen.all()
    places, is_chosen = chosen_places(chosen, 4)
    assert places[:3].tolist() == [1, 2, 4]
    assert is_chosen.tolist() == [True, True, True, False]
    assert len(chosen_places(chosen, 9)[0]) == 5


def test_shares_without_meaning_are_refused():
    for share, levels in ((1.5, (1.0, 0.0, 0.0)), (0.1, (0.5, 0.2, 0.2)), (0.1, (2.0, -1.0, 0.0))):
        with pytest.raises(ValueError, match="share"):
            Masking(share, levels)
