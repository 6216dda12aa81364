"""A FLUX small enough for a laptop, and pictures whose content and style can be told apart by eye and by program."""
