"""From the rows of a micro-batch to its loss, by the recipe's estimator.

Shapes: N response tokens of a micro-batch that are this context rank's, H hidden size, R_i response tokens of row i,
W columns of a teacher's state.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fire_megatron.config.loss import LossConfig
from fire_megatron.data.packing import Pack
from fire_megatron.data.rollouts import Target, TrainingRows
from fire_megatron.losses.divergences import build_divergence
from fire_megatron.losses.estimators import SampledLoss, sampled_policy_gradient
from fire_megatron.losses.fused import OutputLayer, TokenLoss, chunked_linear_loss, map_chunks
from fire_megatron.losses.token_losses import (
    DIVERGENCE_REPORT,
    SAMPLED_REPORT,
    DivergenceSettings,
    Segment,
    VocabShard,
    full_loss,
    sampled_loss,
    topk_loss,
)
from fire_megatron.losses.vocab_parallel import log_prob_and_entropy
from fire_megatron.metrics.values import Mean, Value, merge
from fire_megatron.models.gpt import FireGPT
from fire_megatron.parallel.collectives import all_gather_stacked
from fire_megatron.platform.device import compute_device
from fire_megatron.platform.host import upload
from fire_megatron.teachers.messages import unpack_topk


@dataclass(frozen=True)
class _Stretch:
    """Consecutive rows of a micro-batch that learn from the same teachers."""

    teachers: tuple[str, ...]
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    """Response tokens of each row that are this context rank's."""
    places: torch.Tensor | None
    """[N of the stretch] where these stand among all of the rows' response tokens, laid end to end; None when they are
    all of them."""

    @property
    def tokens(self) -> int:
        """This context rank's response tokens."""
        return sum(self.lengths)


@dataclass(frozen=True)
class MicroBatch:
    """What the loss of a micro-batch is computed from."""

    pack: Pack
    rows: TrainingRows
    """All rows of the update on this replica; ``pack.rows`` points into them."""
    teacher: torch.Tensor
    """[N] float32 in the pack's order, as the next ones: the teachers' log-probabilities."""
    rollout: torch.Tensor
    """Those with which the engine sampled."""
    weight: torch.Tensor
    old: torch.Tensor | None
    """The student's at the time of the rollouts; None when the weights have not moved since."""
    tokens: float
    """Response tokens of the whole update over all replicas: the loss's denominator."""

    @classmethod
    def of(
        cls, packs: Sequence[Pack], rows: TrainingRows, old: Sequence[torch.Tensor] | None, tokens: float
    ) -> list[MicroBatch]:
        """The micro-batches of an update, whose numbers cross to the device together, before any of them runs.

        Args:
            packs: of these rows.
            rows: of this replica.
            old: [R_i] the student's log-probabilities at the time of the rollouts; None when the weights have not moved
                since.
            tokens: see above.
        """
        columns = [rows.teacher_log_probs, rows.rollouts.log_probs, rows.weights, *([] if old is None else [old])]
        parts = [_of_pack(column, pack) for column in columns for pack in packs]
        on_device = upload(parts, dtype=torch.float32, device=compute_device()).split([len(part) for part in parts])
        by_column = [on_device[i * len(packs) : (i + 1) * len(packs)] for i in range(len(columns))]
        by_column += [(None,) * len(packs)] if old is None else []
        return [cls(pack, rows, *values, tokens) for pack, *values in zip(packs, *by_column, strict=True)]

    def stretches(self) -> list[_Stretch]:
        """The pack's rows by teacher, in order."""
        stretches, context = [], self.pack.context
        numbers = range(len(self.pack.rows))
        whole = part = 0
        for teachers, group in itertools.groupby(numbers, lambda i: self.rows.targets[self.pack.rows[i]].teachers):
            mine = list(group)
            lengths = tuple(self.pack.local_lengths[i] for i in mine)
            places = None if context is None else context.places[part : part + sum(lengths)] - whole
            stretches.append(_Stretch(teachers, tuple(self.pack.rows[i] for i in mine), lengths, places))
            whole += sum(self.pack.response_lengths[i] for i in mine)
            part += sum(lengths)
        return stretches


def _of_pack(values: Sequence[torch.Tensor], pack: Pack) -> torch.Tensor:
    """[R_i] for every row -> [N] in the pack's order, on the host."""
    column = torch.cat([torch.zeros(0), *(values[row] for row in pack.rows)])
    return column if pack.context is None else column[pack.context.places]


@dataclass(frozen=True)
class LossReport:
    """What the loss of a micro-batch reports, still on the device."""

    sums_SF: torch.Tensor
    """[S, F] float64: F reported figures, each summed over the tokens of S stretches of rows."""
    tokens: int
    """N."""
    stretches: tuple[tuple[str, int], ...]
    """Name of the target and tokens of each stretch."""


class Objective:
    """The loss on the student's last stage, fused with its output layer."""

    def __init__(self, model: FireGPT, loss: LossConfig, heads: Mapping[str, OutputLayer]) -> None:
        """Args: model: this rank's stage of the student; heads: the teachers' output weights, for ``full``."""
        self.model, self.loss, self.heads = model, loss, dict(heads)
        self.group = model.pg_collection.tp
        self.reads_old = loss.estimator == "sampled"
        """Whether the loss depends on the log-probabilities at the time of the rollouts."""
        self._settings = DivergenceSettings(
            build_divergence(loss.divergence, beta=loss.beta, skew=loss.skew),
            *loss.temperatures,
            loss.mixture,
        )
        self._sampled_at = loss.temperature if loss.estimator == "sampled" else 1.0
        """Divides the logits before a loss of sampled tokens sees them; divergences have temperatures of their own."""
        self._build = {"sampled": self._sampled, "full": self._full, "topk": self._topk}[loss.estimator]
        self._names = SAMPLED_REPORT if loss.estimator == "sampled" else DIVERGENCE_REPORT

    def log_probs(self, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        """[N, H] final hidden states -> [N] float32 log-probabilities of the response tokens, as the loss of sampled
        tokens takes them, without gradient."""
        shard = self._shard()

        def score(logits: torch.Tensor, part: slice) -> torch.Tensor:
            return log_prob_and_entropy(
                logits, pack.targets[part], group=shard.group, vocab_start=shard.vocab_start, with_entropy=False
            )[0]

        layer = OutputLayer(self.model.output_weight, self.model.used_columns, temperature=self._sampled_at)
        return map_chunks(hidden, layer, score, chunk_tokens=self.loss.chunk_tokens)

    def __call__(self, hidden: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, LossReport]:
        """[N, H] final hidden states -> this micro-batch's share of the loss, and what :meth:`metrics` reads."""
        stretches = batch.stretches()
        lengths = [stretch.tokens for stretch in stretches]
        try:
            loss, report_FN = chunked_linear_loss(
                hidden,
                self.model.output_weight,
                self._build(batch, stretches),
                columns=self.model.used_columns,
                segments=lengths,
                chunk_tokens=self.loss.chunk_tokens,
                temperature=self._sampled_at,
            )
        finally:
            for head in self.heads.values():
                head.release()
        sums = [part.sum(-1) for part in report_FN.double().split(lengths, -1)] if stretches else []
        sums_SF = torch.stack(sums) if sums else report_FN.new_zeros(0, len(report_FN), dtype=torch.float64)
        return loss, LossReport(
            sums_SF, len(hidden), tuple((Target.join(stretch.teachers), stretch.tokens) for stretch in stretches)
        )

    def metrics(self, reports: Sequence[LossReport]) -> dict[str, Value]:
        """Means over tokens in the file, whatever the micro-batches, mini-batches and ranks that they are spread over.
        The host waits for the device once for all of the reports."""
        totals: dict[str, Value] = {}
        numbers = iter(torch.cat([report.sums_SF for report in reports]).tolist() if reports else [])
        for report in reports:
            sums = [next(numbers) for _ in report.stretches]
            merge(totals, {name: Mean(sum(s[i] for s in sums), report.tokens) for i, name in enumerate(self._names)})
            for (target, tokens), values in zip(report.stretches, sums, strict=True):
                if self._names is DIVERGENCE_REPORT:
                    merge(totals, {f"teacher/{target}/divergence": Mean(values[1], tokens)})
        return totals

    def _shard(self) -> VocabShard:
        return VocabShard(self.group, self.model.vocab_start, len(self.model.output_weight))

    def _sampled(self, batch: MicroBatch, stretches: Sequence[_Stretch]) -> TokenLoss:
        teacher, rollout, weight, old = batch.teacher, batch.rollout, batch.weight, batch.old
        importance = self.loss.importance

        def estimate(log_prob: torch.Tensor, part: slice) -> SampledLoss:
            return sampled_policy_gradient(
                log_prob,
                teacher_log_prob=teacher[part],
                rollout_log_prob=rollout[part],
                weight=weight[part],
                old_log_prob=None if old is None else old[part],
                clip=self.loss.clip,
                importance_mode=importance.mode,
                importance_low=importance.low,
                importance_high=importance.high,
            )

        return sampled_loss(batch.pack.targets, estimate, shard=self._shard(), tokens=batch.tokens)

    def _full(self, batch: MicroBatch, stretches: Sequence[_Stretch]) -> TokenLoss:
        segments = [self._segment(stretch, batch.rows) for stretch in stretches]
        return full_loss(segments, batch.weight, self._settings, shard=self._shard(), tokens=batch.tokens)

    def _segment(self, stretch: _Stretch, rows: TrainingRows) -> Segment:
        heads = [self.heads[name] for name in stretch.teachers]
        weights = [
            torch.tensor(rows.targets[row].weights).expand(length, -1)
            for row, length in zip(stretch.rows, stretch.lengths, strict=True)
        ]
        return Segment(
            layers=heads,
            hidden=[
                self._states(name, stretch, rows, head.weight_VH.shape[1])
                for name, head in zip(stretch.teachers, heads, strict=True)
            ],
            weight_NM=upload(weights, dtype=torch.float32, device=compute_device()).view(-1, len(heads)),
        )

    def _topk(self, batch: MicroBatch, stretches: Sequence[_Stretch]) -> TokenLoss:
        width = 2 * self.loss.top_k + 1
        empty = torch.zeros(0, width, dtype=torch.int32, device=compute_device())
        # One teacher a row: config/rules/data.py refuses mixtures.
        states = [self._states(*stretch.teachers, stretch, batch.rows, width) for stretch in stretches]
        teacher = unpack_topk(torch.cat([empty, *states]))
        return topk_loss(teacher, batch.weight, self._settings, shard=self._shard(), tokens=batch.tokens)

    def _states(self, name: str, stretch: _Stretch, rows: TrainingRows, width: int) -> torch.Tensor:
        """[N of the stretch, W] what a teacher sent of these rows, put together from the tensor ranks' slices."""
        assert rows.states is not None
        parts = [rows.states[row][name] for row in stretch.rows]
        if stretch.places is not None:  # of a part of each row, the rest need not cross
            parts = [torch.cat(parts)[stretch.places]]
        own = upload(parts, dtype=parts[0].dtype, device=compute_device()).view(-1, parts[0].shape[1])
        return all_gather_stacked(own, group=self.group).movedim(0, 1).flatten(1)[:, :width]
