"""Noise: how a family's models see it in latents, what they predict, and how one step of sampling takes some away.

Sigma is the same everywhere: 0 is a picture without noise, 1 is noise alone.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

_STEPS = 1000
_LEAST_SIGNAL = 2e-4  # the least that a step divides by, where noise alone is left; as in ComfyUI
_BETAS = (0.00085, 0.012)  # the first and the last; their square roots are spaced evenly


class Process(Protocol):
    """Sigmas are (batch,), latents and everything like them (batch, channels, height, width)."""

    name: str

    def mixed(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What the model sees."""
        ...

    def target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """What it should predict."""
        ...

    def step(self, mixed: Tensor, predicted: Tensor, sigmas: Tensor, following: Tensor) -> Tensor:
        """From one sigma to a smaller one, along a prediction."""
        ...


class Flow:
    """A straight path: `x = (1 - sigma) latents + sigma noise`; the model predicts the velocity `noise - latents`
    (Liu et al., arXiv 2209.03003).
    """

    name = "flow"

    def mixed(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return torch.lerp(latents, noise, _wide(sigmas))

    def target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return noise - latents

    def step(self, mixed: Tensor, predicted: Tensor, sigmas: Tensor, following: Tensor) -> Tensor:
        return mixed + _wide(following - sigmas) * predicted


class Discrete:
    """Stable Diffusion's thousand steps: `x = a latents + s noise` with `a^2 + s^2 = 1` (Ho et al., arXiv 2006.11239).

    Step `floor(1000 sigma)` of them belongs to a sigma. The model predicts the noise, or `v = a noise - s latents`
    (Salimans and Ho, arXiv 2202.00512). Steps of sampling are those of DDIM (Song et al., arXiv 2010.02502).

    Args:
        predicts: "epsilon" or "v".
        zero_snr: the last step is noise alone (Lin et al., arXiv 2305.08891).
    """

    def __init__(self, predicts: Literal["epsilon", "v"] = "epsilon", zero_snr: bool = False) -> None:
        self.predicts, self.zero_snr = predicts, zero_snr
        self.name = f"{predicts}, zero terminal SNR" if zero_snr else predicts
        first, last = (beta**0.5 for beta in _BETAS)
        betas = torch.linspace(first, last, _STEPS, dtype=torch.float64) ** 2
        signal = (1 - betas).cumprod(0).sqrt()
        if zero_snr:
            signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
        self._signal = signal

    def levels(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """How much signal (a) and noise (s) there is, ready to be multiplied with latents."""
        signal = self._signal[discrete_steps(sigmas).cpu()]
        signal = torch.where(sigmas.cpu() == 0, torch.ones_like(signal), signal)
        noise = (1 - signal**2).sqrt()
        return _wide(signal.to(sigmas)), _wide(noise.to(sigmas))

    def mixed(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        a, s = self.levels(sigmas)
        return a * latents + s * noise

    def target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        a, s = self.levels(sigmas)
        return noise if self.predicts == "epsilon" else a * noise - s * latents

    def step(self, mixed: Tensor, predicted: Tensor, sigmas: Tensor, following: Tensor) -> Tensor:
        (a, s), (next_a, next_s) = self.levels(sigmas), self.levels(following)
        if self.predicts == "epsilon":
            latents, noise = (mixed - s * predicted) / a.clamp_min(_LEAST_SIGNAL), predicted
        else:
            latents, noise = a * mixed - s * predicted, s * mixed + a * predicted
        return next_a * latents + next_s * noise


def discrete_steps(sigmas: Tensor) -> Tensor:
    """The numbers, 0 to 999, of the steps that sigmas belong to."""
    return (sigmas * _STEPS).long().clamp(max=_STEPS - 1)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


FLOW = Flow()
