"""Patterns that stand for many layers: all of those, none of the others, and few."""

import random
from fnmatch import fnmatchcase

import pytest

from converters.patterns import covering_patterns, exclude_options

TEXT = [f"language_model.layers.{at}.{part}" for at in range(3) for part in ("q_proj", "k_proj", "mlp.up")]
VISION = [f"vision_tower.encoder.layers.{at}.{part}" for at in range(3) for part in ("q_proj", "k_proj")]


def matched(patterns, names):
    return {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        (VISION, TEXT, ["vision_tower.*"]),
        ([*VISION, "projector.linear"], TEXT, ["vision_tower.*", "projector.linear"]),
        (
            [name for name in TEXT if name.endswith("k_proj")],
            [name for name in TEXT if not name.endswith("k_proj")],
            ["language_model.layers.*.k_proj"],
        ),
        (["layers.1.q", "layers.1.k"], ["layers.0.q", "layers.0.k", "layers.11.q"], ["layers.1.*"]),
        (["head"], ["body.0.x"], ["head"]),
        (["a.x", "b.x", "b.y"], ["a.y"], ["b.*", "a.x"]),
        (["a[0].x"], ["a0.x"], ["a[[]0].x"]),
        (VISION, [], None),
    ],
)
def test_patterns_are_few_and_match_just_those_names(names, others, expected):
    patterns = covering_patterns(names, others)
    assert matched(patterns, [*names, *others]) == set(names)
    if expected is not None:
        assert patterns == expected


def test_any_choice_of_layers_can_be_named():
    everything = [*TEXT, *VISION, "head", "pooler.dense"]
    for seed in range(50):
        chosen = set(random.Random(seed).sample(everything, 1 + seed % len(everything)))
        patterns = covering_patterns(chosen, [name for name in everything if name not in chosen])
        assert matched(patterns, everything) == chosen
        assert len(patterns) <= len(chosen)


def test_options_can_be_pasted():
    assert exclude_options(VISION, TEXT) == "--exclude 'vision_tower.*'"
