"""What secure aggregation cuts off of a contribution: the user is told, once for each kind."""

from __future__ import annotations

import logging

import numpy as np

from pfedsecure.aggregation.interface import Contribution
from pfedsecure.plan import Plan

_logger = logging.getLogger(__name__)


class Limits:
    """Those of a plan. Plain averaging has none."""

    def __init__(self, plan: Plan) -> None:
        self._secure = plan.protection.aggregation == "secure"
        self._agreed = plan.secure_aggregation
        self._told_of_clip = self._told_of_weight = False

    def tell(self, contribution: Contribution) -> None:
        """Warn when what is summed is not what this client trained."""
        if not self._secure:
            return
        clip, max_weight = self._agreed.clip, self._agreed.max_weight
        beyond = int((np.abs(contribution.context) > clip).sum())
        if beyond and not self._told_of_clip:
            self._told_of_clip = True
            _logger.warning(
                "%d of the prompt's %d numbers are clipped to the plan's secure_aggregation.clip of %g before they are "
                "summed; the global prompt is less exact for it",
                beyond,
                contribution.context.size,
                clip,
                extra={"private": True},
            )
        if contribution.weight > max_weight and not self._told_of_weight:
            self._told_of_weight = True
            _logger.warning(
                "this client's %d training images count as %d, the plan's secure_aggregation.max_weight",
                contribution.weight,
                max_weight,
                extra={"private": True},
            )
