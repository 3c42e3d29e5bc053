"""The score by which a cluster's autoscaler chooses a node type: by resources as Ray does, then by what the cloud has.

Ray's own score looks at resources alone. Of two equal types, one spot and one on demand, it takes the one whose name
comes last in the alphabet, and asks for it again and again when the cloud has none. Ray notes for half an hour which
type it could not get and hands that to a score named in `RAY_AUTOSCALER_UTILIZATION_SCORER`; this one makes use of it:
a type that was refused comes after an equal one that was not. For autoscaler v1 of Ray 2.60; v2 has no such choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer


def score(
    node_resources: Mapping[str, float],
    resources: Sequence[Mapping[str, float]],
    node_type: str,
    *,
    node_availability_summary: NodeAvailabilitySummary,
) -> tuple[tuple[float, ...], bool] | None:
    """Return a node type's score; the highest is started, None never.

    Args:
        node_resources: What a node of the type has.
        resources: What the waiting trials ask for.
        node_type: Its name in the cluster's YAML.
        node_availability_summary: Which types could be had and which could not, in the last half hour.
    """
    fit = _default_utilization_scorer(
        node_resources, resources, node_type, node_availability_summary=node_availability_summary
    )
    record = node_availability_summary.node_availabilities.get(node_type)
    return None if fit is None else (fit, record is None or record.is_available)
