"""Before compute: every node must see the model and the folders that the driver sees."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

from actors.worker import Whereabouts
from storage.errors import ResourceError
from storage.run.shared_folders import Marked, unanswered


def require_shared_view(
    marks: Sequence[Marked],
    unseen: Mapping[int, Sequence[str]],
    where: Mapping[int, Whereabouts],
) -> None:
    """Raises `ResourceError`, naming each node that does not see what the driver sees.

    unseen: of each rank, from `pipeline.preflight.shared_folders`; for a rank without any, its
    answers are looked for here. where: the ranks' processes.
    """
    by_node: dict[str, str] = {}
    for rank, reported in unseen.items():
        # Several ranks of a node see the same.
        if missing := reported or unanswered(marks, rank):
            text = f"{node_name(where[rank])} {'; '.join(missing)}"
            by_node.setdefault(where[rank].node, text)
    if by_node:
        raise ResourceError(
            f"{'; '.join(by_node.values())}; MODEL, OUTPUT and the run directory must be on "
            f"filesystems that all nodes and the driver (on {socket.gethostname()}) share under "
            "the same paths"
        )


def node_name(where: Whereabouts) -> str:
    """A node for people: several may have one host name, and Ray speaks of addresses."""
    return f"node {where.host} ({where.address})"
