"""What is said besides the log: at the node it concerns, in the page of whoever runs the graph."""

from __future__ import annotations

import sys
from typing import Any

EVENT = "sun.notice"


def running_node() -> str | None:
    """Id of the node that ComfyUI runs at this moment; of one in a subgraph, its path (12:5). None outside a graph."""
    module = sys.modules.get("comfy_execution.utils")
    context = module.get_executing_context() if module is not None else None
    return None if context is None else str(context.node_id)


def tell(node: str | None, text: str, **values: Any) -> None:
    """Has the page show one of its texts (locales/*/main.json, key "sun") with `values` filled in at a node.

    Does nothing where nodes run without a server, or outside a graph.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node is not None:
        server.send_sync(EVENT, {"node": node, "text": text, "values": values}, getattr(server, "client_id", None))
