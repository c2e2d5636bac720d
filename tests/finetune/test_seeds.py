"""Random numbers by purpose: the same in any order of calls, on every machine, and as they have always been."""

import torch

from finetune.seeds import seed_of, seeded, step_generator


def test_numbers_follow_from_the_purpose_alone():
    first = torch.rand(3, generator=seeded("noise", 1, 2))
    torch.rand(5, generator=seeded("noise", 1, 3))
    assert torch.equal(first, torch.rand(3, generator=seeded("noise", 1, 2)))
    seeds = {seed_of(name, a, b) for name in ("noise", "dropout") for a in range(20) for b in range(20)}
    assert len(seeds) == 800 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of("1", 2) != seed_of(1, 2)


def test_the_seeds_are_what_they_were():
    """Recorded: a state of an older run goes on with the same numbers, and the shipped model can be made again."""
    assert seed_of("dropout", 0, 0, 0) == 1_880_920_305_886_293_313
    assert step_generator(6, 12).initial_seed() == 47514237587
    assert len({step_generator(run, step).initial_seed() for run in range(2, 10) for step in range(3000)}) == 24_000
