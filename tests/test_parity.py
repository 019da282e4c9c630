"""What the check of a graph lets pass, and what it does not."""

from dataclasses import replace

import pytest
import torch
from small_models import build

from converters.onnx.export import export_onnx
from converters.onnx.runtime import open_session
from prehab_export.deployment.parity import TOLERANCE, check_graph, load_reference, reference_of, save_reference
from prehab_export.inputs.tasks import TASKS
from prehab_export.system.errors import ParityError

TASK = TASKS["text-generation"]
BATCHES = [{"input_ids": torch.tensor([[5, 9, 23, 7, 11, 3, 30, 8]])}]


@pytest.fixture(scope="module")
def tokens():
    return reference_of(build("llama"), TASK, BATCHES).greedy.tokens[0].tolist()


def with_rival(tokens, factor):
    """A LLaMA in which a token that it never says has so many times the logit of the third that it says."""
    model = build("llama")
    rival = next(token for token in range(50) if token not in tokens)
    with torch.no_grad():
        model.lm_head.weight[rival] = factor * model.lm_head.weight[tokens[2]]
    return model


def export(model, folder):
    return export_onnx(model, "text-generation", folder / "model.onnx").path


def test_a_near_tie_is_no_failure(tokens, tmp_path):
    """Two tokens that change their order within the tolerance; what comes after them is judged, too."""
    behind, ahead = with_rival(tokens, 1 - 1e-6), with_rival(tokens, 1 + 1e-6)
    reference = reference_of(behind, TASK, BATCHES)
    assert reference.greedy.tokens[0].tolist() == tokens
    facts = check_graph(reference, TASK, export(ahead, tmp_path), 1)
    assert facts["greedy_tokens_identical"] is False
    assert facts["greedy_near_ties"] == tokens.count(tokens[2])
    assert 0 < facts["greedy_max_relative"] <= TOLERANCE


def test_another_token_for_more_than_rounding_is_a_failure(tokens, tmp_path):
    behind, ahead = with_rival(tokens, 1 - 1e-2), with_rival(tokens, 1 + 1e-2)
    # Only the continuation gives it away.
    reference = replace(reference_of(ahead, TASK, BATCHES), greedy=reference_of(behind, TASK, BATCHES).greedy)
    with pytest.raises(ParityError, match="same greedy tokens"):
        check_graph(reference, TASK, export(ahead, tmp_path), 1)


@pytest.mark.parametrize("damage", [lambda logits: 1.001 * logits, lambda logits: float("nan") * logits])
def test_a_cache_that_is_not_right_is_noticed(damage, tokens, tmp_path, monkeypatch):
    """Even where it changes no token."""
    model = build("llama")
    session = open_session(export(model, tmp_path), 1)

    class Damaged:
        get_inputs, get_outputs = session.get_inputs, session.get_outputs

        def run(self, names, feeds):
            logits, *rest = session.run(names, feeds)
            past = next(value for name, value in feeds.items() if name.startswith("past_key_values"))
            return [damage(logits) if past.shape[2] else logits, *rest]

    monkeypatch.setattr("prehab_export.deployment.parity.open_session", lambda *_: Damaged())
    with pytest.raises(ParityError, match="decodes from its own cache"):
        check_graph(reference_of(model, TASK, BATCHES), TASK, tmp_path / "model.onnx", 1)


def test_the_reference_is_read_back_as_it_was(tmp_path):
    reference = reference_of(build("llama"), TASK, BATCHES)
    save_reference(reference, tmp_path)
    again = load_reference(tmp_path)
    assert again.digests == reference.digests
    assert again.greedy.logits.shape == (1, reference.greedy.tokens.shape[1], 50)
    for name, value in vars(reference.greedy).items():
        assert torch.equal(getattr(again.greedy, name), value)
    assert torch.equal(again.logits[0], reference.logits[0])


def test_one_reference_makes_one_file(tmp_path):
    """What stands on an export that came out the same stays valid only if all of it came out the same."""
    reference = reference_of(build("llama"), TASK, BATCHES)
    made = set()
    for _ in range(12):
        save_reference(reference, tmp_path)
        made.add((tmp_path / "reference.safetensors").read_bytes())
    assert len(made) == 1
