"""The trainer of QR-LoRA adapters, a program of its own: `python -m train --help`. It never imports ComfyUI."""
