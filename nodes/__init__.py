"""The nodes: sockets in, one call into the core or the host, sockets out."""

from comfy_api.latest import ComfyExtension, io

from . import adapter_routes
from .apply import Apply
from .balance import Balance
from .block_scale import BlockScaleNode
from .create_hook import CreateHook
from .demo import ToyAdapter, ToyModel, ToyTextEncoder, ToyVAE
from .host import folders
from .load import LoadDeltaR, LoadResidual
from .load_lora import FromLoRAStack, LoadLoRA
from .merge import Merge
from .prompt import PromptNode
from .save import ExportLoRA, SaveDeltaR
from .save_residual import SaveResidual
from .schedule import ScheduleNode
from .similarity import Similarity
from .sweep import ContactSheetNode, ScaleSweep
from .train import Train
from .train_options import TrainOptionsNode
from .training import routes

NODES: list[type[io.ComfyNode]] = [
    LoadResidual,
    LoadDeltaR,
    LoadLoRA,
    FromLoRAStack,
    Merge,
    Apply,
    SaveResidual,
    SaveDeltaR,
    ExportLoRA,
    Train,
    TrainOptionsNode,
    Similarity,
    Balance,
    ScaleSweep,
    ContactSheetNode,
    BlockScaleNode,
    CreateHook,
    ScheduleNode,
    PromptNode,
    ToyModel,
    ToyAdapter,
    ToyTextEncoder,
    ToyVAE,
]


class QRLoRAExtension(ComfyExtension):
    """What the host asks for: the folder is registered, then the nodes are listed."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register_folders()  # not in on_load: 0.8 and 0.3.64 never call that
        routes.register()
        adapter_routes.register()
        return NODES
