"""A study of how a content and a style adapter are best put together, on the toy FLUX; see `__main__`."""
