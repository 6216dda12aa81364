"""The nodes: sockets in, one call into the core or the host, sockets out."""

from comfy_api.latest import ComfyExtension, io

from . import folders, routes
from .files import LoadDeltaR, LoadResidual
from .model import Apply, Merge
from .options import TrainOptionsNode
from .save import ExportLoRA, SaveDeltaR, SaveResidual
from .train import Train

NODES: list[type[io.ComfyNode]] = [
    LoadResidual,
    LoadDeltaR,
    Merge,
    Apply,
    SaveResidual,
    SaveDeltaR,
    ExportLoRA,
    Train,
    TrainOptionsNode,
]


class QRLoRAExtension(ComfyExtension):
    """What the host asks for: the folder is registered, then the nodes are listed."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register_folders()  # not in on_load: 0.8 and 0.3.64 never call that
        routes.register()
        return NODES
