"""Gradient isolation: what a domain's loss may not reach. Checked where gradients arrive, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kasmina.hooks import on_gradient
from leyline.messages import IsolationReport
from leyline.topology import HOST


class IsolationLeak(RuntimeError):
    """A domain's loss gave another domain's parameter a gradient; the sentence names both."""


class IsolationUnchecked(RuntimeError):
    """The model has several domains, but no backward pass said whose loss it was."""


class IsolationCheck:
    """Watches backward passes of one domain's loss for gradients that arrive at other domains' parameters.

    A hook on a parameter runs only when a gradient arrives there, so an isolated step costs nothing; what arrives is
    compared with zero on its device, and the answer is read when the report is asked for.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], domains: Mapping[str, str]) -> None:
        self._parameters = parameters
        self._domains = domains
        self.names = tuple(sorted(set(domains.values()), key=lambda d: (d != HOST, d)))
        self._arrived: dict[tuple[str, str], Tensor] = {}
        self._leak: tuple[str, str] | None = None
        self.checked_steps = 0

    @contextmanager
    def watch(self, domain: str) -> Iterator[None]:
        """Every gradient that arrives at a foreign parameter inside this block is a leak, unless it is all zero."""
        if domain not in self.names:
            raise ValueError(f"there is no domain {domain}; this model's domains are {', '.join(self.names)}")
        handles = [
            on_gradient(parameter, self._hook(name, domain))
            for name, parameter in self._parameters.items()
            if parameter.requires_grad and self._domains[name] != domain
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, domain: str) -> Callable[[Tensor], None]:
        def arrived(grad: Tensor) -> None:
            values = grad.coalesce().values() if grad.is_sparse else grad
            found = (values != 0).any()
            key = (name, domain)
            earlier = self._arrived.get(key)
            self._arrived[key] = found if earlier is None else torch.logical_or(earlier, found)

        return arrived

    @property
    def leak(self) -> tuple[str, str] | None:
        """(parameter, domain of the loss) of the first leak, in the model's order; once found it stays."""
        if self._leak is None:
            self._leak = next((key for key in sorted(self._arrived) if bool(self._arrived[key])), None)
        return self._leak

    def report(self) -> IsolationReport:
        leak = self.leak
        return IsolationReport(
            checked_steps=self.checked_steps, domains=self.names, leak=None if leak is None else leak[0]
        )

    def raise_if_leaking(self, sampled_steps: int) -> None:
        """IsolationLeak if one was seen; IsolationUnchecked if nobody looked although there was something to see."""
        if (leak := self.leak) is not None:
            name, domain = leak
            raise IsolationLeak(
                f"the loss of domain {domain} gave {name} of domain {self._domains[name]} a gradient; detach what "
                "crosses between them, and start again from a checkpoint before the leak: nothing is published"
            )
        if len(self.names) > 1 and sampled_steps and not self.checked_steps:
            raise IsolationUnchecked(
                f"this model has the domains {', '.join(self.names)}, but none of {sampled_steps} sampled steps said "
                "whose loss it was; call tracker.backward(loss, domain=...) instead of loss.backward()"
            )

    def restore(self, report: IsolationReport, leak_domain: str | None) -> None:
        """Go on from a stored report."""
        self.checked_steps = report.checked_steps
        self._arrived = {}
        self._leak = (report.leak, leak_domain) if report.leak is not None and leak_domain is not None else None
