"""`Diagnosis`: verdicts and figures as text, HTML, a dict and a picture."""

from __future__ import annotations

import html
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import numpy as np

from .figures import LayerFigures, ModelFigures, between
from .verdicts import judge
from .verdicts.case import FEWEST, Verdict, gap_limit

FEW_SAMPLES = 100
WIDTH = 112  # columns of text
HEALTHY = "healthy: the moving statistics are those of this data"
HEADS = ("layer", "gap", "mean off (std)", "variance (log2)", "values", "start left", "effect", "notes")
_SCORES = ("moving", "batch", "recalibrated")
_WORDS = {
    "moving": "with moving statistics (predict, evaluate)",
    "batch": "with each batch's statistics (training)",
    "recalibrated": "after recalibrate",
}


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found. print() it, or look at `verdicts`.

    Example:
        >>> import keras, numpy as np
        >>> from bnfast.keras import diagnose, recalibrate
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
        >>> x = np.random.default_rng(0).normal(5, 2, (1000, 3)).astype("float32")
        >>> diagnosis = diagnose(model, x)
        >>> diagnosis.healthy, diagnosis.first_gap
        (False, 'norm')
        >>> _ = recalibrate(model, x, verbose=0)
        >>> diagnose(model, x).healthy
        True

    Attributes:
        verdicts: what is wrong, the root cause first; empty if the model is healthy. Each has code, title, layers,
            reasons, cure and code_cure.
        figures: everything that was measured (bnfast.diagnosis.figures.ModelFigures).
        first_gap: the first batch norm, in the order of the data flow, whose moving statistics are off; or None.
        healthy: whether there are no verdicts.
    """

    verdicts: tuple[Verdict, ...]
    figures: ModelFigures

    @classmethod
    def of(cls, figures: ModelFigures) -> Diagnosis:
        return cls(tuple(judge(figures)), figures)

    @property
    def healthy(self) -> bool:
        return not self.verdicts

    @property
    def first_gap(self) -> str | None:
        least = gap_limit(self.figures)
        return next((row.name for row in self.figures.layers if row.gap >= least), None)

    def __str__(self) -> str:
        parts = [self._head(), self._table()]
        if self.first_gap is not None:
            parts.append(f"The gap opens at {self.first_gap}.")
        parts += [_verdict_text(verdict) for verdict in self.verdicts]
        return "\n\n".join([*parts, *self._notes()])

    def _notes(self) -> list[str]:
        few = 0 < self.figures.samples < FEW_SAMPLES
        told = [f"{self.figures.samples} samples are few: by chance alone their statistics are off."] if few else []
        return [*told, *self.figures.notes]

    def _head(self) -> str:
        f = self.figures
        title = f"{f.name}: {self.verdicts[0].title.lower()}" if self.verdicts else f"{f.name}: {HEALTHY}"
        if self.healthy and 0 < f.samples < FEWEST:
            title = f"{f.name}: {f.samples} samples are too few for a verdict"
        lines = [title, f"{len(f.layers)} batch norms, {f.samples} samples"]
        if f.scores:
            lines[1] += f"; loss and metrics on {f.compared}"
            lines += [f"  {_WORDS[name]:<44}{_scores(f.scores[name])}" for name in _SCORES if name in f.scores]
            if f.other_scores:
                lines.append(f"  {'data2, with the statistics of data':<44}{_scores(f.other_scores)}")
        else:
            lines[1] += f"; outputs compared on {f.compared}, without targets"
        lines.append(
            f"  outputs: recalibrating moves them by {_number(f.distance)} of their standard deviation, "
            f"training mode by {_number(f.batch_distance)}"
        )
        return "\n".join(lines)

    def _table(self) -> str:
        rows = [_cells(row) for row in self.figures.layers]
        widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in (HEADS, *rows)]
        return "\n".join(lines + [f"{name}: the model doesn't call it" for name in self.figures.unreached])

    def _repr_html_(self) -> str:
        """The same as HTML, for notebooks."""
        escaped = html.escape
        head = "<br>".join(escaped(line) for line in self._head().splitlines())
        marked = {name for verdict in self.verdicts for name in verdict.layers}
        rows = "".join(
            f"<tr{' style=background:#fdd' if row.name in marked else ''}>"
            + "".join(f"<td>{escaped(cell)}</td>" for cell in _cells(row))
            + "</tr>"
            for row in self.figures.layers
        )
        heads = "".join(f"<th>{escaped(name)}</th>" for name in HEADS)
        found = "".join(
            f"<h4>{escaped(v.title)}</h4><p>{escaped(', '.join(v.layers[:8]))}</p>"
            + "".join(f"<p>{escaped(reason)}</p>" for reason in v.reasons)
            + f"<p><b>Cure.</b> {escaped(v.cure)}</p>"
            + (f"<pre>{escaped(v.code_cure)}</pre>" if v.code_cure else "")
            for v in self.verdicts
        )
        notes = "".join(f"<p>{escaped(note)}</p>" for note in self._notes())
        return f"<div><p>{head}</p><table><tr>{heads}</tr>{rows}</table>{found}{notes}</div>"

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain types: json.dumps takes it. Numbers that aren't finite are None."""
        f = self.figures
        whole = {
            "model": f.name,
            "healthy": self.healthy,
            "first_gap": self.first_gap,
            "verdicts": [
                {
                    "code": v.code,
                    "title": v.title,
                    "layers": list(v.layers),
                    "reasons": list(v.reasons),
                    "cure": v.cure,
                    "code_cure": v.code_cure,
                }
                for v in self.verdicts
            ],
            "samples": f.samples,
            "compared": f.compared,
            "passes": f.passes,
            "distance": f.distance,
            "batch_distance": f.batch_distance,
            "scores": f.scores,
            "data2_scores": f.other_scores,
            "iterations": f.iterations,
            "learning_rate": f.learning_rate,
            "epsilon_trial": {f"{key:g}": value for key, value in f.epsilon_trial.items()},
            "unreached": list(f.unreached),
            "notes": self._notes(),
            "layers": [_layer(row) for row in f.layers],
        }
        plain: dict[str, Any] = _plain(whole)
        return plain

    def plot(self, path: Any, *, format: str | None = None) -> None:
        """Write a picture: per layer the moving statistics against those of the data, and where the gap opens.

        Args:
            path: a path or an open binary file.
            format: "png", "svg", "pdf" ... None: that of the path's ending, png for a file.

        Raises:
            ImportError: matplotlib isn't installed.
        """
        from .plot import draw

        draw(self.figures, self._head().splitlines()[0], self.first_gap, path, format)


def _verdict_text(verdict: Verdict) -> str:
    layers = ", ".join(verdict.layers[:6]) + (f" and {len(verdict.layers) - 6} more" if len(verdict.layers) > 6 else "")
    lines = [f"{verdict.title} [{verdict.code}]" + (f": {layers}" if layers else "")]
    paragraphs = [*verdict.reasons, *([f"Cure: {verdict.cure}"] if verdict.cure else [])]
    lines += [textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ") for text in paragraphs]
    return "\n".join(lines + [f"    {line}" for line in verdict.code_cure.splitlines()])


def _cells(row: LayerFigures) -> tuple[str, ...]:
    if not row.usable:
        return row.name, "-", "-", "-", f"{row.per_batch:.4g}", "-", "-", ", ".join(_notes(row))
    share, fit = row.start_share
    return (
        row.name,
        _number(row.gap),
        _number(_rms(row.shift)),
        f"{float(np.median(row.ratio)):+.2f}",
        f"{row.per_batch:.4g}",
        f"{min(max(share, 0), 1):.0%}" if fit > 0.5 and row.share_agrees else "-",
        "-" if row.effect is None else _number(row.effect),
        ", ".join(_notes(row)),
    )


def _notes(row: LayerFigures) -> list[str]:
    found = []
    if row.infinite_state:
        found.append(f"{' and '.join(row.infinite_state)} not finite or negative")
    if row.infinite_batches:
        found.append(f"NaN or Inf in {row.infinite_batches} batches")
    if row.frozen:
        found.append("frozen")
    if row.trained is False:
        found.append("never trained")
    if row.always_batch:
        found.append(f"batch statistics in inference ({row.always_batch})")
    if not row.seen:
        return [*found, "no values"]
    if row.constant.any():
        found.append(f"{int(row.constant.sum())} constant channels")
    small = int(np.sum((row.variance < row.epsilon) & ~row.constant))  # type: ignore[operator]
    if small:
        found.append(f"{small} variances below epsilon")
    if row.gamma is not None and (weak := int(np.sum(np.abs(row.gamma) < 1e-3))):
        found.append(f"{weak} gammas near 0")
    if row.other is not None:
        far = between(row.other, (row.mean, row.variance), row.epsilon)  # type: ignore[arg-type]
        found.append(f"data2 is off by {_number(far)}")
    if len(row.sites) > 1:
        found.append(f"called {len(row.sites)} times")
    return found


def _layer(row: LayerFigures) -> dict[str, Any]:
    share, fit = row.start_share
    known = {
        "name": row.name,
        "class": row.classes,
        "axis": list(row.axis),
        "shape": list(row.shape),
        "dtype": row.dtype,
        "momentum": row.momentum,
        "epsilon": row.epsilon,
        "frozen": row.frozen,
        "trained": row.trained,
        "always_batch": row.always_batch,
        "gap": row.gap,
        "values_per_channel": row.count,
        "values_per_batch": row.per_batch,
        "calls": len(row.sites),
        "start_left": share,
        "start_fit": fit,
        "effect": row.effect,
        "step": row.step,
        "not_finite": list(row.infinite_state),
        "batches_not_finite": row.infinite_batches,
        "notes": _notes(row),
        "moving_mean": row.moving_mean.tolist(),
        "moving_variance": row.moving_variance.tolist(),
    }
    if row.seen:
        assert row.mean is not None
        assert row.variance is not None
        known |= {"mean": row.mean.tolist(), "variance": row.variance.tolist()}
        known["constant_channels"] = int(row.constant.sum())
    if row.usable:
        known |= {"mean_off": _rms(row.shift), "variance_log2": float(np.median(row.ratio))}
    if row.top_row is not None and row.top_share is not None:
        known["top_sample"] = {"sample": row.top_row, "channels": int(np.sum(row.top_share > 0.5))}
    return known


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) and value < 100 else f"{value:.3g}"


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
