"""A layer's feed-forward part: one SwiGLU (Shazeer, 2020), or a mixture of many of which each row takes a few.

Owns the choice of experts, as Qwen3-MoE, DeepSeek-V2 and DeepSeek-V3 make it. Invariant: a row's experts
depend on that row alone.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .architecture import Experts
from .matmul import Projection
from .rowwise import Norm, SwiGlu

if TYPE_CHECKING:
    from .gpu_products import GpuExperts

_SWIGLU = SwiGlu()


class Mlp:
    """A SwiGLU whose gate and up are one matrix."""

    def __init__(self, gate_up: Projection, down: Projection) -> None:
        self.gate_up, self.down = gate_up, down

    def __call__(
        self, rows: torch.Tensor, *, norm: Norm | None = None, onto: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[row_count, hidden_size], both ways; the rows are normed first, and the result is added to `onto`."""
        return self.down(self.gate_up(rows, before=norm), before=_SWIGLU, onto=onto)


class EachExpert:
    """The experts that a rank has, one after the other; how many rows each has is looked at on the host.

    Args:
        here: which of the model's experts these are.
    """

    def __init__(self, mlps: list[Mlp], here: range) -> None:
        self._mlps, self._here = mlps, here

    def add(self, rows: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, onto: torch.Tensor) -> None:
        """Add to `onto` what each row's experts give, by their shares.

        Args:
            rows: [row_count, hidden_size].
            chosen: [row_count, per_row], among all experts of the model.
            shares: [row_count, per_row].
        """
        per_row = chosen.shape[1]
        # Rows in the order of their experts, so that each expert multiplies all of its rows at once.
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self._here.stop).tolist()
        of_row = order // per_row
        sorted_rows, sorted_shares = rows[of_row], shares.flatten()[order].unsqueeze(1).to(rows.dtype)
        first = sum(counts[: self._here.start])
        for mlp, count in zip(self._mlps, counts[self._here.start : self._here.stop], strict=True):
            if not count:
                continue
            span = slice(first, first + count)
            onto.index_add_(0, of_row[span], mlp(sorted_rows[span]).mul_(sorted_shares[span]))
            first += count


class ExpertMixture:
    """Routed experts, and one that all rows pass where the model has it."""

    def __init__(
        self,
        experts: Experts,
        *,
        router: torch.Tensor,
        choice_bias: torch.Tensor | None,
        routed: "EachExpert | GpuExperts",
        shared: Mlp | None,
    ) -> None:
        """`routed`: the experts that this rank has; the router knows all of them."""
        self._experts = experts
        self._router = router.float()
        self._choice_bias = choice_bias
        self._routed = routed
        self._shared = shared

    def __call__(self, rows: torch.Tensor, *, norm: Norm, onto: torch.Tensor | None = None) -> torch.Tensor:
        """As of `Mlp`; of several ranks each gives a part of the sum."""
        rows = norm(rows)
        mixed = torch.zeros_like(rows) if self._shared is None else self._shared(rows)
        chosen, shares = self._route(rows)
        self._routed.add(rows, chosen, shares, mixed)
        return mixed if onto is None else onto.add_(mixed)

    def _route(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's experts, and what each contributes: [row_count, per_row] int64 and fp32."""
        e = self._experts
        logits = F.linear(rows.float(), self._router)
        scores = logits.sigmoid() if e.scoring == "sigmoid" else logits.softmax(dim=-1)
        choosing = scores if self._choice_bias is None else scores + self._choice_bias
        if e.group_count > 1:
            choosing = self._within_groups(choosing)
        chosen = choosing.topk(e.per_row, dim=-1).indices
        shares = scores.gather(1, chosen)
        if e.renormalizes:
            shares = shares / (shares.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, shares * e.scale

    def _within_groups(self, choosing: torch.Tensor) -> torch.Tensor:
        """Leave only the experts of each row's best groups: by their best expert, or the sum of their best two."""
        e = self._experts
        by_group = choosing.view(-1, e.group_count, e.count // e.group_count)
        group_scores = by_group.topk(e.group_score_count, dim=-1).values.sum(dim=-1)
        best = group_scores.topk(e.groups_per_row, dim=-1).indices
        left_out = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        return by_group.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1)
