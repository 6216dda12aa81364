"""What a script that runs inside ComfyUI's interpreter does first: the host on a CPU, the pack loaded as it does."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parents[2]


class Host:
    """The imported host.

    Args:
        arguments: the host's folder, a base folder, and the file for results.
    """

    golden = PACK / "tests" / "golden"

    def __init__(self, arguments):
        host, self.base, self.result = map(Path, arguments)
        sys.argv = ["main.py", "--cpu", "--base-directory", str(self.base)]
        sys.path[0:1] = [str(host)]
        import comfy.options

        comfy.options.enable_args_parsing()
        import utils.extra_config  # noqa: F401 - as main.py does: older hosts put a module utils before it later

        self.pack = load_module("qr_lora_pack", PACK)
        self.helpers = load_module("qr_lora_helpers", PACK / "tests" / "host" / "helper_pack")
        extension = asyncio.run(self.pack.comfy_entrypoint())
        self.nodes = asyncio.run(extension.get_node_list())

    def write(self, checks):
        """Run the checks and write what each found."""
        self.result.write_text(json.dumps({check.__name__: check() for check in checks}, indent=1))


def load_module(name, path):
    """Load a pack as ComfyUI does."""
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
