"""Pictures of what the core measures, for the nodes and the shell alike: numpy and PIL, with matplotlib where it is.

Nothing here imports the core, so that both may import this room: what is drawn is the plain JSON of a report.
"""

from .arrays import array_of, images_of
from .balance import balance_figure, balance_image
from .figures import PlotsUnavailableError
from .loss import loss_image
from .sheet import Cell, ContactSheet, contact_sheet, label_axes
from .similarity import head_lines, similarity_figure, similarity_image, similarity_png
from .strengths import strengths_image
from .text import text_card

__all__ = [
    "Cell",
    "ContactSheet",
    "PlotsUnavailableError",
    "array_of",
    "balance_figure",
    "balance_image",
    "contact_sheet",
    "head_lines",
    "images_of",
    "label_axes",
    "loss_image",
    "similarity_figure",
    "similarity_image",
    "similarity_png",
    "strengths_image",
    "text_card",
]
