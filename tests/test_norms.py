"""Norms in one kernel of torch's: against the formula in numpy, on modules and in whole models."""

from __future__ import annotations

import contextlib
import copy
from contextlib import ExitStack

import numpy as np
import pytest
import tiny
import torch
from test_engine import padded
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from hybridtune import engine
from hybridtune.engine import norms

FAST = {"llama": 7, "qwen3": 13, "t5": 17}


def norm(width: int = 24, eps: float = 0.1) -> nn.Module:
    module = LlamaRMSNorm(width, eps)
    nn.init.normal_(module.weight, std=0.5)
    return module


def test_the_formula() -> None:
    module, x = norm(), torch.randn(5, 3, 24)
    with ExitStack() as undo:
        norms.speed_up(norms.find(module), undo)
        assert "forward" in vars(module)
        found = module(x)
    values, weight = x.double().numpy(), module.weight.detach().double().numpy()
    expected = weight * values / np.sqrt((values**2).mean(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-6)
    assert "forward" not in vars(module)


@pytest.mark.parametrize("name", tiny.CAUSAL + tiny.SEQ2SEQ)
def test_a_model_gives_the_same(name: str) -> None:
    """Logits and gradients; of models that have other norms nothing is touched."""
    model = tiny.language_model(name)
    tiny.shake(model.parameters())
    plain, batch = copy.deepcopy(model), padded()
    batch["labels"] = batch["input_ids"].where(batch["attention_mask"] == 1, -100)
    expected = plain(**batch)
    expected.loss.backward()
    assert len(norms.find(model)) == FAST.get(name, 0)
    with ExitStack() as undo:
        norms.speed_up(norms.find(model), undo)
        found = model(**batch)
        found.loss.backward()
    torch.testing.assert_close(found.logits, expected.logits)
    for (key, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=key)


def test_gradients_of_gradients() -> None:
    module, x = norm(5).double(), torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    with ExitStack() as undo:
        norms.speed_up(norms.find(module), undo)
        assert torch.autograd.gradgradcheck(lambda x, weight: module(x), (x, module.weight))


def test_other_formulas_are_left_alone() -> None:
    class Odd(LlamaRMSNorm):
        """Of a user's."""

    patched, hooked = norm(), norm()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    seen: list[torch.Tensor] = []
    hooked.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for width in (8, 1024):
        assert not norms.find(CohereLayerNorm(width).bfloat16()), "which takes off the mean"
    for module in (GemmaRMSNorm(8), nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8), Odd(8, 0.1), patched):
        assert not norms.find(module), type(module)
    assert norms.find(hooked) == (hooked,)
    assert not seen, "a hook saw the row that was tried"


def test_what_is_of_another_type_than_the_weight_goes_the_models_way() -> None:
    module, x = norm(), torch.randn(3, 24).bfloat16()
    expected = module(x)
    with ExitStack() as undo:
        norms.speed_up(norms.find(module), undo)
        found = module(x)
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


def test_where_eps_stands() -> None:
    """Beside the mean of squares or beside its root: only small rows tell."""

    class Beside(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            root = hidden_states.pow(2).mean(-1, keepdim=True).sqrt()
            return self.weight * hidden_states / (root + self.variance_epsilon)

    Beside.__module__ = LlamaRMSNorm.__module__
    assert norms.find(LlamaRMSNorm(16, 1e-6))
    assert not norms.find(Beside(16, 1e-6))


def test_a_gate() -> None:
    """Without it the formula is the same; with it the module's own is asked."""
    module, x, gate = MambaRMSNormGated(16, 16), torch.randn(3, 16), torch.randn(3, 16)
    expected = module(x), module(x, gate)
    assert norms.find(module)
    with ExitStack() as undo:
        norms.speed_up([module], undo)
        torch.testing.assert_close((module(x), module(x, gate)), expected)


def test_norms_that_are_others_in_the_model_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run without padding all the same."""
    model = tiny.classifier("llama")
    tiny.shake(model.parameters())
    monkeypatch.setattr(norms, "pays", lambda device: True)
    found = engine.start(model, padded())
    assert found.on
    assert len(found.norms) == FAST["llama"]
    forward = norms._forward
    monkeypatch.setattr(norms, "_forward", lambda *given: forward(*given) * (1.5 if given[1] else 1))
    found = engine.start(model, padded())
    assert found.on
    assert not found.norms


def test_opened_twice_and_left_by_an_error() -> None:
    module = norm()
    with contextlib.suppress(KeyError), ExitStack() as undo:
        norms.speed_up([module], undo)
        with ExitStack() as inner:
            norms.speed_up([module], inner)
        assert "forward" in vars(module)
        raise KeyError
    assert "forward" not in vars(module)
