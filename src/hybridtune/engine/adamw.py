"""AdamW that leaves rows of embedding tables alone that never had a gradient.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2,   w = w - lr (wd w + m' / (sqrt(v') + eps))    (Loshchilov, 2019)

Where g has always been zero, m and v are, and weight decay is all that is left. A training sees some thousands of the
words of a vocabulary of a quarter of a million; a step over all of them takes longer than short texts do in the layers.
Weights, states and checkpoints are those of torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from .. import heap

SHARE = 1 / 3  # of a table's rows, up to which gathering them and putting them back pays

Rows = Callable[[Any], torch.Tensor | None]


class AdamW(torch.optim.AdamW):
    """torch's, for parameters on a CPU.

    Args:
        *args: as torch's takes them.
        rows: says of a parameter which of its rows have a gradient other than zero; None: all may have.
        **kwargs: as torch's takes them.
    """

    def __init__(self, *args: Any, rows: Rows, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rows = rows
        self._live: dict[Any, tuple[Any, torch.Tensor]] = {}  # the first moments, weakly, and which rows have some
        self._apart: list[Callable[[], None]] = []
        # not by overriding `step`, which torch wraps in every class: a user's hooks would be called twice
        self.register_step_pre_hook(lambda *_: self._apart.clear())  # of a step that was interrupted
        self.register_step_post_hook(lambda *_: self._put_back())

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "_rows" not in vars(self):  # a copy: no trainer tells it of rows
            self._rows, self._live, self._apart = lambda parameter: None, {}, []

    def _init_group(self, group: dict[str, Any], parameters: list[torch.Tensor], *lists: list[torch.Tensor]) -> bool:
        """torch's, which tells what a step is to change: of a table a copy of some rows, to be put back after it."""
        live = {parameter: self._of(parameter, group) for parameter in group["params"] if parameter.grad is not None}
        has_complex: bool = super()._init_group(group, parameters, *lists)  # type: ignore[misc, no-untyped-call]
        for at, parameter in enumerate(list(parameters)):
            rows = live[parameter]
            if rows is not None:
                self._take_apart(at, rows, group, parameters, *lists)
        return has_complex

    def _of(self, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        """The rows that a step has to look at; None: the whole."""
        touched = self._rows(parameter)
        other = group["amsgrad"] or group["differentiable"] or getattr(self, "found_inf", None) is not None
        if touched is None or other or self._is_shared(parameter):
            self._live.pop(parameter, None)  # other rows may have moments after this
            return None
        live = self._live_rows(parameter)
        live[touched] = True
        rows = live.nonzero().squeeze(1)
        return rows if len(rows) <= SHARE * len(live) else None

    def _is_shared(self, parameter: torch.Tensor) -> bool:
        """Whether another parameter lies in the same memory, tied through `.data`: its step would be undone."""
        place = parameter.untyped_storage().data_ptr()
        everyone = (one for group in self.param_groups for one in group["params"])
        return any(one is not parameter and one.untyped_storage().data_ptr() == place for one in everyone)

    def _live_rows(self, parameter: torch.Tensor) -> torch.Tensor:
        """[rows] which of them have moments other than zero, so far; these are made where there are none."""
        state = self.state[parameter]
        if not state:
            step = torch.zeros((), dtype=torch.float32)
            state |= {"step": step, "exp_avg": heap.zeros_like(parameter), "exp_avg_sq": heap.zeros_like(parameter)}
            found = torch.zeros(len(parameter), dtype=torch.bool)
        else:
            known = self._live.get(parameter)
            if known and known[0]() is state["exp_avg"]:
                return known[1]
            found = state["exp_avg"].any(1) | state["exp_avg_sq"].any(1)  # of a checkpoint, or of steps over the whole
        self._live[parameter] = weakref.ref(state["exp_avg"]), found
        return found

    def _take_apart(
        self, at: int, rows: torch.Tensor, group: dict[str, Any], parameters: list[torch.Tensor], *lists: list[Any]
    ) -> None:
        gradients, first, second, *_ = lists
        whole = parameters[at], first[at], second[at]
        for one in (parameters, gradients, first, second):
            one[at] = one[at].detach().index_select(0, rows)
        copies = parameters[at], first[at], second[at]
        decay = 1 - float(group["lr"]) * group["weight_decay"]

        def put_back() -> None:
            if decay != 1:
                whole[0].mul_(decay)
            for there, copy in zip(whole, copies, strict=True):
                there.index_copy_(0, rows, copy)

        self._apart.append(put_back)

    @torch.no_grad()
    def _put_back(self) -> None:
        for put_back in self._apart:
            put_back()
        self._apart.clear()
