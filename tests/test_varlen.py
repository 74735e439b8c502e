"""One call of attention for all rows: what the kernels are called with, in the place of a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_engine import ON, check_equal, padded, shaken

from hybridtune.engine import varlen


def by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    causal: bool,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Every token over the tokens between the bounds around it, one by one."""
    assert k.shape == v.shape
    assert q.shape[::2] == k.shape[::2]
    assert bounds.dtype == torch.int32
    edges = bounds.tolist()
    assert edges[0] == 0
    assert edges[-1] == len(q)
    assert longest == max(end - start for start, end in itertools.pairwise(edges))
    assert dropout == 0
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    rows = []
    for start, end in itertools.pairwise(edges):
        for at in range(start, end):
            seen = slice(start, at + 1 if causal else end)
            weights = (scaling * torch.einsum("hd,thd->ht", q[at], k[seen])).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, v[seen]))
    return torch.stack(rows)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was causal."""
    made: list[bool] = []

    def kernel(*args: Any) -> torch.Tensor:
        made.append(args[5])
        return by_hand(*args)

    monkeypatch.setattr(varlen, "fits", lambda query, value: True)
    monkeypatch.setattr(varlen, "flash", kernel)
    return made


# Layers that look at a window, that add a bias, and that look at another text go group by group.
CALLED = dict.fromkeys(ON, 3) | {"modernbert": 1, "t5": 0, "bart": 6}


@pytest.mark.parametrize("name", ON)
def test_a_classifier_gives_the_same(name: str, calls: list[bool]) -> None:
    """In float64, logits and gradients."""
    check_equal(shaken(tiny.classifier(name)), padded())
    assert len(calls) == CALLED[name]
    assert set(calls) <= {name in ("llama", "qwen3", "gemma", "gpt2")} | ({True, False} if name == "bart" else set())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", tiny.CAUSAL)
def test_a_decoder_gives_the_same(name: str, side: str, calls: list[bool]) -> None:
    check_equal(tiny.language_model(name), padded(side))
    assert calls == [True] * 3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("heads", [4, 2])
def test_torchs_kernel_takes_these_arguments(heads: int, dropout: float) -> None:
    """Their shapes, without a GPU: on the meta device."""
    q, k = (torch.empty(9, number, 8, device="meta", dtype=torch.bfloat16) for number in (4, heads))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    assert varlen.flash(q, k, k, bounds, 7, True, 0.3, dropout).shape == q.shape


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "built", "fits"),
    [
        ("cuda", torch.bfloat16, 64, (8, 0), True, True),
        ("cuda", torch.float16, 256, (9, 0), True, True),
        ("cuda", torch.bfloat16, 64, (7, 5), True, False),
        ("cuda", torch.bfloat16, 64, (8, 0), False, False),
        ("cuda", torch.float32, 64, (8, 0), True, False),
        ("cuda", torch.bfloat16, 100, (8, 0), True, False),
        ("cuda", torch.bfloat16, 512, (8, 0), True, False),
        ("cpu", torch.bfloat16, 64, (8, 0), True, False),
    ],
)
def test_where_the_kernel_can_be_called(
    device: str,
    dtype: torch.dtype,
    width: int,
    capability: tuple[int, int],
    built: bool,
    fits: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    tensor: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 9, width))
    assert varlen.fits(tensor, tensor) == fits
