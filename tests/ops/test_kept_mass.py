"""The mass of dense attention that a choice of keys keeps."""

from __future__ import annotations

import torch

from attnlab.ops.maps import kept_mass


def test_it_is_the_share_of_each_row_on_the_chosen_keys() -> None:
    weights = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.0, 0.0, 0.0]]]])
    kept = torch.tensor([[[[True, False, True], [False, True, False], [True, True, True]]]])
    torch.testing.assert_close(kept_mass(weights, kept), torch.tensor([[(0.7 + 0.2) / 2]]))


def test_everything_keeps_everything_and_equal_weights_keep_their_number() -> None:
    weights = torch.rand(2, 3, 5, 8)
    torch.testing.assert_close(kept_mass(weights, torch.ones(1, 1, 5, 8, dtype=torch.bool)), torch.ones(2, 3))
    torch.testing.assert_close(
        kept_mass(torch.ones(2, 3, 5, 8), torch.arange(8).expand(1, 1, 5, 8) < 2), torch.full((2, 3), 0.25)
    )
