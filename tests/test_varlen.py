"""One call of attention for all rows: what the kernels are called with, in the place of a GPU."""

from __future__ import annotations

import itertools
import sys
from types import ModuleType, SimpleNamespace
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

    monkeypatch.setattr(varlen, "kernel_for", lambda query, value: kernel)
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


def states(heads: int = 4) -> torch.Tensor:
    return torch.randn(9, heads, 8, dtype=torch.double)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("heads", [4, 2])
def test_torchs_kernel_takes_these_arguments(heads: int, dropout: float) -> None:
    """Their shapes, without a GPU: on the meta device."""
    q, k = (torch.empty(9, number, 8, device="meta", dtype=torch.bfloat16) for number in (4, heads))
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    assert varlen._torch(q, k, k, bounds, 7, True, 0.3, dropout).shape == q.shape


def test_what_flash_attn_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(*args: Any, dropout_p: float, softmax_scale: float, causal: bool) -> torch.Tensor:
        q, k, v, of_queries, of_keys, longest, longest_key = args
        assert of_queries is of_keys
        assert longest == longest_key
        return by_hand(q, k, v, of_queries, longest, causal, softmax_scale, dropout_p)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = kernel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    varlen._flash_attn.cache_clear()
    run = varlen._flash_attn()
    varlen._flash_attn.cache_clear()
    assert run is not None
    given = (states(), states(), states(), torch.tensor([0, 5, 9], dtype=torch.int32), 5, True, 0.3, 0.0)
    torch.testing.assert_close(run(*given), by_hand(*given))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "capability", "installed", "found"),
    [
        ("cuda", torch.bfloat16, 64, (8, 0), False, "torch"),
        ("cuda", torch.float16, 256, (9, 0), False, "torch"),
        ("cuda", torch.bfloat16, 64, (8, 0), True, "flash_attn"),
        ("cuda", torch.bfloat16, 64, (7, 5), True, None),
        ("cuda", torch.float32, 64, (8, 0), True, None),
        ("cuda", torch.bfloat16, 100, (8, 0), True, None),
        ("cuda", torch.bfloat16, 512, (8, 0), True, None),
        ("cpu", torch.bfloat16, 64, (8, 0), True, None),
    ],
)
def test_where_there_is_a_kernel(
    device: str,
    dtype: torch.dtype,
    width: int,
    capability: tuple[int, int],
    installed: bool,
    found: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(varlen, "_torch", "torch")
    monkeypatch.setattr(varlen, "_flash_attn", lambda: "flash_attn" if installed else None)
    tensor: Any = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 9, width))
    assert varlen.kernel_for(tensor, tensor) == found
