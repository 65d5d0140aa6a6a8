"""transformers' own tests on our models: every one that passes for transformers' classes passes for ours.

Nothing is left out but repetitions: hidden states of padding, which are 0 here, are compared by none of them.
"""

from __future__ import annotations

import pytest
import torch

from . import upstream

MISSING = upstream.missing()


def repeats(name: str) -> bool:
    """Whether it computes on a CPU what another test does: it differs in a switch of SDPA's kernels on GPUs, or in the side of a
    padding that no mask tells of. ``python -m tests.ecosystem.upstream`` counts these, too: they are most of the time."""
    switched = name.startswith("test_eager_matches_sdpa_inference") and not torch.cuda.is_available()
    return switched and name.endswith(("_sdpa_kernels", "_pad_left_no_attn_mask"))


TESTS = [
    (family, name) for family in (() if MISSING else upstream.FAMILIES) for name in upstream.test_names(family) if not repeats(name)
]
# Tests that transformers has had for years: where one of them is gone or skipped, it is our test case that is broken.
CORNERSTONES = {
    "test_attention_outputs",
    "test_batching_equivalence",
    "test_hidden_states_output",
    "test_inputs_embeds",
    "test_model_outputs_equivalence",
    "test_resize_tokens_embeddings",
    "test_save_load",
    "test_training",
    "test_training_gradient_checkpointing",
}


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
class TestMixin:
    @pytest.mark.parametrize("family", upstream.FAMILIES)
    def test_the_tests_are_there(self, family):
        assert set(upstream.test_names(family)) > CORNERSTONES

    @pytest.mark.parametrize(("family", "name"), TESTS, ids=lambda value: value.removeprefix("test_"))
    def test_passes_for_ours_where_it_passes_for_theirs(self, family, name):
        ours = {door: upstream.outcome(family, door, name) for door in upstream.doors(family)}
        others = {door: found for door, found in ours.items() if found[0] != "passed"}
        assert not (others and name in CORNERSTONES), f"{name} on {family}: {others}"
        if others:
            theirs = upstream.outcome(family, "theirs", name)
            worse = [f"{door} {result}: {why}" for door, (result, why) in others.items() if result != theirs[0]]
            assert not worse, f"{name} on {family} {theirs[0]} for transformers' own classes, but\n" + "\n".join(worse)
            if theirs[0] == "failed":
                pytest.skip(f"fails for transformers' own classes: {theirs[1].splitlines()[-1]}")


@pytest.mark.parametrize("family", upstream.FAMILIES)
def test_what_is_built_under_accelerating_is_fast(family, tmp_path):
    """Otherwise the tests above would compare transformers with transformers."""
    import transformers

    config = upstream.ModelTester(upstream.FAMILIES[family]).get_config()
    for name in upstream.FAMILIES[family].class_names():
        theirs = getattr(transformers, name)
        with upstream.accelerating([name]):
            built = theirs(config)
            built.save_pretrained(tmp_path / name)
            loaded, _ = theirs.from_pretrained(tmp_path / name, output_loading_info=True)
        for model in (built, loaded, theirs.from_pretrained(tmp_path / name)):
            layers = model.base_model.encoder.layer
            fast = {type(layer).__module__.startswith("fastbert.") for layer in layers}
            assert isinstance(model, theirs) and fast == {model in (built, loaded)}, name
