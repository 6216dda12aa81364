"""The part of the toy that ships with the pack: its features, its weights in fp8, and two adapters for it."""
