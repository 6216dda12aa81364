"""What libraries say while they are imported, about themselves and to nobody: kept out of the terminal.

Each line names its logger and the words that begin or end it; everything else those libraries warn of stays.
"""

import logging

_CHATTER = {
    "torchao": "Failed to load",  # extensions for other Pythons and other cards than this one
    "torchao.kernel.intmm": "Detected no triton",
    "torch.utils._pytree": "is now natively supported by torch.compile",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "transformers.utils.import_utils": "requires torchvision",
}


def silence() -> None:
    """Drop these lines from now on; to be called before the libraries are imported."""
    for name, words in _CHATTER.items():
        logger = logging.getLogger(name)
        if not any(isinstance(one, _Without) for one in logger.filters):
            logger.addFilter(_Without(words))


class _Without(logging.Filter):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.words = words

    def filter(self, record: logging.LogRecord) -> bool:
        return self.words not in record.getMessage()
