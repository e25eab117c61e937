from collections.abc import Sequence
from typing import Literal

class Axes:
    def barh(
        self,
        y: Sequence[str] | Sequence[float],
        width: Sequence[float],
        height: float = 0.8,
        *,
        xerr: Sequence[Sequence[float]],
        color: str | Sequence[str],
        label: str = "",
        capsize: float,
    ) -> object: ...
    def errorbar(
        self,
        x: Sequence[float],
        y: Sequence[float],
        *,
        yerr: Sequence[Sequence[float]],
        label: str,
        color: str,
        marker: str,
        capsize: float,
    ) -> object: ...
    def axvline(self, x: float, *, color: str, linestyle: str, label: str) -> object: ...
    def text(self, x: float, y: float, s: str, *, ha: str, va: str, fontsize: float) -> object: ...
    def set_title(self, label: str) -> object: ...
    def set_xlabel(self, xlabel: str) -> object: ...
    def set_ylabel(self, ylabel: str) -> object: ...
    def set_xscale(self, value: Literal["log"]) -> None: ...
    def set_yscale(self, value: Literal["log"]) -> None: ...
    def set_xticks(
        self,
        ticks: Sequence[float],
        labels: Sequence[str] | None = None,
        *,
        minor: bool = False,
    ) -> object: ...
    def set_yticks(
        self,
        ticks: Sequence[float],
        labels: Sequence[str] | None = None,
        *,
        minor: bool = False,
    ) -> object: ...
    def set_xlim(self, left: float, right: float) -> object: ...
    def set_ylim(self, bottom: float, top: float) -> object: ...
    def grid(
        self, *, axis: Literal["x", "y", "both"] = "both", which: str, alpha: float
    ) -> None: ...
    def legend(self, *, fontsize: float) -> object: ...
